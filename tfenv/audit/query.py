"""Reading the log back: streaming, tolerant of torn and foreign lines, across rotations."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, cast

from tfenv.policy.units import parse_duration

__all__ = [
    "Query",
    "Record",
    "Tail",
    "Tally",
    "UserGpu",
    "last",
    "parse_since",
    "read",
    "select",
    "summarize",
    "with_rotated",
]

#: A record as it was read: only `timestamp` and `event` are known to be texts.
Record = Mapping[str, Any]

_BEGIN = b'{"timestamp":"'
_TIMESTAMP_BYTES = len("2026-11-05T09:31:07.123456Z")
_CHUNK_BYTES = 1 << 20
# Far above any record: a file of zeros, or of something else, is not collected into one line.
_LONGEST_LINE_BYTES = 1 << 16


@dataclass
class Tally:
    """What was met while reading.

    Attributes:
        unreadable: Lines, or damaged beginnings of lines, that are not records.
    """

    unreadable: int = 0


@dataclass(frozen=True)
class Query:
    """Which records are wanted; an empty set or None means all.

    Attributes:
        events: Names as in the record: "policy_applied".
        users: User names.
        uids: User ids.
        statuses: Outcomes: "clamped".
        project: A directory: records of a project or script in it or below it.
        script: Path, file name or glob of the program.
        since: No record before it, as `parse_since` gives it.
    """

    events: frozenset[str] = frozenset()
    users: frozenset[str] = frozenset()
    uids: frozenset[int] = frozenset()
    statuses: frozenset[str] = frozenset()
    project: str | None = None
    script: str | None = None
    since: str = ""

    def matches(self, record: Record) -> bool:
        """Whether the record is wanted."""
        return (
            record["timestamp"] >= self.since
            and _wanted(self.events, record["event"])
            and _wanted(self.users, record.get("user"))
            and _wanted(self.uids, record.get("uid"))
            and _wanted(self.statuses, record.get("status"))
            and (self.project is None or _is_of_project(record, self.project))
            and (self.script is None or _is_script(record.get("script"), self.script))
        )

    def needles(self) -> tuple[tuple[bytes, ...], ...]:
        """Byte strings of which each line that matches has at least one per group: cheaper than parsing it."""
        groups: list[Iterable[str]] = [
            [json.dumps(text) for text in wanted] for wanted in (self.events, self.users, self.statuses) if wanted
        ]
        groups += [[str(uid) for uid in self.uids]] if self.uids else []
        # A text that JSON may spell in several ways is no use as a needle.
        return tuple(
            tuple(text.encode("ascii") for text in texts) for texts in groups if not any("\\" in text for text in texts)
        )


def _wanted(values: frozenset[Any], value: object) -> bool:
    return not values or (isinstance(value, (str, int)) and value in values)


def _is_of_project(record: Record, folder: str) -> bool:
    return any(_is_inside(record.get(key), folder) for key in ("project", "script"))


def _is_inside(path: object, folder: str) -> bool:
    """By components: /srv/ab is not inside /srv/a."""
    return isinstance(path, str) and f"{path}/".startswith(f"{folder.rstrip('/')}/")


def _is_script(path: object, pattern: str) -> bool:
    return isinstance(path, str) and any(fnmatchcase(name, pattern) for name in (path, path.rpartition("/")[2]))


def parse_since(text: str, now: datetime | None = None) -> str:
    """The moment from which on records are wanted, spelled as in the records.

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
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _parse_iso(text: str) -> datetime:
    try:
        return datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))
    except ValueError:
        raise ValueError(f'"{text}" is not a time; write "2h", "7d", "2026-11-05" or "2026-11-05T09:30"') from None


# ---- lines


def select(lines: Iterable[bytes], query: Query, tally: Tally) -> Iterator[Record]:
    """The records among `lines` that the query wants."""
    needles, since = query.needles(), query.since.encode("ascii")
    for line in lines:
        if line.startswith(_BEGIN):
            if line[len(_BEGIN) : len(_BEGIN) + _TIMESTAMP_BYTES] < since:
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
        start = line.rfind(_BEGIN)
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


def _lines(file: IO[bytes], tally: Tally) -> Iterator[bytes]:
    """Lines without their newlines; what follows the last newline is a line too."""
    rest = b""
    while chunk := file.read(_CHUNK_BYTES):
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


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


# ---- logs


def read(paths: Sequence[Path], query: Query, tally: Tally) -> Iterator[Record]:
    """The wanted records of all logs, log by log, in the order they were written.

    Raises:
        OSError: A log cannot be read.
    """
    for path in paths:
        with _open(path) as file:
            yield from select(_whole_lines(file, tally), query, tally)


