"""How much of each GPU is in use, and by whom, as the chooser of a free GPU asks a simulated NVML."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import REPOSITORY
from tfenv.devices.memory import read_memory
from tfenv.devices.nvml import NvmlUnavailableError, open_nvml
from tfenv.policy.model import MemoryUse

if TYPE_CHECKING:
    from tests.conftest import SimulatedGpus

pynvml = pytest.importorskip("pynvml")

FIRST, SECOND = (f"GPU-a{number}fa4e00-0000-4000-8000-00000000000{number}" for number in (0, 1))
PROGRAM = """
import json, sys
from tfenv.devices.memory import read_memory
from tfenv.devices.nvml import NvmlUnavailableError, open_nvml
print(json.dumps({uuid: [held.used, held.by_pid] for uuid, held in read_memory(sys.argv[1:]).items()}))
"""
MIB = 1 << 20
NOT_SUPPORTED, NOT_LOADED = 3, 9


def ask(env: dict[str, str], *uuids: str, **answers: int | str) -> Any:
    """Return [bytes in use, by pid] of each GPU. `answers` are what NVML says instead, as machine.h describes it."""
    env["TFGPU_SIMULATE"] = "".join(f"{key}={value}," for key, value in answers.items()) + env["TFGPU_SIMULATE"]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *uuids], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture
def busy(simulated_gpus: SimulatedGpus, tmp_path: Path) -> dict[str, str]:
    """Simulate two GPUs. On the first, two processes hold memory."""
    held = tmp_path / "processes"
    held.write_text("0 4711 1000\n0 4712 500\n")
    return simulated_gpus("2x24GiB", processes=held)


def test_memory_is_told_by_process(busy: dict[str, str]) -> None:
    """The sum, and what each process has of it. A GPU that nobody uses has none."""
    assert ask(busy, FIRST, SECOND) == {
        FIRST: [1500 * MIB, {"4711": 1000 * MIB, "4712": 500 * MIB}],
        SECOND: [0, {}],
    }


def test_what_the_driver_reserves_is_used_by_nobody(busy: dict[str, str]) -> None:
    """An idle card is empty, however much of it the driver keeps for itself."""
    answer = ask(busy, FIRST, SECOND, reserved_mib=480, processes_error=NOT_SUPPORTED)
    assert answer == {FIRST: [1500 * MIB, None], SECOND: [0, None]}


def test_a_gpu_that_is_not_there_is_left_out(busy: dict[str, str]) -> None:
    """It hides no other."""
    assert list(ask(busy, "GPU-00000000-0000-0000-0000-000000000000", SECOND)) == [SECOND]


def test_processes_that_are_hidden(busy: dict[str, str]) -> None:
    """Where the driver does not say who uses a card, the sum is still known, and nobody is taken for its owner."""
    assert ask(busy, FIRST, processes_error=NOT_SUPPORTED) == {FIRST: [1500 * MIB, None]}


def test_a_process_whose_memory_is_not_told(simulated_gpus: SimulatedGpus, tmp_path: Path) -> None:
    """As on WSL2: then no process's memory is known, for what is left could be anybody's."""
    held = tmp_path / "processes"
    held.write_text("0 4711 1000\n0 4712 -1\n")
    assert ask(simulated_gpus("1x24GiB", processes=held), FIRST) == {FIRST: [1000 * MIB, None]}


def test_a_card_that_does_not_say(busy: dict[str, str]) -> None:
    """Without a word of the memory a GPU is left out, but the processes tell as much where they are told."""
    assert ask(busy, FIRST, SECOND, memory_error=NOT_SUPPORTED) == {
        FIRST: [1500 * MIB, {"4711": 1000 * MIB, "4712": 500 * MIB}]
    }


@pytest.mark.parametrize(
    ("processes", "used", "by_pid"),
    [([(4711, 700)], 700, {4711: 700}), ([], 1 << 30, None)],
    ids=["processes", "no processes"],
)
def test_an_older_driver_counts_its_reserve_as_used(
    monkeypatch: pytest.MonkeyPatch, processes: list[tuple[int, int]], used: int, by_pid: dict[int, int] | None
) -> None:
    """There the processes' own sum is taken, and what the driver says only where no process is to be seen."""

    def refuse_version_2(_handle: object, version: int | None = None) -> SimpleNamespace:
        if version is not None:
            raise pynvml.NVMLError_FunctionNotFound
        return SimpleNamespace(total=24 << 30, used=1 << 30)

    entries = [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in processes]
    answers = {
        "Init": None, "Shutdown": None, "DeviceGetHandleByUUID": "handle",
        "DeviceGetComputeRunningProcesses": entries, "DeviceGetGraphicsRunningProcesses": [],
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, f"nvml{name}", lambda *_, answer=answer: answer)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", refuse_version_2)
    assert read_memory([FIRST]) == {FIRST: MemoryUse(used, by_pid)}


def test_the_machines_numbers_mean_nothing_in_a_container(simulated_gpus: SimulatedGpus, tmp_path: Path) -> None:
    """There they are those of other processes, if any: whose memory it is cannot be told."""
    held = tmp_path / "processes"
    held.write_text("0 1 1000\n")
    program = f"from tfenv.devices import nvml\nnvml.counts_pids_as_here = lambda: False\n{PROGRAM}"
    command = [sys.executable, "-c", program, FIRST, SECOND]
    env = simulated_gpus("2x24GiB", processes=held)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {FIRST: [1000 * MIB, None], SECOND: [0, {}]}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a PID namespace")
def test_a_container_is_known_by_its_numbers_of_processes() -> None:
    """The driver counts as the machine does. Simulated GPUs count as whoever simulates them."""
    text = "from tfenv.devices import nvml; print(nvml.counts_pids_as_here())"
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", text]
    answers = []
    for env in ({}, {"TFGPU_SIMULATE": "count=1"}):
        done = subprocess.run(unshare, env=env, capture_output=True, text=True, cwd=REPOSITORY, check=False)
        if "unshare" in done.stderr:
            pytest.skip(f"no PID namespace here: {done.stderr.strip()}")
        answers.append(done.stdout)
    assert answers == ["False\n", "True\n"]


def test_without_a_driver(busy: dict[str, str]) -> None:
    """Nothing is known, and nothing is raised."""
    assert ask(busy, FIRST, init_error=NOT_LOADED) == {}


def test_a_driver_that_goes_away_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nvmlShutdown says comes out of no context manager, neither in the place of an error nor without one."""
    calls: list[str] = []

    def refuse() -> None:
        calls.append("shutdown")
        raise pynvml.NVMLError_DriverNotLoaded

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", refuse)
    with open_nvml():
        pass
    with pytest.raises(KeyError), open_nvml():
        raise KeyError
    with pytest.raises(NvmlUnavailableError, match="NVML"), open_nvml():
        raise pynvml.NVMLError_GpuIsLost
    assert calls == ["shutdown"] * 3
