"""Which day it is on this machine."""

from __future__ import annotations

import os
import time

#: The machine's time zone. No variable of a user's moves it.
_TIME_ZONE = "/etc/localtime"

_latest = ""


def find_today() -> str:
    """Return the machine's local date, as "2027-01-31".

    The TZ of a process does not count: it would make a day longer for whoever sets it. Within a process the date never
    goes back, whatever the clock does.
    """
    global _latest  # noqa: PLW0603 - the date is one for the whole process
    _latest = max(_latest, _read_date())
    return _latest


def _read_date() -> str:
    if "TZ" not in os.environ:
        return time.strftime("%Y-%m-%d")
    # Late: it takes milliseconds, and few people set TZ.
    from datetime import datetime, timezone
    from zoneinfo import ZoneInfo

    try:
        with open(_TIME_ZONE, "rb") as file:
            zone: ZoneInfo | timezone = ZoneInfo.from_file(file)
    except (OSError, ValueError):  # without the file the C library takes UTC
        zone = timezone.utc
    return datetime.now(zone).date().isoformat()
