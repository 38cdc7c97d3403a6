"""Who uses which GPU, as NVML tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAM = """
import json
from tfenv.devices.usage import read_usage
print(json.dumps([vars(process) for process in read_usage().processes]))
"""
#: A pid that no process of this machine has: above the kernel's largest.
NOBODY = 2**22 + 1


def ask(env: dict[str, str]) -> Any:
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_processes_by_gpu(simulated_gpus: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    """Each process comes with GPU, memory, owner and name. One that is not to be seen here keeps pid and memory."""
    held = tmp_path / "processes"
    held.write_text(f"1 {NOBODY} 100\n0 {os.getpid()} 200\n")
    mine, other = ask(simulated_gpus("2x24GiB", processes=held))
    assert (mine["gpu"], mine["pid"], mine["memory"]) == (0, os.getpid(), 200 << 20)
    assert mine["program"] == Path("/proc/self/comm").read_text().strip()
    assert mine["user"]
    assert (other["gpu"], other["pid"], other["memory"]) == (1, NOBODY, 100 << 20)
    assert [other[key] for key in ("user", "uid", "program", "started")] == [None] * 4


def test_the_machines_numbers_in_a_container(simulated_gpus: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    """What has the same number there is another process: nothing is told of it."""
    held = tmp_path / "processes"
    held.write_text(f"0 {os.getpid()} 200\n")
    program = f"from tfenv.devices import nvml; nvml.counts_pids_as_here = lambda: False\n{PROGRAM}"
    env = simulated_gpus("2x24GiB", processes=held)
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    (found,) = json.loads(done.stdout)
    assert (found["pid"], found["memory"]) == (os.getpid(), 200 << 20)
    assert [found[key] for key in ("user", "uid", "program", "started")] == [None] * 4


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


# ---- all at one moment


LOOK = """
import json, sys
from tfenv.devices.usage import read_usage
usage = read_usage()
print(json.dumps({**vars(usage), "gpus": [dict(vars(g), label=g.label) for g in usage.gpus],
    "processes": [dict(vars(p), label=p.label) for p in usage.processes], "driver": vars(usage.driver),
    "unseen": usage.list_unseen(), "limit_support": usage.limit_support.backend}))
"""


def look(env: dict[str, str], **answers: int | str) -> Any:
    """Return what is seen. `answers` are what the driver says instead, as machine.h describes it."""
    env["TFGPU_SIMULATE"] = "".join(f"{key}={value}," for key, value in answers.items()) + env["TFGPU_SIMULATE"]
    done = subprocess.run([sys.executable, "-c", LOOK], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_gpus_and_their_instances(simulated_gpus: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    """A split GPU stands before its instances. Memory, utilisation and processes are those of each."""
    held = tmp_path / "held"
    held.write_text(f"0 {NOBODY} 100\n1:1 {NOBODY} 200\n")
    usage = look(simulated_gpus("1x24GiB,1x40GiB/mig=2x20GiB", processes=held), driver=12040, release="550.54")
    states = [(g["label"], g["split"], g["used"] >> 20, g["total"] >> 30, g["utilization"]) for g in usage["gpus"]]
    assert states == [
        ("0", False, 100, 24, 0),
        ("1", True, 200, 40, None),
        ("1:0", False, 0, 20, None),
        ("1:1", False, 200, 20, None),
    ]
    assert [(p["label"], p["uuid"][:8]) for p in usage["processes"]] == [("0", "GPU-a0fa"), ("1:1", "MIG-a111")]
    assert usage["driver"] == {"release": "550.54", "cuda": [12, 4]}


def test_a_lost_card_hides_no_other(simulated_gpus: Callable[..., dict[str, str]]) -> None:
    """A card that does not answer is listed with the reason. The others are as ever."""
    usage = look(simulated_gpus("2x24GiB"), error="15:0")
    assert [(g["index"], bool(g["problem"]), g["uuid"] is not None) for g in usage["gpus"]] == [
        (0, True, False),
        (1, False, True),
    ]


def test_drivers_that_tell_less(simulated_gpus: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    """Memory of a process, of a card, or who uses it may be unknown: the rest is told, and nobody is made up."""
    held = tmp_path / "held"
    held.write_text(f"0 {NOBODY} -1\n1 {NOBODY} 5000\n")
    usage = look(simulated_gpus("2x24GiB", processes=held), processes_error="0:3")
    assert [(p["gpu"], p["memory"]) for p in usage["processes"]] == [(0, None)]
    assert (usage["silent"], usage["unseen"]) == (["1"], [])
    assert look(simulated_gpus("1x24GiB"), memory_error=3)["gpus"][0]["used"] is None


def test_when_a_process_started(simulated_gpus: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    """The start of a process is told, to know it from another that has its number later."""
    held = tmp_path / "held"
    began = time.time()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        held.write_text(f"0 {child.pid} 100\n")
        (process,) = look(simulated_gpus("1x24GiB", processes=held))["processes"]
        child.kill()
    assert began - 2 <= process["started"] <= time.time() + 2
