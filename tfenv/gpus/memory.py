"""How much of each GPU's memory is in use, and by which processes, asked of NVML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from tfenv.dependencies import import_dependency
from tfenv.policy.choice import UNNOTICED
from tfenv.policy.model import CardMemory

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["read_memory"]


def read_memory(uuids: Iterable[str]) -> Mapping[str, CardMemory]:
    """The memory in use of the GPUs NVML can tell of; {} without NVML. Never raises."""
    try:
        pynvml = import_dependency("pynvml")
        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 - without nvidia-ml-py or a driver nobody can say
        return {}
    try:
        found = {uuid: _memory_of(pynvml, uuid) for uuid in uuids}
    finally:
        pynvml.nvmlShutdown()
    return {uuid: memory for uuid, memory in found.items() if memory is not None}


def _memory_of(pynvml: ModuleType, uuid: str) -> CardMemory | None:
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        by_pid = _by_pid(pynvml, handle)
        used = _used(pynvml, handle)
    except pynvml.NVMLError:
        return None
    if used is None:
        used = sum(by_pid.values()) if by_pid else int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    hidden = by_pid is None or (not by_pid and used >= UNNOTICED)  # containers show none but their own
    return CardMemory(used, None if hidden else by_pid)


def _used(pynvml: ModuleType, handle: object) -> int | None:
    """Bytes in use without what the driver reserves; None: only newer drivers tell the two apart."""
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used)
    except pynvml.NVMLError:
        return None


def _by_pid(pynvml: ModuleType, handle: object) -> dict[int, int] | None:
    """Bytes of each process that computes or draws; None where the driver does not say how much (WSL)."""
    sizes: dict[int, int] = {}
    for ask in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses):
        try:
            running = ask(handle)
        except pynvml.NVMLError:  # not supported on this card, as on some slices
            continue
        for process in running:
            if process.usedGpuMemory is None:
                return None
            # A process that does both is in both lists, with the sum in each.
            sizes[int(process.pid)] = max(sizes.get(int(process.pid), 0), int(process.usedGpuMemory))
    return sizes
