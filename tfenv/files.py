"""Files that are written in one step: whoever reads one sees the old text or the new one, never a part."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress


def replace_file(path: str | os.PathLike[str], text: str, mode: int | None = None, *, overwrite: bool = True) -> None:
    """Write a file in one step, and have it on the disk before it gets its name. Nothing else is left beside it.

    Args:
        path: The file. A symbolic link is replaced, not followed.
        text: Written as UTF-8, line breaks as they are.
        mode: Permission bits, whatever the umask is. None: those that the umask leaves.
        overwrite: Whether a file that exists is replaced.

    Raises:
        FileExistsError: There is a file already, and `overwrite` is false.
        OSError: The file cannot be written. What was there stays.
    """
    folder, name = os.path.split(os.fspath(path))
    # Root may write where others can: nobody can guess this name, and a file that has it already is not opened.
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(text.encode())
            if mode is not None:
                os.fchmod(descriptor, mode)
            file.flush()
            os.fsync(descriptor)
        if overwrite:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
    finally:
        with suppress(OSError):
            os.unlink(temporary)
