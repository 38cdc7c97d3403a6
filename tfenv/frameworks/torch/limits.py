"""What PyTorch may take of each GPU, as the fraction that its allocator keeps. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tfenv.policy.model import DeviceOutcome, MemoryLimit, Plan, PlannedDevice
from tfenv.values import frozen


@frozen
class GpuLimit:
    """One GPU that PyTorch lists, and what the policy lets it take.

    Attributes:
        ordinal: As CUDA counts in this process.
        planned: What the plan says of it. None: it is not allowed.
        total: Its memory in bytes. None: unknown.
    """

    ordinal: int
    planned: PlannedDevice | None = None
    total: int | None = None

    @property
    def fraction(self) -> float | None:
        """The most of the GPU that PyTorch may take, in 0..1. None: its size has to be known for that."""
        if self.planned is None:
            return 0.0
        return compute_fraction(self.planned.limit, self.total, self.planned.card_total)


def compute_fraction(limit: MemoryLimit | None, total: int | None, card_total: int | None = None) -> float | None:
    """Return a limit as a fraction of a card.

    PyTorch rounds the fraction of its total to whole bytes, so it is computed from whole bytes. Its total is the whole
    card's, also where CUDA reports the limit of a cgroup.

    Args:
        limit: The limit. None: unlimited.
        total: The card's memory in bytes, of which a share is meant. None: unknown.
        card_total: That of the whole card. None: `total` is that.

    Returns:
        1.0 where the card cannot reach the limit. None: the limit is a size, and nobody knows the card's.
    """
    if limit is None or limit.unlimited:
        return 1.0
    size = limit.on(total)
    if size is None or not total:
        return limit.fraction
    return min(1.0, size / (card_total or total))


def find_smallest(fractions: Iterable[float | None]) -> float:
    """Return the smallest of the fractions that are known. 1.0 means that none is below it."""
    return min((fraction for fraction in fractions if fraction is not None), default=1.0)


def make_limits(
    plan: Plan, ordinals: Sequence[int], planned: Mapping[int, PlannedDevice] | None
) -> tuple[GpuLimit, ...]:
    """Bring the plan to the GPUs that PyTorch lists.

    Args:
        plan: What this process may use.
        ordinals: The GPUs that PyTorch lists.
        planned: Which of them is which of the plan's. None: unknown, they are taken in their order.
    """
    known = {ordinal: plan.find_device(ordinal) for ordinal in ordinals} if planned is None else planned
    return tuple(
        GpuLimit(ordinal, known.get(ordinal), known[ordinal].total if ordinal in known else None)
        for ordinal in ordinals
    )


def describe_devices(limits: Iterable[GpuLimit]) -> tuple[DeviceOutcome, ...]:
    """Describe what each GPU was given, for the record. GPUs that are not allowed are left out."""
    return tuple(_describe_device(gpu, gpu.planned) for gpu in limits if gpu.planned is not None)


def _describe_device(gpu: GpuLimit, planned: PlannedDevice) -> DeviceOutcome:
    limit = planned.limit
    return planned.describe(
        gpu.ordinal,
        gpu.total,
        limit=limit.on(gpu.total) if limit is not None else None,
        fraction=limit.fraction if limit is not None and limit.bytes is None else None,
    )
