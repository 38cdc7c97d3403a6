"""Simulated GPUs as NVML lists them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import SimulatedGpus
from tfenv.simulate.environment import parse_gpus
from tfenv.simulate.inventory import list_devices


@pytest.mark.parametrize(
    "gpus",
    [
        "4x24GiB",
        "2x24GiB:NVIDIA A10,80GiB/mig=1x40GiB+2x20GiB:NVIDIA A100",
        "81559MiB:NVIDIA H100 80GB HBM3,1.5GiB:Ä" + "x" * 70,
        "32x16GiB",
        "80GiB/mig=7x10GiB:" + "y" * 90,
    ],
)
def test_they_are_those_of_the_stub_library(gpus: str, simulated_gpus: SimulatedGpus) -> None:
    """NVML's stub library lists the same devices: numbers, UUIDs, names and sizes."""
    program = "from tfenv.devices.inventory import read_inventory; print(ascii(read_inventory()))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=simulated_gpus(gpus), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ascii(list_devices(parse_gpus(gpus)))
