"""Has the limits for cgroups set at login: by a unit that systemd starts for a user, or by PAM where there is none.

Both run `tfgpu wall apply` as root, after the user's slice is made and before a program of theirs runs. Nobody waits
longer than a few seconds for it, and its failure keeps nobody from logging in.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from contextlib import suppress

from tfenv.deploy.install import BlockChange, InstallError, find_own_folder, require_roots_own, write_change

_BEGIN = "# >>> tfenv wall >>> written by `tfgpu wall install`; `tfgpu wall uninstall` removes it\n"
_END = "# <<< tfenv wall <<<\n"

#: systemd starts it in the slice of a user, before their first session. For the session of a cron job it starts no
#: user@.service. The first that exists counts.
_USER_UNITS = tuple(
    f"{folder}/user-runtime-dir@.service" for folder in ("/etc/systemd/system", "/usr/lib/systemd/system")
)
_DROP_IN = "/etc/systemd/system/user-runtime-dir@.service.d/tfgpu-wall.conf"
#: PAM's sessions. The first that exists gets the line.
_PAM_FILES = ("/etc/pam.d/common-session", "/etc/pam.d/sshd")

#: "-": a failure does not matter. "+": as root, with no restriction of the unit.
_UNIT = "[Service]\nExecStartPre=-+{apply} --user %i\n"
#: PAM replaces no variables in its lines, so a shell does. It never fails: of a line that stands alone, "optional" or
#: not, the failure would count.
_PAM_LINE = 'session optional pam_exec.so quiet type=open_session /bin/sh -c [{apply} --user="$PAM_USER" || :]\n'
#: Seconds after which a driver that does not answer is left alone.
_LONGEST = 10
#: What needs no quotes in a unit, in a line of PAM and in a shell.
_PLAIN_PATH = re.compile(r"[\w./+-]+", re.ASCII)


def plan_login_install() -> BlockChange:
    """Plan what it takes to set limits at login.

    Raises:
        InstallError: There is no place for it, or others than root could change what root would run.
    """
    require_roots_own(find_own_folder(), "root would run")
    require_roots_own(os.path.dirname(sys.executable), "root would run")
    path, text = _choose_place(_make_command())
    before = _read(path)
    rest = _remove_block(path, before or "")
    separator = "" if not rest or rest.endswith("\n") else "\n"
    return BlockChange(path, before, f"{rest}{separator}{_BEGIN}{text}{_END}")


def plan_login_uninstall() -> tuple[BlockChange, ...]:
    """Plan what it takes to remove exactly our blocks again. A drop-in that holds nothing else goes, too.

    Returns:
        (): there is no block.

    Raises:
        InstallError: A file with a block cannot be understood.
    """
    changes = []
    for path in (_DROP_IN, *_PAM_FILES):
        before = _read(path)
        if before is not None and _BEGIN in before:
            # A file of PAM stays, even if it is empty: others include it, and without it nobody could log in.
            rest = _remove_block(path, before)
            changes.append(BlockChange(path, before, None if not rest and path == _DROP_IN else rest))
    return tuple(changes)


def _choose_place(apply: str) -> tuple[str, str]:
    """Return the file that gets the block, and what is in the block."""
    if _has_user_unit():
        return _DROP_IN, _UNIT.format(apply=apply)
    for path in _PAM_FILES:
        if os.path.islink(path):
            raise InstallError(f"{path} is a link, so another program writes it; have that program add a line for PAM")
        if os.path.exists(path):
            return path, _PAM_LINE.format(apply=apply)
    raise InstallError(
        f"there is neither {_USER_UNITS[-1]} nor {_PAM_FILES[0]}; run `tfgpu wall apply --user NAME` where users log in"
    )


def _has_user_unit() -> bool:
    """Return whether systemd starts a unit for a user. One that is masked is a link to /dev/null."""
    unit = next((path for path in _USER_UNITS if os.path.lexists(path)), None)
    return unit is not None and os.path.realpath(unit) != os.devnull


def _make_command() -> str:
    """Return what sets the limits of a user who is named after it."""
    timeout = shutil.which("timeout")
    if timeout is None:
        raise InstallError("there is no program `timeout`; install coreutils")
    for path in (timeout, sys.executable):
        if _PLAIN_PATH.fullmatch(path) is None:
            raise InstallError(f'the path "{path}" has characters that need quotes; install tfenv at a plain path')
    return f"{timeout} --verbose --kill-after=2 {_LONGEST} {sys.executable} -I -m tfenv wall apply"


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise InstallError(f"{path} is not UTF-8, so it is left as it is") from None
    except OSError as error:
        raise InstallError(f"{path} cannot be read: {error.strerror}; run this as root") from None


def _remove_block(path: str, text: str) -> str:
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and not end:
        line = text.count("\n", 0, text.index(_BEGIN)) + 1
        raise InstallError(f"{path}:{line}: tfenv's block has no end, so the file is left as it is; remove the block")
    return before + after


def write_login_change(change: BlockChange) -> None:
    """Carry out a change. The folder of the drop-in goes with its last file.

    Raises:
        InstallError: The file cannot be written.
    """
    write_change(change)
    if change.path == _DROP_IN and change.after is None:
        with suppress(OSError):  # there are drop-ins of others
            os.rmdir(os.path.dirname(_DROP_IN))


def needs_reload(change: BlockChange) -> bool:
    """Return whether systemd has to read its units again after a change."""
    return change.path == _DROP_IN and not change.changes_nothing
