"""Comes to the places a process has on GPUs it shares with others: chooses, waits, and says so."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass

from tfenv.audit import summary
from tfenv.errors import Finding, Severity, printable
from tfenv.gpus.lease import LeaseError
from tfenv.gpus.turn import Busy, Held, acquire
from tfenv.policy.choice import Scene, choose, share, wish_from
from tfenv.policy.model import AutoChoice, CardMemory, Choice, Inventory, Lease, OnError, Plan, Seat, Wish
from tfenv.policy.units import format_bytes

__all__ = ["Asking", "Chosen", "choose_seats", "scene_in_words"]

#: Seconds between two words of a process that waits: on a terminal, in a log.
_ON_TERMINAL, _IN_LOG = 1.0, 60.0
#: Seconds a process waits without a word.
_SILENT = 0.5
_MOST_NAMED = 4


@dataclass(frozen=True)
class Asking:
    """Who asks for places.

    Attributes:
        uid: Whose process it is.
        measure: Asks NVML who uses how much of these GPUs.
        script: The program, for others to see.
        family: Ids of the leases of ancestors, whose GPUs it shares.
        on_error: What the policy says of errors: who is to be refused for one takes no place.
        speaks: Whether it may say on stderr that it waits.
    """

    uid: int
    measure: Callable[[tuple[str, ...]], Mapping[str, CardMemory]]
    script: str | None = None
    family: tuple[str, ...] = ()
    on_error: OnError = "warn"
    speaks: bool = True


@dataclass(frozen=True)
class Chosen:
    """What came of it.

    Attributes:
        choice: The places; None: everything stays as the plan says.
        findings: What could not be as the policy says; errors are for `on_error` to decide.
        refused: The policy itself says that the program must not go on.
    """

    choice: Choice | None
    findings: tuple[Finding, ...] = ()
    refused: bool = False


def choose_seats(plan: Plan, inventory: Inventory, asking: Asking) -> Chosen:
    """Agree with the machine's other processes on the GPUs of a plan that takes leases. May wait."""
    wish = wish_from(plan, asking.uid, asking.family)
    if wish is None:
        return _unknown(plan, inventory)

    def measure() -> Mapping[str, CardMemory]:
        return asking.measure(tuple(candidate.uuid for candidate in wish.candidates))

    automatic = plan.choosing or AutoChoice(wish.count)
    names = {d.device.uuid: d.token for d in plan.devices or () if d.device is not None}
    waiting = _Waiting(automatic, names, speaks=asking.speaks) if automatic.when_busy == "wait" else None
    try:
        with waiting or nullcontext():
            answer = acquire(
                wish,
                measure,
                script=asking.script,
                patience=waiting,
                resign=lambda busy: _resign(busy, wish, automatic, asking.on_error),
            )
    except LeaseError as error:
        return _without_leases(wish, measure(), error)
    if isinstance(answer, Held):
        return _held(answer, automatic, names, chosen=plan.choosing is not None)
    return _gave_up(answer, automatic, names)


def _resign(busy: Busy, wish: Wish, automatic: AutoChoice, on_error: OnError) -> tuple[Seat, ...]:
    """What a process takes that does not get its wish: the least used GPUs, if it goes on with any."""
    waited_in_vain = automatic.when_busy == "wait" and busy.can_wait and on_error == "warn"
    return share(wish, busy.scene) if automatic.when_busy == "share" or waited_in_vain else ()


def _held(held: Held, automatic: AutoChoice, names: Mapping[str, str], *, chosen: bool) -> Chosen:
    choice = Choice(held.seats, held.id, held.waited_s)
    shared = [names.get(seat.uuid, seat.uuid) for seat in held.seats if seat.shared]
    if held.resigned is not None and automatic.when_busy == "wait":
        text = f"no GPU became free in {held.waited_s:.0f} s ({scene_in_words(held.resigned.scene, names)})"
        return Chosen(choice, (_finding("no-free-gpu", f"{text}: GPU {', '.join(shared)} is shared"),))
    if not shared:
        return Chosen(choice)
    text = f"GPU {', '.join(shared)} is shared with others beyond its memory, or beyond what they leave"
    return Chosen(choice, (_finding("shared-gpu", text, "warning" if chosen else "note"),))


