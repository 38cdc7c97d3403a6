"""Who uses which GPU, as NVML tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAM = (
    "import json; from tfenv.gpus.usage import read_processes; print(json.dumps([vars(p) for p in read_processes()]))"
)
#: A pid that no process of this machine has: above the kernel's largest.
NOBODY = 2**22 + 1


def ask(env: dict[str, str]) -> Any:
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_processes_by_gpu(simulated_gpus: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    """Each process comes with GPU, memory, owner and name; one that is not to be seen here keeps pid and memory."""
    held = tmp_path / "processes"
    held.write_text(f"1 {NOBODY} 100\n0 {os.getpid()} 200\n")
    mine, other = ask(simulated_gpus("2x24GiB", processes=held))
    assert (mine["gpu"], mine["pid"], mine["memory"]) == (0, os.getpid(), 200 << 20)
    assert mine["program"] == Path("/proc/self/comm").read_text().strip()
    assert mine["user"]
    assert (other["gpu"], other["pid"], other["memory"]) == (1, NOBODY, 100 << 20)
    assert [other[key] for key in ("user", "uid", "program", "started")] == [None] * 4


def test_no_processes(simulated_gpus: Callable[..., dict[str, str]]) -> None:
    """GPUs that nobody uses have no processes."""
    assert ask(simulated_gpus("2x24GiB")) == []


def test_without_nvml(simulated_gpus: Callable[..., dict[str, str]]) -> None:
    """Where NVML cannot be asked nobody is told of, and nothing is raised."""
    program = "import sys; sys.modules['pynvml'] = None; " + PROGRAM
    done = subprocess.run(
        [sys.executable, "-c", program], env=simulated_gpus(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
