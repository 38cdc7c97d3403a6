"""Who used which GPU: the totals over the records of logs, by user and GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tfenv.audit.job_names import format_job, read_job
from tfenv.audit.line_decoder import choose_decoder
from tfenv.audit.log_parts import LogPart, map_parts, split_logs
from tfenv.audit.query import (
    LineTally,
    LoggedRecord,
    RecordQuery,
    count_times,
    decode_json,
    get_gpu_id,
    list_logged_devices,
    parse_line,
    read_lines,
)
from tfenv.audit.rotation import LogOrigin
from tfenv.values import replace

_Number = TypeVar("_Number", int, float)

#: The events of a use. Plans (policy_loaded, policy_changed) are none.
SUMMARIZED_EVENTS = frozenset({"policy_applied", "policy_clamped", "policy_failed"})
_MIB = 1 << 20
#: Different records that are remembered at a time.
_MOST_KNOWN = 10_000
#: What a summary asks of a record, beside its time and process.
_SUMMARIZED = ("event", "user", "host", "devices", "cut", "asked", "repeats")


@dataclass
class UserGpuTotals:
    """What one user did with one GPU.

    Attributes:
        user: Name.
        gpu: Its id, as `query.get_gpu_id` gives it. "" for records without a GPU.
        job: The job, where totals are asked for by job. "" outside of one. None: they are of all jobs.
        processes: Those that created devices, as host and pid.
        clamped: Records of a program that got less than it or a file asked for.
        cut: In how many of these each key, term or variable was cut.
        failed: Records of a policy that was not in force.
        asked_bytes: The largest limit that a program asked for, or a file that did not get it. A split counts as its
            sum. None: none in bytes.
        asked_fraction: Likewise as a fraction of the card's memory.
        given_bytes: The largest limit that was given. None: none in bytes.
        given_fraction: Likewise as a fraction of the card's memory, where its size was not known.
        last: Timestamp of the newest record.
        counted: Processes beside those, which were counted elsewhere.
    """

    user: str
    gpu: str
    job: str | None = None
    processes: set[tuple[str, str]] = field(default_factory=set)
    clamped: int = 0
    cut: dict[str, int] = field(default_factory=dict)
    failed: int = 0
    asked_bytes: int | None = None
    asked_fraction: float | None = None
    given_bytes: int | None = None
    given_fraction: float | None = None
    last: str = ""
    counted: int = 0

    @property
    def process_count(self) -> int:
        """How many processes created devices."""
        return len(self.processes) + self.counted

    def as_dict(self) -> dict[str, Any]:
        """Return the totals as JSON has them: the processes as their number."""
        totals = {**vars(self), "processes": self.process_count, "cut": dict(sorted(self.cut.items()))}
        del totals["counted"]
        return {name: value for name, value in totals.items() if name != "job" or value is not None}


def summarize_logs(
    logs: Sequence[Path], query: RecordQuery, tally: LineTally, *, by_job: bool = False
) -> list[UserGpuTotals]:
    """Sum up the wanted records of all logs, long ones in as many processes as there are cores.

    Args:
        logs: The logs.
        query: Which records are wanted.
        tally: Counts what is no record, and gets the logs that are left out.
        by_job: Whether each job has totals of its own.

    Raises:
        OSError: A log cannot be read.
    """
    events = query.events & SUMMARIZED_EVENTS if query.events else SUMMARIZED_EVENTS
    if not events:
        return []
    query = replace(query, events=events)
    parts = split_logs(logs, query.since)
    summarizer = _Summarizer(query, by_job=by_job)
    for rows, part_tally in map_parts(partial(_summarize_part, query, tally.origin, by_job), parts):
        summarizer.add_rows(rows)
        tally.add(part_tally)
    return summarizer.list_rows()


def _summarize_part(
    query: RecordQuery,
    origin: LogOrigin,
    by_job: bool,
    part: LogPart,
) -> tuple[list[UserGpuTotals], LineTally]:
    tally = LineTally(origin=origin)
    summarizer = _Summarizer(query, by_job=by_job)
    summarizer.add_lines(read_lines(part.path, query, tally, part.begin, part.stop), tally)
    return summarizer.list_rows(), tally


def summarize_records(records: Iterable[LoggedRecord], query: RecordQuery = RecordQuery()) -> list[UserGpuTotals]:  # noqa: B008 - it is frozen
    """Sum up records per user and GPU.

    Args:
        records: The records.
        query: Which of them are wanted, and which GPUs of a record with several count.

    Returns:
        Totals sorted by user and GPU.
    """
    summarizer = _Summarizer(query)
    for record in records:
        summarizer.add(record)
    return summarizer.list_rows()


class _KnownRecord:
    """What records say that differ in nothing but time and process, and how many there were.

    Attributes:
        record: One of them, with the fields that are asked for.
        times: How many are wanted.
        last: The newest timestamp.
        pids: Of what processes, as text or its bytes.
    """

    __slots__ = ("last", "pids", "record", "times")

    def __init__(self, record: LoggedRecord) -> None:
        if not isinstance(record.get("event"), str):
            raise ValueError("a record has the name of an event")  # noqa: TRY004 - what is read is no argument
        self.record = record
        self.times = 0
        self.last = ""
        self.pids: set[str | bytes] = set()

    def count(self, timestamp: str, pid: str | bytes) -> None:
        """Count one of them."""
        self.times += 1
        self.pids.add(pid)
        if timestamp > self.last:  # noqa: PLR1730 - max() takes twice as long, once for each line
            self.last = timestamp


class _Summarizer:
    """Sums up records per user and GPU. What records say that differ only in time and process is worked out once."""

    def __init__(self, query: RecordQuery, *, by_job: bool = False) -> None:
        self._query = query
        self._by_job = by_job
        self._has_limits = bool(query.since or query.until)
        # Its time differs from record to record.
        self._timeless = replace(query, since="", until="")
        self._fields = (*_SUMMARIZED, *list_filtered(query, by_job=by_job))
        self._rows: dict[tuple[str, str, str | None], UserGpuTotals] = {}
        self._known: dict[object, _KnownRecord] = {}

    def add_lines(self, lines: Iterable[bytes], tally: LineTally) -> None:
        """Count the records in the lines, and in the tally what is none."""
        decode = choose_decoder(self._fields)
        fields = ("timestamp", "pid", *self._fields)
        for line in lines:
            try:
                timestamp, pid, key = decode(line)
                known = self._known.get(key) or self._learn(key, self._decode_fields(key))
            except (ValueError, RecursionError):  # what is no record, or not as `decode` takes it
                record = parse_line(line, tally, fields)
                if record is not None:
                    self.add(record)
                continue
            if not self._has_limits or self._query.is_in_time(timestamp):
                known.count(timestamp, pid)

    def _decode_fields(self, texts: Iterable[bytes]) -> LoggedRecord:
        return {name: decode_json(text) for name, text in zip(self._fields, texts, strict=True) if text}

    def add(self, record: LoggedRecord) -> None:
        """Count a record."""
        key = repr([record.get(name) for name in self._fields])
        known = self._known.get(key) or self._learn(key, record)
        if self._query.is_in_time(record["timestamp"]):
            known.count(record["timestamp"], str(record.get("pid")))

    def _learn(self, key: object, record: LoggedRecord) -> _KnownRecord:
        if len(self._known) >= _MOST_KNOWN:
            self._sum_up()
        known = self._known[key] = _KnownRecord(record)
        return known

    def _sum_up(self) -> None:
        """Add what is known to the rows, and forget it."""
        for known in self._known.values():
            record = known.record
            wanted = (
                known.times
                and record["event"] in SUMMARIZED_EVENTS
                and self._timeless.matches({**record, "timestamp": ""})
            )
            job = format_job(read_job(record)) if self._by_job else None
            for use in list_uses(record, self._query) if wanted else ():
                _add_use(self._find_row(str(record.get("user")), use.gpu, job), known, use)
        self._known.clear()

    def _find_row(self, user: str, gpu: str, job: str | None) -> UserGpuTotals:
        if (user, gpu, job) not in self._rows:
            self._rows[user, gpu, job] = UserGpuTotals(user, gpu, job)
        return self._rows[user, gpu, job]

    def add_rows(self, rows: Iterable[UserGpuTotals]) -> None:
        """Count what others summed up."""
        for other in rows:
            row = self._find_row(other.user, other.gpu, other.job)
            row.processes |= other.processes
            row.clamped += other.clamped
            row.failed += other.failed
            _count_cuts(row, other.cut, 1)
            row.last = max(row.last, other.last)
            _widen_limits(row, other)

    def list_rows(self) -> list[UserGpuTotals]:
        """Return the totals, sorted by user, job and GPU."""
        self._sum_up()
        return sorted(self._rows.values(), key=lambda row: (row.user, row.job or "", row.gpu))


def list_filtered(query: RecordQuery, *, by_job: bool) -> list[str]:
    """Return the fields that the query's filters need. Others would make more records different."""
    needed = {
        "host": bool(query.hosts),
        "uid": bool(query.uids),
        "status": bool(query.outcomes),
        "project": query.project is not None,
        "script": query.script is not None or query.project is not None,
        "job": by_job or bool(query.jobs),
        "scheduler": by_job or bool(query.jobs),  # of older versions
    }
    return [name for name in needed if needed[name]]


