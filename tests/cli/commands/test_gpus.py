"""`tfgpu gpus`: the machine's GPUs, how full they are, and which of them a program here would see."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Tfgpu
from tfenv.simulate.environment import build_environment, parse_gpus

GPUS = "2x24GiB:NVIDIA A10,1x40GiB/mig=2x20GiB:NVIDIA A100"
LOST = 15


@pytest.fixture(autouse=True)
def policy(project: Path) -> Path:
    """Write a policy that shows one GPU of three."""
    path = project / "tfgpu.toml"
    path.write_text("[gpu]\nvisible_devices = [1]\n\n[ceiling]\nallowed_devices = [0, 1]\n")
    return path


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """Hold a gibibyte of the first GPU, and two of the second instance."""
    path = tmp_path / "held"
    path.write_text(f"0 {os.getpid()} 1024\n2:1 {os.getpid()} 2048\n")
    return path


def simulate_machine(gpus: str = GPUS, held: Path | None = None, **answers: int | str) -> dict[str, str]:
    """Return variables of a simulated machine. `answers` are what the driver tells, as machine.h describes it."""
    variables = build_environment(parse_gpus(gpus), processes=held, base={})
    said = "".join(f"{key}={value}," for key, value in answers.items())
    variables["TFGPU_SIMULATE"] = said + variables["TFGPU_SIMULATE"]  # the first of a key counts
    return variables


def read_gpus(tfgpu: Tfgpu, env: dict[str, str]) -> dict[str, Any]:
    result = tfgpu("gpus", "--format", "json", env=env)
    assert result.returncode == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def select_by_label(answer: dict[str, Any], *keys: str) -> dict[str, tuple[Any, ...]]:
    """Return the values of these keys for each GPU."""
    labels = [f"{gpu['index']}" + ("" if gpu["instance"] is None else f":{gpu['instance']}") for gpu in answer["gpus"]]
    return {label: tuple(gpu[key] for key in keys) for label, gpu in zip(labels, answer["gpus"], strict=True)}


def test_what_the_driver_says(tfgpu: Tfgpu, held: Path) -> None:
    """Each GPU and MIG instance comes with UUID, name, memory and utilization. The driver comes with its release."""
    answer = read_gpus(tfgpu, simulate_machine(held=held, utilisation="30:0"))
    found = select_by_label(answer, "name", "used_bytes", "total_bytes", "utilization_percent", "split")
    gib = 1 << 30
    assert found == {
        "0": ("NVIDIA A10", gib, 24 * gib, 30, False),
        "1": ("NVIDIA A10", 0, 24 * gib, 0, False),
        "2": ("NVIDIA A100", 2 * gib, 40 * gib, None, True),
        "2:0": ("NVIDIA A100 MIG 3g.20gb", 0, 20 * gib, None, False),
        "2:1": ("NVIDIA A100 MIG 3g.20gb", 2 * gib, 20 * gib, None, False),
    }
    assert [gpu["uuid"][:6] for gpu in answer["gpus"]] == ["GPU-a0", "GPU-a1", "GPU-a2", "MIG-a2", "MIG-a2"]
    assert answer["driver"] == {"release": "580.00.00", "cuda": "13.0"}


def test_what_hides_the_others(tfgpu: Tfgpu) -> None:
    """A visible GPU has its place and TensorFlow's name, each other the key that hides it, with file and line."""
    found = select_by_label(
        read_gpus(tfgpu, simulate_machine()), "visible", "ordinal", "tensorflow", "hidden_by", "why"
    )
    assert found == {
        "0": (False, None, None, "visible_devices", "not chosen by visible_devices of tfgpu.toml:2"),
        "1": (True, 0, "GPU:0", None, None),
        "2": (None, None, None, None, None),
        "2:0": (False, None, None, "allowed_devices", "not in allowed_devices of tfgpu.toml:5"),
        "2:1": (False, None, None, "allowed_devices", "not in allowed_devices of tfgpu.toml:5"),
    }


