"""How much of each GPU a process may take: limits, splits, growth, the allocator. Pure.

The tightest limit holds. The Plan keeps its key, so that a record can name what held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from tfenv.policy.clamps import FindingCollector
from tfenv.policy.device_set import Card, DeviceSet, matches_card
from tfenv.policy.model import (
    Allocation,
    Allocator,
    CeilingKey,
    Device,
    DeviceRule,
    EffectivePolicy,
    MemoryLimit,
    Origin,
    PlanInputs,
    PlannedDevice,
    Wall,
    format_origins,
)
from tfenv.policy.units import format_limit, format_requested_limit
from tfenv.values import frozen

#: Percentages are sums of binary fractions: 10% three times is a little more than 30%.
_ROUNDING = 1e-9

#: One limit, and where it was set.
_Bound = tuple[MemoryLimit, Origin]


def find_tightest(limits: Sequence[MemoryLimit], total: int | None) -> MemoryLimit | None:
    """Find the smallest limit. Bytes and fractions compare only where the card's total is known."""
    sizes = [limit.bytes for limit in limits if limit.bytes is not None]
    fractions = [limit.fraction for limit in limits if limit.fraction is not None]
    if not sizes and not fractions:
        return None
    both = MemoryLimit(bytes=min(sizes, default=None), fraction=min(fractions, default=None))
    if both.bytes is None or both.fraction is None:
        return both
    if total is None:
        # All of a card is no limit beside a size, whatever the card.
        return MemoryLimit(bytes=both.bytes) if both.fraction >= 1 else both
    return MemoryLimit(bytes=both.bytes) if both.on(total) == both.bytes else MemoryLimit(fraction=both.fraction)


def is_sum_above(amounts: Sequence[MemoryLimit], bound: MemoryLimit, total: int | None) -> bool:
    """Return whether amounts are together larger than a bound.

    Args:
        amounts: Sizes and shares.
        bound: What they are to fit.
        total: The card's memory in bytes. None: unknown, and sizes and shares are compared apart.
    """
    if bound.unlimited or bound.granted:
        return False
    sizes = sum(amount.bytes for amount in amounts if amount.bytes is not None)
    shares = sum(amount.fraction for amount in amounts if amount.fraction is not None)
    if total is not None:
        return sizes + int(total * shares) > (bound.on(total) or 0)
    return bool(bound.bytes is not None and sizes > bound.bytes) or bool(
        bound.fraction is not None and shares > bound.fraction + _ROUNDING
    )


def _find_holders(limit: MemoryLimit, bounds: Sequence[_Bound]) -> tuple[Origin, ...]:
    """Return the first key that sets the limit's size, and the first that sets its share."""
    size = [origin for bound, origin in bounds if limit.bytes is not None and bound.bytes == limit.bytes]
    share = [origin for bound, origin in bounds if limit.fraction is not None and bound.fraction == limit.fraction]
    return tuple(dict.fromkeys([*size[:1], *share[:1]]))


def get_device_rules(policy: EffectivePolicy) -> tuple[DeviceRule, ...]:
    """Return the `[[gpu.device]]` entries in the order of the file. The first that matches a GPU counts."""
    setting = policy.settings.get("device")
    return cast("tuple[DeviceRule, ...]", setting.value) if setting is not None else ()


def _get_requested_limit(policy: EffectivePolicy, rule: DeviceRule | None) -> _Bound | None:
    if rule is not None and rule.memory_limit is not None:
        return rule.memory_limit, rule.origin
    setting = policy.settings.get("memory_limit")
    return (cast(MemoryLimit, setting.value), setting.origin) if setting is not None else None


def _is_above(requested: MemoryLimit, limit: MemoryLimit, total: int | None) -> bool:
    """Return whether a request is certainly larger. A size and a share do not compare without the card's total."""
    halves = (MemoryLimit(bytes=limit.bytes), MemoryLimit(fraction=limit.fraction))
    if limit.bytes is not None and limit.fraction is not None and requested in halves:
        return False
    unequal = requested.on(total) != limit.on(total) or requested.on(total) is None
    return requested != limit and (requested.unlimited or unequal)


def _list_bounds(policy: EffectivePolicy, *keys: CeilingKey) -> list[_Bound]:
    return [(cast(MemoryLimit, ceiling.value), ceiling.origin) for ceiling in policy.list_ceilings(*keys)]


def _list_memory_ceilings(policy: EffectivePolicy, device: Device | None = None) -> list[_Bound]:
    # No process may take more than all processes of its user together.
    bounds = [*_list_bounds(policy, "memory_limit"), *_list_user_totals(policy, device)]
    if device is not None and device.wall is not None:
        bounds.append((MemoryLimit(bytes=_fit_below(device.wall, policy.process_overhead)), device.wall.origin))
    return bounds


