"""The hook of this process, for those who ask about it or want it armed: `tfenv.apply()`, `tfgpu doctor`."""

from __future__ import annotations

import sys
from collections.abc import Mapping

#: Installed it is a module of its own at the root of the wheel, in a checkout it is tfenv/runtime/finder.py.
_NAMES = ("_tfenv_boot", "tfenv.runtime.finder")
#: What the finder loads by its file, unless it is loaded already.
_LOADED_ALONE = (
    "tfenv.config.presence",
    "tfenv.runtime.emergency",
    "tfenv.runtime.import_hook",
    "tfenv.runtime.own_imports",
)


def is_armed() -> bool:
    """Return whether imports of frameworks are watched in this process."""
    return any(getattr(finder, "__name__", None) == "TfenvFinder" for finder in sys.meta_path)


def arm() -> None:
    """Watch imports from now on. A framework that is there already is reported as too late. Again does nothing."""
    from importlib import import_module

    if is_armed():
        return
    if hasattr(sys, "frozen"):  # there are no files for the finder to load
        for name in _LOADED_ALONE:
            import_module(name)
    try:
        finder = import_module(_NAMES[0])  # arms itself when it is loaded for the first time
    except ImportError:
        finder = import_module(_NAMES[1])
    finder.arm()


def get_start() -> Mapping[str, str | None]:
    """Return what the process was when the hook was armed, as `finder.START`. It is empty when it was not armed."""
    starts: list[Mapping[str, str | None]] = [getattr(sys.modules.get(name), "START", {}) for name in _NAMES]
    return next((start for start in starts if start), {})
