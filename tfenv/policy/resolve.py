"""From a policy to what this process may do on this machine: EffectivePolicy, Grant, Inventory -> Plan.

Pure: the same values give the same Plan, with or without a GPU. `visibility` decides which GPUs, `limits` how much
of each. Every value of the Plan comes with the keys that set it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tfenv.policy.clamps import FindingCollector
from tfenv.policy.limits import compute_limit, decide_allocator, decide_growth, plan_device
from tfenv.policy.model import Allocation, EffectivePolicy, Grant, Inventory, Plan, PlanInputs
from tfenv.policy.shares import apply_share
from tfenv.policy.visibility import (
    decide_visibility,
    governs_visibility,
    limit_before_choice,
    sets_pci_order,
)

#: The value of CUDA_VISIBLE_DEVICES that hides every GPU. "" does too, but some readers take it for unset.
NO_GPU = "-1"


def resolve(
    policy: EffectivePolicy,
    grant: Grant,
    inventory: Inventory,
    request: Sequence[str] | None = None,
    allocations: Sequence[Allocation] | None = None,
) -> Plan:
    """Decide what this process may use. Never allow more than the grant and the ceilings do.

    Without an inventory visibility by position and limits in bytes still work. `PlanInputs` describes the arguments.
    """
    findings, missing_shares = FindingCollector(), FindingCollector()
    policy, share = apply_share(policy, grant, missing_shares)
    inputs = PlanInputs(policy, grant, inventory, request, allocations)
    device_set = decide_visibility(inputs, findings)
    if device_set.unbounded or device_set.cards:
        findings.findings += missing_shares.findings
    devices = tuple(plan_device(card, device_set.addressable, inputs, findings) for card in device_set.cards)
    common = compute_limit(policy, None, None, findings if device_set.unbounded else FindingCollector())
    growth, grown_by = decide_growth(policy, findings)
    limits = tuple(dict.fromkeys(origin for device in devices for origin in device.limited_by)) or common.limited_by
    sharing = policy.settings.get("frameworks")
    allocator, allocated_by = decide_allocator(policy, limits or ((sharing.origin,) if sharing else ()), findings)
    shown = limit_before_choice(device_set, policy)
    visible = ",".join(card.token for card in shown.cards) or NO_GPU
    hidden = (allocations is not None and not allocations) or any(f.code == "no-grant" for f in findings.findings)
    governed = governs_visibility(inputs) or hidden
    return Plan(
        visible=visible if governed and not shown.unbounded else None,
        pci_order=sets_pci_order(inputs, governed=governed and bool(shown.cards)),
        devices=None if device_set.unbounded else devices,
        limit=common.limit,
        growth=growth,
        allocator=allocator,
        findings=tuple(dict.fromkeys(findings.findings)),
        machine_count=None if inventory.devices is None else len(inventory.devices),
        limited_by=common.limited_by,
        grown_by=grown_by,
        allocated_by=allocated_by,
        choosing=device_set.choosing,
        asked=common.asked,
        share=share,
    )
