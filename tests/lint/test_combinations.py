"""combinations.py: what is right but hardly meant, where it stands, and what is left alone."""

from __future__ import annotations

import pytest
import tomli

from tfenv.config.document import Document
from tfenv.config.schema import validate
from tfenv.errors import Finding
from tfenv.lint.combinations import advise
from tfenv.policy.model import Device, Inventory, Layer, LayerName, Source

GIB = 1 << 30
A10, A100 = "NVIDIA A10", "NVIDIA A100"
CARDS = Inventory(
    (
        Device(0, "GPU-00000000-0000-4000-8000-000000000000", A10, 24 * GIB),
        Device(1, "GPU-11111111-0000-4000-8000-000000000000", A100, 80 * GIB),
    )
)
FIRST, SECOND = '"GPU-0"', '"GPU-1"'


def read_layer(text: str, layer: LayerName = "machine") -> tuple[Layer, Document]:
    document = Document(Source(layer, "/etc/tfgpu/tfgpu.toml"), tomli.loads(text), "0" * 64, text, 0)
    validated, findings = validate(document)
    assert findings == ()
    return validated, document


def find_remarks(text: str, layer: LayerName = "machine", inventory: Inventory | None = None) -> tuple[Finding, ...]:
    validated, document = read_layer(text, layer)
    return advise([validated], [document], inventory)


def list_codes(
    text: str, layer: LayerName = "machine", inventory: Inventory | None = None
) -> list[tuple[str, int | None]]:
    """List the codes and lines of the remarks."""
    return [(found.code, found.line) for found in find_remarks(text, layer, inventory)]


def test_max_devices_alone_is_advised_against() -> None:
    """max_devices without a choice gives everybody the same card. With {count = 1} there is nothing to say."""
    assert list_codes("ceiling.max_devices = 1") == [("first-card-for-all", 1)]
    assert list_codes("ceiling.max_devices = 1\ngpu.visible_devices = {count = 1}") == []
    assert list_codes("gpu.visible_devices = {count = 1}\n[group.root]\nceiling.max_devices = 1") == []
    assert list_codes("ceiling.max_devices = 0") == []
    assert list_codes('ceiling.max_devices = 1\ngpu.visible_devices = ["GPU-8932f937"]') == []


@pytest.mark.parametrize(
    "text",
    [
        'ceiling.memory_limit = "granted"\ngpu.memory_limit = "79GiB"',
        'ceiling.memory_limit = "granted"\ngpu.memory_limit = "granted"',
        'ceiling.memory_limit = "10%"\ngpu.memory_limit = "granted"',
        'ceiling.memory_limit = "granted"\n[[gpu.device]]\nmatch = "GPU-1"\nlogical_devices = ["40GiB", "39GiB"]',
        '[[gpu.device]]\nmatch = "GPU-1"\nmemory_limit = "granted"\nlogical_devices = ["40GiB", "39GiB"]',
    ],
)
def test_a_granted_limit_is_compared_with_nothing(text: str) -> None:
    """How much it is, only a job tells."""
    assert list_codes(text, inventory=CARDS) == []


def test_no_limit_under_a_granted_ceiling() -> None:
    """What asks for no limit at all is above any share."""
    (remark,) = find_remarks('ceiling.memory_limit = "granted"\ngpu.memory_limit = "none"')
    assert (remark.code, remark.key) == ("above-ceiling", "gpu.memory_limit")
    assert '"none" (no limit) is above the ceiling of "granted" in line 1' in remark.message


def test_numbers_in_the_machine_layer_are_advised_against() -> None:
    """Numbers shift in containers: the machine layer should name UUIDs. Elsewhere numbers are TensorFlow's own."""
    text = '[gpu]\nvisible_devices = [1]\n[ceiling]\nallowed_devices = ["GPU-8932f937", 1]\n[[gpu.device]]\nmatch = 1\n'
    assert list_codes(text) == [("numbers-in-machine-layer", line) for line in (2, 4, 5)]
    assert list_codes(text, "project") == []
    assert list_codes('gpu.visible_devices = ["GPU-8932f937"]') == []


