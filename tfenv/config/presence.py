"""Whether there may be a policy file, told without importing anything but `errno`, `os`, `pwd` and `sys`.

Most programs that import a framework have none. They must not pay for what reads, merges and applies one. `discover`
finds nothing where this says no. Where this says yes, `discover` may still find nothing.
"""

import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    #: What tells one file from another, whatever its names: device and inode.
    Identity = tuple[int, int]

FILE_NAME = "tfgpu.toml"
PYPROJECT = "pyproject.toml"
#: Literal: no environment variable moves the administrator's policy.
MACHINE_ROOT = "/etc/tfgpu"
#: Directories that the walk looks into, at most.
MOST_LEVELS = 32


def may_find_policy(start: "Mapping[str, str | None]") -> bool:
    """Return whether a policy file may speak for this process.

    Args:
        start: What the process was when it started, as `finder.START`.
    """
    if may_exist(MACHINE_ROOT):
        return True
    if start.get("SUDO_UID") is not None or os.getuid() != os.geteuid():
        return False
    home = _find_home()
    config_home = start.get("XDG_CONFIG_HOME") or ""
    if not config_home.startswith("/"):
        config_home = f"{home}/.config" if home else "/nonexistent"
    if may_exist(os.path.join(config_home, "tfgpu")):
        return True
    if is_isolated():
        return False
    if start.get("TFGPU_CONFIG") or start.get("TFGPU_RUN"):
        return True
    cwd, script = start.get("cwd"), start.get("script") or "-"
    folders = [] if cwd is None else [cwd]
    if script not in ("-c", "-m", "-"):
        folders.append(os.path.dirname(os.path.normpath(os.path.join(cwd or "/", script))))
    return any(_may_have_policy(folder) for bottom in folders for folder in list_upward(bottom, home))


def is_isolated() -> bool:
    """Return whether Python was told to heed neither the working directory nor variables (`-I`, `-E`).

    A frozen program has the flags from whoever froze it, and nobody meant the policy by them.
    """
    return bool(sys.flags.isolated or sys.flags.ignore_environment) and not hasattr(sys, "frozen")


def list_upward(bottom: str, home: "str | None") -> "Iterator[str]":
    """List a directory and those above it, to the home directory, the file system's top or `MOST_LEVELS`.

    A directory on another file system is not even looked into: it may be an automount point that would ask a server
    for each name.
    """
    last = None if home is None else find_identity(home)
    file_system: int | None = None
    directory = bottom
    for _ in range(MOST_LEVELS):
        identity = find_identity(directory)
        if identity is None or file_system not in (None, identity[0]):
            return
        yield directory
        parent = os.path.dirname(directory)
        if identity == last or parent == directory:
            return
        file_system, directory = identity[0], parent


def may_exist(path: str) -> bool:
    """Return whether a path is there, or may not be looked at. A locked folder must be a finding, not silence."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
    except ValueError:
        return False
    return True


def find_identity(path: str) -> "Identity | None":
    """Return what a path leads to. None if it leads nowhere, or may not be looked at."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _find_home() -> "str | None":
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_dir or None
    except KeyError:
        return None


def _may_have_policy(folder: str) -> bool:
    """Return whether a folder has a tfgpu.toml, or a pyproject.toml that mentions it."""
    pyproject = os.path.join(folder, PYPROJECT)
    if may_exist(os.path.join(folder, FILE_NAME)):
        return True
    if not may_exist(pyproject):
        return False
    try:
        descriptor = os.open(pyproject, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return False  # `discover` takes one that cannot be read for none, too
    try:
        return b"tfgpu" in os.read(descriptor, 1 << 19)
    except OSError:
        return False
    finally:
        os.close(descriptor)