def _whole_lines(file: IO[bytes], tally: Tally) -> Iterator[bytes]:
    """The lines up to where a compressed file is damaged."""
    try:
        yield from _lines(file, tally)
    except (EOFError, gzip.BadGzipFile, zlib.error):
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
    for path in paths:
        if path.suffix == ".gz":
            found += deque(read([path], query, tally), maxlen=count)
            continue
        lines = _lines_from_the_end(path, (ends or {}).get(path), tally)
        newest = [record for record, _ in zip(select(lines, query, tally), range(count), strict=False)]
        found += reversed(newest)
    found.sort(key=_timestamp)
    return found[max(0, len(found) - count) :]


def _timestamp(record: Record) -> str:
    return cast(str, record["timestamp"])


def with_rotated(path: Path) -> list[Path]:
    """The log and what logrotate made of it, oldest first: `.3.gz`, `.2.gz`, `.1`, `-20261105.gz`, the log."""
    pattern = re.compile(re.escape(path.name) + r"(?:\.(?P<age>\d+)|-(?P<date>\d{8,14}))(?:\.gz)?")
    siblings = [(match, path.parent / name) for name in _names(path.parent) if (match := pattern.fullmatch(name))]
    siblings.sort(key=lambda pair: (pair[0]["date"] or "", -int(pair[0]["age"] or 0)))
    return [sibling for _, sibling in siblings] + ([path] if path.exists() else [])


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


class Tail:
    """What is appended to a log from now on, through rotations; the log may not exist yet.

    Attributes:
        path: The log.
        position: Where reading goes on, in bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self._rest = b""
        self._file: IO[bytes] | None = None
        self._was_replaced = False
        self._reopen(os.SEEK_END)

    def poll(self) -> list[bytes]:
        """The whole lines that came since the last call. Never waits."""
        lines = self._read()
        if not self._is_replaced():
            return lines
        # A writer may have opened the old file just before it was renamed: it has until the next call.
        if self._file is None or self._was_replaced:
            self._reopen()
            return lines + self._read()
        self._was_replaced = True
        return lines

    def close(self) -> None:
        """Release the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _reopen(self, whence: int = os.SEEK_SET) -> None:
        self.close()
        self.position, self._rest, self._was_replaced = 0, b"", False
        try:
            self._file = self.path.open("rb")
            self.position = self._file.seek(0, whence)
        except OSError:
            self.close()

    def _is_replaced(self) -> bool:
        if self._file is None:
            return True
        try:
            now, ours = os.stat(self.path), os.fstat(self._file.fileno())
        except OSError:  # renamed, and the new one is still to come
            return False
        return (now.st_dev, now.st_ino) != (ours.st_dev, ours.st_ino)

    def _read(self) -> list[bytes]:
        if self._file is None:
            return []
        if os.fstat(self._file.fileno()).st_size < self.position:  # copytruncate
            self.position, self._rest = 0, b""
        self._file.seek(self.position)
        data = self._file.read()
        self.position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines


# ---- summary


@dataclass
class UserGpu:
    """What one user did with one GPU.

    Attributes:
        user: Name.
        gpu: UUID; the entry of CUDA_VISIBLE_DEVICES or TensorFlow's number where there is none; "" for
            records without a GPU.
        processes: Those that created devices, as host and pid.
        clamped: Records of a program that asked for more than it got.
        failed: Records of a policy that was not in force.
        limit_bytes: The largest limit; None when none was in bytes.
        last: Timestamp of the newest record.
    """

    user: str
    gpu: str
    processes: set[tuple[str, str]] = field(default_factory=set)
    clamped: int = 0
    failed: int = 0
    limit_bytes: int | None = None
    last: str = ""


def summarize(records: Iterable[Record]) -> list[UserGpu]:
    """Per user and GPU, sorted by both. Plans (policy_loaded, policy_changed) are no use of a GPU."""
    rows: dict[tuple[str, str], UserGpu] = {}
    for record in records:
        if record["event"] in ("policy_applied", "policy_clamped", "policy_failed"):
            for gpu, limit in _gpus(record):
                key = (str(record.get("user")), gpu)
                _count(rows.setdefault(key, UserGpu(*key)), record, limit)
    return [rows[key] for key in sorted(rows)]


def _gpus(record: Record) -> list[tuple[str, int | None]]:
    devices = record.get("devices")
    found = [device for device in devices if isinstance(device, dict)] if isinstance(devices, list) else []
    return [(_gpu_name(device), _size(device.get("limit_bytes"))) for device in found] or [("", None)]


def _gpu_name(device: Mapping[str, Any]) -> str:
    return str(device.get("uuid") or device.get("token") or device.get("index"))


def _size(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _count(row: UserGpu, record: Record, limit: int | None) -> None:
    row.processes.add((str(record.get("host")), str(record.get("pid"))))
    row.clamped += record["event"] == "policy_clamped"
    row.failed += record["event"] == "policy_failed"
    row.last = max(row.last, record["timestamp"])
    if limit is not None:
        row.limit_bytes = max(limit, row.limit_bytes or 0)
