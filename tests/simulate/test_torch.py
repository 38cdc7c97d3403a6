"""Real PyTorch on simulated GPUs: what it asks the driver for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.simulate.cases import Cases, run_cases
from tfenv.simulate.driver_requests import find_cuda_processes, read_requests, summarise_requests

if TYPE_CHECKING:
    from tests.conftest import SimulatedGpus
    from tests.simulate.conftest import RunPython

pytestmark = [
    pytest.mark.torch,
    pytest.mark.exhaustive,
    pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed"),
]

MIB = 1 << 20
GPUS = 4
DEVICES = "assert torch.cuda.device_count() == 4\n"
SETTINGS = "torch._C._accelerator_setAllocatorSettings"
TAKE = "torch.empty(300 << 20, dtype=torch.uint8, device='cuda')\n"
CASES = {
    "list": "result = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]",
    "properties": DEVICES + "p = torch.cuda.get_device_properties(3)\n"
    "result = [p.major, p.minor, p.multi_processor_count, p.total_memory >> 20, str(p.uuid)[:8], p.pci_bus_id]",
    "other_gpu": DEVICES + "x = torch.empty(300 << 20, dtype=torch.uint8, device='cuda:2')",
    "copies": DEVICES + "x = torch.tensor([1., 2.], device='cuda:0').to('cuda:1'); result = x.cpu().tolist()",
    "refused": DEVICES + "try:\n"
    "    torch.empty(30 << 30, dtype=torch.uint8, device='cuda')\n"
    "except torch.OutOfMemoryError as error: result = str(error)",
    "step": DEVICES
    + "model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)).cuda()\n"
    "optimizer = torch.optim.AdamW(model.parameters())\n"
    "model(torch.ones(16, 8, device='cuda')).pow(2).mean().backward(); optimizer.step(); torch.cuda.synchronize()",
    "products": DEVICES + "for kind in torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64:\n"
    "    x = torch.ones(64, 64, dtype=kind, device='cuda'); torch.nn.functional.linear(x @ x, x, x[0])",
    "sorts": DEVICES + "torch.sort(torch.rand(1000, device='cuda')); torch.randperm(1000, device='cuda')",
    "compiled": DEVICES + "torch.ones(8, device='cuda').prod()",
    "parallel": DEVICES
    + "torch.nn.DataParallel(torch.nn.Linear(8, 4).cuda())(torch.ones(16, 8, device='cuda')).sum().backward()",
    "graph": DEVICES + "graph, x = torch.cuda.CUDAGraph(), torch.ones(8, device='cuda')\n"
    "with torch.cuda.graph(graph): y = x * 2\n"
    "graph.replay(); torch.cuda.synchronize()",
    "pool": DEVICES + "pool = torch.cuda.MemPool()\nwith torch.cuda.use_mem_pool(pool): x = " + TAKE,
    "expandable": DEVICES + f"{SETTINGS}('expandable_segments:True')\nx = {TAKE}del x; torch.cuda.empty_cache()",
    "convolution": DEVICES + "try: torch.nn.Conv2d(3, 8, 3).cuda()(torch.ones(1, 3, 9, 9, device='cuda'))\n"
    "except RuntimeError as error: result = str(error)",
    "convolution without cuDNN": DEVICES + "torch.backends.cudnn.enabled = False\n"
    "result = list(torch.nn.Conv2d(3, 8, 3).cuda()(torch.ones(1, 3, 9, 9, device='cuda')).shape)",
    **{
        f"visible {value}": f"os.environ['CUDA_VISIBLE_DEVICES'] = {value!r}\n"
        "result = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]"
        for value in ("2,0", "", "1,9,2")
    },
}


@pytest.fixture(scope="module")
def cases(simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    gpus = ",".join(f"1x24GiB:GPU {letter}" for letter in "ABCD")
    result = run_cases(run_python, "torch", CASES, simulated_gpus(gpus), tmp_path_factory.mktemp("cases"))
    assert len(result.results.get("list") or ()) == GPUS, result.results.get("list")
    return result


def test_lists_all_gpus(cases: Cases) -> None:
    """PyTorch lists the GPUs as described."""
    assert cases.results["list"] == ["GPU A", "GPU B", "GPU C", "GPU D"]
    assert cases.results["properties"] == [8, 0, 108, 24576, "a3fa4e00", 4]


def test_import_opens_no_cuda(cases: Cases) -> None:
    """`import torch` calls cuInit nowhere. Listing devices does, and asks for no memory."""
    assert cases.at_import == ()
    assert len(find_cuda_processes(cases.requests["list"])) == 1
    assert cases.summarise("list") == {}


def test_requests_name_the_gpu_of_the_machine(cases: Cases) -> None:
    """A tensor of 300 MiB on the third GPU is one request for as much on that GPU."""
    assert cases.results["other_gpu"] is None
    allocations = [(request.gpu, request.bytes, request.call) for request in cases.list_allocations("other_gpu")]
    assert allocations == [(2, 300 * MIB, "cuMemAlloc")]


def test_copies_are_real(cases: Cases) -> None:
    """Numbers come back from the GPUs as they were, also by way of another GPU."""
    assert cases.results["copies"] == [1.0, 2.0]
    assert set(cases.summarise("copies")) == {0, 1}


def test_more_than_a_gpu_has_is_refused(cases: Cases) -> None:
    """A tensor of 30 GiB on a GPU of 24 GiB is PyTorch's OutOfMemoryError, with the GPU's size."""
    assert "GPU 0 has a total capacity of 24.00 GiB" in cases.results["refused"]
    assert cases.summarise("refused")[0].out_of_memory > 0


@pytest.mark.parametrize("name", ["step", "products", "sorts", "compiled", "graph"])
def test_programs_run_to_the_end(cases: Cases, name: str) -> None:
    """A step of an optimiser, matrix products, sorts, kernels compiled at run time and graphs run to the end."""
    assert (name in cases.results, cases.results.get(name)) == (True, None)
    assert set(cases.summarise(name)) == {0}


def test_data_parallel_uses_all_gpus(cases: Cases) -> None:
    """DataParallel asks for memory on each GPU. Its copies go through NCCL."""
    assert ("parallel" in cases.results, cases.results.get("parallel")) == (True, None)
    assert set(cases.summarise("parallel")) == {0, 1, 2, 3}


@pytest.mark.parametrize(("name", "call"), [("pool", "cuMemAlloc"), ("expandable", "cuMemCreate")])
def test_allocators(cases: Cases, name: str, call: str) -> None:
    """A memory pool of the program's and expandable segments ask for 300 MiB, too, each by its own call."""
    assert (name in cases.results, cases.results.get(name)) == (True, None)
    assert cases.summarise(name)[0].peak == 300 * MIB
    assert {request.call for request in cases.list_allocations(name)} == {call}


