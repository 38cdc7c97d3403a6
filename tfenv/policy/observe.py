"""What a process would lose if the tables under `[observe]` were in force. Pure.

What counts is what the process has at an entry point: a program that asks for little loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tfenv.policy.model import (
    CeilingKey,
    DeviceOutcome,
    EffectivePolicy,
    MemoryLimit,
    Origin,
    Outcome,
    Plan,
    PlannedDevice,
    WouldClamp,
)
from tfenv.policy.units import MIB, format_limit

#: A smaller difference comes of rounding: frameworks count in MiB, and XLA in pieces of two.
ROUNDING = 2 * MIB
_DEVICE_CEILINGS: tuple[CeilingKey, ...] = ("allowed_devices", "max_devices", "require_grant")


def find_losses(
    outcome: Outcome, plan: Plan, policy: EffectivePolicy, in_force: EffectivePolicy | None = None
) -> tuple[WouldClamp, ...]:
    """Return what a process has at an entry point and would not have under the observed policy.

    What cannot be compared, as a share of a card whose size nobody knows with a size, is no loss.

    Args:
        outcome: What it has.
        plan: What it might use under the observed policy. Of GPUs to be chosen, the candidates.
        policy: The observed policy, for the places of keys.
        in_force: The policy in force. What its own keys would take is no loss: where it could not be applied, a
            process has more than it allows. None: all keys count.
    """
    losses: list[WouldClamp] = []
    for device in outcome.devices:
        planned = find_planned(device, plan)
        if planned is None and plan.choosing is not None and plan.devices:
            continue  # it would have another one: the number counts
        if planned is None:
            holders = _find_device_keys(policy)
            losses.append(
                WouldClamp(name_key(holders), device.identity or "a GPU", "no GPU", device.identity, held_by=holders)
            )
        else:
            losses += _compare_limits(device, planned)
    count, now = plan.choosing.count if plan.choosing is not None else None, len(outcome.devices)
    if count is not None and count < now:
        holders = _find_device_keys(policy)
        losses.append(WouldClamp(name_key(holders), f"{now} GPUs", _count_gpus(count), held_by=holders))
    if plan.growth is True and outcome.growth is False and outcome.devices:
        losses.append(WouldClamp("memory_growth", "off", "on", held_by=_drop_none(plan.grown_by)))
    if in_force is None:
        return tuple(losses)
    return tuple(lost for lost in losses if not in_force.origins.issuperset(lost.held_by))


def find_planned(device: DeviceOutcome, plan: Plan) -> PlannedDevice | None:
    """Return the card as the observed plan has it. None: it would not be visible."""
    if plan.devices is None:
        return plan.find_device(device.index)
    if not device.identity:
        return plan.devices[device.index] if device.index < len(plan.devices) else None
    named = (d for d in plan.devices if device.identity == d.identity or (device.token and device.token == d.token))
    return next(named, None)


def _compare_limits(device: DeviceOutcome, planned: PlannedDevice) -> Iterator[WouldClamp]:
    limit = planned.limit
    if limit is None or limit.unlimited:
        return
    total = device.total if device.total is not None else planned.total
    has = device.memory_limit
    asked, given = total if has.unlimited else has.on(total), limit.on(total)
    if asked is not None and given is not None:
        is_less = given < asked - ROUNDING
    elif has.bytes is None and limit.bytes is None and limit.fraction is not None:
        is_less = limit.fraction < (1.0 if has.fraction is None else has.fraction)
    else:
        is_less = False
    if is_less:
        text = "no limit" if has.unlimited else format_limit(has)
        less = format_limit(limit if given is None else MemoryLimit(bytes=given))
        key = name_key(planned.limited_by, "memory_limit")
        yield WouldClamp(key, text, less, device.identity, asked, given, planned.limited_by)


def _find_device_keys(policy: EffectivePolicy) -> tuple[Origin, ...]:
    """Return the keys that say which GPUs are visible, those under `[observe]` if there are any."""
    found = [ceiling.origin for ceiling in policy.list_ceilings(*_DEVICE_CEILINGS)]
    if "visible_devices" in policy.settings:
        found.append(policy.settings["visible_devices"].origin)
    return tuple(origin for origin in found if origin.key[0] == "observe") or tuple(found)


def name_key(holders: Iterable[Origin], default: str = "visible_devices") -> str:
    """Return the key of the first place, without its table. An entry of `[[gpu.device]]` has the default."""
    key = next((origin.key[-1] for origin in holders), default)
    return key if isinstance(key, str) else default


def _count_gpus(count: int) -> str:
    return "no GPU" if count == 0 else "1 GPU" if count == 1 else f"{count} GPUs"


def _drop_none(origin: Origin | None) -> tuple[Origin, ...]:
    return () if origin is None else (origin,)
