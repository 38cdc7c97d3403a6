"""Real TensorFlow on simulated GPUs: what it asks the driver for."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.simulate.cases import Cases, run_cases
from tfenv.simulate.driver_requests import find_cuda_processes, read_requests, summarise_requests

if TYPE_CHECKING:
    from tests.conftest import SimulatedGpus
    from tests.simulate.conftest import RunPython

pytest.importorskip("tensorflow")
pytestmark = [pytest.mark.tensorflow, pytest.mark.matrix, pytest.mark.exhaustive]

MIB = 1 << 20
GPUS = 4
DEVICES = "gpus = tf.config.list_physical_devices('GPU'); assert len(gpus) == 4, gpus\n"
USE_GPU_0 = "with tf.device('/GPU:0'): assert list(tf.constant([1., 2.]).numpy()) == [1, 2]\n"
CASES = {
    "list": "result = [tf.config.experimental.get_device_details(g)['device_name'] for g in"
    " tf.config.list_physical_devices('GPU')]",
    "default": DEVICES + USE_GPU_0,
    "growth": DEVICES
    + "[tf.config.experimental.set_memory_growth(g, True) for g in gpus]\n"
    + USE_GPU_0
    + "with tf.device('/GPU:0'): tf.zeros([300, 1024, 1024])",
    "limit": DEVICES + "tf.config.set_logical_device_configuration("
    "gpus[0], [tf.config.LogicalDeviceConfiguration(memory_limit=1000)])\n" + USE_GPU_0 + "try:\n"
    "    with tf.device('/GPU:0'): tf.zeros([300, 1024, 1024])\n"
    "except tf.errors.ResourceExhaustedError: result = 'ResourceExhaustedError'",
    "other_gpu": DEVICES + "tf.config.set_visible_devices(gpus[2], 'GPU')\n" + USE_GPU_0,
    "fraction": DEVICES + "config = tf.compat.v1.ConfigProto()\n"
    "config.gpu_options.per_process_gpu_memory_fraction = 1.5\n"
    "with tf.Graph().as_default(), tf.compat.v1.Session(config=config) as session:\n"
    "    with tf.device('/GPU:0'): x = tf.compat.v1.placeholder(tf.float32); y = tf.identity(x)\n"
    "    result = session.run(y, {x: [1., 2.]}).tolist()",
    "async": "os.environ['TF_GPU_ALLOCATOR'] = 'cuda_malloc_async'\n" + DEVICES + USE_GPU_0,
    "list_local_devices": "from tensorflow.python.client import device_lib\n"
    "result = [d.memory_limit >> 20 for d in device_lib.list_local_devices() if d.device_type == 'GPU']",
    "server": DEVICES + "server = tf.distribute.Server.create_local_server(); result = server.target[:7]",
    "fit": DEVICES + "model = tf.keras.Sequential([tf.keras.Input((4,)), tf.keras.layers.Dense(2)])\n"
    "model.compile('adam', 'mse'); model.fit(tf.ones((8, 4)), tf.ones((8, 2)), verbose=0); result = 'fitted'",
    "mirrored": DEVICES
    + "[tf.config.experimental.set_memory_growth(g, True) for g in gpus]\n"
    + "strategy = tf.distribute.MirroredStrategy()\n"
    "with strategy.scope(): tf.Variable([1., 2.])\n"
    "result = strategy.num_replicas_in_sync",
    **{
        f"visible {value}": f"os.environ['CUDA_VISIBLE_DEVICES'] = {value!r}\n"
        "result = [tf.config.experimental.get_device_details(g)['device_name'] for g in"
        " tf.config.list_physical_devices('GPU')]"
        for value in ("2,0", "GPU-a3fa4e00,GPU-a1", "GPU-a3fa4e00,1", "", "-1", "0,0", "1,9,2")
    },
}


@pytest.fixture(scope="module")
def cases(simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    gpus = ",".join(f"1x24GiB:GPU {letter}" for letter in "ABCD")
    result = run_cases(run_python, "tensorflow as tf", CASES, simulated_gpus(gpus), tmp_path_factory.mktemp("cases"))
    assert len(result.results.get("list") or ()) == GPUS, result.results.get("list")
    return result


def test_lists_all_gpus(cases: Cases) -> None:
    """TensorFlow lists the GPUs as described."""
    assert cases.results["list"] == ["GPU A", "GPU B", "GPU C", "GPU D"]


def test_import_opens_no_cuda(cases: Cases) -> None:
    """`import tensorflow` calls cuInit nowhere. Listing devices does, and asks for no memory."""
    assert cases.at_import == ()
    assert len(find_cuda_processes(cases.requests["list"])) == 1
    assert cases.summarise("list") == {}


def test_default_takes_nearly_all(cases: Cases) -> None:
    """Without a policy the first operation takes 23040 of 24576 MiB of its GPU at once."""
    assert cases.results["default"] is None
    assert [(request.gpu, request.bytes) for request in cases.list_allocations("default")] == [(0, 23040 * MIB)]


def test_growth_starts_small(cases: Cases) -> None:
    """With growth the first request is for 2 MiB, and a tensor of 1200 MiB asks for more."""
    assert cases.results["growth"] is None
    summary = cases.summarise("growth")
    assert set(summary) == {0}
    assert summary[0].first == 2 * MIB
    assert 1200 * MIB < summary[0].peak < 4096 * MIB


def test_limit_holds(cases: Cases) -> None:
    """With a limit of 1000 MiB never more is asked for, and a tensor beyond it is a ResourceExhaustedError."""
    assert cases.results["limit"] == "ResourceExhaustedError"
    assert cases.summarise("limit")[0].peak == 1000 * MIB
    assert set(cases.summarise("limit")) == {0}


def test_requests_name_the_gpu_of_the_machine(cases: Cases) -> None:
    """A program that sees only the third GPU allocates there."""
    assert cases.results["other_gpu"] is None
    assert set(cases.summarise("other_gpu")) == {2}


def test_fraction_above_one_is_managed_memory(cases: Cases) -> None:
    """A v1 Session with fraction 1.5 gets 36864 MiB of managed memory, more than the card has."""
    assert cases.results["fraction"] == [1.0, 2.0]
    (request,) = [request for request in cases.list_allocations("fraction") if request.gpu == 0]
    assert (request.bytes, request.call) == (36864 * MIB, "cuMemAllocManaged")


def test_memory_pools(cases: Cases) -> None:
    """TF_GPU_ALLOCATOR=cuda_malloc_async asks a pool, whose calls are simulated too."""
    assert cases.results["async"] is None
    assert {request.call for request in cases.list_allocations("async")} == {"cuMemAllocFromPoolAsync"}


def test_other_ways_in(cases: Cases) -> None:
    """`list_local_devices` and a distribute server make their devices on all GPUs."""
    assert cases.results["list_local_devices"] == [23040] * GPUS
    assert cases.results["server"] == "grpc://"


def test_keras_trains(cases: Cases) -> None:
    """A Keras model compiles and fits to the end, whatever numbers come out."""
    assert cases.results["fit"] == "fitted"
    assert 0 in cases.summarise("fit")


def test_mirrored_strategy_uses_all_gpus(cases: Cases) -> None:
    """MirroredStrategy places a replica, and asks for memory, on each GPU."""
    assert cases.results["mirrored"] == GPUS
    assert set(cases.summarise("mirrored")) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("2,0", ["GPU C", "GPU A"]),
        ("GPU-a3fa4e00,GPU-a1", ["GPU D", "GPU B"]),
        ("GPU-a3fa4e00,1", ["GPU D"]),
        ("", []),
        ("-1", []),
        ("0,0", []),
        ("1,9,2", ["GPU B"]),
    ],
)
def test_cuda_visible_devices_after_import(cases: Cases, value: str, names: list[str]) -> None:
    """CUDA_VISIBLE_DEVICES set after the import and before the first listing decides what is listed."""
    assert cases.results[f"visible {value}"] == names


def test_two_processes_share_a_gpu(simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path) -> None:
    """A GPU that another user's process fills is seen, and too full for TensorFlow to allocate on."""
    others = tmp_path / "processes"
    others.write_text("0 4242 24000\n")
    program = """
    import tensorflow as tf
    assert len(tf.config.list_physical_devices("GPU")) == 2
    with tf.device("/GPU:1"): tf.constant([1.0])
    """
    log = tmp_path / "log"
    run_python(textwrap.dedent(program), simulated_gpus("2x24GiB", log=log, processes=others))
    summary = summarise_requests(read_requests(log))
    assert summary[1].peak == 23040 * MIB
    assert all(request.bytes < 600 * MIB for request in read_requests(log) if request.gpu == 0)
