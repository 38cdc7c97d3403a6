"""Reads the log back: streaming, tolerant of torn and foreign lines, compressed or not."""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatchcase
from io import BufferedReader
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

from tfenv.audit.record import format_timestamp
from tfenv.audit.rotation import COMPRESSED, is_damage, open_log
from tfenv.dependencies import import_dependency
from tfenv.policy.units import parse_duration
from tfenv.values import frozen

#: A record as it was read: only `timestamp` and `event` are known to be texts.
LoggedRecord = Mapping[str, Any]

#: How every record of ours begins, and how long the timestamp behind it is.
RECORD_BEGIN = b'{"timestamp":"'
TIMESTAMP_BYTES = len("2026-11-05T09:31:07.123456Z")
_TIMESTAMP = slice(len(RECORD_BEGIN), len(RECORD_BEGIN) + TIMESTAMP_BYTES)
_CHUNK_BYTES = 1 << 20
# Far above any record: a file of zeros, or of something else, is not collected into one line.
_LONGEST_LINE_BYTES = 1 << 16
# A float holds no longer number.
_MOST_DIGITS = 300
# A file server's clock, which dates the last change of a log, may be behind the one that dates its records.
_CLOCKS_DIFFER_BY = timedelta(hours=1)


@dataclass
class LineTally:
    """Counts what was met while reading.

    Attributes:
        unreadable: Lines, or damaged beginnings of lines, that are not records.
    """

    unreadable: int = 0


@frozen
class RecordQuery:
    """Which records are wanted. An empty set or None means all.

    Attributes:
        events: Names as in the record: "policy_applied".
        users: User names.
        uids: User ids.
        outcomes: What happened at an entry point: "clamped", as in the record's `status`.
        gpus: GPUs, each a UUID or its beginning, an entry of CUDA_VISIBLE_DEVICES, or `name:*A100*`.
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

    def matches(self, record: LoggedRecord) -> bool:
        """Tell whether the record is wanted."""
        return (
            record["timestamp"] >= self.since
            and (not self.until or record["timestamp"] < self.until)
            and _is_wanted(record["event"], self.events)
            and _is_wanted(record.get("user"), self.users)
            and _is_wanted(record.get("uid"), self.uids)
            and _is_wanted(record.get("status"), self.outcomes)
            and (not self.gpus or any(self.matches_gpu(device) for device in list_logged_devices(record)))
            and (self.project is None or _is_of_project(record, self.project))
            and (self.script is None or _is_script(record.get("script"), self.script))
        )

    def matches_gpu(self, device: Mapping[str, Any]) -> bool:
        """Tell whether an entry of a record's `devices` is among the GPUs that are wanted."""
        return not self.gpus or any(_is_gpu(device, wanted) for wanted in self.gpus)

    def build_prefilter(self) -> tuple[tuple[bytes, ...], ...]:
        """Return groups of byte strings. Each line that matches has at least one of every group.

        To look for them is cheaper than to parse the line.
        """
        groups: list[Iterable[str]] = [
            [json.dumps(text) for text in wanted] for wanted in (self.events, self.users, self.outcomes) if wanted
        ]
        groups += [[str(uid) for uid in self.uids]] if self.uids else []
        # A text that JSON may spell in several ways cannot be looked for.
        return tuple(
            tuple(text.encode("ascii") for text in texts) for texts in groups if not any("\\" in text for text in texts)
        )


class RecordGroup(NamedTuple):
    """Records of one log that differ in nothing that is asked for. A tuple, for there is one for each line.

    Attributes:
        record: One for all. Its `timestamp` is the newest of all.
        times: How many there are.
        pids: Of what processes, each once, as text.
    """

    record: LoggedRecord
    times: int
    pids: Sequence[str]


def make_group(record: LoggedRecord) -> RecordGroup:
    """Make a group of one record."""
    return RecordGroup(record, 1, (str(record.get("pid")),))


def _is_wanted(value: object, wanted: frozenset[Any]) -> bool:
    return not wanted or (isinstance(value, (str, int)) and value in wanted)


def list_logged_devices(record: LoggedRecord) -> list[Mapping[str, Any]]:
    """Return the entries of `devices` that are what they should be."""
    devices = record.get("devices")
    return [device for device in devices if isinstance(device, dict)] if isinstance(devices, list) else []


def get_gpu_id(device: Mapping[str, Any]) -> str:
    """Return the UUID. Where there is none: the entry of CUDA_VISIBLE_DEVICES, or TensorFlow's number."""
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
    prefilter, since, until = query.build_prefilter(), query.since.encode("ascii"), query.until.encode("ascii") or b"~"
    for line in lines:
        # A whole record may stand behind a torn one.
        is_ours = line.startswith(RECORD_BEGIN)
        if is_ours and not since <= line[_TIMESTAMP] < until and line.find(RECORD_BEGIN, 1) < 0:
            continue
        if (is_ours or _looks_like_record(line)) and line.endswith(b"}") and not _has_all(line, prefilter):
            continue
        record = _parse_line(line, tally)
        if record is not None and query.matches(record):
            yield record


