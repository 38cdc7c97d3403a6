"""A file of tests is read, and whatever is wrong in it has its place and what would be right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft7Validator

from tfenv.config.document import peek_text
from tfenv.config.schema import load_schema, schema_path
from tfenv.config.schema_copy import TEST_COPY_NAME, flatten_schema
from tfenv.policy.model import MemoryLimit, Subject
from tfenv.policy_tests.load import PolicyLoader
from tfenv.policy_tests.model import Suite
from tfenv.policy_tests.read import list_test_files, read_suite
from tfenv.policy_tests.run import run_suites

GOOD = '[[case]]\nname = "a"\ngpus = "2x24GiB"\n[case.expect]\ndevices = 2\n'


def read(folder: Path, text: str | bytes) -> Suite:
    (folder / "tfgpu.toml").write_text("[gpu]\nmemory_growth = true\n")
    path = folder / "tfgpu.test.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_suite(str(path))


@pytest.fixture(scope="module", name="folder")
def fixture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for all examples of the properties."""
    return tmp_path_factory.mktemp("suite")


def list_messages(suite: Suite) -> list[str]:
    return [str(finding).partition("tfgpu.test.toml:")[2] for finding in suite.findings]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", " has no cases; write [[case]], a name, and what is expected in [case.expect]"),
        ("[gpu\n", "1:4: this file is not valid TOML"),
        ("today = 2027-01-01\n" + GOOD, '1:1: today: unknown key "today" here; write it into [defaults]'),
        (GOOD + "device = 1\n", '6:1: case[0].expect.device: unknown key "device"; did you mean "devices"?'),
        (GOOD.replace("devices", "memory"), '5:1: case[0].expect.memory: unknown key "memory"'),
        (GOOD + '[[case]]\nname = "b"\n', "6:3: case[1]: expects nothing; write [case.expect]"),
        (GOOD.replace("devices = 2", ""), "4:7: case[0].expect: expects nothing; write what the process gets"),
        (GOOD + GOOD, '7:1: case[1].name: another case is called "a"; change one name'),
        (GOOD.replace('gpus = "2x24GiB"', ""), '1:3: case[0]: names no GPUs; write gpus = "4x80GiB"'),
        (GOOD.replace("2x24GiB", "2x24"), '3:1: case[0].gpus: "24" is not the size of a GPU; write "24GiB"'),
        (
            GOOD.replace("devices = 2", 'devices = "2"'),
            '5:1: case[0].expect.devices: "2" is not understood; write devices = 1',
        ),
        (GOOD.replace("devices = 2", "memory_growth = 1"), "5:1: case[0].expect.memory_growth: 1 is not true or false"),
        (
            GOOD.replace("devices = 2", 'memory_limit = "8 gigs"'),
            '5:1: case[0].expect.memory_limit: "gigs" is not a unit',
        ),
        (GOOD.replace("devices = 2", 'allocator = "bcf"'), '5:1: case[0].expect.allocator: "bcf" is none of'),
        (
            GOOD.replace("devices = 2", 'memory_limit = "granted"'),
            '5:1: case[0].expect.memory_limit: "granted" is not a size',
        ),
        (
            GOOD.replace("[case.expect]", 'launcher = "slurm"\n[case.expect]'),
            '4:1: case[0].launcher: "slurm" is none of',
        ),
        (GOOD.replace("[case.expect]", 'user_fil = "a"\n[case.expect]'), 'did you mean "user_file"?'),
        (GOOD.replace("[case.expect]", "share = nan\n[case.expect]"), "4:1: case[0].share: nan is not a part of a GPU"),
        (
            GOOD.replace("[case.expect]", "devices = 1\n[case.expect]"),
            'unknown key "devices" here; write it into [case.expect]',
        ),
        ("[defaults]\ntoday = 2027-01-01T00:00:00\n" + GOOD, "2:1: defaults.today: "),
        (
            '[defaults]\ntoday = "2027-02-30"\n' + GOOD,
            '2:1: defaults.today: "2027-02-30" is not a day; write today = 2027-02-01',
        ),
        ('[defaults]\nuuids = ["GPU-1"]\n' + GOOD, "2:1: defaults.uuids: 1 UUIDs for 2 GPUs; write one for each"),
        ('policy = "nowhere"\n' + GOOD, '1:1: policy: there is no "nowhere"; write where the policy is'),
        (
            'layer = "user"\n' + GOOD.replace("[case.expect]", "user_file.gpu = {}\n[case.expect]"),
            "the user's file itself",
        ),
    ],
)
def test_a_mistake_has_its_place(text: str, message: str, tmp_path: Path) -> None:
    """Each mistake is one finding with line, column, key and what would be right. Its case is not run."""
    suite = read(tmp_path, text)
    assert [found for found in list_messages(suite) if message in found], list_messages(suite)
    assert all(finding.severity == "error" for finding in suite.findings)
    assert len(suite.findings) == 1
    assert len(suite.cases) <= 1


