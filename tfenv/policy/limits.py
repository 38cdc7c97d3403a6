"""How much of each GPU a process may take: limits, splits, growth, the allocator. Pure.

The tightest limit holds, and its key is remembered: a record names what held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from tfenv.policy.clamps import Notes, layer_sort_key
from tfenv.policy.device_set import Card, DeviceSet, matches
from tfenv.policy.model import (
    Allocation,
    Allocator,
    CeilingKey,
    DeviceRule,
    EffectivePolicy,
    MemoryLimit,
    Origin,
    PlannedDevice,
    format_origins,
)
from tfenv.policy.units import format_limit

__all__ = [
    "LimitWithOrigins",
    "allocator",
    "growth",
    "limit_on",
    "mixes_sizes_and_shares",
    "planned",
    "position",
    "rules",
]


#: The limit on one GPU (None: unlimited), and the keys that say so.
LimitWithOrigins = tuple[MemoryLimit | None, tuple[Origin, ...]]
#: One limit somebody declared, and where.
_Bound = tuple[MemoryLimit, Origin]


def _tightest(limits: Sequence[MemoryLimit], total: int | None) -> MemoryLimit | None:
    """The smallest of the limits; bytes and fractions compare only where the card's total is known."""
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


def _holders(limit: MemoryLimit, bounds: Sequence[_Bound]) -> tuple[Origin, ...]:
    """The first key that says the size, and the first that says the share."""
    size = [origin for bound, origin in bounds if limit.bytes is not None and bound.bytes == limit.bytes]
    share = [origin for bound, origin in bounds if limit.fraction is not None and bound.fraction == limit.fraction]
    return tuple(dict.fromkeys([*size[:1], *share[:1]]))


def rules(policy: EffectivePolicy) -> tuple[DeviceRule, ...]:
    """The `[[gpu.device]]` entries."""
    setting = policy.settings.get("device")
    return cast("tuple[DeviceRule, ...]", setting.value) if setting is not None else ()


def _rule_for(card: Card, place: int, policy: EffectivePolicy) -> DeviceRule | None:
    for rule in rules(policy):
        if matches(rule.match, place, card, machine_numbers=rule.origin.layer == "machine"):
            return rule
    return None


def _wished_limit(policy: EffectivePolicy, rule: DeviceRule | None) -> _Bound | None:
    if rule is not None and rule.memory_limit is not None:
        return rule.memory_limit, rule.origin
    setting = policy.settings.get("memory_limit")
    return (cast(MemoryLimit, setting.value), setting.origin) if setting is not None else None


def _is_above(wish: MemoryLimit, limit: MemoryLimit, total: int | None) -> bool:
    """Whether the wish is surely larger; without the card's total a size and a share do not compare."""
    halves = (MemoryLimit(bytes=limit.bytes), MemoryLimit(fraction=limit.fraction))
    if limit.bytes is not None and limit.fraction is not None and wish in halves:
        return False
    return wish != limit and (wish.unlimited or wish.on(total) != limit.on(total) or wish.on(total) is None)


def _memory_ceilings(policy: EffectivePolicy) -> list[_Bound]:
    """No process may take more than all of its user's processes together."""
    return _bounds(policy, "memory_limit", "memory_total")


def _bounds(policy: EffectivePolicy, *keys: CeilingKey) -> list[_Bound]:
    ceilings = sorted((c for c in policy.ceilings if c.key in keys), key=layer_sort_key)
    return [(cast(MemoryLimit, ceiling.value), ceiling.origin) for ceiling in ceilings]


def limit_on(policy: EffectivePolicy, rule: DeviceRule | None, total: int | None, notes: Notes) -> LimitWithOrigins:
    """The tightest limit on a GPU of `total` bytes (None: unknown) that this rule is about (None: no rule is)."""
    wish = _wished_limit(policy, rule)
    bounds = [*_memory_ceilings(policy), *([wish] if wish is not None else [])]
    limit = _tightest([bound for bound, _ in bounds], total)
    if limit is None:
        return None, ()
    holders = _holders(limit, bounds)
    if wish is not None and _is_above(wish[0], limit, total):
        text = f"{format_limit(wish[0])} is above the ceiling of {format_limit(limit)} from {format_origins(holders)}"
        notes.clamped(text, wish[1], asked_by=wish[1], held_by=holders)
    return limit, holders


