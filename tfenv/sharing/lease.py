"""Leases: what keeps two processes from choosing the same GPU.

A lease is a file in a directory that all users share, with an flock on it that its process keeps for its life. The
kernel drops the lock when the process ends, however it ends (SIGKILL too), so that no daemon has to clean up: a file
that can be locked belongs to nobody any more. One process at a time chooses, under a lock on the directory itself.

    lease-ID     {"pid", "script", "since", "allocations": [{"uuid", "limit", "shared"}, ...], "parent", "overhead",
                 "cgroups"}
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
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from tfenv.errors import TfenvError
from tfenv.identity import get_user_name, is_outer_root
from tfenv.policy.model import Allocation, Lease
from tfenv.sharing.request import Candidate, GpuRequest
from tfenv.values import frozen, replace

#: The directories that all users of a machine share. $TMPDIR is not among them: each user may set it differently.
_PLACES = ("/run/lock/tfgpu", "/tmp/tfgpu")  # noqa: S108 - checked before it is used, and no file in it is trusted
#: What helps where a container has leases of its own.
SHARE = "mount the host's /run/lock/tfgpu, with mode 1777, into each container"
#: Files that Docker and Podman put into each container.
_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")
_MODE = 0o1777
#: A sticky file is spared by those who clean /tmp by age (systemd-tmpfiles, XDG).
_FILE_MODE = 0o1644
_LARGEST_FILE = 1 << 16
LARGEST_NUMBER = 10**18
#: To choose takes milliseconds. A process that keeps the directory for longer was stopped, or means harm.
_LOCK_SECONDS = 30.0
#: Somebody may be making the directory right now.
_CREATION_SECONDS = 1.0


class LeaseError(TfenvError):
    """There can be no lease here: no directory, no space, or somebody keeps it locked."""


# ---- the directory


def list_lease_directories() -> tuple[str, ...]:
    """Return the paths where leases may be, the preferred one first.

    Simulated GPUs with a log are a machine of their own, with leases beside the log. Without a log their leases are
    where those of real GPUs are. Their UUIDs differ.
    """
    log = _find_simulation_log()
    return (f"{log}.leases",) if log else _PLACES


def _find_simulation_log() -> str | None:
    return os.environ.get("TFGPU_SIMULATE_LOG") if "TFGPU_SIMULATE" in os.environ else None


def _open_directory(path: str) -> int | None:
    """Return a descriptor of the directory. None: there is none that all users can share safely."""
    try:
        descriptor = _open_kept(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
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
    release_entry(descriptor)
    return None


def find_foreign_directory() -> tuple[str, str] | None:
    """Return the path of a directory of leases that an ordinary user owns, and that user's name.

    Its owner can remove everybody's leases, as `rm -rf /tmp/*` does. None: there is no such directory.
    """
    with open_lease_directories() as directories:
        for path, descriptor in directories.items():
            uid = os.fstat(descriptor).st_uid
            if uid != 0 and not is_outer_root(uid):
                return path, get_user_name(uid)
    return None


def find_private_directory() -> str | None:
    """Return the path of the directory of leases if only this container has it.

    Other containers then do not see which GPUs this one takes. None: it is shared, or nobody can tell.
    """
    if _find_simulation_log():
        return None
    with open_lease_directories() as opened:
        path = next(iter(opened), None) or _find_creatable_directory()
    if path is None:
        return None
    try:
        root, mount = _read_mount("/"), _read_mount(path if os.path.isdir(path) else os.path.dirname(path))
        is_container = root[root.index("-") + 1] == "overlay" or any(map(os.path.exists, _CONTAINER_MARKS))
    except (OSError, ValueError, StopIteration):
        return None
    # A directory that is shared is mounted into the container.
    return path if is_container and mount == root else None


def _find_creatable_directory() -> str | None:
    """Return the path of the directory that would be made. None: none can be made."""
    missing = (path for path in list_lease_directories() if not os.path.lexists(path))
    return next((path for path in missing if os.access(os.path.dirname(path), os.W_OK)), None)


def _make_directory() -> bool:
    """Make the first of the directories that can be made. Return False where all exist, fit or not."""
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
        raise LeaseError(f"cannot create a directory for leases: {problem}")
    return False


@contextlib.contextmanager
def open_lease_directories() -> Iterator[dict[str, int]]:
    """Open the directories that exist, for as long as the context lasts. Yield their descriptors by path."""
    found = {path: _open_directory(path) for path in list_lease_directories()}
    opened = {path: descriptor for path, descriptor in found.items() if descriptor is not None}
    try:
        yield opened
    finally:
        for descriptor in opened.values():
            release_entry(descriptor)


def _is_same_directory(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except OSError:
        return False


@contextlib.contextmanager
def lock_directories(sleep: Callable[[float], object] = time.sleep) -> Iterator[dict[str, int]]:
    """Lock the directories, so that only this process chooses for as long as the context lasts.

    Yield their descriptors by path. Leases are read in all of them and made in the first. There are two only where
    one came after the other was in use (root can make one that users could not).

    Args:
        sleep: Waits for so many seconds, or less, while another process chooses.

    Raises:
        LeaseError: There is no directory, or somebody keeps it locked.
    """
    began = time.monotonic()
    while True:
        with open_lease_directories() as opened:
            if not opened and _make_directory():
                continue
            if opened and _lock_all(opened, began + _LOCK_SECONDS, sleep) and _is_unchanged(opened):
                yield opened
                return
        if time.monotonic() > began + (_LOCK_SECONDS if opened else _CREATION_SECONDS):
            directories = " or ".join(list_lease_directories())
            raise LeaseError(f"cannot use {directories} as a directory for leases that users share")
        sleep(0.01)


def _lock_all(opened: Mapping[str, int], deadline: float, sleep: Callable[[float], object]) -> bool:
    pause = 0.001
    for path, descriptor in opened.items():
        while not try_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise LeaseError(f"{path} has been locked for {_LOCK_SECONDS:.0f} s by another process")
            sleep(pause)
            pause = min(2 * pause, 0.016)
    return True


def _is_unchanged(opened: Mapping[str, int]) -> bool:
    """Return whether no directory was removed and none was added until all of them were locked."""
    with open_lease_directories() as now:
        return now.keys() == opened.keys() and all(_is_same_directory(path, fd) for path, fd in opened.items())


def try_lock(descriptor: int, kind: int) -> bool:
    """Lock a file without waiting. Return False where another process has it locked, and so is alive.

    Raises:
        LeaseError: The file system has no locks.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise LeaseError(f"a lease cannot be locked here: {error}") from error
    return True


