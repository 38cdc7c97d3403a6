"""Reads the log back: streaming, tolerant of torn and foreign lines, compressed or not."""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatchcase
from io import BufferedReader
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn, cast

from tfenv.audit.job_names import build_job_prefilter, list_job_names, read_job
from tfenv.audit.record import MAX_RECORD_BYTES, clip_job_text, format_timestamp
from tfenv.audit.rotation import COMPRESSED, STORED, LogOrigin, LogRefusedError, is_damage, open_log
from tfenv.policy.units import parse_duration
from tfenv.values import frozen

#: A record as it was read: only `timestamp` and `event` are known to be texts.
LoggedRecord = Mapping[str, Any]

#: How every record of ours begins, and how long the timestamp behind it is.
RECORD_BEGIN = b'{"timestamp":"'
TIMESTAMP_BYTES = len("2026-11-05T09:31:07.123456Z")
_TIMESTAMP = slice(len(RECORD_BEGIN), len(RECORD_BEGIN) + TIMESTAMP_BYTES)
_CHUNK_BYTES = 1 << 16
# Far above any record: a file of zeros, or of something else, is not collected into one line.
_LONGEST_LINE_BYTES = 1 << 16
# More repeats than this are no count of ours.
_MOST_REPEATS = 1 << 40
# A float holds no longer number.
_MOST_DIGITS = 300
# A file server's clock, which dates the last change of a log, may be behind the one that dates its records.
_CLOCKS_DIFFER_BY = timedelta(hours=1)


@dataclass
class LineTally:
    """Counts what was met while reading.

    Attributes:
        unreadable: Lines, or damaged beginnings of lines, that are not records.
        left_out: The logs that were not read, or not to their end, and why.
        origin: Who named the logs.
    """

    unreadable: int = 0
    left_out: dict[Path, str] = field(default_factory=dict)
    origin: LogOrigin = field(default_factory=LogOrigin)

    def add(self, other: LineTally) -> None:
        """Add what was met elsewhere."""
        self.unreadable += other.unreadable
        self.left_out |= other.left_out


@frozen
class RecordQuery:
    """Which records are wanted. An empty set or None means all.

    Attributes:
        events: Names as in the record: "policy_applied".
        users: User names.
        hosts: Names of machines, as the kernel of each has them.
        uids: User ids.
        pids: Process ids.
        outcomes: What happened at an entry point: "clamped", as in the record's `status`.
        gpus: GPUs, each a UUID or its beginning, an entry of CUDA_VISIBLE_DEVICES, or `name:*A100*`.
        jobs: Names of jobs or of parts of them, as `job_names.list_job_names` has them.
        project: A directory: records of a project or script in it or below it.
        script: Path, file name or glob of the program.
        since: No record before it, as `parse_moment` gives it.
        until: Only records before it, likewise.
    """

    events: frozenset[str] = frozenset()
    users: frozenset[str] = frozenset()
    hosts: frozenset[str] = frozenset()
    uids: frozenset[int] = frozenset()
    pids: frozenset[int] = frozenset()
    outcomes: frozenset[str] = frozenset()
    gpus: frozenset[str] = frozenset()
    jobs: frozenset[str] = frozenset()
    project: str | None = None
    script: str | None = None
    since: str = ""
    until: str = ""

    def matches(self, record: LoggedRecord) -> bool:
        """Tell whether the record is wanted."""
        return (
            self.is_in_time(record["timestamp"])
            and (not self.events or record["event"] in self.events)
            and (not self.users or _is_wanted(record.get("user"), self.users))
            and (not self.hosts or _is_wanted(record.get("host"), self.hosts))
            and (not self.uids or _is_wanted(record.get("uid"), self.uids))
            and (not self.pids or _is_wanted(record.get("pid"), self.pids))
            and (not self.outcomes or _is_wanted(record.get("status"), self.outcomes))
            and (not self.gpus or any(self.matches_gpu(device) for device in list_logged_devices(record)))
            and (not self.jobs or _is_of_job(record, self.jobs))
            and (self.project is None or _is_of_project(record, self.project))
            and (self.script is None or _is_script(record.get("script"), self.script))
        )

    def is_in_time(self, timestamp: str) -> bool:
        """Tell whether a record of that moment is wanted."""
        return timestamp >= self.since and (not self.until or timestamp < self.until)

    def matches_gpu(self, device: Mapping[str, Any]) -> bool:
        """Tell whether an entry of a record's `devices` is among the GPUs that are wanted."""
        return not self.gpus or any(_is_gpu(device, wanted) for wanted in self.gpus)

    def build_prefilter(self) -> tuple[tuple[bytes, ...], ...]:
        """Return byte strings, of each group of which a line that matches has one.

        A line that spells something with a backslash may match without. To look for one or two is cheaper than to
        parse the line. To look for more is not.
        """
        single = [next(iter(wanted)) for wanted in (self.events, self.users, self.outcomes) if len(wanted) == 1]
        # A text that JSON may spell in several ways cannot be looked for.
        groups = [(f'"{text}"'.encode("ascii"),) for text in single if json.dumps(text) == f'"{text}"']
        job = build_job_prefilter(next(iter(self.jobs))) if len(self.jobs) == 1 else ()
        return (*groups, *([job] if job else ()))


