"""MIG instances in the simulated driver: as CUDA shows them, as NVML shows them, and to real TensorFlow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.simulate.test_driver import CUDA, MIB
from tests.simulate.test_nvml import NVML
from tfenv.policy.units import MIB as ONE_MIB
from tfenv.simulate.driver_requests import read_requests, summarise_requests
from tfenv.simulate.environment import MAX_INSTANCES, SimulatedGpu, parse_gpus

if TYPE_CHECKING:
    from tests.conftest import SimulatedGpus
    from tests.simulate.conftest import RunPython

GIB = 1024 * ONE_MIB
#: GPU 0 is split in two, GPU 1 is whole.
GPUS = "1x40GiB/mig=1x20GiB+1x10GiB:NVIDIA A100,1x24GiB:NVIDIA A10"
WHOLE = "GPU-a1fa4e00-0000-4000-8000-000000000001"
SPLIT = "GPU-a0fa4e00-0000-4000-8000-000000000000"
FIRST, SECOND = "MIG-a0104e00-0000-4000-8000-000000000100", "MIG-a0114e00-0000-4000-8000-000000000200"
SEEN = (
    CUDA
    + """
def seen():
    count, uuid, total, found = ctypes.c_int(), (ctypes.c_ubyte * 16)(), ctypes.c_size_t(), []
    if cuda.cuInit(0) == 0:
        cuda.cuDeviceGetCount(ctypes.byref(count))
    for device in range(count.value):
        assert cuda.cuDeviceGetUuid_v2(uuid, device) == 0 and cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device) == 0
        found.append([bytes(uuid).hex()[:4], total.value >> 30])
    return found
"""
)


# ---- describing


@pytest.mark.parametrize(
    ("text", "instances"),
    [
        ("40GiB/mig=2x20GiB", (20 * GIB, 20 * GIB)),
        ("1x40GiB/mig=20GiB+2x10GiB:NVIDIA A100", (20 * GIB, 10 * GIB, 10 * GIB)),
        ("40GiB:NVIDIA A100/PCIe", ()),
    ],
)
def test_reads_instances(text: str, instances: tuple[int, ...]) -> None:
    """The instances of a GPU follow its size, joined by "+". A name comes last and may hold what it likes."""
    assert parse_gpus(text)[0].instances == instances


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("40GiB/mig=", "does not describe MIG instances"),
        ("40GiB/mig=2x", "does not describe MIG instances"),
        ("40GiB/mig=20", '"20" is not the size of a MIG instance'),
        ("40GiB/mig=50%", "not the size of a MIG instance"),
        ("40GiB/mig=3x20GiB", "do not fit into a GPU of 40.0 GiB"),
        ("40GiB/mig=8x1GiB", "at most 7 MIG instances, not 8"),
        ("40GiB/mig=0x1GiB", "has no MIG instances"),
        ("40GiB/mug=1x1GiB", "does not describe GPUs"),
    ],
)
def test_says_what_would_be_right(text: str, message: str) -> None:
    """Instances that cannot be are refused in words that help."""
    with pytest.raises(ValueError, match=message):
        parse_gpus(text)


def test_c_sources_agree_on_the_limit() -> None:
    """MAX_INSTANCES here is MAX_INSTANCES of the C sources."""
    header = Path(__file__).parents[2] / "tfenv" / "simulate" / "machine.h"
    assert f"MAX_INSTANCES = {MAX_INSTANCES}," in header.read_text()
    assert SimulatedGpu(GIB).instances == ()


# ---- CUDA


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [["a010", 20]]),
        ("0", [["a010", 20]]),
        (SPLIT, [["a010", 20]]),
        (FIRST, [["a010", 20]]),
        (SECOND, [["a011", 10]]),
        ("MIG-a011", [["a011", 10]]),
        ("MIG-a0", []),
        (f"MIG-{SPLIT}/2/0", [["a011", 10]]),
        (f"MIG-{SPLIT}/3/0", []),
        (f"MIG-{SPLIT}/1/1", []),
        (f"{SECOND},{FIRST}", [["a011", 10]]),
        (f"1,{SECOND}", [["a1fa", 24]]),
        (f"GPU-a1,{SECOND}", [["a011", 10]]),
        ("1", [["a1fa", 24]]),
        (f"1,MIG-ff,{SECOND}", [["a1fa", 24]]),
    ],
)
def test_cuda_shows_one_instance(
    simulated_gpus: SimulatedGpus, run_python: RunPython, value: str | None, expected: list[list[object]]
) -> None:
    """A process sees one MIG instance, the first it names, and no whole GPU beside it. A split GPU is its first."""
    env = simulated_gpus(GPUS) if value is None else simulated_gpus(GPUS, CUDA_VISIBLE_DEVICES=value)
    assert json.loads(run_python(SEEN + "print(json.dumps(seen()))", env)) == expected


def test_instances_have_memory_of_their_own(
    simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path
) -> None:
    """What one instance holds is free on the other. The log names GPU and instance, and sums up the GPU."""
    log = tmp_path / "log"
    first, second = (simulated_gpus(GPUS, log=log, CUDA_VISIBLE_DEVICES=token) for token in (FIRST, SECOND))
    holder = CUDA + "visible(); select(0); allocate(9000); print('held', flush=True); input()"
    look = CUDA + "visible(); select(0); print(json.dumps([free_mib(), allocate(20000) == 2, allocate(19000) == 2]))"
    with subprocess.Popen(
        [sys.executable, "-c", holder], env=second, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert json.loads(run_python(look, first)) == [20 * 1024, False, True]
        process.kill()
    allocations = [(r.op, r.gpu, r.instance, r.held // MIB) for r in read_requests(log) if r.op != "cuInit"]
    assert allocations == [("alloc", 0, 1, 9000), ("alloc", 0, 0, 29000), ("oom", 0, 0, 29000)]
    assert summarise_requests(read_requests(log))[0].peak == 29000 * MIB


# ---- NVML


LOOK = (
    NVML
    + """