class GpuUse(NamedTuple):
    """What a record says of one GPU: what was asked of it and given. A tuple, for there is one for each line."""

    gpu: str
    asked_bytes: int | None = None
    asked_fraction: float | None = None
    given_bytes: int | None = None
    given_fraction: float | None = None


def list_uses(record: LoggedRecord, query: RecordQuery) -> list[GpuUse]:
    """Return what a record says of each of its GPUs that is wanted. Of a record without a GPU it is one use of none."""
    devices = list_logged_devices(record)
    if not devices:
        return [GpuUse("")]
    return [read_use(record, place, device) for place, device in enumerate(devices) if query.matches_gpu(device)]


def read_use(record: LoggedRecord, place: int, device: Mapping[str, Any]) -> GpuUse:
    """Return what a record says of the device at this place in it."""
    asked = record.get("asked")
    terms: Mapping[str, Any] = asked if isinstance(asked, dict) else {}
    return GpuUse(
        get_gpu_id(device),
        _take_larger(_sum_split(terms.get("virtual_devices"), place), _check_size(device.get("asked_bytes"))),
        _take_larger(
            _check_number(terms.get("per_process_gpu_memory_fraction")), _check_number(device.get("asked_fraction"))
        ),
        _check_size(device.get("limit_bytes")),
        _check_number(device.get("limit_fraction")),
    )


