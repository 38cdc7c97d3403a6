"""Whom the tables under `[observe]` would hit: the totals over `would_clamp` of the records, by user, key and GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tfenv.audit.log_parts import LogPart, map_parts, split_logs
from tfenv.audit.query import LineTally, LoggedRecord, RecordQuery, parse_line, read_lines
from tfenv.audit.rotation import LogOrigin

#: A process: host, pid and start.
_Process = tuple[str, str, str]
#: What every record has that is counted here. Of the others, most of a log, nothing is parsed.
_MARK = b'"would_clamp"'


@dataclass
class ObservedTotals:
    """What one user would lose of one GPU by one key.

    Attributes:
        user: Name.
        key: The key that would take it: "memory_limit".
        gpu: The GPU's UUID or token. "": it is about no single GPU.
        processes: The programs that would lose it.
        asked: The most that one of them has, in words.
        given: The least that one of them would have, in words.
        asked_bytes: `asked` in bytes. None: it is no size.
        given_bytes: `given` in bytes. None: it is no size.
        held_by: The keys that would hold, as file and key.
        last: Timestamp of the newest record.
    """

    user: str
    key: str
    gpu: str
    processes: set[_Process] = field(default_factory=set)
    asked: str = ""
    given: str = ""
    asked_bytes: int | None = None
    given_bytes: int | None = None
    held_by: set[str] = field(default_factory=set)
    last: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the totals as JSON has them: the processes as their number."""
        return {**vars(self), "processes": len(self.processes), "held_by": sorted(self.held_by)}

    def add(self, other: ObservedTotals) -> None:
        """Count what others counted for the same user, key and GPU."""
        self.processes |= other.processes
        self.held_by |= other.held_by
        self.last = max(self.last, other.last)
        if not self.asked or _is_above(other.asked_bytes, self.asked_bytes):
            self.asked, self.asked_bytes = other.asked, other.asked_bytes
        if not self.given or _is_above(self.given_bytes, other.given_bytes):
            self.given, self.given_bytes = other.given, other.given_bytes


def _is_above(one: int | None, other: int | None) -> bool:
    return one is not None and (other is None or one > other)


def count_programs(rows: Iterable[ObservedTotals]) -> tuple[int, int]:
    """Return how many programs of how many people would lose something."""
    rows = list(rows)
    return len({process for row in rows for process in row.processes}), len({row.user for row in rows})


def sum_up_observed(logs: Sequence[Path], query: RecordQuery, tally: LineTally) -> list[ObservedTotals]:
    """Sum up what the wanted records of all logs say that programs would lose.

    Args:
        logs: The logs.
        query: Which records are wanted, and which GPUs of them.
        tally: Counts what is no record, and gets the logs that are left out.

    Returns:
        Totals sorted by user, key and GPU.

    Raises:
        OSError: A log cannot be read.
    """
    rows: dict[tuple[str, str, str], ObservedTotals] = {}
    for found, part_tally in map_parts(partial(_sum_up_part, query, tally.origin), split_logs(logs, query.since)):
        for row in found:
            rows.setdefault((row.user, row.key, row.gpu), ObservedTotals(row.user, row.key, row.gpu)).add(row)
        tally.add(part_tally)
    return [rows[name] for name in sorted(rows)]


def _sum_up_part(query: RecordQuery, origin: LogOrigin, part: LogPart) -> tuple[list[ObservedTotals], LineTally]:
    tally = LineTally(origin=origin)
    rows: dict[tuple[str, str, str], ObservedTotals] = {}
    for line in read_lines(part.path, query, tally, part.begin, part.stop):
        if _MARK not in line and line.endswith(b"}"):
            continue
        record = parse_line(line, tally)
        if record is not None and query.matches(record):
            for row in _list_losses(record, query):
                rows.setdefault((row.user, row.key, row.gpu), ObservedTotals(row.user, row.key, row.gpu)).add(row)
    return list(rows.values()), tally


def list_would_clamp(record: LoggedRecord) -> list[Mapping[str, Any]]:
    """Return the entries of `would_clamp` that are what they should be."""
    entries = record.get("would_clamp")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _list_losses(record: LoggedRecord, query: RecordQuery) -> Iterator[ObservedTotals]:
    process = tuple(str(record.get(name)) for name in ("host", "pid", "start_ticks"))
    for entry in list_would_clamp(record):
        gpu = str(entry.get("gpu") or "")
        if query.gpus and not query.matches_gpu({"uuid": gpu, "token": gpu}):
            continue
        yield ObservedTotals(
            str(record.get("user")),
            str(entry.get("key")),
            gpu,
            {(process[0], process[1], process[2])},
            str(entry.get("asked")),
            str(entry.get("given")),
            _check_size(entry.get("asked_bytes")),
            _check_size(entry.get("given_bytes")),
            {str(entry.get("held_by"))},
            record["timestamp"],
        )


def _check_size(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None
