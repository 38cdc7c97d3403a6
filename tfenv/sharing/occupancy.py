"""Who has how much of which GPU at one moment. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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

    def list_unleased(self, uuid: str) -> list[tuple[int, int]]:
        """Return pid and bytes of the processes without a lease, as far as they are known, the largest first."""
        memory = (self.memory or {}).get(uuid)
        pids = {self.pid, *(lease.pid for lease in self.list_leases(uuid))}
        sizes = {} if memory is None or memory.by_pid is None else memory.by_pid
        return sorted(((pid, size) for pid, size in sizes.items() if pid not in pids), key=lambda found: -found[1])

    def compute_unleased_bytes(self, uuid: str) -> int:
        """Return the bytes that processes without a lease use. 0 where it is too little to be noticed."""
        memory = (self.memory or {}).get(uuid)
        if memory is None:
            return 0
        unleased = self._measure_unleased(memory.used, memory.by_pid, self.list_leases(uuid))
        return unleased if unleased >= UNNOTICED_BYTES else 0

    def compute_unleased_bytes_in_cgroup(self, candidate: Candidate) -> int:
        """Return the bytes that processes without a lease use in the cgroup whose limit holds on a GPU."""
        memory = (self.memory or {}).get(candidate.uuid)
        if memory is None or candidate.wall is None:
            return 0
        return self._measure_unleased(memory.walled, memory.by_pid, self._list_neighbours(candidate))

    def _measure_unleased(self, used: int, by_pid: Mapping[int, int] | None, leases: Sequence[Lease]) -> int:
        """Return what processes without a lease have of the bytes in use."""
        if by_pid is None:  # hidden processes: what leases do not explain is somebody else's
            return used - self._sum_up(leases, used)
        pids = {self.pid, *(lease.pid for lease in leases)}
        seen = sum(size for pid, size in by_pid.items() if pid in pids)
        # Leases of other containers: which of the processes are theirs, nobody can tell here.
        hidden = [lease for lease in leases if lease.pid == 0]
        return used - min(used, seen + self._sum_up(hidden, used))

    @staticmethod
    def _sum_up(leases: Iterable[Lease], whole: int) -> int:
        """Return what processes take together: what their leases say, and what each takes beside it."""
        sizes = (
            whole if lease.allocation.limit is None else lease.allocation.limit + lease.overhead for lease in leases
        )
        return sum(min(size, whole) for size in sizes)

    def compute_free_bytes(self, candidate: Candidate) -> int:
        """Return the card's free bytes. Negative where it is shared beyond its memory."""
        leased = self._sum_up(self.list_leases(candidate.uuid), candidate.total)
        return candidate.total - leased - self.compute_unleased_bytes(candidate.uuid)

    def compute_rest(self, candidate: Candidate, uid: int) -> int | None:
        """Return the bytes to which a process can be limited: what others leave of its user's total and of its cgroup.

        Returns:
            None: neither is bounded.
        """
        bounds = []
        if candidate.user_total is not None:
            own = (lease for lease in self.list_leases(candidate.uuid) if lease.uid == uid)
            bounds.append(candidate.user_total - _add_limits(own, candidate.total))
        if candidate.wall is not None:  # the driver counts what processes take beside their limits, too
            leased = self._sum_up(self._list_neighbours(candidate), candidate.wall)
            unleased = self.compute_unleased_bytes_in_cgroup(candidate)
            bounds.append(candidate.wall - leased - unleased - candidate.overhead)
        return max(0, min(bounds)) if bounds else None

    def _list_neighbours(self, candidate: Candidate) -> list[Lease]:
        """Return the leases on a GPU of processes in the cgroup whose limit holds there."""
        return [lease for lease in self.list_leases(candidate.uuid) if candidate.cgroup in lease.cgroups]


def _add_limits(leases: Iterable[Lease], whole: int) -> int:
    return sum(whole if lease.allocation.limit is None else lease.allocation.limit for lease in leases)


def describe_occupancy(
    occupancy: Occupancy, names: Mapping[str, str], read_program: Callable[[int], str | None] = lambda _: None
) -> str:
    """Describe in one line who is on which GPU, and how many wait.

    Args:
        occupancy: Who has what.
        names: People's name of each GPU, by UUID.
        read_program: Returns the name of a process by its pid. None: it is not known.
    """
    cards = [f"GPU {name}: {', '.join(_describe_card(occupancy, uuid, read_program))}" for uuid, name in names.items()]
    more = [f"{len(cards) - _MOST_CARDS} more"] if len(cards) > _MOST_CARDS else []
    return "; ".join(
        [*cards[:_MOST_CARDS], *more, *([f"{len(occupancy.ahead)} came earlier"] if occupancy.ahead else [])]
    )


def _describe_card(occupancy: Occupancy, uuid: str, read_program: Callable[[int], str | None]) -> Iterator[str]:
    leases, unleased_bytes = occupancy.list_leases(uuid), occupancy.compute_unleased_bytes(uuid)
    for lease in leases[:_MOST_LEASES]:
        size = "all of it" if lease.allocation.limit is None else format_bytes(lease.allocation.limit)
        script = f" {lease.script.rpartition('/')[2]}" if lease.script else ""
        pid = f"pid {lease.pid}" if lease.pid else "in another container"
        yield f"{lease.user} ({pid}{script}) {size}"
    if len(leases) > _MOST_LEASES:
        yield f"and {len(leases) - _MOST_LEASES} more"
    if unleased_bytes:
        found = occupancy.list_unleased(uuid)
        sizes = [format_bytes(size) if len(found) > 1 else "" for _, size in found]  # that of the only one is said
        words = [("pid", str(pid), read_program(pid), size) for (pid, _), size in zip(found, sizes, strict=True)]
        who = ", ".join(" ".join(filter(None, each)) for each in words[:_MOST_LEASES])
        yield f"{format_bytes(unleased_bytes)} used without a lease{f' ({who})' if who else ''}"
    if not leases and not unleased_bytes:
        yield "free"
