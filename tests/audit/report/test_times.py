"""Times of the report: timestamps as whole milliseconds, and the local clock."""

from __future__ import annotations

from datetime import datetime, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.audit.report.records import MONDAY, timestamp
from tfenv.audit.report.times import BIN_MS, HOUR_MS, LocalClock, TimestampReader


@given(st.integers(1_420_070_400_000, 4_000_000_000_000))
def test_a_timestamp_is_read_as_it_was_written(moment: int) -> None:
    """What records say of a moment gives that moment back, to the millisecond."""
    assert TimestampReader().read(timestamp(moment)) == moment


@pytest.mark.parametrize("text", ["", "x", "2026-11-05", "2026-13-05T09:31:07.123456Z", "2026-11-05T09:31:xx.123456Z"])
def test_what_is_no_timestamp_is_refused(text: str) -> None:
    """A text that is not a time raises ValueError, and nothing else."""
    with pytest.raises(ValueError, match=r"."):
        TimestampReader().read(text)


def test_an_offset_counts() -> None:
    """A collector may write a time with its offset."""
    assert TimestampReader().read("2025-11-03T01:00:00.000+01:00") == MONDAY


def test_summer_time_and_half_hours() -> None:
    """The local clock knows when summer time ends, and zones that are half an hour apart."""
    berlin, delhi = LocalClock(ZoneInfo("Europe/Berlin")), LocalClock(ZoneInfo("Asia/Kolkata"))
    summer = int(datetime(2026, 7, 1, tzinfo=timezone.utc).timestamp() * 1000)
    assert berlin.shift(MONDAY) - MONDAY == HOUR_MS
    assert berlin.shift(summer) - summer == 2 * HOUR_MS
    assert delhi.shift(MONDAY) - MONDAY == 11 * BIN_MS
    assert berlin.name_zone(MONDAY) == "CET, UTC+01:00"
    assert LocalClock(timezone.utc).name_zone(MONDAY) == "UTC"
