"""Which GPUs a process would not see, and what hides each of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

from tfenv.policy.clamps import Notes
from tfenv.policy.device_set import Card, DeviceSet, granted, identify, keep_valid_tokens, same_card
from tfenv.policy.model import Device, EffectivePolicy, Grant, Inventory, Origin
from tfenv.policy.resolve import resolve
from tfenv.policy.visibility import decide_visible_devices, governs_visibility
from tfenv.values import frozen

__all__ = ["HiddenReason", "explain_hidden"]

Rule = Literal["grant", "require_grant", "allowed_devices", "visible_devices", "max_devices", "request", "one_instance"]


@frozen
class HiddenReason:
    """Why a GPU is not visible.

    Attributes:
        rule: What hides it: "grant": the scheduler or the parent process gave others; "request": the program
            itself asked for others; "one_instance": CUDA shows a process one MIG instance alone; otherwise the key.
        origin: Where that key stands; None where no file says it.
    """

    rule: Rule
    origin: Origin | None = None


def explain_hidden(
    policy: EffectivePolicy, grant: Grant, inventory: Inventory, request: Sequence[str] | None = None
) -> Mapping[str, HiddenReason]:
    """For each GPU that a process would not see the outermost rule that takes it away, by UUID.

    GPUs among which `{count = …}` has yet to choose count as visible, and so do all where a granted number does not
    tell which of unlike cards it is.
    """
    given = granted(grant, inventory)
    if any(card.device is None for card in given.cards):
        return {}
    governed = governs_visibility(policy)
    device_set, choice = (
        decide_visible_devices(policy, grant, inventory, request, None, Notes())[1:] if governed else (given, None)
    )
    cards = device_set.cards if choice is not None else resolve(policy, grant, inventory, request).devices
    if cards is None:  # all that CUDA shows
        return {}
    seen = {card.device.uuid for card in cards if card.device is not None}
    wanted = [identify(token, grant, inventory) for token in keep_valid_tokens(request or ())]
    return {
        device.uuid: _rule(device, given, device_set, asked_for=request is None or device in wanted)
        for device in inventory.devices or ()
        if device.uuid not in seen
    }


def _rule(device: Device, given: DeviceSet, device_set: DeviceSet, *, asked_for: bool) -> HiddenReason:
    card = next((card for card in given.cards if same_card(card, Card("", device))), None)
    if card is None:
        return HiddenReason("grant")
    for origin in device_set.held_from([card]):
        return HiddenReason(cast(Rule, origin.key[-1]), origin)
    return HiddenReason("one_instance" if asked_for else "request")
