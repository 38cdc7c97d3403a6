"""The machine's GPUs, asked of NVML and never of CUDA: a process that has opened CUDA cannot fork."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tfenv.dependencies import import_dependency
from tfenv.policy.model import Device, Inventory

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["read_inventory"]


def read_inventory() -> Inventory:
    """List the GPUs NVML shows.

    Returns:
        The devices by index, as nvidia-smi counts; without NVML (no driver, WSL quirks, nvidia-ml-py
        missing) no devices and the reason. Never raises.
    """
    try:
        pynvml = import_dependency("pynvml")
    except ImportError as error:
        return Inventory(problem=f"nvidia-ml-py cannot be imported: {error}")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Inventory(problem=f"NVML: {error}")
    try:
        count = pynvml.nvmlDeviceGetCount()
        return Inventory(devices=tuple(_device(pynvml, index) for index in range(count)))
    except pynvml.NVMLError as error:
        return Inventory(problem=f"NVML: {error}")
    finally:
        pynvml.nvmlShutdown()


def _device(pynvml: ModuleType, index: int) -> Device:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    return Device(
        index=index,
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        total=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
    )


def _text(value: str | bytes) -> str:
    """Older releases of nvidia-ml-py give bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
