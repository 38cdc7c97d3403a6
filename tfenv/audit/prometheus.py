"""Figures for Prometheus: totals of the log's records, in a file for the node exporter's textfile collector.

A counter must not fall when logrotate deletes an old log, so totals are kept in that file and only what is new in the
logs is added. How far each log was read stands in a comment of the same file: one renaming changes both.

The text format is this small. prometheus_client would bring what a program needs that is asked over HTTP:
https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO

from tfenv.audit.job_names import format_job, read_job
from tfenv.audit.query import (
    LineTally,
    LoggedRecord,
    RecordQuery,
    count_times,
    get_gpu_id,
    list_logged_devices,
    select_records,
)
from tfenv.audit.rotation import LogRefusedError, find_log_files, is_damage, open_log
from tfenv.files import replace_file
from tfenv.values import as_dict, frozen

_FIRST_LINE = "# Written by `tfgpu audit export`; totals go on from what is here."
_FIRST_LINE_BY_JOB = "# Written by `tfgpu audit export --by-job`; totals go on from what is here."
_READ_SO_FAR = "# tfgpu read so far: "
#: Label values that one counter may have. What comes later is counted together, as "other": first the jobs.
_MOST_SERIES = 1000
_OTHER = "other"
_LONGEST_LINE_BYTES = 1 << 16


@frozen
class _MetricFamily:
    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


#: The counter of each event. One with a GPU counts a record once for each of its GPUs.
_EVENTS = {
    "policy_loaded": _MetricFamily("tfgpu_policy_loaded_total", "counter", ("user",), "Processes that found a policy."),
    "policy_applied": _MetricFamily(
        "tfgpu_policy_applied_total", "counter", ("user", "gpu"), "GPUs that were opened as policy and program wanted."
    ),
    "policy_clamped": _MetricFamily(
        "tfgpu_policy_clamped_total",
        "counter",
        ("user", "gpu"),
        "GPUs of which a program or a file got less than it asked for.",
    ),
    "policy_failed": _MetricFamily(
        "tfgpu_policy_failed_total", "counter", ("user", "gpu"), "Times that a policy was not in force."
    ),
    "policy_disabled": _MetricFamily(
        "tfgpu_policy_disabled_total", "counter", ("user",), "Processes for which TFGPU_DISABLE switched it off."
    ),
    "policy_changed": _MetricFamily(
        "tfgpu_policy_changed_total", "counter", ("user",), "Changes of the policy that tfgpu watch saw."
    ),
}
_LOST = _MetricFamily("tfgpu_records_lost_total", "counter", (), "Records that could not be written.")
_UNREADABLE = _MetricFamily("tfgpu_unreadable_lines_total", "counter", (), "Lines of the logs that are not records.")
_LAST = _MetricFamily("tfgpu_last_record_timestamp_seconds", "gauge", (), "When the newest record was made.")
_METRICS = (*_EVENTS.values(), _LOST, _UNREADABLE, _LAST)


class ForeignFileError(Exception):
    """The file is not one to overwrite. Its text says why."""


# ---- totals


@dataclass
class MetricTotals:
    """The figures so far.

    Attributes:
        by_job: Whether each job has series of its own.
        values: For each metric's name the value of each series, by the values of its labels.
    """

    by_job: bool = False
    values: dict[str, dict[tuple[str, ...], float]] = field(
        default_factory=lambda: {metric.name: {} if metric.labels else {(): 0} for metric in _METRICS}
    )

    def add(self, record: LoggedRecord) -> None:
        """Count a record."""
        metric = _EVENTS.get(record["event"])
        if metric is not None:
            user = _make_label(str(record.get("user")))
            gpus = [_make_label(get_gpu_id(device)) for device in list_logged_devices(record)] or [""]
            job = (_make_label(format_job(read_job(record))),) if self.by_job else ()
            for labels in [(user, gpu) for gpu in gpus] if "gpu" in metric.labels else [(user,)]:
                self._increase(metric, (*labels, *job), count_times(record))
        lost = record.get("lost")
        if isinstance(lost, int):
            self._increase(_LOST, (), lost)
        newest = self.values[_LAST.name]
        newest[()] = max(newest[()], _parse_timestamp(record["timestamp"]))

    def add_unreadable(self, lines: int) -> None:
        """Count lines that are not records."""
        self._increase(_UNREADABLE, (), lines)

    def _increase(self, metric: _MetricFamily, labels: tuple[str, ...], by: float) -> None:
        series = self.values[metric.name]
        if labels not in series and len(series) >= _MOST_SERIES:
            labels = self._join_others(labels, series)
        series[labels] = series.get(labels, 0) + by

    def _join_others(self, labels: tuple[str, ...], series: Mapping[tuple[str, ...], float]) -> tuple[str, ...]:
        """Return the labels of a series for what is too much: the user's other jobs, while there is room for that."""
        of_user = (*labels[:-1], _OTHER)
        if self.by_job and (of_user in series or len(series) < 2 * _MOST_SERIES):
            return of_user
        return tuple(_OTHER for _ in labels)

    def list_labels(self, metric: _MetricFamily) -> tuple[str, ...]:
        """Return the names of a metric's labels."""
        return (*metric.labels, "job") if self.by_job and metric.labels else metric.labels


