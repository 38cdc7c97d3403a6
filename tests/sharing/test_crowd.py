"""A crowd on four GPUs: real processes, real locks, and an observer who trusts only what they did."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.sharing.conftest import Crowd
from tests.sharing.holders import AS_ROOT, NOBODY
from tfenv.deploy import launch
from tfenv.sharing.lease import open_lease_directories, read_entries, read_leases
from tfenv.simulate.driver_requests import read_requests

GIB = 1 << 30
TOTAL = 24 * GIB


def find_most_at_once(events: Iterable[dict[str, Any]]) -> dict[str, int]:
    """The most that was taken of each GPU at one moment, in bytes. A whole card counts as its memory."""
    held: dict[int, list[Any]] = {}
    most: dict[str, int] = {}
    for event in events:
        if event["event"] in ("leave", "killed"):
            held.pop(event["pid"], None)
        if event["event"] == "enter":
            held[event["pid"]] = event["allocations"]
            for uuid, _, _ in event["allocations"]:
                taken = [
                    TOTAL if size is None else size
                    for allocations in held.values()
                    for u, size, _ in allocations
                    if u == uuid
                ]
                most[uuid] = max(most.get(uuid, 0), sum(taken))
    return most


def list_entered(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "enter"]


def assert_nothing_raised(events: Iterable[dict[str, Any]]) -> None:
    assert [event["error"] for event in events if event["event"] == "raised"] == []


def find_live_pids() -> set[int]:
    """The processes that hold a lease or wait in the queue, as others see them."""
    with open_lease_directories() as opened:
        return {int(entry.data["pid"]) for fd in opened.values() for entry in read_entries(fd)}


def make_members(crowd: Crowd, count: int, *uids: int | None) -> list[dict[str, Any]]:
    """Limited ones, some of them with two GPUs, and some that take a whole card."""
    kinds = [
        crowd.write_policy("limited", '[gpu]\nvisible_devices = {count = 1}\nmemory_limit = "7GiB"\n'),
        crowd.write_policy("pair", '[gpu]\nvisible_devices = {count = 2}\nmemory_limit = "30%"\n'),
        crowd.write_policy("whole", "[gpu]\nvisible_devices = {count = 1}\n"),
    ]
    chosen = random.Random(4).choices(kinds, (8, 2, 1), k=count)
    who = uids or (None,)
    return [{"config": kind, "hold": 0.1, "uid": who[number % len(who)]} for number, kind in enumerate(chosen)]


#: A program under the hook: imports TensorFlow, waits for the others, lists its devices, and takes all it may have.
REAL = """
import os, sys, time
sys.path.insert(0, {tests!r})
import crowd
log = os.open({log!r}, os.O_WRONLY | os.O_APPEND)
import tensorflow as tf
from tfenv.runtime import enforce
crowd.write(log, "ready")
while not os.path.exists({gate!r}):
    time.sleep(0.01)
gpus = tf.config.list_physical_devices("GPU")
allocations = [[a.uuid, a.limit, a.shared] for a in enforce.get_current().choice.allocations]
crowd.write(log, "enter", allocations=allocations, findings=[], visible=os.environ["CUDA_VISIBLE_DEVICES"])
assert len(gpus) == len(allocations), (gpus, allocations)
tf.zeros([8])
time.sleep(0.2)
crowd.write(log, "leave", allocations=allocations)
"""


@pytest.mark.tensorflow
@pytest.mark.exhaustive
def test_a_hundred_processes_at_once_share_four_gpus(crowd: Crowd) -> None:
    """97 that go the whole way but for TensorFlow, and three real ones: no card is over-committed, all finish."""
    pytest.importorskip("tensorflow")
    members = make_members(crowd, 97)
    real = [start_real(crowd, Path(each["config"])) for each in make_members(crowd, 3)]
    crowd.wait_for(lambda events: sum(event["event"] == "ready" for event in events) == len(real), 120)
    crowd.start(members)
    (crowd.folder / "gate").touch()
    events = crowd.finish()
    assert [program.wait(60) for program in real] == [0, 0, 0]
    events = crowd.read_events()
    assert_nothing_raised(events)
    assert set(crowd.statuses) == {0}
    assert len(list_entered(events)) == 100
    most = find_most_at_once(events)
    assert len(most) == 4
    assert max(most.values()) <= TOTAL
    assert not any(shared for event in list_entered(events) for _, _, shared in event["allocations"])
    requests = read_requests(crowd.folder / "run" / "log")
    assert len({request.pid for request in requests if request.op == "alloc"}) == 3
    assert [request for request in requests if request.op == "oom"] == []


def start_real(crowd: Crowd, policy: Path) -> subprocess.Popen[bytes]:
    program = crowd.folder / "real.py"
    orders = {"tests": str(Path(__file__).parent), "log": str(crowd.log), "gate": str(crowd.folder / "gate")}
    program.write_text(REAL.format(**orders))
    env = launch.build_environment(crowd.env | {"TFGPU_CONFIG": str(policy)})
    return subprocess.Popen([sys.executable, str(program)], env=env, cwd=crowd.folder)


@AS_ROOT
def test_two_users_never_over_commit_a_card(crowd: Crowd) -> None:
    """Forty processes of two users at once share one directory, and all are served."""
    crowd.start(make_members(crowd, 40, None, NOBODY))
    events = crowd.finish()
    assert_nothing_raised(events)
    assert len(list_entered(events)) == 40
    assert {event["uid"] for event in list_entered(events)} == {0, NOBODY}
    assert max(find_most_at_once(events).values()) <= TOTAL
    assert [event for event in list_entered(events) if event["findings"]] == []


def test_killing_any_frees_its_gpus(crowd: Crowd) -> None:
    """SIGKILL ends holders and waiters at random moments. Within a second nothing of them is left. Others finish."""
    crowd.start([{**each, "hold": 0.3} for each in make_members(crowd, 40)])
    crowd.wait_for(lambda events: len(list_entered(events)) > 4)
    chance = random.Random(7)
    for _ in range(12):
        time.sleep(chance.random() / 10)
        left = {event["pid"] for event in crowd.read_events() if event["event"] == "leave"}
        victims = sorted(find_live_pids() - left)
        if not victims:
            continue
        victim = chance.choice(victims)
        crowd.note("killed", pid=victim)
        os.kill(victim, 9)
        until = time.monotonic() + 1
        while victim in find_live_pids():
            assert time.monotonic() < until, "its GPUs were not free within a second"
    events = crowd.finish()
    assert_nothing_raised(events)
    killed = {event["pid"] for event in events if event["event"] == "killed"}
    assert len(killed) > 3
    survivors = {event["pid"] for event in events if event["event"] == "leave"}
    assert survivors | killed == set(crowd.pids)
    assert max(find_most_at_once(events).values()) <= TOTAL
    assert read_leases() == ()
