"""One limit from the first trial to its last exception: tried, read, excepted, tested, replayed, enforced, ended.

Real TensorFlow on simulated GPUs, real users, and the commands as an administrator types them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from tests.conftest import SimulatedGpus
from tests.shared_machine import ALICE, BOB, SharedMachine, User, shared_machine
from tfenv.deploy import launch

__all__ = ["shared_machine"]

pytestmark = [pytest.mark.timeout(900), pytest.mark.exhaustive, pytest.mark.tensorflow]

MIB = 1 << 20
LOGS = "/var/log/tfgpu"
NOW = f"""
[audit]
file = "{LOGS}/<uid>.jsonl"
[ceiling]
memory_limit = "2000MiB"
"""
LATER = '[{0}group.students.ceiling]\nmemory_limit = "1000MiB"\n'
EXCEPTION = """
[user.alice]
expires = {day}
reason = "thesis"
[user.alice.ceiling]
memory_limit = "2000MiB"
"""
CASES = """
[defaults]
gpus = "2x24GiB"
today = {day}
[[case]]
name = "a student has half"
user = "sam"
groups = ["students"]
[case.expect]
memory_limit = "1000MiB"
[[case]]
name = "alice has all of it until her thesis is done"
user = "alice"
groups = ["students"]
[case.expect]
memory_limit = "2000MiB"
"""
#: In these two zones it is never the same day.
WEST, EAST = "Etc/GMT+12", "Etc/GMT-14"

PROGRAM = """
import tensorflow as tf
print(len(tf.config.list_logical_devices("GPU")))
"""


class Cluster:
    """One machine with a policy, and people who train on it."""

    def __init__(self, machine: SharedMachine, simulated_gpus: SimulatedGpus) -> None:
        self.machine = machine
        self.env = launch.build_environment(simulated_gpus("2x24GiB"))
        machine.clear()
        self.set_time_zone(WEST)

    def set_time_zone(self, zone: str) -> None:
        """Let this machine's date be that of another part of the world."""
        there = self.machine.path("/etc/localtime")
        there.unlink(missing_ok=True)
        there.symlink_to(f"/usr/share/zoneinfo/{zone}")

    def write(self, *parts: str, cases: str | None = None) -> None:
        """Write the machine's policy, and its tests."""
        files = {"tfgpu.toml": NOW + "".join(parts)}
        self.machine.policy(files if cases is None else {**files, "tfgpu.test.toml": cases})

    def train(self, user: User) -> tuple[list[dict[str, Any]], str]:
        """Run a program, and return what its GPUs were given, and all that it wrote to stderr."""
        before = len(self.read_log(user))
        done = self.machine.run(user, sys.executable, "-c", PROGRAM, env={**self.env, "HOME": "/nonexistent"})
        assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
        return self.read_log(user)[before:], done.stderr

    def read_log(self, user: User) -> list[dict[str, Any]]:
        log = self.machine.path(f"{LOGS}/{user.uid}.jsonl")
        records = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
        return [record for record in records if record["event"] in ("policy_applied", "policy_clamped")]

    def tfgpu(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command as the administrator."""
        return self.machine.tfgpu(*arguments, env=self.env)


def list_limits(records: list[dict[str, Any]]) -> list[int]:
    """Return the limits of all GPUs, in MiB."""
    return [device["limit_bytes"] // MIB for record in records for device in record["devices"]]


def get_tomorrow() -> str:
    """Return a day that has come in the east, and has not in the west."""
    return (datetime.now(timezone.utc) + timedelta(hours=14)).date().isoformat()


def test_a_limit_from_its_trial_to_the_end_of_its_exception(
    shared_machine: SharedMachine, simulated_gpus: SimulatedGpus
) -> None:
    """Nobody loses anything while it is observed. Then everybody has just what the tests and the replay foretold."""
    cluster, day = Cluster(shared_machine, simulated_gpus), get_tomorrow()

    # Tried: alice, a student, keeps what she has. Her record says what she would lose, her terminal does not.
    cluster.write(LATER.format("observe."))
    records, shown = cluster.train(ALICE)
    assert list_limits(records) == [2000, 2000]
    lost = [(entry["given_bytes"] // MIB, entry["key"]) for record in records for entry in record["would_clamp"]]
    assert lost == [(1000, "memory_limit")] * 2
    assert "1000" not in shown
    records, _ = cluster.train(BOB)
    assert (list_limits(records), "would_clamp" in records[0]) == ([2000, 2000], False)

    # Read: it would hit one program of one person.
    logs = ["--file", f"{LOGS}/{ALICE.uid}.jsonl", f"{LOGS}/{BOB.uid}.jsonl"]
    summary = cluster.tfgpu("audit", "summary", "--observed", *logs)
    assert summary.returncode == 0, summary.stderr
    assert "1 program of 1 person" in summary.stdout
    assert "alice" in summary.stdout
    assert "bob" not in summary.stdout

    # Excepted and tested: the exception holds today, and the test fails on the day it ends.
    cluster.write(LATER.format(""), EXCEPTION.format(day=day), cases=CASES.format(day="2026-01-01"))
    assert cluster.tfgpu("test", "/etc/tfgpu").returncode == 0
    cluster.write(LATER.format(""), EXCEPTION.format(day=day), cases=CASES.format(day=day))
    failed = cluster.tfgpu("test", "/etc/tfgpu")
    assert failed.returncode == 1
    assert "alice has all of it until her thesis is done" in failed.stdout

    # Replayed: with the exception nobody loses anything, without it one program of alice's.
    replayed = cluster.tfgpu("audit", "replay", "--policy", "/etc/tfgpu", *logs)
    assert replayed.returncode == 0, replayed.stdout
    cluster.write(LATER.format(""))
    replayed = cluster.tfgpu("audit", "replay", "--policy", "/etc/tfgpu", *logs)
    assert replayed.returncode == 1
    assert "alice" in replayed.stdout
    assert "bob" not in replayed.stdout

    # Enforced, with the exception: alice has all of it, and the record says why.
    cluster.write(LATER.format(""), EXCEPTION.format(day=day))
    records, _ = cluster.train(ALICE)
    assert list_limits(records) == [2000, 2000]
    exception = {"table": "user.alice", "path": "/etc/tfgpu/tfgpu.toml", "expires": day, "reason": "thesis"}
    assert records[0]["exceptions"] == [exception]

    # Ended: the day has come, and no file changed. A time zone of alice's own does not bring it back.
    cluster.set_time_zone(EAST)
    cluster.env["TZ"] = WEST
    records, _ = cluster.train(ALICE)
    assert (list_limits(records), "exceptions" in records[0]) == ([1000, 1000], False)
    explained = cluster.tfgpu("explain", "--user", "alice")
    assert f"expired on {day} (thesis)" in explained.stdout