def refused(ask, *arguments):
    try: ask(*arguments)
    except n.NVMLError as error: return type(error).__name__
gpu, whole = handles
parts = [n.nvmlDeviceGetMigDeviceHandleByIndex(gpu, i) for i in range(2)]
print(json.dumps([
    [n.nvmlDeviceGetMigMode(gpu), n.nvmlDeviceGetMaxMigDeviceCount(gpu)],
    [[n.nvmlDeviceGetUUID(part), n.nvmlDeviceGetName(part), used(part)] for part in parts],
    used(gpu),
    [n.nvmlDeviceGetComputeRunningProcesses(whole)[0].usedGpuMemory, n.nvmlDeviceGetMemoryInfo(whole).used],
    n.nvmlDeviceGetUUID(n.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(parts[1])),
    n.nvmlDeviceGetUUID(n.nvmlDeviceGetHandleByUUID(n.nvmlDeviceGetUUID(parts[1]))),
    [n.nvmlDeviceGetGpuInstanceId(part) for part in parts],
    refused(n.nvmlDeviceGetMigMode, whole),
    refused(n.nvmlDeviceGetUtilizationRates, gpu),
    refused(n.nvmlDeviceGetMigDeviceHandleByIndex, gpu, 2),
    refused(n.nvmlDeviceGetHandleByIndex, 40),
]))
"""
)


def test_nvml_lists_instances_below_their_gpu(
    simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path
) -> None:
    """MIG is on for the split GPU alone. Its instances have UUIDs, memory and processes, the GPU all of theirs."""
    held = tmp_path / "held"
    held.write_text("0:1 4242 1000\n0:0 4243 500\n1 77 -1\n0:5 4244 100\n")
    assert json.loads(run_python(LOOK, simulated_gpus(GPUS, processes=held))) == [
        [[1, 1], 7],
        [
            [FIRST, "NVIDIA A100 MIG 3g.20gb", [20480, 500, [[4243, 500]]]],
            [SECOND, "NVIDIA A100 MIG 1g.10gb", [10240, 1000, [[4242, 1000]]]],
        ],
        [40960, 1500, [[4242, 1000], [4243, 500]]],
        [None, 0],
        SPLIT,
        SECOND,
        [1, 2],
        "NVMLError_NotSupported",
        "NVMLError_NotSupported",
        "NVMLError_NotFound",
        "NVMLError_InvalidArgument",
    ]


# ---- TensorFlow


POLICY = """
[gpu]
visible_devices = ["MIG-a011"]
memory_limit = "50%"
"""
TRAIN = """
import json, os
import tensorflow as tf
gpus = tf.config.list_physical_devices("GPU")
assert len(gpus) == 1, gpus
with tf.device("/GPU:0"):
    tf.zeros([300, 1024, 1024])
    try:
        tf.zeros([3000, 1024, 1024])
        result = "allocated"
    except tf.errors.ResourceExhaustedError:
        result = "ResourceExhaustedError"
import tfenv
print(json.dumps([os.environ["CUDA_VISIBLE_DEVICES"], result, tfenv.status().outcomes[-1].devices[0].uuid]))
"""


@pytest.mark.tensorflow
@pytest.mark.exhaustive
def test_tensorflow_keeps_a_share_of_an_instance(simulated_gpus: SimulatedGpus, tmp_path: Path) -> None:
    """A policy names an instance and a percentage: TensorFlow sees it alone and never asks for more than that share."""
    pytest.importorskip("tensorflow")
    (tmp_path / "tfgpu.toml").write_text(POLICY + '[audit]\nfile = "audit.jsonl"\n')
    env = simulated_gpus(GPUS, log=tmp_path / "log")
    command = [sys.executable, "-m", "tfenv", "run", "--", sys.executable, "-c", TRAIN]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [SECOND, "ResourceExhaustedError", SECOND]
    requests = [request for request in read_requests(tmp_path / "log") if request.op == "alloc"]
    assert {(request.gpu, request.instance) for request in requests} == {(0, 1)}
    assert summarise_requests(requests)[0].peak_process == 5 * GIB
