"""The record of a process's end: when there is one, and when there cannot be.

The framework is a small one made for these tests, in real processes with the real hook.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tfenv.policy.model import DeviceOutcome
from tfenv.runtime.ending import measure_process_ms, merge_devices

#: Registers a framework that creates one GPU in one function, as its module in frameworks/ would.
REGISTER = """
import multiprocessing, os, signal, sys, time
import _tfenv_boot
from tfenv.frameworks import registry
from tfenv.policy.model import DeviceOutcome, Outcome

class Small:
    name, title, first_listing, public_api = "small", "Small", "open_devices", ""
    supports = frozenset()

    def version(self):
        return "1.0"

    def devices_exist(self, *, gpu_is_open):
        return False

    def read_peaks(self, created):
        return tuple((device, 5 << 30) for device in created["open_devices"])

    def prepare(self, plan, environ):
        return []

    def intercept(self, policy):
        def open_devices(devices=(DeviceOutcome(0, "0", "GPU-aaaa", limit=8 << 30),)):
            policy.report(Outcome("applied", "open_devices", devices))

        sys.modules["small"].open_devices = open_devices
        return ()

registry.register(Small())
_tfenv_boot.WATCHED += ("small",)
import small

def work():
    small.open_devices()

"""


def run(program: str, folder: Path, status: int = 0) -> list[dict[str, Any]]:
    """Run a program that has a policy, and return the records of ends."""
    (folder / "small.py").write_text("")
    (folder / "tfgpu.toml").write_text('[gpu]\nvisible_devices = [0]\n[audit]\nstderr = "none"\nfile = "audit.jsonl"\n')
    (folder / "train.py").write_text(REGISTER + program)
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == status, done.stderr
    log = folder / "audit.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [record for record in records if record["event"] == "policy_ended"]


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("work()", 0),
        ("work(); work()", 0),
        ("work(); sys.exit(3)", 3),
        ("work(); raise ValueError('of the program')", 1),
        ("work(); os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", -signal.SIGINT),
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(4)); work(); os.kill(os.getpid(), signal.SIGTERM)", 4),
    ],
)
def test_a_process_that_created_devices_records_its_end_once(program: str, status: int, tmp_path: Path) -> None:
    """However Python ends: at the last line, by sys.exit, by an exception, by a signal that is handled."""
    before = time.monotonic()
    (record,) = run(program, tmp_path, status)
    assert 0 < record["duration_ms"] < (time.monotonic() - before) * 1000 + 100
    assert (record["framework"], record["level"]) == ("small", "info")
    (device,) = record["devices"]
    assert (device["uuid"], device["limit_bytes"], device["peak_bytes"]) == ("GPU-aaaa", 8 << 30, 5 << 30)


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("", 0),
        ("small.open_devices(())", 0),
        ("work(); os._exit(0)", 0),
        ("work(); os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", -signal.SIGTERM),
        ("work(); os.execv('/bin/true', ['true'])", 0),
    ],
)
def test_other_processes_record_no_end(program: str, status: int, tmp_path: Path) -> None:
    """One without devices has nothing to tell, and one that is killed or replaced has no time to."""
    assert run(program, tmp_path, status) == []


CHILD = """
if __name__ == "__main__":
    child = multiprocessing.get_context("{way}").Process(target=work)
    child.start()
    child.join()
"""


@pytest.mark.parametrize("way", ["fork", "spawn", "forkserver"])
def test_a_child_of_multiprocessing_records_its_end(way: str, tmp_path: Path) -> None:
    """A forked one ends with os._exit, and calls what multiprocessing knows of. Its parent created nothing."""
    (record,) = run(CHILD.format(way=way), tmp_path)
    assert record["pid"] != record["ppid"]
    assert record["devices"][0]["peak_bytes"] == 5 << 30


def test_a_forked_child_does_not_record_the_end_of_its_parent(tmp_path: Path) -> None:
    """It inherits what the parent registered for its exit, but not what the parent created."""
    (record,) = run("work()\npid = os.fork()\nif pid: os.waitpid(pid, 0); print(pid)\nelse: sys.exit(0)", tmp_path)
    assert record["pid"] != os.getpid()


def test_a_forked_child_records_what_it_created_itself(tmp_path: Path) -> None:
    """Parent and child have an end each."""
    records = run("work()\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nelse: work(); sys.exit(0)", tmp_path)
    assert len({record["pid"] for record in records}) == len(records) == 2


def test_a_framework_that_fails_at_the_end_costs_the_record_only(tmp_path: Path) -> None:
    """The program's own status and output are what they were."""
    assert run("Small.read_peaks = None; work(); sys.exit(7)", tmp_path, 7) == []


FIRST = DeviceOutcome(0, "0", "GPU-aaaa", limit=8)
SECOND = DeviceOutcome(1, "1", "GPU-bbbb", limit=8)


def test_each_card_is_reported_once_as_it_was_created_last() -> None:
    """Another entry point may create fewer cards, and count them anew."""
    renumbered = DeviceOutcome(0, "1", "GPU-bbbb", limit=4)
    merged = merge_devices({"list_devices": (FIRST, SECOND), "session": (renumbered,)}, ())
    assert merged == ((FIRST, None), (renumbered, None))


def test_a_card_with_a_known_peak_is_reported_as_that_device() -> None:
    """The peak belongs to the limit that it was held to."""
    limited = DeviceOutcome(0, "0", "GPU-aaaa", limit=4)
    assert merge_devices({"context": (limited,), "session": (FIRST,)}, ((limited, 3),)) == ((limited, 3),)


def test_the_time_of_a_process_counts_from_its_start() -> None:
    """Where the kernel does not say when that was, there is none."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    began = measure_process_ms(ticks)
    time.sleep(0.05)
    ended = measure_process_ms(ticks)
    assert began is not None
    assert ended is not None
    assert 50 <= ended - began < 5000
    assert measure_process_ms(None) is None
