"""What the README and the pages in docs/ show must work: commands, policies, Python, links."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli

from tfenv.cli.main import COMMANDS, main
from tfenv.config.advice import advise
from tfenv.config.document import Document
from tfenv.config.schema import validate
from tfenv.policy.model import LayerName, Source

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("sample_configs/**/*.md")])
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


def blocks(language: str) -> list[str]:
    return [text for name, text in _BLOCK.findall(README.read_text(encoding="utf-8")) if name == language]


def shown_commands() -> list[list[str]]:
    """The command lines of the console blocks, without variables set in front of them."""
    lines = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    return [_without_variables(shlex.split(line)) for line in lines]


def commands_of(program: str) -> list[list[str]]:
    found = [words[1:] for words in shown_commands() if words[0] == program]
    assert found, f"the README shows no {program} command"
    return found


def _without_variables(words: list[str]) -> list[str]:
    first = next(number for number, word in enumerate(words) if not _ASSIGNMENT.fullmatch(word))
    return words[first:]


def commands_in_text() -> Iterator[str]:
    """Every `tfgpu NAME` that is mentioned anywhere in the pages."""
    for page in PAGES:
        yield from re.findall(r"`tfgpu ([a-z]+)", page.read_text(encoding="utf-8"))


def anchor(heading: str) -> str:
    """The anchor a heading gets: lower case, without punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


# ---- commands


@pytest.mark.parametrize("words", commands_of("tfgpu"), ids=" ".join)
def test_shown_options_are_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every option of a `tfgpu` command in the README is in that command's own help."""
    ours = words[: words.index("--")] if "--" in words else words
    assert main([ours[0], "--help"]) == 0
    text = capsys.readouterr().out
    missing = [word for word in ours[1:] if word.startswith("-") and word not in text]
    assert missing == []


def test_the_table_of_commands_is_complete() -> None:
    """The README's table has a row for every command there is, and for no other."""
    rows = re.findall(r"^\| `tfgpu ([a-z]+)[^`]*` \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [*dict.fromkeys(rows)]
    assert set(rows) == set(COMMANDS)


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


def shown_policies() -> list[tuple[str, str]]:
    """Each TOML block with the file it stands for, which its first line names."""
    return [(text.splitlines()[0].removeprefix("# ").split(",")[0], text) for text in blocks("toml")]


def test_the_policies_are_shown_with_their_files() -> None:
    """The README shows a project's file, a table in pyproject.toml and the machine's file."""
    assert [name for name, _ in shown_policies()] == ["tfgpu.toml", "pyproject.toml", "/etc/tfgpu/tfgpu.toml"]


@pytest.mark.parametrize(("name", "text"), shown_policies(), ids=[name for name, _ in shown_policies()])
def test_shown_policies_are_right(name: str, text: str) -> None:
    """A policy copied from the README gives no finding, and no advice but that its people are not known here."""
    data = tomli.loads(text)
    data = data["tool"]["tfgpu"] if name == "pyproject.toml" else data
    layer_name: LayerName = "machine" if name.startswith("/etc") else "project"
    layer, findings = validate(Document(Source(layer_name, name), data, "0" * 64, text, 0))
    assert findings == ()
    assert {finding.code for finding in advise([layer])} <= {"unknown-user", "unknown-group"}


# ---- Python


@pytest.mark.parametrize("program", blocks("python"))
def test_shown_python_runs(program: str, tmp_path: Path) -> None:
    """The Python of the README runs, in a directory without any policy, and says so."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "tfgpu: no policy in force here" in done.stdout


# ---- links


def test_there_are_pages() -> None:
    """The pages a newcomer is led to are among those that are checked."""
    assert {"README.md", "index.md", "how-it-works.md", "performance.md"} <= {page.name for page in PAGES}


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