def _fit(parts: Sequence[MemoryLimit], limit: MemoryLimit | None, total: int | None) -> tuple[MemoryLimit, ...]:
    """The split, scaled down where its sum passes the limit (or the card)."""
    sizes = [size for part in parts if (size := part.on(total)) is not None]
    if len(sizes) != len(parts):
        return tuple(parts)
    bound = limit.on(total) if limit is not None else total
    if bound is None or sum(sizes) <= bound:
        return tuple(MemoryLimit(bytes=size) for size in sizes)
    return tuple(MemoryLimit(bytes=size * bound // sum(sizes)) for size in sizes)


def position(card: Card, addressable: DeviceSet) -> int:
    """A position means the same GPU in every key: its place in the room, not among the visible."""
    if card in addressable.cards:
        return addressable.cards.index(card)
    return int(card.token) if card.token.isdigit() else -1


def _left_for_us(
    limit_with_origins: LimitWithOrigins,
    allocation: Allocation | None,
    total: int | None,
    policy: EffectivePolicy,
    notes: Notes,
) -> LimitWithOrigins:
    """The limit within what the user's other processes leave of `memory_total`."""
    limit, limited_by = limit_with_origins
    totals = _bounds(policy, "memory_total")
    if allocation is None or allocation.limit is None or limit is None or not totals:
        return limit_with_origins
    left = _tightest([limit, MemoryLimit(bytes=allocation.limit)], total)
    if left is None or left.on(total) == limit.on(total):
        return limit_with_origins
    holders = tuple(dict.fromkeys([totals[0][1], *(limited_by if left.fraction is not None else ())]))
    text = f"{format_limit(limit)} is above the {format_limit(left)} that the user's other processes leave"
    asked_by = limited_by[0] if limited_by else None
    notes.clamped(text, holders[0], asked_by=asked_by, held_by=holders)
    return left, holders


def planned(
    card: Card, place: int, policy: EffectivePolicy, notes: Notes, allocations: Sequence[Allocation] | None = None
) -> PlannedDevice:
    """What the policy says of one GPU.

    Args:
        card: The GPU.
        place: Its position, as selectors count.
        policy: The merged policy.
        notes: Where clamps are noted.
        seats: The places this process was given among others; None: not yet, or there is no need.
    """
    total = card.device.total if card.device is not None else None
    rule = _rule_for(card, place, policy)
    allocation = next((allocation for allocation in allocations or () if allocation.uuid == card.identity), None)
    limit, limited_by = _left_for_us(limit_on(policy, rule, total, notes), allocation, total, policy, notes)
    parts = rule.logical_devices if rule is not None else ()
    fitted = _fit(parts, limit, total)
    if rule is not None and parts and sum(p.bytes or 0 for p in fitted) < sum(p.on(total) or 0 for p in parts):
        addressable = "the card" if limit is None else format_limit(limit)
        text = f"logical_devices are scaled down to fit {addressable}"
        notes.clamped(text, rule.origin, asked_by=rule.origin, held_by=limited_by or addressable)
    user_total = _tightest([bound for bound, _ in _bounds(policy, "memory_total")], total)
    return PlannedDevice(card.token, card.device, limit, fitted, limited_by, user_total)


def mixes_sizes_and_shares(policy: EffectivePolicy) -> bool:
    """Whether it takes the card to tell which limit is the smallest."""
    found = [bound for bound, _ in _memory_ceilings(policy)]
    wish = _wished_limit(policy, None)
    limits = [*found, wish[0]] if wish is not None else found
    shares = [limit for limit in limits if limit.fraction is not None and limit.fraction < 1]
    return bool(shares) and any(limit.bytes is not None for limit in limits)


# ---- growth and allocator


def growth(policy: EffectivePolicy, notes: Notes) -> tuple[bool | None, Origin | None]:
    """Whether memory grows on demand (None: nobody says), and the key that says so."""
    setting = policy.settings.get("memory_growth")
    required = [c for c in policy.ceilings if c.key == "require_memory_growth" and c.value is True]
    if not required:
        return (cast(bool, setting.value), setting.origin) if setting is not None else (None, None)
    holder = min(required, key=layer_sort_key).origin
    if setting is not None and setting.value is False:
        text = f"growth stays on: required by {holder}"
        notes.clamped(text, setting.origin, asked_by=setting.origin, held_by=(holder,))
    return True, holder


def allocator(
    policy: EffectivePolicy, limited_by: tuple[Origin, ...], notes: Notes
) -> tuple[Allocator | None, tuple[Origin, ...]]:
    """The allocator (None: nobody says), and the keys that say so.

    Args:
        policy: The merged policy.
        limited_by: The keys that limit memory: the cuda_malloc allocators keep no limit, so one implies bfc.
        notes: Where a clamp is noted.
    """
    setting = policy.settings.get("allocator")
    wish = cast(Allocator, setting.value) if setting is not None else None
    own = (setting.origin,) if setting is not None else ()
    if not limited_by:
        return wish, own
    if setting is not None and wish != "bfc":
        text = f'allocator "{wish}" does not keep a memory limit: "bfc" is used'
        notes.clamped(text, setting.origin, asked_by=setting.origin, held_by=limited_by)
    return "bfc", limited_by
