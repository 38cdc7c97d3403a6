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
    (
        ("simulate", "--gpus", "foo", "--", "true"),
        2,
        '"foo" does not describe GPUs; write "4x24GiB" or "2x24GiB:NVIDIA A100,1x80GiB"',
    ),
    (("doctor", "--python", "/bin/sh"), 2, "cannot run /bin/sh as a Python interpreter"),
    (("doctor", "--python", "/nope"), 2, "cannot run /nope as a Python interpreter"),
    (("install", "--system", "--python", "/nope"), 2, "cannot run /nope as a Python interpreter: No such file"),
    (("uninstall", "--system", "--python", "/nope"), 2, "cannot run /nope as a Python interpreter: No such file"),
    (("init", "--path", "/nope"), 2, "/nope is not a directory; create it first"),
    (("init", "--schema", "--path", "/nope"), 2, "/nope is not a directory; create it first"),
    (("init", "--machine", "--path", "/nope/etc"), 2, "/nope is not a directory; create it first"),
    (("run", "--config", "/nope", "true"), 2, "there is no file /nope; name a tfgpu.toml or a pyproject.toml"),
    (("audit", "--file", "/nope"), 2, "/nope: No such file or directory"),
    (("audit", "summary", "--file", "/nope"), 2, "/nope: No such file or directory"),
    (("audit", "export", "--file", "/dev/null", "--prometheus", "/nope/x.prom"), 2, "/nope"),
    (("simulate", "--log", "/nope/x", "--", "true"), 2, "cannot write /nope/x: No such file or directory"),
    (("simulate", "--processes", "/nope", "--", "true"), 2, "cannot read /nope: No such file or directory"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), MISTAKES, ids=lambda value: str(value)[:30])
def test_a_mistake_is_answered_with_what_would_be_right(
    arguments: tuple[str, ...], code: int, text: str, tfgpu: Tfgpu
) -> None:
    """One line says it, in words that people use."""
    done = tfgpu(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert text in done.stderr


def test_an_empty_log_says_so(tfgpu: Tfgpu, tmp_path: Path) -> None:
    """No records, and no records that were asked for, are told apart, in the table as in the summary."""
    none = "tfgpu audit: no records; one is written when TensorFlow is imported under a policy\n"
    for arguments, text in (((), none), (("--user", "alice"), "tfgpu audit: no records match these options\n")):
        for action in ((), ("summary",)):
            done = tfgpu("audit", *action, *arguments, env={"XDG_STATE_HOME": str(tmp_path)})
            assert (done.returncode, done.stdout, done.stderr) == (0, "", text)


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
