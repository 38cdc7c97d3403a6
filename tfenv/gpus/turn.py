"""A process's turn at the GPUs: it looks, takes what it needs all at once, or waits in line."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tfenv.gpus.lease import (
    LARGEST_NUMBER,
    Entry,
    arbiter,
    create,
    entries,
    leases_of,
    let_go,
    number_of,
    open_directories,
    open_file,
    try_lock,
    wish_of,
)
from tfenv.policy.choice import CardMemory, Scene, Wish, choose, claimed, is_possible, waits_for_family
from tfenv.policy.model import Lease, Seat

__all__ = ["Busy", "Held", "Measure", "Patience", "acquire", "look"]

#: Seconds between two looks at whether one of those in the way is gone: a system call each.
_SHORTEST_PAUSE, _PAUSE, _PAUSE_FAR_BACK = 0.01, 0.1, 0.4
#: So many in line are about to be served.
_NEAR = 8
#: Seconds after which everything is looked at anew: memory of processes without a lease may have become free.
_RECHECK, _RECHECK_IN_LINE = 2.0, 10.0
#: Seconds after which a waiter is passed over that did not look: Ctrl-Z stopped it, and it would hold up all others.
_PASSED_OVER = 60.0


@dataclass(frozen=True)
class Held:
    """What a process got.

    Attributes:
        seats: Its places, in the order of the choice.
        id: Of its leases.
        waited_s: Seconds from asking to getting.
        resigned: What kept it from its wish, where it took something else; None: it has what it wanted.
    """

    seats: tuple[Seat, ...]
    id: str
    waited_s: float
    resigned: Busy | None = None


@dataclass(frozen=True)
class Busy:
    """There is no room, as things are.

    Attributes:
        scene: What there is instead.
        possible: An empty machine would have room.
        family: An ancestor holds what is missing: waiting could last for ever.
        waited_s: Seconds waited so far.
    """

    scene: Scene
    possible: bool = True
    family: bool = False
    waited_s: float = 0.0

    @property
    def can_wait(self) -> bool:
        return self.possible and not self.family


#: Asked again and again while a process waits: whether to go on. It may raise, and say how things are.
Patience = Callable[[Busy], bool]
#: Asks NVML who uses how much, by UUID.
Measure = Callable[[], Mapping[str, CardMemory]]


def look(wish: Wish, measure: Measure) -> Busy | tuple[Seat, ...]:
    """What a process would get now. Takes nothing, and lets nobody wait.

    Raises:
        LeaseError: The directory cannot be read.
    """
    memory = measure()
    opened = open_directories()
    try:
        view = _View.read(opened, memory)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    return choose(wish, view.scene) or view.busy(wish)


def acquire(
    wish: Wish,
    measure: Measure,
    *,
    script: str | None = None,
    patience: Patience | None = None,
    resign: Callable[[Busy], tuple[Seat, ...]] | None = None,
) -> Held | Busy:
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
    turn = _Turn(wish, script)
    try:
        answer = turn.try_until_served(measure, patience)
        if isinstance(answer, Busy) and resign is not None and (seats := resign(answer)):
            with arbiter() as rooms:
                return replace(turn.take(seats, rooms), resigned=answer)
        return answer
    finally:
        turn.leave()


@dataclass(frozen=True)
class _View:
    """Everything of live processes in the directories.

    Attributes:
        scene: What counts for a choice.
        leases: Each with its file.
        tickets: Of those who came earlier and are not passed over, each with its file.
        last: The largest number in the line.
    """

    scene: Scene
    leases: list[tuple[Lease, Entry]]
    tickets: list[tuple[Wish, Entry]]
    last: int

    @classmethod
    def read(
        cls, rooms: Mapping[str, int], memory: Mapping[str, CardMemory], own: str = "", *, clean: bool = False
    ) -> _View:
        """Read them all; of the tickets only those that come before `own`, the reader's."""
        found = [entry for room in rooms.values() for entry in entries(room, clean=clean)]
        leases = [(lease, entry) for entry in found if entry.name.startswith("lease-") for lease in leases_of(entry)]
        waiting = sorted((e for e in found if e.name.startswith("ticket-")), key=lambda e: _order(e.name))
        awake = (entry for entry in waiting if entry.touched_s < _PASSED_OVER)
        before = [entry for entry in awake if not own or _order(entry.name) < _order(own)]
        tickets = [(wish, entry) for entry in before if (wish := wish_of(entry)) is not None]
        ahead = tuple(wish for wish, _ in tickets)
        scene = Scene(tuple(lease for lease, _ in leases), memory, ahead, os.getpid())
        return cls(scene, leases, tickets, last=max((number_of(entry.name) for entry in waiting), default=0))

    def busy(self, wish: Wish) -> Busy:
        return Busy(self.scene, is_possible(wish), waits_for_family(wish, self.scene))

    def in_the_way(self, wish: Wish) -> tuple[list[Entry], bool]:
        """Those whose end may change something, and whether it is only others in line.

        The nearest before us in line, and who holds GPUs that nobody before us waits for.
        """
        claims = [(claimed(wish, replace(self.scene, ahead=(other,))), entry) for other, entry in self.tickets]
        taken = {uuid for uuids, _ in claims for uuid in uuids}
        ours = {candidate.uuid for candidate in wish.candidates} - taken
        holders = [entry for lease, entry in self.leases if lease.seat.uuid in ours]
        return [entry for uuids, entry in claims if uuids][-1:] + holders, not ours


