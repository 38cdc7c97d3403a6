"""What the audit logs tell of processes that run now."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path

from tfenv.audit.query import LineTally, LoggedRecord, RecordQuery, read_newest
from tfenv.audit.record import format_timestamp
from tfenv.audit.rotation import LogOrigin, find_log_files
from tfenv.audit.sinks import RefusedLogError, expand_path, list_log_names
from tfenv.devices.usage import GpuProcess
from tfenv.identity import find_home
from tfenv.policy.model import AuditSinks
from tfenv.values import field, frozen, replace

#: An entry point's record says what the process was given; "loaded" alone says what it would be.
_EVENTS = frozenset({"policy_applied", "policy_clamped", "policy_failed", "policy_disabled"})
#: The start is known to within a second, and a clock may have been set meanwhile.
_SLACK_SECONDS = 2.0
_MOST_RECORDS = 100_000
#: Seconds. A clock that was wrong by more than a day when a program started hides its records.
_CLOCK_STEP = 86_400.0


@frozen
class UserRecords:
    """What the logs tell of one user's processes.

    Attributes:
        by_pid: The records of each process, oldest first.
        readable: Whether the user's own log could be read, or does not exist. Only then a missing record tells
            that there was no policy.
    """

    by_pid: Mapping[int, tuple[LoggedRecord, ...]] = field(default_factory=dict)
    readable: bool = True


def read_user_records(processes: Iterable[GpuProcess], sinks: AuditSinks) -> Mapping[int, UserRecords]:
    """Read what the logs tell of processes.

    Args:
        processes: Those that run.
        sinks: Where records go under the policy in force here. `~` and `<uid>` are each user's own.

    Returns:
        The records by uid. A process of an unknown user has none.
    """
    by_uid: dict[int, list[GpuProcess]] = {}
    for process in processes:
        if process.uid is not None:
            by_uid.setdefault(process.uid, []).append(process)
    return {uid: _read_records_of_user(uid, theirs, sinks) for uid, theirs in by_uid.items()}


def _read_records_of_user(uid: int, processes: list[GpuProcess], sinks: AuditSinks) -> UserRecords:
    logs, readable = _find_logs(uid, sinks, {_find_default_log(process) for process in processes})
    starts = [process.started for process in processes if process.started is not None]
    query = RecordQuery(
        events=_EVENTS,
        uids=frozenset({uid}),
        pids=frozenset(process.pid for process in processes),
        since=_format_start(min(starts) - _CLOCK_STEP) if starts else "",
    )
    try:
        # What stands at a path may have been changed since it was looked at.
        tally = LineTally(origin=LogOrigin(is_trusted=False, uid=uid))
        found = read_newest(logs, query, tally, _MOST_RECORDS)
    except OSError:
        return UserRecords(readable=False)
    readable = readable and not tally.left_out
    return UserRecords({process.pid: _select_records(process, found) for process in processes}, readable)


def _select_records(process: GpuProcess, records: Iterable[LoggedRecord]) -> tuple[LoggedRecord, ...]:
    """Return the records of this process, not of an earlier one with its number, nor of one on another host."""
    since, host = "" if process.started is None else _format_start(process.started), os.uname().nodename
    return tuple(
        record
        for record in records
        if record.get("pid") == process.pid and record.get("host") == host and _is_same_start(record, process, since)
    )


def _is_same_start(record: LoggedRecord, process: GpuProcess, since: str) -> bool:
    """Return whether a record is of this process and not of an earlier one with its number.

    Ticks since the machine's start do not move when somebody sets the clock. Older records lack them.
    """
    ticks = record.get("start_ticks")
    if isinstance(ticks, int) and process.start_ticks is not None:
        return ticks == process.start_ticks
    return str(record["timestamp"]) >= since


def _format_start(seconds: float) -> str:
    return format_timestamp(datetime.fromtimestamp(max(0.0, seconds - _SLACK_SECONDS), timezone.utc))


# ---- logs


def _find_default_log(process: GpuProcess) -> str:
    """Return where the process's user has their own log, as its environment says."""
    try:
        environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    except OSError:
        environment = []
    states = [os.fsdecode(entry.partition(b"=")[2]) for entry in environment if entry.startswith(b"XDG_STATE_HOME=/")]
    return f"{states[0].rstrip('/')}/tfgpu/audit.jsonl" if states else AuditSinks().default_log


def _find_logs(uid: int, sinks: AuditSinks, default_logs: Iterable[str]) -> tuple[list[Path], bool]:
    """Return the user's logs that can be read, rotated ones too, and whether all that exist can be read.

    Args:
        uid: The user's.
        sinks: Where records go under the policy in force here.
        default_logs: Where that is for the user's own processes.
    """
    found: list[Path] = []
    readable = True
    named = list_log_names(replace(sinks, default_file=False))
    for name in (*named, *(sorted(default_logs) if sinks.default_file else ())):
        try:
            path = Path(expand_path(name, find_home(uid), uid))
            found += [log for log in find_log_files(path) if _is_log(log, uid)]
            path.stat()
        except RefusedLogError:  # a user without a home has no such log: that no record is there tells nothing
            readable = False
        except OSError as error:
            readable = readable and error.errno == errno.ENOENT
    return found, readable


def _is_log(path: Path, uid: int) -> bool:
    """Return whether it is a regular file of the user's or root's: anything may stand in another user's home.

    Raises:
        PermissionError: It is one, and cannot be read.
    """
    status = path.stat(follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in (uid, 0, os.geteuid()):
        return False
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return True
