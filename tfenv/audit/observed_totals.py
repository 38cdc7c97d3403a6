"""Whom the tables under `[observe]` would hit: totals of the records' `would_clamp`, by user, key and GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tfenv.audit.gpu_totals import list_filtered
from tfenv.audit.job_names import format_job, read_job
from tfenv.audit.log_parts import LogPart, map_parts, split_logs
from tfenv.audit.query import LineTally, LoggedRecord, RecordQuery, get_gpu_id, list_logged_devices, read_lines
from tfenv.audit.record_groups import GroupedRecords, RecordGroup
from tfenv.audit.rotation import LogOrigin

_FIELDS = ("event", "user", "would_clamp", "devices")
_NEEDLE = b'"would_clamp"'
#: Different records of a part that are remembered at a time.
_MOST_GROUPS = 10_000
#: Places of keys that a row shows.
_MOST_HOLDERS = 4


@dataclass
class ObservedTotals:
    """What one user would lose of one GPU by one key.

    Attributes:
        user: Name.
        key: The key under `[observe]`: "memory_limit".
        gpu: The GPU, as `query.get_gpu_id` gives it. "" for a loss of no single GPU.
        job: The job, where totals are asked for by job. "" outside of one. None: they are of all jobs.
        processes: Those that would lose something, as hashes.
        has: The most that one of them has, in words.
        has_bytes: The same in bytes. None: it is no size.
        would_have: The least that one of them would have, in words.
        would_have_bytes: The same in bytes. None: it is no size.
        held_by: The keys that would hold, as file and key.
        last: Timestamp of the newest record.
    """

    user: str
    key: str
    gpu: str
    job: str | None = None
    processes: set[int] = field(default_factory=set)
    has: str = ""
    has_bytes: int | None = None
    would_have: str = ""
    would_have_bytes: int | None = None
    held_by: set[str] = field(default_factory=set)
    last: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the totals as JSON has them: the processes as their number."""
        totals = {**vars(self), "processes": len(self.processes), "held_by": sorted(self.held_by)}
        return {name: value for name, value in totals.items() if name != "job" or value is not None}


class _Loss(NamedTuple):
    key: str
    gpu: str
    has: str
    would_have: str
    has_bytes: int | None
    would_have_bytes: int | None
    held_by: str


class _Observer:
    """Sums up records."""

    def __init__(self, query: RecordQuery, *, by_job: bool) -> None:
        self._query = query
        self._by_job = by_job
        self._records = self._make_records()
        self._rows: dict[tuple[str, str, str, str | None], ObservedTotals] = {}

    def _make_records(self) -> GroupedRecords:
        return GroupedRecords((*_FIELDS, *list_filtered(self._query, by_job=self._by_job)), self._query, needle=_NEEDLE)

    def read(self, part: LogPart, tally: LineTally) -> None:
        """Add the records of a part of a log."""
        lines = read_lines(part.path, self._query, tally, part.begin, part.stop)
        for _ in self._records.add_lines(lines, tally):
            if len(self._records.groups) >= _MOST_GROUPS:
                self._sum_up()

    def _sum_up(self) -> None:
        # What was yielded for is not complete, but what comes later makes a group of its own.
        for _, group in self._records.list_wanted():
            job = format_job(read_job(group.record)) if self._by_job else None
            for loss in _list_losses(group.record, self._query):
                self._add(group, loss, job)
        self._records.groups.clear()

    def _add(self, group: RecordGroup, loss: _Loss, job: str | None) -> None:
        row = self._find_row(str(group.record.get("user")), loss.key, loss.gpu, job)
        one = ObservedTotals(
            row.user, row.key, row.gpu, job, group.processes, *(loss.has, loss.has_bytes),
            *(loss.would_have, loss.would_have_bytes), {loss.held_by} if loss.held_by else set(), group.timestamp,
        )  # fmt: skip
        _widen(row, one)

    def _find_row(self, user: str, key: str, gpu: str, job: str | None) -> ObservedTotals:
        name = (user, key, gpu, job)
        if name not in self._rows:
            self._rows[name] = ObservedTotals(*name)
        return self._rows[name]

    def add_rows(self, rows: Sequence[ObservedTotals]) -> None:
        """Add what others summed up."""
        for row in rows:
            _widen(self._find_row(row.user, row.key, row.gpu, row.job), row)

    def list_rows(self) -> list[ObservedTotals]:
        """Return the totals, sorted."""
        self._sum_up()
        return sorted(self._rows.values(), key=lambda row: (row.user, row.job or "", row.key, row.gpu))


def _widen(row: ObservedTotals, other: ObservedTotals) -> None:
    if not row.processes or (other.has_bytes or 0) > (row.has_bytes or 0):
        row.has, row.has_bytes = other.has, other.has_bytes
    if not row.processes or (
        other.would_have_bytes is not None
        and (row.would_have_bytes is None or other.would_have_bytes < row.would_have_bytes)
    ):
        row.would_have, row.would_have_bytes = other.would_have, other.would_have_bytes
    row.processes |= other.processes
    row.held_by = set(sorted(row.held_by | other.held_by)[:_MOST_HOLDERS])
    row.last = max(row.last, other.last)


def _list_losses(record: LoggedRecord, query: RecordQuery) -> Iterator[_Loss]:
    losses = record.get("would_clamp")
    wanted = {get_gpu_id(device) for device in list_logged_devices(record) if query.matches_gpu(device)}
    for loss in losses if isinstance(losses, list) else ():
        if isinstance(loss, dict):
            gpu = _get_text(loss, "gpu")
            if not query.gpus or gpu in wanted:
                yield _Loss(
                    _get_text(loss, "key"), gpu, _get_text(loss, "asked"), _get_text(loss, "given"),
                    _get_size(loss, "asked_bytes"), _get_size(loss, "given_bytes"), _get_text(loss, "held_by"),
                )  # fmt: skip


def _get_text(loss: Mapping[str, Any], name: str) -> str:
    value = loss.get(name)
    return value if isinstance(value, str) else ""


def _get_size(loss: Mapping[str, Any], name: str) -> int | None:
    value = loss.get(name)
    return value if type(value) is int and value >= 0 else None


def summarize_observed(
    logs: Sequence[Path], query: RecordQuery, tally: LineTally, *, by_job: bool = False
) -> list[ObservedTotals]:
    """Sum up what processes would lose if the tables under `[observe]` were in force.

    Args:
        logs: The logs. Long ones are read in as many processes as there are cores.
        query: Which records are wanted.
        tally: Counts what is no record, and gets the logs that are left out.
        by_job: Whether each job has totals of its own.

    Returns:
        Totals sorted by user, key and GPU.

    Raises:
        OSError: A log cannot be read.
    """
    observer = _Observer(query, by_job=by_job)
    parts = split_logs(logs, query.since)
    for rows, part_tally in map_parts(partial(_summarize_part, query, tally.origin, by_job), parts):
        observer.add_rows(rows)
        tally.add(part_tally)
    return observer.list_rows()


def _summarize_part(
    query: RecordQuery, origin: LogOrigin, by_job: bool, part: LogPart
) -> tuple[list[ObservedTotals], LineTally]:
    tally = LineTally(origin=origin)
    observer = _Observer(query, by_job=by_job)
    observer.read(part, tally)
    return observer.list_rows(), tally
