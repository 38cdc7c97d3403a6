"""Leases: what keeps two processes from choosing the same GPU.

A lease is a file in a directory where all users meet, and an flock on it that its process keeps for its life. The
kernel drops the lock when the process ends, however it ends (SIGKILL too), so that no daemon has to clean up: a file
that can be locked is nobody's any more. One chooser at a time looks and takes, under a lock on the directory itself.

    lease-ID     {"pid", "script", "since", "allocations": [{"uuid", "limit", "shared"}, ...], "parent"}
    ticket-N-ID  the same with "request" in the place of "allocations": the process waits, and came as number N
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from tfenv.errors import TfenvError
from tfenv.identity import get_user_name
from tfenv.policy.model import Allocation, Lease
from tfenv.sharing.choose import Candidate, GpuRequest
from tfenv.values import frozen, replace

__all__ = [
    "LARGEST_NUMBER",
    "Entry",
    "LeaseError",
    "directory_lock",
    "create",
    "list_lease_directories",
    "entries",
    "release_file",
    "parse_leases",
    "parse_ticket_number",
    "open_lease_directories",
    "open_file",
    "read_leases",
    "try_lock",
    "parse_request",
]

#: Where all users of a machine meet, the first that exists; never $TMPDIR, which each of them may set differently.
_PLACES = ("/run/lock/tfgpu", "/tmp/tfgpu")  # noqa: S108 - checked before it is used, and no file in it is trusted
_MODE = 0o1777
#: A sticky file is spared by those who clean /tmp by age (systemd-tmpfiles, XDG).
_FILE_MODE = 0o1644
_LARGEST_FILE = 1 << 16
LARGEST_NUMBER = 10**18
#: A chooser needs milliseconds; who keeps the directory for longer was stopped, or means harm.
_ARBITER_SECONDS = 30.0
#: Somebody may be making the directory right now.
_UNFIT_SECONDS = 1.0


class LeaseError(TfenvError):
    """No lease can be had here: no directory, no space, or somebody keeps it locked."""


# ---- the directory


def list_lease_directories() -> tuple[str, ...]:
    """Where leases may be, the preferred place first. Simulated GPUs have their leases beside their log."""
    if "TFGPU_SIMULATE" in os.environ:
        log = os.environ.get("TFGPU_SIMULATE_LOG")
        return (f"{log}.leases" if log else f"{_PLACES[-1]}-simulated",)
    return _PLACES


def _open_directory(path: str) -> int | None:
    """A descriptor of the directory; None where there is none that all users can share safely."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    status = os.fstat(descriptor)
    if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) != _MODE:
        with contextlib.suppress(OSError):  # whoever made it was killed before it could open it to the others
            os.fchmod(descriptor, _MODE)
            status = os.fstat(descriptor)
    # Sticky: nobody but root and the directory's owner removes or renames the files of others.
    if stat.S_IMODE(status.st_mode) == _MODE:
        return descriptor
    os.close(descriptor)
    return None


def _make_directory() -> bool:
    """Make the first of the directories that can be made; False where all are there, fit or not."""
    problem: OSError | None = None
    for path in list_lease_directories():
        try:
            os.mkdir(path, _MODE)
        except FileExistsError:
            continue  # being made by somebody else, or not fit to be shared
        except OSError as error:
            problem = error
            continue
        return True
    if problem is not None:
        raise LeaseError(f"no directory for leases: {problem}")
    return False


def open_lease_directories() -> dict[str, int]:
    """Descriptors of the directories that are there, by path; for the caller to close."""
    opened = {path: _open_directory(path) for path in list_lease_directories()}
    return {path: descriptor for path, descriptor in opened.items() if descriptor is not None}