# ---- the files


@frozen
class DirectoryEntry:
    """A file of a live process in a directory of leases.

    Attributes:
        name: The file's name, which is also the id of the leases in it.
        directory: Descriptor of its directory.
        uid: Its owner.
        data: Its content, which anybody may have written.
        touched_s: Seconds since its process touched it. A process that waits does so now and then.
        file: Device and inode, as the kernel's list of locks has them.
    """

    name: str
    directory: int
    uid: int
    data: Mapping[str, Any]
    touched_s: float = 0.0
    file: tuple[int, int] = (0, 0)


def read_entries(directory: int, *, clean: bool = False) -> Iterator[DirectoryEntry]:
    """Read the files whose processes live. `clean` removes the files of this user whose processes do not."""
    device = _read_device(os.fstat(directory).st_dev, directory)
    for name in sorted(os.listdir(directory)):
        if not name.startswith(("lease-", "ticket-", ".new-")):
            continue
        try:
            descriptor = open_entry(name, directory)
        except OSError:
            continue
        try:
            entry = _read_entry(name, directory, descriptor, device)
            if entry is not None:
                yield entry
            elif clean and os.fstat(descriptor).st_uid == os.geteuid() and try_lock(descriptor, fcntl.LOCK_SH):
                os.unlink(name, dir_fd=directory)
        except OSError:
            continue
        finally:
            os.close(descriptor)


def open_entry(name: str, directory: int) -> int:
    """Open a file for reading. Follow no link and wait for nothing: anybody can put anything here."""
    return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)


def _read_entry(name: str, directory: int, descriptor: int, device: int) -> DirectoryEntry | None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or try_lock(descriptor, fcntl.LOCK_SH):
        return None
    try:
        data = json.loads(os.pread(descriptor, _LARGEST_FILE, 0))
    except (ValueError, RecursionError):
        return None
    touched_s = time.time() - status.st_mtime
    file = (device, status.st_ino)
    return DirectoryEntry(name, directory, status.st_uid, data, touched_s, file) if isinstance(data, dict) else None


_devices: dict[int, int] = {}


def _read_device(device: int, directory: int) -> int:
    """Return a file system's device as the list of locks has it. btrfs and overlayfs tell another one of their files.

    Args:
        device: What the file system tells.
        directory: Descriptor of a directory in it.
    """
    if device not in _devices:
        try:
            _devices[device] = _read_mounted_device(directory)
        except (OSError, ValueError, IndexError, StopIteration):
            _devices[device] = device
    return _devices[device]


def _read_mounted_device(directory: int) -> int:
    major, minor = _read_mount_of(directory)[2].split(":")
    return os.makedev(int(major), int(minor))


