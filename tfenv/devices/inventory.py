"""The machine's GPUs, asked of NVML and never of CUDA: a process that has opened CUDA cannot fork.

Programs wait for this at their first listing of devices: what they do not need is asked in `usage`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tfenv.devices import nvml
from tfenv.policy.model import Device, Inventory

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["read_devices", "read_inventory"]


def read_inventory() -> Inventory:
    """List the GPUs NVML shows; of one that is split its MIG instances.

    Returns:
        The devices by index, as nvidia-smi counts, without those that do not answer; without NVML (no driver,
        WSL quirks, nvidia-ml-py missing) no devices and the reason. Never raises.
    """
    devices: list[Device] = []
    lost: dict[int, str] = {}
    try:
        with nvml.open_nvml() as pynvml:
            for index in range(pynvml.nvmlDeviceGetCount()):
                try:
                    devices += read_devices(pynvml, index)
                except pynvml.NVMLError as error:  # of this card; the others answer
                    lost[index] = nvml.explain_error(error)
    except nvml.NvmlUnavailableError as error:
        return Inventory(problem=str(error))
    return Inventory(devices=tuple(devices), lost=lost)


def read_devices(pynvml: ModuleType, index: int) -> list[Device]:
    """One GPU, or its MIG instances.

    Raises:
        NVMLError: It does not answer.
    """
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    whole = _device(pynvml, handle, index)
    parts = nvml.list_instances(pynvml, handle)
    if parts is None:
        return [whole]
    return [_device(pynvml, part, index, number, whole.uuid) for number, part in enumerate(parts)]


def _device(
    pynvml: ModuleType, handle: Any, index: int, instance: int | None = None, parent: str | None = None
) -> Device:
    memory = nvml.ask(pynvml, lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    return Device(
        index=index,
        uuid=nvml.decode(pynvml.nvmlDeviceGetUUID(handle)),
        name=nvml.decode(pynvml.nvmlDeviceGetName(handle)),
        total=None if memory is None else int(memory.total),
        instance=instance,
        parent=parent,
    )
