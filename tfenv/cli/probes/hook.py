"""What `tfgpu doctor` and `tfgpu verify` ask an interpreter about itself, from inside of it.

    python -c TEXT [FRAMEWORK ...]    prints one line of JSON

The interpreter may be any, with or without tfenv. So it gets this file as text, which imports nothing of tfenv at its
top.
"""

import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_INNER_MODULES = {"tensorflow": "python/framework/ops.py", "keras": "src/layers/layer.py"}


# ---- the hook


def describe_hook(frameworks: "list[str]") -> "dict[str, Any]":
    """Return whether the hook is live, all that may keep it from being so, and which frameworks are installed."""
    armed = [finder for finder in sys.meta_path if getattr(finder, "__name__", None) == "TfenvFinder"]
    boot = sys.modules.get("_tfenv_boot")
    return {
        "executable": sys.executable,
        "version": sys.version.split()[0],
        "armed": bool(armed),
        "boot": getattr(boot, "__file__", None) or _find_origin("_tfenv_boot"),
        "lent_from": getattr(boot, "START", {}).get("folder"),
        "lent_interpreter": getattr(boot, "START", {}).get("interpreter"),
        "site_disabled": bool(sys.flags.no_site),
        "pth": _find_files("tfenv.pth", _find_site_folders()),
        "pth_unread": _find_files("tfenv.pth", [path for path in sys.path if path not in _find_site_folders()]),
        "sitecustomize": getattr(sys.modules.get("sitecustomize"), "__file__", None),
        "activation_error": _find_activation_error(),
        "missing": [name for name in ("structlog", "tomli", "jsonschema", "pynvml") if not _can_import(name)],
        "frameworks": [name for name in frameworks if _find_origin(name) is not None],
        "keras_backend": _find_keras_backend(),
        "writes_bytecode": not sys.dont_write_bytecode,
        "uncompiled": _find_uncompiled(),
        "copies": _find_copies(),
        "blocks": [path for path in _find_files("sitecustomize.py", sys.path) if _has_block(path)],
    }


def _find_origin(name: str) -> "str | None":
    import importlib.util

    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return None if spec is None else spec.origin


def _can_import(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _find_site_folders() -> "list[str]":
    """Return the folders in which this interpreter reads `.pth` files."""
    site = sys.modules.get("site")
    if site is None:
        return []
    folders = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
    return list(dict.fromkeys(folders))


def _find_files(name: str, folders: "list[str]") -> "list[str]":
    paths = [os.path.join(folder, name) for folder in folders]
    return [path for path in paths if os.path.exists(path)]


def _find_activation_error() -> "str | None":
    """Return why the hook will fail once a framework is imported. None if it will not."""
    finder = sys.modules.get("_tfenv_boot")
    try:
        if finder is not None:
            # What the hook does once a framework is imported.
            hook = finder.load_alone("runtime.import_hook")
            hook.Enforcer("tensorflow", finder.TfenvFinder, finder.START).import_enforce()
        else:
            import tfenv.runtime.enforce  # noqa: F401
    except Exception as error:  # noqa: BLE001 - whatever it is, the doctor wants to know
        return f"{type(error).__name__}: {error}"
    return None


def _find_copies() -> "list[str]":
    """Return the places of tfenv on the path. The first one is used."""
    found: dict[str, str] = {}
    for folder in sys.path:
        path = os.path.join(folder or os.getcwd(), "tfenv")
        if os.path.exists(os.path.join(path, "__init__.py")):
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _has_block(path: str) -> bool:
    """Return whether `tfgpu install --system` wrote into this sitecustomize."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return "# >>> tfenv >>>" in file.read()
    except OSError:
        return False


def _find_uncompiled() -> "dict[str, str]":
    """Return the folders of packages without bytecode, by name. One module deep inside stands for all of a package."""
    import importlib.util

    found = {}
    for name, inner in _INNER_MODULES.items():
        origin = _find_origin(name)
        sources = [] if origin is None else [origin, os.path.join(os.path.dirname(origin), inner)]
        compiled = [importlib.util.cache_from_source(path) for path in sources if os.path.exists(path)]
        if origin is not None and not all(os.path.exists(path) for path in compiled):
            found[name] = os.path.dirname(origin)
    return found


def _find_keras_backend() -> "str | None":
    """Return the package that Keras computes with here, without importing either. None: there is no Keras."""
    if _find_origin("keras") is None:
        return None
    folder = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
    try:
        with open(os.path.join(folder, "keras.json"), encoding="utf-8") as file:
            chosen = json.load(file).get("backend")
    except (OSError, ValueError, AttributeError):
        chosen = None
    return os.environ.get("KERAS_BACKEND") or str(chosen or "tensorflow")


if __name__ == "__main__":
    print(json.dumps(describe_hook(sys.argv[1:])))
