"""Records for the tests of the report: of processes whose times are known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tfenv.audit.query import LineTally, RecordQuery
from tfenv.audit.report.collect import Collection, collect_logs

GIB = 1 << 30
#: A Monday, 00:00 UTC, in milliseconds since 1970.
MONDAY = 1_762_128_000_000
NOW = MONDAY + 400 * 86_400_000
CARD = "GPU-a0fa4e00-0000-4000-8000-000000000000"


def timestamp(moment: int) -> str:
    """Return a moment as records have it."""
    return datetime.fromtimestamp(moment / 1000, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f") + "Z"


def make_record(event: str, moment: int, **fields: Any) -> dict[str, Any]:
    """Make a record. What is not given is as of one process of alice. None as `start_ticks` leaves it out."""
    record = {
        "timestamp": timestamp(moment),
        "event": f"policy_{event}",
        "host": "gpu1",
        "user": "alice",
        "pid": 100,
        "start_ticks": 1,
        "script": "/home/alice/train.py",
        "framework": "tensorflow",
        "findings": [],
        **fields,
    }
    return {name: value for name, value in record.items() if name != "start_ticks" or value is not None}


def make_device(uuid: str = CARD, limit: int | None = 8 * GIB, peak: int | None = None, **more: Any) -> dict[str, Any]:
    """Make an entry of a record's `devices`."""
    device = {
        "index": 0,
        "token": "0",
        "uuid": uuid,
        "name": "NVIDIA A10",
        "limit_bytes": limit,
        "limit_fraction": None,
    }
    return {**device, **({} if peak is None else {"peak_bytes": peak}), **more}


@dataclass(frozen=True)
class Run:
    """A process, as its records will have it. Times are in milliseconds behind MONDAY."""

    pid: int = 100
    ticks: int | None = 1
    user: str = "alice"
    host: str = "gpu1"
    begin: int = 0
    length: int = 3_600_000
    has_end: bool = True
    gpus: tuple[str, ...] = (CARD,)
    peak: int | None = 4 * GIB
    waited_ms: int | None = None
    clamps: int = 0

    def make_records(self) -> list[dict[str, Any]]:
        """Make its records, in the order of time."""
        who = {"pid": self.pid, "start_ticks": self.ticks, "user": self.user, "host": self.host}
        began, ended = MONDAY + self.begin, MONDAY + self.begin + self.length
        devices = [make_device(uuid) for uuid in self.gpus]
        choice = (
            {} if self.waited_ms is None else {"choice": {"waited_ms": self.waited_ms, "lease": "x", "allocations": []}}
        )
        clamp = {"cut": ["memory_limit"], **({"repeats": self.clamps} if self.clamps > 1 else {})}
        records = [make_record("loaded", began, **who), make_record("applied", began, devices=devices, **who, **choice)]
        if self.clamps:
            records.append(make_record("clamped", began, devices=devices, **who, **clamp))
        if self.has_end:
            measured = [make_device(uuid, peak=self.peak) for uuid in self.gpus]
            records.append(make_record("ended", ended, devices=measured, duration_ms=self.length + 500.0, **who))
        return records


def write_log(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write records into a log."""
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def collect(*logs: Path, query: RecordQuery = RecordQuery(), tally: LineTally | None = None) -> Collection:  # noqa: B008 - it is frozen
    """Read logs as the command does."""
    return collect_logs(logs, query, LineTally() if tally is None else tally, NOW)
