"""Whether there may be a policy file, told without importing anything but `errno`, `os`, `pwd` and `sys`.

Most programs that import a framework have none. They must not pay for what reads, merges and applies one. `discover`
finds nothing where this says no. Where this says yes, `discover` may still find nothing.
"""

import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import FrameType

    #: What tells one file from another, whatever its names: device and inode.
    Identity = tuple[int, int]

FILE_NAME = "tfgpu.toml"
PYPROJECT = "pyproject.toml"
#: Literal: no environment variable moves the administrator's policy.
MACHINE_ROOT = "/etc/tfgpu"
#: Directories that the walk looks into, at most.
MOST_LEVELS = 32
#: Why a directory cannot be looked at although its file system answers: it is gone, locked, or its path too long.
_PASSED_OVER = (errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


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
    if start.get("TFGPU_CONFIG") or start.get("TFGPU_SITE_CONFIG") or start.get("TFGPU_RUN"):
        return True
    cwd = start.get("cwd")
    folders = [*([] if cwd is None else [cwd]), *list_program_folders(start, at_import=True)]
    return any(_may_have_policy(folder) for bottom in folders for folder in list_upward(bottom, home))


def list_program_folders(start: "Mapping[str, str | None]", *, at_import: bool) -> "list[str]":
    """List where a project's file is looked for if there is none above the working directory of the start.

    Args:
        start: What the process was when it started, as `finder.START`.
        at_import: A framework is being imported. Its importer counts, too: a tool may have started the program.

    Returns:
        The script's folder, those of the links that led to the working directory, and at an import the working
        directory now, the folder of the main module, and that of the outermost caller that nobody installed.
    """
    cwd, script = start.get("cwd"), start.get("script") or "-"
    is_file = script not in ("-c", "-m", "-") and (cwd is not None or script.startswith("/"))
    scripts = [os.path.abspath(os.path.join(cwd or "/", script))] if is_file else []
    folders = [folder for path in scripts for folder in _list_folders_of(path)]
    if cwd is not None:
        folders += _list_link_folders(cwd)
    if at_import:
        folders += _list_importer_folders(scripts)
    return list(dict.fromkeys(folders))


def _list_folders_of(path: str) -> "list[str]":
    """List the folder of the file that a path leads to, as Python does for sys.path, and that of the link to it."""
    return [os.path.dirname(os.path.realpath(path)), os.path.dirname(path)]


def _list_link_folders(cwd: str) -> "list[str]":
    """List the folders of the symbolic links in $PWD, the nearest first, if it names the working directory."""
    path = os.environ.get("PWD") or ""
    found: list[str] = []
    if path in ("", cwd) or not path.startswith("/"):
        return []
    identity = find_identity(path)
    if identity is None or identity != find_identity(cwd):
        return []
    while path != "/":
        if os.path.islink(path):
            found.append(os.path.dirname(path))
        path = os.path.dirname(path)
    return found


def _list_importer_folders(scripts: "Sequence[str]") -> "list[str]":
    """List the working directory now, and the folders of the main module and of the importer."""
    try:
        folders = [os.getcwd()]
    except OSError:
        folders = []
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    for file in (main, _find_importer(scripts)):
        if isinstance(file, str) and os.path.isfile(file):
            folders += _list_folders_of(os.path.abspath(file))
    return folders


def _find_importer(scripts: "Sequence[str]") -> "str | None":
    """Return the file of the outermost caller that is neither installed, nor Python's own, nor the script.

    It is what a tool runs that was started itself: a profiler's program, a test runner's module.
    """
    ours = (os.path.dirname(os.__file__) + "/", os.path.dirname(os.path.dirname(__file__)) + "/", "<")
    found: str | None = None
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 - what tracebacks and loggers use
    while frame is not None:
        file = frame.f_code.co_filename
        installed = "/site-packages/" in file or "/dist-packages/" in file or file.startswith(ours)
        if not installed and os.path.abspath(file) not in scripts:
            found = file
        frame = frame.f_back
    return found


def is_isolated() -> bool:
    """Return whether Python was told to heed neither the working directory nor variables (`-I`, `-E`).

    A frozen program has the flags from whoever froze it, and nobody meant the policy by them.
    """
    return bool(sys.flags.isolated or sys.flags.ignore_environment) and not hasattr(sys, "frozen")


def list_upward(bottom: str, home: "str | None") -> "Iterator[str]":
    """List a directory and those above it, to the home directory, the file system's top or `MOST_LEVELS`.

    A directory on another file system is not even looked into: it may be an automount point that would ask a server
    for each name. One that is gone or locked is left out, and those above it are listed. Where a file system does not
    answer, the list ends.
    """
    last = None if home is None else find_identity(home)
    file_system: int | None = None
    problem = 0
    directory = bottom
    for _ in range(MOST_LEVELS):
        below, (identity, problem) = problem, _look_at(directory)
        if identity is not None:
            if file_system not in (None, identity[0]) or (below == errno.EACCES and os.access(directory, os.X_OK)):
                return  # one that lets us in did not lock what is below: a file system of its own did
            yield directory
            file_system = identity[0]
        elif problem not in _PASSED_OVER:
            return
        parent = os.path.dirname(directory)
        if directory in (home, parent) or (identity is not None and identity == last):
            return
        directory = parent


def _look_at(path: str) -> "tuple[Identity | None, int]":
    """Return what a path leads to. None if that cannot be told, and the number of the error."""
    try:
        status = os.stat(path)
    except OSError as error:
        return None, error.errno or 0
    except ValueError:
        return None, 0
    return (status.st_dev, status.st_ino), 0


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
    return _look_at(path)[0]


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
