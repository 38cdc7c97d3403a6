"""The frameworks that policies are applied to, by the name of their top-level package."""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tfenv.frameworks.base import Framework

#: Modules that hold a framework as `FRAMEWORK`. `tfenv.runtime.finder` watches the same names.
_MODULES = {
    "tensorflow": "tfenv.frameworks.tensorflow.framework",
    "jax": "tfenv.frameworks.jax.framework",
    "torch": "tfenv.frameworks.torch",
}

_loaded: dict[str, Framework] = {}


def list_frameworks() -> tuple[str, ...]:
    """Return the names of all frameworks."""
    return tuple(dict.fromkeys((*_MODULES, *_loaded)))


def get_framework(name: str) -> Framework:
    """Return the framework of a top-level package.

    Raises:
        KeyError: No framework has this name.
    """
    if name not in _loaded:
        _loaded[name] = import_module(_MODULES[name]).FRAMEWORK
    return _loaded[name]


def register(framework: Framework) -> None:
    """Add a framework, or replace the one of its name."""
    _loaded[framework.name] = framework
