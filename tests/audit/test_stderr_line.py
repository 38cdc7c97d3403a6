from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

import pytest

from tfenv.audit.stderr_line import SHOWN_VARIABLE, format_policy_line, print_to_stderr, show_policy_line
from tfenv.errors import PROGRAM, Finding, escape_for_terminal
from tfenv.policy.model import (
    Device,
    EffectivePolicy,
    MemoryLimit,
    Origin,
    Outcome,
    Plan,
    PlannedDevice,
    Setting,
    Share,
    Subject,
)
from tfenv.values import replace

SUBJECT = Subject("alice", 1000, project="/srv/vision")
PATH = "/srv/vision/tfgpu.toml"
ORIGIN = Origin("project", PATH, ("gpu", "visible_devices"))
POLICY = EffectivePolicy({"memory_growth": Setting(True, ORIGIN)}, paths=(PATH,))
LIMIT = MemoryLimit(bytes=8 << 30)
FIRST = PlannedDevice("0", Device(0, "GPU-8932f937-d72c-4106", "H100", 80 << 30), LIMIT)
SECOND = PlannedDevice("1", Device(1, "GPU-0a1b2c3d-0000-1111", "H100", 80 << 30), LIMIT)
PLAN = Plan("0", devices=(FIRST,), growth=True, machine_count=4)
WRONG = Finding("unknown-key", "did you mean memory_limit", "warning", PATH, 3, 1, "gpu.memory_limt")


def test_one_gpu() -> None:
    """The line names the GPU as nvidia-smi counts it, its UUID, growth, limit and the file in the project."""
    line = format_policy_line(SUBJECT, POLICY, PLAN)
    assert line == "tfgpu: GPU 0 of 4 (GPU-8932f937), growth on, at most 8.0 GiB (tfgpu.toml)"


def test_the_share_that_a_launcher_gave() -> None:
    """A limit that is the share names who gave it. Another limit that is smaller does not."""
    share = Share("Slurm", "3 shards", 0.75)
    devices = (replace(FIRST, limit=MemoryLimit(fraction=0.75)),)
    line = format_policy_line(SUBJECT, POLICY, replace(PLAN, devices=devices, share=share))
    assert line == "tfgpu: GPU 0 of 4 (GPU-8932f937), growth on, at most 75% by Slurm's 3 shards (tfgpu.toml)"
    assert "Slurm" not in format_policy_line(SUBJECT, POLICY, replace(PLAN, share=share))


def test_several_gpus() -> None:
    """Several GPUs are listed with their UUIDs in the same order, and files outside the project by their path."""
    policy = replace(POLICY, paths=("/etc/tfgpu/tfgpu.toml", PATH))
    line = format_policy_line(SUBJECT, policy, replace(PLAN, devices=(FIRST, SECOND), growth=False))
    assert line == (
        "tfgpu: GPU 0,1 of 4 (GPU-8932f937, GPU-0a1b2c3d), growth off, at most 8.0 GiB each"
        " (/etc/tfgpu/tfgpu.toml, tfgpu.toml)"
    )


def test_limits_that_differ() -> None:
    """Different limits are listed in the order of the GPUs."""
    second = replace(SECOND, limit=MemoryLimit(fraction=0.4))
    assert ", at most 8.0 GiB, 40% (" in format_policy_line(SUBJECT, POLICY, replace(PLAN, devices=(FIRST, second)))


def test_gpus_that_nvml_does_not_know() -> None:
    """Without NVML the entries of CUDA_VISIBLE_DEVICES stand for the GPUs."""
    line = format_policy_line(
        SUBJECT, POLICY, Plan("1,GPU-8932f937-d72c", devices=(PlannedDevice("1"), PlannedDevice("GPU-8-x")))
    )
    assert line == "tfgpu: GPU 1,GPU-8 (tfgpu.toml)"


def test_all_gpus_with_one_limit() -> None:
    """A policy that is not a GPUs speaks of all."""
    line = format_policy_line(SUBJECT, POLICY, Plan(limit=MemoryLimit(fraction=0.5)))
    assert line == "tfgpu: all GPUs, at most 50% each (tfgpu.toml)"


