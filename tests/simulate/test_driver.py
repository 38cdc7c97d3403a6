"""The stub driver by itself, through ctypes in child processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cuda_visible_devices import REAL_ANSWERS, fill_in
from tfenv.simulate.driver_requests import read_requests, summarise_requests

if TYPE_CHECKING:
    from tests.conftest import SimulatedGpus
    from tests.simulate.conftest import RunPython

MIB = 1 << 20
UUIDS = [f"GPU-a{gpu}fa4e00-0000-4000-8000-00000000000{gpu}" for gpu in range(4)]
#: A small client of the CUDA driver.
CUDA = """
import ctypes, json, os, sys
cuda = ctypes.CDLL("libcuda.so.1")
MIB = 1 << 20
def select(device):
    context = ctypes.c_void_p()
    assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    assert cuda.cuCtxSetCurrent(context) == 0
def allocate(mib):
    pointer = ctypes.c_ulonglong()
    result = cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(mib * MIB))
    return result or pointer
def free_mib():
    available, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert cuda.cuMemGetInfo_v2(ctypes.byref(available), ctypes.byref(total)) == 0
    return available.value // MIB
def visible():
    result = cuda.cuInit(0)
    count, uuid, gpus = ctypes.c_int(), (ctypes.c_ubyte * 16)(), []
    if result == 0:
        cuda.cuDeviceGetCount(ctypes.byref(count))
    for device in range(count.value):
        assert cuda.cuDeviceGetUuid_v2(uuid, device) == 0
        gpus.append(uuid[15])
    return gpus