def _sum_split(split: object, place: int) -> int | None:
    """Return the bytes that a program's own virtual devices (lists of MiB, one for each GPU) take of one GPU."""
    if not isinstance(split, list) or place >= len(split) or not isinstance(split[place], list):
        return None
    sizes = [size for size in map(_check_number, split[place]) if size is not None]
    return int(sum(sizes) * _MIB) if sizes else None


def _check_size(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _check_number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _add_use(row: UserGpuTotals, known: _KnownRecord, use: GpuUse) -> None:
    host, times = str(known.record.get("host")), known.times * count_times(known.record)
    row.processes.update((host, pid if isinstance(pid, str) else pid.decode()) for pid in known.pids)
    row.clamped += times * (known.record["event"] == "policy_clamped")
    row.failed += times * (known.record["event"] == "policy_failed")
    cut = known.record.get("cut")
    _count_cuts(row, {name: 1 for name in cut if isinstance(name, str)} if isinstance(cut, list) else {}, times)
    row.last = max(row.last, known.last)
    _widen_limits(row, use)


def _count_cuts(row: UserGpuTotals, cut: Mapping[str, int], times: int) -> None:
    for name, count in cut.items():
        row.cut[name] = row.cut.get(name, 0) + count * times


def _widen_limits(row: UserGpuTotals, use: GpuUse | UserGpuTotals) -> None:
    row.asked_bytes = _take_larger(row.asked_bytes, use.asked_bytes)
    row.asked_fraction = _take_larger(row.asked_fraction, use.asked_fraction)
    row.given_bytes = _take_larger(row.given_bytes, use.given_bytes)
    row.given_fraction = _take_larger(row.given_fraction, use.given_fraction)


def _take_larger(one: _Number | None, other: _Number | None) -> _Number | None:
    return other if other is not None and (one is None or other > one) else one