def _is_wanted(value: object, wanted: frozenset[Any]) -> bool:
    return isinstance(value, (str, int)) and value in wanted


def _is_of_job(record: LoggedRecord, wanted: frozenset[str]) -> bool:
    names = map(clip_job_text, list_job_names(read_job(record)))
    return not frozenset(names).isdisjoint(map(clip_job_text, wanted))


def list_logged_devices(record: LoggedRecord) -> list[Mapping[str, Any]]:
    """Return the entries of `devices` that are what they should be."""
    devices = record.get("devices")
    return [device for device in devices if isinstance(device, dict)] if isinstance(devices, list) else []


def list_asked(record: LoggedRecord) -> list[str]:
    """Return what the program or a file asked for and did not get, in words. Older records have none."""
    findings = record.get("findings")
    entries = [entry for entry in findings if isinstance(entry, dict)] if isinstance(findings, list) else []
    asked = dict.fromkeys(entry.get("asked") for entry in entries)
    return [text for text in asked if isinstance(text, str)]


def count_times(record: LoggedRecord) -> int:
    """Return how often what the record says happened, since the last record of it."""
    repeats = record.get("repeats")
    return repeats if type(repeats) is int and 0 < repeats < _MOST_REPEATS else 1


def get_gpu_id(device: Mapping[str, Any]) -> str:
    """Return the UUID. Where there is none: the entry of CUDA_VISIBLE_DEVICES, or the framework's number."""
    return str(device.get("uuid") or device.get("token") or device.get("index"))


def _is_gpu(device: Mapping[str, Any], wanted: str) -> bool:
    if wanted.startswith("name:"):
        return fnmatchcase(str(device.get("name") or ""), wanted.removeprefix("name:"))
    uuid = device.get("uuid")
    if wanted.startswith(("GPU-", "MIG-")) and isinstance(uuid, str) and uuid.startswith(wanted):
        return True
    return wanted in (device.get("token"), get_gpu_id(device))


def _is_of_project(record: LoggedRecord, folder: str) -> bool:
    return any(_is_inside(record.get(key), folder) for key in ("project", "script"))


def _is_inside(path: object, folder: str) -> bool:
    """Compare by components: /srv/ab is not inside /srv/a."""
    return isinstance(path, str) and f"{path}/".startswith(f"{folder.rstrip('/')}/")


def _is_script(path: object, pattern: str) -> bool:
    return isinstance(path, str) and any(fnmatchcase(name, pattern) for name in (path, path.rpartition("/")[2]))


def parse_moment(text: str, now: datetime | None = None) -> str:
    """Return a moment, spelled as in the records.

    Args:
        text: A duration back from now ("30min", "2h", "7d"), or a date or time in ISO 8601: without a time
            zone it is local.
        now: The current time, for tests. None: the clock's.

    Raises:
        ValueError: Its text says what would be right.
    """
    try:
        back = timedelta(seconds=parse_duration(text))
        moment = (now or datetime.now(timezone.utc)) - back
    except (ValueError, OverflowError):
        moment = _parse_iso(text)
    return format_timestamp(moment)


def _parse_iso(text: str) -> datetime:
    try:
        return datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))
    except ValueError:
        raise ValueError(f'"{text}" is not a time; write "2h", "7d", "2026-11-05" or "2026-11-05T09:30"') from None


# ---- lines


def select_records(lines: Iterable[bytes], query: RecordQuery, tally: LineTally) -> Iterator[LoggedRecord]:
    """Yield the records among `lines` that the query wants."""
    for line in _skip_unwanted_lines(lines, query):
        record = parse_line(line, tally)
        if record is not None and query.matches(record):
            yield record


def _skip_unwanted_lines(lines: Iterable[bytes], query: RecordQuery) -> Iterable[bytes]:
    """Leave out what cannot match, by a look at the bytes. In doubt a line stays."""
    if query.since or query.until:
        lines = _skip_out_of_time(lines, query.since.encode("ascii"), query.until.encode("ascii") or b"~")
    if query.pids:
        texts = [str(pid).encode("ascii") for pid in query.pids]
        lines = (line for line in lines if any(text in line for text in texts))
    for alternatives in query.build_prefilter():
        lines = _skip_without(lines, *alternatives)
    return lines


