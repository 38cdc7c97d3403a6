"""`tfgpu verify`: each framework takes what the policy allows and no more, and what is not kept is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import TFGPU, Tfgpu
from tfenv.deploy.launch import PYTHONPATH_FOLDER
from tfenv.simulate.driver_requests import GpuRequestTotals, read_requests, summarise_requests
from tfenv.simulate.environment import build_environment, parse_gpus

MIB, GIB = 1 << 20, 1 << 30
LIMIT = 1000 * MIB
POLICY = """
[gpu]
visible_devices = [1, 2]
memory_growth = true
memory_limit = "1000MiB"

[audit]
file = "audit.jsonl"
"""


def _mark(name: str) -> Any:
    """Return a framework's name as a parameter that is left out where the framework is not installed."""
    missing = pytest.mark.skipif(find_spec(name) is None, reason=f"no {name} here")
    return pytest.param(name, marks=[getattr(pytest.mark, name), missing])


with_each_framework = pytest.mark.parametrize("framework", [_mark(name) for name in ("tensorflow", "jax", "torch")])
#: For what does not depend on the framework: the one that is the fastest here.
_FASTEST = next((name for name in ("torch", "jax") if find_spec(name) is not None), "torch")
with_one_framework = pytest.mark.parametrize("framework", [_mark(_FASTEST)])
#: What becomes of growth without a policy.
RAW_GROWTH = {"tensorflow": "broken", "jax": "broken", "torch": "kept"}


