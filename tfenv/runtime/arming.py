"""The hook of this process, for those who ask about it or want it armed: `tfenv.apply()`, `tfgpu doctor`."""

from __future__ import annotations

import sys
from collections.abc import Mapping

#: Installed it is a module of its own at the root of the wheel, in a checkout it is tfenv/runtime/finder.py.
_NAMES = ("_tfenv_boot", "tfenv.runtime.finder")


def is_armed() -> bool:
    """Return whether imports of frameworks are watched in this process."""
    return any(getattr(finder, "__name__", None) == "TfenvFinder" for finder in sys.meta_path)


def arm() -> None:
    """Watch imports from now on. A framework that is there already is reported as too late. Again does nothing."""
    if is_armed():
        return
    if hasattr(sys, "frozen"):
        _import_loaded_alone()
    try:
        import _tfenv_boot as finder  # arms itself when it is loaded for the first time
    except ImportError:
        from tfenv.runtime import finder
    finder.arm()


def _import_loaded_alone() -> None:
    """Import what the finder would load by its file. A frozen program has no files.

    Each is an import statement, which is what freezers look for.
    """
    import tfenv.config.presence
    import tfenv.runtime.emergency
    import tfenv.runtime.import_hook
    import tfenv.runtime.own_imports  # noqa: F401


def get_start() -> Mapping[str, str | None]:
    """Return what the process was when the hook was armed, as `finder.START`. It is empty when it was not armed."""
    starts: list[Mapping[str, str | None]] = [getattr(sys.modules.get(name), "START", {}) for name in _NAMES]
    return next((start for start in starts if start), {})
