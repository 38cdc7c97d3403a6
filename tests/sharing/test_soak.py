"""Thirty processes on four GPUs for minutes. Some are killed or stopped, some fork, some close all descriptors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.sharing.holders import NOBODY
from tests.sharing.soak import DEVICES, GIB, OVERHEAD, TOTAL
from tfenv.policy.model import Lease
from tfenv.sharing.lease import lock_directories, read_leases

SECONDS = float(os.environ.get("TFENV_SOAK_SECONDS", "600"))
#: What a process without a lease has of the first GPU as long as the soak lasts.
STRANGER = 3 * GIB
#: Seconds until the lease of a process that ended must be gone, and until all must have been served in the end.
_GONE, _SERVED = 1.0, 120.0


class SoakRun:
    """The processes, and an observer who is none of them."""

    def __init__(self, folder: Path) -> None:
        self.log, self.stop, self.strangers = (folder / name for name in ("events", "stop", "strangers"))
        self.log.touch()
        self.log.chmod(0o666)
        self.place_strangers({DEVICES[0].uuid: STRANGER})
        self.orphans: dict[str, float] = {}
        orders = {
            "log": str(self.log), "stop": str(self.stop), "strangers": str(self.strangers), "count": 30, "seed": 9,
            "uids": [0, NOBODY] if os.geteuid() == 0 else [os.geteuid()],
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.sharing.soak"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, start_new_session=True
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(orders))
        self.process.stdin.close()

    def place_strangers(self, sizes: dict[str, int]) -> None:
        """Say what processes without a lease have of each GPU."""
        new = self.strangers.with_suffix(".new")
        new.write_text(json.dumps(sizes))
        new.chmod(0o644)
        new.rename(self.strangers)

    def read_events(self) -> list[dict[str, Any]]:
        return sorted((json.loads(line) for line in self.log.read_text().splitlines()), key=lambda event: event["at"])

    def sample(self) -> None:
        """Look at all leases at one moment. Nobody can take one meanwhile."""
        with lock_directories():
            leases = read_leases()
        assert_within_memory(leases)
        now = time.monotonic()
        orphans = {lease.id for lease in leases if not Path("/proc", lease.id.split("-")[1]).exists()}
        self.orphans = {name: self.orphans.get(name, now) for name in orphans}
        assert [name for name, since in self.orphans.items() if now - since > _GONE] == [], "it outlives its process"

    def finish(self) -> list[int]:
        """Let all finish. Return their statuses."""
        self.place_strangers({})
        self.stop.touch()
        self.process.wait(_SERVED)
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            statuses: list[int] = json.load(stdout)
        return statuses

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
            self.process.wait()


def assert_within_memory(leases: Iterable[Lease]) -> None:
    """Nobody was given what was not there. Who shares a GPU beyond its memory knows it."""
    for device in DEVICES:
        on_it = [lease for lease in leases if lease.allocation.uuid == device.uuid and not lease.allocation.shared]
        sizes = [
            TOTAL if lease.allocation.limit is None else lease.allocation.limit + lease.overhead for lease in on_it
        ]
        assert sum(sizes) <= TOTAL - (STRANGER if device is DEVICES[0] else 0), on_it


def find_most_at_once(events: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Return the most that was taken of each GPU at one moment, by what the processes say themselves."""
    held: dict[int, list[Any]] = {}
    most: dict[str, int] = {}
    for event in events:
        held.pop(event.get("victim", event["pid"]), None)
        held[event["pid"]] = event.get("allocations", [])
        for uuid, *_ in event.get("allocations", ()):
            parts = [(limit, shared) for parts in held.values() for u, limit, shared in parts if u == uuid]
            taken = sum(TOTAL if limit is None else limit + OVERHEAD for limit, shared in parts if not shared)
            most[uuid] = max(most.get(uuid, 0), taken)
    return most


@pytest.fixture
def soak(machine: Path) -> Iterator[SoakRun]:
    run = SoakRun(machine.parent.parent)
    yield run
    run.end()


@pytest.mark.exhaustive
@pytest.mark.timeout(SECONDS + 300)
def test_whatever_befalls_processes_no_card_is_over_committed_and_nobody_waits_in_vain(soak: SoakRun) -> None:
    """All the time each card has what is on it. In the end all are served, who waited for a stranger's memory, too."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        assert soak.process.poll() is None
        soak.sample()
        time.sleep(0.05)
    ended_at = time.monotonic()
    statuses = soak.finish()
    events = soak.read_events()
    assert [event["error"] for event in events if event["event"] == "raised"] == []
    assert set(statuses) <= {0, 9}
    assert read_leases() == ()
    most = find_most_at_once(events)
    assert set(most) == {device.uuid for device in DEVICES}
    assert max(most.values()) <= TOTAL
    findings = {code for event in events for code in event.get("findings", ())}
    assert findings <= {"lease-renewed", "lease-lost"}
    (hopeless,) = {event["pid"] for event in events if event.get("only") == 0}
    (served,) = [event["at"] for event in events if event["event"] == "enter" and event["pid"] == hopeless][:1]
    assert served > ended_at, "the stranger was in its way"
    entered = [event for event in events if event["event"] == "enter" and event["at"] < ended_at]
    beside = [event for event in entered if DEVICES[0].uuid in {uuid for uuid, *_ in event["allocations"]}]
    assert len(beside) > 1, "it held up nobody else"
