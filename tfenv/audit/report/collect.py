"""Reads logs for the report, in as many processes as there are cores, and sums up what they say.

Processes whose begin and end stand in one part of a log are summed up where that part is read. Where one shows up in
several parts all the same (a record that stands in two logs), everything is read again and matched in one place.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

from tfenv.audit.job_names import format_job, read_job
from tfenv.audit.log_parts import LogPart, map_parts, split_logs
from tfenv.audit.query import LineTally, RecordQuery, count_times, parse_line, read_lines
from tfenv.audit.record import MAX_RECORD_BYTES
from tfenv.audit.report.process_use import (
    LONGEST_TEXT,
    FrameworkGpu,
    ProcessUse,
    merge_records,
    read_framework_gpus,
)
from tfenv.audit.report.times import DAY_MS, EARLIEST_MS, TimestampReader
from tfenv.audit.report.totals import MOST_NAMES, OTHERS, EventTotals, UseTotals, add_name
from tfenv.audit.rotation import LogOrigin
from tfenv.dependencies import import_dependency

_CREATES = frozenset({"policy_applied", "policy_clamped"})
_EVENTS = _CREATES | {"policy_loaded", "policy_failed", "policy_disabled", "policy_changed", "policy_ended"}
_FAILS = frozenset({"policy_failed", "policy_disabled"})
#: Of the processes without an end, and of those that were summed up. Beyond that memory would grow with the log.
MOST_PROCESSES = 100_000
_MOST_SUMMED_UP = 2_000_000
_MOST_KNOWN = 20_000
_MOST_WAIT_MS = 1 << 42

#: Names a process. Without the start of the process, which older records do not have, a user's process number.
ProcessKey = tuple[str, int, int | None, str]


@dataclass(slots=True)
class Collection:
    """What was read.

    Attributes:
        events: What happened how often.
        totals: The processes that are summed up already.
        uses: Those that are not: their begin or their end is not known yet.
        old_uses: What each record says of those that older versions wrote about.
        summed_up: Which are summed up, as hashes of their keys.
        is_split: Whether one of them was seen again.
        closed_early: How many were summed up without an end, for there were too many of them.
    """

    events: EventTotals = field(default_factory=EventTotals)
    totals: UseTotals = field(default_factory=UseTotals)
    uses: dict[ProcessKey, ProcessUse] = field(default_factory=dict)
    old_uses: dict[ProcessKey, list[ProcessUse]] = field(default_factory=dict)
    summed_up: set[int] = field(default_factory=set)
    is_split: bool = False
    closed_early: int = 0

    def add(self, other: Collection) -> None:
        """Add what was read elsewhere."""
        self.events.add(other.events)
        self.totals.add(other.totals)
        self.is_split = self.is_split or other.is_split or not self.summed_up.isdisjoint(other.summed_up)
        self.summed_up |= other.summed_up
        self.closed_early += other.closed_early
        for key, use in other.uses.items():
            known = self.uses.setdefault(key, use)
            if known is not use:
                known.merge(use)
        for key, records in other.old_uses.items():
            self.old_uses.setdefault(key, []).extend(records)

    def finish(self, since: int) -> None:
        """Sum up all processes, those without an end, too."""
        self.is_split = self.is_split or any(hash(key) in self.summed_up for key in self.uses)
        for use in self.uses.values():
            self.totals.add_use(use, since)
        for records in self.old_uses.values():
            for use in merge_records(records):
                self.totals.add_use(use, since)
        self.uses.clear()
        self.old_uses.clear()

    def sum_up_complete(self, since: int) -> None:
        """Sum up the processes whose begin and end are known."""
        for key, use in list(self.uses.items()):
            if use.is_complete:
                self._sum_up(key, use, since)

    def make_space(self, since: int) -> None:
        """Sum up what is complete. Where too many are left, also those without an end that are silent the longest."""
        self.sum_up_complete(since)
        if len(self.uses) <= MOST_PROCESSES // 2:
            return
        silent = sorted(self.uses.items(), key=lambda item: item[1].last)
        for key, use in silent[: len(silent) // 2]:
            self.closed_early += 1
            self._sum_up(key, use, since)

    def make_old_space(self, since: int) -> None:
        """Sum up what records of older versions tell, as far as they are read."""
        for records in self.old_uses.values():
            for use in merge_records(records):
                self.closed_early += use.ended is None
                self.totals.add_use(use, since)
        self.old_uses.clear()

    def _sum_up(self, key: ProcessKey, use: ProcessUse, since: int) -> None:
        self.totals.add_use(use, since)
        if len(self.summed_up) < _MOST_SUMMED_UP:
            self.summed_up.add(hash(key))
        del self.uses[key]


def collect_logs(logs: Sequence[Path], query: RecordQuery, tally: LineTally, now: int) -> Collection:
    """Read the wanted records of all logs, and sum them up.

    Args:
        logs: The logs.
        query: Which records are wanted.
        tally: Counts what is no record, and gets the logs that are left out.
        now: The time, in milliseconds since 1970. What is dated later was made by a clock that was wrong.

    Raises:
        ImportError: msgspec is not installed.
        OSError: A log cannot be read.
    """
    import_dependency("msgspec")
    since = TimestampReader().read(query.since) if query.since else 0
    parts = split_logs(logs, query.since)
    collection = Collection()
    for is_shared in (True, False):
        collection, part_tally = Collection(), LineTally(origin=tally.origin)
        read = partial(_collect_part, query, tally.origin, now, since, is_shared)
        for of_part, tally_of_part in map_parts(read, parts):
            collection.add(of_part)
            part_tally.add(tally_of_part)
        collection.finish(since)
        if not collection.is_split:
            break
    tally.add(part_tally)
    return collection


def _collect_part(
    query: RecordQuery, origin: LogOrigin, now: int, since: int, is_shared: bool, part: LogPart
) -> tuple[Collection, LineTally]:
    tally = LineTally(origin=origin)
    collector = RecordCollector(query, now, since, is_shared=is_shared)
    with _pause_garbage_collection():
        collector.add_lines(read_lines(part.path, query, tally, part.begin, part.stop), tally)
        if is_shared:
            collector.collection.sum_up_complete(since)
    return collector.collection, tally


@contextmanager
def _pause_garbage_collection() -> Iterator[None]:
    """Look for no cycles: there are none among the many objects made here, and to look takes a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class RecordCollector:
    """Collects what records say.

    Args:
        query: Which records are wanted.
        now: The time, in milliseconds since 1970.
        since: What was before does not count, likewise.
        is_shared: Whether others collect from other parts of the logs, and what is complete is summed up here. If not,
            everything is kept, as far as there is space.
    """

    def __init__(self, query: RecordQuery, now: int, since: int = 0, *, is_shared: bool = True) -> None:
        self.collection = Collection()
        self._query = query
        self._filters = query != RecordQuery(users=query.users, since=query.since, until=query.until)
        self._users = query.users
        self._since = since
        self._latest = now + DAY_MS
        self._is_shared = is_shared
        self._times = TimestampReader()
        self._gpus: dict[tuple[str, bytes], tuple[FrameworkGpu, ...]] = {}
        self._texts: dict[bytes, str] = {}
        self._old = 0

    def add_lines(self, lines: Iterable[bytes], tally: LineTally) -> None:
        """Add the records in the lines, and count in the tally what is none."""
        decode = _make_decoder()
        is_in_time = self._query.is_in_time
        for line in lines:
            try:
                record = decode(line)
            except (ValueError, RecursionError):
                found = parse_line(line, tally)
                if found is None:
                    continue
                record = _convert(found)
            if self._users and record.user not in self._users:
                continue
            if is_in_time(record.timestamp) and (not self._filters or self._matches(line, tally)):
                self._add_record(record)

    def _matches(self, line: bytes, tally: LineTally) -> bool:
        """Tell whether the query wants it. To look into a record costs more than to read what is counted."""
        found = parse_line(line, LineTally(origin=tally.origin))
        return found is not None and self._query.matches(found)

    def _add_record(self, record: Any) -> None:
        events, event = self.collection.events, record.event
        try:
            moment = self._times.read(record.timestamp)
        except (ValueError, OverflowError):
            moment = 0
        if not EARLIEST_MS <= moment <= self._latest:
            events.misdated += 1
            return
        events.records[event if event in _EVENTS else OTHERS] += 1
        if record.host not in events.hosts:
            add_name(events.hosts, record.host)
        if record.user not in events.users:
            add_name(events.users, record.user)
        if record.lost:
            events.lost += min(max(record.lost, 0), MOST_NAMES)
        events.first = min(events.first, moment)
        events.last = max(events.last, moment)
        if event in _CREATES or event == "policy_ended":
            self._add_use(record, moment)
        if event == "policy_clamped" or event in _FAILS or record.would_clamp:
            self._count_causes(record, moment)

    # -- processes

    def _add_use(self, record: Any, moment: int) -> None:
        collection = self.collection
        if record.start_ticks is None:
            self._add_old_use(self._read_use(record, moment))
            return
        key = (record.host, record.pid, record.start_ticks, "")
        known = collection.uses.get(key)
        if known is not None and record.event == "policy_ended" and moment > known.first and not record.choice:
            framework = record.framework or ""
            known.note_end(moment, _read_length(record), _make_set(framework))
            known.add_gpus(self._read_gpus(framework, record.devices))
            return
        use = self._read_use(record, moment)
        if known is not None:
            known.merge(use)
            return
        if collection.summed_up and hash(key) in collection.summed_up:
            collection.is_split = True
        collection.uses[key] = use
        if len(collection.uses) >= (MOST_PROCESSES if self._is_shared else 5 * MOST_PROCESSES):
            collection.make_space(self._since)

    def _add_old_use(self, use: ProcessUse) -> None:
        self.collection.old_uses.setdefault((use.host, use.pid, None, use.user), []).append(use)
        self._old += 1
        if self._old >= 5 * MOST_PROCESSES:
            self.collection.make_old_space(self._since)
            self._old = 0

    def _read_use(self, record: Any, moment: int) -> ProcessUse:
        framework = record.framework or ""
        job = self._read_job_name(record) if record.job or record.scheduler else ""
        script = (record.script or "")[:LONGEST_TEXT]
        use = ProcessUse(record.host, record.pid, record.user, moment, moment, script, job)
        if record.event == "policy_ended":
            use.ended, use.ended_in, use.ran_ms = moment, _make_set(framework), _read_length(record)
        else:
            use.begun, use.begun_in = moment, _make_set(framework)
        use.gpus = self._read_gpus(framework, record.devices)
        if record.choice:
            self._read_choice(use, _decode(record.choice))
        return use

    def _read_choice(self, use: ProcessUse, choice: object) -> None:
        if isinstance(choice, dict):
            waited = choice.get("waited_ms")
            if isinstance(waited, int | float) and 0 <= waited < _MOST_WAIT_MS:
                use.waited_ms = int(waited)
            use.has_lease = isinstance(choice.get("lease"), str)

    def _read_gpus(self, framework: str, devices: Any) -> tuple[FrameworkGpu, ...]:
        text = bytes(devices)
        if b"peak_bytes" in text:  # no two are the same
            return read_framework_gpus(framework, _decode(text))
        key = (framework, text)
        if key not in self._gpus:
            if len(self._gpus) >= _MOST_KNOWN:
                self._gpus.clear()
            self._gpus[key] = read_framework_gpus(framework, _decode(text)) if text else ()
        return self._gpus[key]

    def _read_job_name(self, record: Any) -> str:
        text = bytes(record.job) + b" " + bytes(record.scheduler)
        if text not in self._texts:
            if len(self._texts) >= _MOST_KNOWN:
                self._texts.clear()
            job = read_job({"job": _decode(record.job), "scheduler": _decode(record.scheduler)})
            self._texts[text] = format_job(job)[:LONGEST_TEXT]
        return self._texts[text]

    # -- what happened

    def _count_causes(self, record: Any, moment: int) -> None:
        times = count_times({"repeats": record.repeats})
        count = self.collection.events.count_cause
        if record.event == "policy_clamped":
            count(moment, "clamped", _name_cut(record), times)
        elif record.event == "policy_disabled":
            count(moment, "failed", "switched off (TFGPU_DISABLE)", times)
        elif record.event == "policy_failed":
            count(moment, "failed", _name_failure(record), times)
        lost = _list_texts(_decode(record.would_clamp), "key")
        if lost:
            count(moment, "would_clamp", ", ".join(lost), times)


