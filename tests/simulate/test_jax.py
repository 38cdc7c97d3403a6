"""Real JAX on simulated GPUs: what it asks the driver for."""

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
    pytest.mark.jax,
    pytest.mark.exhaustive,
    pytest.mark.skipif(find_spec("jax_plugins") is None, reason="JAX has no CUDA plugin here"),
]

MIB = 1 << 20
GPUS = 4
DEVICES = "assert len(jax.devices('cuda')) == 4\nnp = jax.numpy\n"
NO_PREALLOCATION = "os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'\n"
BLOCK = "import numpy; block = numpy.zeros((100, 1 << 20), 'uint8')\n"
CASES = {
    "list": "result = [device.device_kind for device in jax.devices()]",
    "default": DEVICES + "result = np.array([1., 2.]).tolist()",
    "growth": NO_PREALLOCATION + DEVICES + BLOCK + "jax.device_put(block, jax.devices()[2]).block_until_ready()",
    "fraction": "os.environ['XLA_CLIENT_MEM_FRACTION'] = '0.1'\n" + DEVICES + BLOCK + "kept = []\n"
    "try:\n    while True: kept.append(jax.device_put(block).block_until_ready())\n"
    "except Exception as error: result = [len(kept), str(error)]",
    "platform": "os.environ['XLA_PYTHON_CLIENT_ALLOCATOR'] = 'platform'\n" + DEVICES + BLOCK + "jax.device_put(block)",
    "async": "os.environ['XLA_PYTHON_CLIENT_ALLOCATOR'] = 'cuda_async'\n" + DEVICES + BLOCK + "jax.device_put(block)",
    "jit": NO_PREALLOCATION
    + DEVICES
    + "x = np.ones((64, 64)); jax.jit(lambda x: (x @ x).sum())(x).block_until_ready()\n"
    "jax.grad(lambda x: (x * x).sum())(x).block_until_ready(); jax.random.normal(jax.random.key(0), (64,))",
    **{
        f"visible {value}": f"os.environ['CUDA_VISIBLE_DEVICES'] = {value!r}\n"
        "result = [device.device_kind for device in jax.devices('cuda')]"
        for value in ("2,0", "1,9,2")
    },
    "visible ": "os.environ['CUDA_VISIBLE_DEVICES'] = ''\nresult = [device.platform for device in jax.devices()]",
}


@pytest.fixture(scope="module")
def cases(simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    gpus = ",".join(f"1x24GiB:GPU {letter}" for letter in "ABCD")
    result = run_cases(run_python, "jax", CASES, simulated_gpus(gpus), tmp_path_factory.mktemp("cases"))
    assert len(result.results.get("list") or ()) == GPUS, result.results.get("list")
    return result


def test_lists_all_gpus(cases: Cases) -> None:
    """JAX lists the GPUs as described. It asks for no memory yet."""
    assert cases.results["list"] == ["GPU A", "GPU B", "GPU C", "GPU D"]
    assert cases.summarise("list") == {}


def test_import_opens_no_cuda(cases: Cases) -> None:
    """`import jax` calls cuInit nowhere. Listing devices does."""
    assert cases.at_import == ()
    assert len(find_cuda_processes(cases.requests["list"])) == 1


def test_default_takes_three_quarters(cases: Cases) -> None:
    """Without a policy the first array takes 18432 of 24576 MiB of its GPU at once."""
    assert cases.results["default"] == [1.0, 2.0]
    assert {(request.gpu, request.bytes) for request in cases.list_allocations("default")} == {(0, 18432 * MIB)}


def test_requests_name_the_gpu_of_the_machine(cases: Cases) -> None:
    """Without preallocation 100 MiB on the third GPU are asked for there, and little more."""
    assert ("growth" in cases.results, cases.results.get("growth")) == (True, None)
    summary = cases.summarise("growth")
    assert set(summary) == {2}
    assert 100 * MIB <= summary[2].peak < 300 * MIB


def test_fraction_holds(cases: Cases) -> None:
    """A fraction of 0.1 is 2457 MiB. 24 blocks of 100 MiB fit in."""
    number, error = cases.results["fraction"]
    assert number in {23, 24}
    assert "RESOURCE_EXHAUSTED" in error
    assert cases.summarise("fraction")[0].peak <= 2458 * MIB


@pytest.mark.parametrize("name", ["platform", "async"])
def test_allocators(cases: Cases, name: str) -> None:
    """Each of JAX's allocators asks for the 100 MiB of a block."""
    assert (name in cases.results, cases.results.get(name)) == (True, None)
    assert cases.summarise(name)[0].peak >= 100 * MIB


def test_programs_run_to_the_end(cases: Cases) -> None:
    """Compiled functions, matrix products, gradients and random numbers run to the end."""
    assert ("jit" in cases.results, cases.results.get("jit")) == (True, None)
    assert set(cases.summarise("jit")) == {0}


def test_collectives_use_all_gpus(simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path) -> None:
    """Sums over all GPUs, by pmap and of a sharded array, ask for memory on each. Only GPUs of one kind can do that."""
    log = tmp_path / "log"
    program = """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec
    assert len(jax.devices("cuda")) == 4
    print(jax.pmap(lambda x: jax.lax.psum(x, "i"), axis_name="i")(jax.numpy.ones((4, 2))).shape)
    sharding = NamedSharding(jax.make_mesh((4,), ("x",)), PartitionSpec("x"))
    print(jax.jit(lambda x: x.sum())(jax.device_put(jax.numpy.ones((16, 8)), sharding)).shape)
    """
    env = simulated_gpus(log=log, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    assert run_python(program, env).splitlines() == ["(4, 2)", "()"]
    assert set(summarise_requests(read_requests(log))) == {0, 1, 2, 3}


@pytest.mark.parametrize(("value", "names"), [("2,0", ["GPU C", "GPU A"]), ("1,9,2", ["GPU B"]), ("", ["cpu"])])
def test_cuda_visible_devices_after_import(cases: Cases, value: str, names: list[str]) -> None:
    """CUDA_VISIBLE_DEVICES set after the import and before the first listing decides what is listed."""
    assert cases.results[f"visible {value}"] == names


def test_no_gpu(simulated_gpus: SimulatedGpus, run_python: RunPython) -> None:
    """On a machine without a GPU JAX does not try CUDA."""
    program = "import jax; print(jax.devices()[0].platform)"
    assert run_python(program, simulated_gpus("1x24GiB", TFGPU_SIMULATE="count=0")).strip() == "cpu"


def test_mig_instances(simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path) -> None:
    """JAX sees one MIG instance, and takes three quarters of its memory."""
    log = tmp_path / "log"
    env = simulated_gpus("1x80GiB/mig=1x40GiB+2x20GiB:NVIDIA A100", log=log)
    program = "import jax; assert len(jax.devices('cuda')) == 1; print(jax.numpy.ones(3).devices())"
    run_python(program, env)
    summary = summarise_requests(read_requests(log))
    assert summary[0].peak == 30720 * MIB
    assert {(request.gpu, request.instance) for request in read_requests(log) if request.op == "alloc"} == {(0, 0)}