class Machine:
    """Simulated GPUs, and what was asked of them."""

    def __init__(self, folder: Path, path: str) -> None:
        self.folder = folder
        self.log = folder / "requests.jsonl"
        self.held = folder / "held"
        self.held.write_text("")
        self.env = {"PYTHONPATH": os.pathsep.join([PYTHONPATH_FOLDER, path]), "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.simulate("4x24GiB")

    def simulate(self, gpus: str) -> None:
        self.env |= build_environment(parse_gpus(gpus), log=self.log, processes=self.held, base={})

    @property
    def requests(self) -> dict[int, GpuRequestTotals]:
        """What the driver was asked for, by the GPU's number in the machine."""
        return summarise_requests(read_requests(self.log))

    def write_python(self, *lines: str) -> Path:
        """Write an interpreter that runs shell commands first. "$3" is what a probe is asked for."""
        python = self.folder / "python"
        python.write_text("\n".join(["#!/bin/sh", *lines, f'exec {sys.executable} "$@"\n']))
        python.chmod(0o755)
        return python


@pytest.fixture
def machine(tmp_path: Path, project: Path, variables: dict[str, str]) -> Machine:
    (project / "tfgpu.toml").write_text(POLICY)
    return Machine(tmp_path, variables["PYTHONPATH"])


@pytest.fixture
def stand_in(machine: Machine) -> Callable[[str], None]:
    """Return what puts a package called torch in front of a real one, if there is any."""

    def write(text: str) -> None:
        folder = machine.folder / "packages" / "torch"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(text)
        machine.env["PYTHONPATH"] = f"{folder.parent}{os.pathsep}{machine.env['PYTHONPATH']}"

    return write


def read_report(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.stdout, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def verify(tfgpu: Tfgpu, machine: Machine, framework: str, code: int, *options: str | Path) -> dict[str, Any]:
    """Return what is reported of one framework."""
    result = tfgpu("verify", "--framework", framework, "--format", "json", *options, env=machine.env)
    report = read_report(result)
    assert (result.returncode, report["kept"]) == (code, code == 0), report
    (made,) = report["frameworks"]
    assert made["framework"] == framework
    return dict(made)


# ---- promises that are kept


@with_each_framework
def test_every_promise_is_kept(tfgpu: Tfgpu, machine: Machine, framework: str) -> None:
    """The framework lists the policy's GPUs, grows, and is refused at the limit. The others are not touched."""
    made = verify(tfgpu, machine, framework, 0)
    assert [gpu["gpu"] for gpu in made["gpus"]] == ["1", "2"]
    assert (made["visible"]["verdict"], made["growth"]["verdict"], made["verdict"]) == ("kept", "kept", "kept")
    for gpu in made["gpus"]:
        assert (gpu["refused_by"], gpu["verdict"]) == ("allocator", "kept")
        assert gpu["allocated_bytes"] <= gpu["limit_bytes"] <= LIMIT
        assert gpu["first_nvml_bytes"] < gpu["allocated_bytes"] <= gpu["nvml_bytes"]
    assert set(machine.requests) == {1, 2}
    for totals in machine.requests.values():
        assert LIMIT / 2 < totals.peak_process <= LIMIT


@with_one_framework
def test_a_table_for_people(tfgpu: Tfgpu, machine: Machine, framework: str) -> None:
    """Before it starts it says what it will take. Each GPU has a line with its verdict, and the context is told."""
    machine.env["TFGPU_SIMULATE"] = machine.env["TFGPU_SIMULATE"].replace("context_mib=0", "context_mib=520")
    result = tfgpu("verify", "--framework", framework, env=machine.env)
    assert result.returncode == 0, result.stdout
    assert " takes up to 1000.0 MiB of GPU 1, 2 for some seconds\n" in result.stderr
    head, *rows = result.stdout.splitlines()
    assert head.split()[:5] == ["framework", "GPU", "at", "most", "allocated"]
    assert [row.split()[-2:] for row in rows] == [["allocator", "kept"]] * 2
    assert len(machine.requests) == 2


@pytest.mark.parametrize("limit", ["", 'memory_limit = "100GiB"'])
@pytest.mark.parametrize("framework", [_mark("jax")])
def test_nothing_is_filled_where_nothing_limits(
    tfgpu: Tfgpu, machine: Machine, project: Path, framework: str, limit: str
) -> None:
    """Without a limit below its memory a card is not filled, not even by a framework that would. It is said."""
    (project / "tfgpu.toml").write_text(f"[gpu]\nvisible_devices = [3]\n{limit}\n")
    made = verify(tfgpu, machine, framework, 0)
    assert [(gpu["limit_bytes"], gpu["verdict"], gpu["why"]) for gpu in made["gpus"]] == [
        (None, "none", "nothing limits it")
    ]
    assert set(machine.requests) == {3}
    assert machine.requests[3].peak_process < GIB


@with_one_framework
def test_it_takes_a_lease_as_a_program_does(tfgpu: Tfgpu, machine: Machine, project: Path, framework: str) -> None:
    """Where the policy chooses a free GPU, the child takes one that is free, and no other."""
    (project / "tfgpu.toml").write_text('[gpu]\nvisible_devices = {count = 1}\nmemory_limit = "1000MiB"\n')
    machine.held.write_text("".join(f"{gpu} {os.getpid()} 24000\n" for gpu in (0, 1, 3)))
    made = verify(tfgpu, machine, framework, 0)
    assert [(gpu["gpu"], gpu["verdict"]) for gpu in made["gpus"]] == [("2", "kept")]
    assert set(machine.requests) == {2}


@with_each_framework
def test_a_framework_that_the_policy_refuses(tfgpu: Tfgpu, machine: Machine, project: Path, framework: str) -> None:
    """Under `on_error = "fail"` a refused framework is not one that has no GPU. verify and doctor show the finding."""
    (project / "tfgpu.toml").write_text("on_error = 'fail'\n[gpu]\nvisible_devices = [7]\n")
    made = verify(tfgpu, machine, framework, 1)
    assert (made["verdict"], made["gpus"]) == ("unproven", [])
    assert "PolicyError: " in made["problem"]
    assert "[no-overlap]" in made["problem"]
    title = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}[framework]
    rows = json.loads(tfgpu("doctor", "--format", "json", env=machine.env).stdout)["rows"]
    (row,) = [row for row in rows if row["topic"] == title]
    assert row["found"].startswith("cannot be asked: ")
    assert "PolicyError: " in row["found"]
    assert row["advice"] == 'see `tfgpu explain`: on_error is "fail"'


@with_one_framework
def test_a_share_is_the_limit(tfgpu: Tfgpu, machine: Machine, project: Path, framework: str) -> None:
    """A framework that has a share of the process's limit is refused at its share."""
    (project / "tfgpu.toml").write_text(f"{POLICY}\n[gpu.frameworks]\n{framework} = '300MiB'\n")
    made = verify(tfgpu, machine, framework, 0)
    assert {(gpu["limit_bytes"], gpu["verdict"]) for gpu in made["gpus"]} == {(300 * MIB, "kept")}
    assert set(machine.requests) == {1, 2}
    assert all(totals.peak_process <= 300 * MIB for totals in machine.requests.values())


@pytest.mark.exhaustive
@pytest.mark.tensorflow
@pytest.mark.skipif(find_spec("tensorflow") is None, reason="no TensorFlow here")
def test_a_framework_without_a_share_has_no_gpu(tfgpu: Tfgpu, machine: Machine, project: Path) -> None:
    """Where the shares of others are all of the limit, nothing is taken, and that is what was promised."""
    (project / "tfgpu.toml").write_text(f"{POLICY}\n[gpu.frameworks]\njax = '1000MiB'\n")
    made = verify(tfgpu, machine, "tensorflow", 0)
    assert {request.bytes for request in read_requests(machine.log) if request.op == "cuInit"} == {2}, "it lists none"
    assert (made["gpus"], made["visible"]["verdict"]) == ([], "kept")
    assert not machine.requests


@pytest.mark.exhaustive
@pytest.mark.tensorflow
@pytest.mark.skipif(find_spec("tensorflow") is None, reason="no TensorFlow here")
def test_a_split_gpu_and_an_instance(tfgpu: Tfgpu, machine: Machine, project: Path) -> None:
    """The parts of a split GPU are filled together. A MIG instance is found by its own UUID."""
    policy = '[[gpu.device]]\nmatch = "0"\nmemory_limit = "3GiB"\nlogical_devices = ["2GiB", "1GiB"]\n'
    (project / "tfgpu.toml").write_text(f"{policy}\n[gpu]\nmemory_growth = true\n")
    machine.simulate("1x80GiB/mig=1x40GiB")
    (gpu,) = verify(tfgpu, machine, "tensorflow", 0)["gpus"]
    assert (gpu["gpu"], gpu["uuid"][:4], gpu["verdict"]) == ("0:0", "MIG-", "kept")
    assert 2 * GIB < gpu["allocated_bytes"] <= gpu["limit_bytes"] == 3 * GIB
    assert machine.requests[0].peak_process <= 3 * GIB


# ---- promises that are not


@with_each_framework
def test_a_framework_that_is_not_held(tfgpu: Tfgpu, machine: Machine, framework: str) -> None:
    """A program that the policy does not reach breaks every promise. It takes no more than shows that."""
    python = machine.write_python('case "$3" in fill) export TFGPU_DISABLE=1;; esac')
    made = verify(tfgpu, machine, framework, 1, "--python", python)
    assert (made["verdict"], made["visible"]["verdict"]) == ("broken", "broken")
    assert made["visible"]["why"] == "it lists GPU 0, 3, which the policy hides"
    assert made["growth"]["verdict"] == RAW_GROWTH[framework]
    assert {gpu["verdict"] for gpu in made["gpus"]} == {"broken"}
    assert len(machine.requests) == 4
    for gpu in made["gpus"]:
        assert gpu["refused_by"] is None
        assert LIMIT < gpu["allocated_bytes"] <= LIMIT + gpu["piece_bytes"]


def test_an_interpreter_without_the_hook(tfgpu: Tfgpu, machine: Machine, stand_in: Callable[[str], None]) -> None:
    """What is promised cannot hold where the hook is not active. That is told, and no memory is taken."""
    stand_in("raise AssertionError('imported')")
    python = machine.write_python(f'exec {sys.executable} -S "$@"')
    made = verify(tfgpu, machine, "torch", 1, "--python", python)
    assert made["verdict"] == "broken"
    assert made["problem"].startswith("the hook is not active in ")
    assert "(-S)" in made["problem"]
    assert not machine.requests


@with_one_framework
def test_a_full_card_proves_nothing(tfgpu: Tfgpu, machine: Machine, framework: str) -> None:
    """Where others have filled the card the limit is not reached. The exit code says that nothing was proven."""
    machine.held.write_text("".join(f"{gpu} {os.getpid()} 24000\n" for gpu in (1, 2)))
    made = verify(tfgpu, machine, framework, 1)
    assert {(gpu["refused_by"], gpu["verdict"]) for gpu in made["gpus"]} == {("card", "unproven")}
    assert {gpu["why"] for gpu in made["gpus"]} == {"the card was full before the limit was reached"}
    assert set(machine.requests) == {1, 2}


def is_running(pid: int) -> bool:
    """Return whether a process runs. One that has ended may wait for somebody to collect it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_for_end(pid: int) -> bool:
    """Return whether a process ends within some seconds."""
    deadline = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


# ---- what cannot be measured


def test_a_framework_that_cannot_be_imported(tfgpu: Tfgpu, machine: Machine, stand_in: Callable[[str], None]) -> None:
    """Its own last words are the reason, and nothing is proven."""
    stand_in("raise RuntimeError('half installed')")
    made = verify(tfgpu, machine, "torch", 1)
    assert (made["verdict"], made["problem"]) == ("unproven", "RuntimeError: half installed")


def test_a_framework_that_is_not_installed(tfgpu: Tfgpu, machine: Machine) -> None:
    """One that was asked for by name and is not there proves nothing. One that nobody knows is wrong usage."""
    python = machine.write_python(f'exec {sys.executable} -S "$@"')
    made = verify(tfgpu, machine, "torch", 1, "--python", python)
    assert made["problem"].startswith("it is not installed in ")
    assert tfgpu("verify", "--framework", "numpy", env=machine.env).returncode == 2


def test_nothing_to_measure(tfgpu: Tfgpu, machine: Machine) -> None:
    """No framework and no GPU are told, and are no broken promise. A driver that does not answer is a problem."""
    bare = machine.write_python(f'exec {sys.executable} -S "$@"')
    result = tfgpu("verify", "--python", bare, env=machine.env)
    assert (result.returncode, "none of TensorFlow, JAX, PyTorch is installed in" in result.stdout) == (0, True)
    machine.env["TFGPU_SIMULATE"] = f"count=0,{machine.env['TFGPU_SIMULATE']}"
    result = tfgpu("verify", env=machine.env)
    assert (result.returncode, result.stdout) == (0, "GPUs  the driver lists none\n")
    machine.env["TFGPU_SIMULATE"] = f"init_error=18,{machine.env['TFGPU_SIMULATE']}"
    result = tfgpu("verify", "--format", "json", env=machine.env)
    assert "restart the machine" in read_report(result)["problem"]
    assert result.returncode == int(os.path.exists("/dev/nvidiactl"))  # without it, no driver is meant to be here


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/true"])
def test_no_such_interpreter(tfgpu: Tfgpu, python: str) -> None:
    """--python that is none is wrong usage."""
    result = tfgpu("verify", "--python", python)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"cannot run {python} as a Python interpreter" in result.stderr


def test_it_has_a_time_limit(tfgpu: Tfgpu, machine: Machine, stand_in: Callable[[str], None]) -> None:
    """A child that is not done in time is ended, and nothing is proven."""
    stand_in(f"import os, signal\nopen({str(machine.folder / 'pid')!r}, 'w').write(str(os.getpid()))\nsignal.pause()")
    made = verify(tfgpu, machine, "torch", 1, "--timeout", "3")
    assert (made["verdict"], made["problem"]) == ("unproven", "no answer within 3 s")
    assert not is_running(int((machine.folder / "pid").read_text()))
    assert tfgpu("verify", "--timeout", "soon", env=machine.env).returncode == 2


@pytest.fixture
def waiting(
    machine: Machine, project: Path, variables: dict[str, str], stand_in: Callable[[str], None]
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start a run whose child hangs. Return it with the child's pid."""
    place = machine.folder / "pid"
    lines = ("import os, signal", f"place = {str(place)!r}", "open(place + '.new', 'w').write(str(os.getpid()))")
    stand_in("\n".join((*lines, "os.rename(place + '.new', place)", "signal.pause()")))
    command = [*TFGPU, "verify", "--framework", "torch"]
    with subprocess.Popen(command, cwd=project, env=variables | machine.env, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not place.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        yield process, int(place.read_text())
        process.kill()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)])
def test_no_child_is_left_behind(waiting: tuple[subprocess.Popen[bytes], int], sent: signal.Signals, code: int) -> None:
    """However the command ends, the child ends with it. Ctrl-C ends it with 130."""
    process, child = waiting
    assert is_running(child)
    process.send_signal(sent)
    assert process.wait(30) == code
    assert wait_for_end(child)
