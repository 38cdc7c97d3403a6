"""Declare once which GPUs programs may see and how much memory they may take. Every Python process keeps it.

Nothing is imported here: this package is searched for in processes that must not pay for it.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tfenv.api import apply, check, explain, status
    from tfenv.errors import PolicyError

__all__ = ["PolicyError", "__version__", "apply", "check", "explain", "status"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "PolicyError":
        from tfenv.errors import PolicyError

        return PolicyError
    from tfenv import api

    return getattr(api, name)


def __dir__() -> "list[str]":
    return sorted({*globals(), *__all__})
