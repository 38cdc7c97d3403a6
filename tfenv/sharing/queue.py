"""How a process comes to its GPUs: it looks, takes all that it needs at once, or waits in the queue."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from tfenv.policy.model import Allocation, Lease, MemoryUse
from tfenv.sharing.choose import choose_gpus, find_claimed_gpus, is_possible, waits_for_ancestor
from tfenv.sharing.lease import (
    LARGEST_NUMBER,
    DirectoryEntry,
    create_entry,
    lock_directories,
    open_entry,
    open_lease_directories,
    parse_leases,
    parse_request,
    parse_ticket_number,
    read_entries,
    read_lock_holders,
    release_entry,
    try_lock,
)
from tfenv.sharing.occupancy import Occupancy
from tfenv.sharing.request import GpuRequest
from tfenv.values import as_dict, frozen, replace

#: Seconds between two checks whether one of the obstacles is gone. Each is a system call.
_SHORTEST_PAUSE, _PAUSE, _PAUSE_FAR_BACK = 0.01, 0.1, 0.4
#: With so many ahead a process is about to be served.
_NEAR = 8
#: Seconds after which everything is read again: memory of processes without a lease may have become free.
_RECHECK, _RECHECK_IN_QUEUE = 2.0, 10.0
#: Seconds after which a waiter that did not look is passed over. Ctrl-Z stopped it, and it would hold up all others.
_PASSED_OVER = 60.0


@frozen
class Acquired:
    """What a process got.

    Attributes:
        allocations: Its parts of the GPUs, in the order of the choice.
        id: The id of its leases.
        waited_s: Seconds from the request to the lease.
        fell_back_from: Why it took something else than it asked for. None: it has what it asked for.
    """

    allocations: tuple[Allocation, ...]
    id: str
    waited_s: float
    fell_back_from: Unavailable | None = None


@frozen
class Unavailable:
    """A request cannot be served now.

    Attributes:
        occupancy: Who has the GPUs.
        possible: An empty machine could serve the request.
        held_by_ancestor: An ancestor holds what is missing, so that the process could wait for ever.
        waited_s: Seconds waited so far.
    """

    occupancy: Occupancy
    possible: bool = True
    held_by_ancestor: bool = False
    waited_s: float = 0.0

    @property
    def can_wait(self) -> bool:
        """Whether the request may be served later."""
        return self.possible and not self.held_by_ancestor


#: Called again and again while a process waits. Returns whether to go on. It may raise, and tell the user.
KeepWaiting = Callable[[Unavailable], bool]
#: Asks NVML for the memory in use, by UUID.
Measure = Callable[[], Mapping[str, MemoryUse]]


def look(gpu_request: GpuRequest, measure: Measure) -> Unavailable | tuple[Allocation, ...]:
    """Return what a process would get now, without taking it and without a lock.

    Raises:
        LeaseError: The directory cannot be read.
    """
    memory = measure()
    with open_lease_directories() as directories:
        snapshot = _DirectorySnapshot.read(directories, memory)
    return choose_gpus(gpu_request, snapshot.occupancy) or snapshot.make_unavailable(gpu_request)


def acquire(
    gpu_request: GpuRequest,
    measure: Measure,
    *,
    script: str | None = None,
    keep_waiting: KeepWaiting | None = None,
    fallback: Callable[[Unavailable], tuple[Allocation, ...]] | None = None,
    sleep: Callable[[float], object] = time.sleep,
    name: str | None = None,
) -> Acquired | Unavailable:
    """Take GPUs, all of them at once, and keep them as long as this process lives.

    Args:
        gpu_request: What the process asks for.
        measure: Asks for the memory in use, anew at each look.
        script: The program, for others to see.
        keep_waiting: Tells whether to go on waiting. None: do not wait.
        fallback: Chooses what the process takes if the request cannot be served. That is leased all the same.
        sleep: Waits for so many seconds, or less.
        name: The id of the leases. None: a new one.

    Raises:
        LeaseError: There is no directory for leases, or it cannot be written.
    """
    acquisition = _Acquisition(gpu_request, script, sleep, name)
    try:
        answer = acquisition.try_until_served(measure, keep_waiting)
        if isinstance(answer, Unavailable) and fallback is not None and (allocations := fallback(answer)):
            with lock_directories(sleep) as directories:
                return replace(acquisition.take(allocations, directories), fell_back_from=answer)
        return answer
    finally:
        acquisition.leave_queue()


@frozen
class _DirectorySnapshot:
    """What live processes have in the directories.

    Attributes:
        occupancy: What counts for a choice.
        leases: Each lease with its file.
        tickets: The requests of those who came earlier and are not passed over, each with its file.
        last: The largest number in the queue.
    """

    occupancy: Occupancy
    leases: list[tuple[Lease, DirectoryEntry]]
    tickets: list[tuple[GpuRequest, DirectoryEntry]]
    last: int

    @classmethod
    def read(
        cls,
        directories: Mapping[str, int],
        memory: Mapping[str, MemoryUse],
        own: str = "",
        *,
        clean: bool = False,
    ) -> _DirectorySnapshot:
        """Read the directories, but only those tickets that come before the reader's `own`."""
        found = [entry for descriptor in directories.values() for entry in read_entries(descriptor, clean=clean)]
        holders = read_lock_holders()
        leases = [
            (lease, entry)
            for entry in found
            if entry.name.startswith("lease-")
            for lease in parse_leases(entry, holders)
        ]
        waiting = sorted((e for e in found if e.name.startswith("ticket-")), key=lambda e: _get_queue_order(e.name))
        awake = (entry for entry in waiting if entry.touched_s < _PASSED_OVER)
        before = [entry for entry in awake if not own or _get_queue_order(entry.name) < _get_queue_order(own)]
        tickets = [(gpu_request, entry) for entry in before if (gpu_request := parse_request(entry)) is not None]
        ahead = tuple(gpu_request for gpu_request, _ in tickets)
        occupancy = Occupancy(tuple(lease for lease, _ in leases), memory, ahead, os.getpid())
        last = max((parse_ticket_number(entry.name) for entry in waiting), default=0)
        return cls(occupancy, leases, tickets, last)

    def make_unavailable(self, gpu_request: GpuRequest) -> Unavailable:
        return Unavailable(self.occupancy, is_possible(gpu_request), waits_for_ancestor(gpu_request, self.occupancy))

    def find_obstacles(self, gpu_request: GpuRequest) -> tuple[list[DirectoryEntry], bool]:
        """Find the files of those whose end may change something, and tell whether only others in the queue do.

        These are the nearest one ahead in the queue, and those who hold GPUs that nobody ahead waits for.
        """
        claims = [
            (find_claimed_gpus(gpu_request, replace(self.occupancy, ahead=(other,))), entry)
            for other, entry in self.tickets
        ]
        claimed = {uuid for uuids, _ in claims for uuid in uuids}
        unclaimed = {candidate.uuid for candidate in gpu_request.candidates} - claimed
        holders = [entry for lease, entry in self.leases if lease.allocation.uuid in unclaimed]
        return [entry for uuids, entry in claims if uuids][-1:] + holders, not unclaimed


