"""What a process asks for of the GPUs it shares with others. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from tfenv.policy.model import AutoChoice, Plan, PlannedDevice
from tfenv.values import frozen


@frozen
class Candidate:
    """A GPU a process may have, and what it needs of it.

    Attributes:
        uuid: The GPU.
        total: The memory of the whole card in bytes.
        need: Bytes the process is limited to. None: it has no limit and takes the whole card.
        user_total: Bytes that all processes of the user may take of it together. None: any.
        min_free: Bytes that must be free before the process starts.
        overhead: Bytes that the process takes beside `need`.
        wall: Bytes that the driver lets the processes of a cgroup take of it together. None: the process is in none.
        cgroup: The number of that cgroup. 0: none.
    """

    uuid: str
    total: int
    need: int | None = None
    user_total: int | None = None
    min_free: int = 0
    overhead: int = 0
    wall: int | None = None
    cgroup: int = 0

    @property
    def is_bounded(self) -> bool:
        """Whether the process shares a bound on the card with other processes of its user, or of its cgroup."""
        return self.user_total is not None or self.wall is not None


@frozen
class GpuRequest:
    """The GPUs a process asks for.

    Attributes:
        uid: The user of the process.
        candidates: The GPUs it may have.
        count: How many of them it asks for.
        fixed: It has these GPUs anyway, and only the user's total counts.
        ancestor_leases: Ids of the leases of its ancestors. It cannot wait for these: they may be waiting for it.
        cgroups: The numbers of the cgroups that it is in. (): the driver limits none of them.
    """

    uid: int
    candidates: tuple[Candidate, ...]
    count: int
    fixed: bool = False
    ancestor_leases: frozenset[str] = frozenset()
    cgroups: tuple[int, ...] = ()

    @property
    def overhead(self) -> int:
        """Bytes that it takes of each GPU beside its limit."""
        return max((candidate.overhead for candidate in self.candidates), default=0)


def request_from_plan(
    plan: Plan, uid: int, ancestor_leases: Iterable[str] = (), overhead: int = 0
) -> GpuRequest | None:
    """Make the request of a process that follows the plan. None: it is not known which GPUs these are, or how large.

    Args:
        plan: The plan.
        uid: The user of the process.
        ancestor_leases: Ids of the leases of its ancestors.
        overhead: Bytes of each GPU that the process takes beside its limit.
    """
    candidates = [_make_candidate(device, plan.choosing, overhead) for device in plan.devices or ()]
    known = tuple(candidate for candidate in candidates if candidate is not None)
    if not known or len(known) < len(candidates):
        return None
    count = len(known) if plan.choosing is None else plan.choosing.count
    walls = [device.device.wall for device in plan.devices or () if device.device is not None]
    return GpuRequest(
        uid,
        known,
        count,
        fixed=plan.choosing is None,
        ancestor_leases=frozenset(ancestor_leases),
        cgroups=next((wall.chain for wall in walls if wall is not None), ()),
    )


def _make_candidate(planned: PlannedDevice, choosing: AutoChoice | None, overhead: int) -> Candidate | None:
    device, reported = planned.device, planned.total
    if device is None or reported is None:
        return None
    need = planned.limit.on(reported) if planned.limit is not None else None
    if need is None and planned.logical_devices:
        need = sum(size.on(reported) or 0 for size in planned.logical_devices)
    total = reported if device.card_total is None else device.card_total
    user_total = planned.user_total.on(total) if planned.user_total is not None else None
    least = choosing.min_free.on(total) if choosing is not None and choosing.min_free is not None else 0
    need = None if need is None else min(need, total)
    wall = device.wall
    return Candidate(
        device.uuid,
        total,
        need,
        user_total,
        least or 0,
        overhead,
        None if wall is None else wall.limit,
        0 if wall is None else wall.cgroup_id,
    )
