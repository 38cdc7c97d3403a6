"""Where records go: files, syslog, stderr. Nothing here ever raises into the program or makes it wait.

Without locks, on purpose: a lock held by another thread at the moment of a fork stays locked in the child
for ever. Lines do not mix because each is one write(2) on a descriptor opened with O_APPEND, and deques
are safe between threads. The file is opened for every event: that costs 2 µs more than a stat of the path
of a descriptor kept open (6 µs against 4), and no rotation, fork or closed descriptor can go wrong.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import stat
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any, Protocol

from tfenv.audit.record import AuditRecord, encode
from tfenv.audit.summary import say
from tfenv.errors import Finding, Severity, printable
from tfenv.policy.model import AuditSinks

__all__ = ["DEFAULT_LOG", "AuditLog", "RefusedLogError", "append_line", "expand_path"]

#: The user's own log, when no layer names one.
DEFAULT_LOG = "~/.local/state/tfgpu/audit.jsonl"
SYSLOG_SOCKET = "/dev/log"

_SYSLOG_USER = 1 << 3
_SYSLOG_SEVERITY = {"error": 3, "warning": 4, "info": 6}

# O_NOFOLLOW: a planted symlink is refused. O_NONBLOCK: a planted FIFO does not hang us.
_OPEN = os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class RefusedLogError(OSError):
    """The log at this path is not one to write to; its text says why."""


# ---- one log file


def expand_path(path: str, home: str | None, uid: int) -> str:
    """The path with `~` replaced by `home` and `<uid>` by the number.

    Args:
        path: As configured.
        home: From the passwd entry of the euid, never $HOME; None without one.
        uid: Effective user id.

    Raises:
        RefusedLogError: It needs a home and there is none, or it is not absolute.
    """
    expanded = path.replace("<uid>", str(uid))
    if expanded.startswith("~/"):
        if home is None:
            raise RefusedLogError(errno.ENOENT, "this user has no home directory")
        expanded = f"{home.rstrip('/')}/{expanded[2:]}"
    if not expanded.startswith("/"):
        raise RefusedLogError(errno.EINVAL, "not an absolute path")
    return expanded


def append_line(path: str, line: bytes, uid: int) -> None:
    """Append one line with one write(2).

    Args:
        path: A regular file with one name, owned by `uid` or root; created with mode 0600.
        line: With its newline.
        uid: Effective user id.

    Raises:
        RefusedLogError: The path is a symlink, a FIFO, a hard link, or somebody else's.
        OSError: It could not be opened, or not be written whole.
    """
    descriptor = _open_log(path, uid)
    try:
        line = line if _ends_whole(descriptor) else b"\n" + line
        written = os.write(descriptor, line)
    finally:
        os.close(descriptor)
    if written < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _open_log(path: str, uid: int) -> int:
    for _ in range(8):  # a rotation may take the file away between any two of these steps
        descriptor = _open_or_create(path)
        if descriptor is None:
            continue
        try:
            if _is_current_log(os.fstat(descriptor), uid):
                return descriptor
        except RefusedLogError:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise OSError(errno.EAGAIN, "the log is being replaced all the time")


def _open_or_create(path: str) -> int | None:
    """A descriptor; None when somebody else created or removed the file just now.

    Opened before it is created: O_CREAT on a file of another owner in a sticky directory (/var/log/tfgpu)
    is refused by the kernel (fs.protected_regular) even to root.
    """
    try:
        return _open_readable(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _refusal(error) from error
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, 0o600)
    except FileExistsError:
        return None


def _open_readable(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | _OPEN)
    except PermissionError:  # a log that may be written and not read; it cannot be checked for a torn end
        return os.open(path, os.O_WRONLY | _OPEN)


def _refusal(error: OSError) -> OSError:
    if error.errno == errno.ELOOP:
        return RefusedLogError(errno.ELOOP, "it is a symbolic link")
    if error.errno in (errno.ENXIO, errno.EISDIR):
        return RefusedLogError(error.errno, "it is not a regular file")
    return error


def _is_current_log(status: os.stat_result, uid: int) -> bool:
    """Whether the open file is still in a directory.

    Raises:
        RefusedLogError: It is not a file to log to.
    """
    if not stat.S_ISREG(status.st_mode):
        raise RefusedLogError(errno.EINVAL, "it is not a regular file")
    if status.st_uid not in (uid, 0):
        raise RefusedLogError(errno.EPERM, f"it belongs to uid {status.st_uid}")
    if status.st_nlink > 1:
        raise RefusedLogError(errno.EMLINK, "it has a second name (hard link)")
    return status.st_nlink == 1


def _ends_whole(descriptor: int) -> bool:
    """Whether the file ends with a newline: a full disk or SIGKILL may have torn the last record."""
    try:
        size = os.fstat(descriptor).st_size
        return size == 0 or os.pread(descriptor, 1, size - 1) in (b"\n", b"")
    except OSError:  # not readable
        return True


# ---- sinks


class Sink(Protocol):
    """Something that takes one line."""

    @property
    def name(self) -> str:
        """How the line on stderr calls it."""
        ...

    def write(self, line: bytes, level: str) -> None:
        """Take the line.

        Raises:
            OSError: It was not taken.
        """


class FileSink:
    """A log file.

    Attributes:
        name: The path as configured.
    """

    def __init__(self, path: str, home: str | None, uid: int, project: str | None = None) -> None:
        """
        Args:
            path: As configured.
            home: From the passwd entry of the euid.
            uid: Effective user id.
            project: A path that starts with this directory must also end up in it.
        """
        self.name = path
        self._home, self._uid, self._project = home, uid, project

    def write(self, line: bytes, level: str) -> None:  # noqa: ARG002 - only syslog has levels
        """Append it to the file; the directory of a log in the home is made when it is missing."""
        path = expand_path(self.name, self._home, self._uid)
        self._check_inside_project(path)
        try:
            append_line(path, line, self._uid)
        except FileNotFoundError:
            # An administrator's directory has an owner and a mode that we cannot guess.
            if not (self.name.startswith("~/") and self._home and os.path.isdir(self._home)):
                raise
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            append_line(path, line, self._uid)

    def _check_inside_project(self, path: str) -> None:
        """A cloned repository may hold `logs -> ~/.ssh`: O_NOFOLLOW sees the last component only."""
        if self._project is None or not self.name.startswith(f"{self._project.rstrip('/')}/"):
            return
        folder = f"{os.path.realpath(os.path.dirname(path))}/"
        if not folder.startswith(f"{os.path.realpath(self._project).rstrip('/')}/"):
            raise RefusedLogError(errno.ELOOP, "a symbolic link leads out of the project")


class SyslogSink:
    """journald or syslog, by a datagram that is dropped rather than waited for.

    Not the `syslog` module: its openlog() would rename the program's own messages, and it blocks.
    """

    def __init__(self, address: str = SYSLOG_SOCKET) -> None:
        self.name = f"syslog ({address})"
        self._address = address

    def write(self, line: bytes, level: str) -> None:
        """Send it, or fail at once."""
        import socket

        priority = _SYSLOG_USER | _SYSLOG_SEVERITY[level]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.setblocking(False)
            connection.sendto(b"<%d>tfgpu[%d]: %s" % (priority, os.getpid(), line.rstrip(b"\n")), self._address)


class StderrSink:
    """`[audit] stderr = "json"`."""

    name = "stderr"

    def write(self, line: bytes, level: str) -> None:  # noqa: ARG002 - only syslog has levels
        """Print it."""
        say(line.decode("ascii").rstrip("\n"))


# ---- the log


class _Line:
    """What structlog calls a logger: gets the finished line of one sink, and counts what the sink loses."""

    def __init__(self, sink: Sink, on_failure: Callable[[Sink, OSError | ValueError], None]) -> None:
        self._sink = sink
        self._on_failure = on_failure
        self._lost: deque[int] = deque()  # one pid per lost record: a child does not report its parent's

    def claim_lost(self) -> int:
        """How many records of this process were lost since the last one that was written."""
        claimed = 0
        with suppress(IndexError):  # rather than asking whether it is empty: another thread may claim too
            while True:
                claimed += self._lost.popleft() == os.getpid()
        return claimed

    # structlog calls the method that is named like the level.
    def info(self, line: bytes, lost: int) -> None:
        self._write(line, "info", lost)

    def warning(self, line: bytes, lost: int) -> None:
        self._write(line, "warning", lost)

    def error(self, line: bytes, lost: int) -> None:
        self._write(line, "error", lost)

    def _write(self, line: bytes, level: str, lost: int) -> None:
        try:
            self._sink.write(line, level)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            self._lost.extend([os.getpid()] * (lost + 1))
            self._on_failure(self._sink, error)


def _render(logger: _Line, _method: str, fields: MutableMapping[str, Any]) -> tuple[tuple[bytes], Mapping[str, int]]:
    """The last processor of structlog: one line, and how many it stands for should it be lost too."""
    lost = logger.claim_lost()
    if lost:
        fields["lost"] = lost
    return (encode(fields),), {"lost": lost}


def _import_structlog() -> Any:
    """structlog, or None where it is missing or broken.

    The collector rests meanwhile: with TensorFlow's objects in memory the import sets off a full
    collection, and takes 130 ms instead of 18.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import structlog
    except Exception:  # noqa: BLE001 - a half uninstalled environment, or an interpreter that is shutting down
        return None
    finally:
        if was_enabled:
            gc.enable()
    return structlog


