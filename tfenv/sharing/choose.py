"""Which GPUs a process may have now, beside those who hold leases and those who came earlier. Pure.

A process with a limit takes its limit of a card, and several fit on one card up to its memory. A process without a
limit takes a whole card. Memory of processes that hold no lease counts as taken. First come, first served: nobody takes
a GPU that somebody waits for who came earlier, even if that is one of the two GPUs he needs.
"""

from __future__ import annotations

from collections.abc import Iterable

from tfenv.policy.model import Allocation, MemoryUse
from tfenv.policy.units import MIB
from tfenv.sharing.occupancy import Occupancy
from tfenv.sharing.request import Candidate, GpuRequest
from tfenv.values import replace

#: Less than this of a user's total is of no use: a CUDA context alone takes as much.
_SMALLEST_ALLOCATION = 256 * MIB


def choose_gpus(gpu_request: GpuRequest, occupancy: Occupancy) -> tuple[Allocation, ...] | None:
    """Choose all the GPUs that a process asks for at once.

    The cards with the most free memory come first, then the order of the request counts. Where an ancestor holds a
    card, the process shares that one: it cannot wait for a process that may be waiting for it.

    Returns:
        None where there is too little free memory now.
    """
    claimed = find_claimed_gpus(gpu_request, occupancy)
    candidates = [candidate for candidate in gpu_request.candidates if candidate.uuid not in claimed]
    if not gpu_request.fixed:
        inherited = [c for c in gpu_request.candidates if _is_inherited(c, gpu_request, occupancy)]
        free = [c for c in candidates if c not in inherited and _fits(c, gpu_request.uid, occupancy)]
        candidates = _sort_by_free_bytes(inherited, occupancy) + _sort_by_free_bytes(free, occupancy)
    allocations = _allocate_each(candidates, gpu_request.uid, occupancy)
    return tuple(allocations[: gpu_request.count]) if len(allocations) >= gpu_request.count else None


def find_claimed_gpus(gpu_request: GpuRequest, occupancy: Occupancy) -> set[str]:
    """Return the UUIDs of the GPUs that go first to those who came earlier."""
    return {uuid for earlier in occupancy.ahead for uuid in _list_claims(earlier, gpu_request, occupancy)}


def share_gpus(gpu_request: GpuRequest, occupancy: Occupancy) -> tuple[Allocation, ...]:
    """Choose the least used cards, even without enough free memory. Choose fewer where the user's total is used up."""
    candidates = _sort_by_free_bytes(gpu_request.candidates, occupancy)
    return tuple(_allocate_each(candidates, gpu_request.uid, occupancy)[: gpu_request.count])


def waits_for_ancestor(gpu_request: GpuRequest, occupancy: Occupancy) -> bool:
    """Return whether an ancestor holds what the process lacks of what they share, so that it could wait for ever."""
    return any(
        _is_inherited(candidate, gpu_request, occupancy)
        and candidate.is_bounded
        and not _is_within_bounds(candidate, gpu_request.uid, occupancy)
        for candidate in gpu_request.candidates
    )


def is_possible(gpu_request: GpuRequest) -> bool:
    """Return whether an empty machine could serve the request, so that waiting makes sense."""
    return choose_gpus(gpu_request, Occupancy()) is not None


def needs_unleased_memory(gpu_request: GpuRequest, occupancy: Occupancy) -> bool:
    """Return whether the end of all leases would not be enough: what has no lease is in the way."""
    hopeful = [c for c in gpu_request.candidates if _can_become_free(c, occupancy)]
    return not gpu_request.fixed and len(hopeful) < gpu_request.count


def fits_but_for_overhead(gpu_request: GpuRequest, occupancy: Occupancy) -> bool:
    """Return whether only what processes take beside their limits is in the way."""
    bare = replace(gpu_request, candidates=tuple(replace(c, overhead=0) for c in gpu_request.candidates))
    leases = tuple(replace(lease, overhead=0) for lease in occupancy.leases)
    return gpu_request.overhead > 0 and choose_gpus(bare, replace(occupancy, leases=leases)) is not None


def _is_inherited(candidate: Candidate, gpu_request: GpuRequest, occupancy: Occupancy) -> bool:
    return any(lease.id in gpu_request.ancestor_leases for lease in occupancy.list_leases(candidate.uuid))


def _sort_by_free_bytes(candidates: Iterable[Candidate], occupancy: Occupancy) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: -occupancy.compute_free_bytes(candidate))


def _fits(candidate: Candidate, uid: int, occupancy: Occupancy) -> bool:
    if not _is_within_bounds(candidate, uid, occupancy):
        return False
    free_bytes = occupancy.compute_free_bytes(candidate)
    if candidate.need is not None:
        return free_bytes >= max(min(candidate.need + candidate.overhead, candidate.total), candidate.min_free)
    # A card is taken whole only from strangers who leave what the process says is enough for it.
    undisturbed = occupancy.compute_unleased_bytes(candidate.uuid) == 0 or candidate.min_free > 0
    return not occupancy.list_leases(candidate.uuid) and undisturbed and free_bytes >= candidate.min_free


def _allocate_each(candidates: Iterable[Candidate], uid: int, occupancy: Occupancy) -> list[Allocation]:
    """Allocate a part of each card, no more than is left of what it shares. Skip cards with too little left."""
    allocations = []
    for candidate in candidates:
        wanted, rest = candidate.need, occupancy.compute_rest(candidate, uid)
        if rest is not None:
            if rest < _SMALLEST_ALLOCATION and (wanted is None or wanted > rest):
                continue
            wanted = rest if wanted is None else min(wanted, rest)
        shared = not _fits(replace(candidate, need=wanted), uid, occupancy)
        allocations.append(Allocation(candidate.uuid, wanted, shared=shared))
    return allocations


def _list_claims(earlier: GpuRequest, gpu_request: GpuRequest, occupancy: Occupancy) -> set[str]:
    """Return the GPUs that go first to one who came earlier.

    A process that its own user's total holds up holds up nobody else: free memory on a card would not help it. Nor does
    one that waits for memory of processes without a lease.
    """
    hopeful = [c for c in earlier.candidates if earlier.fixed or _can_become_free(c, occupancy)]
    if len(hopeful) < earlier.count:
        return set()
    if earlier.uid == gpu_request.uid:
        return {c.uuid for c in hopeful if not gpu_request.fixed or c.is_bounded}
    if earlier.fixed or gpu_request.fixed:
        return set()
    usable = {c.uuid for c in hopeful if _is_within_bounds(c, earlier.uid, occupancy)}
    return usable if len(usable) >= earlier.count else set()


def _can_become_free(candidate: Candidate, occupancy: Occupancy) -> bool:
    """Return whether the end of all leases would free enough. What has no lease may stay for ever."""
    walled = occupancy.compute_unleased_bytes_in_cgroup(candidate)
    use = MemoryUse(occupancy.compute_unleased_bytes(candidate.uuid), {}, walled)
    return _fits(replace(candidate, user_total=None), 0, Occupancy((), {candidate.uuid: use}))


def _is_within_bounds(candidate: Candidate, uid: int, occupancy: Occupancy) -> bool:
    rest = occupancy.compute_rest(candidate, uid)
    return rest is None or (candidate.need is not None and rest >= candidate.need)
