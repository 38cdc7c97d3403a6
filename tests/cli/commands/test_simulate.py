"""`tfgpu simulate`, as a program."""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.cli.conftest import REPOSITORY, TFGPU
from tfenv.cli.commands.simulate import add_arguments
from tfenv.simulate.driver_requests import read_requests

MIB = 1 << 20
#: Takes 100 MiB of GPU 1 and is refused the rest.
TAKE = """
import ctypes, os
cuda = ctypes.CDLL("libcuda.so.1")
context, pointer = ctypes.c_void_p(), ctypes.c_ulonglong()
assert cuda.cuInit(0) == 0
assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 1) == 0
assert cuda.cuCtxSetCurrent(context) == 0
assert cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(100 << 20)) == 0
assert cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(1 << 40)) == 2
"""


def build_command(*arguments: str) -> list[str]:
    return [*TFGPU, "simulate", *arguments]


def make_environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}


def simulate(
    *arguments: str, stdin: str | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command, env = build_command(*arguments), env or make_environment()
    return subprocess.run(command, env=env, input=stdin, capture_output=True, text=True, timeout=60, check=False)


def test_sums_up_per_gpu() -> None:
    """At the end stderr has a line for each GPU, and warns that numbers are meaningless. stdout is the command's."""
    result = simulate("--gpus", "2x24GiB:NVIDIA A100", "--", sys.executable, "-c", TAKE + "print('hello')")
    assert (result.returncode, result.stdout) == (0, "hello\n")
    rows = [line for line in result.stderr.splitlines() if "NVIDIA A100" in line]
    assert [re.split(" {2,}", row.strip()) for row in rows] == [
        ["0", "NVIDIA A100", "24.0 GiB", "-", "-", "-", "0", "0"],
        ["1", "NVIDIA A100", "24.0 GiB", "100.0 MiB", "100.0 MiB", "100.0 MiB", "2", "1"],
    ]
    assert "the numbers the command printed are meaningless" in result.stderr
    assert "No process opened CUDA" not in result.stderr


def test_what_a_card_and_a_process_lose() -> None:
    """`--reserved` is taken off each GPU, `--context` off the rest once a process opens it. Both may be left out."""
    take_all = TAKE.replace("100 << 20", "800 << 20")
    sizes = (("--reserved", "200MiB"), ("--context", "25MiB"))
    command = ("--gpus", "2x1000MiB", "--format", "json")
    for options, code, peak in (((), 0, 800), (sizes[0], 0, 800), (sizes[1], 0, 825), ((*sizes[0], *sizes[1]), 1, 25)):
        result = simulate(*command, *options, "--", sys.executable, "-c", take_all)
        summary = json.loads(result.stderr.splitlines()[-1])
        assert (result.returncode, summary["gpus"][1]["peak"]) == (code, peak * MIB), options


@pytest.mark.parametrize("option", ["--reserved", "--context"])
@pytest.mark.parametrize("size", ["5%", "200%", "none", "8", "foo"])
def test_sizes_that_are_none(option: str, size: str) -> None:
    """A message names what the option accepts: a size, and no share of a GPU."""
    result = simulate(option, size, "--", "true")
    assert result.returncode == 2
    assert result.stderr.endswith(f'argument {option}: "{size}" is not a size; write "24GiB"\n')


def test_nobody_by_that_name_keeps_limits() -> None:
    """A message names what `--cgroup-limits` accepts."""
    result = simulate("--cgroup-limits", "kernel", "--", "true")
    assert result.returncode == 2
    assert result.stderr.endswith(
        '"kernel" does not say who keeps limits for cgroups; write "dmem", "dmem/2", "misc" or "none"\n'
    )


def test_a_gpu_that_is_all_reserved() -> None:
    """A driver that keeps the whole GPU is refused, with 2."""
    result = simulate("--gpus", "1x1000MiB", "--reserved", "1000MiB", "--", "true")
    assert result.returncode == 2
    assert "reserve less than its memory" in result.stderr


def test_says_that_nothing_opened_cuda() -> None:
    """A command that asks nothing of the driver is told so."""
    result = simulate("--", "true")
    assert result.returncode == 0
    assert "No process opened CUDA." in result.stderr


def test_json_summary_and_log(tmp_path: Path) -> None:
    """`--format json` prints one object on stderr. `--log` holds each request, and no older ones."""
    log = tmp_path / "log.jsonl"
    log.write_text("left from yesterday\n")
    result = simulate("--gpus", "2x1GiB", "--log", str(log), "--format", "json", "--", sys.executable, "-c", TAKE)
    summary = json.loads(result.stderr)
    assert [(gpu["peak"], gpu["allocations"], gpu["out_of_memory"]) for gpu in summary["gpus"]] == [
        (0, 0, 0),
        (100 * MIB, 2, 1),
    ]
    requests = read_requests(log)
    assert [request.op for request in requests] == ["cuInit", "alloc", "oom"]
    assert summary["processes_with_cuda"] == [requests[0].pid]
    assert "meaningless" in summary["note"]


def test_processes_of_other_users(tmp_path: Path) -> None:
    """Memory in `--processes` is not free for the command."""
    others = tmp_path / "processes"
    others.write_text("1 4242 950\n")
    result = simulate("--gpus", "2x1GiB", "--processes", str(others), "--", sys.executable, "-c", TAKE)
    assert result.returncode == 1
    assert "AssertionError" in result.stderr


def test_standard_input_and_exit_code_pass_through() -> None:
    """The command reads our stdin, and its exit code is ours."""
    result = simulate("--", "sh", "-c", "cat; exit 42", stdin="typed\n")
    assert (result.returncode, result.stdout) == (42, "typed\n")


def test_options_of_the_command_are_its_own() -> None:
    """What follows the command belongs to it, `--` and our own options too."""
    program = "import sys; print(sys.argv[1:])"
    result = simulate("--gpus", "1x1GiB", "--", sys.executable, "-c", program, "--gpus", "--", "--log", "x")
    assert result.stdout == "['--gpus', '--', '--log', 'x']\n"


def test_python_is_what_the_user_typed(tmp_path: Path) -> None:
    """`python` is looked up on PATH like any command."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho mine\n")
    python.chmod(0o755)
    env = make_environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert simulate("--", "python", "train.py", env=env).stdout == "mine\n"


@pytest.mark.parametrize("code", [0, 3])
def test_a_command_that_failed_is_told_what_simulated_gpus_cannot_do(code: int) -> None:
    """The summary says that convolutions and FFT fail, if the command failed."""
    result = simulate("--", "sh", "-c", f"exit {code}")
    said = " ".join(result.stderr.split())
    assert ("Convolutions, FFT and linear algebra fail on simulated GPUs." in said) is bool(code)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_end_by_a_signal(number: signal.Signals) -> None:
    """A command that a signal ended gives 128 and the signal's number, and still a summary."""
    result = simulate("--", "sh", "-c", f"kill -{int(number)} $$")
    assert result.returncode == 128 + number
    assert "meaningless" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(number: signal.Signals) -> None:
    """SIGINT and SIGTERM sent to us alone reach the command, which ends as it likes."""
    program = "trap 'echo caught; exit 7' INT TERM; echo ready; while :; do sleep 0.05; done"
    arguments = build_command("--", "sh", "-c", program)
    with subprocess.Popen(
        arguments,
        env=make_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (7, "caught\n")
    assert "meaningless" in errors
    assert "Traceback" not in errors


def test_ctrl_c_reaches_the_command_once() -> None:
    """Ctrl-C on a terminal interrupts the command once, not a second time through us."""
    program = (
        "import signal, time\ncaught = []\nsignal.signal(signal.SIGINT, lambda *_: caught.append(1))\n"
        "print('ready', flush=True)\nend = time.monotonic() + 1\n"
        "while time.monotonic() < end: time.sleep(0.05)\nprint('caught', len(caught))"
    )
    pid, terminal = pty.fork()
    if not pid:
        arguments = build_command("--", sys.executable, "-c", program)
        os.execve(arguments[0], arguments, make_environment())
    output = b""
    while b"ready" not in output:
        output += os.read(terminal, 1024)
    os.write(terminal, b"\x03")
    output += read_to_the_end(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, output
    assert b"caught 1" in output
    assert b"meaningless" in output


def read_to_the_end(terminal: int) -> bytes:
    output = b""
    try:
        while chunk := os.read(terminal, 1024):
            output += chunk
    except OSError:  # the other side is closed
        pass
    return output


def test_no_command() -> None:
    """Without a command it is a usage error that shows how to write one."""
    for arguments in ([], ["--gpus", "4x24GiB"], ["--"]):
        result = simulate(*arguments)
        assert result.returncode == 2
        assert "-- python train.py" in result.stderr


def test_help_is_made_of_sentences() -> None:
    """Each option says what it does in a sentence that begins with a verb."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    for action in parser._actions:
        assert re.fullmatch(r"(Set|Keep|Charge|Share|Write|Read|Run) .*\.", action.help or ""), action.dest


def test_unknown_command() -> None:
    """A command that is not there is 127, one that cannot be executed 126, with its name."""
    result = simulate("--", "no-such-command-here")
    assert result.returncode == 127
    assert result.stderr == 'tfgpu simulate: command not found: "no-such-command-here"\n'
    result = simulate("--", "/etc/passwd")
    assert result.returncode == 126
    assert result.stderr == 'tfgpu simulate: cannot run "/etc/passwd": Permission denied\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "four"], '"four" does not describe GPUs; write "4x24GiB"'),
        (["--gpus", "4x24G"], "write 24GiB"),
        (["--processes", "/no/such/file"], "cannot read /no/such/file"),
        (["--format", "xml"], "invalid choice"),
    ],
)
def test_bad_options(arguments: list[str], message: str) -> None:
    """A bad option is a usage error that says what would be right."""
    result = simulate(*arguments, "--", "true")
    assert result.returncode == 2
    assert message in result.stderr


def test_no_compiler(tmp_path: Path) -> None:
    """Without a C compiler nothing is run, and the error says what to install."""
    env = make_environment(PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    result = simulate("--", "/bin/echo", "ran", env=env)
    assert (result.returncode, result.stdout) == (1, "")
    assert "no C compiler" in result.stderr
    assert "apt install gcc" in result.stderr


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    """What the compiler says keeps its lines, and its escape sequences are shown escaped."""
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nprintf 'first\\033[31m\\nsecond\\n' >&2\nexit 1\n")
    compiler.chmod(0o755)
    result = simulate("--", "/bin/echo", "ran", env=make_environment(CC=str(compiler), XDG_CACHE_HOME=str(tmp_path)))
    assert (result.returncode, result.stdout) == (1, "")
    assert "second" in [line.strip() for line in result.stderr.splitlines()]
    assert r"first\x1b[31m" in result.stderr
    assert "\x1b" not in result.stderr


def test_hostile_names_do_not_steer_the_terminal() -> None:
    """Escape sequences in a GPU's name or a command's are shown escaped."""
    result = simulate("--gpus", "1x1GiB:a\x1b[31m", "--", "true")
    assert "\x1b" not in result.stderr
    result = simulate("--", "no\x1b[31m")
    assert result.returncode == 127
    assert result.stderr == 'tfgpu simulate: command not found: "no\\x1b[31m"\n'


def test_log_that_cannot_be_written(tmp_path: Path) -> None:
    """A log in a folder that is not there is said before the command starts."""
    result = simulate("--log", str(tmp_path / "absent" / "log"), "--", "echo", "ran")
    assert (result.returncode, result.stdout) == (2, "")
    assert "No such file or directory" in result.stderr
