"""Reading the log back: streaming, tolerant of torn and foreign lines, compressed or not."""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatchcase
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, cast

from tfenv.audit.record import stamp
from tfenv.audit.rotation import COMPRESSED, is_damage, open_log
from tfenv.policy.units import parse_duration
from tfenv.values import frozen

__all__ = [
    "BEGIN",
    "TIMESTAMP_BYTES",
    "Group",
    "Query",
    "Record",
    "Tally",
    "devices_of",
    "gpu_name",
    "group_of",
    "groups",
    "is_worth_reading",
    "last",
    "parse_moment",
    "read",
    "select",
]

#: A record as it was read: only `timestamp` and `event` are known to be texts.
Record = Mapping[str, Any]

#: How every record of ours begins, and how long the timestamp behind it is.
BEGIN = b'{"timestamp":"'
TIMESTAMP_BYTES = len("2026-11-05T09:31:07.123456Z")
_TIMESTAMP = slice(len(BEGIN), len(BEGIN) + TIMESTAMP_BYTES)
_CHUNK_BYTES = 1 << 20
# Far above any record: a file of zeros, or of something else, is not collected into one line.
_LONGEST_LINE_BYTES = 1 << 16
# A file server's clock, which dates the last change of a log, may be behind the one that dates its records.
_CLOCKS_DIFFER_BY = timedelta(hours=1)


@dataclass
class Tally:
    """What was met while reading.

    Attributes:
        unreadable: Lines, or damaged beginnings of lines, that are not records.
    """

    unreadable: int = 0


@frozen
class Query:
    """Which records are wanted; an empty set or None means all.

    Attributes:
        events: Names as in the record: "policy_applied".
        users: User names.
        uids: User ids.
        outcomes: What became of it at an entry point: "clamped", as in the record's `status`.
        gpus: GPUs, as `is_gpu` takes them: a UUID or its beginning, an entry of CUDA_VISIBLE_DEVICES, `name:*A100*`.
        project: A directory: records of a project or script in it or below it.
        script: Path, file name or glob of the program.
        since: No record before it, as `parse_moment` gives it.
        until: Only records before it, likewise.
    """

    events: frozenset[str] = frozenset()
    users: frozenset[str] = frozenset()
    uids: frozenset[int] = frozenset()
    outcomes: frozenset[str] = frozenset()
    gpus: frozenset[str] = frozenset()
    project: str | None = None
    script: str | None = None
    since: str = ""
    until: str = ""

    def matches(self, record: Record) -> bool:
        """Whether the record is wanted."""
        return (
            record["timestamp"] >= self.since
            and (not self.until or record["timestamp"] < self.until)
            and _wanted(self.events, record["event"])
            and _wanted(self.users, record.get("user"))
            and _wanted(self.uids, record.get("uid"))
            and _wanted(self.outcomes, record.get("status"))
            and (not self.gpus or any(self.has_gpu(device) for device in devices_of(record)))
            and (self.project is None or _is_of_project(record, self.project))
            and (self.script is None or _is_script(record.get("script"), self.script))
        )

    def has_gpu(self, device: Mapping[str, Any]) -> bool:
        """Whether an entry of a record's `devices` is among the GPUs that are wanted."""
        return not self.gpus or any(_is_gpu(device, wanted) for wanted in self.gpus)

    def needles(self) -> tuple[tuple[bytes, ...], ...]:
        """Byte strings of which each line that matches has at least one per group: cheaper than parsing it."""
        groups: list[Iterable[str]] = [
            [json.dumps(text) for text in wanted] for wanted in (self.events, self.users, self.outcomes) if wanted
        ]
        groups += [[str(uid) for uid in self.uids]] if self.uids else []
        # A text that JSON may spell in several ways is no use as a needle.
        return tuple(
            tuple(text.encode("ascii") for text in texts) for texts in groups if not any("\\" in text for text in texts)
        )


