"""What `tfgpu doctor` asks an interpreter, from inside it: `python -c SOURCE hook|tensorflow` prints one line of JSON.

The interpreter may be any, with or without tfenv. So this file is handed to it as text, and imports nothing of ours
at its top.
"""

import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: What TensorFlow must find to list a GPU, besides the cuDNN of its release.
_LIBRARIES = (
    "libcuda.so.1",
    "libcudart.so.12",
    "libcublas.so.12",
    "libcublasLt.so.12",
    "libcufft.so.11",
    "libcusolver.so.11",
    "libcusparse.so.12",
)
_FIRST_WITH_CUDNN_9 = (2, 18)
_INNER_MODULES = {"tensorflow": "python/framework/ops.py", "keras": "src/layers/layer.py"}


# ---- the hook


def describe_hook() -> "dict[str, Any]":
    """Return whether the hook is live, and all that may keep it from being so."""
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
        "tensorflow": _find_origin("tensorflow"),
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


# ---- TensorFlow


def describe_tensorflow() -> "dict[str, Any]":
    """Return what TensorFlow and Keras see. Lists devices and creates none, so no memory of a GPU is taken."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    cuda = bool(tf.test.is_built_with_cuda())
    return {
        "version": tf.__version__,
        "cuda": cuda,
        "cuda_version": tf.sysconfig.get_build_info().get("cuda_version"),
        "devices": [_shorten_name(device) for device in tf.config.list_physical_devices()],
        "gpus": [_describe_gpu(tf, gpu) for gpu in gpus],
        "missing_libraries": [] if gpus or not cuda else _find_missing_libraries(tf.__version__),
        **_describe_keras(),
    }


def _describe_gpu(tf: "Any", gpu: "Any") -> "dict[str, str]":
    details = tf.config.experimental.get_device_details(gpu)
    capability = ".".join(str(part) for part in details.get("compute_capability", ()))
    return {"device": _shorten_name(gpu), "name": details.get("device_name", ""), "capability": capability}


def _shorten_name(device: "Any") -> str:
    return str(device.name).replace("/physical_device:", "")


def _find_missing_libraries(version: str) -> "list[str]":
    """Return the libraries that cannot be loaded. Those of pip's packages can: TensorFlow has just loaded them."""
    import ctypes

    numbers = tuple(int(part) for part in version.split(".")[:2])
    names = (*_LIBRARIES, "libcudnn.so.9" if numbers >= _FIRST_WITH_CUDNN_9 else "libcudnn.so.8")
    missing = []
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    return missing


def _describe_keras() -> "dict[str, Any]":
    try:
        import keras

        return {"keras": keras.__version__, "keras_backend": keras.backend.backend()}
    except Exception as error:  # noqa: BLE001 - a broken Keras is a finding
        return {"keras": None, "keras_error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    print(json.dumps(describe_tensorflow() if sys.argv[1:] == ["tensorflow"] else describe_hook()))
