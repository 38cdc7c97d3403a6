"""What `tfgpu doctor` asks of an interpreter, from inside it: `python -c SOURCE hook|tensorflow` prints one JSON line.

The interpreter may be any, with or without tfenv: this file is handed to it as text and imports nothing of ours
at its top.
"""

import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: What TensorFlow must find to list a GPU; cuDNN's number is that of this TensorFlow.
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


# ---- the hook


def hook() -> "dict[str, Any]":
    """Whether the hook is live, and all that may keep it from being so."""
    armed = [finder for finder in sys.meta_path if getattr(finder, "__name__", None) == "TfenvFinder"]
    boot = sys.modules.get("_tfenv_boot")
    return {
        "executable": sys.executable,
        "version": sys.version.split()[0],
        "armed": bool(armed),
        "boot": getattr(boot, "__file__", None) or _origin("_tfenv_boot"),
        "lent": getattr(boot, "lender", None) is not None,
        "system": getattr(boot, "system", None),
        "site_disabled": bool(sys.flags.no_site),
        "pth": _files_on_path("tfenv.pth", _site_folders()),
        "pth_unread": _files_on_path("tfenv.pth", [path for path in sys.path if path not in _site_folders()]),
        "sitecustomize": getattr(sys.modules.get("sitecustomize"), "__file__", None),
        "activation_error": _activation_error(),
        "missing": [name for name in ("structlog", "tomli", "jsonschema", "pynvml") if not _there(name)],
        "tensorflow": _origin("tensorflow"),
        "writes_bytecode": not sys.dont_write_bytecode,
        "bytecode": _has_bytecode(_origin("tensorflow")),
    }


def _origin(name: str) -> "str | None":
    import importlib.util

    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return None if spec is None else spec.origin


def _there(name: str) -> bool:
    import importlib.util

    boot = sys.modules.get("_tfenv_boot")
    lender = getattr(boot, "lender", None)
    return importlib.util.find_spec(name) is not None or (lender is not None and lender.find_spec(name) is not None)


def _site_folders() -> "list[str]":
    """Where this interpreter reads `.pth` files."""
    site = sys.modules.get("site")
    if site is None:
        return []
    folders = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
    return list(dict.fromkeys(folders))


def _files_on_path(name: str, folders: "list[str]") -> "list[str]":
    paths = [os.path.join(folder, name) for folder in folders]
    return [path for path in paths if os.path.exists(path)]


def _activation_error() -> "str | None":
    """Why the hook could not do its work once a framework is imported; None when it can, or is not there at all."""
    boot = sys.modules.get("_tfenv_boot")
    lender = getattr(boot, "lender", None)
    system = getattr(boot, "system", None)
    if system is not None and lender is None:
        lender = boot.system_lender(system[0])  # type: ignore[union-attr]
    if lender is not None and lender not in sys.meta_path:
        sys.meta_path.append(lender)
    try:
        import tfenv.startup.activate  # noqa: F401
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the doctor wants to know
        return f"{type(error).__name__}: {error}"
    return None


def _has_bytecode(origin: "str | None") -> "bool | None":
    """Whether TensorFlow's own modules are compiled; None without a TensorFlow."""
    import importlib.util

    if origin is None:
        return None
    sources = [origin, os.path.join(os.path.dirname(origin), "python", "framework", "ops.py")]
    return all(os.path.exists(importlib.util.cache_from_source(path)) for path in sources if os.path.exists(path))


# ---- TensorFlow


def tensorflow() -> "dict[str, Any]":
    """What TensorFlow and Keras see. Lists devices, creates none: a GPU's memory stays free."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    cuda = bool(tf.test.is_built_with_cuda())
    return {
        "version": tf.__version__,
        "cuda": cuda,
        "gpus": [_described(tf, gpu) for gpu in gpus],
        "missing_libraries": [] if gpus or not cuda else _missing_libraries(tf.__version__),
        **_keras(),
    }


def _described(tf: "Any", gpu: "Any") -> "dict[str, str]":
    name = tf.config.experimental.get_device_details(gpu).get("device_name", "")
    return {"device": gpu.name.replace("/physical_device:", ""), "name": name}


def _missing_libraries(version: str) -> "list[str]":
    """TensorFlow has just looked for them itself: one that it found, pip's own too, is found by its name now."""
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


def _keras() -> "dict[str, Any]":
    try:
        import keras

        return {"keras": keras.__version__, "keras_backend": keras.backend.backend()}
    except Exception as error:  # noqa: BLE001 - a broken Keras is a finding
        return {"keras": None, "keras_error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    print(json.dumps(tensorflow() if sys.argv[1:] == ["tensorflow"] else hook()))
