"""Where records go: files, syslog, stderr. Nothing here ever raises into the program or makes it wait.

Without locks, on purpose: a lock held by another thread at the moment of a fork stays locked in the child
for ever. Lines do not mix because each is one write(2) on a descriptor opened with O_APPEND, and append and pop of a
list are safe between threads. The file is opened for every event: that costs 2 µs more than a stat of the path
of a descriptor kept open (6 µs against 4), and no rotation, fork or closed descriptor can go wrong.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import os
import stat
import time

from tfenv.audit.record import encode_record
from tfenv.audit.stderr_line import print_once, print_to_stderr
from tfenv.dependencies import import_dependency
from tfenv.errors import Finding, escape_for_terminal
from tfenv.identity import get_user_name
from tfenv.values import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping
    from typing import Any, TypeAlias

    from tfenv.audit.record import AuditRecord
    from tfenv.errors import Severity
    from tfenv.policy.model import AuditSinks

    LineSink: TypeAlias = "FileSink | SyslogSink | StderrSink"

#: Set for the children once the line about a log that failed was shown, as `stderr_line.SHOWN_VARIABLE` is.
COMPLAINED_VARIABLE = "TFGPU_AUDIT_COMPLAINED"
SYSLOG_SOCKET = "/dev/log"

_SYSLOG_USER = 1 << 3
_SYSLOG_SEVERITY = {"error": 3, "warning": 4, "info": 6}

# How every record begins: `encode_record` sees to it.
_LOG_BEGIN = b'{"timestamp"'

# A rotation takes less than the product between its renaming and its creating.
_MOST_ATTEMPTS = 8
_ROTATION_SECONDS = 0.002
# So many half-grown lines in a row are a torn one.
_MOST_WRITERS = 32
# O_NOFOLLOW: a planted symlink is refused. O_NONBLOCK: a planted FIFO does not hang us.
_OPEN = os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class RefusedLogError(OSError):
    """The log at this path is not one to write to. Its text says why."""


class PlantedLogError(RefusedLogError):
    """Somebody else put a file at this path, before a log of this user was there."""


def list_log_names(sinks: AuditSinks) -> tuple[str, ...]:
    """Return all logs as configured, the administrator's first and the user's default log last."""
    default = (sinks.default_log,) if sinks.default_file else ()
    return tuple(dict.fromkeys((*sinks.required_files, *sinks.files, *default)))


# ---- one log file

#: Device and inode of the files that were seen to begin with a record: asked once per process, not per event.
_known_logs: set[tuple[int, int]] = set()


def expand_path(path: str, home: str | None, uid: int) -> str:
    """Return the path with `~` replaced by `home` and `<uid>` by the number.

    Args:
        path: As configured.
        home: From the passwd entry of the euid, never $HOME. None without one.
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


def find_open_folder(path: str) -> str | None:
    """Return the folder in which everybody can create a log that an administrator named. None: nobody else can.

    Args:
        path: As configured. What has `<uid>` in its name and does not exist yet can be created by anybody first.
    """
    folder = os.path.dirname(path.partition("<uid>")[0])
    try:
        mode = os.stat(folder).st_mode
    except (OSError, ValueError):
        return None
    return folder if path.startswith("/") and mode & stat.S_IWOTH else None


def find_syslog_problem() -> str | None:
    """Return why nothing can be sent to syslog here. None: somebody listens."""
    try:
        SyslogSink(SYSLOG_SOCKET).write(b"", "info")
    except OSError as error:
        return f"{SYSLOG_SOCKET}: {error.strerror or error}"
    return None


def append_line(path: str, line: bytes, uid: int) -> None:
    """Append one line with one write(2).

    Args:
        path: A regular file with one name, owned by `uid` or root, of records. Created with mode 0600.
        line: With its newline.
        uid: Effective user id.

    Raises:
        RefusedLogError: The path is a symlink, a FIFO, a hard link, somebody else's, or holds something else.
        OSError: It could not be opened, or not be written whole.
    """
    descriptor = _open_for_append(path, uid)
    try:
        _check_holds_records(descriptor)
        line = line if _ends_whole(descriptor) else b"\n" + line
        written = os.write(descriptor, line)
    finally:
        os.close(descriptor)
    if written < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _open_for_append(path: str, uid: int) -> int:
    for attempt in range(_MOST_ATTEMPTS):  # a rotation may take the file away between any two of these steps
        descriptor = _open_or_create(path, uid, is_last=attempt == _MOST_ATTEMPTS - 1)
        if descriptor is None:
            continue
        try:
            if _is_current_log(os.fstat(descriptor), uid):
                return descriptor
        except RefusedLogError:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise OSError(errno.EAGAIN, "something keeps replacing the log")


