"""What people read when they mistype, or name something that is not there: what is wrong, and what to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Tfgpu
from tfenv.simulate.environment import build_environment, parse_gpus

MISTAKES = [
    (("checkk",), 2, 'there is no command "checkk"; did you mean "check"?'),
    (("frobnicate",), 2, 'there is no command "frobnicate"; the commands are init, check, explain'),
    (("explain", "--project", "/nope"), 2, "/nope is not a directory"),
    (("watch", "--project", "/nope"), 2, "/nope is not a directory"),
    (("simulate", "--gpus", "foo", "--", "true"), 2, 'GPUs are written as in "4x24GiB"'),
    (("doctor", "--python", "/bin/sh"), 2, "cannot run /bin/sh as a Python interpreter"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), MISTAKES, ids=lambda value: str(value)[:30])
def test_a_mistake_is_answered_with_what_would_be_right(
    arguments: tuple[str, ...], code: int, text: str, tfgpu: Tfgpu
) -> None:
    """One line says it, in words that people use."""
    done = tfgpu(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert text in done.stderr


def test_a_wrong_path_is_wrong_usage(tfgpu: Tfgpu, project: Path) -> None:
    """As in all other commands. A mistake in a file that is there is a finding."""
    assert tfgpu("check", "/nope").returncode == 2
    (project / "tfgpu.toml").write_text("[gpu]\nmemory_limit = 5\n")
    assert tfgpu("check", str(project)).returncode == 1


def test_explain_tells_a_broken_file_from_none(tfgpu: Tfgpu, project: Path) -> None:
    """A file is there, and nothing of it is in force. `tfgpu init` would be no help."""
    (project / "tfgpu.toml").write_text("[gpu\n")
    shown = tfgpu("explain").stdout
    assert "Nothing is in force: see the findings below" in shown
    assert "tfgpu init" not in shown


def test_candidates_have_no_names_of_tensorflow(tfgpu: Tfgpu, project: Path) -> None:
    """Which of them will be GPU:0 is decided when devices are listed."""
    (project / "tfgpu.toml").write_text("[gpu]\nvisible_devices = {count = 1}\n")
    shown = tfgpu("explain", env=build_environment(parse_gpus("2x24GiB"), base={})).stdout
    assert "candidate" in shown
    assert "GPU:0" not in shown