"""
NO_DEVICE, NOT_INITIALIZED, OUT_OF_MEMORY = 100, 3, 2


@pytest.mark.parametrize(
    ("value", "gpus"),
    [
        (None, [0, 1, 2, 3]),
        ("0", [0]),
        ("2,0", [2, 0]),
        ("0, 2", [0, 2]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("9", []),
        ("1,-1,2", [1]),
        ("0,9,1", [0]),
        ("0,x", [0]),
        ("0,,1", [0]),
        ("0,0", []),
        ("1,GPU-a1", [1]),
        ("GPU-a2", [2]),
        ("GPU-A1", [1]),
        ("GPU-a3fa4e00,1", [3]),
        ("1x,3 ,+2", [1, 3, 2]),
        (f"{UUIDS[1]},{UUIDS[0]}", [1, 0]),
        ("GPU-", []),
        ("GPU-ff", []),
        ("MIG-a0", []),
    ],
)
def test_cuda_visible_devices(
    simulated_gpus: SimulatedGpus, run_python: RunPython, value: str | None, gpus: list[int]
) -> None:
    """Numbers, or beginnings of UUIDs, choose. The first bad entry ends the list. A GPU named twice gives none."""
    env = simulated_gpus() if value is None else simulated_gpus(CUDA_VISIBLE_DEVICES=value)
    assert json.loads(run_python(CUDA + "print(json.dumps(visible()))", env)) == gpus


def test_cuda_visible_devices_as_a_real_driver_reads_it(simulated_gpus: SimulatedGpus, run_python: RunPython) -> None:
    """cuInit answers to each value what a real driver answered on a machine with one GPU."""
    program = (
        "import ctypes, json, os, sys\n"
        "def ask(value):\n"
        "    reader, writer = os.pipe()\n"
        "    if not os.fork():\n"
        "        os.environ['CUDA_VISIBLE_DEVICES'] = value\n"
        "        cuda = ctypes.CDLL('libcuda.so.1')\n"
        "        os.write(writer, str(cuda.cuInit(0)).encode()); os._exit(0)\n"
        "    os.wait(); return int(os.read(reader, 9))\n"
        "print(json.dumps([ask(value) for value in sys.argv[1:]]))"
    )
    values = [fill_in(value, UUIDS[0]) for value in REAL_ANSWERS]
    answers = json.loads(run_python(program, simulated_gpus("1x80GiB"), *values))
    assert dict(zip(REAL_ANSWERS, answers, strict=True)) == REAL_ANSWERS


@pytest.mark.parametrize(
    ("variables", "gpus"),
    [
        ({}, [2, 0, 1]),
        ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, [2, 0, 1]),
        ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, [0, 1, 2]),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, [0, 2]),
        ({"CUDA_VISIBLE_DEVICES": "1,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, [1, 0]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a1,GPU-a2"}, [1, 2]),
    ],
)
def test_the_fastest_gpu_is_cudas_first(
    simulated_gpus: SimulatedGpus, run_python: RunPython, variables: dict[str, str], gpus: list[int]
) -> None:
    """CUDA's numbers are NVML's only under CUDA_DEVICE_ORDER=PCI_BUS_ID. The card with the most memory is fastest."""
    env = simulated_gpus("2x24GiB:NVIDIA T4,1x80GiB:NVIDIA H200") | variables
    assert json.loads(run_python(CUDA + "print(json.dumps(visible()))", env)) == gpus


def test_a_newer_generation_is_faster(simulated_gpus: SimulatedGpus, run_python: RunPython) -> None:
    """Then more multiprocessors are, whatever the memory."""
    env = simulated_gpus()
    env["TFGPU_SIMULATE"] = "count=4,memory_mib=80:40:20:10,capability=7.5:8.0:8.6:8.6,multiprocessors=9:9:9:10"
    assert json.loads(run_python(CUDA + "print(json.dumps(visible()))", env)) == [3, 2, 1, 0]


def test_visible_devices_are_read_at_the_first_init(simulated_gpus: SimulatedGpus, run_python: RunPython) -> None:
    """CUDA_VISIBLE_DEVICES counts as it is when CUDA is opened, and changes nothing afterwards."""
    program = CUDA + (
        "os.environ['CUDA_VISIBLE_DEVICES'] = '3,1'; first = visible()\n"
        "os.environ['CUDA_VISIBLE_DEVICES'] = '0'; print(json.dumps([first, visible()]))"
    )
    assert json.loads(run_python(program, simulated_gpus())) == [[3, 1], [3, 1]]


def test_requests_are_written_down(simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path) -> None:
    """cuInit, allocation, refusal and free each leave a line, with the GPU's number in the machine."""
    program = CUDA + (
        "visible(); select(0); block = allocate(100); assert allocate(1000) == 2\n"
        "assert cuda.cuMemFree_v2(block) == 0; print(os.getpid())"
    )
    log = tmp_path / "log"
    pid = int(run_python(program, simulated_gpus("2x1000MiB", log=log, CUDA_VISIBLE_DEVICES="1")))
    found = [(r.pid, r.op, r.gpu, r.bytes, r.held, r.call) for r in read_requests(log)]
    assert found == [
        (pid, "cuInit", -1, 1, 0, "cuInit"),
        (pid, "alloc", 1, 100 * MIB, 100 * MIB, "cuMemAlloc"),
        (pid, "oom", 1, 1000 * MIB, 100 * MIB, "cuMemAlloc"),
        (pid, "free", 1, 100 * MIB, 0, "cuMemFree"),
    ]