def _open_or_create(path: str, uid: int, *, is_last: bool) -> int | None:
    """Return a descriptor. None when somebody else created or removed the file just now, or will in a moment.

    In a directory where only root creates files, a rotation renames the old one and then makes the new one.

    Opened before it is created: O_CREAT on a file of another owner in a sticky directory (/var/log/tfgpu)
    is refused by the kernel (fs.protected_regular) even to root.
    """
    try:
        return _open_readable(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _explain_refusal(error, path, uid) from error
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, 0o600)
    except FileExistsError:
        return None
    except PermissionError:
        if is_last:
            raise
        time.sleep(_ROTATION_SECONDS)
        return None


def _open_readable(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | _OPEN)
    except PermissionError:  # a log that may be written and not read, and so not checked for a torn end
        return os.open(path, os.O_WRONLY | _OPEN)


def _explain_refusal(error: OSError, path: str, uid: int) -> OSError:
    try:
        _require_owner(os.lstat(path), uid)
    except OSError as other:
        return other if isinstance(other, PlantedLogError) else error
    if error.errno == errno.ELOOP:
        return RefusedLogError(errno.ELOOP, "it is a symbolic link")
    if error.errno in (errno.ENXIO, errno.EISDIR):
        return RefusedLogError(error.errno, "it is not a regular file")
    return error


def _require_owner(status: os.stat_result, uid: int) -> None:
    """Require that a file is the user's or root's.

    Raises:
        PlantedLogError: It belongs to somebody else.
    """
    if status.st_uid not in (uid, 0):
        raise PlantedLogError(errno.EPERM, f"it belongs to {get_user_name(status.st_uid)}")


def _is_current_log(status: os.stat_result, uid: int) -> bool:
    """Tell whether the open file is still in a directory.

    Raises:
        RefusedLogError: It is not a file to log to.
    """
    _require_owner(status, uid)
    if not stat.S_ISREG(status.st_mode):
        raise RefusedLogError(errno.EINVAL, "it is not a regular file")
    if status.st_nlink > 1:
        raise RefusedLogError(errno.EMLINK, "it has a second name (a hard link)")
    return status.st_nlink == 1


def _check_holds_records(descriptor: int) -> None:
    """Refuse a file of something else: a project's `file = "train.py"` gets no line.

    Raises:
        RefusedLogError: It begins with something else than a record.
    """
    status = os.fstat(descriptor)
    identity = (status.st_dev, status.st_ino)
    if identity in _known_logs:
        return
    try:
        head = os.pread(descriptor, len(_LOG_BEGIN), 0)
    except OSError:  # it may be written and not read, as an administrator sets it up
        return
    # The first record may be torn, and a whole one follow on the next line.
    if not all(_LOG_BEGIN.startswith(line) for line in head.split(b"\n")):
        raise RefusedLogError(errno.EINVAL, "it contains something other than audit records")
    if len(head) == len(_LOG_BEGIN):
        _known_logs.add(identity)


def _ends_whole(descriptor: int) -> bool:
    """Tell whether the last record is whole. What another process is writing is waited for, as often as it happens."""
    for _ in range(_MOST_WRITERS):
        if _ends_with_newline(descriptor):
            return True
        _wait_for_writer(descriptor)
    return _ends_with_newline(descriptor)


def _wait_for_writer(descriptor: int) -> None:
    """Wait until a write(2) that goes on now has ended: its first half is no torn line.

    A write holds the kernel's lock on the file, and so does a change of its mode, even to the same.
    """
    with contextlib.suppress(OSError):  # only the owner may; a log of root's is not waited for
        os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode))


def _ends_with_newline(descriptor: int) -> bool:
    """Tell whether the file's last record is whole: a full disk or SIGKILL may have torn it."""
    try:
        size = os.fstat(descriptor).st_size
        return size == 0 or os.pread(descriptor, 1, size - 1) in (b"\n", b"")
    except OSError:  # not readable
        return True


# ---- sinks