def _list_user_totals(policy: EffectivePolicy, device: Device | None) -> list[_Bound]:
    """Return the values of `memory_total`. They are shares of the whole card, even if the driver limits a cgroup.

    The driver's limit may come from this key. A share of it would be a share of a share.
    """
    totals = _list_bounds(policy, "memory_total")
    if device is None or device.wall is None or device.card_total is None:
        return totals
    return [
        (bound if bound.fraction is None else MemoryLimit(bytes=bound.on(device.card_total)), origin)
        for bound, origin in totals
    ]


def _fit_below(wall: Wall, overhead: int) -> int:
    """Return the bytes to limit a process to, so that it is refused by its framework and not by the driver.

    What a process takes beside its limit counts for the driver, too. Where that leaves little, half of the limit is for
    the framework.
    """
    return max(wall.limit - overhead, wall.limit // 2)


@frozen
class LimitOnGpu:
    """What a process may take of one GPU.

    Attributes:
        limit: The tightest limit. None: unlimited.
        limited_by: The keys that set it.
        asked: What a file of a user or project asked for, if that is more. None: no file did.
    """

    limit: MemoryLimit | None = None
    limited_by: tuple[Origin, ...] = ()
    asked: MemoryLimit | None = None


def compute_limit(
    policy: EffectivePolicy,
    rule: DeviceRule | None,
    total: int | None,
    findings: FindingCollector,
    device: Device | None = None,
) -> LimitOnGpu:
    """Compute the tightest limit on a GPU.

    Args:
        policy: The merged policy.
        rule: The entry of `[[gpu.device]]` that counts for it. None: none does.
        total: Its memory in bytes, as CUDA reports it. None: unknown.
        findings: What was clamped.
        device: The GPU. None: it is not known which one it is.
    """
    requested = _get_requested_limit(policy, rule)
    bounds = [*_list_memory_ceilings(policy, device), *([requested] if requested is not None else [])]
    limit = find_tightest([bound for bound, _ in bounds], total)
    if limit is None:
        return LimitOnGpu()
    holders = _find_holders(limit, bounds)
    if requested is None or not _is_above(requested[0], limit, total):
        return LimitOnGpu(limit, holders)
    asked, given = format_requested_limit(requested[0]), format_limit(limit)
    text = f"{asked} is above the ceiling of {given} from {format_origins(holders)}"
    wish = (f"memory_limit = {asked}", given)
    clamp = findings.add_clamp(text, requested[1], asked_by=requested[1], held_by=holders, wish=wish)
    return LimitOnGpu(limit, holders, requested[0] if clamp.is_lost_wish else None)


def fit_split(parts: Sequence[MemoryLimit], limit: MemoryLimit | None, total: int | None) -> tuple[MemoryLimit, ...]:
    """Scale a split down where its sum passes the limit, or else the card's memory."""
    sizes = [size for part in parts if (size := part.on(total)) is not None]
    if len(sizes) != len(parts):
        return tuple(parts)
    bound = limit.on(total) if limit is not None else total
    if bound is None or sum(sizes) <= bound:
        return tuple(MemoryLimit(bytes=size) for size in sizes)
    return tuple(MemoryLimit(bytes=size * bound // sum(sizes)) for size in sizes)


def _apply_allocation(
    declared: LimitOnGpu,
    allocation: Allocation | None,
    total: int | None,
    policy: EffectivePolicy,
    findings: FindingCollector,
    device: Device | None,
) -> LimitOnGpu:
    """Cut the limit to what other processes leave of the user's `memory_total` and of the cgroup's limit."""
    limit, limited_by = declared.limit, declared.limited_by
    wall = None if device is None else device.wall
    totals = [origin for _, origin in _list_bounds(policy, "memory_total")] + ([] if wall is None else [wall.origin])
    if allocation is None or allocation.limit is None or limit is None or not totals:
        return declared
    left = find_tightest([limit, MemoryLimit(bytes=allocation.limit)], total)
    if left is None or left.on(total) == limit.on(total):
        return declared
    holders = tuple(dict.fromkeys([totals[0], *(limited_by if left.fraction is not None else ())]))
    asked, given = format_limit(limit), format_limit(left)
    whose = "user" if wall is None else "cgroup"
    text = f"{asked} is above the {given} that the {whose}'s other processes leave"
    asked_by = limited_by[0] if limited_by else None
    wish = (f"memory_limit = {asked}", given)
    clamp = findings.add_clamp(text, holders[0], asked_by=asked_by, held_by=holders, wish=wish)
    return LimitOnGpu(left, holders, declared.asked or (limit if clamp.is_lost_wish else None))


def plan_device(card: Card, addressable: DeviceSet, inputs: PlanInputs, findings: FindingCollector) -> PlannedDevice:
    """Decide what the process may take of one GPU. The card's position in `addressable` is the same in every key."""
    policy = inputs.policy
    if card in addressable.cards:
        position = addressable.cards.index(card)
    else:
        position = int(card.token) if card.token.isdigit() else -1
    cuda_total = inputs.inventory.find_cuda_total(card.token, card.device)
    total = PlannedDevice(card.token, card.device, cuda_total=cuda_total).total
    rules = (rule for rule in get_device_rules(policy) if matches_card(rule.match, rule.origin, card, position))
    rule = next(rules, None)
    allocations = inputs.allocations or ()
    allocation = next((allocation for allocation in allocations if allocation.uuid == card.identity), None)
    declared = compute_limit(policy, rule, total, findings, card.device)
    found = _apply_allocation(declared, allocation, total, policy, findings, card.device)
    fitted, asked = _split(rule, found, total, findings)
    user_total = find_tightest([bound for bound, _ in _list_user_totals(policy, card.device)], total)
    return PlannedDevice(card.token, card.device, found.limit, fitted, found.limited_by, user_total, cuda_total, asked)


def _split(
    rule: DeviceRule | None, found: LimitOnGpu, total: int | None, findings: FindingCollector
) -> tuple[tuple[MemoryLimit, ...], MemoryLimit | None]:
    """Return the logical devices as they fit the limit, and what a file asked for of the GPU and did not get."""
    parts = rule.logical_devices if rule is not None else ()
    fitted = fit_split(parts, found.limit, total)
    wanted = sum(part.on(total) or 0 for part in parts)
    if rule is None or sum(part.bytes or 0 for part in fitted) >= wanted:
        return fitted, found.asked
    bound = "the card" if found.limit is None else format_limit(found.limit)
    clamp = findings.add_clamp(
        f"logical_devices are scaled down to fit {bound}",
        rule.origin,
        asked_by=rule.origin,
        held_by=found.limited_by or bound,
        wish=(f"logical_devices = {_join_limits(parts)}", _join_limits(fitted)),
    )
    return fitted, found.asked or (MemoryLimit(bytes=wanted) if clamp.is_lost_wish else None)


def _join_limits(limits: Sequence[MemoryLimit]) -> str:
    return ", ".join(map(format_limit, limits))


def mixes_sizes_and_shares(policy: EffectivePolicy) -> bool:
    """Return whether only the card can tell which of the policy's limits is the smallest."""
    requested = _get_requested_limit(policy, None)
    limits = [bound for bound, _ in (*_list_memory_ceilings(policy), *([requested] if requested is not None else []))]
    shares = [limit for limit in limits if limit.granted or (limit.fraction is not None and limit.fraction < 1)]
    return bool(shares) and any(limit.bytes is not None for limit in limits)


# ---- growth and allocator


def decide_growth(policy: EffectivePolicy, findings: FindingCollector) -> tuple[bool | None, Origin | None]:
    """Decide whether memory grows on demand.

    Returns:
        The answer, and the key that gives it. None, None: no key does.
    """
    setting = policy.settings.get("memory_growth")
    required = [ceiling.origin for ceiling in policy.list_ceilings("require_memory_growth") if ceiling.value is True]
    if not required:
        return (cast(bool, setting.value), setting.origin) if setting is not None else (None, None)
    if setting is not None and setting.value is False:
        text, origin = f"growth stays on: required by {required[0]}", setting.origin
        findings.add_clamp(text, origin, asked_by=origin, held_by=required[:1], wish=("memory_growth = false", "true"))
    return True, required[0]


def decide_allocator(
    policy: EffectivePolicy, limited_by: tuple[Origin, ...], findings: FindingCollector
) -> tuple[Allocator | None, tuple[Origin, ...]]:
    """Decide which allocator the framework uses.

    The cuda_malloc allocators keep no limit, so that a limit implies bfc. `limited_by` are the keys that limit memory.

    Returns:
        The allocator, and the keys that set it. None, (): no key does.
    """
    setting = policy.settings.get("allocator")
    requested = cast(Allocator, setting.value) if setting is not None else None
    if not limited_by:
        return requested, (setting.origin,) if setting is not None else ()
    if setting is not None and requested != "bfc":
        text = f'allocator "{requested}" does not keep a memory limit: "bfc" is used'
        origin = setting.origin
        findings.add_clamp(text, origin, asked_by=origin, held_by=limited_by, wish=(f"allocator = {requested}", "bfc"))
    return "bfc", limited_by
