"""The machine's date: no variable moves it, and it never goes back."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tfenv import machine_date

FIND = "from tfenv.machine_date import find_today; print(find_today())"


def test_no_time_zone_of_a_process_moves_the_day() -> None:
    """In zones that are 26 hours apart a process is told the same day, and so is one without a zone."""
    days = set()
    before = time.strftime("%Y-%m-%d")
    for zone in (None, "Etc/GMT+12", "Etc/GMT-14", "nonsense", ""):
        env = {name: value for name, value in os.environ.items() if name != "TZ"}
        env |= {} if zone is None else {"TZ": zone}
        done = subprocess.run([sys.executable, "-c", FIND], env=env, capture_output=True, text=True, check=True)
        days.add(done.stdout.strip())
    assert len(days) == 1 or before != time.strftime("%Y-%m-%d"), days


def test_a_clock_that_jumps_back_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a process a day that has come is not gone again. One that comes is told."""
    monkeypatch.setattr(machine_date, "_latest", "")
    days = iter(["2027-01-30", "2027-01-31", "2027-01-30", "1970-01-01", "2027-02-01"])
    monkeypatch.setattr(machine_date, "_read_date", lambda: next(days))
    told = [machine_date.find_today() for _ in range(5)]
    assert told == ["2027-01-30", "2027-01-31", "2027-01-31", "2027-01-31", "2027-02-01"]
