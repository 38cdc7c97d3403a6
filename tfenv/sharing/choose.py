"""Which GPUs a process may have now, beside those who hold leases and those who came earlier. Pure.

A limited process takes its limit of a card, several fit on one up to its memory; one without a limit takes a card
whole. Memory of processes that hold no lease counts as taken. First come, first served: nobody takes a GPU that
somebody waits for who came earlier, be it one of the two cards he needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from tfenv.policy.model import UNNOTICED_BYTES, Allocation, AutoChoice, Lease, MemoryUse, Plan, PlannedDevice
from tfenv.policy.units import MIB, format_bytes
from tfenv.values import frozen, replace

__all__ = [
    "SMALLEST_ALLOCATION",
    "Candidate",
    "Occupancy",
    "GpuRequest",
    "choose",
    "claimed",
    "describe_occupancy",
    "is_possible",
    "share",
    "waits_for_ancestor",
    "request_from_plan",
]

#: What is left of a user's total is used from here on; a CUDA context alone takes as much.
SMALLEST_ALLOCATION = 256 * MIB
_MOST_NAMED = 4


@frozen
class Candidate:
    """A GPU a process may have, and what it needs of it.

    Attributes:
        uuid: The GPU.
        total: Its memory in bytes.
        need: Bytes the process is limited to; None: it is not limited and takes the card whole.
        user_total: Bytes all processes of the user may take of it together; None: any.
        min_free: Bytes that must be free before the process starts.
    """

    uuid: str
    total: int
    need: int | None = None
    user_total: int | None = None
    min_free: int = 0


@frozen
class GpuRequest:
    """What a process wants of the machine's GPUs.

    Attributes:
        uid: Whose process it is.
        candidates: The GPUs it may have.
        count: How many of them it wants.
        fixed: It has these GPUs anyway, and only the user's total counts.
        family: Ids of leases of its ancestors, for which it cannot wait: they may be waiting for it.
    """

    uid: int
    candidates: tuple[Candidate, ...]
    count: int
    fixed: bool = False
    ancestor_leases: frozenset[str] = frozenset()


@frozen
class Occupancy:
    """What there is at one moment.

    Attributes:
        leases: All live ones.
        memory: What NVML says of each GPU, by UUID; a GPU that is missing is taken for empty.
        ahead: The wishes of those who came earlier and wait, the first first.
        pid: The chooser itself, whose own memory takes no room from it.
    """

    leases: tuple[Lease, ...] = ()
    memory: Mapping[str, MemoryUse] | None = None
    ahead: tuple[GpuRequest, ...] = ()
    pid: int = 0

    def on(self, uuid: str) -> list[Lease]:
        return [lease for lease in self.leases if lease.allocation.uuid == uuid]

    def unleased_bytes(self, uuid: str) -> int:
        """Bytes in use by processes without a lease; 0 where it is too little to be noticed."""
        memory = (self.memory or {}).get(uuid)
        if memory is None:
            return 0
        if memory.by_pid is None:  # hidden processes: what leases do not explain is somebody else's
            known = sum(
                memory.used if lease.allocation.limit is None else lease.allocation.limit for lease in self.on(uuid)
            )
        else:
            pids = {self.pid, *(lease.pid for lease in self.on(uuid))}
            known = sum(size for pid, size in memory.by_pid.items() if pid in pids)
        return memory.used - known if memory.used - known >= UNNOTICED_BYTES else 0

    def free_bytes(self, candidate: Candidate) -> int:
        """Bytes of the card that nobody has; negative where it is shared beyond its memory."""
        sizes = (lease.allocation.limit for lease in self.on(candidate.uuid))
        taken = sum(candidate.total if size is None else size for size in sizes)
        return candidate.total - taken - self.unleased_bytes(candidate.uuid)

    def left_of_total(self, candidate: Candidate, uid: int) -> int | None:
        """Bytes the user's other processes leave of the user's total; None: there is no such bound."""
        if candidate.user_total is None:
            return None
        sizes = (lease.allocation.limit for lease in self.on(candidate.uuid) if lease.uid == uid)
        return max(0, candidate.user_total - sum(candidate.total if size is None else size for size in sizes))


def request_from_plan(plan: Plan, uid: int, ancestor_leases: Iterable[str] = ()) -> GpuRequest | None:
    """What a process wants that is to follow the plan; None: it is not known which cards these are, or how large."""
    candidates = [_candidate(device, plan.choosing) for device in plan.devices or ()]
    known = tuple(candidate for candidate in candidates if candidate is not None)
    if not known or len(known) < len(candidates):
        return None
    count = len(known) if plan.choosing is None else plan.choosing.count
    return GpuRequest(uid, known, count, fixed=plan.choosing is None, ancestor_leases=frozenset(ancestor_leases))


def _candidate(planned: PlannedDevice, choosing: AutoChoice | None) -> Candidate | None:
    if planned.device is None or planned.device.total is None:
        return None
    total = planned.device.total
    need = planned.limit.on(total) if planned.limit is not None else None
    if need is None and planned.logical_devices:
        need = sum(size.on(total) or 0 for size in planned.logical_devices)
    user_total = planned.user_total.on(total) if planned.user_total is not None else None
    least = choosing.min_free.on(total) if choosing is not None and choosing.min_free is not None else 0
    return Candidate(planned.device.uuid, total, None if need is None else min(need, total), user_total, least or 0)


def choose(gpu_request: GpuRequest, occupancy: Occupancy) -> tuple[Allocation, ...] | None:
    """The places the process takes, all it needs at once; None: there is not room enough now.

    Of the cards with room those come first whose room is largest, then in the order of the wish. Where an ancestor
    holds a card, the process shares that one: it cannot wait for who may be waiting for it.
    """
    taken = claimed(gpu_request, occupancy)
    if gpu_request.fixed:
        allocations = [_seat(c, gpu_request.uid, occupancy) for c in gpu_request.candidates if c.uuid not in taken]
    else:
        inherited = [
            c
            for c in gpu_request.candidates
            if any(lease.id in gpu_request.ancestor_leases for lease in occupancy.on(c.uuid))
        ]
        free = [
            c
            for c in gpu_request.candidates
            if c.uuid not in taken and c not in inherited and _fits(c, gpu_request.uid, occupancy)
        ]
        allocations = [
            _seat(c, gpu_request.uid, occupancy)
            for c in (*_by_free_bytes(inherited, occupancy), *_by_free_bytes(free, occupancy))
        ]
    found = [allocation for allocation in allocations if allocation is not None]
    return tuple(found[: gpu_request.count]) if len(found) >= gpu_request.count else None


def claimed(gpu_request: GpuRequest, occupancy: Occupancy) -> set[str]:
    """The GPUs that those who came earlier have the first word on."""
    return {uuid for earlier in occupancy.ahead for uuid in _claims(earlier, gpu_request, occupancy)}


def share(gpu_request: GpuRequest, occupancy: Occupancy) -> tuple[Allocation, ...]:
    """Places on the least used cards, whether or not there is room; fewer only where the user's total is used up."""
    allocations = [_seat(c, gpu_request.uid, occupancy) for c in _by_free_bytes(gpu_request.candidates, occupancy)]
    return tuple(allocation for allocation in allocations if allocation is not None)[: gpu_request.count]


