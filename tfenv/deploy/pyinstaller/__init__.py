"""Tells PyInstaller what a frozen program needs of tfenv. The entry point `pyinstaller40` names this package."""

from __future__ import annotations

import os


def get_hook_dirs() -> list[str]:
    """Return the folder that holds `hook-tfenv.py`."""
    return [os.path.dirname(__file__)]
