"""Whether there may be a policy file, told without importing anything but `os`, `pwd` and `sys`.

Most programs that import a framework have none. They must not pay for what reads, merges and applies one. `discover`
finds nothing where this says no. Where this says yes, `discover` may still find nothing.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

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
    if _may_exist(MACHINE_ROOT):
        return True
    if start.get("SUDO_UID") is not None or os.getuid() != os.geteuid():
        return False
    if _may_exist(os.path.join(_find_config_home(start), "tfgpu")):
        return True
    if sys.flags.isolated or sys.flags.ignore_environment:
        return False
    if start.get("TFGPU_CONFIG") or start.get("TFGPU_RUN"):
        return True
    cwd, script = start.get("cwd"), start.get("script") or ""
    script_folder = os.path.dirname(os.path.join(cwd or "/", script))
    return any(map(_may_have_policy, dict.fromkeys((*_list_upward(cwd), *_list_upward(script_folder)))))


def _find_config_home(start: "Mapping[str, str | None]") -> str:
    config_home = start.get("XDG_CONFIG_HOME") or ""
    if config_home.startswith("/"):
        return config_home
    import pwd

    try:
        return os.path.join(pwd.getpwuid(os.geteuid()).pw_dir, ".config")
    except KeyError:
        return "/nonexistent"


def _list_upward(folder: "str | None") -> "list[str]":
    """Return the folder and those above it, at most 32. More than `discover` looks into is no fault."""
    folders: list[str] = []
    while folder and len(folders) < MOST_LEVELS:
        folders.append(folder)
        parent = os.path.dirname(folder)
        folder = None if parent == folder else parent
    return folders


def _may_have_policy(folder: str) -> bool:
    """Return whether a folder has a tfgpu.toml, or a pyproject.toml that mentions it."""
    pyproject = os.path.join(folder, PYPROJECT)
    if _may_exist(os.path.join(folder, FILE_NAME)):
        return True
    if not _may_exist(pyproject):
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


def _may_exist(path: str) -> bool:
    """Return whether a path is there, or may not be looked at."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except (NotADirectoryError, ValueError):
        return False
    except OSError:
        return True
    return True