class FileSink:
    """A log file.

    Attributes:
        name: The path as configured.
    """

    def __init__(
        self, path: str, home: str | None, uid: int, project: str | None = None, *, is_default: bool = False
    ) -> None:
        """
        Args:
            path: As configured.
            home: From the passwd entry of the euid.
            uid: Effective user id.
            project: A path that starts with this directory must also end up in it.
            is_default: It is the user's own log, which nobody named.
        """
        self.name = path
        self._home, self._uid, self._project = home, uid, project
        self._is_default = is_default

    def write(self, line: bytes, level: str) -> None:  # noqa: ARG002 - only syslog has levels
        """Append it to the file. The directory of the default log and of one in the home is made when it is missing."""
        path = expand_path(self.name, self._home, self._uid)
        self._check_inside_project(path)
        try:
            append_line(path, line, self._uid)
        except FileNotFoundError:
            # An administrator's directory has an owner and a mode that we cannot guess.
            in_home = self.name.startswith("~/") and self._home and os.path.isdir(self._home)
            if not in_home and not (self._is_default and self.name.startswith("/")):
                raise
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            append_line(path, line, self._uid)

    def _check_inside_project(self, path: str) -> None:
        """Refuse what leads out: a repository may hold `logs -> ~/.ssh`, and O_NOFOLLOW sees the last name only."""
        if self._project is None or not self.name.startswith(f"{self._project.rstrip('/')}/"):
            return
        folder = f"{os.path.realpath(os.path.dirname(path))}/"
        if not folder.startswith(f"{os.path.realpath(self._project).rstrip('/')}/"):
            raise RefusedLogError(errno.ELOOP, "a symbolic link leads out of the project")


class SyslogSink:
    """journald or syslog, by a datagram that is dropped rather than waited for.

    Not the `syslog` module: its openlog() would rename the program's own messages, and it blocks.
    """

    def __init__(self, address: str) -> None:
        self.name = f"syslog ({address})"
        self._address = address

    def write(self, line: bytes, level: str) -> None:
        """Send it, or fail at once. Of an empty line only find out whether somebody listens."""
        import socket

        priority = _SYSLOG_USER | _SYSLOG_SEVERITY[level]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.setblocking(False)
            connection.connect(self._address)
            if line:
                connection.send(b"<%d>tfgpu[%d]: %s" % (priority, os.getpid(), line.rstrip(b"\n")))


class StderrSink:
    """Standard error, for `[audit] stderr = "json"`."""

    name = "stderr"

    def write(self, line: bytes, level: str) -> None:  # noqa: ARG002 - only syslog has levels
        """Print it."""
        print_to_stderr(line.decode("ascii").rstrip("\n"))


# ---- the log


class _SinkLogger:
    """What structlog calls a logger: takes the finished line for one sink, and counts what the sink loses."""

    def __init__(self, sink: LineSink, on_failure: Callable[[LineSink, OSError | ValueError], None]) -> None:
        self.sink = sink
        self._on_failure = on_failure
        self._lost: list[int] = []  # one pid per lost record: a child does not report its parent's

    def claim_lost(self) -> int:
        """Return how many records of this process were lost since the last one that was written, and forget them."""
        claimed = 0
        try:  # rather than asking whether it is empty: another thread may claim too
            while True:
                claimed += self._lost.pop() == os.getpid()
        except IndexError:
            return claimed

    def try_sink(self) -> None:
        """Find out whether the sink can be written, by writing nothing to it."""
        try:
            self.sink.write(b"", "info")
        except (OSError, ValueError) as error:
            self._on_failure(self.sink, error)

    # structlog calls the method that is named like the level.
    def info(self, line: bytes, lost: int) -> None:
        self._write(line, "info", lost)

    def warning(self, line: bytes, lost: int) -> None:
        self._write(line, "warning", lost)

    def error(self, line: bytes, lost: int) -> None:
        self._write(line, "error", lost)

    def _write(self, line: bytes, level: str, lost: int) -> None:
        try:
            self.sink.write(line, level)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            self._lost.extend([os.getpid()] * (lost + 1))
            self._on_failure(self.sink, error)


def _render(logger: _SinkLogger, _method: str, fields: MutableMapping[str, Any]) -> tuple[tuple[bytes], dict[str, int]]:
    """Make the line, as structlog's last processor. It comes with how many are lost if this one is lost too."""
    lost = logger.claim_lost()
    if lost:
        fields["lost"] = lost
    return (encode_record(fields),), {"lost": lost}


