"""tools/pictures.py and docs/assets/pictures: what is checked in is what a new run shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parents[1]
PICTURES = sorted((ROOT / "docs" / "assets" / "pictures").glob("*.svg"))
#: What a picture must not show: a time of this run, a path of the machine, an address that a browser would fetch.
_FOREIGN = re.compile(r"\b20\d\d-\d\d|/tmp/|/root\b|/work\b|/home/|(?:href|src)=|url\((?!#)")


def check_pictures(*names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "pictures.py"), "--check", *names]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False, timeout=250)


needs_no_machine_policy = pytest.mark.skipif(Path("/etc/tfgpu").exists(), reason="they would show it")


@needs_no_machine_policy
@pytest.mark.parametrize("name", ["explain", "gpus", "check", "audit"])
def test_terminals_show_what_the_commands_print(name: str) -> None:
    """Each picture of a command is what the command shows today."""
    done = check_pictures(name)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_no_machine_policy
@pytest.mark.tensorflow
@pytest.mark.exhaustive
def test_the_demo_and_its_chart_show_what_tensorflow_takes() -> None:
    """The demo's table and chart have the figures of a new run."""
    done = check_pictures("demo", "demo-chart")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_no_machine_policy
def test_check_names_what_is_out_of_date(tmp_path: Path) -> None:
    """A picture that differs from a new run is named, and the exit code is 1."""
    code = (
        "import pathlib, runpy, sys; sys.argv[1:] = ['--check', 'check'];"
        f"names = runpy.run_path({str(ROOT / 'tools' / 'pictures.py')!r});"
        f"names['main'].__globals__['PICTURES'] = pathlib.Path({str(tmp_path)!r});"
        "sys.exit(names['main']())"
    )
    (tmp_path / "check.svg").write_text("<svg/>")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "out of date: check.svg; run `make pictures`\n"), done.stderr


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_pictures_are_the_same_on_every_machine(path: Path) -> None:
    """A picture is XML that fetches nothing, and shows no time and no path of the machine that drew it."""
    text = path.read_text(encoding="utf-8")
    ET.fromstring(text)
    assert not _FOREIGN.findall(text)


def test_terminals_have_text_of_one_size() -> None:
    """On a wide page the text of all terminals is equally large, however many columns they have."""
    terminals = [root for path in PICTURES if "-matrix" in path.read_text() for root in [ET.parse(path).getroot()]]
    scales = {round(float(root.attrib["width"]) / float(root.attrib["viewBox"].split()[2]), 1) for root in terminals}
    assert len(terminals) == 5
    assert len(scales) == 1


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_pictures_are_shown_with_words_for_those_who_do_not_see_them(path: Path) -> None:
    """Every picture is in the README or on a page of the site, with an alternative text."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    alternatives = re.findall(rf"!\[([^\]]*)\]\([^)]*pictures/{re.escape(path.name)}\)", shown)
    assert alternatives, "no page shows it"
    assert all(len(text) > 20 for text in alternatives)