@frozen
class Group:
    """Records of one log that differ in nothing that is asked for.

    Attributes:
        record: One for all; its `timestamp` is the newest of all.
        times: How many there are.
        pids: Of what processes, each once, as text.
    """

    record: Record
    times: int
    pids: Sequence[str]


def _wanted(values: frozenset[Any], value: object) -> bool:
    return not values or (isinstance(value, (str, int)) and value in values)


def devices_of(record: Record) -> list[Mapping[str, Any]]:
    """The entries of `devices` that are what they should be."""
    devices = record.get("devices")
    return [device for device in devices if isinstance(device, dict)] if isinstance(devices, list) else []


def gpu_name(device: Mapping[str, Any]) -> str:
    """UUID; the entry of CUDA_VISIBLE_DEVICES, or TensorFlow's number, where there is none."""
    return str(device.get("uuid") or device.get("token") or device.get("index"))


def _is_gpu(device: Mapping[str, Any], wanted: str) -> bool:
    if wanted.startswith("name:"):
        return fnmatchcase(str(device.get("name") or ""), wanted.removeprefix("name:"))
    uuid = device.get("uuid")
    if wanted.startswith(("GPU-", "MIG-")) and isinstance(uuid, str) and uuid.startswith(wanted):
        return True
    return wanted in (device.get("token"), gpu_name(device))


def _is_of_project(record: Record, folder: str) -> bool:
    return any(_is_inside(record.get(key), folder) for key in ("project", "script"))


def _is_inside(path: object, folder: str) -> bool:
    """By components: /srv/ab is not inside /srv/a."""
    return isinstance(path, str) and f"{path}/".startswith(f"{folder.rstrip('/')}/")


def _is_script(path: object, pattern: str) -> bool:
    return isinstance(path, str) and any(fnmatchcase(name, pattern) for name in (path, path.rpartition("/")[2]))


def parse_moment(text: str, now: datetime | None = None) -> str:
    """A moment, spelled as in the records.

    Args:
        text: A duration back from now ("30min", "2h", "7d"), or a date or time in ISO 8601: without a time
            zone it is local.
        now: For tests; the current time otherwise.

    Raises:
        ValueError: Its text says what would be right.
    """
    try:
        back = timedelta(seconds=parse_duration(text))
        moment = (now or datetime.now(timezone.utc)) - back
    except (ValueError, OverflowError):
        moment = _parse_iso(text)
    return stamp(moment)


def _parse_iso(text: str) -> datetime:
    try:
        return datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))
    except ValueError:
        raise ValueError(f'"{text}" is not a time; write "2h", "7d", "2026-11-05" or "2026-11-05T09:30"') from None


# ---- lines


def select(lines: Iterable[bytes], query: Query, tally: Tally) -> Iterator[Record]:
    """The records among `lines` that the query wants."""
    needles, since, until = query.needles(), query.since.encode("ascii"), query.until.encode("ascii") or b"~"
    for line in lines:
        if line.startswith(BEGIN):
            if not since <= line[_TIMESTAMP] < until and line.find(BEGIN, 1) < 0:  # a whole record behind a torn one
                continue
            if line.endswith(b"}") and not _has_all(line, needles):
                continue
        record = _parse(line, tally)
        if record is not None and query.matches(record):
            yield record


def _has_all(line: bytes, needles: tuple[tuple[bytes, ...], ...]) -> bool:
    return all(any(needle in line for needle in group) for group in needles)


def _parse(line: bytes, tally: Tally) -> Record | None:
    """The record in the line; behind a torn one, where a writer was killed, a whole one may follow."""
    if not line or line.isspace():
        return None
    record = _as_record(line)
    if record is None:
        tally.unreadable += 1
        start = line.rfind(BEGIN)
        record = _as_record(line[start:]) if start > 0 else None
    return record


def _as_record(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("timestamp", "event")):
        return None
    return cast(Record, value)