def test_memory_is_shared_among_processes(simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path) -> None:
    """What a live process holds is not free for others. It is free again when that process has ended."""
    env = simulated_gpus("1x1000MiB", log=tmp_path / "log")
    holder = CUDA + "visible(); select(0); allocate(600); print('held', flush=True); input()"
    look = CUDA + "visible(); select(0); print(json.dumps([free_mib(), allocate(500) == 2]))"
    with subprocess.Popen(
        [sys.executable, "-c", holder], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert json.loads(run_python(look, env)) == [400, True]
        process.kill()
        process.stdout.read()  # it has ended; nobody has waited for it yet
        assert json.loads(run_python(look, env)) == [1000, False]


def test_other_users_processes_hold_memory(
    simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path
) -> None:
    """Memory in the list of processes is not free. The list may change while the program runs."""
    others = tmp_path / "processes"
    others.write_text("0 4242 900\n1 4243 100\n")
    env = simulated_gpus("2x1000MiB", processes=others, others=str(others))
    program = CUDA + (
        "visible(); select(0); before = free_mib(); select(1); second = free_mib()\n"
        "open(os.environ['others'], 'w').close(); print(json.dumps([before, second, free_mib()]))"
    )
    assert json.loads(run_python(program, env)) == [100, 900, 1000]


#: As an NVIDIA H100 80GB HBM3 was measured, see docs/hardware.md.
H100 = "memory_mib=81559,reserved_mib=480,context_mib=518,"
LOOK = """
import pynvml as n
n.nvmlInit(); h = n.nvmlDeviceGetHandleByIndex(0)
def look():
    first, second = n.nvmlDeviceGetMemoryInfo(h), n.nvmlDeviceGetMemoryInfo(h, version=n.nvmlMemory_v2)
    mine = [p.usedGpuMemory >> 20 for p in n.nvmlDeviceGetComputeRunningProcesses(h) if p.pid == os.getpid()]
    return [[m.total, m.free >> 20, m.used >> 20] for m in (first, second)], second.reserved >> 20, mine
"""


def test_what_the_driver_reserves_is_nobodys(
    simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path
) -> None:
    """CUDA's total is NVML's without the reserved part, which only NVML's first version counts as used."""
    pytest.importorskip("pynvml")
    env = simulated_gpus("1x80GiB", log=tmp_path / "log")
    env["TFGPU_SIMULATE"] = H100 + env["TFGPU_SIMULATE"]
    program = (
        CUDA
        + LOOK
        + (
            "before = look(); visible(); size = ctypes.c_size_t(); cuda.cuDeviceTotalMem_v2(ctypes.byref(size), 0)\n"
            "select(0); free, total = ctypes.c_size_t(), ctypes.c_size_t()\n"
            "cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))\n"
            "print(json.dumps([before, look(), size.value, total.value, free.value >> 20]))"
        )
    )
    nothing: object = [[[85520809984, 81079, 480], [85520809984, 81079, 0]], 480, []]
    context = [[[85520809984, 80561, 998], [85520809984, 80561, 518]], 480, [518]]
    answer = json.loads(run_python(program, env))
    assert answer == [nothing, context, 85017493504, 85017493504, 80561]


def test_a_context_costs_memory(simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path) -> None:
    """Each process pays once for the GPU it opens, until it closes it. What is left decides what others get."""
    env = simulated_gpus("1x1000MiB", log=tmp_path / "log")
    env["TFGPU_SIMULATE"] = "reserved_mib=100,context_mib=50," + env["TFGPU_SIMULATE"]
    half = CUDA + (
        "visible(); select(0); got = allocate(450); print(int(got == 2), flush=True); sys.stdin.read()\n"
        "if got != 2: cuda.cuMemFree_v2(got)\n"
        "cuda.cuDevicePrimaryCtxRelease_v2(0)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", half], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "0\n"
        assert run_python(half, env) == "1\n"  # 450 of 900 MiB twice, and no room for two contexts beside them
    found = [(r.op, r.gpu, r.bytes // MIB, r.held // MIB) for r in read_requests(tmp_path / "log") if r.op != "cuInit"]
    assert found == [
        ("context", 0, 50, 50),
        ("alloc", 0, 450, 500),
        ("context", 0, 50, 550),
        ("oom", 0, 450, 550),
        ("closed", 0, 50, 500),
        ("free", 0, 450, 50),
        ("closed", 0, 50, 0),
    ]
    (totals,) = summarise_requests(read_requests(tmp_path / "log")).values()
    assert (totals.peak, totals.peak_process, totals.first) == (550 * MIB, 450 * MIB, 450 * MIB)


def test_no_room_for_a_context(simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path) -> None:
    """A GPU that is full cannot be opened at all."""
    held = tmp_path / "processes"
    held.write_text("0 4711 980\n")
    env = simulated_gpus("1x1000MiB", processes=held)
    env["TFGPU_SIMULATE"] = "context_mib=50," + env["TFGPU_SIMULATE"]
    program = CUDA + "visible(); print(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0))"
    assert int(run_python(program, env)) == OUT_OF_MEMORY


def test_virtual_memory(simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path) -> None:
    """Physical memory counts from its creation until it was released and is mapped nowhere."""
    program = CUDA + (
        "cuda.cuMemAddressReserve.argtypes = [ctypes.c_void_p] + [ctypes.c_size_t] * 4\n"
        "cuda.cuMemMap.argtypes = [ctypes.c_ulonglong] + [ctypes.c_size_t] * 2 + [ctypes.c_void_p, ctypes.c_size_t]\n"
        "visible(); select(0); on_gpu = (ctypes.c_int * 8)(1, 0, 1, 0)\n"
        "def create(mib):\n"
        "    piece = ctypes.c_void_p()\n"
        "    size = ctypes.c_size_t(mib * MIB)\n"
        "    result = cuda.cuMemCreate(ctypes.byref(piece), size, on_gpu, ctypes.c_ulonglong(0))\n"
        "    return result or piece\n"
        "values = []\n"
        "for attribute in (102, 18, 83, 95, 115):\n"
        "    value = ctypes.c_int(); cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)\n"
        "    values.append(value.value)\n"
        "piece, left = create(600), []\n"
        "left.append(free_mib()); assert create(600) == 2 and create(1) == 1\n"
        "start = ctypes.c_ulonglong()\n"
        "assert cuda.cuMemAddressReserve(ctypes.byref(start), 600 * MIB, 0, 0, 0) == 0\n"
        "assert cuda.cuMemMap(start, 600 * MIB, 0, piece, 0) == 0\n"
        "assert cuda.cuMemsetD8_v2(start, 7, ctypes.c_size_t(MIB)) == 0\n"
        "assert cuda.cuMemFree_v2(start) == 1\n"
        "assert cuda.cuMemRelease(piece) == 0; left.append(free_mib())\n"
        "assert cuda.cuMemUnmap(start, ctypes.c_size_t(600 * MIB)) == 0; left.append(free_mib())\n"
        "print(json.dumps([values, left]))"
    )
    log = tmp_path / "log"
    assert json.loads(run_python(program, simulated_gpus("1x1000MiB", log=log))) == [[1, 0, 1, 1, 1], [400, 400, 1000]]
    assert [(r.op, r.bytes // MIB, r.call) for r in read_requests(log)[1:]] == [
        ("alloc", 600, "cuMemCreate"),
        ("oom", 600, "cuMemCreate"),
        ("free", 600, "cuMemRelease"),
    ]


def test_cuda_does_not_survive_fork(simulated_gpus: SimulatedGpus, run_python: RunPython) -> None:
    """A child forked before cuInit can open CUDA. One forked after it gets CUDA_ERROR_NOT_INITIALIZED."""
    program = CUDA + (
        "def in_child():\n"
        "    pid = os.fork()\n"
        "    if not pid: os._exit(cuda.cuInit(0))\n"
        "    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
        "print(json.dumps([in_child(), cuda.cuInit(0), in_child()]))"
    )
    assert json.loads(run_python(program, simulated_gpus())) == [0, 0, NOT_INITIALIZED]


def test_no_gpu_at_all(run_python: RunPython, simulated_gpus: SimulatedGpus) -> None:
    """A machine can have a driver and no GPU."""
    env = simulated_gpus()
    env["TFGPU_SIMULATE"] = "count=0"
    assert int(run_python(CUDA + "print(cuda.cuInit(0))", env)) == NO_DEVICE


def test_unwritable_log_is_said_once(simulated_gpus: SimulatedGpus, tmp_path: Path) -> None:
    """A log that cannot be written is said on stderr, and the program goes on."""
    env = simulated_gpus(log=tmp_path / "absent" / "log")
    program = CUDA + "visible(); select(0); allocate(1); allocate(1); print('done')"
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert result.stdout == "done\n"
    assert result.stderr.count("tfgpu simulate: cannot write") == 1
