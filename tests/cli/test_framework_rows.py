"""The rows of `tfgpu doctor` on frameworks and on Keras, from what the frameworks answered."""

from __future__ import annotations

from typing import Any

import pytest

from tfenv.cli.diagnosis.framework_rows import diagnose_framework, diagnose_keras
from tfenv.devices.usage import DriverInfo, GpuUsage
from tfenv.explanation import Explanation
from tfenv.policy.model import Device, Inventory, Plan, PlannedDevice

GPU = {"device": "cuda:0", "name": "NVIDIA A10", "capability": "8.6"}
JAX = {
    "version": "0.10.2",
    "cuda": True,
    "cuda_version": "12",
    "gpus": [GPU],
    "problem": "",
    "install": "pip install 'jax[cuda12]'",
}
A10 = Device(0, "GPU-8932f937", "NVIDIA A10", 24 << 30)
USAGE = GpuUsage(driver=DriverInfo("570.86.10", (12, 8)))


def explain_plan(plan: Plan | None = None) -> Explanation:
    """Return what holds on a machine with one GPU."""
    plan = plan or Plan(devices=(PlannedDevice("0", A10),))
    return Explanation("alice", (), None, inventory=Inventory(devices=(A10,)), plan=plan)


@pytest.mark.parametrize(
    ("changes", "only_build", "verdict", "found"),
    [
        ({}, True, "ok", "0.10.2 lists 1 GPU, built for CUDA 12: cuda:0 NVIDIA A10 (compute capability 8.6)"),
        ({"gpus": [], "problem": "no plugin"}, True, "problem", "built for CUDA 12; 1 should be visible; no plugin"),
        ({"gpus": [GPU, GPU]}, True, "problem", "lists 2 GPUs, built for CUDA 12; the policy allows 1"),
        ({"gpus": [], "cuda": False, "cuda_version": None}, True, "problem", "lists 0 GPUs; it is not built for CUDA"),
        ({"gpus": [], "cuda": False, "cuda_version": None}, False, "note", "lists 0 GPUs; it is not built for CUDA"),
    ],
)
def test_what_a_framework_lists(changes: dict[str, Any], *, only_build: bool, verdict: str, found: str) -> None:
    """Its GPUs are compared with those of the policy. A build without CUDA is a problem if there is no other one."""
    (row,) = diagnose_framework("jax", JAX | changes, explain_plan(), USAGE, only_build=only_build)
    assert (row.topic, row.verdict) == ("JAX", verdict)
    assert row.found.endswith(found)


def test_a_driver_that_is_too_old_for_one_framework() -> None:
    """The framework that needs a newer driver is named with the CUDA it is built for."""
    rows = diagnose_framework("torch", JAX | {"cuda_version": "13.0"}, explain_plan(), USAGE, only_build=True)
    row = next(iter(rows))
    assert (row.topic, row.verdict) == ("driver", "problem")
    assert "too old for PyTorch 0.10.2, which is built for CUDA 13.0" in row.found
    assert row.advice == "install driver 580 or newer, or an older PyTorch"


@pytest.mark.parametrize(
    ("backend", "seen", "verdict", "found"),
    [
        ("jax", {"keras": "3.15.1"}, "ok", "3.15.1 runs on JAX, which has 1 GPU"),
        ("jax", {"keras": "3.15.1", "gpus": []}, "note", "3.15.1 runs on JAX, which sees no GPU"),
        ("jax", {"keras": None, "keras_error": "ImportError: no"}, "problem", "cannot be imported: ImportError: no"),
        ("torch", None, "problem", "runs on PyTorch, which does not work in that environment"),
        ("numpy", None, "note", "runs on numpy, which no policy applies to"),
    ],
)
def test_which_framework_keras_runs_on(backend: str, seen: dict[str, Any] | None, verdict: str, found: str) -> None:
    """Keras has the GPUs of its backend. A backend that does not work there, or that no policy knows, is told."""
    answers = {} if seen is None else {backend: JAX | seen}
    (row,) = diagnose_keras(backend, answers)
    assert (row.topic, row.verdict, row.found) == ("Keras", verdict, found)