def test_the_other_cases_are_kept(tmp_path: Path) -> None:
    """A mistake in one case costs no other case."""
    suite = read(tmp_path, GOOD + '[[case]]\nname = "b"\ngpus = "x"\nexpect.devices = 1\n' + GOOD.replace('"a"', '"c"'))
    assert [case.name for case in suite.cases] == ["a", "c"]
    assert len(suite.findings) == 1


def test_defaults_are_for_all_cases(tmp_path: Path) -> None:
    """What a case does not say is taken from [defaults], key by key."""
    text = '[defaults]\nuser = "alice"\ngroups = ["a"]\ngpus = "2x24GiB"\ntoday = 2027-02-01\n'
    text += '[[case]]\nname = "a"\nexpect.devices = 2\n'
    text += (
        '[[case]]\nname = "b"\ngroups = []\ngpus = "none"\ntoday = 2028-01-01\nexpect.memory_limit = ["8GiB", "25%"]\n'
    )
    first, second = read(tmp_path, text).cases
    assert first.subject == Subject("alice", -1, ("a",), str(tmp_path))
    assert (first.today, len(first.inventory.devices or ())) == ("2027-02-01", 2)
    assert second.subject.groups == ()
    assert (second.today, second.inventory.devices, second.inventory.no_driver) == ("2028-01-01", None, True)
    assert second.expect.memory_limit == (MemoryLimit(bytes=8 << 30), MemoryLimit(fraction=0.25))


@pytest.mark.parametrize(
    ("files", "head", "layer", "path"),
    [
        (["tfgpu.toml"], "", "project", "tfgpu.toml"),
        (["pyproject.toml"], "", "project", "pyproject.toml"),
        (["tfgpu.toml", "groups/a.toml"], "", "machine", ""),
        (["tfgpu.toml", "users/a.toml"], 'policy = "users/a.toml"\n', "machine", ""),
        (["tfgpu.toml"], 'layer = "machine"\n', "machine", ""),
        (["tfgpu.toml"], 'layer = "user"\n', "user", "tfgpu.toml"),
        (["etc/tfgpu.toml"], 'policy = "etc/tfgpu.toml"\n', "project", "etc/tfgpu.toml"),
        (["etc/tfgpu.toml", "etc/users/a.toml"], 'policy = "etc"\n', "machine", "etc"),
    ],
)  # fmt: skip
def test_the_policy_is_found(files: list[str], head: str, layer: str, path: str, tmp_path: Path) -> None:
    """It is the one beside the file, or what `policy` names. Folders for groups or users make it a machine's."""
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "a.test.toml").write_text(head + GOOD)
    suite = read_suite(str(tmp_path / "a.test.toml"))
    assert suite.findings == ()
    assert suite.policy is not None
    assert (suite.policy.layer, suite.policy.path) == (layer, str(tmp_path / path))


def test_hidden_folders_are_not_searched(tmp_path: Path) -> None:
    """A directory means all tests below it, but not those of packages and of version control."""
    for name in ("a.test.toml", "b/c.test.toml", ".git/d.test.toml", "node_modules/e.test.toml", "b/tfgpu.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = [str(Path(path).relative_to(tmp_path)) for path in list_test_files(str(tmp_path))]
    assert found == ["a.test.toml", "b/c.test.toml"]


# ---- whatever stands in it

SCALARS = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=8), st.dates(), st.datetimes(),
    st.sampled_from(["4x80GiB", "none", "Slurm", "20GiB", "-1", "GPU-8932f937", "0:1", "bfc", "/srv", "uid:7", "."]),
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))
SCHEMA = flatten_schema(load_schema(TEST_COPY_NAME))
CASE = SCHEMA["properties"]["case"]["items"]["properties"]


