"""Imports what tfenv needs, and never a file of that name beside the program.

A program may have a structlog.py of its own. Importing that would run the program's code at a time it does not expect.
Importing the real one under its name would give the program a module that is not its own.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

#: Folders that installers write. Whatever is found there was installed under its name.
_SITE_FOLDERS = ("site-packages", "dist-packages")

#: jsonschema imports it if it is installed.
_GRAMMARS = "rfc3987_syntax"
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


def import_jsonschema() -> Any:
    """Import jsonschema, and leave until it is used what it would import for the format "iri".

    Where Jupyter is installed that is rfc3987_syntax, which compiles 38 grammars: ten times the work of all the rest.
    The schemas of tfenv have no such format. If the program's own have, the grammars are compiled at the first use.

    Raises:
        ImportError: It is not installed.
    """
    if "jsonschema" in sys.modules or _GRAMMARS in sys.modules or PathFinder.find_spec(_GRAMMARS) is None:
        return import_dependency("jsonschema")
    stand_in = _make_stand_in()
    sys.modules[_GRAMMARS] = stand_in
    try:
        return import_dependency("jsonschema")
    finally:
        _remove(stand_in)


def _make_stand_in() -> ModuleType:
    """Return a module that imports the real one as soon as somebody wants anything of it but the function's name."""
    stand_in = ModuleType(_GRAMMARS)

    def load() -> ModuleType:
        _remove(stand_in)
        return import_module(_GRAMMARS)

    def find(name: str) -> Any:
        if name.startswith("__"):  # the import itself asks for __path__
            raise AttributeError(name)
        return getattr(load(), name)

    stand_in.is_valid_syntax = lambda *arguments: load().is_valid_syntax(*arguments)  # type: ignore[attr-defined]
    stand_in.__getattr__ = find  # type: ignore[method-assign]
    return stand_in


def _remove(module: ModuleType) -> None:
    if sys.modules.get(module.__name__) is module:
        del sys.modules[module.__name__]


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
