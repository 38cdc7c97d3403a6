"""What holds for every command: names, exit codes, Ctrl-C, pipes, colour."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import TFGPU, Tfgpu, run_on_terminal
from tfenv import __version__
from tfenv.cli.main import COMMANDS


def start_program(program: str, env: dict[str, str], **options: object) -> subprocess.Popen[str]:
    """Start a Python program that plays `tfgpu` with a command of its own."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.Popen(command, env=env, text=True, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload, no-any-return]


BROKEN = """
    import sys
    import tfenv.cli.commands.check
    from tfenv.cli.main import main
    def run(args):
        raise ZeroDivisionError("a bug")
    tfenv.cli.commands.check.run = run
    sys.exit(main(["check"]))
"""
SLOW = """
    import sys, time
    import tfenv.cli.commands.check
    from tfenv.cli.main import main
    def run(args):
        print("ready", flush=True)
        time.sleep(60)
    tfenv.cli.commands.check.run = run
    sys.exit(main(["check"]))
"""


def test_help_names_every_command(tfgpu: Tfgpu) -> None:
    """`tfgpu --help` lists every command with one line on what it is for."""
    shown = tfgpu("--help")
    assert shown.returncode == 0
    # argparse puts the purpose of the longest name into the next line.
    text = " ".join(shown.stdout.split())
    assert all(f"{name} {purpose}" in text for name, purpose in COMMANDS.items())


