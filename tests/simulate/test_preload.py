"""What is preloaded into every simulated process: files of devices, and the stub libraries before NVIDIA's own."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tfenv.simulate.build import PRELOADED
from tfenv.simulate.environment import build_environment, parse_gpus

if TYPE_CHECKING:
    from tests.conftest import SimulatedGpus
    from tests.simulate.conftest import RunPython

EXISTS = "import os; print(*[os.path.exists(f'/dev/{name}') for name in ('nvidia0', 'nvidiactl', 'null', 'nvidia-x')])"
LOADED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
print(*sorted({line.split()[-1] for line in open("/proc/self/maps") if "/simulate-" in line}))
"""


def test_devices_are_there(simulated_gpus: SimulatedGpus, run_python: RunPython) -> None:
    """JAX looks for two files by their names. They exist, and nothing else does that would not without."""
    assert run_python(EXISTS, simulated_gpus("1x24GiB")).split() == ["True", "True", "True", "False"]


def test_a_machine_without_gpus_has_no_devices(simulated_gpus: SimulatedGpus, run_python: RunPython) -> None:
    """The files do not exist where no GPU is simulated."""
    none = simulated_gpus("1x24GiB", TFGPU_SIMULATE="count=0")
    assert run_python(EXISTS, none).split() == ["False", "False", "True", "False"]


def test_stubs_come_before_the_libraries_of_a_framework(
    simulated_gpus: SimulatedGpus, run_python: RunPython, tmp_path: Path
) -> None:
    """When a program imports PyTorch, the stub libraries are loaded first. A package of another name loads none."""
    for name in ("torch", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    loaded = run_python(LOADED, simulated_gpus(), str(tmp_path)).split()
    assert {"libcudart.so.12", "libcudart.so.13", "libcublas.so.13", PRELOADED} <= {Path(path).name for path in loaded}
    loaded = run_python(LOADED.replace("torch", "other"), simulated_gpus(), str(tmp_path)).split()
    assert [Path(path).name for path in loaded] == [PRELOADED]


def test_what_is_preloaded_already_stays() -> None:
    """A library that the caller preloads is preloaded besides."""
    env = build_environment(parse_gpus("1x24GiB"), base={"LD_PRELOAD": "/lib/libother.so"})
    first, second = env["LD_PRELOAD"].split(":")
    assert (Path(first).name, second) == (PRELOADED, "/lib/libother.so")


def test_ordinary_programs_say_nothing(simulated_gpus: SimulatedGpus) -> None:
    """A shell and its children run as they would without, also where LD_LIBRARY_PATH is gone."""
    for variables in ({}, {"LD_LIBRARY_PATH": ""}):
        script = "cat /dev/null && test -f /etc/passwd && stat -c %F / && ! test -e /dev/nvidia-x"
        env = simulated_gpus() | variables
        result = subprocess.run(["sh", "-c", script], env=env, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout, result.stderr) == (0, "directory\n", "")