def test_where_nvml_knows_it_the_uuid_is_offered() -> None:
    """Of a number that this machine has, the UUID to write instead is told."""
    (found,) = find_remarks("gpu.visible_devices = [1]", inventory=CARDS)
    assert 'write "GPU-11111111" for 1' in found.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # no device is left
        ("ceiling.allowed_devices = []\ngpu.visible_devices = {count = 1}", [("no-devices-left", 2)]),
        ('ceiling.allowed_devices = "none"\ngpu.visible_devices = ["GPU-1"]', [("no-devices-left", 2)]),
        ("ceiling.max_devices = 0\ngpu.visible_devices = {rank = 'auto'}", [("no-devices-left", 2)]),
        ("ceiling.max_devices = 0\n[group.root.gpu]\nvisible_devices = {count = 1}", [("no-devices-left", 3)]),
        ("ceiling.max_devices = 0\ngpu.visible_devices = 'none'", []),
        ("ceiling.max_devices = 0\n[group.root]\ngpu.visible_devices = {count = 1}\nceiling.max_devices = 1", []),
        ("gpu.visible_devices = {count = 1}\n[group.root]\nceiling.max_devices = 0", []),
        # outside of what is allowed
        ("ceiling.allowed_devices = ['GPU-1a']\ngpu.visible_devices = ['GPU-2b']", [("outside-ceiling", 2)]),
        ("ceiling.allowed_devices = ['GPU-1a']\ngpu.visible_devices = ['GPU-1A2', 'GPU-2']", [("outside-ceiling", 2)]),
        ("ceiling.allowed_devices = ['GPU-1a']\ngpu.visible_devices = ['GPU-1']", []),
        ("ceiling.allowed_devices = ['GPU-1a']\ngpu.visible_devices = ['name:*A10*']", []),
        (
            "gpu.visible_devices = ['GPU-2']\n[group.root]\nceiling.allowed_devices = ['GPU-1']",
            [("outside-ceiling", 3)],
        ),
        ("gpu.visible_devices = ['GPU-1', 'GPU-2']\n[group.root]\nceiling.allowed_devices = ['GPU-1']", []),
        # more than a ceiling lets pass
        ("ceiling.max_devices = 1\ngpu.visible_devices = {count = 2}", [("above-ceiling", 2)]),
        ("ceiling.max_devices = 1\ngpu.visible_devices = ['GPU-1', 'GPU-2']", [("above-ceiling", 2)]),
        ("ceiling.allowed_devices = ['GPU-1']\ngpu.visible_devices = {count = 2}", [("above-ceiling", 2)]),
        ("ceiling.allowed_devices = ['name:*']\ngpu.visible_devices = {count = 2}", []),
        # growth and memory
        ("ceiling.require_memory_growth = true\ngpu.memory_growth = false", [("above-ceiling", 2)]),
        ("ceiling.require_memory_growth = false\ngpu.memory_growth = false", []),
        ("ceiling.memory_limit = '8GiB'\ngpu.memory_limit = '9GiB'", [("above-ceiling", 2)]),
        ("ceiling.memory_limit = '50%'\ngpu.memory_limit = '60%'", [("above-ceiling", 2)]),
        ("ceiling.memory_limit = '50%'\ngpu.memory_limit = 'none'", [("above-ceiling", 2)]),
        ("ceiling.memory_limit = 'none'\ngpu.memory_limit = '9GiB'", []),
        ("ceiling.memory_limit = '50%'\ngpu.memory_limit = '900GiB'", []),
        (
            "ceiling.memory_limit = '8GiB'\n[[gpu.device]]\nmatch = 'name:*A'\nmemory_limit = '9GiB'",
            [("above-ceiling", 2)],
        ),
        ("ceiling.memory_limit = '8GiB'\n[group.root]\ngpu.memory_limit = '9GiB'", [("above-ceiling", 3)]),
        ("ceiling.memory_limit = '8GiB'\n[group.root]\ngpu.memory_limit = '9GiB'\nceiling.memory_limit = '9GiB'", []),
        ("gpu.memory_limit = '9GiB'\n[group.root]\nceiling.memory_limit = '8GiB'", []),
        (
            "[project.'/usr/lib']\ngpu.memory_limit = '9GiB'\n[project.'/usr']\nceiling.memory_limit = '8GiB'",
            [("above-ceiling", 2)],
        ),
        # splits
        (
            "ceiling.memory_limit = '8GiB'\n[[gpu.device]]\nmatch = 'GPU-1'\nlogical_devices = ['5GiB', '5GiB']",
            [("above-ceiling", 2)],
        ),
        (
            "gpu.memory_limit = '30%'\ngpu.device = [{match = 'GPU-1', logical_devices = ['20%', '20%']}]",
            [("above-ceiling", 2)],
        ),
        ("gpu.memory_limit = '30%'\ngpu.device = [{match = 'GPU-1', logical_devices = ['10%', '10%', '10%']}]", []),
        (
            "gpu.device = [{match = 'name:*', memory_limit = '1GiB'}, {match = 'GPU-1', memory_limit = '2GiB'}]",
            [("never-counts", 1)],
        ),
        ("gpu.device = [{match = 'GPU-1', memory_limit = '1GiB'}, {match = 'name:*', memory_limit = '2GiB'}]", []),
    ],
)
def test_impossible_combinations(text: str, expected: list[tuple[str, int]]) -> None:
    """What a ceiling of the same or a less specific table takes from a setting is told. An intended clamp is not."""
    assert list_codes(text) == expected
    for found in find_remarks(text):
        assert found.severity == "warning"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"gpu.visible_devices = [{FIRST}, 'GPU-f']", [("no-such-device", 1)]),
        ("ceiling.allowed_devices = ['name:*H100*']", [("no-such-device", 1)]),
        ("ceiling.allowed_devices = ['MIG-1']", []),
        ("gpu.device = [{match = 'GPU-f', memory_limit = '1GiB'}]", [("no-such-device", 1)]),
        ("gpu.visible_devices = [2]", [("numbers-in-machine-layer", 1), ("no-such-device", 1)]),
        (f"ceiling.allowed_devices = ['name:*A100']\ngpu.visible_devices = [{FIRST}]", [("outside-ceiling", 2)]),
        (f"ceiling.allowed_devices = ['name:*A100']\ngpu.visible_devices = [{SECOND}]", []),
        ("gpu.memory_limit = '81GiB'", [("above-card", 1)]),
        ("ceiling.memory_limit = '81GiB'", [("above-card", 1)]),
        ("gpu.memory_limit = '80GiB'", []),
        (f"gpu.device = [{{match = {FIRST}, memory_limit = '25GiB'}}]", [("above-card", 1)]),
        (f"gpu.device = [{{match = {FIRST}, logical_devices = ['50%', '13GiB']}}]", [("above-card", 1)]),
        (f"gpu.device = [{{match = {FIRST}, logical_devices = ['50%', '12GiB']}}]", []),
        ("ceiling.memory_limit = '10%'\ngpu.memory_limit = '9GiB'", [("above-ceiling", 2)]),
        ("ceiling.memory_limit = '50%'\ngpu.memory_limit = '20GiB'", []),
    ],
)
def test_what_the_cards_say(text: str, expected: list[tuple[str, int]]) -> None:
    """With NVML, missing cards and limits above every card are warnings. Without it, nothing is said of them."""
    assert list_codes(text, inventory=CARDS) == expected
    silent = [(code, line) for code, line in expected if code == "numbers-in-machine-layer"]
    assert list_codes(text) == list_codes(text, inventory=Inventory(problem="no driver")) == silent


