"""Imports what tfenv needs, and never a file of that name beside the program.

A program may have a structlog.py of its own. Importing that would run the program's code at a time it does not expect.
Importing the real one under its name would give the program a module that is not its own.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.machinery import PathFinder
from typing import Any

#: Folders that installers write. Whatever is found there was installed under its name.
_SITE_FOLDERS = ("site-packages", "dist-packages")

#: Modules that were imported apart from the program's own of the same name.
_imported_apart: dict[str, Any] = {}


def import_dependency(name: str) -> Any:
    """Import the installed package of this name.

    Args:
        name: A top-level package that tfenv depends on.

    Raises:
        ImportError: It is not installed, or only something else of that name can be found.
    """
    if name in _imported_apart:
        return _imported_apart[name]
    if hasattr(sys, "frozen"):  # whoever froze the program chose its modules
        return import_module(name)
    found = getattr(sys.modules[name], "__spec__", None) if name in sys.modules else PathFinder.find_spec(name)
    if found is None or _is_installed(found.origin, name):
        return import_module(name)
    _imported_apart[name] = _import_apart(name)
    return _imported_apart[name]


def _is_installed(origin: str | None, name: str) -> bool:
    """Return whether a module's file stands where packages are installed, or beside the metadata of one."""
    if origin is None:
        return False
    folder = os.path.dirname(origin)
    if os.path.basename(folder) == name:
        folder = os.path.dirname(folder)
    return os.path.basename(folder) in _SITE_FOLDERS or _has_metadata(folder)


def _has_metadata(folder: str) -> bool:
    """Return whether packages are installed here, as in a folder of `pip install --target` or of a zip application."""
    try:
        return any(entry.endswith((".dist-info", ".egg-info")) for entry in os.listdir(folder))
    except OSError:
        return False


def _import_apart(name: str) -> Any:
    """Import the installed package while the program's own is out of sight, and leave everything as it was."""
    own = _take_modules(name)
    path = list(sys.path)
    sys.path[:] = [entry for entry in path if _has_no_other(entry, name)]
    try:
        return import_module(name)
    finally:
        sys.path[:] = path
        _take_modules(name)
        sys.modules.update(own)


def _take_modules(name: str) -> dict[str, Any]:
    """Remove a package and all below it from sys.modules, and return them."""
    names = [loaded for loaded in list(sys.modules) if loaded == name or loaded.startswith(f"{name}.")]
    return {loaded: sys.modules.pop(loaded) for loaded in names}


def _has_no_other(entry: str, name: str) -> bool:
    """Return whether a folder of sys.path has the installed package, or nothing of that name."""
    spec = PathFinder.find_spec(name, [entry])
    return spec is None or _is_installed(spec.origin, name)
