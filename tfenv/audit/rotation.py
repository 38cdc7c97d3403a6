"""A log and what rotation makes of it: the older files, the compressed ones, and following it through a rotation."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, cast

#: What logrotate's compressors make, and the modules that read it, of which the first that is there is taken.
#: (Python has zstd from 3.14 on; tfenv[audit] brings backports.zstd.)
COMPRESSED = {
    ".gz": ("gzip",),
    ".bz2": ("bz2",),
    ".xz": ("lzma",),
    ".zst": ("compression.zstd", "backports.zstd"),
}

# Behind the name: a number, or what logrotate's `dateext` adds. logrotate moves aside as .backup what was created
# between its own renaming and its `create`.
_SIBLING = (
    r"(?:\.(?P<age>\d+)|-(?P<date>\d{8,14}|\d{4}-\d\d-\d\d|\d{8}-\d{9,11}))(?:\.backup)?(?:"
    + "|".join(re.escape(suffix) for suffix in COMPRESSED)
    + ")?"
)


def find_log_files(path: Path) -> list[Path]:
    """Return what logrotate made of a log, then the log: `.3.gz`, `.2.zst`, `.1`, `-20261105.xz`, the log itself."""
    pattern = re.compile(re.escape(path.name) + _SIBLING)
    try:
        names = os.listdir(path.parent)
    except OSError:
        names = []
    siblings = [(match, path.parent / name) for name in names if (match := pattern.fullmatch(name))]
    siblings.sort(key=lambda pair: (pair[0]["date"] or "", -int(pair[0]["age"] or 0)))
    return [sibling for _, sibling in siblings] + ([path] if path.exists() else [])


def find_all_log_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files of all logs, each once: `--file log*` names a log and its siblings."""
    return list(dict.fromkeys(file for path in paths for file in (find_log_files(path) or [path])))


# ---- compressed logs


def can_open(path: Path) -> bool:
    """Tell whether something here can decompress the file, by its suffix."""
    return path.suffix not in COMPRESSED or _find_decompressor(path) is not None


def find_refusal(path: Path, *, named: bool) -> str | None:
    """Return why a log is left out. None: it is read.

    Args:
        path: The log, or what rotation made of it.
        named: The user named it. Otherwise a policy did, and anybody may have put something else there.
    """
    if not named and (problem := _find_planted(path)) is not None:
        return problem
    return None if can_open(path) else "nothing here can decompress it; `pip install 'tfenv[audit]'` can"


def _find_planted(path: Path) -> str | None:
    try:
        status = path.stat(follow_symlinks=False)
    except OSError:
        return None  # whoever opens it says so
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    uid = path.name.partition(".")[0]
    if uid.isdecimal() and status.st_uid not in (0, int(uid)):
        return f"it belongs to uid {status.st_uid}, not to uid {uid}"
    return None


def open_log(path: Path) -> BufferedReader:
    """Open a log for reading its bytes, decompressed by what the suffix says.

    Raises:
        OSError: It cannot be opened, or nothing here can decompress it.
    """
    if path.suffix not in COMPRESSED:
        return path.open("rb")
    module = _find_decompressor(path)
    if module is None:
        raise OSError(errno.ENOTSUP, "nothing here can decompress it; `pip install 'tfenv[audit]'` can", str(path))
    return cast("BufferedReader", module.open(path, "rb"))


def is_damage(path: Path, error: Exception) -> bool:
    """Tell whether an error is of a compressed file that was cut off or changed. Each compression has its own."""
    return path.suffix in COMPRESSED and not (isinstance(error, OSError) and error.errno)


def _find_decompressor(path: Path) -> Any:
    for name in COMPRESSED[path.suffix]:
        with suppress(ImportError):  # not installed, or a Python that was built without
            return import_module(name)
    return None


# ---- following


class LogTail:
    """Reads what is appended to a log from now on, through rotations. The log may not exist yet.

    Attributes:
        path: The log.
        position: Where reading goes on, in bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self._rest = b""
        self._file: IO[bytes] | None = None
        self._was_replaced = False
        self._open_again(os.SEEK_END)

    def poll(self) -> list[bytes]:
        """Return the whole lines that came since the last call. Never waits."""
        lines = self._read()
        if not self._is_replaced():
            return lines
        # A writer may have opened the old file just before it was renamed: it has until the next call.
        if self._file is None or self._was_replaced:
            self._open_again()
            return lines + self._read()
        self._was_replaced = True
        return lines

    def close(self) -> None:
        """Release the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open_again(self, whence: int = os.SEEK_SET) -> None:
        self.close()
        self.position, self._rest, self._was_replaced = 0, b"", False
        try:
            self._file = self.path.open("rb")
            self.position = self._file.seek(0, whence)
        except OSError:
            self.close()

    def _is_replaced(self) -> bool:
        if self._file is None:
            return True
        try:
            now, ours = os.stat(self.path), os.fstat(self._file.fileno())
        except OSError:  # renamed, and the new one is still to come
            return False
        return (now.st_dev, now.st_ino) != (ours.st_dev, ours.st_ino)

    def _read(self) -> list[bytes]:
        if self._file is None:
            return []
        if os.fstat(self._file.fileno()).st_size < self.position:  # copytruncate
            self.position, self._rest = 0, b""
        self._file.seek(self.position)
        data = self._file.read()
        self.position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines
