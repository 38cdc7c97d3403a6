"""How much of each GPU's memory is in use, and by which processes, asked of NVML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from tfenv.devices import nvml
from tfenv.policy.model import UNNOTICED_BYTES, MemoryUse

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["read_memory"]


def read_memory(uuids: Iterable[str]) -> Mapping[str, MemoryUse]:
    """The memory in use of the GPUs NVML can tell of; {} without NVML. Never raises."""
    try:
        with nvml.open_nvml() as pynvml:
            found = {uuid: _memory_of(pynvml, uuid) for uuid in uuids}
    except nvml.NvmlUnavailableError:
        return {}
    return {uuid: memory for uuid, memory in found.items() if memory is not None}


def _memory_of(pynvml: ModuleType, uuid: str) -> MemoryUse | None:
    handle = nvml.ask(pynvml, partial(pynvml.nvmlDeviceGetHandleByUUID, uuid))
    if handle is None:
        return None
    by_pid = _sizes(nvml.list_processes(pynvml, handle))
    used = _used(pynvml, handle, by_pid)
    if used is None:
        return None
    hidden = not by_pid and used >= UNNOTICED_BYTES  # containers show none but their own
    return MemoryUse(used, None if hidden else by_pid)


def _sizes(held: Mapping[int, int | None] | None) -> dict[int, int] | None:
    """Bytes by pid; None where the driver does not say all of it."""
    sizes = {pid: size for pid, size in (held or {}).items() if size is not None}
    return sizes if held is not None and len(sizes) == len(held) else None


def _used(pynvml: ModuleType, handle: object, by_pid: Mapping[int, int] | None) -> int | None:
    """Bytes in use without what the driver reserves, which only newer drivers tell apart."""
    ask = pynvml.nvmlDeviceGetMemoryInfo
    try:
        return int(ask(handle, version=pynvml.nvmlMemory_v2).used)
    except (pynvml.NVMLError, AttributeError, TypeError):  # an older driver, an older nvidia-ml-py
        if by_pid:
            return sum(by_pid.values())
        memory = nvml.ask(pynvml, partial(ask, handle))
        return None if memory is None else int(memory.used)
