"""Comes to the places a process has on GPUs it shares with others: chooses, waits, and says so."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress

from tfenv.errors import Finding, Severity, escape_for_terminal
from tfenv.policy.model import Allocation, AutoChoice, Choice, Inventory, MemoryUse, OnError, Plan
from tfenv.sharing.choose import GpuRequest, Occupancy, choose, describe_occupancy, request_from_plan, share
from tfenv.sharing.lease import LeaseError
from tfenv.sharing.queue import Acquired, Unavailable, acquire
from tfenv.values import frozen

__all__ = ["Requester", "AllocationResult", "allocate_gpus"]

#: Seconds between two words of a process that waits: on a terminal, in a log.
_ON_TERMINAL, _IN_LOG = 1.0, 60.0
#: Seconds a process waits without a word.
_SILENT = 0.5


@frozen
class Requester:
    """Who asks for places.

    Attributes:
        uid: Whose process it is.
        measure: Asks NVML who uses how much of these GPUs.
        script: The program, for others to see.
        ancestor_leases: Ids of the leases of ancestors, whose GPUs it shares.
        on_error: What the policy says of errors: who is to be refused for one takes no place.
        speaks: Whether it may say on stderr that it waits.
    """

    uid: int
    measure: Callable[[tuple[str, ...]], Mapping[str, MemoryUse]]
    script: str | None = None
    ancestor_leases: tuple[str, ...] = ()
    on_error: OnError = "warn"
    speaks: bool = True


@frozen
class AllocationResult:
    """What came of it.

    Attributes:
        choice: The places; None: everything stays as the plan says.
        findings: What could not be as the policy says; errors are for `on_error` to decide.
        refused: The policy itself says that the program must not go on.
    """

    choice: Choice | None
    findings: tuple[Finding, ...] = ()
    refused: bool = False


def allocate_gpus(plan: Plan, inventory: Inventory, requester: Requester) -> AllocationResult:
    """Agree with the machine's other processes on the GPUs of a plan that takes leases. May wait."""
    gpu_request = request_from_plan(plan, requester.uid, requester.ancestor_leases)
    if gpu_request is None:
        return _unknown(plan, inventory)

    def measure() -> Mapping[str, MemoryUse]:
        return requester.measure(tuple(candidate.uuid for candidate in gpu_request.candidates))

    automatic = plan.choosing or AutoChoice(gpu_request.count)
    names = {d.device.uuid: d.token for d in plan.devices or () if d.device is not None}
    waiting = _Waiting(automatic, names, speaks=requester.speaks) if automatic.when_busy == "wait" else None
    try:
        with waiting or nullcontext():
            answer = acquire(
                gpu_request,
                measure,
                script=requester.script,
                keep_waiting=waiting,
                fallback=lambda unavailable: _choose_fallback(unavailable, gpu_request, automatic, requester.on_error),
            )
    except LeaseError as error:
        return _without_leases(gpu_request, measure(), error)
    if isinstance(answer, Acquired):
        return _report_acquired(answer, automatic, names, chosen=plan.choosing is not None)
    return _report_unavailable(answer, automatic, names)


def _choose_fallback(
    unavailable: Unavailable, gpu_request: GpuRequest, automatic: AutoChoice, on_error: OnError
) -> tuple[Allocation, ...]:
    """What a process takes that does not get its wish: the least used GPUs, if it goes on with any."""
    waited_in_vain = automatic.when_busy == "wait" and unavailable.can_wait and on_error == "warn"
    return share(gpu_request, unavailable.occupancy) if automatic.when_busy == "share" or waited_in_vain else ()