def _gave_up(busy: Busy, automatic: AutoChoice, names: Mapping[str, str]) -> Chosen:
    nothing = Choice(waited_s=busy.waited_s)
    there = scene_in_words(busy.scene, names)
    if not busy.possible:
        text = "none of these GPUs is large enough for memory_limit and min_free, even when it is free: no GPU"
        return Chosen(nothing, (_finding("no-free-gpu", text),), refused=automatic.when_busy == "fail")
    if busy.family:
        text = "a parent process holds all that memory_total leaves, and may be waiting for this one: no GPU"
        return Chosen(nothing, (_finding("no-free-gpu", text),))
    if automatic.when_busy == "cpu":
        text = f'no GPU is free ({there}), and when_busy = "cpu": no GPU'
        return Chosen(nothing, (_finding("no-free-gpu", text, "warning"),))
    after = f" after {busy.waited_s:.0f} s" if automatic.when_busy == "wait" else ""
    text = f"no GPU is free{after} ({there})"
    return Chosen(nothing, (_finding("no-free-gpu", text),), refused=automatic.when_busy == "fail")


def _finding(code: str, text: str, severity: Severity = "error") -> Finding:
    return Finding(code, text, severity)


# ---- without NVML, without leases


def _unknown(plan: Plan, inventory: Inventory) -> Chosen:
    why = f" ({inventory.problem})" if inventory.problem is not None else ""
    if plan.choosing is None:
        text = f"memory_total holds for this process alone: without NVML{why} nobody can tell which GPUs these are"
        return Chosen(None, (_finding("no-inventory", text, "warning"),))
    tokens = [device.token for device in plan.devices] if plan.devices is not None else map(str, range(1024))
    seats = tuple(Seat(token) for token, _ in zip(tokens, range(plan.choosing.count), strict=False))
    text = f"which GPUs are free cannot be told without NVML{why}: the first {len(seats)} allowed are taken"
    return Chosen(Choice(seats), (_finding("no-inventory", text, "warning"),))


def _without_leases(wish: Wish, memory: Mapping[str, CardMemory], error: LeaseError) -> Chosen:
    """Choose by what NVML says alone: who starts at the same moment may choose the same."""
    scene = Scene((), memory, pid=os.getpid())
    text = f"others cannot see which GPU this process takes: {error}"
    return Chosen(Choice(choose(wish, scene) or share(wish, scene)), (_finding("no-lease", text),))


# ---- in words


def scene_in_words(scene: Scene, names: Mapping[str, str]) -> str:
    """Who is on which GPU, and how many wait: "GPU 0: alice, pid 4711, train.py, 8.0 GiB; 2 came earlier"."""
    cards = [f"GPU {name}: {', '.join(_on(scene, uuid))}" for uuid, name in names.items()]
    shown = cards[:_MOST_NAMED] + ([f"{len(cards) - _MOST_NAMED} more"] if len(cards) > _MOST_NAMED else [])
    return "; ".join(shown + ([f"{len(scene.ahead)} came earlier"] if scene.ahead else []))


def _on(scene: Scene, uuid: str) -> Iterator[str]:
    leases, strangers = scene.on(uuid), scene.strangers(uuid)
    for lease in leases[:2]:
        yield _lease_in_words(lease)
    if len(leases) > 2:  # noqa: PLR2004 - as above
        yield f"and {len(leases) - 2} more"
    if strangers:
        yield f"{format_bytes(strangers)} used without a lease"
    if not leases and not strangers:
        yield "free"


def _lease_in_words(lease: Lease) -> str:
    size = "all of it" if lease.seat.limit is None else format_bytes(lease.seat.limit)
    script = f" {os.path.basename(lease.script)}" if lease.script else ""
    return f"{lease.user} (pid {lease.pid}{script}) {size}"


class _Waiting:
    """Says whether to go on waiting, and tells the user: on a terminal each second, in a log once a minute."""

    def __init__(self, automatic: AutoChoice, names: Mapping[str, str], *, speaks: bool) -> None:
        self.timeout_s = automatic.timeout_s
        self.what = "a free GPU" if automatic.count == 1 else f"{automatic.count} free GPUs"
        self.names = names
        self.speaks = speaks
        self.terminal = _stderr_is_a_terminal()
        self.said_at: float | None = None

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        if self.terminal and self.said_at is not None:
            self._write("\r\x1b[K")

    def __call__(self, busy: Busy) -> bool:
        if self.timeout_s is not None and busy.waited_s >= self.timeout_s:
            return False
        due = _SILENT if self.said_at is None else self.said_at + (_ON_TERMINAL if self.terminal else _IN_LOG)
        if self.speaks and busy.waited_s >= due:
            self.said_at = busy.waited_s
            self._say(busy)
        return True

    def _say(self, busy: Busy) -> None:
        text = f"tfgpu: waiting for {self.what} ({_clock(busy.waited_s)}): {scene_in_words(busy.scene, self.names)}"
        text = printable(text)
        if not self.terminal:
            summary.say(text)
            return
        with suppress(OSError):
            text = text[: os.get_terminal_size(sys.stderr.fileno()).columns - 1]
        self._write(f"\r\x1b[K{text}")

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text)
            sys.stderr.flush()


def _stderr_is_a_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # closed, or replaced by something that is no file
        return False


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