def _read_length(record: Any) -> int | None:
    """Return how long the process ran, in milliseconds. None: it is not told."""
    length = record.duration_ms
    return int(length) if length is not None and 0 <= length < _MOST_WAIT_MS else None


@lru_cache(_MOST_KNOWN)
def _make_set(name: str) -> frozenset[str]:
    return frozenset((name,))


def _name_cut(record: Any) -> str:
    """Name what was cut. Records of older versions have it in their findings only."""
    cut = _decode(record.cut)
    names = sorted({name for name in cut if isinstance(name, str)}) if isinstance(cut, list) else []
    if not names:
        asked = _list_texts(_decode(record.findings), "asked")
        names = sorted({text.partition(" = ")[0] for text in asked})
    return ", ".join(names)[:LONGEST_TEXT] or "not told"


def _name_failure(record: Any) -> str:
    findings = _decode(record.findings)
    entries = [entry for entry in findings if isinstance(entry, dict)] if isinstance(findings, list) else []
    errors = [entry for entry in entries if entry.get("severity") == "error"] or entries
    return ", ".join(_list_texts(errors, "code"))[:LONGEST_TEXT] or record.status or "not told"


def _list_texts(entries: object, name: str) -> list[str]:
    """Return the different texts that entries have under this name, sorted."""
    found = [entry.get(name) for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return sorted({text[:LONGEST_TEXT] for text in found if isinstance(text, str)})


# ---- one record


def _decode(text: Any) -> Any:
    """Return the value of a field, None where there is none or it cannot be read."""
    if not text:
        return None
    try:
        return _load_decoder()(text)
    except (ValueError, RecursionError):
        return None


@cache
def _load_decoder() -> Callable[[Any], Any]:
    return import_dependency("msgspec").json.Decoder().decode  # type: ignore[no-any-return]


_RAW_FIELDS = ("devices", "choice", "cut", "findings", "would_clamp", "job", "scheduler")
_SHAPE: tuple[tuple[str, Any, Any], ...] = (
    ("host", str, ""),
    ("user", str, ""),
    ("pid", int, 0),
    ("start_ticks", int | None, None),
    ("script", str | None, None),
    ("framework", str | None, None),
    ("status", str, ""),
    ("repeats", int, 1),
    ("lost", int, 0),
    ("duration_ms", float | None, None),
)


def _make_line_type() -> Any:
    msgspec = import_dependency("msgspec")
    raw = [(name, msgspec.Raw, msgspec.Raw()) for name in _RAW_FIELDS]
    return msgspec.defstruct("Line", [("timestamp", str), ("event", str), *_SHAPE, *raw], gc=False)


def _make_decoder() -> Callable[[bytes], Any]:
    """Return what reads a record, with the fields that are needed, and raises ValueError where it is in doubt."""
    msgspec = import_dependency("msgspec")
    load = msgspec.json.Decoder(_make_line_type()).decode

    def decode(line: bytes) -> Any:
        if len(line) > MAX_RECORD_BYTES:
            raise ValueError("it is longer than a record")
        record = load(line)
        if not line.isascii():
            line.decode()
        return record

    return decode


def _convert(found: Mapping[str, Any]) -> Any:
    """Return a record that has other types than ours have: what is not as it should be is as if it were not told."""
    msgspec = import_dependency("msgspec")
    values: dict[str, Any] = {"timestamp": found["timestamp"], "event": found["event"]}
    values |= dict(_read_values(found))
    values |= {name: msgspec.Raw(json.dumps(found[name]).encode()) for name in _RAW_FIELDS if name in found}
    return _make_line_type()(**values)


def _read_values(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, kind, default in _SHAPE:
        value = found.get(name, default)
        fits = isinstance(value, kind) and not isinstance(value, bool)
        yield name, value if fits or (kind == float | None and type(value) is int) else default
