"""Who somebody is on this machine: from the passwd and group databases, never from the environment."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar, cast

from tfenv.policy.model import Subject
from tfenv.values import frozen

_Result = TypeVar("_Result")

#: The largest uid; one more is the kernel's "leave it as it is".
_LARGEST_ID = (1 << 32) - 2
#: Longer numbers are no ids; Python refuses to convert very long ones at all.
_MOST_DIGITS = 10
#: As whose member somebody without an entry counts: Linux's overflow group, which owns nothing.
_NO_GROUP = 65534


@frozen
class UserAccount:
    """A user of this machine.

    Attributes:
        uid: User id.
        gid: The primary group's id.
        groups: Ids of all groups, the primary first. () for a uid without an entry.
        home: The home directory. None without an entry.
    """

    uid: int
    gid: int = _NO_GROUP
    groups: tuple[int, ...] = ()
    home: str | None = None


def find_user(name: str) -> int | None:
    """Return the uid of a login name, or of "uid:1234" with or without an entry. None if there is no such user."""
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError):  # ValueError: a name that cannot be encoded, or holds a NUL
        return _parse_id("uid:", name)


def find_group(name: str) -> int | None:
    """Return the gid of a group's name, or of "gid:1234" with or without an entry. None if there is no such group."""
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        return _parse_id("gid:", name)


def _parse_id(prefix: str, name: str) -> int | None:
    digits = name.removeprefix(prefix)
    if digits == name or not (digits.isascii() and digits.isdigit() and len(digits) <= _MOST_DIGITS):
        return None
    return int(digits) if int(digits) <= _LARGEST_ID else None


def list_members(group: str) -> Iterator[str]:
    """List the login names of a group's members, as far as the databases list them: a directory service may not."""
    try:
        entry = grp.getgrnam(group)
    except (KeyError, ValueError):
        return
    yield from entry.gr_mem
    # Last, for it lists all users; callers mostly need one member.
    yield from (user.pw_name for user in pwd.getpwall() if user.pw_gid == entry.gr_gid)


def find_subject(user: str) -> Subject | None:
    """Return the subject of a new login of somebody. None if there is no such user."""
    uid = find_user(user)
    return None if uid is None else identify_login(uid)


def identify_login(uid: int) -> Subject:
    """Return the subject of a new login of a uid."""
    return identify(uid, find_account(uid).groups)


def find_account(uid: int) -> UserAccount:
    """Return what a new login of the user would have."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return UserAccount(uid)
    groups = dict.fromkeys((entry.pw_gid, *os.getgrouplist(entry.pw_name, entry.pw_gid)))
    return UserAccount(uid, entry.pw_gid, tuple(groups), entry.pw_dir or None)


def identify(uid: int, groups: Iterable[int] | None = None) -> Subject:
    """Return the subject of a uid. What has no entry is called "uid:1234" and "gid:1234".

    Args:
        uid: Effective user id.
        groups: Group ids. None: those of this process. Inside of a user namespace that lives in the machine's own /etc,
            the subject is then whoever it is outside.
    """
    if groups is None and (outer := find_outer_uid(uid)) != uid:
        return identify_login(outer)
    ids = [os.getegid(), *os.getgroups()] if groups is None else groups
    return Subject(user=get_user_name(uid), uid=uid, groups=tuple(_get_group_name(gid) for gid in dict.fromkeys(ids)))


def get_user_name(uid: int) -> str:
    """Return the login name of a uid. "uid:1234" without a passwd entry."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid:{uid}"


def _get_group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"gid:{gid}"


def find_home(uid: int) -> str | None:
    """Return the home directory of the passwd entry. None without one. $HOME is not believed."""
    try:
        return pwd.getpwuid(uid).pw_dir or None
    except KeyError:
        return None


# ---- user namespaces


@frozen
class IdMapping:
    """One line of /proc/self/uid_map: a range of ids of this user namespace, and what they are outside of it."""

    inside: int
    outside: int
    count: int


def read_uid_map(path: str = "/proc/self/uid_map") -> tuple[IdMapping, ...] | None:
    """Return the uids of this process's user namespace. () where it maps none. None: the kernel does not say."""
    try:
        with open(path, encoding="ascii") as file:
            return tuple(IdMapping(*map(int, line.split())) for line in file)
    except (OSError, ValueError, TypeError):
        return None


def is_outer_root(uid: int) -> bool:
    """Return whether a file's owner may be the root outside of this user namespace (bubblewrap, `unshare -r`).

    The kernel shows one id for all owners that the namespace does not map. Among them is root, unless it is mapped.
    """
    mapping = read_uid_map()
    if mapping is None or any(line.outside == 0 for line in mapping):
        return False
    try:
        with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
            return uid == int(file.read())
    except (OSError, ValueError):
        return False


def find_outer_uid(uid: int) -> int:
    """Return what a uid of this process is to the machine, whose /etc this is. Elsewhere it is itself.

    In a namespace of its own a process may be root by name. Its ceilings are those of the user who made it.
    """
    try:
        owner = os.stat("/etc").st_uid
    except OSError:
        return uid
    if not is_outer_root(owner):
        return uid
    found = (line.outside + uid - line.inside for line in read_uid_map() or () if 0 <= uid - line.inside < line.count)
    return next(found, uid)


def suggest_name(name: str, names: Iterable[str]) -> str | None:
    """Return the one of the names that was probably meant. None if none is close to it."""
    import difflib

    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


# ---- being somebody else for a moment


def call_as(account: UserAccount, function: Callable[[], _Result]) -> _Result:
    """Call a function in a child process that opens files with another user's permissions, and return its result.

    Only root can. The child is a fork and stays root by its real uid, so that the user can neither stop it nor
    trace it: what it answers is its own.

    Args:
        account: Whose permissions.
        function: Its result must be picklable. It should not import anything: the user may not be able to read it.

    Raises:
        OSError: This process may not become somebody else.
        Exception: Whatever the function raises.
    """
    import pickle

    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        _answer_parent(account, function, writable)
    os.close(writable)
    with open(readable, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        raise OSError("the child that became the user died")
    succeeded, result = pickle.loads(answer)  # noqa: S301 - from the process that this one forked
    if not succeeded:
        raise cast("Exception", result)
    return cast("_Result", result)


def _answer_parent(account: UserAccount, function: Callable[[], object], writable: int) -> None:
    """Do the child's part. Never returns, for what comes after the fork is the parent's."""
    import pickle

    try:
        try:
            _become(account)
            answer = pickle.dumps((True, function()))
        except Exception as error:  # noqa: BLE001 - the parent raises it
            answer = pickle.dumps((False, error))
        with open(writable, "wb") as pipe:
            pipe.write(answer)
    finally:
        os._exit(0)


def _become(account: UserAccount) -> None:
    os.setgroups(account.groups)
    os.setegid(account.gid)
    os.seteuid(account.uid)


def is_plain_name(name: str) -> bool:
    """Return whether a file of this user's or group's name is in its folder, and never outside of it."""
    return bool(name) and not name.startswith(".") and "/" not in name and "\0" not in name
