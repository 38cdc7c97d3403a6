"""From a policy to what this process may do on this machine: EffectivePolicy, Grant, Inventory -> Plan.

Pure: the same values give the same Plan, with or without a GPU. `visibility` says which GPUs, `limits` how much
of each; every value of the Plan comes with the keys that say so.
"""

from __future__ import annotations

from collections.abc import Sequence

from tfenv.policy.clamps import Notes
from tfenv.policy.device_set import DeviceSet, granted, keep_valid_tokens
from tfenv.policy.limits import allocator, growth, limit_on, mixes_sizes_and_shares, planned, position, rules
from tfenv.policy.model import Allocation, AutoChoice, EffectivePolicy, Grant, Inventory, Plan
from tfenv.policy.visibility import (
    decide_visible_devices,
    governs_visibility,
    needs_inventory,
    shown_before_choice,
    shown_together,
)
from tfenv.values import replace

__all__ = ["NO_GPU", "governs_visibility", "needs_inventory", "resolve", "keep_valid_tokens"]

#: The value of CUDA_VISIBLE_DEVICES that hides every GPU; "" does too, but some readers take it for unset.
NO_GPU = "-1"


def resolve(
    policy: EffectivePolicy,
    grant: Grant,
    inventory: Inventory,
    request: Sequence[str] | None = None,
    allocations: Sequence[Allocation] | None = None,
) -> Plan:
    """Decide what this process may use.

    Args:
        policy: The merged policy.
        grant: What the scheduler or the parent gave.
        inventory: The machine's GPUs; without them visibility by position and limits in bytes still work.
        request: Tokens the program itself wrote into CUDA_VISIBLE_DEVICES after it started; None: none.
        seats: The places this process was given on GPUs it shares with others; None: not yet, or there is no need.

    Returns:
        The Plan; it never allows more than the grant and the ceilings do.
    """
    notes = Notes()
    governed = governs_visibility(policy) or (allocations is not None and not allocations)
    addressable, device_set, choosing = _resolve_visibility(policy, grant, inventory, request, allocations, notes)
    shown = device_set if choosing is None else shown_before_choice(device_set, policy)
    devices = tuple(planned(card, position(card, addressable), policy, notes, allocations) for card in device_set.cards)
    default, default_by = limit_on(policy, None, None, notes if device_set.unbounded else Notes())
    grows, grown_by = growth(policy, notes)
    limited_by = tuple(dict.fromkeys(origin for device in devices for origin in device.limited_by)) or default_by
    allocates, allocated_by = allocator(policy, limited_by, notes)
    return Plan(
        visible=_visible_value(shown) if governed and not shown.unbounded else None,
        pci_order=_sets_order(policy, grant, request, governed=governed and bool(shown.cards)),
        devices=None if device_set.unbounded else devices,
        limit=default,
        growth=grows,
        allocator=allocates,
        findings=tuple(dict.fromkeys(notes.findings)),
        machine_count=None if inventory.devices is None else len(inventory.devices),
        limited_by=default_by,
        grown_by=grown_by,
        allocated_by=allocated_by,
        choosing=choosing,
    )


def _resolve_visibility(
    policy: EffectivePolicy,
    grant: Grant,
    inventory: Inventory,
    request: Sequence[str] | None,
    allocations: Sequence[Allocation] | None,
    notes: Notes,
) -> tuple[DeviceSet, DeviceSet, AutoChoice | None]:
    """Where positions count, the GPUs the process may see, and how it chooses among them; None: it does not."""
    choosing: AutoChoice | None = None
    if governs_visibility(policy):
        addressable, device_set, choosing = decide_visible_devices(
            policy, grant, inventory, request, allocations, notes
        )
        device_set = device_set if choosing is not None else shown_together(device_set, policy, notes)
    else:
        addressable = device_set = _ungoverned_devices(policy, grant, inventory, request)
    others_left_nothing = allocations is not None and not allocations
    return addressable, device_set.restrict(()) if others_left_nothing else device_set, choosing


def _visible_value(device_set: DeviceSet) -> str:
    return ",".join(card.token for card in device_set.cards) or NO_GPU


def _ungoverned_devices(
    policy: EffectivePolicy, grant: Grant, inventory: Inventory, request: Sequence[str] | None
) -> DeviceSet:
    """What CUDA will show by itself: the program's own value where it set one, otherwise the grant."""
    current = grant if request is None else replace(grant, tokens=tuple(request))
    if instance := next((card for card in granted(current, inventory).cards if card.is_instance), None):
        return DeviceSet((instance,))  # CUDA shows it alone, whatever stands before it
    ordered = current.pci_order or _sets_order(policy, current, request, governed=False)
    if current.tokens is None and not ordered and len({d.name for d in inventory.devices or ()}) > 1:
        # CUDA puts the fastest first: which of the unlike cards is GPU:0 cannot be told.
        return DeviceSet(unbounded=True)
    return granted(current, inventory)


def _sets_order(policy: EffectivePolicy, grant: Grant, request: Sequence[str] | None, *, governed: bool) -> bool:
    """Numbers we write are nvidia-smi's; under an inherited list the order is part of that list."""
    by_identity = (
        any(rule.match.kind != "position" for rule in rules(policy))
        or mixes_sizes_and_shares(policy)
        or any(ceiling.key == "memory_total" for ceiling in policy.ceilings)  # leases are by UUID
    )
    return grant.tokens is None and (governed or (by_identity and request is None))
