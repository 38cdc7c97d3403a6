"""A log and what rotation makes of it: the older files, the compressed ones, and following it through a rotation."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tfenv.values import frozen

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: What logrotate's compressors make, and the modules that read it, of which the first that is there is taken.
#: (Python has zstd from 3.14 on; tfenv[audit] brings backports.zstd.)
COMPRESSED = {
    ".gz": ("gzip",),
    ".bz2": ("bz2",),
    ".xz": ("lzma",),
    ".zst": ("compression.zstd", "backports.zstd"),
}

#: Files of a store (`audit.store`).
STORED = ".parquet"

# Behind the name: a number, or what logrotate's `dateext` adds. logrotate moves aside as .backup what was created
# between its own renaming and its `create`.
_SIBLING = (
    r"(?:\.(?P<age>\d+)|-(?P<date>\d{8,14}|\d{4}-\d\d-\d\d|\d{8}-\d{9,11}))(?:\.backup)?(?:"
    + "|".join(re.escape(suffix) for suffix in COMPRESSED)
    + ")?"
)

# O_NONBLOCK: a planted FIFO does not hang us. O_NOFOLLOW: a planted link leads nowhere.
_OPEN_UNTRUSTED = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CHUNK_BYTES = 1 << 16
# A log becomes a twentieth to a fiftieth by gzip. Whatever is above both is made to fill memory or take time.
_MOST_EXPANDED_BYTES = 1 << 30
_MOST_EXPANSION = 200


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


class LogRefusedError(Exception):
    """A log is not one to read, or not to its end. Its text says why."""


@frozen
class LogOrigin:
    """Who named the logs, and so what may stand at their paths.

    Attributes:
        is_trusted: The user named them: pipes and files of anybody are read. Otherwise a policy did, and anybody may
            have put something else there.
        name: As a policy names the log. A number in the place of its `<uid>` is the only user, beside root, whose
            file is read.
        uid: That user, where the name does not tell.
    """

    is_trusted: bool = True
    name: str = ""
    uid: int | None = None

    def find_owner(self, path: Path) -> int | None:
        """Return the user whose log this is, or was before rotation. None: nothing says."""
        if self.uid is not None or "<uid>" not in self.name:
            return self.uid
        found = re.search(self._make_pattern(), str(path))
        return int(found[1]) if found else None

    def is_whole(self, path: Path) -> bool:
        """Return whether a path is the name with a user's number in it, and nothing that rotation added."""
        return re.fullmatch(self._make_pattern(), str(path)) is not None

    def _make_pattern(self) -> str:
        before, *behind = map(re.escape, self.name.removeprefix("~").split("<uid>"))
        return rf"{before}(\d+)" + r"\1".join(behind)


def open_log(path: Path, origin: LogOrigin = LogOrigin()) -> BufferedReader:  # noqa: B008 - it is frozen
    """Open a log for reading its bytes, decompressed by what the suffix says.

    What stands at the path is looked at once it is open: nobody can put something else there in between.

    Raises:
        LogRefusedError: It is something else, somebody else's, or nothing here can decompress it. Reading raises it,
            too, where a compressed log expands without end.
        OSError: It cannot be opened.
    """
    module = _find_decompressor(path) if path.suffix in COMPRESSED else None
    if path.suffix in COMPRESSED and module is None:
        raise LogRefusedError("nothing here can decompress it; `pip install 'tfenv[audit]'` can")
    file = path.open("rb") if origin.is_trusted else _open_untrusted(path, origin.find_owner(path))
    return file if module is None else BufferedReader(_BoundedReader(module.open(file, "rb"), file), _CHUNK_BYTES)


def _open_untrusted(path: Path, owner: int | None) -> BufferedReader:
    try:
        descriptor = os.open(path, _OPEN_UNTRUSTED)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a socket, a directory
            raise LogRefusedError("it is not a regular file") from None
        raise
    try:
        _require_log_of(os.fstat(descriptor), owner)
    except LogRefusedError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _require_log_of(status: os.stat_result, owner: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise LogRefusedError("it is not a regular file")
    if owner is not None and status.st_uid not in (0, owner):
        raise LogRefusedError(f"it belongs to uid {status.st_uid}, not to uid {owner}")


class _BoundedReader(RawIOBase):
    """Reads a compressed log, and stops where no log would have become so large."""

    def __init__(self, unpacked: IO[bytes], packed: IO[bytes]) -> None:
        self._unpacked, self._packed = unpacked, packed
        self._left = max(_MOST_EXPANDED_BYTES, _MOST_EXPANSION * os.fstat(packed.fileno()).st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        data = self._unpacked.read(min(len(memoryview(buffer)), _CHUNK_BYTES))
        self._left -= len(data)
        if self._left < 0:
            raise LogRefusedError("it expands to more than any log would, so it is not read to the end")
        memoryview(buffer)[: len(data)] = data
        return len(data)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._unpacked.seek(offset, whence)

    def tell(self) -> int:
        return self._unpacked.tell()

    def close(self) -> None:
        self._unpacked.close()
        self._packed.close()
        super().close()


def is_damage(path: Path, error: Exception) -> bool:
    """Tell whether an error is of a compressed file that was cut off or changed. Each compression has its own."""
    if isinstance(error, LogRefusedError):
        return False
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
        refusal: Why what stands at the path now is not read. "" where it is read, or nothing is there.
    """

    def __init__(self, path: Path, origin: LogOrigin = LogOrigin()) -> None:  # noqa: B008 - it is frozen
        """
        Args:
            path: The log. What rotation made of it is not followed.
            origin: Who named it.
        """
        self.path = path
        self.position = 0
        self.refusal = ""
        self._origin = origin
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
        self.position, self._rest, self._was_replaced, self.refusal = 0, b"", False, ""
        try:
            self._file = open_log(self.path, self._origin)
            self.position = self._file.seek(0, whence)
        except LogRefusedError as error:
            self.refusal = str(error)
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