def waits_for_ancestor(gpu_request: GpuRequest, occupancy: Occupancy) -> bool:
    """Whether an ancestor holds what the process lacks of the user's total: waiting for it could last for ever."""
    return any(
        lease.id in gpu_request.ancestor_leases
        and c.user_total is not None
        and not _within_total(c, gpu_request.uid, occupancy)
        for c in gpu_request.candidates
        for lease in occupancy.on(c.uuid)
    )


def is_possible(gpu_request: GpuRequest) -> bool:
    """Whether waiting makes sense: on an empty machine there would be room."""
    return choose(gpu_request, Occupancy()) is not None


def _by_free_bytes(candidates: Sequence[Candidate], occupancy: Occupancy) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: -occupancy.free_bytes(candidate))


def _fits(candidate: Candidate, uid: int, occupancy: Occupancy) -> bool:
    left = occupancy.left_of_total(candidate, uid)
    if left is not None and (candidate.need is None or left < candidate.need):
        return False
    free_bytes = occupancy.free_bytes(candidate)
    if candidate.need is not None:
        return free_bytes >= max(candidate.need, candidate.min_free)
    # A card is taken whole only from strangers who leave what the process says is enough for it.
    undisturbed = occupancy.unleased_bytes(candidate.uuid) == 0 or candidate.min_free > 0
    return not occupancy.on(candidate.uuid) and undisturbed and free_bytes >= candidate.min_free


