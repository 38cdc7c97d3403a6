"""The hook of this process, for those who ask about it or want it armed: `tfenv.apply()`, `tfgpu doctor`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType

__all__ = ["arm", "is_armed", "remembered", "resolver"]

#: Installed it is a module of its own at the root of the wheel, in a checkout it is tfenv/runtime/finder.py.
_NAMES = ("_tfenv_boot", "tfenv.runtime.finder")


def is_armed() -> bool:
    """Whether imports of frameworks are watched in this process."""
    return any(getattr(finder, "__name__", None) == "TfenvFinder" for finder in sys.meta_path)


def arm() -> None:
    """Watch imports from now on; a framework that is there already is reported as too late. Again does nothing."""
    if not is_armed():
        _boot().arm()


def remembered() -> Mapping[str, str | None]:
    """What the process was when the hook was armed, as `boot.START`; empty when it was not."""
    for name in _NAMES:
        start: Mapping[str, str | None] = getattr(sys.modules.get(name), "START", {})
        if start:
            return start
    return {}


def resolver() -> str | None:
    """The interpreter that has tfenv's dependencies, where this environment does not: `tfgpu install --system`."""
    for name in _NAMES:
        system: tuple[str, str] | None = getattr(sys.modules.get(name), "system", None)
        if system is not None:
            return system[1]
    return None


def _boot() -> ModuleType:
    from importlib import import_module

    try:
        return import_module("_tfenv_boot")  # arms itself when it is loaded for the first time
    except ImportError:
        return import_module("tfenv.runtime.finder")
