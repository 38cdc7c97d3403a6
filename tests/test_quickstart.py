"""The quickstart is true: its programs are there, and its commands print what the page shows."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.pages import ROOT, blocks
from tests.transcripts import INSTALL, QUICKSTART, Step, make_environment, normalise, read_steps, run_steps

SAMPLE = ROOT / "sample_configs" / "quickstart"


def compare(steps: list[Step], outputs: list[str]) -> None:
    """Compare with the page. `python -m tests.transcripts` writes the page anew."""
    shown = [(step.line, normalise(step.shown)) for step in steps if step.line]
    printed = [(step.line, normalise(output)) for step, output in zip(steps, outputs, strict=True) if step.line]
    assert printed == shown


@pytest.mark.parametrize("name", ["train.py", "greedy.py"])
def test_the_programs_are_those_of_the_repository(name: str) -> None:
    """What the page shows of a program is the file that the reader copies, to the letter."""
    assert (SAMPLE / name).read_text(encoding="utf-8") in [block.text for block in blocks("python", pages=[QUICKSTART])]


def test_the_page_shows_what_is_run() -> None:
    """The commands that are run are the page's: the install, and the same program without and with a policy."""
    lines = [step.line for step in read_steps() if step.line]
    assert [line for line in lines if line.startswith(INSTALL)] == lines[:4]
    assert lines.count("tfgpu simulate --gpus 4x24GiB -- python train.py") == 2
    assert "tfgpu audit" in lines


def test_a_wrong_output_is_noticed() -> None:
    """Only times, the reader's name and the widths of columns may differ."""
    shown = "11-26 21:39:36  anna  GPU-a0fa4e00  8.0 GiB  applied\n"
    other = f"01-02 03:04:05  {getpass.getuser()}    GPU-a0fa4e00  8.0 GiB  applied\n"
    assert normalise(shown) == normalise(other)
    assert normalise(shown) != normalise(other.replace("8.0", "9.0"))
    assert normalise(shown) != normalise(other.replace("applied", "clamped"))


@pytest.mark.tensorflow
def test_the_commands_print_what_the_page_shows(tmp_path: Path) -> None:
    """A reader who has installed tfenv and types the commands in order sees what the page shows below each."""
    steps = [step for step in read_steps() if not step.line.startswith(INSTALL)]
    compare(steps, run_steps(steps, tmp_path, make_environment(), ROOT))


@pytest.mark.tensorflow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_reader_gets_there_from_a_clone(tmp_path: Path) -> None:
    """A reader who has nothing but a clone types every command of the page, and sees what it shows."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("there is no git repository to clone")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "tfenv")], check=True)
    disturbing = ("TFGPU_", "CUDA_", "TF_", "PYTHON", "VIRTUAL_ENV", "COLUMNS")
    env = {name: value for name, value in os.environ.items() if not name.startswith(disturbing)}
    # The settings of pip are not in the reader's home directory, which is a temporary one.
    env.setdefault("PIP_CONFIG_FILE", os.path.expanduser("~/.config/pip/pip.conf"))
    steps = read_steps()
    outputs = run_steps(steps, tmp_path, env, tmp_path)
    kept = [number for number, step in enumerate(steps) if not step.line.startswith("pip install ")]
    compare([steps[number] for number in kept], [outputs[number] for number in kept])
