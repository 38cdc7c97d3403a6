"""What tools/generate.py makes is up to date, and says the same as the schema."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tomli

from tfenv.config import _validator
from tfenv.config.schema import load_schema

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((Path(__file__).parent / "examples").glob("*/*.toml"))


@pytest.fixture(name="generate", scope="module")
def load_generate_tool() -> ModuleType:
    pytest.importorskip("fastjsonschema", reason="of the development group")
    specification = importlib.util.spec_from_file_location("generate", ROOT / "tools" / "generate.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_generated_files_are_those_of_the_schema(generate: ModuleType) -> None:
    """The validator and the pages are, byte for byte, what the schema and the table of messages give."""
    generated = generate.generate()
    names = {"_validator.py", "reference.md", "messages.md", "tfgpu.json", "tfgpu-test.json"}
    assert {path.name for path in generated} == names
    for path, text in generated.items():
        assert path.read_bytes() == text.encode(), f"{path.name}: run python tools/generate.py"


def test_check_notices_a_change(generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate.py --check` exits with 1 and writes nothing when a file is out of date."""
    stale = tmp_path / "reference.md"
    stale.write_text("old")
    monkeypatch.setattr(generate, "REFERENCE", stale)
    monkeypatch.setattr(generate, "ROOT", Path("/"))
    assert generate.main(["--check"]) == 1
    assert stale.read_text() == "old"
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0


def test_the_command_agrees() -> None:
    """`python tools/generate.py --check` is silent in this tree."""
    pytest.importorskip("fastjsonschema", reason="of the development group")
    command = [sys.executable, str(ROOT / "tools" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_validator_says_what_jsonschema_says(path: Path) -> None:
    """The generated validator and jsonschema agree on every example."""
    from jsonschema import Draft7Validator  # type: ignore[import-untyped, unused-ignore]

    table = tomli.loads(path.read_text(encoding="utf-8"))
    assert _validator.is_valid(table) == Draft7Validator(load_schema()).is_valid(table)


def test_the_reference_names_every_key(generate: ModuleType) -> None:
    """Every key of the schema has its place on the reference page, with its description."""
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    schema = load_schema()
    tables = [schema["definitions"][name] for name in ("gpu", "ceiling", "device", "choice", "rank")]
    tables += [schema["definitions"]["frameworks"], schema["properties"]["audit"], schema["properties"]["machine"]]
    for table in tables:
        for name, entry in table["properties"].items():
            assert f"### `{name}`" in page or f"## `[gpu.{name}]`" in page
            assert entry["description"] in " ".join(page.split())  # the page breaks lines
    for heading in ("[gpu]", "[[gpu.device]]", "[user.NAME.gpu]", '[project."PATH".ceiling]', "[machine]"):
        assert f"## `{heading}`" in page
