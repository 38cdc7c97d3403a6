"""`--watch`: what is looked at again and again, on a terminal, in a pipe and for programs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import TFGPU, Tfgpu, run_on_terminal
from tfenv.simulate.environment import build_environment, parse_gpus


@pytest.fixture
def held(tmp_path: Path) -> Path:
    path = tmp_path / "held"
    path.write_text("0 1 1024\n")
    return path


@pytest.fixture
def env(variables: dict[str, str], held: Path) -> dict[str, str]:
    return variables | build_environment(parse_gpus("1x24GiB"), processes=held, base={})


@pytest.mark.parametrize("shape", ["text", "json"])
def test_one_block_after_the_other_in_a_pipe(env: dict[str, str], project: Path, held: Path, shape: str) -> None:
    """In a pipe each look is printed anew, as JSON in one line. Ctrl-C ends it quietly with 130."""
    command = [*TFGPU, "gpus", "--watch", "0.1", "--format", shape]
    with subprocess.Popen(
        command, env=env, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        before = next(line for line in process.stdout if "a0fa4e00" in line)
        held.write_text("0 1 3072\n")
        after = next(line for line in process.stdout if "a0fa4e00" in line and line != before)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert (process.wait(60), process.stderr.read()) == (130, "")
    if shape == "json":
        assert [json.loads(line)["gpus"][0]["used_bytes"] >> 30 for line in (before, after)] == [1, 3]
    else:
        assert "1.0 / 24.0 GiB" in before
        assert "3.0 / 24.0 GiB" in after


def test_in_place_on_a_terminal(env: dict[str, str], project: Path) -> None:
    """On a terminal the cursor goes back and the table is written over. Ctrl-C leaves the last one there."""
    said, code = run_on_terminal(["ps", "--watch", "0.1"], env, project, "ungoverned")
    assert code == 130
    assert "\x1b[1A" in said  # one line up
    assert "Traceback" not in said
    assert "\x1b[?25h" in said  # the cursor is shown again


def test_no_colour(env: dict[str, str], project: Path, held: Path) -> None:
    """With NO_COLOR nothing on a terminal is coloured. Without it, what deserves attention is."""
    held.write_text("0 1 24000\n")
    coloured, _ = run_on_terminal(["gpus"], env, project)
    plain, _ = run_on_terminal(["gpus"], env | {"NO_COLOR": "1"}, project)
    assert "\x1b[33m" in coloured
    assert "\x1b" not in plain
    assert "23.4 / 24.0 GiB" in plain


@pytest.mark.parametrize("seconds", ["0", "-1", "x", "nan", "inf", ""])
def test_seconds_that_are_none(tfgpu: Tfgpu, seconds: str) -> None:
    """A wrong number of seconds is wrong usage, with what would be right."""
    result = tfgpu("ps", f"--watch={seconds}")
    assert result.returncode == 2
    assert "write a number such as 2, at least 0.1" in result.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("shape", ["text", "json"])
def test_a_reader_that_goes_away(env: dict[str, str], project: Path, shape: str, unbuffered: str) -> None:
    """`tfgpu gpus --watch | head` ends quietly, whether Python buffers what is printed or not."""
    command = f"{sys.executable} -m tfenv gpus --watch 0.1 --format {shape} | head -n 2; exit ${{PIPESTATUS[0]}}"
    env = env | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        ["bash", "-c", command], env=env, cwd=project, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 2)