def _report_acquired(
    held: Acquired, automatic: AutoChoice, names: Mapping[str, str], *, chosen: bool
) -> AllocationResult:
    choice = Choice(held.allocations, held.id, held.waited_s)
    shared = [names.get(allocation.uuid, allocation.uuid) for allocation in held.allocations if allocation.shared]
    if held.fell_back_from is not None and automatic.when_busy == "wait":
        text = (
            f"no GPU became free in {held.waited_s:.0f} s ({describe_occupancy(held.fell_back_from.occupancy, names)})"
        )
        return AllocationResult(choice, (_finding("no-free-gpu", f"{text}: GPU {', '.join(shared)} is shared"),))
    if not shared:
        return AllocationResult(choice)
    text = f"GPU {', '.join(shared)} is shared with others beyond its memory, or beyond what they leave"
    return AllocationResult(choice, (_finding("shared-gpu", text, "warning" if chosen else "note"),))


def _report_unavailable(unavailable: Unavailable, automatic: AutoChoice, names: Mapping[str, str]) -> AllocationResult:
    nothing = Choice(waited_s=unavailable.waited_s)
    there = describe_occupancy(unavailable.occupancy, names)
    if not unavailable.possible:
        text = "none of these GPUs is large enough for memory_limit and min_free, even when it is free: no GPU"
        return AllocationResult(nothing, (_finding("no-free-gpu", text),), refused=automatic.when_busy == "fail")
    if unavailable.held_by_ancestor:
        text = "a parent process holds all that memory_total leaves, and may be waiting for this one: no GPU"
        return AllocationResult(nothing, (_finding("no-free-gpu", text),))
    if automatic.when_busy == "cpu":
        text = f'no GPU is free ({there}), and when_busy = "cpu": no GPU'
        return AllocationResult(nothing, (_finding("no-free-gpu", text, "warning"),))
    after = f" after {unavailable.waited_s:.0f} s" if automatic.when_busy == "wait" else ""
    text = f"no GPU is free{after} ({there})"
    return AllocationResult(nothing, (_finding("no-free-gpu", text),), refused=automatic.when_busy == "fail")


def _finding(code: str, text: str, severity: Severity = "error") -> Finding:
    return Finding(code, text, severity)


# ---- without NVML, without leases


def _unknown(plan: Plan, inventory: Inventory) -> AllocationResult:
    why = f" ({inventory.problem})" if inventory.problem is not None else ""
    if plan.choosing is None:
        text = f"memory_total holds for this process alone: without NVML{why} nobody can tell which GPUs these are"
        return AllocationResult(None, (_finding("no-inventory", text, "warning"),))
    tokens = [device.token for device in plan.devices] if plan.devices is not None else map(str, range(1024))
    allocations = tuple(Allocation(token) for token, _ in zip(tokens, range(plan.choosing.count), strict=False))
    text = f"which GPUs are free cannot be told without NVML{why}: the first {len(allocations)} allowed are taken"
    return AllocationResult(Choice(allocations), (_finding("no-inventory", text, "warning"),))


def _without_leases(gpu_request: GpuRequest, memory: Mapping[str, MemoryUse], error: LeaseError) -> AllocationResult:
    """Choose by what NVML says alone: who starts at the same moment may choose the same."""
    occupancy = Occupancy((), memory, pid=os.getpid())
    text = f"others cannot see which GPU this process takes: {error}"
    return AllocationResult(
        Choice(choose(gpu_request, occupancy) or share(gpu_request, occupancy)), (_finding("no-lease", text),)
    )


# ---- waiting


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

    def __call__(self, unavailable: Unavailable) -> bool:
        if self.timeout_s is not None and unavailable.waited_s >= self.timeout_s:
            return False
        due = _SILENT if self.said_at is None else self.said_at + (_ON_TERMINAL if self.terminal else _IN_LOG)
        if self.speaks and unavailable.waited_s >= due:
            self.said_at = unavailable.waited_s
            self._say(unavailable)
        return True

    def _say(self, unavailable: Unavailable) -> None:
        occupancy = describe_occupancy(unavailable.occupancy, self.names)
        waited = _clock(unavailable.waited_s)
        text = escape_for_terminal(f"tfgpu: waiting for {self.what} ({waited}): {occupancy}")
        if not self.terminal:
            self._write(f"{text}\n")
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
