"""Several frameworks in one process, by what the simulated driver was asked: one limit for all of them together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.frameworks.harness import MIB, Ended, World, run_program
from tfenv.simulate.driver_requests import summarise_requests

#: Two of four GPUs, growth, 1000 MiB for the process.
POLICY = '[gpu]\nvisible_devices = [1, 2]\nmemory_growth = true\nmemory_limit = "1000MiB"\n'
HALVES = '[gpu.frameworks]\n{first} = "600MiB"\n{second} = "400MiB"\n'

#: Each takes memory of its first GPU in pieces of 100 MiB until it is refused or has 1500 MiB, and says how many GPUs
#: it has.
TAKERS = """
import json, sys

PIECE, MOST = 100, 15
held = []


def take(make, refused):
    for _ in range(MOST):
        try:
            held.append(make())
        except refused:
            return


def take_tensorflow():
    import tensorflow as tf

    gpus = tf.config.list_logical_devices("GPU")
    if gpus:
        with tf.device(gpus[0].name):
            take(lambda: tf.zeros([PIECE, 1 << 18]), tf.errors.ResourceExhaustedError)
    return len(gpus)


def take_jax():
    import jax
    import numpy as np

    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    if gpus:
        piece = np.zeros((PIECE, 1 << 20), np.uint8)
        take(lambda: jax.device_put(piece, gpus[0]).block_until_ready(), RuntimeError)
    return len(gpus)


def take_torch():
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        take(lambda: torch.empty(PIECE << 20, dtype=torch.uint8, device="cuda:0"), torch.OutOfMemoryError)
    return count
"""
SAY = "\nprint(json.dumps([take_{first}(), take_{second}()]))\n"


def run(folder: Path, program: str, *, shares: str = "", **variables: str) -> tuple[Ended, list[int]]:
    """What became of a program, and what it printed. It exits with 0, and touched no GPU but those of the policy."""
    ended = run_program(World(POLICY + shares, alone=False), program, folder, **variables)
    assert ended.status == 0, ended.stderr
    assert set(summarise_requests(ended.requests)) <= {1, 2}
    return ended, json.loads(ended.stdout.splitlines()[-1])


def measure_peak(ended: Ended) -> float:
    """The most that the process held of GPU 1, in MiB."""
    totals = summarise_requests(ended.requests)
    return totals[1].peak_process / MIB if 1 in totals else 0


def list_codes(ended: Ended, framework: str) -> set[str]:
    """The codes of the findings in the records of a framework."""
    records = [record for record in ended.records if record.get("framework") == framework]
    return {finding["code"] for record in records for finding in record["findings"]}


PAIRS = [
    pytest.param("tensorflow", "jax", marks=pytest.mark.jax),
    pytest.param("jax", "tensorflow", marks=[pytest.mark.jax, pytest.mark.exhaustive]),
    pytest.param("torch", "tensorflow", marks=pytest.mark.torch),
    pytest.param("torch", "jax", marks=[pytest.mark.torch, pytest.mark.jax]),
    pytest.param("tensorflow", "torch", marks=[pytest.mark.torch, pytest.mark.exhaustive]),
    pytest.param("jax", "torch", marks=[pytest.mark.torch, pytest.mark.jax, pytest.mark.exhaustive]),
]


@pytest.fixture(autouse=True)
def need(request: pytest.FixtureRequest, needs_tensorflow: None) -> None:
    """Skip a test of a framework that is not there."""
    for framework in ("jax", "torch"):
        if request.node.get_closest_marker(framework):
            request.getfixturevalue(f"needs_{framework}")


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_first_has_the_limit_and_the_second_no_gpu(first: str, second: str, tmp_path: Path) -> None:
    """Together they take no more than the limit. The second sees no GPU, and the line and its record say why."""
    ended, counts = run(tmp_path, f"import {first}, {second}\n{TAKERS}{SAY.format(first=first, second=second)}")
    assert counts == [2, 0]
    assert 800 <= measure_peak(ended) <= 1000
    assert "budget-spent" in list_codes(ended, second)
    assert "budget-spent" not in list_codes(ended, first)
    assert [line for line in ended.ours if line.startswith("tfgpu: NO GPU for ") and "[budget-spent]" in line]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_declared_shares_hold_for_both(first: str, second: str, tmp_path: Path) -> None:
    """With `[gpu.frameworks]` both have both GPUs, and together they stay within the limit."""
    program = f"import {first}\n{TAKERS}{SAY.format(first=first, second=second)}"
    ended, counts = run(tmp_path, program, shares=HALVES.format(first=first, second=second))
    assert counts == [2, 2]
    assert 800 <= measure_peak(ended) <= 1000
    for framework, limit in ((first, 600), (second, 400)):
        given = [
            device["limit_bytes"]
            for record in ended.records
            if record.get("framework") == framework and record["event"] in ("policy_applied", "policy_clamped")
            for device in record["devices"]
        ]
        assert given
        assert max(given) <= limit * MIB


@pytest.mark.jax
@pytest.mark.parametrize("order", ["jax, tensorflow", pytest.param("tensorflow, jax", marks=pytest.mark.exhaustive)])
def test_the_order_of_imports_makes_no_difference_to_what_is_visible(order: str, tmp_path: Path) -> None:
    """Whichever is imported first, CUDA_VISIBLE_DEVICES is the same, and CUDA is opened with it."""
    program = f"import json, os, {order}\njax.devices()\nprint(json.dumps([os.environ['CUDA_VISIBLE_DEVICES']]))"
    ended, visible = run(tmp_path, program)
    assert visible == ["1,2"]  # type: ignore[comparison-overlap]
    assert {request.bytes for request in ended.requests if request.op == "cuInit"} == {2}


KERAS = """
import json
{first}
import keras
import numpy as np
import tensorflow as tf

