"""What the audit logs say of processes that run now."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path

from tfenv.audit.query import LineTally, LoggedRecord, RecordQuery, read_newest
from tfenv.audit.record import format_timestamp
from tfenv.audit.rotation import find_log_files
from tfenv.audit.sinks import RefusedLogError, expand_path, list_log_names
from tfenv.devices.usage import GpuProcess
from tfenv.identity import find_home
from tfenv.policy.model import AuditSinks
from tfenv.values import field, frozen

__all__ = ["Known", "known_of"]

#: An entry point's record says what the process was given; "loaded" alone says what it would be.
_EVENTS = frozenset({"policy_applied", "policy_clamped", "policy_failed", "policy_disabled"})
#: The start is known to within a second, and a clock may have been set meanwhile.
_SLACK_SECONDS = 2.0
_MOST_RECORDS = 100_000


@frozen
class Known:
    """What the logs of one user's processes say.

    Attributes:
        records: By pid the records of that very process, oldest first.
        readable: Whether the user's own log could be read, or does not exist: then silence says something.
    """

    records: Mapping[int, tuple[LoggedRecord, ...]] = field(default_factory=dict)
    readable: bool = True


def known_of(processes: Iterable[GpuProcess], sinks: AuditSinks) -> Mapping[int, Known]:
    """By uid what the logs say of its processes that can be seen here.

    Args:
        processes: Those that run.
        sinks: Where records go under the policy in force here; `~` and `<uid>` are each user's own.
    """
    by_uid: dict[int, list[GpuProcess]] = {}
    for process in processes:
        if process.uid is not None:
            by_uid.setdefault(process.uid, []).append(process)
    return {uid: _known(uid, theirs, sinks) for uid, theirs in by_uid.items()}


def _known(uid: int, processes: list[GpuProcess], sinks: AuditSinks) -> Known:
    logs, readable = _logs(uid, sinks)
    starts = [process.started for process in processes if process.started is not None]
    query = RecordQuery(events=_EVENTS, uids=frozenset({uid}), since=_stamp(min(starts)) if starts else "")
    try:
        found = read_newest(logs, query, LineTally(), _MOST_RECORDS)
    except OSError:
        return Known(readable=False)
    return Known({process.pid: _of(process, found) for process in processes}, readable)


def _of(process: GpuProcess, records: Iterable[LoggedRecord]) -> tuple[LoggedRecord, ...]:
    """Those of this process, not of one that had its number before, or has it on another host."""
    since, host = "" if process.started is None else _stamp(process.started), os.uname().nodename
    return tuple(
        record
        for record in records
        if record.get("pid") == process.pid and record.get("host") == host and record["timestamp"] >= since
    )


def _stamp(seconds: float) -> str:
    """As in a record."""
    return format_timestamp(datetime.fromtimestamp(max(0.0, seconds - _SLACK_SECONDS), timezone.utc))


# ---- logs


def _logs(uid: int, sinks: AuditSinks) -> tuple[list[Path], bool]:
    """The files that can be read, rotated ones too; and whether nothing kept us from reading one."""
    found: list[Path] = []
    readable = True
    for name in list_log_names(sinks):
        try:
            path = Path(expand_path(name, find_home(uid), uid))
            found += [log for log in find_log_files(path) if _is_log(log, uid)]
            path.stat()
        except RefusedLogError:  # a user without a home has no such log: silence says nothing
            readable = False
        except OSError as error:
            readable = readable and error.errno == errno.ENOENT
    return found, readable


def _is_log(path: Path, uid: int) -> bool:
    """A regular file of the user's or root's that can be read: anything may stand in another user's home."""
    status = path.stat(follow_symlinks=False)
    ours = status.st_uid in (uid, 0, os.geteuid())
    if not stat.S_ISREG(status.st_mode) or not ours:
        return False
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return True
