"""sample_configs/: right by our own reading, and by tools that know nothing of us."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli

from tfenv.config.document import Document
from tfenv.config.schema import schema_path, validate
from tfenv.config.schema_copy import TEST_COPY_NAME
from tfenv.lint.combinations import advise
from tfenv.policy.model import LayerName, Source
from tfenv.policy_tests.read import read_suite
from tfenv.policy_tests.run import run_suites

ROOT = Path(__file__).parents[2]
TESTS = sorted((ROOT / "sample_configs").glob("**/*.test.toml"))
SAMPLES = sorted({*(ROOT / "sample_configs").glob("**/*.toml")} - {*TESTS})
LAYERS: dict[str, LayerName] = {"workstation": "user", "shared-server": "machine"}


def find_tool(name: str) -> str:
    """Find a command of the development group, in the environment that runs the tests."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run_on_samples(*command: str) -> str:
    """Run a command on all samples.

    Returns:
        What it said. "" if it had nothing against them.
    """
    done = subprocess.run([*command, *map(str, SAMPLES)], capture_output=True, text=True, check=False, cwd=ROOT)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def read_sample(path: Path) -> Document:
    text = path.read_text(encoding="utf-8")
    layer = LAYERS.get(path.relative_to(ROOT / "sample_configs").parts[0], "project")
    return Document(Source(layer, str(path)), tomli.loads(text), "0" * 64, text, 0)


def test_the_samples_are_there() -> None:
    """Every kind of use has its sample."""
    names = {str(path.parent.relative_to(ROOT / "sample_configs")) for path in SAMPLES}
    assert names >= {"minimal", "workstation", "notebook", "ci", "frameworks"}
    assert names >= {"shared-server", "shared-server/groups", "shared-server/users"}


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: str(path.relative_to(ROOT / "sample_configs")))
def test_samples_are_right(path: Path) -> None:
    """A sample gives no finding, and none of the advice that `tfgpu check` gives."""
    layer, findings = validate(read_sample(path))
    assert findings == ()
    if path.parent.name not in ("groups", "users"):
        # Whom a sample names exists on no machine of ours.
        assert {finding.code for finding in advise([layer])} <= {"unknown-user", "unknown-group"}


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: str(path.relative_to(ROOT / "sample_configs")))
def test_samples_lead_editors_to_the_schema(path: Path) -> None:
    """The first line of a sample names the schema by a relative path that exists."""
    directive, _, target = path.read_text(encoding="utf-8").splitlines()[0].partition(" ")
    assert directive == "#:schema"
    assert (path.parent / target).resolve() == schema_path().resolve()


def test_check_jsonschema_agrees() -> None:
    """check-jsonschema finds nothing wrong with a sample."""
    assert run_on_samples(find_tool("check-jsonschema"), "--schemafile", str(schema_path())) == ""


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.parent.name))
def test_samples_pass_their_tests(path: Path) -> None:
    """What the tests beside a sample expect is what it gives."""
    result = run_suites([read_suite(str(path))])
    assert result.findings == ()
    assert [found.differences for found in result.results if found.differences] == []
    assert result.results


def test_samples_have_tests() -> None:
    """A policy beside which nobody writes one by hand has tests."""
    policies = {path.parent for path in SAMPLES if path.name == "tfgpu.toml"}
    assert {path.name for path in policies - {path.parent for path in TESTS}} <= {"demo"}


def test_other_tools_agree_on_the_tests() -> None:
    """check-jsonschema and taplo find nothing wrong with them, by their schema. Their first line names it."""
    schema = schema_path(TEST_COPY_NAME)
    files = [str(path) for path in TESTS]
    for command in (
        [find_tool("check-jsonschema"), "--check-metaschema", str(schema)],
        [find_tool("check-jsonschema"), "--schemafile", str(schema), *files],
        [find_tool("taplo"), "check", "--schema", schema.as_uri(), *files],
        [find_tool("taplo"), "fmt", "--check", *files],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
    for path in TESTS:
        target = path.read_text().partition("\n")[0].removeprefix("#:schema ")
        assert (path.parent / target).resolve() == schema.resolve()


def test_taplo_sees_a_mistake_in_a_test(tmp_path: Path) -> None:
    """What editors do: taplo reads the schema that the first line names."""
    text = '[[case]]\nname = "a"\ntoday = 2027-02-01\n[case.expect]\n'
    for key, status in (("devices", 0), ("device", 1)):
        path = tmp_path / "a.test.toml"
        path.write_text(f"#:schema {schema_path(TEST_COPY_NAME)}\n{text}{key} = 1\n")
        done = subprocess.run([find_tool("taplo"), "check", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr


def test_check_jsonschema_agrees_on_the_schema() -> None:
    """check-jsonschema takes the schema for a valid one."""
    command = [find_tool("check-jsonschema"), "--check-metaschema", str(schema_path())]
    subprocess.run(command, check=True, capture_output=True)


def test_taplo_agrees() -> None:
    """taplo finds nothing wrong with a sample, by the schema."""
    assert run_on_samples(find_tool("taplo"), "check", "--schema", schema_path().as_uri()) == ""


def test_taplo_follows_the_first_line(tmp_path: Path) -> None:
    """What editors do: taplo reads the schema that the first line names, and sees a mistake."""
    text = SAMPLES[0].read_text(encoding="utf-8").partition("\n")[2]
    for limit, status in (("memory_limit", 0), ("memroy_limit", 1)):
        wrong = tmp_path / f"{limit}.toml"
        wrong.write_text(f"#:schema {schema_path()}\n{text.replace('memory_limit', limit)}", encoding="utf-8")
        done = subprocess.run([find_tool("taplo"), "check", str(wrong)], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr


def test_samples_are_formatted() -> None:
    """The samples are laid out as taplo lays them out."""
    assert run_on_samples(find_tool("taplo"), "fmt", "--check") == ""