def _has_all(line: bytes, prefilter: tuple[tuple[bytes, ...], ...]) -> bool:
    """Return whether a line has a text of every group. In loops: generators take as long as parsing."""
    for texts in prefilter:
        for text in texts:
            if text in line:
                break
        else:
            return False
    return True


def _looks_like_record(line: bytes) -> bool:
    """Return whether a line may be a record that a collector wrote anew, with blanks or in another order."""
    return line.startswith(b"{") and b'"timestamp"' in line and b'"event"' in line


def _parse_line(line: bytes, tally: LineTally) -> LoggedRecord | None:
    """Return the record in the line. Behind a torn one, where a writer was killed, a whole one may follow."""
    if not line or line.isspace():
        return None
    record = _parse_record(line)
    if record is None:
        tally.unreadable += 1
        start = line.rfind(RECORD_BEGIN)
        record = _parse_record(line[start:]) if start > 0 else None
    return record


def decode_json(text: bytes | str) -> Any:
    """Return a value of JSON whose numbers are finite, as floats too. Anybody may have written it.

    Raises:
        ValueError: It is something else.
        RecursionError: It is nested too deeply.
    """
    return json.loads(text, parse_constant=_refuse_number, parse_int=_parse_int, parse_float=_parse_float)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is not a number that a record has")


def _parse_int(text: str) -> int:
    return int(text) if len(text) <= _MOST_DIGITS else _refuse_number(text)


def _parse_float(text: str) -> float:
    value = float(text)
    return value if isfinite(value) else _refuse_number(text)


def _load_fast_parser() -> Callable[[bytes], Any] | None:
    """Return orjson's parser, which is of the extra `audit`. None: it is not installed."""
    try:
        parse: Callable[[bytes], Any] = import_dependency("orjson").loads
    except ImportError:
        return None
    return parse


_parse_fast = _load_fast_parser()


def _parse_value(text: bytes) -> Any:
    """Return a value of JSON, as `decode_json` does. What orjson takes is the same there; it refuses more."""
    if _parse_fast is not None:
        try:
            value = _parse_fast(text)
        except ValueError:
            return decode_json(text)
        # An integer of more than 64 bits is a float to it.
        if not isinstance(value, dict) or (type(value.get("pid")) is not float and type(value.get("uid")) is not float):
            return value
    return decode_json(text)


def _parse_record(text: bytes) -> LoggedRecord | None:
    try:
        value = _parse_value(text)
    except (ValueError, RecursionError):
        return None
    if not (
        isinstance(value, dict) and isinstance(value.get("timestamp"), str) and isinstance(value.get("event"), str)
    ):
        return None
    return cast(LoggedRecord, value)


def _split_lines(file: BufferedReader, tally: LineTally) -> Iterator[bytes]:
    """Yield lines without their newlines. What follows the last newline is a line too."""
    rest = b""
    while chunk := file.read1(_CHUNK_BYTES):  # not read: what stands before a damage would be lost with it
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        if len(rest) > _LONGEST_LINE_BYTES:
            tally.unreadable += 1
            rest = b""
    if rest:
        yield rest


def _split_lines_backwards(path: Path, end: int | None, tally: LineTally) -> Iterator[bytes]:
    """Yield lines of an uncompressed file, last first, from `end` bytes on: the newest 20 of a million come at once."""
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


def read_records(paths: Sequence[Path], query: RecordQuery, tally: LineTally) -> Iterator[LoggedRecord]:
    """Yield the wanted records of all logs, log by log, in the order they were written.

    Raises:
        OSError: A log cannot be read.
    """
    for path in paths:
        if is_worth_reading(path, query.since):
            with open_log(path) as file:
                yield from select_records(_read_undamaged_lines(path, file, tally), query, tally)


def read_groups(log: Path, query: RecordQuery, tally: LineTally) -> Iterator[RecordGroup]:
    """Yield each wanted record of a log as a group of its own.

    Raises:
        OSError: The log cannot be read.
    """
    return map(make_group, read_records([log], query, tally))


def is_worth_reading(path: Path, since: str) -> bool:
    """Tell whether a log can hold a record of that moment or later: none is younger than the file's last change."""
    if not since:
        return True
    return format_timestamp(datetime.fromtimestamp(path.stat().st_mtime, timezone.utc) + _CLOCKS_DIFFER_BY) >= since


def _read_undamaged_lines(path: Path, file: BufferedReader, tally: LineTally) -> Iterator[bytes]:
    """Yield the lines up to where a compressed file is damaged."""
    try:
        yield from _split_lines(file, tally)
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
    if path.suffix in COMPRESSED or not path.is_file():  # a pipe, as from journalctl, has no end to begin at
        return list(deque(read_records([path], query, tally), maxlen=count))
    newest = select_records(_split_lines_backwards(path, end, tally), query, tally)
    return list(islice(newest, count))[::-1]