def _skip_out_of_time(lines: Iterable[bytes], since: bytes, until: bytes) -> Iterator[bytes]:
    for line in lines:
        is_ours = line.startswith(RECORD_BEGIN)
        # A whole record may stand behind a torn one.
        if not is_ours or since <= line[_TIMESTAMP] < until or line.find(RECORD_BEGIN, 1) >= 0:
            yield line


def _skip_without(lines: Iterable[bytes], text: bytes, other: bytes = b"\\") -> Iterator[bytes]:
    return (line for line in lines if text in line or other in line or b"\\" in line or not line.endswith(b"}"))


def parse_line(line: bytes, tally: LineTally, fields: Collection[str] | None = None) -> LoggedRecord | None:
    """Return the record in the line. Behind a torn one, where a writer was killed, a whole one may follow.

    Args:
        line: Without its newline.
        tally: Counts a line that is no record, and no blank one.
        fields: Only these are looked at: what is in the others does not matter, as long as it is JSON. None: all are.
    """
    if not line or line.isspace():
        return None
    record = _parse_record(line, fields)
    if record is None:
        tally.unreadable += 1
        start = line.rfind(RECORD_BEGIN)
        record = _parse_record(line[start:], fields) if start > 0 else None
    return record


def decode_json(text: bytes | str) -> Any:
    """Return a value of JSON whose numbers are finite, as floats too. Anybody may have written it.

    Raises:
        ValueError: It is something else.
        RecursionError: It is nested too deeply.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    return _DECODER.decode(text)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is not a number that a record may have")


def _parse_int(text: str) -> int:
    return int(text) if len(text) <= _MOST_DIGITS else _refuse_number(text)


def _parse_any_int(text: str) -> int | float:
    return int(text) if len(text) <= _MOST_DIGITS else float("inf")


def _parse_float(text: str) -> float:
    value = float(text)
    return value if isfinite(value) else _refuse_number(text)


#: `json.loads` would make one for each line, which is a quarter of the time.
_DECODER = json.JSONDecoder(parse_constant=_refuse_number, parse_int=_parse_int, parse_float=_parse_float)


def _decode_fields(text: bytes, fields: Collection[str]) -> Any:
    """Return a record with these fields only, of which the numbers are finite. Those of others may be anything.

    Raises:
        ValueError: It is not JSON, or a number in these fields is not finite.
        RecursionError: It is nested too deeply.
    """
    try:
        value = decode_json(text)
    except ValueError:
        if len(text) > MAX_RECORD_BYTES:
            raise
        value = json.loads(text, parse_constant=_refuse_number, parse_int=_parse_any_int)
        if isinstance(value, dict):
            json.dumps([value.get(name) for name in fields], allow_nan=False)
    return {name: value[name] for name in fields if name in value} if isinstance(value, dict) else None


def _parse_record(text: bytes, fields: Collection[str] | None = None) -> LoggedRecord | None:
    if len(text) > _LONGEST_LINE_BYTES:
        return None
    try:
        value = decode_json(text) if fields is None else _decode_fields(text, fields)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("timestamp", "event")):
        return None
    return cast("LoggedRecord", value)


def _split_lines(file: BufferedReader, begin: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield lines without their newlines. What follows the last newline is a line too.

    Args:
        file: A log. It is read from its beginning, or else can be sought.
        begin: Only lines that begin there or later, in bytes.
        stop: Only lines that begin before. None: all.
    """
    place = max(0, begin - 1)  # the line that goes on there is of the part before
    if begin:
        file.seek(place)
    rest, is_of_part_before = b"", begin > 0
    while chunk := file.read1(_CHUNK_BYTES):  # not read: what stands before a damage would be lost with it
        place += len(chunk)
        data = rest + chunk
        end = -1 if stop is None or place < stop else data.find(b"\n", max(0, stop - 1 - place + len(data)))
        *lines, rest = (data if end < 0 else data[: end + 1]).split(b"\n")
        yield from lines[is_of_part_before:]
        is_of_part_before = is_of_part_before and not lines
        if end >= 0:
            return
        rest = _cut_line(rest)
    if rest and not is_of_part_before:
        yield rest


def _cut_line(line: bytes) -> bytes:
    """Return the line, of one that is far longer than any record only the end: a file of zeros is not collected."""
    return line if len(line) <= 2 * _LONGEST_LINE_BYTES else b"\0" + line[-_LONGEST_LINE_BYTES:]


