"""The machine's GPUs, asked of NVML and never of CUDA: a process that has opened CUDA cannot fork.

Programs wait for this at their first listing of devices: what they do not need is asked in `usage`.
"""

from __future__ import annotations

import os

from tfenv.devices import nvml
from tfenv.policy.model import Device, Inventory
from tfenv.values import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

    from tfenv.devices.cgroups import WallReader
    from tfenv.policy.model import Wall


#: CUDA opens one of these: Linux's driver, and that of Windows below WSL2.
_DRIVER_NODES = ("/dev/nvidiactl", "/dev/dxg")


def read_inventory(cgroup: str | None = None) -> Inventory:
    """List the GPUs NVML shows. Of one that is split list its MIG instances. Never raises.

    Args:
        cgroup: The cgroup whose limits count. None: that of this process.

    Returns:
        The devices by index, as nvidia-smi counts, without those that do not answer. Without NVML (no driver,
        WSL quirks, nvidia-ml-py missing) there are no devices, and the reason.
    """
    from tfenv.devices.cgroups import WallReader  # nobody needs it to import a framework

    devices: list[Device] = []
    lost: dict[int, str] = {}
    try:
        with nvml.open_nvml() as pynvml:
            walls = WallReader(pynvml, cgroup)
            for index in range(pynvml.nvmlDeviceGetCount()):
                try:
                    devices += read_devices(pynvml, index, walls)
                except pynvml.NVMLError as error:  # of this card, the others answer
                    lost[index] = nvml.explain_error(error)
    except nvml.NvmlUnavailableError as error:
        return Inventory(problem=str(error), no_driver=not any(map(os.path.exists, _DRIVER_NODES)))
    return Inventory(devices=tuple(devices), lost=lost)


def read_devices(pynvml: ModuleType, index: int, walls: WallReader) -> list[Device]:
    """Return one GPU, or its MIG instances.

    Args:
        pynvml: NVML, open.
        index: The GPU.
        walls: Finds the limits of cgroups that hold for this process.

    Raises:
        NVMLError: It does not answer.
    """
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    whole = _read_device(pynvml, handle, index)
    parts = nvml.list_instances(pynvml, handle)
    if parts is None:
        return [_limit_device(whole, walls.read(handle))]
    return [_read_device(pynvml, part, index, number, whole.uuid) for number, part in enumerate(parts)]


def _read_device(
    pynvml: ModuleType, handle: Any, index: int, instance: int | None = None, parent: str | None = None
) -> Device:
    memory = nvml.read_memory_info(pynvml, handle)
    return Device(
        index=index,
        uuid=nvml.decode_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=nvml.decode_text(pynvml.nvmlDeviceGetName(handle)),
        total=None if memory is None else memory.total,
        reserved=None if memory is None else memory.reserved,
        instance=instance,
        parent=parent,
    )


def _limit_device(device: Device, wall: Wall | None) -> Device:
    """Return a GPU with the limit that a cgroup has on it. Without one it stays as it is."""
    if wall is None:
        return device
    from tfenv.devices.cgroups import find_reported_total

    return replace(device, wall=wall, total=find_reported_total(device.total, device.reserved, wall))
