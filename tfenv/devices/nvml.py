"""How NVML is asked here: opened late, closed always, and what it cannot answer said in words."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress

from tfenv.dependencies import import_dependency
from tfenv.values import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType
    from typing import Any, TypeVar

    T = TypeVar("T")

#: Common answers of NVML, by the name of their exception, and what to make of them.
_MEANINGS = {
    "NVMLError_LibraryNotFound": "libnvidia-ml.so.1 is missing, because there is no NVIDIA driver or the container was "
    "started without GPUs",
    "NVMLError_DriverNotLoaded": "the NVIDIA driver is installed but not loaded",
    "NVMLError_LibRmVersionMismatch": "the driver was updated and its old kernel module is still loaded: restart the "
    "machine or reload the module",
    "NVMLError_NoPermission": "this user has no permission to use the driver; check the permissions of /dev/nvidiactl",
    "NVMLError_GpuIsLost": "the card fell off the bus; see the kernel log (Xid 79) and restart the machine",
    "NVMLError_NotSupported": "this driver or card does not report it",
}


class NvmlUnavailableError(Exception):
    """NVML cannot be asked at all. The text says why."""


@frozen
class MemoryInfo:
    """The memory of a GPU or of a MIG instance, in bytes.

    Attributes:
        total: What CUDA can give of it.
        used: What is taken of that, by whomever.
        reserved: What the driver keeps for itself beside it. None: an older driver answered, which does not tell it
            apart. It is part of both others then.
    """

    total: int
    used: int
    reserved: int | None


@contextmanager
def open_nvml() -> Iterator[ModuleType]:
    """Yield `pynvml` between nvmlInit and nvmlShutdown. A driver that goes away in between ends nothing.

    Raises:
        NvmlUnavailableError: There is no nvidia-ml-py, no driver, or one that does not answer.
    """
    try:
        pynvml = import_dependency("pynvml")
    except ImportError as error:
        raise NvmlUnavailableError(f"nvidia-ml-py cannot be imported: {error}") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlUnavailableError(f"NVML: {explain_error(error)}") from error
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise NvmlUnavailableError(f"NVML: {explain_error(error)}") from error
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def explain_error(error: Exception) -> str:
    """Return what is behind an error that people meet, or else NVML's own words."""
    return _MEANINGS.get(type(error).__name__) or str(error)


def ask_or_none(pynvml: ModuleType, function: Callable[..., T], *arguments: object) -> T | None:
    """Return what a function of NVML answers. None where the driver or the card does not say."""
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


def decode_text(answer: str | bytes) -> str:
    """Return the answer as text: older releases of nvidia-ml-py give bytes."""
    return answer.decode(errors="replace") if isinstance(answer, bytes) else answer


def read_memory_info(pynvml: ModuleType, handle: Any) -> MemoryInfo | None:
    """Return how much memory a GPU or a MIG instance has. None where the driver or the card does not say."""
    ask = pynvml.nvmlDeviceGetMemoryInfo
    try:
        memory = ask(handle, version=pynvml.nvmlMemory_v2)
        reserved = int(memory.reserved)
        return MemoryInfo(int(memory.total) - reserved, int(memory.used), reserved)
    except (pynvml.NVMLError, AttributeError, TypeError):  # an older driver, an older nvidia-ml-py
        memory = ask_or_none(pynvml, ask, handle)
    return None if memory is None else MemoryInfo(int(memory.total), int(memory.used), None)


def read_card_memory(pynvml: ModuleType, handle: Any) -> MemoryInfo | None:
    """Return how much memory a whole card has, also in a cgroup with a limit of its own.

    There NVML's second version tells of the limit, and the first version of the card.
    """
    second = read_memory_info(pynvml, handle)
    if second is None or second.reserved is None:
        return second
    first = ask_or_none(pynvml, pynvml.nvmlDeviceGetMemoryInfo, handle)
    if first is None:
        return second
    reserved = second.reserved
    return MemoryInfo(int(first.total) - reserved, max(0, int(first.used) - reserved), reserved)


def list_instances(pynvml: ModuleType, handle: Any) -> list[Any] | None:
    """Return the handles of a GPU's MIG instances. None: MIG is off, or this release knows nothing of it."""
    try:
        if pynvml.nvmlDeviceGetMigMode(handle)[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return None
        most = pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except (pynvml.NVMLError, AttributeError):
        return None
    get_handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex
    found = (ask_or_none(pynvml, get_handle, handle, number) for number in range(most))
    return [instance for instance in found if instance is not None]


#: The inode of the machine's own PID namespace, in every Linux.
_FIRST_PID_NAMESPACE = 0xEFFFFFFC


def counts_pids_as_here() -> bool:
    """Return whether the driver's process ids are this process's, too. It counts as the machine does, not a container.

    Simulated GPUs know only processes of the simulation.
    """
    if "TFGPU_SIMULATE" in os.environ:
        return True
    try:
        return os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE
    except OSError:
        return False


def list_processes(pynvml: ModuleType, handle: Any) -> dict[int, int | None] | None:
    """Return the bytes that each process holds of a GPU, by pid: those that compute and those that draw.

    Returns:
        None where the driver tells of no processes. None as bytes where it does not say how much (WSL2).
    """
    computing = ask_or_none(pynvml, pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    if computing is None:
        return None
    drawing = ask_or_none(pynvml, pynvml.nvmlDeviceGetGraphicsRunningProcesses, handle) or []  # as a desktop does
    # A process that does both is in both lists, with the sum in each.
    sizes = {int(entry.pid): entry.usedGpuMemory for entry in (*drawing, *computing)}
    return {pid: None if size is None else int(size) for pid, size in sizes.items()}
