"""The policy on a real GPU: each framework is refused at its limit, and what it takes beside that is measured."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.hardware.conftest import Figures, Tfgpu, list_installed
from tfenv.cli.diagnosis.interpreter import NoAnswerError, build_framework_command
from tfenv.cli.verification.child import ChildProgram
from tfenv.devices.usage import GpuState
from tfenv.policy.model import DEFAULT_OVERHEAD
from tfenv.policy.units import MIB

pytestmark = pytest.mark.gpu

FRAMEWORKS = [
    pytest.param(name, marks=[getattr(pytest.mark, name), *([] if name in list_installed() else [
        pytest.mark.skip(reason=f"no {name} here")
    ])])
    for name in ("tensorflow", "jax", "torch")
]  # fmt: skip
with_each_framework = pytest.mark.parametrize("framework", FRAMEWORKS)
POLICY = '[gpu]\nvisible_devices = [0]\nmemory_growth = true\nmemory_limit = "{limit}"\n'


@pytest.mark.parametrize("limit", ["2GiB", "5%"])
@with_each_framework
def test_verify_proves_the_limit(tfgpu: Tfgpu, figures: Figures, framework: str, limit: str) -> None:
    """The framework is refused by its own allocator at the limit, and grows until there."""
    report = tfgpu("verify", "--framework", framework, policy=POLICY.format(limit=limit))
    (made,) = report["frameworks"]
    figures(f"{framework} {limit.rstrip('%')}", made)
    (gpu,) = made["gpus"]
    assert (gpu["refused_by"], gpu["verdict"], made["growth"]["verdict"]) == ("allocator", "kept", "kept")
    assert 0.9 * gpu["limit_bytes"] < gpu["allocated_bytes"] <= gpu["limit_bytes"]


@with_each_framework
def test_what_a_process_takes_beside_its_limit(tfgpu: Tfgpu, figures: Figures, framework: str) -> None:
    """NVML counts no more for the process than its limit and what a lease counts beside it."""
    policy = '[gpu]\nvisible_devices = [0]\nmemory_growth = false\nmemory_limit = "2GiB"\n'
    (made,) = tfgpu("verify", "--framework", framework, policy=policy)["frameworks"]
    figures(f"{framework} overhead", made)
    (gpu,) = made["gpus"]
    assert gpu["overhead_bytes"] is not None
    assert gpu["overhead_bytes"] <= DEFAULT_OVERHEAD


@with_each_framework
def test_without_a_limit_the_card_is_not_filled(tfgpu: Tfgpu, figures: Figures, framework: str) -> None:
    """verify leaves a card alone that nothing limits: on a shared machine others need it."""
    (made,) = tfgpu("verify", "--framework", framework)["frameworks"]
    figures(f"{framework} unlimited", made)
    assert made["gpus"]
    for gpu in made["gpus"]:
        assert (gpu["verdict"], gpu["limit_bytes"]) == ("none", None)
        assert gpu["nvml_bytes"] is None or gpu["nvml_bytes"] < 1024 * MIB


def test_doctor_finds_the_gpu_in_each_framework(tfgpu: Tfgpu, figures: Figures) -> None:
    """doctor asks every installed framework, and each that is built for CUDA lists the GPU."""
    rows = tfgpu("doctor", codes=(0, 1))["rows"]
    figures("doctor", rows)
    titles = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
    found = {row["topic"]: row for row in rows}
    assert {titles[name] for name in list_installed()} <= set(found)
    for name in list_installed():
        row = found[titles[name]]
        assert "not built for CUDA" in row["found"] or row["verdict"] == "ok", row


# ---- processes that share a card


@contextmanager
def start_program(framework: str, project: Path, environment: dict[str, str]) -> Iterator[ChildProgram]:
    """Yield a program that has a few bytes of the GPUs that the policy gives it."""
    here = os.getcwd()
    os.chdir(project)
    try:
        with ChildProgram(build_framework_command(sys.executable, framework, "fill"), environment, 250) as child:
            os.chdir(here)
            child.send({"parts": [1] * len(child.read()["gpus"])})
            child.read()
            yield child
    finally:
        os.chdir(here)


def find_process(tfgpu: Tfgpu, policy: str, pid: int) -> dict[str, Any] | None:
    return next((row for row in tfgpu("ps", policy=policy)["processes"] if row["pid"] == pid), None)


@with_each_framework
def test_ps_shows_a_program_and_its_limit(
    tfgpu: Tfgpu, environment: dict[str, str], tmp_path: Path, figures: Figures, framework: str
) -> None:
    """A program that runs is within its limit, and its framework is named."""
    policy = POLICY.format(limit="2GiB")
    tfgpu("ps", policy=policy)  # writes the policy
    with start_program(framework, tmp_path / "project", environment) as child:
        row = find_process(tfgpu, policy, child.pid)
    figures(f"{framework} ps", row)
    if row is None:
        pytest.skip("NVML's processes have other numbers here: this is a container with a PID namespace of its own")
    assert (row["state"], row["limit_bytes"], row["frameworks"]) == ("within", 2048 * MIB, [framework])


@pytest.mark.skipif(not list_installed(), reason="no framework here")
def test_leases_of_two_processes_fit_a_card(
    tfgpu: Tfgpu, environment: dict[str, str], tmp_path: Path, gpu: GpuState, figures: Figures
) -> None:
    """Two programs of 45 % share a card. A third finds no place on it and is refused."""
    framework = list_installed()[-1]
    choice = "visible_devices = {count = 1, when_busy = 'fail'}\nmemory_limit = '45%'\nmemory_growth = true"
    policy = f"on_error = 'fail'\n[gpu]\n{choice}\n[ceiling]\nallowed_devices = [0]\n"
    tfgpu("ps", policy=policy)
    with ExitStack() as stack:
        programs = [stack.enter_context(start_program(framework, tmp_path / "project", environment)) for _ in range(2)]
        rows = [find_process(tfgpu, policy, program.pid) for program in programs]
        figures("two leases", rows)
        with pytest.raises(NoAnswerError) as refused, start_program(framework, tmp_path / "project", environment):
            pass
    assert "no-free-gpu" in str(refused.value) or "PolicyError" in str(refused.value)
    leased = [row["lease"] for row in rows if row is not None]
    assert leased in ([True, True], [])  # []: a container with a PID namespace of its own
    assert gpu.total is not None
