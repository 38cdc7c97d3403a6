"""The last good copy of each of the machine's files: one typo must not take away every ceiling.

Root's `tfgpu check`, `install --system`, `wall apply` and `watch` keep a copy of each file that has no mistake. Where a
file cannot be read or parsed, its copy stays in force, and every process says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

from tfenv.config.presence import MACHINE_ROOT
from tfenv.files import replace_file
from tfenv.policy.model import Source
from tfenv.values import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tfenv.config.document import Document

#: Literal, as the machine's own directory is. Below it the files have the same names.
LAST_GOOD_ROOT = "/var/lib/tfgpu/etc"


def find_last_good(source: Source) -> Source | None:
    """Return the copy of a machine file that is broken. None: there is none, or it is no file of /etc/tfgpu."""
    if source.layer != "machine" or not source.path.startswith(f"{MACHINE_ROOT}/"):
        return None
    path = LAST_GOOD_ROOT + source.path.removeprefix(MACHINE_ROOT)
    return replace(source, path=path) if os.path.lexists(path) else None


def format_copy_time(path: str) -> str:
    """Return when a copy was kept, in UTC, for people: "2026-11-26 10:41 UTC"."""
    from time import gmtime, strftime

    try:
        return strftime("%Y-%m-%d %H:%M UTC", gmtime(os.stat(path).st_mtime))
    except OSError:
        return "an unknown time"


def find_stale_copy(document: Document) -> str | None:
    """Return the path of a machine file's copy whose text is another. None: it is the same, or there is no copy."""
    copy = find_last_good(document.source)
    if copy is None:
        return None
    try:
        with open(copy.path, encoding="utf-8", newline="") as file:
            return None if file.read() == document.text else copy.path
    except (OSError, UnicodeDecodeError):
        return None


def keep_copies(documents: Iterable[Document]) -> None:
    """Keep copies of machine files without a mistake, each for those who may read the file itself.

    Only root can. For others, and where the copies cannot be written, nothing happens.

    Args:
        documents: The files as they were read.
    """
    if os.geteuid() != 0:
        return
    for document in documents:
        path = document.source.path
        if document.source.layer == "machine" and path.startswith(f"{MACHINE_ROOT}/"):
            with suppress(OSError):  # the policy is as it should be, and whoever asked was told so
                _keep_copy(path, LAST_GOOD_ROOT + path.removeprefix(MACHINE_ROOT), document.text)


def _keep_copy(path: str, copy: str, text: str) -> None:
    status = os.stat(path)
    with suppress(OSError), open(copy, encoding="utf-8", newline="") as file:
        kept = os.fstat(file.fileno())
        if file.read() == text and (kept.st_mode, kept.st_gid) == (status.st_mode, status.st_gid):
            return
    _make_folder(os.path.dirname(copy))
    # The group first: nobody else may have read it in between.
    replace_file(copy, text, 0o600)
    os.chown(copy, 0, status.st_gid)
    os.chmod(copy, status.st_mode & 0o755)


def _make_folder(path: str) -> None:
    """Make a folder that all can enter, whatever root's umask is. The files in it have modes of their own."""
    if not os.path.isdir(path):
        _make_folder(os.path.dirname(path))
        os.mkdir(path)
        os.chmod(path, 0o755)  # noqa: S103 - as /etc is


def forget_copies(paths: Iterable[str]) -> None:
    """Remove the copies of machine files that are gone: what their administrator removed must not come back.

    Args:
        paths: All files of the machine's layer.
    """
    known = {LAST_GOOD_ROOT + path.removeprefix(MACHINE_ROOT) for path in paths}
    for folder, _, names in os.walk(LAST_GOOD_ROOT):
        for path in (os.path.join(folder, name) for name in names):
            if path not in known:
                with suppress(OSError):
                    os.unlink(path)
