"""Whole programs with JAX under policies: several processes, machines, choices and frameworks."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.frameworks.harness import MIB, World, child_environment, project_folder, read_records, run_program
from tfenv.simulate.driver_requests import read_requests, summarise_requests

POLICY = '[gpu]\nvisible_devices = [1, 2]\nmemory_growth = true\nmemory_limit = "1000MiB"\n'

_PRINT = "import jax\nprint([device.local_hardware_id for device in jax.devices() if device.platform == 'gpu'])\n"

_WORKER = """
import sys, jax, numpy as np
rank, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, local_device_ids=[rank])
jax.device_put(np.zeros((100, 1 << 20), np.uint8), jax.local_devices()[0]).block_until_ready()
print(jax.device_count(), [device.local_hardware_id for device in jax.local_devices()])
"""


@pytest.mark.usefixtures("needs_jax")
@pytest.mark.parametrize("policy", [POLICY, f"{POLICY}".replace("[1, 2]", '{rank = "auto"}')], ids=["list", "rank"])
def test_two_processes_of_one_program_have_a_gpu_each(policy: str, tmp_path: Path) -> None:
    """jax.distributed with a GPU for each process works, whether the program or the policy tells them apart."""
    world = World(policy, framework="jax")
    folder = project_folder(world, tmp_path)
    (folder / "worker.py").write_text(_WORKER, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = child_environment(world)
    workers = [
        subprocess.Popen(
            [sys.executable, "worker.py", str(rank), port],
            env=environment | {"TFGPU_SIMULATE_LOG": str(folder / f"{rank}.driver"), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    used = [summarise_requests(read_requests(folder / f"{rank}.driver")) for rank in range(2)]
    assert [output.split()[0] for output in outputs] == ["2", "2"]
    assert [len(gpus) for gpus in used] == [1, 1]
    assert set(used[0]) != set(used[1])
    assert all(100 * MIB <= totals.peak_process <= 1000 * MIB for gpus in used for totals in gpus.values())
    assert {record["framework"] for record in read_records(folder / "audit.jsonl")} == {"jax"}


@pytest.mark.usefixtures("needs_jax")
def test_unlike_cards_get_one_fraction_and_a_warning(tmp_path: Path) -> None:
    """JAX has one fraction for all cards. The smallest keeps every limit, and the line says what each card gets."""
    world = World('[gpu]\nmemory_growth = true\nmemory_limit = "2GiB"\n', gpus="1x24GiB,1x80GiB", framework="jax")
    text = f"{_PRINT}print([device.memory_stats()['bytes_limit'] >> 20 for device in jax.devices()])\n"
    ended = run_program(world, text, tmp_path)
    assert ended.status == 0
    gpus, limits = map(json.loads, ended.stdout.splitlines())
    assert gpus == [0, 1]
    assert min(limits) < 700
    assert 2000 < max(limits) <= 2048
    assert "[unsupported]" in "".join(ended.ours)


@pytest.mark.usefixtures("needs_jax")
def test_a_percentage_limits_each_card_by_its_own_size(tmp_path: Path) -> None:
    """A percentage is what JAX counts in: unlike cards get unlike sizes, and nothing is to be said."""
    world = World('[gpu]\nmemory_limit = "10%"\n', gpus="1x24GiB,1x80GiB", framework="jax")
    text = f"{_PRINT}print([device.memory_stats()['bytes_limit'] >> 20 for device in jax.devices()])\n"
    ended = run_program(world, text, tmp_path)
    assert ended.status == 0
    limits = json.loads(ended.stdout.splitlines()[1])
    assert 2400 < min(limits) <= 2458
    assert 8100 < max(limits) <= 8192
    assert "unsupported" not in "".join(ended.ours)


@pytest.mark.usefixtures("needs_jax")
def test_a_free_gpu_is_chosen_when_jax_first_lists_them(tmp_path: Path) -> None:
    """With {count = 1} JAX sees the one GPU that was chosen, and CUDA was not opened before."""
    world = World("[gpu]\nvisible_devices = {count = 1}\n", framework="jax")
    ended = run_program(world, _PRINT, tmp_path)
    assert ended.status == 0, ended.stderr
    assert json.loads(ended.stdout) == [0]
    assert [request.bytes for request in ended.requests if request.op == "cuInit"] == [1]
    created = next(record for record in ended.records if record.get("entry_point") == "get_c_api_client")
    assert len(created["devices"]) == 1


@pytest.mark.usefixtures("needs_jax")
def test_a_policy_of_no_gpu_leaves_the_cpu_and_says_so(tmp_path: Path) -> None:
    """visible_devices = "none" means the CPU, as JAX falls back to it, and the line says NO GPU."""
    ended = run_program(World('[gpu]\nvisible_devices = "none"\n', framework="jax"), _PRINT, tmp_path)
    assert ended.status == 0
    assert json.loads(ended.stdout) == []
    assert any("NO GPU" in line for line in ended.ours)
    assert not ended.requests or {request.bytes for request in ended.requests if request.op == "cuInit"} == {0}


@pytest.mark.usefixtures("needs_jax")
def test_a_limit_without_growth_is_taken_at_once(tmp_path: Path) -> None:
    """Without growth JAX takes all that the limit allows with its first array."""
    text = f"{_PRINT}jax.numpy.ones(4).block_until_ready()\n"
    ended = run_program(World('[gpu]\nmemory_limit = "1000MiB"\n', framework="jax"), text, tmp_path)
    assert ended.status == 0
    assert json.loads(ended.stdout) == [0, 1, 2, 3]
    totals = summarise_requests(ended.requests)[0]
    assert 990 * MIB < totals.peak_process <= 1000 * MIB


@pytest.mark.usefixtures("needs_jax")
def test_a_policy_that_fails_refuses_jax_with_its_own_error(tmp_path: Path) -> None:
    """With on_error = "fail" the first listing raises PolicyError, and CUDA stays closed."""
    policy = 'on_error = "fail"\n[gpu]\nvisible_devices = {count = 1, min_free = "30GiB", when_busy = "fail"}\n'
    ended = run_program(World(policy, framework="jax"), _PRINT, tmp_path)
    assert ended.status == 1
    assert "PolicyError" in ended.stderr
    assert not ended.requests


@pytest.mark.usefixtures("needs_jax", "needs_tensorflow")
def test_jax_after_tensorflow_goes_on_with_the_cpu(tmp_path: Path) -> None:
    """TensorFlow that has all of the limit leaves none for JAX, which says why where CUDA is asked for."""
    text = (
        "import tensorflow as tf\n"
        "print(len(tf.config.list_logical_devices('GPU')), flush=True)\n"
        "import jax\n"
        "print([device.platform for device in jax.devices()], flush=True)\n"
        "jax.devices('cuda')\n"
    )
    ended = run_program(World(POLICY, framework="jax"), text, tmp_path)
    assert ended.stdout.splitlines() == ["2", "['cpu']"]
    assert ended.status == 1
    assert "the policy gives JAX no GPU in this process" in ended.stderr
    assert "budget-spent" in {finding["code"] for record in ended.records for finding in record["findings"]}


_OPENED = f"import ctypes\nctypes.CDLL('libcuda.so.1').cuInit(0)\n{_PRINT}jax.numpy.ones(4).block_until_ready()\n"


@pytest.mark.usefixtures("needs_jax")
def test_gpus_that_were_shown_too_early_are_not_used(tmp_path: Path) -> None:
    """Where something opened CUDA before the policy could hide GPUs, JAX is given those of the policy alone."""
    ended = run_program(World(POLICY, framework="jax"), _OPENED, tmp_path)
    assert ended.status == 0, ended.stderr
    assert {request.bytes for request in ended.requests if request.op == "cuInit"} == {4}
    assert json.loads(ended.stdout) == [1, 2]
    assert set(summarise_requests(ended.requests)) == {1}
    assert any("[too-late]" in line for line in ended.ours)


@pytest.mark.usefixtures("needs_jax")
def test_gpus_that_were_shown_too_early_refuse_jax_where_errors_do(tmp_path: Path) -> None:
    """With on_error = "fail" JAX has no CUDA then, and its own RuntimeError names the policy's reason."""
    ended = run_program(World(f'on_error = "fail"\n{POLICY}', framework="jax"), _OPENED, tmp_path)
    assert ended.status == 1
    assert "Unable to initialize backend 'cuda'" in ended.stderr
    assert "[too-late]" in ended.stderr
    assert {request.op for request in ended.requests} == {"cuInit"}


