"""A process's turn at the GPUs: it looks, takes what it needs all at once, or waits in line."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tfenv.policy.model import Allocation, Lease, MemoryUse
from tfenv.sharing.choose import GpuRequest, Occupancy, choose, claimed, is_possible, waits_for_ancestor
from tfenv.sharing.lease import (
    LARGEST_NUMBER,
    Entry,
    create,
    directory_lock,
    entries,
    open_file,
    open_lease_directories,
    parse_leases,
    parse_request,
    parse_ticket_number,
    release_file,
    try_lock,
)
from tfenv.values import as_dict, frozen, replace

__all__ = ["Unavailable", "Acquired", "Measure", "KeepWaiting", "acquire", "look"]

#: Seconds between two looks at whether one of those in the way is gone: a system call each.
_SHORTEST_PAUSE, _PAUSE, _PAUSE_FAR_BACK = 0.01, 0.1, 0.4
#: So many in line are about to be served.
_NEAR = 8
#: Seconds after which everything is looked at anew: memory of processes without a lease may have become free.
_RECHECK, _RECHECK_IN_LINE = 2.0, 10.0
#: Seconds after which a waiter is passed over that did not look: Ctrl-Z stopped it, and it would hold up all others.
_PASSED_OVER = 60.0


@frozen
class Acquired:
    """What a process got.

    Attributes:
        seats: Its places, in the order of the choice.
        id: Of its leases.
        waited_s: Seconds from asking to getting.
        resigned: What kept it from its wish, where it took something else; None: it has what it wanted.
    """

    allocations: tuple[Allocation, ...]
    id: str
    waited_s: float
    fell_back_from: Unavailable | None = None


@frozen
class Unavailable:
    """There is no room, as things are.

    Attributes:
        scene: What there is instead.
        possible: An empty machine would have room.
        held_by_ancestor: An ancestor holds what is missing: waiting could last for ever.
        waited_s: Seconds waited so far.
    """

    occupancy: Occupancy
    possible: bool = True
    held_by_ancestor: bool = False
    waited_s: float = 0.0

    @property
    def can_wait(self) -> bool:
        return self.possible and not self.held_by_ancestor


#: Asked again and again while a process waits: whether to go on. It may raise, and say how things are.
KeepWaiting = Callable[[Unavailable], bool]
#: Asks NVML who uses how much, by UUID.
Measure = Callable[[], Mapping[str, MemoryUse]]


def look(gpu_request: GpuRequest, measure: Measure) -> Unavailable | tuple[Allocation, ...]:
    """What a process would get now. Takes nothing, and lets nobody wait.

    Raises:
        LeaseError: The directory cannot be read.
    """
    memory = measure()
    opened = open_lease_directories()
    try:
        view = _DirectorySnapshot.read(opened, memory)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    return choose(gpu_request, view.occupancy) or view.unavailable(gpu_request)


def acquire(
    gpu_request: GpuRequest,
    measure: Measure,
    *,
    script: str | None = None,
    keep_waiting: KeepWaiting | None = None,
    fallback: Callable[[Unavailable], tuple[Allocation, ...]] | None = None,
) -> Acquired | Unavailable:
    """Take places on GPUs, all of them at once, and keep them as long as this process lives.

    Args:
        wish: What is wanted.
        measure: Who uses how much now; asked anew at each look.
        script: The program, for others to see.
        patience: None: do not wait. Otherwise the process waits in line as long as it says so.
        resign: What the process takes where it does not get its wish; it is on record all the same.

    Raises:
        LeaseError: There is no place for leases, or it cannot be written.
    """
    turn = _Acquisition(gpu_request, script)
    try:
        answer = turn.try_until_served(measure, keep_waiting)
        if isinstance(answer, Unavailable) and fallback is not None and (allocations := fallback(answer)):
            with directory_lock() as directories:
                return replace(turn.take(allocations, directories), fell_back_from=answer)
        return answer
    finally:
        turn.leave()


@frozen
class _DirectorySnapshot:
    """Everything of live processes in the directories.

    Attributes:
        scene: What counts for a choice.
        leases: Each with its file.
        tickets: Of those who came earlier and are not passed over, each with its file.
        last: The largest number in the line.
    """

    occupancy: Occupancy
    leases: list[tuple[Lease, Entry]]
    tickets: list[tuple[GpuRequest, Entry]]
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
        """Read them all; of the tickets only those that come before `own`, the reader's."""
        found = [entry for free_bytes in directories.values() for entry in entries(free_bytes, clean=clean)]
        leases = [(lease, entry) for entry in found if entry.name.startswith("lease-") for lease in parse_leases(entry)]
        waiting = sorted((e for e in found if e.name.startswith("ticket-")), key=lambda e: _queue_order(e.name))
        awake = (entry for entry in waiting if entry.touched_s < _PASSED_OVER)
        before = [entry for entry in awake if not own or _queue_order(entry.name) < _queue_order(own)]
        tickets = [(gpu_request, entry) for entry in before if (gpu_request := parse_request(entry)) is not None]
        ahead = tuple(gpu_request for gpu_request, _ in tickets)
        occupancy = Occupancy(tuple(lease for lease, _ in leases), memory, ahead, os.getpid())
        return cls(
            occupancy, leases, tickets, last=max((parse_ticket_number(entry.name) for entry in waiting), default=0)
        )

    def unavailable(self, gpu_request: GpuRequest) -> Unavailable:
        return Unavailable(self.occupancy, is_possible(gpu_request), waits_for_ancestor(gpu_request, self.occupancy))

    def in_the_way(self, gpu_request: GpuRequest) -> tuple[list[Entry], bool]:
        """Those whose end may change something, and whether it is only others in line.

        The nearest before us in line, and who holds GPUs that nobody before us waits for.
        """
        claims = [
            (claimed(gpu_request, replace(self.occupancy, ahead=(other,))), entry) for other, entry in self.tickets
        ]
        taken = {uuid for uuids, _ in claims for uuid in uuids}
        ours = {candidate.uuid for candidate in gpu_request.candidates} - taken
        holders = [entry for lease, entry in self.leases if lease.allocation.uuid in ours]
        return [entry for uuids, entry in claims if uuids][-1:] + holders, not ours