def test_a_projects_file_may_name_the_cards_of_several_machines() -> None:
    """In a project only a list of which no card is here is worth a word."""
    assert list_codes(f"gpu.visible_devices = [{FIRST}, 'GPU-f']", "project", CARDS) == []
    assert list_codes("gpu.visible_devices = ['GPU-e', 'GPU-f']", "project", CARDS) == [("no-such-device", 1)]


def test_the_other_place_is_named_with_its_line() -> None:
    """A message about two keys says where the other one stands."""
    (found,) = find_remarks("[ceiling]\nmemory_limit = '8GiB'\n[gpu]\nmemory_limit = '9GiB'\n")
    assert "above the ceiling of 8.0 GiB in line 2" in found.message
    assert (found.line, found.column, found.key) == (4, 1, "gpu.memory_limit")


def test_layers_are_not_mixed() -> None:
    """A user's wish above the machine's ceiling is no mistake of a file: it is clamped, as ceilings are meant to."""
    machine, first = read_layer("ceiling.memory_limit = '8GiB'")
    user, second = read_layer("gpu.memory_limit = '9GiB'", "user")
    assert advise([machine, user], [first, second]) == ()


def test_tables_for_others_in_somebodys_file_are_read_as_well() -> None:
    """What users/root.toml says of a project may be impossible, too."""
    text = "[project.'/usr']\nceiling.max_devices = 0\ngpu.visible_devices = {count = 1}\n"
    document = Document(Source("machine", "/e/users/root.toml", scope=("user", "root")), tomli.loads(text), "", text, 0)
    assert [found.code for found in advise([validate(document)[0]], [document])] == ["no-devices-left"]
