"""How much of each GPU's memory is in use, and by which processes, asked of NVML."""

from __future__ import annotations

from tfenv.devices import nvml
from tfenv.devices.cgroups import WallReader
from tfenv.policy.model import UNNOTICED_BYTES, MemoryUse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import ModuleType


def read_memory(uuids: Iterable[str]) -> Mapping[str, MemoryUse]:
    """Return the memory in use of the GPUs NVML can tell of. Empty without NVML. Never raises."""
    try:
        with nvml.open_nvml() as pynvml:
            walls = WallReader(pynvml)
            found = {uuid: _read_memory_use(pynvml, uuid, walls) for uuid in uuids}
    except nvml.NvmlUnavailableError:
        return {}
    return {uuid: memory for uuid, memory in found.items() if memory is not None}


def _read_memory_use(pynvml: ModuleType, uuid: str, walls: WallReader) -> MemoryUse | None:
    handle = nvml.ask_or_none(pynvml, pynvml.nvmlDeviceGetHandleByUUID, uuid)
    if handle is None:
        return None
    by_pid = _find_sizes(nvml.list_processes(pynvml, handle))
    memory = nvml.read_card_memory(pynvml, handle)
    if by_pid and (memory is None or memory.reserved is None):
        used = sum(by_pid.values())
    elif memory is not None:
        used = memory.used
    else:
        return None
    # Containers show no processes but their own, or the machine's with numbers that are somebody else's in there.
    is_hidden = used >= UNNOTICED_BYTES and not (by_pid and nvml.counts_pids_as_here())
    wall = walls.read(handle)
    return MemoryUse(used, None if is_hidden else by_pid, 0 if wall is None else wall.used)


def _find_sizes(processes: Mapping[int, int | None] | None) -> dict[int, int] | None:
    """Return the bytes by pid. None where the driver does not say all of it."""
    sizes = {pid: size for pid, size in (processes or {}).items() if size is not None}
    return sizes if processes is not None and len(sizes) == len(processes) else None
