"""`memory_limit = "granted"`: the share of each GPU that the launcher gave takes the place of the word. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from tfenv.policy.clamps import FindingCollector
from tfenv.policy.model import Ceiling, DeviceRule, EffectivePolicy, Grant, MemoryLimit, Origin, Setting, Share
from tfenv.values import replace

#: Reports that a key's "granted" is not in force, and what holds instead.
_Report = Callable[[Origin, str], object]


def apply_share(
    policy: EffectivePolicy, grant: Grant, findings: FindingCollector
) -> tuple[EffectivePolicy, Share | None]:
    """Put the share that the launcher gave in the place of "granted".

    Where nothing tells the share, "granted" counts as if nobody had written it: the next layer's setting holds, an
    entry of `[[gpu.device]]` has its table's limit, and a ceiling is left out. Each of them is a finding `no-share`.

    Returns:
        The policy, and the share as a fraction of a GPU. None: no limit is "granted", or nothing tells the share.
    """
    if not _uses_share(policy):
        return policy, None
    known = _measure_share(policy, grant)
    share = None if known is None else MemoryLimit(fraction=known.fraction)
    reason, remedy = _explain_missing_share(grant)

    def report(origin: Origin, effect: str) -> None:
        findings.add("no-share", f"{reason}, so {effect}; {remedy}", origin, "warning")

    settings = dict(policy.settings)
    if "memory_limit" in settings:
        layers = (settings.pop("memory_limit"), *policy.overridden.get("memory_limit", ()))
        chosen = _choose_limit(layers, share, report)
        settings |= {} if chosen is None else {"memory_limit": chosen}
    if "device" in settings:
        rules = cast("tuple[DeviceRule, ...]", settings["device"].value)
        replaced = tuple(_replace_in_rule(rule, share, report) for rule in rules)
        settings["device"] = replace(settings["device"], value=replaced)
    ceilings = tuple(_replace_in_ceiling(ceiling, share) for ceiling in policy.ceilings)
    if share is None:
        for ceiling in policy.list_ceilings("memory_limit"):
            if _is_granted(ceiling.value):
                report(ceiling.origin, "this ceiling is not in force")
    kept = tuple(ceiling for ceiling in ceilings if ceiling is not None)
    return replace(policy, settings=settings, ceilings=kept), known


def _measure_share(policy: EffectivePolicy, grant: Grant) -> Share | None:
    """Return the share that the launcher gave, as a fraction of a GPU. None: nothing tells it."""
    fraction = None if grant.share is None else grant.share.measure(policy.shards_per_gpu)
    return None if grant.share is None or fraction is None else Share(grant.share.giver, grant.share.text, fraction)


def _uses_share(policy: EffectivePolicy) -> bool:
    """Return whether some limit of the policy is "granted"."""
    setting, device = policy.settings.get("memory_limit"), policy.settings.get("device")
    rules = cast("tuple[DeviceRule, ...]", device.value) if device is not None else ()
    limits = [setting and setting.value, *(rule.memory_limit for rule in rules), *(c.value for c in policy.ceilings)]
    return any(_is_granted(limit) for limit in limits)


def _is_granted(limit: object) -> bool:
    return isinstance(limit, MemoryLimit) and limit.granted


def _explain_missing_share(grant: Grant) -> tuple[str, str]:
    """Return why the share is not known, and what to write."""
    if grant.share is not None:
        reason = f"{grant.share.giver} gave {grant.share.text} and does not say of how many"
        return reason, "write shards_per_gpu in [machine] of /etc/tfgpu/tfgpu.toml"
    remedy = "write a size or a percentage for processes without a share"
    if grant.launcher:
        return f"{grant.launcher} does not tell this process its share of a GPU", remedy
    return "no launcher gave this process a share of a GPU", remedy


def _choose_limit(layers: tuple[Setting, ...], share: MemoryLimit | None, report: _Report) -> Setting | None:
    """Return the nearest `memory_limit` that holds. None: there is no such one."""
    nearest = layers[0]
    if not _is_granted(nearest.value):
        return nearest
    if share is not None:
        return replace(nearest, value=share)
    other = next((setting for setting in layers if not _is_granted(setting.value)), None)
    report(nearest.origin, "this sets no limit" if other is None else f"{other.origin} holds instead")
    return other


def _replace_in_rule(rule: DeviceRule, share: MemoryLimit | None, report: _Report) -> DeviceRule:
    if not _is_granted(rule.memory_limit):
        return rule
    if share is None:
        report(rule.origin, "the limit for all GPUs holds instead")
    return replace(rule, memory_limit=share)


def _replace_in_ceiling(ceiling: Ceiling, share: MemoryLimit | None) -> Ceiling | None:
    if not _is_granted(ceiling.value):
        return ceiling
    return None if share is None else replace(ceiling, value=share)
