"""Who has how much of which GPU at one moment. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from tfenv.policy.model import UNNOTICED_BYTES, Lease, MemoryUse
from tfenv.policy.units import format_bytes
from tfenv.sharing.request import Candidate, GpuRequest
from tfenv.values import frozen

#: So many GPUs are described one by one.
_MOST_CARDS = 4
#: So many leases of one GPU are.
_MOST_LEASES = 2


@frozen
class Occupancy:
    """What others have of the GPUs at one moment.

    Attributes:
        leases: All leases of live processes.
        memory: What NVML says of each GPU, by UUID. A GPU that is missing counts as empty.
        ahead: The requests of those who came earlier and wait, in the order in which they came.
        pid: The process that chooses. Its own memory counts as free.
    """

    leases: tuple[Lease, ...] = ()
    memory: Mapping[str, MemoryUse] | None = None
    ahead: tuple[GpuRequest, ...] = ()
    pid: int = 0

    def list_leases(self, uuid: str) -> list[Lease]:
        """Return the leases on a GPU."""
        return [lease for lease in self.leases if lease.allocation.uuid == uuid]

    def compute_unleased_bytes(self, uuid: str) -> int:
        """Return the bytes that processes without a lease use. 0 where it is too little to be noticed."""
        memory = (self.memory or {}).get(uuid)
        if memory is None:
            return 0
        leases = self.list_leases(uuid)
        if memory.by_pid is None:  # hidden processes: what leases do not explain is somebody else's
            known = _add_limits(leases, memory.used)
        else:
            pids = {self.pid, *(lease.pid for lease in leases)}
            known = sum(size for pid, size in memory.by_pid.items() if pid in pids)
        return memory.used - known if memory.used - known >= UNNOTICED_BYTES else 0

    def compute_free_bytes(self, candidate: Candidate) -> int:
        """Return the card's free bytes. Negative where it is shared beyond its memory."""
        leased = _add_limits(self.list_leases(candidate.uuid), candidate.total)
        return candidate.total - leased - self.compute_unleased_bytes(candidate.uuid)

    def compute_rest_of_total(self, candidate: Candidate, uid: int) -> int | None:
        """Return the bytes that the user's other processes leave of the user's total. None: there is no total."""
        if candidate.user_total is None:
            return None
        own = (lease for lease in self.list_leases(candidate.uuid) if lease.uid == uid)
        return max(0, candidate.user_total - _add_limits(own, candidate.total))


def _add_limits(leases: Iterable[Lease], whole: int) -> int:
    return sum(whole if lease.allocation.limit is None else lease.allocation.limit for lease in leases)


def describe_occupancy(occupancy: Occupancy, names: Mapping[str, str]) -> str:
    """Describe in one line who is on which GPU, and how many wait. `names` has people's name of each GPU by UUID."""
    cards = [f"GPU {name}: {', '.join(_describe_card(occupancy, uuid))}" for uuid, name in names.items()]
    more = [f"{len(cards) - _MOST_CARDS} more"] if len(cards) > _MOST_CARDS else []
    return "; ".join(
        [*cards[:_MOST_CARDS], *more, *([f"{len(occupancy.ahead)} came earlier"] if occupancy.ahead else [])]
    )


def _describe_card(occupancy: Occupancy, uuid: str) -> Iterator[str]:
    leases, unleased_bytes = occupancy.list_leases(uuid), occupancy.compute_unleased_bytes(uuid)
    for lease in leases[:_MOST_LEASES]:
        size = "all of it" if lease.allocation.limit is None else format_bytes(lease.allocation.limit)
        script = f" {lease.script.rpartition('/')[2]}" if lease.script else ""
        yield f"{lease.user} (pid {lease.pid}{script}) {size}"
    if len(leases) > _MOST_LEASES:
        yield f"and {len(leases) - _MOST_LEASES} more"
    if unleased_bytes:
        yield f"{format_bytes(unleased_bytes)} used without a lease"
    if not leases and not unleased_bytes:
        yield "free"
