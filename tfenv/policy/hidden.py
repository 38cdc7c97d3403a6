"""Which GPUs a process would not see, and what hides each of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from tfenv.policy.model import AutoChoice, Device, EffectivePolicy, Grant, Inventory, Origin
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
    if _chooses(policy):
        policy, inventory = _without_choosing(policy), _without_instances(inventory)
    given = granted(grant, inventory)
    if any(card.device is None for card in given.cards):
        return {}
    pool = visible_pools(policy, grant, inventory, request, Notes())[1] if governs_visibility(policy) else given
    planned = resolve(policy, grant, inventory, request).devices
    seen = {device.device.uuid for device in planned or () if device.device is not None}
    unseen = () if planned is None else [d for d in inventory.devices or () if d.uuid not in seen]
    wanted = [identify(token, grant, inventory) for token in valid_tokens(request or ())]
    return {d.uuid: _rule(d, given, pool, asked_for=request is None or d in wanted) for d in unseen}


def _chooses(policy: EffectivePolicy) -> bool:
    setting = policy.settings.get("visible_devices")
    return setting is not None and isinstance(setting.value, AutoChoice)


def _without_choosing(policy: EffectivePolicy) -> EffectivePolicy:
    """What would hold whichever GPUs are chosen."""
    others = {key: value for key, value in policy.settings.items() if key != "visible_devices"}
    return replace(policy, settings=others, ceilings=tuple(c for c in policy.ceilings if c.key != "max_devices"))


def _without_instances(inventory: Inventory) -> Inventory:
    """Instances as if they were GPUs like others: each of them may be the one that is chosen."""
    return replace(inventory, devices=tuple(replace(device, instance=None) for device in inventory.devices or ()))


def _rule(device: Device, given: Pool, pool: Pool, *, asked_for: bool) -> Hidden:
    card = next((card for card in given.cards if same_card(card, Card("", device))), None)
    if card is None:
        return Hidden("grant")
    for origin in pool.held_from([card]):
        return Hidden(cast(Rule, origin.key[-1]), origin)
    return Hidden("one_instance" if asked_for else "request")