def _get_queue_order(name: str) -> tuple[int, str]:
    return parse_ticket_number(name), name


class _Acquisition:
    """One process's way from the request to the lease.

    Attributes:
        ticket: Path and descriptor of its place in the queue. None: it has none.
        obstacles: Descriptors of files whose locks tell when it is worth to look again.
        queue_only: Only others in the queue are in the way.
        ahead: How many came earlier.
    """

    def __init__(
        self, gpu_request: GpuRequest, script: str | None, sleep: Callable[[float], object], name: str | None
    ) -> None:
        self.gpu_request = gpu_request
        self.script = script
        self.sleep = sleep
        self.name = name
        self.began = time.monotonic()
        self.ticket: tuple[str, int] | None = None
        self.obstacles: list[int] = []
        self.queue_only = False
        self.ahead = 0

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self.began

    def try_until_served(self, measure: Measure, keep_waiting: KeepWaiting | None) -> Acquired | Unavailable:
        while True:
            memory = measure()
            with lock_directories(self.sleep) as directories:
                answer = self.try_once(directories, memory, queue=keep_waiting is not None)
            if isinstance(answer, Acquired) or keep_waiting is None or not answer.can_wait:
                return answer
            if not self.wait_for_change(answer, keep_waiting):
                return replace(answer, waited_s=self.waited_s)

    def try_once(
        self, directories: Mapping[str, int], memory: Mapping[str, MemoryUse], *, queue: bool
    ) -> Acquired | Unavailable:
        """Take the GPUs, or a place in the queue. The directories are locked."""
        own = os.path.basename(self.ticket[0]) if self.ticket is not None else ""
        snapshot = _DirectorySnapshot.read(directories, memory, own, clean=True)
        allocations = choose_gpus(self.gpu_request, snapshot.occupancy)
        if allocations is not None:
            return self.take(allocations, directories)
        unavailable = replace(snapshot.make_unavailable(self.gpu_request), waited_s=self.waited_s)
        if queue and unavailable.can_wait:
            self.join_queue(snapshot, directories)
            self.watch_obstacles(snapshot)
        return unavailable

    def take(self, allocations: tuple[Allocation, ...], directories: Mapping[str, int]) -> Acquired:
        """Write the lease. The directories are locked."""
        parent = next(iter(self.gpu_request.ancestor_leases), None)
        content = {
            **self.make_content(),
            "allocations": as_dict(allocations),
            "parent": parent,
            "overhead": self.gpu_request.overhead,
            "cgroups": self.gpu_request.cgroups,
        }
        name, _ = create_entry("lease", content, next(iter(directories.values())), self.name)
        return Acquired(allocations, name, self.waited_s)

    def make_content(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "script": self.script, "since": time.time()}

    # -- waiting

    def join_queue(self, snapshot: _DirectorySnapshot, directories: Mapping[str, int]) -> None:
        """Write a ticket, or touch the one that is there. The directories are locked."""
        if self.ticket is not None:
            os.utime(self.ticket[1])
            return
        path, directory = next(iter(directories.items()))
        content = {**self.make_content(), "request": as_dict(self.gpu_request)}
        del content["request"]["ancestor_leases"]
        name, descriptor = create_entry(f"ticket-{min(snapshot.last + 1, LARGEST_NUMBER):018d}", content, directory)
        self.ticket = (os.path.join(path, name), descriptor)

    def watch_obstacles(self, snapshot: _DirectorySnapshot) -> None:
        self.close_obstacles()
        found, self.queue_only = snapshot.find_obstacles(self.gpu_request)
        self.ahead = len(snapshot.tickets)
        for entry in found:
            with contextlib.suppress(OSError):
                self.obstacles.append(open_entry(entry.name, entry.directory))

    def wait_for_change(self, unavailable: Unavailable, keep_waiting: KeepWaiting) -> bool:
        """Wait until it is worth to look again. Return False where `keep_waiting` ends the wait."""
        pause, longest = _SHORTEST_PAUSE, _PAUSE if self.ahead < _NEAR else _PAUSE_FAR_BACK
        until = time.monotonic() + (_RECHECK_IN_QUEUE if self.queue_only else _RECHECK)
        while time.monotonic() < until:
            if not keep_waiting(replace(unavailable, waited_s=self.waited_s)):
                return False
            if any(try_lock(descriptor, fcntl.LOCK_SH) for descriptor in self.obstacles):
                return True
            self.sleep(pause)
            pause = min(pause * 1.5, longest)
        return True

    def close_obstacles(self) -> None:
        while self.obstacles:
            os.close(self.obstacles.pop())

    def leave_queue(self) -> None:
        """Give back the place in the queue."""
        self.close_obstacles()
        if self.ticket is not None:
            path, descriptor = self.ticket
            self.ticket = None
            with contextlib.suppress(OSError):
                os.unlink(path)
            release_entry(descriptor)
