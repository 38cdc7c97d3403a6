"""Covers every environment of an interpreter: a marked block in the sitecustomize that wins there.

Nothing is installed into those environments. The block loads the hook from tfenv's own environment, and is silent
when that is gone. Debian's and Ubuntu's Python read /etc/python3.X/sitecustomize.py. Others have none, and get one
beside the standard library, which every virtual environment made from them reads, too.
"""

from __future__ import annotations

import difflib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from tfenv.errors import TfenvError
from tfenv.files import replace_file
from tfenv.values import frozen

_BEGIN = "# >>> tfenv >>> written by `tfgpu install --system`; `tfgpu uninstall --system` removes it\n"
_END = "# <<< tfenv <<<\n"
_BLOCK = """\
try:
    import sys
    if "_tfenv_boot" not in sys.modules:
        import importlib.machinery
        _tfenv = type(sys)("_tfenv_boot")
        _tfenv.__file__ = {boot!r}
        importlib.machinery.SourceFileLoader("_tfenv_boot", _tfenv.__file__).exec_module(_tfenv)
        sys.modules["_tfenv_boot"] = _tfenv
        _tfenv.START.update(folder={folder!r}, interpreter={interpreter!r})
except (FileNotFoundError, NotADirectoryError):
    pass  # tfenv is gone: Python starts as if it had never been there
except (Exception, SystemExit) as _tfenv_error:
    class _TfenvUnloadable:
        text = "tfgpu: tfenv cannot be loaded, no policy is applied: " + ascii(_tfenv_error) + " [internal-error]\\n"
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            if name in ("tensorflow", "jax", "torch") and cls.text and sys.stderr:
                sys.stderr.write(cls.text)
                cls.text = ""
    sys.meta_path.insert(0, _TfenvUnloadable)
"""

#: Asked of the interpreter itself, isolated from the caller's environment.
_PROBE = (
    "import json, sys, sysconfig; found = sys.modules.get('sitecustomize'); "
    "print(json.dumps([getattr(sys, '_base_executable', None) or sys.executable, "
    "getattr(found, '__file__', None), sysconfig.get_path('stdlib')]))"
)


class InstallError(TfenvError):
    """The interpreter cannot be covered. The text says why, and what would help."""


class NotAnInterpreterError(InstallError):
    """The path is not that of a Python interpreter."""


@frozen
class BlockChange:
    """What is to happen to one file of the machine.

    Attributes:
        path: The file.
        before: Its text. None: there is no such file.
        after: The text it will have. None: it is removed.
    """

    path: str
    before: str | None
    after: str | None

    @property
    def changes_nothing(self) -> bool:
        """Whether the file is as it should be already."""
        return self.before == self.after


# ---- planning


def plan_install(python: str | None = None) -> BlockChange:
    """Plan what it takes to cover an interpreter, and all environments made from it.

    Args:
        python: The interpreter, or one of an environment made from it. None: this one's.

    Raises:
        NotAnInterpreterError: It is not a Python interpreter.
        InstallError: Others than root can change the files of tfenv, or only root can read them.
    """
    path, before = _find_sitecustomize(python or sys.executable)
    require_roots_own(find_own_folder(), "every user's Python would run")
    _require_readable()
    block = _BLOCK.format(boot=_find_finder_file(), folder=find_own_folder(), interpreter=sys.executable)
    rest = _remove_block(before or "")
    return BlockChange(path, before, f"{rest}{_BEGIN}{block}{_END}")


def plan_uninstall(python: str | None = None) -> BlockChange:
    """Plan what it takes to remove exactly our block again. A file that holds nothing else goes, too.

    Args:
        python: As for `plan_install`.

    Raises:
        NotAnInterpreterError: It is not a Python interpreter.
    """
    path, before = _find_sitecustomize(python or sys.executable)
    if before is None or _BEGIN not in before:
        return BlockChange(path, before, before)
    return BlockChange(path, before, _remove_block(before) or None)


def _find_sitecustomize(python: str) -> tuple[str, str | None]:
    """Return the path of the sitecustomize that wins for the interpreter itself, and its text."""
    base, _, _ = _ask_interpreter(python)
    _, found, stdlib = _ask_interpreter(base)
    path = os.path.realpath(found) if found is not None else os.path.join(stdlib, "sitecustomize.py")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return path, file.read()
    except FileNotFoundError:
        return path, None