def test_convolutions_need_cudnn(cases: Cases) -> None:
    """A convolution by cuDNN is an error of PyTorch's. Without cuDNN it runs."""
    assert "cudnn" in cases.results["convolution"]
    assert cases.results["convolution without cuDNN"] == [1, 8, 7, 7]


@pytest.mark.parametrize(("value", "names"), [("2,0", ["GPU C", "GPU A"]), ("", []), ("1,9,2", ["GPU B"])])
def test_cuda_visible_devices_after_import(cases: Cases, value: str, names: list[str]) -> None:
    """CUDA_VISIBLE_DEVICES set after the import and before the first listing decides what is listed."""
    assert cases.results[f"visible {value}"] == names


def test_stream_ordered_allocator(simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path) -> None:
    """PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync takes memory of the driver's pool."""
    log = tmp_path / "log"
    env = simulated_gpus("2x24GiB", log=log, PYTORCH_CUDA_ALLOC_CONF="backend:cudaMallocAsync")
    run_python("import torch; assert torch.cuda.device_count() == 2; x = " + TAKE, env)
    requests = [(request.gpu, request.call) for request in read_requests(log) if request.op == "alloc"]
    assert (0, "cuMemAllocAsync") in requests


def test_two_processes_share_a_gpu(simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path) -> None:
    """What one process holds, another one cannot have."""
    log = tmp_path / "log"
    program = """
    import os, torch
    come, go = os.pipe(), os.pipe()
    if not os.fork():
        held = torch.empty(20 << 30, dtype=torch.uint8, device="cuda")
        os.write(come[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    os.read(come[0], 1)
    assert torch.cuda.device_count() == 1
    try:
        torch.empty(8 << 30, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        print(torch.cuda.mem_get_info()[0] >> 30)
    os.write(go[1], b"x")
    os.wait()
    print(torch.empty(8 << 30, dtype=torch.uint8, device="cuda").device)
    """
    assert run_python(program, simulated_gpus("1x24GiB", log=log)).split() == ["4", "cuda:0"]
    assert summarise_requests(read_requests(log))[0].peak == 20 << 30


def test_mig_instances(simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path) -> None:
    """PyTorch sees one MIG instance, and has its memory."""
    log = tmp_path / "log"
    env = simulated_gpus("1x80GiB/mig=1x40GiB+2x20GiB:NVIDIA A100", log=log)
    program = """
    import torch
    assert torch.cuda.device_count() == 1
    x = torch.empty(300 << 20, dtype=torch.uint8, device="cuda")
    print(torch.cuda.get_device_name(0), torch.cuda.mem_get_info()[1] >> 30, sep="|")
    """
    assert run_python(program, env).strip() == "NVIDIA A100 MIG 3g.40gb|40"
    assert {(request.gpu, request.instance) for request in read_requests(log) if request.op == "alloc"} == {(0, 0)}
