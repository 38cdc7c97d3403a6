"""Whole programs: Keras on PyTorch, and PyTorch with TensorFlow in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frameworks.harness import World, run_program
from tfenv.simulate.driver_requests import summarise_requests

pytestmark = [pytest.mark.exhaustive, pytest.mark.torch]

LIMIT = 1000 << 20
WORLD = World('[gpu]\nvisible_devices = [1, 3]\nmemory_growth = true\nmemory_limit = "1000MiB"\n', framework="torch")

KERAS = """
import os
os.environ["KERAS_BACKEND"] = "torch"
import keras
import numpy as np
import torch
assert torch.cuda.device_count() == 2
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), keras.layers.Dense(1)])
model.compile(loss="mse", optimizer="sgd")
model.fit(np.ones((64, 8), "f4"), np.ones((64, 1), "f4"), verbose=0, batch_size=16)
print(model.weights[0].value.device)
"""
TAKE = """
def take_torch():
    import torch
    if not torch.cuda.is_available():
        assert torch.cuda.device_count() == 0
        return 0
    kept = []
    try:
        for _ in range(30):
            kept.append(torch.empty(100 << 20, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        return len(kept)

def take_tensorflow():
    import tensorflow as tf
    if not tf.config.list_logical_devices("GPU"):
        return 0
    kept = []
    try:
        for _ in range(30):
            kept.append(tf.zeros([100, 1 << 18]))
    except tf.errors.ResourceExhaustedError:
        return len(kept)
"""


def test_keras_fits_on_pytorch_under_a_policy(tmp_path: Path, needs_torch: None) -> None:
    """`import keras` opens CUDA with this backend: by then only the policy's GPUs are visible."""
    ended = run_program(WORLD, KERAS, tmp_path)
    assert ended.status == 0, ended.stderr
    assert ended.stdout == "cuda:0\n"
    assert {request.bytes for request in ended.requests if request.op == "cuInit"} == {2}
    assert set(summarise_requests(ended.requests)) == {1}
    assert ended.ours[0].startswith("tfgpu: PyTorch on GPU 1,3 of 4")


@pytest.mark.parametrize(("first", "second"), [("torch", "tensorflow"), ("tensorflow", "torch")])
def test_two_frameworks_have_one_limit(
    first: str, second: str, tmp_path: Path, needs_torch: None, needs_tensorflow: None
) -> None:
    """The framework that comes first has the limit. The second gets no GPU, and a finding says why."""
    # PyTorch is imported first: TensorFlow's stub libraries have not all of the symbols that it wants.
    program = f"import torch\n{TAKE}\nprint(take_{first}() >= 7, take_{second}())"
    ended = run_program(WORLD, program, tmp_path)
    assert ended.status == 0, ended.stderr
    assert ended.stdout == "True 0\n"
    totals = summarise_requests(ended.requests)
    assert totals[1].peak_process <= LIMIT
    assert "budget-spent" in {finding["code"] for record in ended.records for finding in record["findings"]}