def _ask_interpreter(python: str) -> tuple[str, str | None, str]:
    try:
        done = subprocess.run([python, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=60, check=True)
        base, found, stdlib = json.loads(done.stdout)
    except OSError as error:
        raise NotAnInterpreterError(f"cannot run {python} as a Python interpreter: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise NotAnInterpreterError(f"cannot run {python} as a Python interpreter: no answer in a minute") from None
    except (subprocess.CalledProcessError, ValueError):
        raise NotAnInterpreterError(f"cannot run {python} as a Python interpreter: it is another program") from None
    return base, found, stdlib


def _remove_block(text: str) -> str:
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    return before + after if begin and end else text


def find_own_folder() -> str:
    """Return the folder that holds the package tfenv."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _find_finder_file() -> str:
    spec = find_spec("_tfenv_boot")
    if spec is not None and spec.origin is not None:
        return os.path.abspath(spec.origin)
    return os.path.join(find_own_folder(), "tfenv", "runtime", "finder.py")


def require_roots_own(folder: str, runs: str) -> None:
    """Refuse a folder that others than root can change.

    Args:
        folder: Code that many will run.
        runs: Who would run it, for the message: "every user's Python would run".

    Raises:
        InstallError: Others can change it.
    """
    path = os.path.realpath(folder)
    while True:
        status = os.stat(path)
        writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if status.st_uid != 0 or writable:
            commands = [f"`chmod go-w {path}`"] * bool(writable) + [f"`chown root {path}`"] * bool(status.st_uid)
            # A sticky directory, such as /tmp, is meant to be everybody's.
            mend = "" if status.st_mode & stat.S_ISVTX else f"run {' and '.join(commands)}, or "
            raise InstallError(
                f"users other than root can change {path}, and {runs} the code in {folder}; "
                f"{mend}install tfenv into a directory that only root can write to, such as /opt/tfenv"
            )
        if path == "/":
            return
        path = os.path.dirname(path)


def _require_readable() -> None:
    """Refuse where the block would cover nobody but root: other users' Python could not load the hook."""
    closed = find_closed_path()
    if closed is not None:
        is_own = f"{closed}/".startswith(f"{sys.prefix}/")
        right = (
            f"run `chmod -R go+rX {closed}`"
            if is_own
            else "install tfenv where everybody can read it, for example in /opt/tfenv"
        )
        raise InstallError(f"other users cannot read {closed}, so the policy would apply only to root; {right}")


def find_closed_path(paths: Sequence[str] = ()) -> str | None:
    """Find what keeps other users from running what the block loads, as where it was installed under umask 077.

    Args:
        paths: What they need. Empty: the hook, the package, its dependencies and the interpreter.

    Returns:
        The topmost file or folder that they may not read or enter. None: they may use all of it.
    """
    dependency = find_spec("tomli")
    needed = paths or (
        _find_finder_file(),
        os.path.abspath(__file__),
        sys.executable,
        *([dependency.origin] if dependency is not None and dependency.origin else ()),
    )
    return next((closed for path in needed for closed in _list_closed(path)), None)


def _list_closed(path: str) -> Iterator[str]:
    """List what of a file's path is closed to others, as it is written and as it leads, from the top down."""
    for way in dict.fromkeys((path, os.path.realpath(path))):
        steps = [way]
        while steps[0] != "/":
            steps.insert(0, os.path.dirname(steps[0]))
        for step in steps:
            needed = stat.S_IXOTH if os.path.isdir(step) else stat.S_IROTH
            if not os.stat(step).st_mode & needed:
                yield step


# ---- doing


def write_change(change: BlockChange) -> None:
    """Write or remove the file in one step: a Python that starts meanwhile reads the old text or the new one.

    Raises:
        InstallError: The file cannot be written.
    """
    if change.changes_nothing:
        return
    try:
        if change.after is None:
            os.remove(change.path)
        else:
            os.makedirs(os.path.dirname(change.path), exist_ok=True)
            mode = stat.S_IMODE(os.stat(change.path).st_mode) if os.path.exists(change.path) else 0o644
            replace_file(change.path, change.after, mode)
    except OSError as error:
        raise InstallError(f"{change.path} cannot be changed: {error.strerror}; run this as root") from None


def format_difference(change: BlockChange) -> str:
    """Return a unified diff of what will happen. "" means that nothing will."""
    before, after = (change.before or "").splitlines(keepends=True), (change.after or "").splitlines(keepends=True)
    names = change.path if change.before is not None else "/dev/null", change.path if change.after else "/dev/null"
    return "".join(difflib.unified_diff(before, after, *names))