def _read_mount(path: str) -> list[str]:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return _read_mount_of(descriptor)
    finally:
        os.close(descriptor)


def _read_mount_of(descriptor: int) -> list[str]:
    """Return the fields of the mount where an open file is, as /proc/self/mountinfo has them."""
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as file:
        mount = next(line.split()[1] for line in file if line.startswith("mnt_id:"))
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        return next(fields for fields in map(str.split, file) if fields[0] == mount)


def create_entry(kind: str, content: Mapping[str, Any], directory: int, name: str | None = None) -> tuple[str, int]:
    """Create a locked file. It gets its name when it is complete, so that others never see it without its lock.

    Args:
        kind: What its name begins with.
        content: What to write.
        directory: Descriptor of the directory.
        name: Its name. None: a new one.

    Returns:
        Its name, and the descriptor that keeps it locked as long as this process lives.

    Raises:
        LeaseError: It cannot be written.
    """
    name = name or f"{kind}-{os.getpid()}-{os.urandom(4).hex()}"
    new = f".new-{name}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = _open_kept(new, flags, directory)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            _write_all(descriptor, json.dumps(content).encode())
            os.fchmod(descriptor, _FILE_MODE)
            os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            release_entry(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(new, dir_fd=directory)
            raise
    except OSError as error:
        raise LeaseError(f"a lease cannot be written: {error}") from error
    return name, descriptor


def _write_all(descriptor: int, text: bytes) -> None:
    if os.write(descriptor, text) < len(text):  # the disk became full
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


#: What this process keeps open or locked, by descriptor.
_locked: dict[int, os.stat_result] = {}
#: What its threads are about to open, and to add to that.
_opening: list[str] = []


def _open_kept(path: str, flags: int, directory: int | None = None) -> int:
    """Open a file that forked children close."""
    _opening.append(path)
    try:
        descriptor = os.open(path, flags, 0o600, dir_fd=directory)
        _locked[descriptor] = os.fstat(descriptor)
    finally:
        _opening.remove(path)
    return descriptor


def release_entry(descriptor: int) -> None:
    """Unlock and close a file of this process, unless the program closed it and the number is another file's by now."""
    if _is_still_open(descriptor, _locked.pop(descriptor, None)):
        # A child that was forked meanwhile may have a copy, and would keep the lock with it.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _is_still_open(descriptor: int, opened: os.stat_result | None) -> bool:
    """Return whether a descriptor is still that of the file that was opened."""
    try:
        return opened is not None and os.path.samestat(opened, os.fstat(descriptor))
    except OSError:
        return False


def _close_in_child() -> None:
    """Leave leases and directories to the parent in a forked child, so that their locks end with the parent.

    To close a child's copy does not unlock the file. To keep it would hold the parent's GPU as long as the child lives.
    """
    for descriptor, opened in tuple(_locked.items()):
        if _is_still_open(descriptor, opened):
            os.close(descriptor)
    _locked.clear()
    if _opening:  # by another thread, which the child does not have
        _opening.clear()
        with contextlib.suppress(OSError):
            _close_unknown()


def _close_unknown() -> None:
    """Close what is open of the directories of leases, where nobody knows which descriptors these are."""
    places = [os.path.realpath(path) for path in list_lease_directories()]
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{number}")
            if any(path == place or path.startswith(f"{place}/") for place in places):
                os.close(int(number))


os.register_at_fork(after_in_child=_close_in_child)


def is_intact(name: str) -> bool:
    """Return whether a lease of this process is still there for others to see, and locked.

    A program may close descriptors that it did not open, as daemons do. And whoever owns the directory may remove the
    file.
    """
    with open_lease_directories() as directories:
        for directory in directories.values():
            with contextlib.suppress(OSError):
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                held = [fd for fd, opened in tuple(_locked.items()) if os.path.samestat(status, opened)]
                return any(_is_still_open(descriptor, status) for descriptor in held)
    return False


# ---- who holds them


def read_lock_holders() -> dict[tuple[int, int], int] | None:
    """Return the pid of each lock's holder, by device and inode, as the kernel counts for this process.

    A holder that this process's PID namespace does not have is missing, as in another container.

    Returns:
        None where the kernel does not tell.
    """
    holders: dict[tuple[int, int], int] = {}
    try:
        with open("/proc/locks", encoding="ascii") as file:
            for line in file:
                fields = line.split()
                if fields[1:2] != ["FLOCK"] or fields[3] != "WRITE" or int(fields[4]) <= 0:
                    continue
                major, minor, inode = fields[5].split(":")
                holders[os.makedev(int(major, 16), int(minor, 16)), int(inode)] = int(fields[4])
    except (OSError, ValueError, IndexError):
        return None
    return holders


def _find_user(pid: int, owner: int) -> int:
    """Return the user of a lock's holder. It counts for the total of whoever holds it, not of the file's owner.

    Anybody can lock the file of a process that just ended, and so have others wait. A process may change its user.

    Args:
        pid: The holder. 0: it is not of this PID namespace.
        owner: The user whose file it is, for a holder that cannot be seen.
    """
    try:
        if pid == 0 or os.stat(f"/proc/{pid}").st_uid == owner:
            return owner
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            return next(int(line.split()[2]) for line in file if line.startswith("Uid:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return owner


def read_program(pid: int) -> str | None:
    """Return the kernel's name of a process. None: it cannot be seen."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


# ---- their content

#: No GPU has more, and no machine has more of them. Whoever writes more wants to break the reader.
_MOST_BYTES = 1 << 50
_MOST_GPUS = 1 << 16
#: Seconds since 1970, in the year 2514. Dates can be computed up to there.
_LATEST = 1 << 34

#: Few users have many leases, and a directory service may be slow to name them.
_get_user_name = cache(get_user_name)


def parse_leases(entry: DirectoryEntry, holders: Mapping[tuple[int, int], int] | None = None) -> list[Lease]:
    """Return one Lease per GPU, and none where somebody wrote something else.

    Args:
        entry: The file.
        holders: As `read_lock_holders` tells. None: whatever the file says.
    """
    try:
        data = entry.data
        written = int(_read_number(data["pid"], 1 << 31))
        pid = written if holders is None else holders.get(entry.file, 0)
        uid = entry.uid if holders is None else _find_user(pid, entry.uid)
        lease = Lease(
            id=entry.name,
            allocation=Allocation(""),
            uid=uid,
            user=_get_user_name(uid),
            pid=pid,
            script=None if data.get("script") is None else str(data["script"]),
            since=float(_read_number(data["since"], _LATEST)),
            parent=None if data.get("parent") is None else str(data["parent"]),
            overhead=int(_read_number(data.get("overhead", 0), _MOST_BYTES)),
            cgroups=tuple(int(_read_number(number, 1 << 64)) for number in data.get("cgroups", ())),
        )
        return [replace(lease, allocation=_parse_allocation(allocation)) for allocation in data["allocations"]]
    except (KeyError, TypeError, ValueError, OverflowError):
        return []


def _parse_allocation(data: Mapping[str, Any]) -> Allocation:
    return Allocation(str(data["uuid"]), _read_bytes(data["limit"]), bool(data["shared"]))


def _read_number(value: object, highest: int) -> float:
    """Return a number that anybody may have written. It is finite, and neither negative nor above `highest`.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= highest:
        raise ValueError(value)
    return value


def _read_bytes(value: object) -> int | None:
    return None if value is None else int(_read_number(value, _MOST_BYTES))


def parse_request(entry: DirectoryEntry) -> GpuRequest | None:
    """Return what the process of a ticket waits for. None: somebody wrote something else."""
    try:
        gpu_request = entry.data["request"]
        candidates = tuple(_parse_candidate(candidate) for candidate in gpu_request["candidates"])
        count = int(_read_number(gpu_request["count"], _MOST_GPUS))
        return GpuRequest(entry.uid, candidates, count, bool(gpu_request["fixed"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _parse_candidate(data: Mapping[str, Any]) -> Candidate:
    need, user_total = _read_bytes(data["need"]), _read_bytes(data["user_total"])
    total, min_free = (int(_read_number(data[key], _MOST_BYTES)) for key in ("total", "min_free"))
    overhead, wall = _read_bytes(data.get("overhead")) or 0, _read_bytes(data.get("wall"))
    cgroup = int(_read_number(data.get("cgroup", 0), 1 << 64))
    return Candidate(str(data["uuid"]), total, need, user_total, min_free, overhead, wall, cgroup)


def parse_ticket_number(name: str) -> int:
    """Return the place in the queue that a ticket's name tells."""
    digits = name.split("-")[1]
    return min(int(digits), LARGEST_NUMBER) if digits.isascii() and digits.isdigit() else LARGEST_NUMBER


def read_leases() -> tuple[Lease, ...]:
    """Return the leases of all live processes of all users, oldest first. Lock nothing and never raise."""
    found: list[Lease] = []
    holders = read_lock_holders()
    with open_lease_directories() as directories:
        for descriptor in directories.values():
            with contextlib.suppress(OSError, LeaseError):
                found += [lease for entry in read_entries(descriptor) for lease in parse_leases(entry, holders)]
    return tuple(sorted(found, key=lambda lease: lease.since))
