"""The stub NVML, asked by the real nvidia-ml-py in child processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import SimulatedGpus
    from tests.simulate.conftest import RunPython

pytest.importorskip("pynvml")

MIB = 1 << 20
NVML = """
import json, os, pynvml as n
n.nvmlInit()
handles = [n.nvmlDeviceGetHandleByIndex(i) for i in range(n.nvmlDeviceGetCount())]
def used(handle):
    memory, second = n.nvmlDeviceGetMemoryInfo(handle), n.nvmlDeviceGetMemoryInfo(handle, version=n.nvmlMemory_v2)
    assert (memory.total, memory.used, memory.free) == (second.total, second.used, second.free)
    processes = [(p.pid, p.usedGpuMemory >> 20) for p in n.nvmlDeviceGetComputeRunningProcesses(handle)]
    return [memory.total >> 20, memory.used >> 20, processes]
"""


def test_describes_the_gpus(simulated_gpus: SimulatedGpus, run_python: RunPython) -> None:
    """Names, UUIDs, sizes and PCI addresses of all GPUs, whatever CUDA_VISIBLE_DEVICES says."""
    program = NVML + (
        "print(json.dumps([[n.nvmlDeviceGetName(h), n.nvmlDeviceGetUUID(h), n.nvmlDeviceGetMemoryInfo(h).total >> 20,"
        " n.nvmlDeviceGetPciInfo(h).busId, n.nvmlDeviceGetIndex(h), n.nvmlDeviceGetCudaComputeCapability(h)]"
        " for h in handles]))"
    )
    env = simulated_gpus("1x24GiB:NVIDIA A100,1x80GiB:NVIDIA H100", CUDA_VISIBLE_DEVICES="")
    first, second = "GPU-a0fa4e00-0000-4000-8000-000000000000", "GPU-a1fa4e00-0000-4000-8000-000000000001"
    assert json.loads(run_python(program, env)) == [
        ["NVIDIA A100", first, 24 * 1024, "00000000:01:00.0", 0, [8, 0]],
        ["NVIDIA H100", second, 80 * 1024, "00000000:02:00.0", 1, [8, 0]],
    ]


def test_finds_gpus_by_uuid_and_bus(simulated_gpus: SimulatedGpus, run_python: RunPython) -> None:
    """A UUID or a PCI address leads to its GPU. An unknown one is NotFound, a bad index InvalidArgument."""
    program = NVML + (
        "found = [n.nvmlDeviceGetIndex(n.nvmlDeviceGetHandleByUUID(n.nvmlDeviceGetUUID(handles[2]))),\n"
        "         n.nvmlDeviceGetIndex(n.nvmlDeviceGetHandleByPciBusId('0000:04:00.0'))]\n"
        "for ask in (lambda: n.nvmlDeviceGetHandleByUUID('GPU-no'), lambda: n.nvmlDeviceGetHandleByIndex(4),\n"
        "            lambda: n.nvmlDeviceGetMigMode(handles[0])):\n"
        "    try: ask()\n"
        "    except n.NVMLError as error: found.append(type(error).__name__)\n"
        "n.nvmlShutdown()\n"
        "try: n.nvmlDeviceGetCount()\n"
        "except n.NVMLError as error: found.append(type(error).__name__)\n"
        "print(json.dumps(found))"
    )
    errors = ["NVMLError_NotFound", "NVMLError_InvalidArgument", "NVMLError_NotSupported", "NVMLError_Uninitialized"]
    assert json.loads(run_python(program, simulated_gpus())) == [2, 3, *errors]


def test_shows_other_users_processes(simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path) -> None:
    """Processes of the list hold memory, several on one GPU, and never more than the card has."""
    others = tmp_path / "processes"
    others.write_text("0 4242 1000\n0 4243 500\n2 77 20000\n")
    program = NVML + "print(json.dumps([used(handle) for handle in handles] + [n.nvmlSystemGetProcessName(4242000)]))"
    answer = json.loads(run_python(program, simulated_gpus("3x8GiB", processes=others)))
    assert answer == [
        [8192, 1500, [[4242, 1000], [4243, 500]]],
        [8192, 0, []],
        [8192, 8192, [[77, 20000]]],
        "process-4242000",
    ]


def test_shows_what_this_process_allocated(
    simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path
) -> None:
    """What a live process allocates through CUDA is seen in NVML, with its process id."""
    program = NVML + (
        "import ctypes\n"
        "cuda = ctypes.CDLL('libcuda.so.1'); assert cuda.cuInit(0) == 0\n"
        "context, pointer = ctypes.c_void_p(), ctypes.c_ulonglong()\n"
        "assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 1) == 0\n"
        "assert cuda.cuCtxSetCurrent(context) == 0\n"
        "assert cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(700 << 20)) == 0\n"
        "full = used(handles[1]); name = n.nvmlSystemGetProcessName(os.getpid())\n"
        "assert cuda.cuMemFree_v2(pointer) == 0\n"
        "print(json.dumps([full == [8192, 700, [(os.getpid(), 700)]], used(handles[1]), name.startswith('python')]))"
    )
    answer = json.loads(run_python(program, simulated_gpus("2x8GiB", log=tmp_path / "log")))
    assert answer == [True, [8192, 0, []], True]


@pytest.mark.parametrize(("name", "reason"), [("absent", "No such file or directory"), (".", "Is a directory")])
def test_a_list_of_processes_that_cannot_be_read_is_told(
    simulated_gpus: SimulatedGpus, tmp_path: Path, name: str, reason: str
) -> None:
    """A list that is not there, or is no file, is taken as empty, and one line on stderr says so."""
    others = tmp_path / name
    program = NVML + "print(json.dumps([used(handle) for handle in handles]))"
    env = simulated_gpus("2x8GiB", processes=others)
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [[8192, 0, []]] * 2
    assert result.stderr == f"tfgpu simulate: cannot read {others}: {reason}\n"


def test_utilisation(simulated_gpus: SimulatedGpus, run_python: RunPython) -> None:
    """Each GPU's utilisation is what the description says."""
    env = simulated_gpus()
    env["TFGPU_SIMULATE"] = "count=3,utilisation=97:30"
    program = NVML + "print(json.dumps([n.nvmlDeviceGetUtilizationRates(handle).gpu for handle in handles]))"
    assert json.loads(run_python(program, env)) == [97, 30, 30]
