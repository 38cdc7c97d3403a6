"""Remarks on tables that have an end: those that end soon, and those that have ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import date

from tfenv.lint.reach import LintRemark
from tfenv.machine_date import find_today
from tfenv.policy.model import DatedTable, Layer
from tfenv.values import replace

#: Days before its end from which a table is worth a word.
_SOON = 14


def advise_on_exceptions(parts: Iterable[Layer], today: str | None = None) -> Iterator[LintRemark]:
    """Say which tables of a layer have ended, or will within two weeks.

    Args:
        parts: The layer's files, validated. Those under `[observe]` are looked at, too.
        today: The day, as "2027-01-31". None: the machine's.
    """
    for part in parts:
        for layer in (part, part.observed):
            for dated in () if layer is None else layer.dated:
                if dated.expires is not None:
                    yield from _check_end(dated, dated.expires, today or find_today())


def _check_end(dated: DatedTable, expires: str, today: str) -> Iterator[LintRemark]:
    origin = replace(dated.origin, key=(*dated.origin.key, "expires"))
    days = (date.fromisoformat(expires) - date.fromisoformat(today)).days
    if dated.expired or days <= 0:
        end = replace(dated, expired=True).describe_end()
        message = f"{end}, so this table does not count; remove it, or write a later day"
        yield LintRemark(origin, "expired", message)
    elif days <= _SOON:
        when = "tomorrow" if days == 1 else f"in {days} days"
        message = f"{dated.describe_end()}, {when}; write a later day if it is to count on"
        yield LintRemark(origin, "expires-soon", message)
