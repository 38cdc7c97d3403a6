"""Finds what tfenv itself imports, whatever the program did to sys.path, and whatever lies beside it.

A program may have a `hashlib.py` or a `tfenv.py` beside it, and may rewrite or empty sys.path. While tfenv's own code
runs, its thread is `Inside()`. For that thread the standard library is searched in its own folder first, and packages
in tfenv's own environment. Modules that the program would find elsewhere leave sys.modules with the last `Inside()`.

The finder loads this file by its path, before the package tfenv is there. It imports nothing that is a file.
"""

import _thread
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_LOADED_ALONE = tuple(f"tfenv.runtime.{name}" for name in ("import_hook", "own_imports", "emergency", "finder"))
_inside: "dict[int, int]" = {}
_folders: "dict[str, list[str]]" = {"own": [], "library": [], "packages": []}
#: Names that the program would find elsewhere, and the modules that were imported under them for tfenv.
_apart: "set[str]" = set()
_kept: "dict[str, ModuleType]" = {}


def set_folders(folder: str, packages: "Sequence[str]") -> None:
    """Say where to look.

    Args:
        folder: It holds the package tfenv.
        packages: `sys.path` of the start. Empty where tfenv's own interpreter does what takes dependencies.
    """
    library = os.path.dirname(os.__file__)
    installed = [entry for entry in packages if os.path.basename(entry) in ("site-packages", "dist-packages")]
    _folders.update(own=[folder], library=[library, f"{library}/lib-dynload"], packages=installed)


class Inside:
    """Have this thread's imports found for tfenv, as long as the `with` lasts. contextlib may be the program's own."""

    def __enter__(self) -> None:
        thread = _thread.get_ident()
        _inside[thread] = _inside.get(thread, 0) + 1
        if _inside[thread] == 1:
            for name, module in _kept.items():
                sys.modules.setdefault(name, module)

    def __exit__(self, *_: object) -> None:
        thread = _thread.get_ident()
        _inside[thread] -= 1
        if _inside[thread] == 0:
            del _inside[thread]
            _set_apart()


def find(name: str, path: "Sequence[str] | None") -> "ModuleSpec | None":
    """Find a top-level module for tfenv. None for all other threads, and for what only the program's path has."""
    if path is not None or _thread.get_ident() not in _inside or name in sys.builtin_module_names:
        return None
    kind = "own" if name == "tfenv" else "library" if name in sys.stdlib_module_names else "packages"
    spec = _search(name, _folders[kind])
    if spec is not None and name != "tfenv" and _is_elsewhere(name, spec):
        _apart.add(name)
    return spec


def take_name(folder: str) -> None:
    """Have `tfenv` mean this package from now on, and say on stderr what was set aside.

    Args:
        folder: It holds the package tfenv.
    """
    ours = f"{folder}/tfenv"
    module = sys.modules.get("tfenv")
    places = _list_places(module if module is not None else _search("tfenv", None))
    if module is None and not places:
        return
    if any(_is_same(place, ours) for place in places):
        return
    for name in [name for name in sys.modules if name == "tfenv" or name.startswith("tfenv.")]:
        if not (getattr(sys.modules[name], "__file__", None) or "").startswith(f"{ours}/"):
            del sys.modules[name]
    where = ascii(places[0] if places else "a module of the program")[1:-1]
    sys.stderr.write(
        f"tfgpu: {where} is ignored, because `tfenv` is the name of the policy package; rename it [name-taken]\n"
    )


def forget_package() -> None:
    """Take the package out of sys.modules, so that the next try imports it anew."""
    for name in [name for name in sys.modules if name == "tfenv" or name.startswith("tfenv.")]:
        if name not in _LOADED_ALONE:
            del sys.modules[name]
    sys.path_importer_cache.clear()


def _search(name: str, path: "list[str] | None") -> "ModuleSpec | None":
    from _frozen_importlib_external import PathFinder

    spec: ModuleSpec | None = PathFinder.find_spec(name, path)
    return spec


def _is_elsewhere(name: str, spec: "ModuleSpec") -> bool:
    """Return whether the program would find another module under this name."""
    try:
        theirs = _search(name, None)
    except Exception:  # noqa: BLE001 - what stands in the program's sys.path is the program's business
        return True
    return theirs is not None and theirs.origin != spec.origin


def _set_apart() -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in _apart and name not in _kept:
            _kept[name] = sys.modules[name]
    for name, module in _kept.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]


def _list_places(module: object) -> "list[str]":
    """List the folders or files of a module, or of a spec."""
    origin = getattr(module, "__file__", None) or getattr(module, "origin", None)
    folders = getattr(module, "__path__", None) or getattr(module, "submodule_search_locations", None) or ()
    return [str(place) for place in (*folders, origin) if place]


def _is_same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.abspath(one) == os.path.abspath(other)