def _queue_order(name: str) -> tuple[int, str]:
    return parse_ticket_number(name), name


@dataclass
class _Acquisition:
    """One process's way from asking to getting.

    Attributes:
        ticket: Path and descriptor of our place in line; None: we need not wait, or not yet.
        obstacles: Descriptors of files whose locks tell when it is worth to look again.
        in_line: Only others in line are in the way.
        ahead: How many came earlier.
    """

    gpu_request: GpuRequest
    script: str | None
    began: float = field(default_factory=time.monotonic)
    ticket: tuple[str, int] | None = None
    obstacles: list[int] = field(default_factory=list)
    in_line: bool = False
    ahead: int = 0

    def try_until_served(self, measure: Measure, keep_waiting: KeepWaiting | None) -> Acquired | Unavailable:
        while True:
            memory = measure()
            with directory_lock() as directories:
                answer = self.ask(directories, memory, queue=keep_waiting is not None)
            if isinstance(answer, Acquired) or keep_waiting is None or not answer.can_wait:
                return answer
            if not self.wait(answer, keep_waiting):
                return replace(answer, waited_s=self.waited())

    def ask(
        self, directories: Mapping[str, int], memory: Mapping[str, MemoryUse], *, queue: bool
    ) -> Acquired | Unavailable:
        """Look, and take the places or a number in the line. The directories are locked."""
        own = os.path.basename(self.ticket[0]) if self.ticket is not None else ""
        view = _DirectorySnapshot.read(directories, memory, own, clean=True)
        allocations = choose(self.gpu_request, view.occupancy)
        if allocations is not None:
            return self.take(allocations, directories)
        unavailable = replace(view.unavailable(self.gpu_request), waited_s=self.waited())
        if queue and unavailable.can_wait:
            self.line_up(view, directories)
            self.watch(view)
        return unavailable

    def take(self, allocations: tuple[Allocation, ...], directories: Mapping[str, int]) -> Acquired:
        """Write the lease. The directories are locked."""
        parent = next(iter(self.gpu_request.ancestor_leases), None)
        content = {
            **self.content(),
            "allocations": as_dict(allocations),
            "parent": parent,
        }
        name, _ = create("lease", content, next(iter(directories.values())))
        return Acquired(allocations, name, self.waited())

    def line_up(self, view: _DirectorySnapshot, directories: Mapping[str, int]) -> None:
        if self.ticket is not None:
            os.utime(self.ticket[1])  # still here
            return
        path, directory = next(iter(directories.items()))
        content = {**self.content(), "request": as_dict(replace(self.gpu_request, ancestor_leases=frozenset()))}
        content["request"].pop("ancestor_leases")
        name, descriptor = create(f"ticket-{min(view.last + 1, LARGEST_NUMBER):018d}", content, directory)
        self.ticket = (os.path.join(path, name), descriptor)

    def content(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "script": self.script, "since": time.time()}

    def waited(self) -> float:
        return time.monotonic() - self.began

    # -- waiting

    def watch(self, view: _DirectorySnapshot) -> None:
        self.forget_obstacles()
        found, self.in_line = view.in_the_way(self.gpu_request)
        self.ahead = len(view.tickets)
        for entry in found:
            with contextlib.suppress(OSError):
                self.obstacles.append(open_file(entry.name, entry.directory))

    def wait(self, unavailable: Unavailable, keep_waiting: KeepWaiting) -> bool:
        """Until it is worth to look again; False: the process has no more patience."""
        pause, longest = _SHORTEST_PAUSE, _PAUSE if self.ahead < _NEAR else _PAUSE_FAR_BACK
        until = time.monotonic() + (_RECHECK_IN_LINE if self.in_line else _RECHECK)
        while time.monotonic() < until:
            if not keep_waiting(replace(unavailable, waited_s=self.waited())):
                return False
            if any(try_lock(descriptor, fcntl.LOCK_SH) for descriptor in self.obstacles):
                return True
            time.sleep(pause)
            pause = min(pause * 1.5, longest)
        return True

    def forget_obstacles(self) -> None:
        while self.obstacles:
            os.close(self.obstacles.pop())

    def leave(self) -> None:
        """Give back the place in line."""
        self.forget_obstacles()
        if self.ticket is not None:
            path, descriptor = self.ticket
            self.ticket = None
            with contextlib.suppress(OSError):
                os.unlink(path)
            release_file(descriptor)
