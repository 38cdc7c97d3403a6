"""What a framework cannot keep of a plan. Pure."""

from __future__ import annotations

from tfenv.policy.clamps import FindingCollector
from tfenv.policy.model import MemoryLimit, format_origins
from tfenv.values import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Literal

    from tfenv.policy.model import EffectivePolicy, Plan, PlannedDevice

    #: "growth": memory grows on demand. "limit": one limit for all GPUs. "limit_per_gpu": limits that differ by GPU.
    #: "split": logical devices. "allocator": the choice of one.
    #: "choice": free GPUs are chosen when it first lists them.
    Capability = Literal["growth", "limit", "limit_per_gpu", "split", "allocator", "choice"]


def drop_unsupported(plan: Plan, policy: EffectivePolicy, supports: frozenset[Capability], title: str) -> Plan:
    """Leave out of a plan what a framework cannot keep.

    Args:
        plan: What the process may use.
        policy: Where the plan comes from, for the places of keys.
        supports: What the framework can keep.
        title: The framework's name, for messages.

    Returns:
        The plan for this framework, with a finding "unsupported" for each key that it cannot keep. A limit or growth
        that is not kept is an error, for `on_error` to decide. The plan never allows more than it did, but for these.
    """
    collector = FindingCollector()
    if plan.growth is not None and "growth" not in supports:
        text = f"{title} has no memory growth"
        collector.add("unsupported", text, plan.grown_by, "error" if plan.growth else "warning")
        plan = replace(plan, growth=None, grown_by=None)
    if plan.allocator is not None and "allocator" not in supports:
        if "allocator" in policy.settings:
            origin = policy.settings["allocator"].origin
            collector.add("unsupported", describe_unsupported("allocator", title), origin, "warning")
        plan = replace(plan, allocator=None, allocated_by=())
    if any(device.logical_devices for device in plan.devices or ()) and "split" not in supports:
        origin = policy.settings["device"].origin
        collector.add("unsupported", describe_unsupported("split", title), origin, "warning")
        plan = _replace_devices(plan, [replace(device, logical_devices=()) for device in plan.devices or ()])
    if plan.limits and "limit" not in supports:
        text = f"{title} cannot limit memory, so {format_origins(plan.limits)} is not in force"
        collector.add("unsupported", text, plan.limits[0])
        unlimited = [replace(device, limit=None, limited_by=()) for device in plan.devices or ()]
        plan = replace(_replace_devices(plan, unlimited), limit=None, limited_by=())
    if plan.choosing is not None and "choice" not in supports:
        origin = policy.settings["visible_devices"].origin
        text = f"{title} gets the first GPU, because tfenv cannot choose a free one for it"
        collector.add("unsupported", text, origin)
    if len({device.limit for device in plan.devices or ()}) > 1 and "limit_per_gpu" not in supports:
        text = f"{title} has one memory limit for all GPUs, so the smallest applies"
        collector.add("unsupported", text, plan.limits[0], "warning")
        plan = _unify_limits(plan)
    return replace(plan, findings=(*plan.findings, *collector.findings))


def describe_unsupported(capability: Literal["allocator", "split"], title: str) -> str:
    """Return what becomes of a key of a file that a framework cannot keep, in words.

    Args:
        capability: What the framework lacks.
        title: Its name.
    """
    if capability == "allocator":
        return f"{title} has no choice of an allocator"
    return f"{title} cannot split a GPU, so the limit applies to all of it"


def _replace_devices(plan: Plan, devices: list[PlannedDevice]) -> Plan:
    return plan if plan.devices is None else replace(plan, devices=tuple(devices))


def _unify_limits(plan: Plan) -> Plan:
    """Give every GPU the limit that is within those of all."""
    devices = plan.devices or ()
    smallest = _combine({device.limit for device in devices})
    return _replace_devices(plan, [replace(device, limit=smallest, limited_by=plan.limits) for device in devices])


def _combine(limits: Iterable[MemoryLimit | None]) -> MemoryLimit:
    """Return the limit that is within all of these."""
    known = [limit for limit in limits if limit is not None]
    sizes = [limit.bytes for limit in known if limit.bytes is not None]
    fractions = [limit.fraction for limit in known if limit.fraction is not None]
    return MemoryLimit(bytes=min(sizes, default=None), fraction=min(fractions, default=None))
