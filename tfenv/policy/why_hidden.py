"""Which GPUs a process would not see, and what hides each of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

from tfenv.policy.clamps import FindingCollector
from tfenv.policy.device_set import Card, DeviceSet, find_device, is_same_card, keep_valid_tokens, list_granted
from tfenv.policy.model import Device, EffectivePolicy, Grant, Inventory, Origin, PlanInputs
from tfenv.policy.visibility import decide_visibility
from tfenv.values import frozen

HidingRule = Literal[
    "grant", "require_grant", "allowed_devices", "visible_devices", "max_devices", "request", "one_instance"
]


@frozen
class HiddenReason:
    """Why a GPU is not visible.

    Attributes:
        rule: What hides it. "grant": the scheduler or the parent process gave others. "request": the program
            itself asked for others. "one_instance": CUDA shows a process one MIG instance alone. Otherwise the key.
        origin: Where that key was set. None: no file is the reason.
    """

    rule: HidingRule
    origin: Origin | None = None


def explain_hidden(
    policy: EffectivePolicy, grant: Grant, inventory: Inventory, request: Sequence[str] | None = None
) -> Mapping[str, HiddenReason]:
    """Find for each GPU that a process would not see the outermost rule that takes it away.

    GPUs among which `{count = …}` has yet to choose count as visible. So do all GPUs where a granted number does
    not tell which of unlike cards it is.

    Returns:
        The reasons by UUID.
    """
    granted = list_granted(grant, inventory)
    device_set = decide_visibility(PlanInputs(policy, grant, inventory, request), FindingCollector())
    if device_set.unbounded or any(card.device is None for card in granted.cards):
        return {}
    seen = {card.device.uuid for card in device_set.cards if card.device is not None}
    wanted = [find_device(token, grant, inventory) for token in keep_valid_tokens(request or ())]
    return {
        device.uuid: _find_reason(device, granted, device_set, asked_for=request is None or device in wanted)
        for device in inventory.devices or ()
        if device.uuid not in seen
    }


def _find_reason(device: Device, granted: DeviceSet, device_set: DeviceSet, *, asked_for: bool) -> HiddenReason:
    card = next((card for card in granted.cards if is_same_card(card, Card("", device))), None)
    if card is None:
        return HiddenReason("grant")
    for origin in device_set.find_holders([card]):
        return HiddenReason(cast(HidingRule, origin.key[-1]), origin)
    return HiddenReason("one_instance" if asked_for else "request")
