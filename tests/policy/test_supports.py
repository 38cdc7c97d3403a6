"""What a framework cannot keep of a plan is left out of it, with a finding, and the plan never grows."""

from __future__ import annotations

from typing import Any

import pytest

from tfenv.policy.model import EffectivePolicy, MemoryLimit, Origin, Plan, PlannedDevice, Setting
from tfenv.policy.supports import drop_unsupported

ALL: Any = frozenset(("growth", "limit", "limit_per_gpu", "split", "allocator"))
GIB = 1 << 30


def origin(key: str) -> Origin:
    return Origin("project", "/p/tfgpu.toml", ("gpu", key))


def device(size: int | None, *parts: int) -> PlannedDevice:
    limit = None if size is None else MemoryLimit(bytes=size * GIB)
    split = tuple(MemoryLimit(bytes=part * GIB) for part in parts)
    return PlannedDevice("0", limit=limit, logical_devices=split, limited_by=(origin("device"),))


POLICY = EffectivePolicy(
    settings={
        "device": Setting((), origin("device")),
        "allocator": Setting("bfc", origin("allocator")),
        "memory_growth": Setting(True, origin("memory_growth")),
    }
)
PLAN = Plan(
    devices=(device(4, 2, 2), device(8)),
    growth=True,
    grown_by=origin("memory_growth"),
    allocator="bfc",
    allocated_by=(origin("allocator"),),
)


def test_a_framework_that_keeps_all_of_it_gets_the_plan() -> None:
    """Nothing is left out, and nothing is found."""
    assert drop_unsupported(PLAN, POLICY, ALL, "Second") == PLAN


@pytest.mark.parametrize(
    ("missing", "key", "severity"),
    [
        ("growth", "gpu.memory_growth", "error"),
        ("limit", "gpu.device", "error"),
        ("limit_per_gpu", "gpu.device", "warning"),
        ("split", "gpu.device", "warning"),
        ("allocator", "gpu.allocator", "warning"),
    ],
)
def test_each_key_that_cannot_be_kept_is_one_finding(missing: str, key: str, severity: str) -> None:
    """The finding names the key and the framework. What is not kept at all is an error, for on_error to decide."""
    plan = drop_unsupported(PLAN, POLICY, ALL - {missing}, "Second")
    (finding,) = plan.findings
    assert (finding.code, finding.key, finding.severity, finding.path) == (
        "unsupported",
        key,
        severity,
        "/p/tfgpu.toml",
    )
    assert "Second" in finding.message


def test_unlike_limits_become_the_smallest() -> None:
    """One limit for all GPUs is within each of them, and a GPU without one is limited, too."""
    plan = drop_unsupported(
        Plan(devices=(device(4), device(8), device(None))), POLICY, frozenset(("growth", "limit")), "Second"
    )
    assert plan.devices is not None
    assert [planned.limit for planned in plan.devices] == [MemoryLimit(bytes=4 * GIB)] * 3


def test_a_size_and_a_share_are_both_kept() -> None:
    """Which of them is smaller only the card can tell."""
    share = PlannedDevice("1", limit=MemoryLimit(fraction=0.5), limited_by=(origin("device"),))
    plan = drop_unsupported(Plan(devices=(device(4), share)), POLICY, frozenset(("limit",)), "Second")
    assert plan.devices is not None
    assert {planned.limit for planned in plan.devices} == {MemoryLimit(bytes=4 * GIB, fraction=0.5)}


def test_an_allocator_that_a_limit_implies_is_no_finding() -> None:
    """Nobody asked for it: it is TensorFlow's way to keep the limit."""
    policy = EffectivePolicy(settings={})
    plan = drop_unsupported(
        Plan(allocator="bfc", limit=MemoryLimit(bytes=GIB)), policy, frozenset(("growth", "limit")), "Second"
    )
    assert (plan.allocator, plan.findings) == (None, ())


def test_a_plan_for_unknown_gpus_loses_its_limit_too() -> None:
    """Where no card is known the limit is one for all that CUDA shows."""
    plan = Plan(limit=MemoryLimit(bytes=GIB), limited_by=(origin("memory_limit"),))
    made = drop_unsupported(plan, POLICY, frozenset(("growth",)), "Second")
    assert made.limit is None
    assert [(finding.code, finding.key) for finding in made.findings] == [("unsupported", "gpu.memory_limit")]
