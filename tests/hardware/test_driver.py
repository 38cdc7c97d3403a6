"""A real driver: what it tells of a card, what opening one costs, and what it makes of CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_visible_devices import REAL_ANSWERS, fill_in
from tests.hardware.conftest import Figures, Tfgpu, to_mib
from tfenv.devices.usage import GpuState, GpuUsage
from tfenv.policy.model import DEFAULT_OVERHEAD
from tfenv.policy.units import MIB

pytestmark = pytest.mark.gpu

#: Opens the first GPU, prints what CUDA says of it, and waits until somebody has looked.
OPEN = """
import ctypes, json, sys
cuda = ctypes.CDLL("libcuda.so.1")
status = cuda.cuInit(0)
device, context, total = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_size_t()
free, all_of_it, value = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_int()
cuda.cuDeviceGet(ctypes.byref(device), 0)
cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
attributes = {}
for name, number in (("managed memory", 83), ("virtual memory", 102), ("memory pools", 115), ("cooperative", 95)):
    cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
    attributes[name] = value.value
cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
cuda.cuCtxSetCurrent(context)
cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(all_of_it))
print(json.dumps({"status": status, "total": total.value, "free": free.value, "attributes": attributes}), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def opened(environment: dict[str, str]) -> Any:
    """Yield a process that has opened the first GPU and allocated nothing, with what CUDA told it."""
    command = [sys.executable, "-S", "-c", OPEN]
    env = environment | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
        process.communicate()


def test_gpus_shows_what_cuda_can_give(tfgpu: Tfgpu, opened: Any, gpu: GpuState, figures: Figures) -> None:
    """The memory that `tfgpu gpus` shows is CUDA's, to a MiB: what the driver reserves is beside it."""
    _, cuda = opened
    found = next(row for row in tfgpu("gpus")["gpus"] if row["uuid"] == gpu.uuid)
    sizes = {"total": found["total_bytes"], "reserved": found["reserved_bytes"], "cuda": cuda["total"]}
    figures("card", {"MiB": to_mib(sizes), "attributes": cuda["attributes"]})
    assert cuda["status"] == 0
    if found["reserved_bytes"] is not None:  # NVML's first version does not tell it apart
        assert abs(found["total_bytes"] - cuda["total"]) <= MIB


def test_a_context_costs_less_than_leases_count(tfgpu: Tfgpu, opened: Any, gpu: GpuState, figures: Figures) -> None:
    """A process that has only opened a GPU takes less than the overhead that a lease counts by default."""
    process, _ = opened
    after = next(row for row in tfgpu("gpus")["gpus"] if row["uuid"] == gpu.uuid)
    listed = [row for row in tfgpu("ps")["processes"] if row["uuid"] == gpu.uuid]
    own = next((row["memory_bytes"] for row in listed if row["pid"] == process.pid), None)
    on_card = after["used_bytes"] - (gpu.used or 0)
    figures("context", {"MiB": to_mib({"process": own, "card": on_card}), "processes": len(listed)})
    assert listed, "NVML shows no process at all"
    assert 0 < (own or on_card) <= DEFAULT_OVERHEAD


def test_cuda_visible_devices_means_the_same(
    environment: dict[str, str], usage: GpuUsage, gpu: GpuState, figures: Figures
) -> None:
    """cuInit answers each value as in the table that the simulated driver is compared with."""
    if len(usage.gpus) != 1 or gpu.uuid is None:
        pytest.skip("the table is of a machine with one GPU")
    code = "import ctypes; print(ctypes.CDLL('libcuda.so.1').cuInit(0))"
    answers = {}
    for value in REAL_ANSWERS:
        env = environment | {"CUDA_VISIBLE_DEVICES": fill_in(value, gpu.uuid)}
        command = [sys.executable, "-S", "-c", code]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        answers[value] = int(done.stdout)
    figures("cuda-visible-devices", answers)
    assert answers == REAL_ANSWERS


def test_limits_by_cgroup(environment: dict[str, str], tmp_path: Path, figures: Figures) -> None:
    """Whether this driver keeps memory limits for cgroups is kept as a figure. Nothing depends on it."""
    code = (
        "import pynvml as n; n.nvmlInit(); h = n.nvmlDeviceGetHandleByIndex(0); g = n.c_nvmlGetMemoryLimits_v1_t();"
        "g.nameSpace = b'/sys/fs/cgroup'; n.nvmlDeviceGetMemoryLimits_v1(h, g); print(g.softLimit, g.hardLimit)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    figures("cgroup limits", (done.stdout or done.stderr).strip().rpartition("\n")[2])