@pytest.mark.parametrize(
    ("text", "variables", "why"),
    [
        ("", {"CUDA_VISIBLE_DEVICES": "1"}, {"0": "not in CUDA_VISIBLE_DEVICES, which is 1"}),
        ("", {"CUDA_VISIBLE_DEVICES": ""}, dict.fromkeys("01", "not in CUDA_VISIBLE_DEVICES, which is empty")),
        ("[ceiling]\nmax_devices = 1\n", {}, {"1": "beyond max_devices of tfgpu.toml:2"}),
        (
            "[ceiling]\nrequire_grant = true\n",
            {"SLURM_JOB_ID": "7"},
            dict.fromkeys("01", "the scheduler gave this job none, and require_grant in tfgpu.toml:2 is set"),
        ),
        ("[gpu]\nvisible_devices = {count = 1}\n", {}, {}),
        (
            "[gpu]\nvisible_devices = {count = 1}\n",
            {"CUDA_VISIBLE_DEVICES": "0"},
            {"1": "not in CUDA_VISIBLE_DEVICES, which is 0"},
        ),
        ("on_error = 'cpu'\n[gpu]\nvisible_devices = [7]\n", {}, dict.fromkeys("01", "programs see no GPU: on_error")),
        ("on_error = 'fail'\n[gpu]\nvisible_devices = [7]\n", {}, dict.fromkeys("01", "raises PolicyError: on_error")),
        ("[gpu]\nvisible_devices = [1]\n", {"TFGPU_DISABLE": "1"}, {}),
    ],
)  # fmt: skip
def test_each_reason(tfgpu: Tfgpu, policy: Path, text: str, variables: dict[str, str], why: dict[str, str]) -> None:
    """The grant, each ceiling, the choice and `on_error` are told apart. What has yet to be chosen may be visible."""
    policy.write_text(text)
    found = select_by_label(read_gpus(tfgpu, simulate_machine("2x24GiB") | variables), "why", "tensorflow")
    for label in "01":
        reason, name = found[label]
        assert (why[label] in reason) if label in why else (reason is None and name is not None), found


def test_numbers_that_name_no_card(tfgpu: Tfgpu) -> None:
    """Where a granted number does not tell which of unlike cards it is, nothing is claimed."""
    answer = read_gpus(tfgpu, simulate_machine("1x24GiB:A,1x8GiB:B") | {"CUDA_VISIBLE_DEVICES": "1"})
    assert select_by_label(answer, "tensorflow", "why") == {"0": ("?", None), "1": ("?", None)}
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in answer["notes"][0]


def test_a_table_for_people(tfgpu: Tfgpu, held: Path) -> None:
    """In a pipe each GPU has one line with its full UUID and no colour, and each reason one line below."""
    lines = tfgpu("gpus", env=simulate_machine(held=held)).stdout.splitlines()
    assert lines[0].split() == ["GPU", "name", "UUID", "memory", "used", "busy", "in", "programs"]
    assert lines[2].split()[:4] == ["1", "NVIDIA", "A10", "GPU-a1fa4e00-0000-4000-8000-000000000001"]
    assert lines[2].split()[4:] == ["0", "/", "24.0", "GiB", "0%", "GPU:0,", "cuda:0"]
    assert lines[5].startswith("2:1    MIG 3g.20gb")
    assert lines[-2:] == [
        "GPU 0         not chosen by visible_devices of tfgpu.toml:2",
        "GPU 2:0, 2:1  not in allowed_devices of tfgpu.toml:5",
    ]


def test_a_lost_card(tfgpu: Tfgpu) -> None:
    """A card that fell off the bus is reported. The others are shown all the same."""
    result = tfgpu("gpus", env=simulate_machine("2x24GiB", error=f"{LOST}:0"))
    assert result.returncode == 0
    assert "GPU 0  the card fell off the bus" in result.stdout


def test_no_driver_to_ask(tfgpu: Tfgpu) -> None:
    """A driver that cannot be asked is reported in one line, and the exit code is 1. In JSON it is `problem`."""
    result = tfgpu("gpus", env=simulate_machine(init_error=18))
    assert result.returncode == 1
    assert result.stdout.startswith("driver  NVML: ")
    assert (
        "restart the machine"
        in json.loads(tfgpu("gpus", "--format", "json", env=simulate_machine(init_error=18)).stdout)["problem"]
    )


def test_no_gpu(tfgpu: Tfgpu) -> None:
    """A driver without a GPU is no error, and said."""
    result = tfgpu("gpus", env=simulate_machine("1x1GiB", count=0))
    assert (result.returncode, "it lists no GPU" in result.stdout) == (0, True)
