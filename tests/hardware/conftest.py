"""Tests on a real GPU: they are left out, with the reason, where there is none.

Run them under `tfgpu simulate` to compare a card with the simulated one. They take a few GiB of each GPU for some
seconds, change no setting, and write what they measured as JSON into the folder that TFGPU_FIGURES names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import pytest

from tfenv.devices.usage import GpuState, GpuUsage, read_usage
from tfenv.policy.units import MIB

REPOSITORY = Path(__file__).parents[2]
FIGURES = "TFGPU_FIGURES"
#: Variables of tfenv that would change what a program gets. Those of the simulated driver stay.
_POLICY_VARIABLES = ("TFGPU_CONFIG", "TFGPU_SITE_CONFIG", "TFGPU_RUN", "TFGPU_DISABLE", "TFGPU_GRANT")
#: What must be free of each card.
_NEEDED = 8 << 30


def find_missing_gpu() -> str | None:
    """Return why there is no GPU to measure. None: there is one."""
    if not os.path.exists("/dev/nvidiactl"):
        return "there is no NVIDIA driver: /dev/nvidiactl does not exist"
    usage = read_usage()
    if usage.problem is not None or not usage.gpus:
        return usage.problem or "the driver lists no GPU"
    return None


@pytest.fixture(scope="session")
def usage() -> GpuUsage:
    """Return what NVML shows before anything is measured."""
    return read_usage()


@pytest.fixture(scope="session", autouse=True)
def gpu() -> GpuState:
    """Return the first GPU, of which enough is free. Without one, skip."""
    missing = find_missing_gpu()
    if missing is not None:
        pytest.skip(f"no GPU here: {missing}")
    first = next((gpu for gpu in read_usage().gpus if not gpu.split and not gpu.problem), None)
    if first is None or first.total is None or first.used is None or first.total - first.used < _NEEDED:
        pytest.skip("the first GPU does not have 8 GiB free")
    return first


Figures = Callable[[str, object], None]


@pytest.fixture(scope="session")
def figures(gpu: GpuState, usage: GpuUsage) -> Figures:
    """Return what keeps a figure under a name, in a file of its own."""
    folder = os.environ.get(FIGURES)
    about = {
        "card": gpu.name,
        "driver": usage.driver.release,
        "cuda": usage.driver.cuda,
        "python": sys.version.split()[0],
        "simulated": "TFGPU_SIMULATE" in os.environ,
    }

    def keep(name: str, value: object) -> None:
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            text = json.dumps({"name": name, **about, "value": value}, indent=2)
            Path(folder, f"{name.replace(' ', '-')}.json").write_text(f"{text}\n")

    return keep


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a program: this one, without another policy, and with a log of its own."""
    base = {key: value for key, value in os.environ.items() if key not in _POLICY_VARIABLES}
    own = {"PYTHONPATH": str(REPOSITORY), "XDG_STATE_HOME": str(tmp_path / "state"), "TF_CPP_MIN_LOG_LEVEL": "3"}
    return base | own | {"XDG_CONFIG_HOME": str(tmp_path / "config")}


class Tfgpu(Protocol):
    """`tfgpu("verify", policy="[gpu]...")` runs it in a project with this policy, and returns what JSON it prints."""

    def __call__(self, *arguments: str, policy: str = "", codes: tuple[int, ...] = (0,)) -> dict[str, Any]: ...


@pytest.fixture
def tfgpu(tmp_path: Path, environment: dict[str, str]) -> Tfgpu:
    """Return what runs `tfgpu` with `--format json`, and checks its exit code."""

    def run(*arguments: str, policy: str = "", codes: tuple[int, ...] = (0,)) -> dict[str, Any]:
        project = tmp_path / "project"
        project.mkdir(exist_ok=True)
        (project / "tfgpu.toml").write_text(policy)
        command = [sys.executable, "-m", "tfenv", *arguments, "--format", "json"]
        done = subprocess.run(
            command, cwd=project, env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode in codes, done.stdout + done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return run


def list_installed() -> list[str]:
    """Return the frameworks of this environment."""
    return [name for name in ("tensorflow", "jax", "torch") if find_spec(name) is not None]


def to_mib(sizes: Mapping[str, int | None]) -> dict[str, float | None]:
    """Return sizes in MiB."""
    return {name: None if size is None else size / MIB for name, size in sizes.items()}