def test_help_imports_no_command(variables: dict[str, str]) -> None:
    """`tfgpu --help` imports no command's module, and nothing that only a command needs."""
    program = """
        import sys
        from tfenv.cli.main import main
        main(["--help"])
        print([name for name in sys.modules if name.startswith(("tfenv.", "rich", "jsonschema", "pynvml"))])
    """
    with start_program(program, variables, stdout=subprocess.PIPE) as child:
        output, _ = child.communicate(timeout=60)
    assert (
        output.splitlines()[-1] == "['tfenv.cli', 'tfenv.values', 'tfenv.errors', 'tfenv.cli.output', 'tfenv.cli.main']"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(tfgpu: Tfgpu, name: str) -> None:
    """`tfgpu COMMAND --help` succeeds for each command, says so under that name, and imports no other command."""
    shown = tfgpu(name, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"tfgpu {name}" in shown.stdout


def test_version(tfgpu: Tfgpu) -> None:
    """`tfgpu --version` says which release this is."""
    assert tfgpu("--version").stdout == f"tfgpu {__version__}\n"


@pytest.mark.parametrize("arguments", [(), ("check", "--nope"), ("explain", "--format", "xml")])
def test_wrong_usage_ends_with_2(tfgpu: Tfgpu, arguments: tuple[str, ...]) -> None:
    """What is no command or no option of one ends with 2, tells on stderr how it is used, and prints nothing."""
    result = tfgpu(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage: tfgpu" in result.stderr


def test_a_bug_is_one_line_and_3(variables: dict[str, str]) -> None:
    """A bug of ours is one line that asks to be reported, no traceback, and ends with 3."""
    with start_program(BROKEN, variables) as child:
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 3
    expected = "tfgpu: internal error: ZeroDivisionError: a bug; please report it (TFGPU_DEBUG=1 shows where)\n"
    assert errors == expected


def test_a_bug_shows_where_on_request(variables: dict[str, str]) -> None:
    """With TFGPU_DEBUG=1 the traceback is there, too, and the exit code is the same."""
    with start_program(BROKEN, variables | {"TFGPU_DEBUG": "1"}) as child:
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 3
    assert "Traceback" in errors


def test_ctrl_c_ends_quietly_with_130(variables: dict[str, str]) -> None:
    """SIGINT ends a command with 130 and without a word."""
    with start_program(SLOW, variables, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (130, "")


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """Return the writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize(
    "arguments",
    [
        "explain", "explain --format json", "check", "check --format json", "gpus", "gpus --format json", "ps",
        "doctor --no-tensorflow", "audit", "audit summary", "completion bash", "init --force", "watch", "--help",
        "--version", "ps --help", "gpus --watch", "ps --watch --format json",
    ],
)  # fmt: skip
def test_a_closed_pipe_is_no_error(arguments: str, project: Path, variables: dict[str, str], closed_pipe: int) -> None:
    """When nobody reads on (`tfgpu explain | head -1`), every command ends quietly with 0."""
    (project / "tfgpu.toml").write_text("[gpu]\nmemory_growth = 3\n")
    result = subprocess.run(
        [*TFGPU, *arguments.split()], cwd=project, env=variables, stdout=closed_pipe, stderr=subprocess.PIPE,
        timeout=60, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("simulate -- false", 1),
        ("simulate --format json -- true", 0),
        ("simulate -- no-such-command", 127),
        ("run -- no-such-command", 127),
        ("run", 2),
        ("chekc", 2),
        ("check --nope", 2),
        ("explain --project nowhere", 2),
        ("audit --file nowhere", 2),
        ("init", 1),
        ("install --system --python /bin/false", 2),
    ],
)
def test_complaints_that_nobody_reads_change_no_exit_code(
    arguments: str, code: int, project: Path, variables: dict[str, str], closed_pipe: int
) -> None:
    """With a closed pipe as stderr (`2>&1 | head`) the exit code tells what went wrong, as ever."""
    (project / "tfgpu.toml").touch()
    result = subprocess.run(
        [*TFGPU, *arguments.split()], cwd=project, env=variables, stdout=closed_pipe, stderr=closed_pipe,
        timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == code


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_said(project: Path, variables: dict[str, str]) -> None:
    """Output that cannot be written is one line on stderr and exit code 1, not success."""
    with open("/dev/full", "wb") as full:
        command = [*TFGPU, "explain"]
        result = subprocess.run(command, cwd=project, env=variables, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (result.returncode, result.stderr) == (1, b"tfgpu: No space left on device\n")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["check"], 1),
        (["check", "--format", "json"], 1),
        (["explain"], 1),
        (["explain", "--format", "json"], 1),
        (["doctor", "--no-tensorflow"], 1),
        (["init", "--force"], 0),
        (["--version"], 0),
        (["--help"], 0),
        (["chekc"], 2),
    ],
)
def test_a_closed_stdout_changes_no_exit_code(
    arguments: list[str], code: int, project: Path, variables: dict[str, str]
) -> None:
    """With stdout closed (`tfgpu check >&-`) a command does its work, says nothing on stderr, ends as always."""
    (project / "tfgpu.toml").write_text("[gpu]\nmemory_growth = 3\n")
    open_, closed = (
        subprocess.run(
            ["sh", "-c", f'"$@" {redirection}', "sh", *TFGPU, *arguments],
            cwd=project,
            env=variables,
            capture_output=True,
            timeout=60,
            check=False,
        )
        for redirection in (">/dev/null", ">&-")
    )
    assert (open_.returncode, closed.returncode) == (code, code), closed.stderr
    assert closed.stdout == b""
    assert closed.stderr == open_.stderr


def test_a_closed_stderr_puts_no_complaint_into_stdout(project: Path, variables: dict[str, str]) -> None:
    """With stderr closed what is wrong shows in the exit code alone: stdout is for what was asked."""
    for arguments, code in (("check --nope", 2), ("explain --project nowhere", 2)):
        command = f"{sys.executable} -m tfenv {arguments} 2>&-"
        result = subprocess.run(
            ["sh", "-c", command], cwd=project, env=variables, stdout=subprocess.PIPE, timeout=60, check=False
        )
        assert (result.returncode, result.stdout) == (code, b"")


@pytest.mark.parametrize("arguments", [["init"], ["check", "tfgpu.toml"], ["run", "--config", "a.toml", "--", "true"]])
def test_a_deleted_working_directory_is_named(arguments: list[str], project: Path, variables: dict[str, str]) -> None:
    """Where a relative path means nothing any more, the command says so and what to do, and ends with 2."""
    command = ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", *TFGPU, *arguments]
    result = subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("tfgpu: the working directory was deleted; change to a directory that exists")


def test_a_quoted_argument_does_not_steer_the_terminal(tfgpu: Tfgpu) -> None:
    """What was typed wrongly is repeated escaped, whichever command complains."""
    for arguments in (("chekc\x1b[31m",), ("check", "--nope\x1b[31m"), ("run", "--gpus", "\x1b[31m", "--", "true")):
        result = tfgpu(*arguments)
        assert result.returncode == 2
        assert "[31m" in result.stderr
        assert "\x1b" not in result.stderr


def test_colour_is_for_terminals_only(project: Path, variables: dict[str, str], tfgpu: Tfgpu) -> None:
    """There is colour on a terminal, none there with NO_COLOR, none in a pipe."""
    (project / "tfgpu.toml").write_text("[gpu]\nmemory_growth = 3\n")
    assert "\x1b[" in run_on_terminal(["check"], variables, project)[0]
    plain = run_on_terminal(["check"], variables | {"NO_COLOR": "1"}, project)[0]
    assert "invalid-value" in plain
    assert "\x1b" not in plain
    assert "\x1b" not in tfgpu("check").stdout


def test_an_ascii_locale_is_no_obstacle(project: Path, tfgpu: Tfgpu) -> None:
    """What the locale cannot show is escaped. It never ends a command."""
    (project / "tfgpu.toml").write_text('[gpu]\n"größe" = 1\n', encoding="utf-8")
    result = tfgpu("check", env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 1
    assert r"gr\xf6\xdfe" in result.stdout
