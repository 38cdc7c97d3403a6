"""Replaces PyTorch's entry points, right after its own code ran and before the program gets the module."""

from __future__ import annotations

import sys

from tfenv.frameworks.guard import watch_function
from tfenv.frameworks.torch.entry_points import (
    CHANGE_ALLOCATOR,
    COUNT,
    ENABLE_CACHING,
    ENTRY_POINTS,
    INIT,
    OPENERS,
    SET_FRACTION,
    SET_SETTINGS,
    EntryPointWrappers,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tfenv.frameworks.base import PolicyCallbacks

    Function = Callable[..., Any]

#: What replaces each function of `torch._C`. Versions differ in which of them they have.
_WRAPPERS: dict[str, Callable[[EntryPointWrappers, Function], Function]] = {
    INIT: EntryPointWrappers.wrap_init,
    COUNT: EntryPointWrappers.wrap_count,
    **dict.fromkeys(OPENERS, EntryPointWrappers.wrap_opener),
    SET_FRACTION: EntryPointWrappers.wrap_set_fraction,
    SET_SETTINGS: EntryPointWrappers.wrap_set_settings,
    "_cuda_cudaCachingAllocator_set_allocator_settings": EntryPointWrappers.wrap_set_settings,
    CHANGE_ALLOCATOR: EntryPointWrappers.wrap_change_allocator,
    ENABLE_CACHING: EntryPointWrappers.wrap_enable_caching,
}

_installed: EntryPointWrappers | None = None


def is_built_with_cuda() -> bool:
    """Return whether the PyTorch that is loaded can use GPUs of CUDA or ROCm at all."""
    version = sys.modules.get("torch.version")
    return bool(getattr(version, "cuda", None) or getattr(version, "hip", None))


def intercept(policy: PolicyCallbacks) -> tuple[str, ...]:
    """Wrap every entry point of the PyTorch that is loaded. A second call only changes the policy.

    Returns:
        The entry points that are not where they should be, in a PyTorch that this release does not know.
    """
    global _installed  # noqa: PLW0603 - PyTorch's own entry points are global
    if not is_built_with_cuda():
        return ()
    core = sys.modules["torch._C"]
    if _installed is not None:
        _installed.guard.policy, _installed.guard.listed_by = policy, 0
        _installed.limit_early()
        return ()
    missing = tuple(name for name in ENTRY_POINTS if not callable(getattr(core, name, None)))
    if missing:
        return missing
    wrappers = EntryPointWrappers(policy, core)
    for name, wrap in _WRAPPERS.items():
        if callable(original := getattr(core, name, None)):
            setattr(core, name, wrap(wrappers, original))
    cuda: Any = sys.modules["torch.cuda"]
    cuda._device_count_nvml = wrappers.wrap_count_by_nvml(cuda._device_count_nvml)  # noqa: SLF001
    wrappers.guard.follow_forks()
    _installed = wrappers
    wrappers.limit_early()
    return ()


def get_installed() -> EntryPointWrappers | None:
    """Return the entry points of this process. None: PyTorch has none, or they are not wrapped."""
    return _installed


#: What nearly all use of GPUs from Python goes through, once they are open.
_USES = (
    ("torch.cuda", ("_lazy_init", "device_count", "is_available")),
    ("torch.nn.modules.module", ("Module.cuda", "Module.to")),
)


def watch_use(policy: PolicyCallbacks) -> None:
    """Ask a policy from now on whenever the program uses torch.cuda or moves a module. A second call does nothing."""
    for module_name, names in _USES:
        for name in names:
            holder: Any = sys.modules.get(module_name)
            *path, leaf = name.split(".")
            for part in path:
                holder = getattr(holder, part, None)
            watch_function(holder, leaf, policy)
