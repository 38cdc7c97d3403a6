"""The page about tests cannot lie: its policies and tests are run, and say what it says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import TFGPU
from tests.pages import DOCS, Block, blocks, commands, file_name
from tfenv.config.schema import load_schema
from tfenv.config.schema_copy import TEST_COPY_NAME, flatten_schema

PAGE = next(page for page in DOCS if page.name == "testing.md")
SECTIONS = ("Write a first test", "Read a failure", "Say what you expect")


def find_blocks(section: str) -> list[Block]:
    """Return the files of a section, with those above it that it does not show anew, and its console."""
    found = blocks("toml", "console", pages=[PAGE])
    first = next(number for number, block in enumerate(found) if block.section == section)
    last = max(number for number, block in enumerate(found) if block.section == section)
    shown = {file_name(block): block for block in found[: last + 1] if block.language == "toml"}
    return [*shown.values(), *(block for block in found[first : last + 1] if block.language == "console")]


@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_shows_real_runs(section: str, tmp_path: Path) -> None:
    """With the files of a section `tfgpu test` prints what the page prints."""
    (tmp_path / "etc/groups").mkdir(parents=True)
    (tmp_path / "etc/users").mkdir()
    *files, console = find_blocks(section)
    assert len(files) == 2
    for block in files:
        (tmp_path / "etc" / Path(file_name(block)).name).write_text(block.text)
    (command,) = commands(console.text)
    arguments = [*TFGPU, *command.words[1:-1], str(tmp_path / "etc")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.stdout.replace(f"{tmp_path}/etc", "/etc/tfgpu").splitlines() == list(command.output)
    assert done.returncode == ("failed" in console.text)


def test_the_page_has_every_key() -> None:
    """Its tables have the keys of a process and of an expectation, and no others."""
    schema = flatten_schema(load_schema(TEST_COPY_NAME))["properties"]
    case = schema["case"]["items"]["properties"]
    text = PAGE.read_text()
    for section, keys in (
        ("Describe a process", set(case) - {"name", "expect"}),
        ("Say what you expect", set(case["expect"]["properties"])),
    ):
        rows = re.findall(r"^\| (`.*?`) \|", text.partition(f"## {section}\n")[2].partition("\n## ")[0], re.MULTILINE)
        assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == keys
    for key in set(schema) - {"version", "case"}:
        assert re.search(rf"`\[?{key}\]?[` ]", text), key


def test_the_command_page_quotes_it() -> None:
    """docs/commands.md shows a failure in the same words."""
    shown = blocks("console", pages=[PAGE.parent / "commands.md"])
    (command,) = (command for block in shown if block.section == "tfgpu test" for command in commands(block.text))
    assert set(command.output[:-1]) <= set(find_blocks("Read a failure")[-1].text.splitlines())
