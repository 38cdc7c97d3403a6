"""Which GPUs a process would not see, and what hides each of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from tfenv.policy.model import Device, EffectivePolicy, Grant, Inventory, Origin
from tfenv.policy.notes import Notes
from tfenv.policy.pool import Card, Pool, granted, identify, same_card, valid_tokens
from tfenv.policy.resolve import resolve
from tfenv.policy.visibility import governs_visibility, visible_pools

__all__ = ["Hidden", "hidden_by"]

Rule = Literal["grant", "require_grant", "allowed_devices", "visible_devices", "max_devices", "request", "one_instance"]


@dataclass(frozen=True)
class Hidden:
    """Why a GPU is not visible.

    Attributes:
        rule: What hides it: "grant": the scheduler or the parent process gave others; "request": the program
            itself asked for others; "one_instance": CUDA shows a process one MIG instance alone; otherwise the key.
        origin: Where that key stands; None where no file says it.
    """

    rule: Rule
    origin: Origin | None = None


def hidden_by(
    policy: EffectivePolicy, grant: Grant, inventory: Inventory, request: Sequence[str] | None = None
) -> Mapping[str, Hidden]:
    """For each GPU that a process would not see the outermost rule that takes it away, by UUID.

    GPUs among which `{count = …}` has yet to choose count as visible, and so do all where a granted number does not
    tell which of unlike cards it is.
    """
    given = granted(grant, inventory)
    if any(card.device is None for card in given.cards):
        return {}
    governed = governs_visibility(policy)
    pool, choice = visible_pools(policy, grant, inventory, request, None, Notes())[1:] if governed else (given, None)
    cards = pool.cards if choice is not None else resolve(policy, grant, inventory, request).devices
    if cards is None:  # all that CUDA shows
        return {}
    seen = {card.device.uuid for card in cards if card.device is not None}
    wanted = [identify(token, grant, inventory) for token in valid_tokens(request or ())]
    return {
        device.uuid: _rule(device, given, pool, asked_for=request is None or device in wanted)
        for device in inventory.devices or ()
        if device.uuid not in seen
    }


def _rule(device: Device, given: Pool, pool: Pool, *, asked_for: bool) -> Hidden:
    card = next((card for card in given.cards if same_card(card, Card("", device))), None)
    if card is None:
        return Hidden("grant")
    for origin in pool.held_from([card]):
        return Hidden(cast(Rule, origin.key[-1]), origin)
    return Hidden("one_instance" if asked_for else "request")
