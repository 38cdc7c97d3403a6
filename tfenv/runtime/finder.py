"""Watches imports in every Python process. The wheel ships it as its top-level module `_tfenv_boot`.

It runs before anything else in processes that mostly never import a framework. So it imports `sys` and `os`, which are
loaded already, and nothing more: not even `__future__`, which is a file to be read. It holds no reference to `os`,
which would keep half the interpreter alive through its shutdown, for half of all the instructions the hook may cost.
What is needed only once a framework is searched for is in `tfenv.runtime.import_hook`.

Under its other name, `tfenv.runtime.finder`, it arms nothing: it is only a module to read and to test.
"""

import sys

TYPE_CHECKING = False  # typing takes 7 ms to import, and type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

#: Top-level packages that open CUDA. `import keras` and every submodule come through `tensorflow`.
WATCHED = ("tensorflow",)

#: What this process was when it started, before the program could change it. "cwd" is None in a deleted directory,
#: "script" is sys.argv[0] ("-c", "-m", "" when no file runs), the rest are environment variables, None when unset.
#: `tfgpu run` and `tfgpu install --system` add "folder", which holds the package tfenv, and "interpreter", which has
#: its dependencies. Without them tfenv is installed in this environment, dependencies and all.
START: "dict[str, str | None]" = {}

_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "TFGPU_CONFIG",
    "TFGPU_RUN",
    "TFGPU_GRANT",
    "TFGPU_DISABLE",
    "XDG_CONFIG_HOME",
    "SUDO_UID",
)


class TfenvFinder:
    """Finds nothing itself. It lets the finders after it find a watched package, and has its loader wrapped.

    Libraries call `find_spec` to ask whether a framework is there. Nothing happens until the module is executed.
    """

    @staticmethod
    def find_spec(
        name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Find a watched package by the finders after this one. None for all other names."""
        if name not in WATCHED:
            return None
        import_hook = _load_import_hook()
        return None if import_hook is None else import_hook.find(name, path, target, TfenvFinder, START)


def _load_import_hook() -> "Any":
    """Import tfenv.runtime.import_hook. None when tfenv is half uninstalled: the program goes on as if it were gone."""
    try:
        folder = START.get("folder")
        if folder is not None and "tfenv" not in sys.modules:
            _add_package_finder(folder)
        if not _is_ours():
            return None
        from tfenv.runtime import import_hook
    except Exception:
        return None
    return import_hook


def _add_package_finder(folder: "str") -> None:
    """Have the package tfenv found in a folder, and nothing else there. Finders that are asked before win."""
    from importlib.machinery import PathFinder

    class PackageFinder:
        @staticmethod
        def find_spec(
            name: "str",
            path: "Sequence[str] | None" = None,  # noqa: ARG004 (finders are called with three arguments)
            target: "ModuleType | None" = None,
        ) -> "ModuleSpec | None":
            return PathFinder.find_spec(name, [folder], target) if name == "tfenv" else None

    if not any(getattr(finder, "__name__", None) == "PackageFinder" for finder in sys.meta_path):
        sys.meta_path.append(PackageFinder)


def _is_ours() -> "bool":
    """Return whether `tfenv` is this package, and not a file of that name beside the program, which is not ours to run.

    What an uninstall left of ours, beside this file, is passed over in silence.
    """
    from importlib.util import find_spec
    from os.path import dirname, isdir

    spec = find_spec("tfenv")
    if spec is None:
        return False
    if any(isdir(folder + "/runtime") for folder in spec.submodule_search_locations or ()):
        return True
    if spec.origin is None or dirname(dirname(spec.origin)) == dirname(__file__):
        return False
    sys.stderr.write(f"tfgpu: {ascii(spec.origin)[1:-1]} hides tfenv: no policy is applied\n")
    return False


def _remember() -> None:
    import os

    try:
        START["cwd"] = os.getcwd()
    except OSError:
        START["cwd"] = None
    START["script"] = getattr(sys, "argv", [""])[0]
    for variable in _VARIABLES:
        START[variable] = os.environ.get(variable)


def arm() -> None:
    """Watch imports from now on. Calling it again does nothing: a virtual environment runs each `.pth` twice."""
    for finder in sys.meta_path:
        if getattr(finder, "__name__", None) == "TfenvFinder":
            return
    _remember()
    sys.meta_path.insert(0, TfenvFinder)
    for name in WATCHED:
        if name in sys.modules:
            import_hook = _load_import_hook()
            if import_hook is not None:
                import_hook.report_late(name, START)


if __name__ == "_tfenv_boot":
    try:
        arm()
    except (Exception, SystemExit):  # a SystemExit here ends the interpreter with "Fatal Python error"
        pass
