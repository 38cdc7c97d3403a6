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

#: Top-level packages that open CUDA. `import keras` imports one of them, and every submodule comes through its package.
WATCHED = ("tensorflow", "jax", "torch")

#: What this process was when it started, before the program could change it. "cwd" is None in a deleted directory,
#: "script" is sys.argv[0] ("-c", "-m", "" when no file runs), the rest are environment variables, None when unset.
#: `tfgpu run` and `tfgpu install --system` add "folder", which holds the package tfenv, and "interpreter", which has
#: its dependencies. Without them tfenv is installed in this environment, dependencies and all.
START: "dict[str, str | None]" = {}

_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "TFGPU_CONFIG",
    "TFGPU_SITE_CONFIG",
    "TFGPU_RUN",
    "TFGPU_GRANT",
    "TFGPU_DISABLE",
    "XDG_CONFIG_HOME",
    "XDG_STATE_HOME",
    "SUDO_UID",
)


def load_alone(name: str) -> "Any":
    """Load a module of tfenv by its file, while the package stays out of sys.modules."""
    full = "tfenv." + name
    if full not in sys.modules:
        path = find_folder() + "/" + full.replace(".", "/") + ".py"
        spec = sys.modules["_frozen_importlib_external"].spec_from_file_location(full, path)
        module = sys.modules["_frozen_importlib"].module_from_spec(spec)
        if name == "runtime.emergency":  # bytecode may be what is damaged
            exec(spec.loader.source_to_code(spec.loader.get_data(path), path), module.__dict__)  # noqa: S102 - our own
        else:
            spec.loader.exec_module(module)
        sys.modules.setdefault(full, module)  # another thread may have been faster
    return sys.modules[full]


def find_folder() -> str:
    """Return the folder that holds the package tfenv: beside this file, or where an editable install says."""
    from os.path import dirname

    here = START.get("folder") or dirname(__file__)
    if __name__ != "_tfenv_boot":
        return dirname(dirname(here))
    try:
        with open(here + "/_tfenv.pth", encoding="utf-8") as file:
            return file.readline().strip()
    except FileNotFoundError:
        return here


class TfenvFinder:
    """Finds nothing itself. It lets the finders after it find a watched package, and has its loader wrapped.

    Libraries call `find_spec` to ask whether a framework is there. Nothing happens until the module is executed.
    """

    #: sys.path as it was when the hook was armed.
    path = tuple(sys.path)
    load_alone = staticmethod(load_alone)
    find_folder = staticmethod(find_folder)
    #: Finds what tfenv's own code imports: `own_imports.find`, once a framework was searched for.
    find_own: "Any" = None

    @staticmethod
    def find_spec(
        name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Find a watched package by the finders after this one. None for all other names of the program's."""
        if name in WATCHED:
            import_hook = _load_import_hook(name)
            return None if import_hook is None else import_hook.find(name, path, target, TfenvFinder, START)
        return None if TfenvFinder.find_own is None else TfenvFinder.find_own(name, path)


def _load_import_hook(name: str) -> "Any":
    """Load tfenv.runtime.import_hook. None when tfenv is half uninstalled: the program goes on as if it were gone."""
    try:
        return load_alone("runtime.import_hook")
    except Exception:
        return _rescue(name)


def _rescue(name: str) -> "Any":
    """Load it once more, after a failure that may have passed. What is still wrong is said."""
    from time import sleep  # built in

    emergency: Any = None
    try:
        for pause in (0.1,) * 5 + (0,):  # an installer may be at work
            try:
                emergency = load_alone("runtime.emergency")
                break
            except FileNotFoundError:
                if not pause:
                    return None
                sleep(pause)
        return load_alone("runtime.import_hook") if emergency.wait_for_package(find_folder()) else None
    except Exception as error:
        if emergency is None:
            sys.stderr.write(
                "tfgpu: tfenv cannot be loaded, no policy is applied: " + ascii(error) + " [internal-error]\n"
            )
        else:
            emergency.handle(error, name)
    return None


def arm() -> None:
    """Watch imports from now on. Calling it again does nothing: a virtual environment runs each `.pth` twice."""
    for finder in sys.meta_path:
        if getattr(finder, "__name__", None) == "TfenvFinder":
            return
    import os

    try:
        START["cwd"] = os.getcwd()
    except OSError:
        START["cwd"] = None
    START["script"] = getattr(sys, "argv", [""])[0]
    for variable in _VARIABLES:
        START[variable] = os.environ.get(variable)
    sys.meta_path.insert(0, TfenvFinder)
    for name in WATCHED:
        if name in sys.modules:
            import_hook = _load_import_hook(name)
            if import_hook is not None:
                import_hook.report_late(name, TfenvFinder, START)


if __name__ == "_tfenv_boot":
    try:
        arm()
    except (Exception, SystemExit):  # a SystemExit here ends the interpreter with "Fatal Python error"
        pass
