"""Which GPUs a policy hides, and what of it does: `resolve`, asked again with one more rule at a time. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from tfenv.policy.model import (
    LAYER_ORDER,
    AutoChoice,
    Ceiling,
    EffectivePolicy,
    Grant,
    Inventory,
    Origin,
    Plan,
    Setting,
    dotted,
)
from tfenv.policy.resolve import resolve

__all__ = ["Hidden", "hidden_by"]

Rule = Literal["grant", "require_grant", "allowed_devices", "visible_devices", "request", "max_devices", "one_instance"]

#: Holds nobody back, and makes `resolve` decide visibility where no file does.
_NO_BOUND = Ceiling("max_devices", 1 << 20, Origin("machine", "", ()))


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
    """For each GPU that a process would not see the first rule that takes it away, by UUID.

    GPUs among which `{count = …}` has yet to choose count as visible, and so do those of which cannot be told.
    """
    devices = inventory.devices or ()
    found: dict[str, Hidden] = {}
    for hidden, plan in _stages(policy, grant, inventory, request):
        seen = _seen(plan, inventory)
        if seen is None:
            continue
        found |= {device.uuid: hidden for device in devices if device.uuid not in seen and device.uuid not in found}
    return found


def _seen(plan: Plan, inventory: Inventory) -> set[str] | None:
    """None: a granted number does not tell which of unlike cards it is."""
    if plan.devices is None:
        return {device.uuid for device in inventory.devices or ()}
    known = {planned.device.uuid for planned in plan.devices if planned.device is not None}
    return known if len(known) == len(plan.devices) else None


def _stages(
    policy: EffectivePolicy, grant: Grant, inventory: Inventory, request: Sequence[str] | None
) -> Iterator[tuple[Hidden, Plan]]:
    """The plan under more and more of the policy, each with the rule that came last, in the order of `resolve`."""
    # Only the last step knows that CUDA shows one MIG instance: until then they are GPUs like others.
    apart = replace(inventory, devices=tuple(replace(device, instance=None) for device in inventory.devices or ()))
    held: tuple[Ceiling, ...] = (_NO_BOUND,)
    yield Hidden("grant"), resolve(EffectivePolicy(ceilings=held), grant, apart)
    for ceiling in _ceilings(policy, "require_grant", "allowed_devices"):
        held = (*held, ceiling)
        yield _hidden(ceiling), resolve(EffectivePolicy(ceilings=held), grant, apart)
    setting = policy.settings.get("visible_devices")
    if setting is not None and isinstance(setting.value, AutoChoice):
        return
    settings: dict[str, Setting] = {} if setting is None else {"visible_devices": setting}
    if setting is not None:
        yield Hidden("visible_devices", setting.origin), resolve(EffectivePolicy(settings, ceilings=held), grant, apart)
    yield Hidden("request"), resolve(EffectivePolicy(settings, ceilings=held), grant, apart, request)
    for ceiling in _ceilings(policy, "max_devices"):
        held = (*held, ceiling)
        yield _hidden(ceiling), resolve(EffectivePolicy(settings, ceilings=held), grant, apart, request)
    yield Hidden("one_instance"), resolve(policy, grant, inventory, request)


def _ceilings(policy: EffectivePolicy, *keys: str) -> list[Ceiling]:
    """Those of the keys in the order in which they are applied: the machine's first."""
    wanted = [ceiling for ceiling in policy.ceilings if ceiling.key in keys]
    return sorted(wanted, key=lambda c: (keys.index(c.key), LAYER_ORDER.index(c.origin.layer), dotted(c.origin.key)))


def _hidden(ceiling: Ceiling) -> Hidden:
    return Hidden(cast(Rule, ceiling.key), ceiling.origin)