def _seat(candidate: Candidate, uid: int, occupancy: Occupancy) -> Allocation | None:
    """A place on the card, held to what is left of the user's total; None: nothing that is of use is left."""
    left = occupancy.left_of_total(candidate, uid)
    if left is None:
        wanted = candidate.need
    elif left >= SMALLEST_ALLOCATION or (candidate.need is not None and candidate.need <= left):
        wanted = left if candidate.need is None else min(candidate.need, left)
    else:
        return None
    return Allocation(candidate.uuid, wanted, shared=not _fits(replace(candidate, need=wanted), uid, occupancy))


def _claims(earlier: GpuRequest, gpu_request: GpuRequest, occupancy: Occupancy) -> set[str]:
    """The GPUs that one of them has the first word on.

    Who is held up by his own user's total holds up nobody else: room on a card would not help him.
    """
    if earlier.uid == gpu_request.uid:
        return {c.uuid for c in earlier.candidates if not gpu_request.fixed or c.user_total is not None}
    if earlier.fixed or gpu_request.fixed:
        return set()
    open_to_him = {c.uuid for c in earlier.candidates if _within_total(c, earlier.uid, occupancy)}
    return open_to_him if len(open_to_him) >= earlier.count else set()


def _within_total(candidate: Candidate, uid: int, occupancy: Occupancy) -> bool:
    left = occupancy.left_of_total(candidate, uid)
    return left is None or (candidate.need is not None and left >= candidate.need)


# ---- in words


def describe_occupancy(occupancy: Occupancy, names: Mapping[str, str]) -> str:
    """Who is on which GPU, and how many wait: "GPU 0: alice, pid 4711, train.py, 8.0 GiB; 2 came earlier"."""
    cards = [f"GPU {name}: {', '.join(_on(occupancy, uuid))}" for uuid, name in names.items()]
    shown = cards[:_MOST_NAMED] + ([f"{len(cards) - _MOST_NAMED} more"] if len(cards) > _MOST_NAMED else [])
    return "; ".join(shown + ([f"{len(occupancy.ahead)} came earlier"] if occupancy.ahead else []))


def _on(occupancy: Occupancy, uuid: str) -> Iterator[str]:
    leases, unleased_bytes = occupancy.on(uuid), occupancy.unleased_bytes(uuid)
    for lease in leases[:2]:
        yield _lease_in_words(lease)
    if len(leases) > 2:  # noqa: PLR2004 - as above
        yield f"and {len(leases) - 2} more"
    if unleased_bytes:
        yield f"{format_bytes(unleased_bytes)} used without a lease"
    if not leases and not unleased_bytes:
        yield "free"


def _lease_in_words(lease: Lease) -> str:
    size = "all of it" if lease.allocation.limit is None else format_bytes(lease.allocation.limit)
    script = f" {lease.script.rpartition('/')[2]}" if lease.script else ""
    return f"{lease.user} (pid {lease.pid}{script}) {size}"