def _order(name: str) -> tuple[int, str]:
    return number_of(name), name


@dataclass
class _Turn:
    """One process's way from asking to getting.

    Attributes:
        ticket: Path and descriptor of our place in line; None: we need not wait, or not yet.
        obstacles: Descriptors of files whose locks tell when it is worth to look again.
        in_line: Only others in line are in the way.
        ahead: How many came earlier.
    """

    wish: Wish
    script: str | None
    began: float = field(default_factory=time.monotonic)
    ticket: tuple[str, int] | None = None
    obstacles: list[int] = field(default_factory=list)
    in_line: bool = False
    ahead: int = 0

    def try_until_served(self, measure: Measure, patience: Patience | None) -> Held | Busy:
        while True:
            memory = measure()
            with arbiter() as rooms:
                answer = self.ask(rooms, memory, queue=patience is not None)
            if isinstance(answer, Held) or patience is None or not answer.can_wait:
                return answer
            if not self.wait(answer, patience):
                return replace(answer, waited_s=self.waited())

    def ask(self, rooms: Mapping[str, int], memory: Mapping[str, CardMemory], *, queue: bool) -> Held | Busy:
        """Look, and take the places or a number in the line. The directories are locked."""
        own = os.path.basename(self.ticket[0]) if self.ticket is not None else ""
        view = _View.read(rooms, memory, own, clean=True)
        seats = choose(self.wish, view.scene)
        if seats is not None:
            return self.take(seats, rooms)
        busy = replace(view.busy(self.wish), waited_s=self.waited())
        if queue and busy.can_wait:
            self.line_up(view, rooms)
            self.watch(view)
        return busy

    def take(self, seats: tuple[Seat, ...], rooms: Mapping[str, int]) -> Held:
        """Write the lease. The directories are locked."""
        parent = next(iter(self.wish.family), None)
        content = {**self.content(), "seats": [asdict(seat) for seat in seats], "parent": parent}
        name, _ = create("lease", content, next(iter(rooms.values())))
        return Held(seats, name, self.waited())

    def line_up(self, view: _View, rooms: Mapping[str, int]) -> None:
        if self.ticket is not None:
            os.utime(self.ticket[1])  # still here
            return
        path, directory = next(iter(rooms.items()))
        content = {**self.content(), "wish": asdict(replace(self.wish, family=frozenset()))}
        content["wish"].pop("family")
        name, descriptor = create(f"ticket-{min(view.last + 1, LARGEST_NUMBER):018d}", content, directory)
        self.ticket = (os.path.join(path, name), descriptor)

    def content(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "script": self.script, "since": time.time()}

    def waited(self) -> float:
        return time.monotonic() - self.began

    # -- waiting

    def watch(self, view: _View) -> None:
        self.forget_obstacles()
        found, self.in_line = view.in_the_way(self.wish)
        self.ahead = len(view.tickets)
        for entry in found:
            with contextlib.suppress(OSError):
                self.obstacles.append(open_file(entry.name, entry.directory))

    def wait(self, busy: Busy, patience: Patience) -> bool:
        """Until it is worth to look again; False: the process has no more patience."""
        pause, longest = _SHORTEST_PAUSE, _PAUSE if self.ahead < _NEAR else _PAUSE_FAR_BACK
        until = time.monotonic() + (_RECHECK_IN_LINE if self.in_line else _RECHECK)
        while time.monotonic() < until:
            if not patience(replace(busy, waited_s=self.waited())):
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
            let_go(descriptor)
