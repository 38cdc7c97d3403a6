"""Moments of records as whole milliseconds, so that sums are the same in whatever order they are made."""

from __future__ import annotations

from datetime import datetime, timezone, tzinfo

HOUR_MS = 3_600_000
#: What sums over time are kept by. Half an hour, for there are time zones that are half an hour apart.
BIN_MS = HOUR_MS // 2
DAY_MS = 24 * HOUR_MS
#: A record dated before it was made by a machine whose clock was wrong.
EARLIEST_MS = 1_420_070_400_000  # 2015-01-01
_MINUTE_CHARACTERS = len("2026-11-05T09:31")
_SECONDS = slice(_MINUTE_CHARACTERS + 1, _MINUTE_CHARACTERS + 7)  # "07.123"
_MOST_MINUTES = 100_000


class TimestampReader:
    """Reads the timestamps of records. Most of them begin as one before."""

    def __init__(self) -> None:
        self._minutes: dict[str, int] = {}

    def read(self, timestamp: str) -> int:
        """Return the milliseconds since 1970.

        Raises:
            ValueError: It is not as records have it.
        """
        head = timestamp[:_MINUTE_CHARACTERS]
        begin = self._minutes.get(head)
        if begin is None:
            begin = self._learn(head)
        if timestamp[-1:] != "Z":
            return _read_other(timestamp)
        return begin + int(float(timestamp[_SECONDS] or 0) * 1000 + 0.5)

    def _learn(self, head: str) -> int:
        if len(self._minutes) >= _MOST_MINUTES:
            self._minutes.clear()
        moment = datetime.strptime(head, "%Y-%m-%dT%H:%M").replace(tzinfo=timezone.utc)
        return self._minutes.setdefault(head, _count_ms(moment))


def _read_other(timestamp: str) -> int:
    """Read what a collector made of a timestamp."""
    moment = datetime.fromisoformat(timestamp)
    return _count_ms(moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc))


def _count_ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


class LocalClock:
    """Tells what a clock on the wall shows.

    Args:
        zone: The time zone. None: the machine's.
    """

    def __init__(self, zone: tzinfo | None = None) -> None:
        self._zone = zone
        self._offsets: dict[int, int] = {}

    def shift(self, moment: int) -> int:
        """Return the milliseconds that a clock in UTC would show if it showed the local time."""
        part = moment // BIN_MS
        if part not in self._offsets:
            offset = self._find_local(part * BIN_MS).utcoffset()
            self._offsets[part] = 0 if offset is None else int(offset.total_seconds() * 1000)
        return moment + self._offsets[part]

    def format(self, moment: int, pattern: str = "%Y-%m-%d %H:%M") -> str:
        """Return a moment for people, in local time."""
        return self._find_local(moment).strftime(pattern)

    def name_zone(self, moment: int) -> str:
        """Return the time zone for people: "CET, UTC+01:00"."""
        local = self._find_local(moment)
        offset = local.strftime("%z")
        name = local.tzname() or ""
        shift = f"UTC{offset[:3]}:{offset[3:5]}"
        return "UTC" if name == "UTC" else f"{name}, {shift}"

    def _find_local(self, moment: int) -> datetime:
        return datetime.fromtimestamp(moment / 1000, timezone.utc).astimezone(self._zone)