def _make_label(text: str) -> str:
    """Spell out lone surrogates, which a name that is not UTF-8 has, and which cannot be written."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _parse_timestamp(timestamp: str) -> float:
    """Return seconds since the epoch. 0 for what is no time."""
    try:
        return datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp()
    except ValueError:  # of another program
        return 0


# ---- the file


@frozen
class _ReadPosition:
    """How far one file of a log was read.

    Attributes:
        read: Bytes, decompressed.
        size: Of the file then. With `changed` it tells whether there can be more.
        changed: Time of its last change, in nanoseconds.
    """

    read: int
    size: int
    changed: int


#: Of the files of one log: by the hash of the first line, which stays the same through renaming, copying, compressing.
_Positions = dict[str, _ReadPosition]


def _format_file(totals: MetricTotals, read_so_far: Mapping[str, _Positions]) -> str:
    plain = {log: {head: as_dict(place) for head, place in places.items()} for log, places in read_so_far.items()}
    lines = [_FIRST_LINE_BY_JOB if totals.by_job else _FIRST_LINE, _READ_SO_FAR + json.dumps(plain)]
    for metric in _METRICS:
        lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
        for labels, value in sorted(totals.values[metric.name].items()):
            lines.append(f"{metric.name}{_format_labels(totals.list_labels(metric), labels)} {value!r}")
    return "\n".join(lines) + "\n"


def _format_labels(names: Sequence[str], values: Sequence[str]) -> str:
    pairs = ",".join(f'{name}="{_escape(value)}"' for name, value in zip(names, values, strict=True))
    return f"{{{pairs}}}" if pairs else ""


_ESCAPES = {"\\": r"\\", '"': r"\"", "\n": r"\n"}
_UNESCAPES = {escaped: plain for plain, escaped in _ESCAPES.items()}


def _escape(text: str) -> str:
    return re.sub(r'[\\"\n]', lambda found: _ESCAPES[found[0]], text)


def _parse_totals(text: str, *, by_job: bool) -> MetricTotals:
    totals = MetricTotals(by_job)
    for name, labels, value in re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE):
        if name in totals.values:
            quoted = re.findall(r'\w+="((?:[^"\\]|\\.)*)"', labels)
            key = tuple(re.sub(r"\\.", lambda found: _UNESCAPES.get(found[0], found[0]), part) for part in quoted)
            totals.values[name][key] = float(value) if "." in value or "e" in value else int(value)
    return totals


def _read_file(path: Path, *, by_job: bool) -> str:
    """Return what was written the last time. "" when that is nothing.

    Args:
        path: The file.
        by_job: Whether it has series for each job.

    Raises:
        ForeignFileError: It holds something else.
    """
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    expected, other = (_FIRST_LINE, _FIRST_LINE_BY_JOB)[:: -1 if by_job else 1]
    if text.startswith(other):
        raise ForeignFileError("it was written with" + ("out" if by_job else "") + " --by-job; name another file")
    if text and not text.startswith(expected):
        raise ForeignFileError("this command did not write it, so it is left unchanged")
    return text


# ---- reading on


def export_totals(target: Path, logs: Iterable[Path], tally: LineTally, *, by_job: bool = False) -> None:
    """Add what is new in the logs, and in what was rotated away from them, to the totals in a file.

    Args:
        target: Written anew, readable for everybody.
        logs: Each is told from the others by its path.
        tally: Counts the lines that are no records, of this time only, and gets the files that are left out.
        by_job: Whether each job has series of its own.

    Raises:
        ForeignFileError: The target was written by something else.
        OSError: A log cannot be read, or the target not be written.
    """
    text = _read_file(target, by_job=by_job)
    totals, before = _parse_totals(text, by_job=by_job), _parse_positions(text)
    after: dict[str, _Positions] = {}
    for log in logs:
        known = before.get(str(log.absolute()), {})
        after[str(log.absolute())] = _read_on(find_log_files(log) or [log], known, totals, tally)
    totals.add_unreadable(tally.unreadable)
    # A log that is not named this time may be named the next time.
    replace_file(target, _format_file(totals, {**before, **after}), 0o644)


def _parse_positions(text: str) -> dict[str, _Positions]:
    found = re.search(rf"^{re.escape(_READ_SO_FAR)}(.*)$", text, re.MULTILINE)
    try:
        logs = json.loads(found[1]) if found else {}
        return {log: {head: _ReadPosition(**place) for head, place in places.items()} for log, places in logs.items()}
    except (ValueError, TypeError, AttributeError):
        raise ForeignFileError("something else changed it; remove it to restart the totals") from None


def _read_on(files: Iterable[Path], known: _Positions, totals: MetricTotals, tally: LineTally) -> _Positions:
    """Count what is new in the files of one log, and return how far they are read now."""
    places = dict(known)
    kept: _Positions = {}
    for path in files:
        status = path.stat()
        head = _find_unchanged(known, status)
        if head is None:
            lines = _NewLineReader(path, places, tally)
            for record in select_records(lines, RecordQuery(), tally):
                totals.add(record)
            head = lines.head
            if path in tally.left_out and not head:
                continue
            places[head] = _ReadPosition(lines.position, status.st_size, status.st_mtime_ns)
        kept[head] = places[head]
    return kept


def _find_unchanged(known: _Positions, status: os.stat_result) -> str | None:
    stamp = (status.st_size, status.st_mtime_ns)
    return next((head for head, place in known.items() if (place.size, place.changed) == stamp), None)


class _NewLineReader:
    """Reads the lines of a file that were not read before. One without its end is left for the next time.

    Attributes:
        head: Hash of the first line. "" while there is no whole one.
        position: How far the file is read, in bytes, decompressed.
    """

    def __init__(self, path: Path, known: _Positions, tally: LineTally) -> None:
        self.head = ""
        self.position = 0
        self._path, self._known, self._tally = path, known, tally

    def __iter__(self) -> Iterator[bytes]:
        try:
            with open_log(self._path, self._tally.origin) as file:
                yield from self._read(file)
        except LogRefusedError as error:
            self._tally.left_out[self._path] = str(error)
        except Exception as error:
            if not is_damage(self._path, error):
                raise
            self._tally.unreadable += 1

    def _read(self, file: IO[bytes]) -> Iterator[bytes]:
        first = _read_whole_line(file)
        self.head = hashlib.sha256(first).hexdigest()[:16] if first else ""
        if self.head in self._known:
            self.position = file.seek(self._known[self.head].read)
        elif first:
            self.position = len(first)
            yield first.rstrip(b"\n")
        while line := _read_whole_line(file):
            self.position += len(line)
            yield line.rstrip(b"\n")


def _read_whole_line(file: IO[bytes]) -> bytes:
    """Return the next line. b"" when its end is not there yet. What is longer than any record comes in parts."""
    line = file.readline(_LONGEST_LINE_BYTES)
    return line if line.endswith(b"\n") or len(line) == _LONGEST_LINE_BYTES else b""