model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), keras.layers.Dense(1)])
model.compile(loss="mse", optimizer="adam")
data = tf.data.Dataset.from_tensor_slices((np.ones((64, 8), "f4"), np.ones((64, 1), "f4"))).batch(16)
{before}
model.fit(data, verbose=0)
import jax
print(json.dumps([len(jax.devices("cuda")), len(tf.config.list_logical_devices("GPU"))]))
"""


@pytest.mark.jax
@pytest.mark.parametrize(
    "first",
    [pytest.param("import tensorflow", marks=pytest.mark.exhaustive), ""],
    ids=["tensorflow-first", "keras-first"],
)
def test_keras_on_jax_has_the_gpus_and_tensorflow_reads_data(first: str, tmp_path: Path) -> None:
    """TensorFlow opens its devices first, for `tf.data`, and leaves the GPUs to JAX all the same. Both lines say so."""
    program = KERAS.format(first=first, before="next(iter(data))")
    ended, counts = run(tmp_path, program, KERAS_BACKEND="jax")
    assert counts == [2, 0]
    assert 0 < measure_peak(ended) <= 1000
    assert "budget-spent" in list_codes(ended, "tensorflow")
    assert [line for line in ended.ours if line.startswith("tfgpu: JAX on GPU 1,2 of 4")]
    assert [line for line in ended.ours if line.startswith("tfgpu: NO GPU for TensorFlow: ")]


@pytest.mark.jax
def test_tensorflow_alone_keeps_its_gpus_where_jax_is_installed(tmp_path: Path) -> None:
    """TensorFlow imports JAX by itself. That gives JAX nothing, costs TensorFlow nothing, and adds no record."""
    ended, counts = run(tmp_path, f"{TAKERS}\nprint(json.dumps([take_tensorflow(), 'jax' in sys.modules]))")
    assert counts == [2, True]
    assert 800 <= measure_peak(ended) <= 1000
    assert {record["framework"] for record in ended.records} == {"tensorflow"}


@pytest.mark.jax
@pytest.mark.exhaustive
def test_without_a_limit_both_frameworks_have_the_gpus(tmp_path: Path) -> None:
    """Where nothing is limited there is nothing to share, and neither says anything of a budget."""
    policy = World("[gpu]\nvisible_devices = [1, 2]\nmemory_growth = true\n", alone=False)
    program = (
        "import json, jax, tensorflow as tf\n"
        'print(json.dumps([len(tf.config.list_logical_devices("GPU")), len(jax.devices("cuda"))]))'
    )
    ended = run_program(policy, program, tmp_path)
    assert ended.status == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == [2, 2]
    assert "budget-spent" not in {finding["code"] for record in ended.records for finding in record["findings"]}
