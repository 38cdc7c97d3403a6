"""How a process comes to its parts of GPUs that it shares with others: it chooses, waits, and tells the user."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress

from tfenv.errors import Finding, escape_for_terminal
from tfenv.policy.model import Allocation, AutoChoice, Choice, Inventory, MemoryUse, OnError, Plan
from tfenv.policy.units import format_bytes
from tfenv.sharing.choose import choose_gpus, fits_but_for_overhead, needs_unleased_memory, share_gpus
from tfenv.sharing.lease import SHARE, LeaseError, find_private_directory, is_intact, read_leases, read_program
from tfenv.sharing.occupancy import Occupancy, describe_occupancy
from tfenv.sharing.queue import Acquired, Unavailable, acquire
from tfenv.sharing.request import Candidate, GpuRequest, request_from_plan
from tfenv.values import frozen, replace

#: Seconds between two messages of a process that waits: on a terminal, in a log.
_ON_TERMINAL, _IN_LOG = 1.0, 60.0
#: How a line about waiting ends, as a line about a finding ends with its code.
_CODE = " [waiting]"
#: Seconds a process waits before the first message.
_SILENT = 0.5


@frozen
class Requester:
    """The process that asks for GPUs.

    Attributes:
        uid: The user of the process.
        measure: Asks NVML for the memory in use on these GPUs.
        script: The program, for others to see.
        ancestor_leases: Ids of the leases of ancestors, whose GPUs it shares.
        on_error: What the policy does about errors. A process that one of them will stop takes no GPU.
        speaks: It may tell on stderr that it waits.
        overhead: Bytes of each GPU that it takes beside its limit.
        sleep: Waits for so many seconds, or less. Other threads may fork meanwhile.
    """

    uid: int
    measure: Callable[[tuple[str, ...]], Mapping[str, MemoryUse]]
    script: str | None = None
    ancestor_leases: tuple[str, ...] = ()
    on_error: OnError = "warn"
    speaks: bool = True
    overhead: int = 0
    sleep: Callable[[float], object] = time.sleep


@frozen
class AllocationResult:
    """What a process was given.

    Attributes:
        choice: Its parts of the GPUs. None: everything stays as planned.
        findings: Where the policy could not be followed. `on_error` decides about the errors.
        refused: The policy itself stops the program.
    """

    choice: Choice | None
    findings: tuple[Finding, ...] = ()
    refused: bool = False


def allocate_gpus(plan: Plan, inventory: Inventory, requester: Requester) -> AllocationResult:
    """Agree with the machine's other processes on the GPUs of a plan that takes leases. Wait if the policy waits.

    Args:
        plan: The plan, whose `takes_leases` is true.
        inventory: The machine's GPUs.
        requester: The process.
    """
    gpu_request = request_from_plan(plan, requester.uid, requester.ancestor_leases, requester.overhead)
    if gpu_request is None:
        return _allocate_without_inventory(plan, inventory)

    def measure() -> Mapping[str, MemoryUse]:
        return requester.measure(tuple(candidate.uuid for candidate in gpu_request.candidates))

    automatic = plan.choosing or AutoChoice(gpu_request.count)
    names = {d.device.uuid: d.token for d in plan.devices or () if d.device is not None}
    waits = automatic.when_busy == "wait"
    reporter = _WaitReporter(automatic, gpu_request, names, speaks=requester.speaks) if waits else None
    try:
        with reporter or nullcontext():
            answer = acquire(
                gpu_request,
                measure,
                script=requester.script,
                keep_waiting=reporter,
                fallback=lambda unavailable: _choose_fallback(unavailable, gpu_request, automatic, requester.on_error),
                sleep=requester.sleep,
            )
    except LeaseError as error:
        return _allocate_without_leases(gpu_request, measure(), error)
    if isinstance(answer, Acquired):
        result = _report_acquired(answer, automatic, gpu_request, names, chosen=plan.choosing is not None)
        return replace(result, findings=(*result.findings, *_warn_of_private_leases()))
    return _report_unavailable(answer, automatic, gpu_request, names)


def renew_lease(choice: Choice, plan: Plan, requester: Requester) -> AllocationResult | None:
    """Take a process's lease again if it is gone: closed by the program, or removed by whoever owns the directory.

    It keeps its id, by which children know it. It comes before those who wait: the process has the GPUs.

    Args:
        choice: What the process has.
        plan: Its plan.
        requester: The process, without its own lease among those of its ancestors.

    Returns:
        What it has from now on, with what there is to say. None: the lease is there.
    """
    if choice.lease is None or is_intact(choice.lease):
        return None
    request = _make_renewal(choice, plan, requester)

    def measure() -> Mapping[str, MemoryUse]:
        uuids = tuple(candidate.uuid for candidate in request.candidates)
        return _leave_out_own(request.candidates, requester.measure(uuids))

    lost = "the lease was lost because the program closed it or its file was removed"
    try:
        acquire(
            request,
            measure,
            script=requester.script,
            fallback=lambda unavailable: share_gpus(request, unavailable.occupancy),
            name=choice.lease,
        )
    except LeaseError as error:
        text = f"{lost}. It cannot be taken again: {error}"
        return AllocationResult(replace(choice, lease=None), (Finding("lease-lost", text),))
    before = {allocation.uuid for allocation in choice.allocations if allocation.shared}
    now = share_gpus(request, _leave_out_children(choice.lease, measure()))
    if all(allocation.uuid in before for allocation in now if allocation.shared):
        return AllocationResult(choice, (Finding("lease-renewed", f"{lost}. It was taken again", "note"),))
    text = f"{lost}. Other processes took the GPU meanwhile, and it is shared beyond its memory"
    return AllocationResult(choice, (Finding("lease-lost", text),))


def _make_renewal(choice: Choice, plan: Plan, requester: Requester) -> GpuRequest:
    """Make the request of a process for just what it has."""
    sizes = {allocation.uuid: allocation.limit for allocation in choice.allocations}
    asked = request_from_plan(plan, requester.uid, requester.ancestor_leases, requester.overhead)
    known = () if asked is None else asked.candidates
    mine = (candidate for candidate in known if candidate.uuid in sizes)
    held = tuple(replace(c, need=sizes[c.uuid], user_total=None, min_free=0, wall=None) for c in mine)
    cgroups = () if asked is None else asked.cgroups
    ancestors = frozenset(requester.ancestor_leases)
    return GpuRequest(requester.uid, held, len(held), fixed=True, ancestor_leases=ancestors, cgroups=cgroups)


def _leave_out_own(held: tuple[Candidate, ...], memory: Mapping[str, MemoryUse]) -> Mapping[str, MemoryUse]:
    """Leave out what a process itself has of its GPUs, where NVML does not tell whose memory it is."""
    sizes = {c.uuid: c.total if c.need is None else c.need + c.overhead for c in held}
    return {
        uuid: use if use.by_pid is not None else MemoryUse(max(0, use.used - sizes.get(uuid, 0)))
        for uuid, use in memory.items()
    }


def _leave_out_children(name: str, memory: Mapping[str, MemoryUse]) -> Occupancy:
    """Return what others have: neither the process with this lease nor its children, who share its GPUs."""
    leases, family = read_leases(), {name}
    while found := {lease.id for lease in leases if lease.parent in family} - family:
        family |= found
    everybody = Occupancy(leases, memory, pid=os.getpid())
    unleased = {uuid: MemoryUse(everybody.compute_unleased_bytes(uuid), {}) for uuid in memory}
    return Occupancy(tuple(lease for lease in leases if lease.id not in family), unleased)


def _choose_fallback(
    unavailable: Unavailable, gpu_request: GpuRequest, automatic: AutoChoice, on_error: OnError
) -> tuple[Allocation, ...]:
    """Choose the least used GPUs for a process that could not be served, if it goes on with any."""
    waited_in_vain = automatic.when_busy == "wait" and unavailable.can_wait and on_error == "warn"
    return share_gpus(gpu_request, unavailable.occupancy) if automatic.when_busy == "share" or waited_in_vain else ()


def _report_acquired(
    acquired: Acquired, automatic: AutoChoice, gpu_request: GpuRequest, names: Mapping[str, str], *, chosen: bool
) -> AllocationResult:
    choice = Choice(acquired.allocations, acquired.id, acquired.waited_s)
    shared = ", ".join(
        names.get(allocation.uuid, allocation.uuid) for allocation in choice.allocations if allocation.shared
    )
    if acquired.fell_back_from is not None and automatic.when_busy == "wait":
        there = _describe(gpu_request, acquired.fell_back_from.occupancy, names)
        text = f"no GPU became free in {acquired.waited_s:.0f} s ({there}): GPU {shared} is shared"
        return AllocationResult(choice, (Finding("no-free-gpu", text),))
    if not shared:
        return AllocationResult(choice)
    advice = "" if acquired.fell_back_from is None else _advise(gpu_request, acquired.fell_back_from.occupancy)
    text = f"GPU {shared} is shared, but other processes leave too little of its memory{advice and f'. {advice}'}"
    return AllocationResult(choice, (Finding("shared-gpu", text, "warning" if chosen else "note"),))


def _warn_of_private_leases() -> tuple[Finding, ...]:
    path = find_private_directory()
    if path is None:
        return ()
    text = f"the leases in {path} are seen in this container only, so other containers may take the same GPU; {SHARE}"
    return (Finding("private-leases", text, "warning"),)


def _describe(gpu_request: GpuRequest, occupancy: Occupancy, names: Mapping[str, str]) -> str:
    """Describe who is on which GPU, and what may help."""
    return ". ".join(
        filter(None, (describe_occupancy(occupancy, names, read_program), _advise(gpu_request, occupancy)))
    )


def _advise(gpu_request: GpuRequest, occupancy: Occupancy) -> str:
    """Say so if waiting may never end, or if only process_overhead is in the way. "": neither."""
    if needs_unleased_memory(gpu_request, occupancy):
        if any(candidate.need is not None for candidate in gpu_request.candidates):
            remedy = "lower memory_limit to fit beside it"
        elif any(candidate.min_free for candidate in gpu_request.candidates):
            remedy = "lower min_free, or set memory_limit, to share a GPU with it"
        else:
            remedy = "set memory_limit, or min_free, to share a GPU with it"
        return f"Processes without a lease may never end; {remedy}"
    if fits_but_for_overhead(gpu_request, occupancy):
        size = format_bytes(gpu_request.overhead)
        return f"It would fit without process_overhead ({size} beside the limit of each process); lower memory_limit"
    return ""


def _report_unavailable(
    unavailable: Unavailable, automatic: AutoChoice, gpu_request: GpuRequest, names: Mapping[str, str]
) -> AllocationResult:
    nothing = Choice(waited_s=unavailable.waited_s)
    there = _describe(gpu_request, unavailable.occupancy, names)
    if not unavailable.possible:
        text = "none of these GPUs is large enough for memory_limit and min_free, even when free; the program gets none"
        return AllocationResult(nothing, (Finding("no-free-gpu", text),), refused=automatic.when_busy == "fail")
    if unavailable.held_by_ancestor:
        text = "a parent process holds all that memory_total allows and may be waiting for this one, which gets no GPU"
        return AllocationResult(nothing, (Finding("no-free-gpu", text),))
    if automatic.when_busy == "cpu":
        text = f'no GPU is free ({there}), so the program gets none (when_busy = "cpu")'
        return AllocationResult(nothing, (Finding("no-free-gpu", text, "warning"),))
    after = f" after {unavailable.waited_s:.0f} s" if automatic.when_busy == "wait" else ""
    text = f"no GPU is free{after} ({there})"
    return AllocationResult(nothing, (Finding("no-free-gpu", text),), refused=automatic.when_busy == "fail")


# ---- without NVML, without leases


def _allocate_without_inventory(plan: Plan, inventory: Inventory) -> AllocationResult:
    why = f" ({inventory.problem})" if inventory.problem is not None else ""
    if plan.choosing is None:
        text = f"memory_total holds for this process alone: without NVML{why} tfenv cannot tell which GPUs these are"
        return AllocationResult(None, (Finding("no-inventory", text, "warning"),))
    choice = take_first_gpus(plan, plan.choosing)
    count = len(choice.allocations)
    text = f"cannot tell which GPUs are free without NVML{why}; using the first {count} that the policy allows"
    return AllocationResult(choice, (Finding("no-inventory", text, "warning"),))


def take_first_gpus(plan: Plan, automatic: AutoChoice) -> Choice:
    """Choose the first GPUs that a plan allows, where nobody can tell which are free."""
    known = None if plan.devices is None else [d.token if d.device is None else d.device.uuid for d in plan.devices]
    names = map(str, range(automatic.count)) if known is None else known[: automatic.count]
    return Choice(tuple(map(Allocation, names)))


def _allocate_without_leases(
    gpu_request: GpuRequest, memory: Mapping[str, MemoryUse], error: LeaseError
) -> AllocationResult:
    """Choose by the memory in use alone. A process that starts at the same moment may choose the same GPUs."""
    occupancy = Occupancy((), memory, pid=os.getpid())
    text = f"other processes cannot see which GPU this one takes: {error}"
    choice = Choice(choose_gpus(gpu_request, occupancy) or share_gpus(gpu_request, occupancy))
    return AllocationResult(choice, (Finding("no-lease", text),))


# ---- waiting


class _WaitReporter:
    """Decides whether to go on waiting, and tells the user: on a terminal each second, in a log once a minute."""

    def __init__(
        self, automatic: AutoChoice, gpu_request: GpuRequest, names: Mapping[str, str], *, speaks: bool
    ) -> None:
        self.timeout_s = automatic.timeout_s
        self.awaited = describe_request(gpu_request)
        self.gpu_request = gpu_request
        self.names = names
        self.speaks = speaks
        self.terminal = _is_stderr_terminal()
        self.reported_at: float | None = None
        self.advised = False

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        if self.terminal and self.reported_at is not None:
            self._write("\r\x1b[K")

    def __call__(self, unavailable: Unavailable) -> bool:
        if self.timeout_s is not None and unavailable.waited_s >= self.timeout_s:
            return False
        due = _SILENT if self.reported_at is None else self.reported_at + (_ON_TERMINAL if self.terminal else _IN_LOG)
        if self.speaks and unavailable.waited_s >= due:
            self.reported_at = unavailable.waited_s
            self._report(unavailable)
        return True

    def _report(self, unavailable: Unavailable) -> None:
        occupancy = _describe(self.gpu_request, unavailable.occupancy, self.names)
        waited = _format_clock(unavailable.waited_s)
        text = escape_for_terminal(f"tfgpu: waiting for {self.awaited} ({waited}): {occupancy}")
        if not self.terminal:
            self._write(f"{text}{_CODE}\n")
            return
        advice = _advise(self.gpu_request, unavailable.occupancy)
        if advice and not self.advised:  # in full, for the line is cut
            self.advised = True
            self._write(f"\r\x1b[K{text}{_CODE}\n")
        with suppress(OSError):
            text = text[: os.get_terminal_size(sys.stderr.fileno()).columns - len(_CODE) - 1]
        self._write(f"\r\x1b[K{text}{_CODE}")

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text)
            sys.stderr.flush()


def describe_request(gpu_request: GpuRequest) -> str:
    """Say what a process waits for: a free GPU, or so much of one."""
    count = gpu_request.count
    sizes = {c.need + c.overhead for c in gpu_request.candidates if c.need is not None}
    size = f" with {format_bytes(min(sizes))} free" if sizes else ""
    if count > 1:
        return f"{count} GPUs{size}" if size else f"{count} free GPUs"
    return f"a GPU{size}" if size else "a free GPU"


def _is_stderr_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # closed, or replaced by something that is no file
        return False


def _format_clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
