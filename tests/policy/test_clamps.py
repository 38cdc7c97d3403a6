from __future__ import annotations

import pytest

from tests.policy.values import CARDS, GIB, make_layer, make_origin, pick, plan
from tfenv.policy.model import Allocation, AutoChoice, DeviceRule, Grant, LayerName, MemoryLimit, Plan, Selector
from tfenv.values import replace

LESS, MORE = MemoryLimit(bytes=2 * GIB), MemoryLimit(bytes=20 * GIB)


def list_wishes(made: Plan) -> list[tuple[str | None, str | None]]:
    return [(finding.asked, finding.given) for finding in made.findings if finding.is_lost_wish]


@pytest.mark.parametrize(
    ("asking", "holding", "is_lost"),
    [
        ("user", "machine", True),
        ("project", "machine", True),
        ("project", "user", True),
        ("run", "project", True),
        ("user", "site", True),
        ("site", "machine", False),
        ("site", "user", False),
        ("machine", "machine", False),
        ("machine", "user", False),
        ("user", "user", False),
        ("project", "project", False),
    ],
)
def test_a_wish_is_lost_to_somebody_else(asking: LayerName, holding: LayerName, is_lost: bool) -> None:
    """A user's or project's setting that another layer cuts is a lost wish. What is set for everybody is none."""
    if asking == holding:
        made = plan(make_layer(asking, {"memory_limit": MORE}, {"memory_limit": LESS}))
    else:
        made = plan(make_layer(asking, {"memory_limit": MORE}), make_layer(holding, ceiling={"memory_limit": LESS}))
    assert list_wishes(made) == ([("memory_limit = 20.0 GiB", "2.0 GiB")] if is_lost else [])
    assert made.asked == (MORE if is_lost else None)
    assert [finding.code for finding in made.findings] == ["clamped"]  # for `tfgpu explain`, whoever asked


def test_what_a_device_was_to_get_is_known_for_each() -> None:
    """The entry that counts for a GPU says what was asked of it. A split that is scaled down asked for its sum."""
    rule = DeviceRule(Selector("position", "1"), make_origin("project", "gpu", "device", 0), MORE)
    split = replace(rule, match=Selector("position", "2"), memory_limit=None, logical_devices=(MORE, MORE))
    machine = make_layer("machine", ceiling={"memory_limit": LESS})
    made = plan(machine, make_layer("project", {"device": (rule, split)}))
    assert [device.asked for device in made.devices or ()] == [None, MORE, MemoryLimit(bytes=40 * GIB), None]
    wishes = list_wishes(made)
    assert wishes == [
        ("memory_limit = 20.0 GiB", "2.0 GiB"),
        ("logical_devices = 20.0 GiB, 20.0 GiB", "1.0 GiB, 1.0 GiB"),
    ]


VISIBLE: dict[str, tuple[dict[str, object], dict[str, object], tuple[str, str]]] = {
    "allowed": ({"visible_devices": pick(0, 3)}, {"max_devices": 1}, ("visible_devices = 0, 3", "0")),
    "all": ({"visible_devices": "all"}, {"max_devices": 2}, ("visible_devices = 0, 1, 2, 3", "0, 1")),
    "count": (
        {"visible_devices": AutoChoice(count=3)},
        {"max_devices": 2},
        ("visible_devices = {count = 3}", "{count = 2}"),
    ),
}


@pytest.mark.parametrize("name", VISIBLE)
def test_gpus_that_a_file_asked_for_and_did_not_get(name: str) -> None:
    """The finding says which GPUs, or how many, a file asked for, and which it got."""
    setting, ceiling, wish = VISIBLE[name]
    made = plan(make_layer("machine", ceiling=ceiling), make_layer("user", setting))
    assert list_wishes(made) == [wish]


def test_nobody_asked_for_what_all_get() -> None:
    """`max_devices` without a word about GPUs from anybody takes GPUs away, but from no wish."""
    made = plan(make_layer("machine", ceiling={"max_devices": 2}), make_layer("user", {"memory_growth": True}))
    assert [finding.code for finding in made.findings] == ["clamped"]
    assert list_wishes(made) == []


def test_the_grant_takes_from_a_wish_as_ceilings_do() -> None:
    """A file that names more GPUs than the scheduler gave has lost them to the grant."""
    made = plan(make_layer("user", {"visible_devices": pick(0, 1)}), grant=Grant(tokens=("2",)))
    (finding,) = [finding for finding in made.findings if finding.is_lost_wish]
    assert (finding.asked, finding.given, finding.held_by) == ("visible_devices = 0, 1", "2", "the grant (2)")


def test_a_program_that_asks_for_gpus_has_lost_a_wish_whatever_held() -> None:
    """CUDA_VISIBLE_DEVICES of a program is a wish under every layer's ceiling."""
    made = plan(make_layer("user", ceiling={"allowed_devices": pick(0, 1)}), request="1,3")
    assert list_wishes(made) == [("CUDA_VISIBLE_DEVICES = 1, 3", "1")]


def test_what_the_users_other_processes_hold_is_lost_too() -> None:
    """Under an administrator's `memory_total`, a file's limit that no longer fits is a wish that was cut."""
    asked = make_layer("user", {"visible_devices": pick(0), "memory_limit": MemoryLimit(bytes=8 * GIB)})
    total = make_layer("machine", ceiling={"memory_total": MemoryLimit(bytes=10 * GIB)})
    made = plan(total, asked, allocations=(Allocation(CARDS[0].uuid, 4 * GIB),))
    assert list_wishes(made) == [("memory_limit = 8.0 GiB", "4.0 GiB")]
    assert [device.asked for device in made.devices or ()] == [MemoryLimit(bytes=8 * GIB)]
    nobody = make_layer("user", {"visible_devices": pick(0)})
    assert list_wishes(plan(total, nobody, allocations=(Allocation(CARDS[0].uuid, 4 * GIB),))) == []