class AuditLog:
    """All sinks of a policy. No method raises.

    Attributes:
        findings: What was wrong with the sinks, one per sink and cause: "refused-log" (never written to)
            and "log-not-written". Of severity "error" for a log that the machine layer asks for.
    """

    def __init__(self, sinks: AuditSinks, home: str | None, uid: int, project: str | None = None) -> None:
        """
        Args:
            sinks: From the policy; without any file the user's own log is written.
            home: From the passwd entry of the euid; None without one.
            uid: Effective user id.
            project: The project's directory, which a log named inside it may not leave by a symlink.
        """
        files = dict.fromkeys((*sinks.required_files, *(sinks.files or (DEFAULT_LOG,))))
        targets: list[Sink] = [FileSink(path, home, uid, project) for path in files]
        targets += [SyslogSink()] if sinks.syslog else []
        targets += [StderrSink()] if sinks.stderr == "json" else []
        self.findings: tuple[Finding, ...] = ()
        self._required = frozenset(sinks.required_files)
        self._lines = tuple(_Line(target, self._failed) for target in targets)
        self._loggers: tuple[Any, ...] | None = None
        self._kept: deque[tuple[int, AuditRecord]] = deque()
        self._told = False
        self._registered = False

    def keep(self, record: AuditRecord) -> None:
        """Write the record later, as it is now: before the next event, or at the interpreter's exit.

        At import time nothing but the record is needed, and structlog costs 20 ms. Only the process
        that kept a record writes it, not a forked child.
        """
        self._kept.append((os.getpid(), record))
        if not self._registered:
            self._registered = True
            atexit.register(self.flush)

    def emit(self, record: AuditRecord) -> None:
        """Write what was kept, then this record, to every sink."""
        self._bind()
        self.flush()
        self._write(record)

    def flush(self) -> None:
        """Write what was kept; without importing structlog, a program that only imported TensorFlow ends soon."""
        while True:
            try:
                pid, record = self._kept.popleft()
            except IndexError:
                return
            if pid == os.getpid():
                self._write(record)

    def _bind(self) -> None:
        if self._loggers is None and (structlog := _import_structlog()) is not None:
            # Everything is given, so that the program's own structlog.configure() has no say here.
            self._loggers = tuple(
                structlog.wrap_logger(
                    line,
                    processors=[structlog.processors.add_log_level, _render],
                    wrapper_class=structlog.BoundLogger,
                    context_class=dict,
                    cache_logger_on_first_use=False,
                )
                for line in self._lines
            )

    def _write(self, record: AuditRecord) -> None:
        try:
            if self._loggers is None:
                self._write_plainly(record)
            else:
                fields = {**record.fields, "timestamp": record.timestamp}
                for logger in self._loggers:
                    getattr(logger, record.level)(record.event, **fields)
        except Exception as error:  # noqa: BLE001 - a bug of ours is no reason to stop somebody's training
            self._tell(f"an audit record was not written: {type(error).__name__}: {error}")

    def _write_plainly(self, record: AuditRecord) -> None:
        """The same bytes without structlog."""
        for line in self._lines:
            arguments, names = _render(line, record.level, record.as_dict())
            getattr(line, record.level)(*arguments, **names)

    def _failed(self, sink: Sink, error: OSError | ValueError) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        refused = isinstance(error, RefusedLogError)
        severity: Severity = "error" if sink.name in self._required else "warning"
        text = f"the audit log {sink.name} {'is refused' if refused else 'was not written'}: {reason}"
        finding = Finding("refused-log" if refused else "log-not-written", text, severity, path=sink.name)
        if finding not in self.findings:
            self.findings = (*self.findings, finding)
        self._tell(text)

    def _tell(self, text: str) -> None:
        if not self._told:
            self._told = True
            say(printable(f"tfgpu: {text}; the program goes on"))