def test_what_came_too_late_is_not_in_force() -> None:
    """Where the devices were there first, the line says that and what to do, and promises no GPU and no limit."""
    late = Outcome("too_late", findings=(Finding("too-late", "devices were there first; restart the process"),))
    line = format_policy_line(SUBJECT, POLICY, PLAN, late, (WRONG,))
    begins = "tfgpu: NOT IN FORCE: devices were there first; restart the process [too-late] (tfgpu.toml); warning: "
    assert line.startswith(begins)
    assert "8.0 GiB" not in line


def test_no_gpu_because_the_file_says_none() -> None:
    """An explicit none names the file that said so."""
    policy = replace(POLICY, settings={"visible_devices": Setting((), ORIGIN)})
    line = format_policy_line(SUBJECT, policy, Plan("", devices=()))
    assert line == 'tfgpu: NO GPU: visible_devices = "none" (tfgpu.toml)'


def test_no_gpu_because_something_is_wrong() -> None:
    """A finding that leaves no GPU is the reason, in its own words. The others follow."""
    broken = Finding("no-overlap", "GPU 9 is not here", "error")
    line = format_policy_line(SUBJECT, POLICY, Plan("", devices=(), findings=(WRONG, broken)))
    assert line == (
        "tfgpu: NO GPU: GPU 9 is not here [no-overlap]; warning: tfgpu.toml:3:1: gpu.memory_limt: "
        "did you mean memory_limit [unknown-key]; see `tfgpu explain`"
    )


def test_no_gpu_because_none_was_granted() -> None:
    """Where nothing is wrong and no file says none, it was the scheduler."""
    assert format_policy_line(SUBJECT, POLICY, Plan("", devices=())).startswith(
        "tfgpu: NO GPU: none was given to this process"
    )
    assert format_policy_line(SUBJECT, POLICY, PLAN, Outcome("cpu")).startswith("tfgpu: NO GPU: ")


def test_what_is_broken_comes_first() -> None:
    """A line that begins well is read as good news. Then follows what holds. Clamps, which are notes, are left out."""
    worse = Finding("insecure-permissions", "is writable by everybody", "error", "/etc/tfgpu/tfgpu.toml")
    note = Finding("clamped", "less than asked", "note")
    line = format_policy_line(SUBJECT, POLICY, PLAN, findings=(WRONG, note, worse))
    assert line == (
        "tfgpu: NOT IN FORCE: /etc/tfgpu/tfgpu.toml: is writable by everybody [insecure-permissions]; in force: "
        "GPU 0 of 4 (GPU-8932f937), growth on, at most 8.0 GiB (tfgpu.toml); warning: tfgpu.toml:3:1: "
        "gpu.memory_limt: did you mean memory_limit [unknown-key]; see `tfgpu explain`"
    )


def test_a_file_that_does_not_parse_leaves_no_limit() -> None:
    """Where nothing else is declared the line says what TensorFlow has now."""
    broken = Finding("syntax", "unclosed bracket", "error", PATH, 2, 8)
    line = format_policy_line(SUBJECT, EffectivePolicy(), Plan(machine_count=4), findings=(broken,))
    assert line.startswith(
        "tfgpu: NOT IN FORCE: tfgpu.toml:2:8: unclosed bracket [syntax]; the program has all 4 GPUs without a limit"
    )


def test_no_finding_hides_behind_another() -> None:
    """Three are named, and how many more there are is said."""
    many = tuple(Finding(f"code-{number}", f"number {number}", "warning") for number in range(5))
    line = format_policy_line(SUBJECT, POLICY, PLAN, findings=many)
    assert "[code-0]; warning: number 1 [code-1]; warning: number 2 [code-2]; and 2 more; see `tfgpu explain`" in line


def test_what_the_program_asked_for_points_to_no_command() -> None:
    """No command that is run later can show it."""
    asked = Finding("no-overlap", "the program set CUDA_VISIBLE_DEVICES=7", "warning", asked_by=PROGRAM)
    assert "explain" not in format_policy_line(SUBJECT, POLICY, PLAN, findings=(asked,))


def test_nothing_declared_is_nothing_said() -> None:
    """Without a policy and without a finding there is no line."""
    assert format_policy_line(SUBJECT, EffectivePolicy(), Plan()) == ""
    assert "first" not in format_policy_line(SUBJECT, EffectivePolicy(), Plan(), findings=(WRONG,))