def _same_directory(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except OSError:
        return False


@contextlib.contextmanager
def directory_lock() -> Iterator[dict[str, int]]:
    """Be the only chooser. Gives the directories by path: leases are read in all of them and made in the first.

    There are two only where one came after the other was in use (root can make one that users could not).

    Raises:
        LeaseError: There is no directory, or somebody keeps it locked.
    """
    began = time.monotonic()
    while True:
        opened = open_lease_directories()
        try:
            if not opened and _make_directory():
                continue
            if opened and _lock_all(opened, began + _ARBITER_SECONDS) and _open_to_all(opened):
                yield opened
                return
        finally:
            for descriptor in opened.values():
                os.close(descriptor)  # and the lock with it
        if time.monotonic() > began + (_ARBITER_SECONDS if opened else _UNFIT_SECONDS):
            raise LeaseError(f"no directory for leases that users can share: {' and '.join(list_lease_directories())}")
        time.sleep(0.01)


def _lock_all(opened: Mapping[str, int], deadline: float) -> bool:
    pause = 0.001
    for path, descriptor in opened.items():
        while not try_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise LeaseError(f"{path} has been locked for {_ARBITER_SECONDS:.0f} s by another process")
            time.sleep(pause)
            pause = min(2 * pause, 0.016)
    return True


def _open_to_all(opened: Mapping[str, int]) -> bool:
    """Whether nothing changed until all of them were locked: none was removed, none came."""
    now = open_lease_directories()
    try:
        return now.keys() == opened.keys() and all(_same_directory(path, fd) for path, fd in opened.items())
    finally:
        for descriptor in now.values():
            os.close(descriptor)


def try_lock(descriptor: int, kind: int) -> bool:
    """Lock the file unless somebody has it locked. Shared: whether its process is gone."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise LeaseError(f"a lease cannot be locked here: {error}") from error
    return True


# ---- the files


@frozen
class Entry:
    """A file of a live process.

    Attributes:
        name: Of the file, which is also the id of the leases in it.
        directory: Descriptor of the directory it is in.
        uid: Its owner.
        data: What is in it; by anybody's hand.
        touched_s: Seconds since its process touched it; those that wait do so now and then.
    """

    name: str
    directory: int
    uid: int
    data: Mapping[str, Any]
    touched_s: float = 0.0


def entries(directory: int, *, clean: bool = False) -> Iterator[Entry]:
    """The files whose processes live; `clean` removes those of our own user whose processes do not."""
    for name in sorted(os.listdir(directory)):
        if not name.startswith(("lease-", "ticket-", ".new-")):
            continue
        try:
            descriptor = open_file(name, directory)
        except OSError:
            continue
        try:
            entry = _live_entry(name, directory, descriptor)
            if entry is not None:
                yield entry
            elif clean and os.fstat(descriptor).st_uid == os.geteuid() and try_lock(descriptor, fcntl.LOCK_SH):
                os.unlink(name, dir_fd=directory)
        except OSError:
            continue
        finally:
            os.close(descriptor)


def open_file(name: str, directory: int) -> int:
    """Anybody can put anything here: links are not followed, nothing is waited for."""
    return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)


def _live_entry(name: str, directory: int, descriptor: int) -> Entry | None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or try_lock(descriptor, fcntl.LOCK_SH):
        return None
    try:
        data = json.loads(os.pread(descriptor, _LARGEST_FILE, 0))
    except (ValueError, RecursionError):
        return None
    touched_s = time.time() - status.st_mtime
    return Entry(name, directory, status.st_uid, data, touched_s) if isinstance(data, dict) else None


def create(kind: str, content: Mapping[str, Any], directory: int) -> tuple[str, int]:
    """A new file under our lock: it appears under its name when it is whole, so that it is never seen without.

    Returns:
        Its name, and the descriptor that keeps it locked as long as this process lives.

    Raises:
        LeaseError: It cannot be written.
    """
    name = f"{kind}-{os.getpid()}-{os.urandom(4).hex()}"
    new = f".new-{name}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(new, flags, 0o600, dir_fd=directory)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            _write_all(descriptor, json.dumps(content).encode())
            os.fchmod(descriptor, _FILE_MODE)
            os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(new, dir_fd=directory)
            raise
    except OSError as error:
        raise LeaseError(f"a lease cannot be written: {error}") from error
    _kept[descriptor] = os.fstat(descriptor)
    return name, descriptor


def _write_all(descriptor: int, text: bytes) -> None:
    if os.write(descriptor, text) < len(text):  # the disk became full
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


#: What this process keeps locked, by descriptor.
_kept: dict[int, os.stat_result] = {}


def release_file(descriptor: int) -> None:
    """Close a file of ours; the number may be another file's by now, if the program closed what it did not open."""
    kept = _kept.pop(descriptor, None)
    with contextlib.suppress(OSError):
        if kept is not None and os.path.samestat(kept, os.fstat(descriptor)):
            os.close(descriptor)


def _leave_to_the_parent() -> None:
    """In a forked child: the lease stays the parent's, and ends with the parent.

    Closing our copy does not unlock it; keeping the copy would hold the parent's GPU as long as the child lives.
    """
    for descriptor in tuple(_kept):
        release_file(descriptor)


os.register_at_fork(after_in_child=_leave_to_the_parent)


# ---- their content

#: Many leases are of few users, and a directory service may be slow to name them.
_user_name = cache(get_user_name)


def parse_leases(entry: Entry) -> list[Lease]:
    """One Lease per GPU; none where somebody wrote something else."""
    try:
        data = entry.data
        lease = Lease(
            id=entry.name,
            allocation=Allocation(""),
            uid=entry.uid,
            user=_user_name(entry.uid),
            pid=int(data["pid"]),
            script=None if data.get("script") is None else str(data["script"]),
            since=float(data["since"]),
            parent=None if data.get("parent") is None else str(data["parent"]),
        )
        return [replace(lease, allocation=_seat_of(allocation)) for allocation in data["allocations"]]
    except (KeyError, TypeError, ValueError, OverflowError):
        return []


def _seat_of(data: Mapping[str, Any]) -> Allocation:
    limit = data["limit"]
    return Allocation(str(data["uuid"]), None if limit is None else max(0, int(limit)), bool(data["shared"]))


def parse_request(entry: Entry) -> GpuRequest | None:
    """What the process of a ticket waits for; None where somebody wrote something else."""
    try:
        gpu_request = entry.data["request"]
        candidates = tuple(_candidate_of(candidate) for candidate in gpu_request["candidates"])
        return GpuRequest(entry.uid, candidates, int(gpu_request["count"]), bool(gpu_request["fixed"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _candidate_of(data: Mapping[str, Any]) -> Candidate:
    need, user_total = (None if data[key] is None else int(data[key]) for key in ("need", "user_total"))
    return Candidate(str(data["uuid"]), int(data["total"]), need, user_total, int(data["min_free"]))


def parse_ticket_number(name: str) -> int:
    """The place in the line that a ticket's name tells."""
    digits = name.split("-")[1]
    return min(int(digits), LARGEST_NUMBER) if digits.isascii() and digits.isdigit() else LARGEST_NUMBER


def read_leases() -> tuple[Lease, ...]:
    """The leases of all live processes, of all users, oldest first. Nobody waits for it; it never raises."""
    found: list[Lease] = []
    for descriptor in open_lease_directories().values():
        with contextlib.suppress(OSError, LeaseError):
            found += [lease for entry in entries(descriptor) for lease in parse_leases(entry)]
        os.close(descriptor)
    return tuple(sorted(found, key=lambda lease: lease.since))