def _import_structlog() -> Any:
    """Return structlog. None where it is missing or broken.

    The collector rests meanwhile: with TensorFlow's objects in memory the import sets off a full
    collection, and takes 130 ms instead of 18.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        structlog = import_dependency("structlog")
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
            and "log-not-written". Of severity "error" for a log that the machine layer asks for. And the
            note "no-default-log" for a user without a home directory.
    """

    def __init__(self, sinks: AuditSinks, home: str | None, uid: int, project: str | None = None) -> None:
        """
        Args:
            sinks: From the policy.
            home: From the passwd entry of the euid. None without one.
            uid: Effective user id.
            project: The project's directory, which a log named inside it may not leave by a symlink.
        """
        self.findings: tuple[Finding, ...] = ()
        homeless = home is None or not os.path.isdir(home)
        if sinks.default_file and sinks.default_log.startswith("~") and homeless:
            # A container's uid, or the /nonexistent of a service: nobody's fault, and nothing to say on stderr.
            text = "this user has no home directory for an audit log"
            self.findings = (Finding("no-default-log", text, "note"),)
            sinks = replace(sinks, default_file=False)
        syslog = SyslogSink(SYSLOG_SOCKET)
        targets: list[LineSink] = [
            FileSink(path, home, uid, project, is_default=path == sinks.default_log) for path in list_log_names(sinks)
        ]
        targets += [syslog] if sinks.syslog else []
        targets += [StderrSink()] if sinks.stderr == "json" else []
        self._required = frozenset((*sinks.required_files, *([syslog.name] if sinks.required_syslog else [])))
        self._sink_loggers = tuple(_SinkLogger(target, self._note_failure) for target in targets)
        self._structlog_loggers: tuple[Any, ...] | None = None
        self._kept: list[tuple[int, AuditRecord]] = []
        self._is_registered = False

    def keep(self, record: AuditRecord) -> None:
        """Write the record later, as it is now: before the next event, or at the interpreter's exit.

        At import time nothing but the record is needed, and structlog costs 20 ms. Only the process
        that kept a record writes it, not a forked child.
        """
        self._kept.append((os.getpid(), record))
        if not self._is_registered:
            self._is_registered = True
            atexit.register(self.flush)

    def emit(self, record: AuditRecord) -> None:
        """Write what was kept, then this record, to every sink."""
        self._make_loggers()
        self.flush()
        self._write(record)

    def open_now(self) -> None:
        """Write what was kept, and show in `findings` whether the logs that the machine asks for can be written.

        For the moment just before devices are created: a required log that cannot be written is found out while
        `on_error` can still refuse. A log that nothing was kept for is opened, and created if it is missing.
        """
        self._make_loggers()
        self.flush()
        for logger in self._sink_loggers:
            if logger.sink.name in self._required:
                logger.try_sink()

    def flush(self) -> None:
        """Write what was kept. Imports no structlog: a program that only imported a framework ends soon."""
        while True:
            try:
                pid, record = self._kept.pop(0)
            except IndexError:
                return
            if pid == os.getpid():
                self._write(record)

    def _make_loggers(self) -> None:
        if self._structlog_loggers is None and (structlog := _import_structlog()) is not None:
            # Everything is given, so that the program's own structlog.configure() changes nothing here.
            self._structlog_loggers = tuple(
                structlog.wrap_logger(
                    logger,
                    processors=[structlog.processors.add_log_level, _render],
                    wrapper_class=structlog.BoundLogger,
                    context_class=dict,
                    cache_logger_on_first_use=False,
                )
                for logger in self._sink_loggers
            )

    def _write(self, record: AuditRecord) -> None:
        try:
            if self._structlog_loggers is None:
                self._write_plainly(record)
            else:
                fields = {**record.fields, "timestamp": record.timestamp}
                for logger in self._structlog_loggers:
                    getattr(logger, record.level)(record.event, **fields)
        except Exception as error:  # noqa: BLE001 - a bug of ours is no reason to stop somebody's training
            _complain_once(f"an audit record was not written: {type(error).__name__}: {error}", "internal-error")

    def _write_plainly(self, record: AuditRecord) -> None:
        """Write the same bytes without structlog."""
        for logger in self._sink_loggers:
            arguments, names = _render(logger, record.level, record.as_dict())
            getattr(logger, record.level)(*arguments, **names)

    def _note_failure(self, sink: LineSink, error: OSError | ValueError) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        refused = isinstance(error, RefusedLogError)
        # Whoever plants a file must not have `on_error` take the GPUs of the user it is named after.
        planted = isinstance(error, PlantedLogError)
        severity: Severity = "error" if sink.name in self._required and not planted else "warning"
        text = f"the audit log {'is refused' if refused else 'was not written'}: {reason}"
        finding = Finding("refused-log" if refused else "log-not-written", text, severity, path=sink.name)
        if finding not in self.findings:
            self.findings = (*self.findings, finding)
        _complain_once(f"{sink.name}: {text}", finding.code)


def _complain_once(text: str, code: str) -> None:
    line = escape_for_terminal(f"tfgpu: {text}; the program goes on [{code}]")
    print_once(line, COMPLAINED_VARIABLE, subject="log")
