"""Programs that PyInstaller made: they carry a Python of their own, which reads neither `.pth` files nor PYTHONPATH."""

from __future__ import annotations

import mmap

#: What PyInstaller's own loader looks for, at the end of the file or of its last section.
_MAGIC = b"MEI\x0c\x0b\x0a\x0b\x0e"
#: Bytes at the end of the file that are searched: what follows is a linker's tables.
_TAIL = 1 << 20
#: The name of tfenv's runtime hook, in the program's table of contents.
_RUNTIME_HOOK = b"pyi_rth_tfenv"


def is_frozen_without_tfenv(path: str) -> bool:
    """Return whether a file is a program that PyInstaller made, and nothing in it applies a policy.

    Args:
        path: An executable. One that cannot be read is taken for any other program.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"\x7fELF":
                return False
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                mark = data.rfind(_MAGIC, max(0, len(data) - _TAIL))
                return mark >= 0 and data.rfind(_RUNTIME_HOOK, max(0, mark - _TAIL), mark) < 0
    except (OSError, ValueError):
        return False