def tables(properties: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    known = {name: st.sampled_from(entry["examples"]) for name, entry in properties.items()}
    junk = st.dictionaries(st.sampled_from([*properties, "other"]), VALUES, max_size=2)
    return st.builds(lambda right, wrong: right | wrong, st.fixed_dictionaries({}, optional=known), junk)


def format_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {format_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(format_toml, value)) + "]"
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    if isinstance(value, float):
        return {"inf": "inf", "-inf": "-inf", "nan": "nan"}.get(str(value), repr(value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value).lower()


@given(
    st.fixed_dictionaries(
        {"case": st.lists(tables(CASE | {"expect": CASE["expect"]}), max_size=4)},
        optional={"defaults": tables(SCHEMA["properties"]["defaults"]["properties"]), "other": VALUES},
    )
)
def test_junk_gives_findings_and_nothing_else(folder: Path, document: dict[str, Any]) -> None:
    """Whatever the keys and values are, the file is read, its right cases are run, and nothing is raised."""
    text = "\n".join(f"{key} = {format_toml(value)}" for key, value in document.items())
    try:
        tomli.loads(text)
    except tomli.TOMLDecodeError:
        text = text.encode("ascii", "backslashreplace").decode()
    suite = read(folder, text)
    result = run_suites([suite])
    assert len(result.results) + len(result.findings) >= min(len(document["case"]), 1)
    for finding in suite.findings:
        assert finding.path == suite.path
        assert finding.message


@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_bytes_give_findings_and_nothing_else(folder: Path, raw: bytes) -> None:
    """A file that is no TOML, or not UTF-8, is one finding."""
    suite = read(folder, raw)
    assert suite.findings
    assert suite.cases == ()


def test_very_many_mistakes_are_counted(tmp_path: Path) -> None:
    """A hundred mistakes are listed, and how many more there are."""
    suite = read(tmp_path, "".join(f'[[case]]\nname = "{number}"\nwrong = 1\n' for number in range(300)))
    assert len(suite.findings) == 101
    assert re.search(r"and \d+ more", suite.findings[-1].message)


def test_a_huge_number_is_a_finding(tmp_path: Path) -> None:
    """Python refuses to write a number of thousands of digits. It is a finding like others."""
    assert read(tmp_path, GOOD.replace("devices = 2", f"devices = 0x{'f' * 5000}")).findings


# ---- the schema


def test_the_schema_has_what_editors_show() -> None:
    """It is a draft-07 schema of a stable name. Every key has a description, a default and examples that are right."""
    schema = load_schema(TEST_COPY_NAME)
    Draft7Validator.check_schema(schema)
    assert schema["$id"] == "urn:tfenv:schema:tfgpu-test:1"
    assert schema_path(TEST_COPY_NAME).is_file()
    waiting = [SCHEMA]
    count = 0
    while waiting:
        node = waiting.pop()
        for entry in node.get("properties", {}).values():
            count += 1
            assert entry["description"].endswith((".", "]."))
            assert "default" in entry
            for example in entry["examples"]:
                if "required" not in entry.get("items", {}):
                    Draft7Validator(entry).validate(example)
            waiting += [entry, entry.get("items", {})]
        assert "properties" not in node or node["additionalProperties"] is False
    assert count > 40


def test_a_case_and_the_defaults_have_the_same_keys() -> None:
    """What a process is can stand in both."""
    assert set(SCHEMA["properties"]["defaults"]["properties"]) == set(CASE) - {"name", "expect"}


def test_a_loader_reads_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand cases of one policy open its file once."""
    suite = read(tmp_path, GOOD + "".join(GOOD.replace('"a"', f'"{n}"\nuser = "u{n}"') for n in range(50)))
    opened: list[str] = []

    def note(path: str) -> str:
        opened.append(path)
        return peek_text(path)

    monkeypatch.setattr("tfenv.policy_tests.load.peek_text", note)
    loader = PolicyLoader()
    for case in suite.cases:
        loader.load(suite, case)
    assert opened == [str(tmp_path / "tfgpu.toml")]
