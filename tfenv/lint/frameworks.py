"""Remarks on `[gpu.frameworks]`: what the frameworks it names cannot keep, and shares that the limit does not hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast

from tfenv.config.schema import list_device_rules
from tfenv.frameworks.registry import get_framework
from tfenv.lint.reach import LintRemark
from tfenv.policy.limits import is_sum_above
from tfenv.policy.model import MemoryLimit, Origin, Setting, Tables
from tfenv.policy.supports import describe_unsupported
from tfenv.policy.units import format_limit

if TYPE_CHECKING:
    from tfenv.frameworks.base import Framework


def advise_on_frameworks(own: Tables, effective: Tables, totals: Sequence[int]) -> Iterator[LintRemark]:
    """Find keys of a table that a framework cannot keep, and shares that take more together than the limit.

    Args:
        own: The table's own keys. Remarks are about them alone.
        effective: What holds for those it is for.
        totals: The memory of this machine's cards in bytes, where it is known.
    """
    sharing = effective.gpu.get("frameworks")
    if sharing is None:
        return
    shares = cast("Mapping[str, MemoryLimit]", sharing.value)
    yield from _list_unsupported(own, [get_framework(name) for name in shares])
    limit = effective.gpu.get("memory_limit")
    if sharing.origin in [setting.origin for setting in own.gpu.values()] and limit is not None:
        yield from _check_sum(sharing, tuple(shares.values()), cast("MemoryLimit", limit.value), totals)


def _list_unsupported(own: Tables, named: Sequence[Framework]) -> Iterator[LintRemark]:
    """Find keys that none of the frameworks keeps. One that keeps it is whom the key is for."""
    origins: dict[Literal["allocator", "split"], list[Origin]] = {
        "allocator": [own.gpu["allocator"].origin] if "allocator" in own.gpu else [],
        "split": [rule.origin for rule in list_device_rules(own.gpu) if rule.logical_devices],
    }
    for capability, places in origins.items():
        if any(capability in framework.supports for framework in named):
            continue
        for origin in places:
            for framework in named:
                yield LintRemark(origin, "unsupported", describe_unsupported(capability, framework.title))


def _check_sum(
    sharing: Setting, shares: Sequence[MemoryLimit], limit: MemoryLimit, totals: Sequence[int]
) -> Iterator[LintRemark]:
    """Find shares whose sum passes the limit, on every card. A size and a share compare only if the cards are known."""
    kinds = {amount.bytes is None for amount in (*shares, limit)}
    bounds = (None,) if len(kinds) == 1 else totals
    is_above = bool(bounds) and all(is_sum_above(shares, limit, total) for total in bounds)
    if is_above:
        text = f"the shares are larger together than memory_limit, {format_limit(limit)}"
        yield LintRemark(sharing.origin, "above-ceiling", f"{text}: the framework that comes last gets less; lower one")
