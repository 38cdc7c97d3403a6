"""Who uses which GPU, asked of NVML."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tfenv.dependencies import import_dependency

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["GpuProcess", "read_processes"]


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a GPU.

    Attributes:
        gpu: As `nvidia-smi` counts.
        pid: In the host's numbering; inside a container it may name another process.
        memory: Bytes; None where the driver does not say.
        user: Name of its owner, "uid:1234" without a passwd entry; None when there is no such process here.
        program: What it calls itself; None when there is no such process here.
    """

    gpu: int
    pid: int
    memory: int | None
    user: str | None = None
    program: str | None = None


def read_processes() -> tuple[GpuProcess, ...]:
    """All processes that compute on a GPU, by GPU and pid; () without NVML. Never raises."""
    try:
        pynvml = import_dependency("pynvml")

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 - without nvidia-ml-py or a driver nobody can say
        return ()
    try:
        found = [process for gpu in range(pynvml.nvmlDeviceGetCount()) for process in _on(pynvml, gpu)]
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()
    return tuple(sorted(found, key=lambda process: (process.gpu, process.pid)))


def _on(pynvml: ModuleType, gpu: int) -> list[GpuProcess]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(gpu)
    try:
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:  # not supported on this card, as on some MIG parents
        return []
    return [_process(gpu, int(entry.pid), entry.usedGpuMemory) for entry in running]


def _process(gpu: int, pid: int, memory: int | None) -> GpuProcess:
    return GpuProcess(gpu, pid, None if memory is None else int(memory), _owner(pid), _program(pid))


def _owner(pid: int) -> str | None:
    import pwd

    try:
        uid = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid:{uid}"


def _program(pid: int) -> str | None:
    """The kernel's name of it; never its arguments, which may hold secrets."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None