_TRAIN = """
import os
os.environ["KERAS_BACKEND"] = "jax"
import keras, numpy as np, tensorflow as tf
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
model.compile(loss="mse", optimizer="sgd")
data = np.ones((32, 8), np.float32), np.ones((32, 1), np.float32)
model.fit(tf.data.Dataset.from_tensor_slices(data).batch(16), verbose=0)
import jax
print(keras.backend.backend(), sorted({device.platform for device in jax.devices()}))
"""


@pytest.mark.exhaustive
@pytest.mark.usefixtures("needs_jax", "needs_tensorflow")
def test_keras_on_jax_trains_on_data_that_tensorflow_reads(tmp_path: Path) -> None:
    """Keras fits on JAX's GPUs as without a policy, while TensorFlow beside it reads the data on the CPU."""
    raw = World(None, armed=False, framework="jax", inherited=(("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),))
    (tmp_path / "raw").mkdir()
    without, ended = (
        run_program(raw, _TRAIN, tmp_path / "raw"),
        run_program(World(POLICY, framework="jax"), _TRAIN, tmp_path),
    )
    assert (without.status, without.stdout) == (ended.status, ended.stdout) == (0, "jax ['gpu']\n")
    used = summarise_requests(ended.requests)
    assert used
    assert set(used) <= {1, 2}
    assert all(totals.peak_process <= 1000 * MIB for totals in used.values())
    assert any("JAX on GPU 1,2" in line for line in ended.ours)
    assert any("NO GPU for TensorFlow" in line for line in ended.ours)