def test_hostile_names_stay_in_one_line() -> None:
    """Names with newlines, ANSI escapes, U+2028 and bidirectional overrides are escaped. The line has an end."""
    policy = replace(POLICY, paths=("/tmp/a\nb\x1b[31m\u2028\u202e\x9b\udcff.toml",))
    finding = Finding("x", "m" * 10_000, "error", "/tmp/\r\x07")
    line = format_policy_line(SUBJECT, policy, PLAN, findings=(finding,))
    assert line.isprintable()
    assert "\\x1b[31m\\u2028\\u202e\\x9b\\udcff" in line
    assert len(line) < 1000


def test_printable_leaves_letters_of_all_scripts_alone() -> None:
    """Only what is not printable is escaped."""
    assert escape_for_terminal("Ünï 日本 \t\x00") == "Ünï 日本 \\t\\x00"


def test_the_line_is_shown_by_the_topmost_process_only(capsys: pytest.CaptureFixture[str]) -> None:
    """The first process prints and tells its children by a variable. An empty line is not printed."""
    environ: dict[str, str] = {}
    show_policy_line("", environ)
    assert environ == {}
    show_policy_line("tfgpu: x", environ)
    show_policy_line("tfgpu: x", environ)
    assert capsys.readouterr().err == "tfgpu: x\n"
    assert list(environ) == [SHOWN_VARIABLE]


def test_another_line_is_shown_by_a_child_and_so_is_the_same_one_elsewhere(capfd: pytest.CaptureFixture[str]) -> None:
    """What the parent said hides neither another line nor the same one to a stderr that nobody wrote to."""
    environ: dict[str, str] = {}
    for text in ("tfgpu: GPU 0", "tfgpu: NO GPU", "tfgpu: GPU 0"):
        show_policy_line(text, environ)
    assert capfd.readouterr().err == "tfgpu: GPU 0\ntfgpu: NO GPU\n"
    stderr, (reading, writing) = os.dup(2), os.pipe()
    try:
        os.dup2(writing, 2)
        show_policy_line("tfgpu: GPU 0", environ)
    finally:
        os.dup2(stderr, 2)
        for descriptor in (stderr, writing, reading):
            os.close(descriptor)
    assert len(environ[SHOWN_VARIABLE].split(",")) == 3


def test_a_job_shows_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever submits a job showed the line somewhere else, and its environment came with the job."""
    environ: dict[str, str] = {}
    for job in ({}, {"SLURM_JOB_ID": "14"}, {"SLURM_JOB_ID": "14"}, {"SLURM_JOB_ID": "15"}):
        environ.update(job)
        show_policy_line("tfgpu: GPU 0", environ)
    assert capsys.readouterr().err == "tfgpu: GPU 0\n" * 3


class Hostile:
    """A stream that a program put in the place of stderr."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def write(self, _text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [OSError(), ValueError(), SystemExit(3), GeneratorExit(), BaseException()], ids=repr)
def test_a_stream_that_raises_is_survived(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Whatever a replaced stderr raises stays in there, SystemExit too."""
    monkeypatch.setattr("sys.stderr", Hostile(error))
    print_to_stderr("tfgpu: x")


def test_ctrl_c_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the moment of the line still ends the program."""
    monkeypatch.setattr("sys.stderr", Hostile(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        print_to_stderr("tfgpu: x")


@pytest.mark.parametrize("loss", ["sys.stderr.close()", "sys.stderr = None", "os.close(2)", "sys.stderr = object()"])
def test_without_stderr_nothing_happens(python: Callable[..., subprocess.CompletedProcess[str]], loss: str) -> None:
    """A program whose stderr is closed, missing or something else goes on."""
    program = (
        f"import os, sys\nfrom tfenv.audit.stderr_line import show_policy_line\n{loss}\nshow_policy_line('tfgpu: x')\n"
    )
    run = python(program + "sys.stdout.write('on'); sys.stdout.flush(); os._exit(0)")
    assert (run.returncode, run.stdout) == (0, "on")


def test_a_terminal_that_knows_no_such_letter_gets_it_escaped(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """An ASCII locale does not lose the line."""
    program = "from tfenv.audit.stderr_line import print_to_stderr\nprint_to_stderr('tfgpu: \\u65e5')"
    assert python(program, PYTHONIOENCODING="ascii").stderr == "tfgpu: \\u65e5\n"
