"""What the README shows must work: commands, Python, links. tests/test_docs.py looks at all pages."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli

from tests.pages import PAGES, README, ROOT, Block, all_commands, blocks, file_name
from tfenv.cli.main import COMMANDS

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def commands_of(program: str) -> list[list[str]]:
    found = [list(command.words[1:]) for _, command in all_commands([README]) if command.words[0] == program]
    assert found, f"the README shows no {program} command"
    return found


def commands_in_text() -> Iterator[str]:
    """Every `tfgpu NAME` that is mentioned anywhere in the pages."""
    for page in PAGES:
        yield from re.findall(r"`tfgpu ([a-z]+)", page.read_text(encoding="utf-8"))


def anchor(heading: str) -> str:
    """The anchor a heading gets: lower case, without punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


# ---- commands


def test_the_readme_shows_commands() -> None:
    """The ways of use are shown with their commands, which tests/test_docs.py parses."""
    assert {words[0] for words in commands_of("tfgpu")} >= {"init", "check", "explain", "run", "audit", "doctor"}


def test_the_table_of_commands_is_complete() -> None:
    """The table that the README leads to has a row for every command there is, and for no other."""
    page = ROOT / "docs" / "commands.md"
    rows = re.findall(r"^\| \[?`tfgpu ([a-z]+)`", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [*dict.fromkeys(rows)]
    assert set(rows) == set(COMMANDS)
    assert "(docs/commands.md)" in README.read_text(encoding="utf-8")


def test_no_page_mentions_a_command_that_is_not_there() -> None:
    """A newcomer who types what a page mentions gets no "invalid choice"."""
    assert set(commands_in_text()) <= set(COMMANDS)


@pytest.mark.parametrize("words", commands_of("make"), ids=" ".join)
def test_make_targets_exist(words: list[str]) -> None:
    """`make -n` knows what to do for every target the README names."""
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_extras_exist() -> None:
    """Each extra in a shown `pip install '.[…]'` is one of the package's."""
    project: dict[str, Any] = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    shown = re.findall(r"pip install '(?:\.|tfenv)\[(\w+)\]'", README.read_text(encoding="utf-8"))
    assert shown
    assert set(shown) <= set(project["optional-dependencies"])


# ---- policies


def test_the_policies_are_shown_with_their_files() -> None:
    """The README shows a project's file, a table in pyproject.toml and the machine's file."""
    shown = [file_name(block) for block in blocks("toml", pages=[README])]
    assert shown == ["tfgpu.toml", "pyproject.toml", "/etc/tfgpu/tfgpu.toml"]


# ---- Python


@pytest.mark.parametrize("program", blocks("python", pages=[README]), ids=str)
def test_shown_python_runs(program: Block, tmp_path: Path) -> None:
    """The Python of the README runs, in a directory without any policy, and says so."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program.text}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "tfgpu: no policy applies here" in done.stdout


# ---- links

_PATH = re.compile(r"`((?:tfenv|tests|docs|schemas|sample_configs|benchmarks|tools)/[\w./-]*)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_are_there(page: Path) -> None:
    """A file or folder of the repository that a page names exists; NAME stands for one that a reader makes."""
    named = set(_PATH.findall(page.read_text(encoding="utf-8")))
    assert sorted(path for path in named if "NAME" not in path and not (ROOT / path).exists()) == []


def test_there_are_pages() -> None:
    """The pages a newcomer is led to are among those that are checked."""
    assert {"README.md", "index.md", "how-it-works.md", "performance.md", "slurm.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """A link to a file points to one that exists, and its anchor to one of that page's headings."""
    broken = [link for link in _LINK.findall(page.read_text(encoding="utf-8")) if not leads_somewhere(page, link)]
    assert broken == []


def leads_somewhere(page: Path, link: str) -> bool:
    if re.match(r"https?://", link):
        return True
    path, _, wanted = link.partition("#")
    target = page.parent / path if path else page
    if not target.exists() or not wanted:
        return target.exists()
    headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
    return wanted in map(anchor, headings)


@pytest.mark.parametrize(
    ("link", "leads"), [("README.md", True), ("#install", True), ("docs/none.md", False), ("README.md#none", False)]
)
def test_broken_links_are_found(link: str, leads: bool) -> None:
    """The check of links knows a good one from a broken one."""
    assert leads_somewhere(README, link) is leads