def _split_lines_backwards(file: BufferedReader, end: int | None) -> Iterator[bytes]:
    """Yield lines of an uncompressed file, last first, from `end` bytes on: the newest 20 of a million come at once."""
    position = file.seek(0, os.SEEK_END) if end is None else end
    rest = b""
    while position > 0:
        step = min(_CHUNK_BYTES, position)
        position -= step
        file.seek(position)
        rest, *lines = (file.read(step) + rest).split(b"\n")
        yield from reversed(lines)
        rest = _cut_line(rest)
    yield rest


# ---- logs


def read_records(paths: Sequence[Path], query: RecordQuery, tally: LineTally) -> Iterator[LoggedRecord]:
    """Yield the wanted records of all logs, log by log, in the order they were written.

    Raises:
        OSError: A log cannot be read.
    """
    for path in paths:
        if is_worth_reading(path, query.since):
            yield from select_records(read_lines(path, query, tally), query, tally)


def read_lines(
    path: Path, query: RecordQuery, tally: LineTally, begin: int = 0, stop: int | None = None
) -> Iterator[bytes]:
    """Yield the lines of a log, or of a part of it, but for some that the query does not want.

    Args:
        path: The log.
        query: What is wanted.
        tally: Counts what is damaged, and gets the log if it is refused.
        begin: Only lines that begin there or later, in bytes. 0 for a log that is compressed or a pipe.
        stop: Only lines that begin before. None: all.

    Raises:
        OSError: The log cannot be read.
    """
    try:
        if path.suffix == STORED:
            yield from _skip_unwanted_lines(_read_stored_lines(path), query)
            return
        with open_log(path, tally.origin) as file:
            lines = _read_undamaged_lines(path, _split_lines(file, begin, stop), tally)
            yield from _skip_unwanted_lines(lines, query)
    except LogRefusedError as error:
        tally.left_out[path] = str(error)


def _read_stored_lines(path: Path) -> Iterator[bytes]:
    from tfenv.audit.store import read_store_lines  # it reads logs, too

    try:
        yield from read_store_lines(path)
    except ImportError:
        raise LogRefusedError("nothing here can read Parquet; `pip install 'tfenv[fleet]'` can") from None
    except ValueError as error:
        raise LogRefusedError(str(error)) from None


def is_worth_reading(path: Path, since: str) -> bool:
    """Tell whether a log can hold a record of that moment or later: none is younger than the file's last change."""
    if not since:
        return True
    return format_timestamp(datetime.fromtimestamp(path.stat().st_mtime, timezone.utc) + _CLOCKS_DIFFER_BY) >= since


def _read_undamaged_lines(path: Path, lines: Iterator[bytes], tally: LineTally) -> Iterator[bytes]:
    """Yield the lines up to where a compressed file is damaged."""
    try:
        yield from lines
    except Exception as error:
        if not is_damage(path, error):
            raise
        tally.unreadable += 1


def read_newest(
    paths: Sequence[Path], query: RecordQuery, tally: LineTally, count: int, ends: Mapping[Path, int] | None = None
) -> list[LoggedRecord]:
    """Return the newest `count` wanted records of all logs together, oldest first.

    Args:
        paths: The logs.
        query: What is wanted.
        tally: Counts only what had to be read.
        count: At most so many.
        ends: Where to begin in a file that is followed from there on, in bytes.

    Raises:
        OSError: A log cannot be read.
    """
    found: list[LoggedRecord] = []
    # The newest log first: many old ones need not be decompressed.
    for path in sorted(paths, key=lambda log: log.stat().st_mtime, reverse=True):
        oldest = found[0]["timestamp"] if found and len(found) >= count else query.since
        if is_worth_reading(path, oldest):
            newest = _read_newest_of(path, query, tally, count, (ends or {}).get(path))
            found = sorted([*newest, *found], key=lambda record: cast(str, record["timestamp"]))
            found = found[max(0, len(found) - count) :]
    return found


def _read_newest_of(
    path: Path, query: RecordQuery, tally: LineTally, count: int, end: int | None
) -> list[LoggedRecord]:
    """Return the newest records of one log, oldest first."""
    if path.suffix in (*COMPRESSED, STORED) or not path.is_file():  # a pipe, as from journalctl, has no end to begin at
        return list(deque(read_records([path], query, tally), maxlen=count))
    try:
        with open_log(path, tally.origin) as file:
            newest = select_records(_split_lines_backwards(file, end), query, tally)
            return list(islice(newest, count))[::-1]
    except LogRefusedError as error:
        tally.left_out[path] = str(error)
        return []