def _lines(file: BufferedReader, tally: Tally) -> Iterator[bytes]:
    """Lines without their newlines; what follows the last newline is a line too."""
    rest = b""
    while chunk := file.read1(_CHUNK_BYTES):  # not read: what stands before a damage would be lost with it
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        if len(rest) > _LONGEST_LINE_BYTES:
            tally.unreadable += 1
            rest = b""
    if rest:
        yield rest


def _lines_from_the_end(path: Path, end: int | None, tally: Tally) -> Iterator[bytes]:
    """Lines of an uncompressed file, last first, from `end` bytes on: the newest 20 of a million come at once."""
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END) if end is None else end
        rest = b""
        while position > 0:
            step = min(_LONGEST_LINE_BYTES, position)
            position -= step
            file.seek(position)
            rest, *lines = (file.read(step) + rest).split(b"\n")
            yield from reversed(lines)
            if len(rest) > 2 * _LONGEST_LINE_BYTES:
                tally.unreadable += 1
                rest = b""
        yield rest


# ---- logs


def read(paths: Sequence[Path], query: Query, tally: Tally) -> Iterator[Record]:
    """The wanted records of all logs, log by log, in the order they were written.

    Raises:
        OSError: A log cannot be read.
    """
    for path in paths:
        if is_worth_reading(path, query.since):
            with open_log(path) as file:
                yield from select(_whole_lines(path, file, tally), query, tally)


def groups(log: Path, query: Query, tally: Tally) -> Iterator[Group]:
    """Each wanted record of a log as a group of its own.

    Raises:
        OSError: The log cannot be read.
    """
    for record in read([log], query, tally):
        yield group_of(record)


def group_of(record: Record) -> Group:
    """One record, of one process."""
    return Group(record, 1, (str(record.get("pid")),))


def is_worth_reading(path: Path, since: str) -> bool:
    """Whether a log can hold a record of that moment or later: none is younger than the file's last change."""
    if not since:
        return True
    return stamp(datetime.fromtimestamp(path.stat().st_mtime, timezone.utc) + _CLOCKS_DIFFER_BY) >= since


def _whole_lines(path: Path, file: BufferedReader, tally: Tally) -> Iterator[bytes]:
    """The lines up to where a compressed file is damaged."""
    try:
        yield from _lines(file, tally)
    except Exception as error:
        if not is_damage(path, error):
            raise
        tally.unreadable += 1


def last(
    paths: Sequence[Path], query: Query, tally: Tally, count: int, ends: Mapping[Path, int] | None = None
) -> list[Record]:
    """The newest `count` wanted records of all logs together, oldest first.

    Args:
        paths: The logs.
        query: What is wanted.
        tally: Counts only what had to be read.
        count: At most so many.
        ends: Where to begin in a file that is followed from there on, in bytes.

    Raises:
        OSError: A log cannot be read.
    """
    found: list[Record] = []
    for path in sorted(paths, key=_last_change, reverse=True):  # many old logs need not be decompressed
        oldest = found[0]["timestamp"] if found and len(found) >= count else query.since
        if is_worth_reading(path, oldest):
            end = (ends or {}).get(path)
            found = sorted([*_last_of(path, query, tally, count, end), *found], key=_timestamp)
            found = found[max(0, len(found) - count) :]
    return found


def _last_change(path: Path) -> float:
    return path.stat().st_mtime


def _last_of(path: Path, query: Query, tally: Tally, count: int, end: int | None) -> list[Record]:
    """The newest records of one log, oldest first; a pipe, as from journalctl, has no end to begin at."""
    if path.suffix in COMPRESSED or not path.is_file():
        return list(deque(read([path], query, tally), maxlen=count))
    newest = select(_lines_from_the_end(path, end, tally), query, tally)
    return list(islice(newest, count))[::-1]


def _timestamp(record: Record) -> str:
    return cast(str, record["timestamp"])
