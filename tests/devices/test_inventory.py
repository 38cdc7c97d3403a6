"""The machine's GPUs, asked of a simulated NVML by the real nvidia-ml-py, and what is said where it cannot answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tfenv.devices.inventory import read_inventory

if TYPE_CHECKING:
    from tests.conftest import SimulatedGpus

pytest.importorskip("pynvml")

PROGRAM = """
import json
import os
from tfenv.devices.inventory import read_inventory
found = read_inventory()
devices = None if found.devices is None else [dict(vars(device), label=device.label) for device in found.devices]
print(json.dumps([devices, found.problem, found.lost]))
"""
LOST, MISMATCH, NOT_LOADED, NO_PERMISSION, NOT_SUPPORTED = 15, 18, 9, 4, 3


def ask(env: dict[str, str], **answers: int | str) -> Any:
    """Return the inventory. `answers` are what NVML says instead, as machine.h describes it."""
    env["TFGPU_SIMULATE"] = "".join(f"{key}={value}," for key, value in answers.items()) + env["TFGPU_SIMULATE"]
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_instances_stand_for_their_gpu(simulated_gpus: SimulatedGpus) -> None:
    """Of a GPU that is split its MIG instances are listed, with its number and UUID and their own memory."""
    devices, problem, lost = ask(simulated_gpus("1x24GiB,1x40GiB/mig=1x20GiB+1x10GiB:NVIDIA A100"))
    assert (problem, lost) == (None, {})
    assert [(d["label"], d["uuid"][:8], d["parent"], d["total"] >> 30) for d in devices] == [
        ("0", "GPU-a0fa", None, 24),
        ("1:0", "MIG-a110", "GPU-a1fa4e00-0000-4000-8000-000000000001", 20),
        ("1:1", "MIG-a111", "GPU-a1fa4e00-0000-4000-8000-000000000001", 10),
    ]
    assert devices[2]["name"] == "NVIDIA A100 MIG 1g.10gb"


def test_what_the_driver_reserves_is_not_counted(simulated_gpus: SimulatedGpus) -> None:
    """The total is what CUDA can give: on an H100 480 MiB less than NVML's."""
    (device,), _, _ = ask(simulated_gpus("1x80GiB"), memory_mib=81559, reserved_mib=480)
    assert (device["total"], device["reserved"]) == (85017493504, 503316480)


def test_a_lost_card_hides_no_other(simulated_gpus: SimulatedGpus) -> None:
    """A card that fell off the bus is told with its reason. The others keep their numbers."""
    devices, problem, lost = ask(simulated_gpus("3x24GiB"), error=f"0:{LOST}:0")
    assert [device["index"] for device in devices] == [0, 2]
    assert problem is None
    assert list(lost) == ["1"]
    assert "fell off the bus" in lost["1"]
    assert "fell off the bus" in lost["1"]


def test_memory_that_is_not_told(simulated_gpus: SimulatedGpus) -> None:
    """A card that does not say how much memory it has is listed without."""
    (device,), problem, _ = ask(simulated_gpus("1x24GiB"), memory_error=NOT_SUPPORTED)
    assert (device["total"], problem) == (None, None)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (MISMATCH, "restart the machine"),
        (NOT_LOADED, "the NVIDIA driver is installed but not loaded"),
        (NO_PERMISSION, "check the permissions of /dev/nvidiactl"),
    ],
)
def test_no_answer_is_explained(simulated_gpus: SimulatedGpus, code: int, words: str) -> None:
    """Where NVML cannot be asked there are no devices, and the reason says what to do."""
    devices, problem, _ = ask(simulated_gpus(), init_error=code)
    assert devices is None
    assert problem.startswith("NVML: ")
    assert words in problem


def test_no_driver(simulated_gpus: SimulatedGpus) -> None:
    """Without a driver the reason names the library that is missing."""
    env = simulated_gpus()
    del env["LD_LIBRARY_PATH"]
    devices, problem, _ = ask(env)
    if devices is not None:
        pytest.skip("there is a real driver here")
    assert "libnvidia-ml.so.1" in problem


def test_a_machine_without_a_driver_is_known() -> None:
    """Without its device node CUDA shows no GPU, whatever NVML says. A container may have CUDA and no NVML."""
    found = read_inventory()
    has_node = os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")
    assert found.no_driver == (found.problem is not None and not has_node)
