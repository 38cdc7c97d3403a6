"""Which card of the Plan is which of those that CUDA shows, told by UUID. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tfenv.errors import Finding
from tfenv.policy.model import MemoryLimit, Plan, PlannedDevice, get_uuid_digits
from tfenv.policy.units import format_limit
from tfenv.values import frozen


@frozen
class Placement:
    """Which card of the Plan each listed GPU is.

    Attributes:
        devices: The cards by CUDA ordinal. A GPU that is left out is not allowed. None: the GPUs cannot be told
            apart, and are taken in their order.
        remark: What does not fit. None: everything does.
    """

    devices: Mapping[int, PlannedDevice] | None
    remark: Finding | None = None


def place(
    plan: Plan,
    ordinals: Sequence[int],
    uuids: Sequence[str] | None,
    replan: Callable[[Mapping[str, str]], Plan],
    title: str,
) -> Placement:
    """Find each listed GPU in the Plan.

    Args:
        plan: What this process may use.
        ordinals: The GPUs that the framework lists.
        uuids: The UUIDs of all GPUs that CUDA shows, by ordinal, as hex digits. None: unknown.
        replan: Makes the Plan anew with the UUIDs of tokens: of those of its cards, where it does not know all of them,
            and of the UUIDs themselves, where it leaves all cards visible.
        title: The framework's name, for messages.
    """
    listed = len(ordinals)
    if uuids is None or any(ordinal >= len(uuids) for ordinal in ordinals):
        return Placement(None, _compare_counts(plan, listed, title))
    shown = [_format_uuid(digits) for digits in uuids]
    if plan.devices is None:
        devices = replan({shown[ordinal]: shown[ordinal] for ordinal in ordinals}).devices or ()
        return Placement(dict(zip(ordinals, devices, strict=False)) if len(devices) == listed else None)
    if len(shown) == len(plan.devices) and not _knows_all(plan.devices):
        plan = replan({device.token: uuid for device, uuid in zip(plan.devices, shown, strict=True)})
    allowed = plan.devices or ()
    if not _knows_all(allowed):
        return Placement(None, _compare_counts(plan, listed, title))
    planned = {get_uuid_digits(device.device.uuid): device for device in allowed if device.device is not None}
    found = {ordinal: planned[uuids[ordinal]] for ordinal in ordinals if uuids[ordinal] in planned}
    return Placement(found or None, _report_difference(len(allowed), len(found), listed, title))


def report_unknown_memory(plan: Plan, placement: Placement) -> Finding | None:
    """Report a size and a share that hold together on a card whose memory neither NVML nor CUDA tells.

    Args:
        plan: What this process may use.
        placement: Which card is which.

    Returns:
        None: there is no such card. What of the limit is applied to one is the size.
    """
    devices = plan.devices if placement.devices is None else tuple(placement.devices.values())
    limits = (plan.limit,) if devices is None else tuple(d.limit for d in devices if d.total is None)
    limit = next((limit for limit in limits if limit is not None and limit.mixed), None)
    if limit is None:
        return None
    size, share = MemoryLimit(bytes=limit.bytes), MemoryLimit(fraction=limit.fraction)
    text = f"at most {format_limit(size)} is applied: neither NVML nor CUDA says how much memory the card has"
    return Finding("unknown-memory", f"{text}, so {format_limit(share)} of it cannot be computed; write both as sizes")


def _knows_all(devices: Sequence[PlannedDevice]) -> bool:
    """Return whether each card is known, and not only its token. Two tokens of one card are not."""
    known = {device.device.uuid for device in devices if device.device is not None}
    return len(known) == len(devices)


def _format_uuid(digits: str) -> str:
    return "-".join(("GPU", digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _compare_counts(plan: Plan, listed: int, title: str) -> Finding | None:
    if plan.devices is None or listed == len(plan.devices):
        return None
    return _report_difference(len(plan.devices), min(listed, len(plan.devices)), listed, title)


def _report_difference(allowed: int, found: int, listed: int, title: str) -> Finding | None:
    if found < listed:
        others, them = ("1 GPU", "it") if listed - found == 1 else (f"{listed - found} GPUs", "them")
        text = f"{title} lists {others} that the policy does not allow"
        return Finding("too-late", f"{text}, because something opened CUDA before tfenv could hide {them}")
    if 0 < found < allowed:
        # TensorFlow ignores cards that are too old or too small. A driver may lack some of those NVML shows.
        return Finding("fewer-gpus", f"{title} lists {found} of the {allowed} GPUs the policy allows", "warning")
    return None
