"""How full and how busy each GPU is, and who uses it: asked of NVML, for people who look.

A richer reading than `inventory`, which every program waits for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from tfenv.devices import nvml
from tfenv.identity import get_user_name
from tfenv.values import frozen, replace

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "Driver",
    "GpuProcess",
    "GpuState",
    "Usage",
    "describe",
    "read_usage",
]

#: Bytes. An idle card holds some hundred MiB by itself where the driver counts what it reserves.
_NOBODYS = 1 << 30
#: Of /proc/PID/stat, counted behind the name.
_START_FIELD = 19


@frozen
class GpuState:
    """A GPU, or a MIG instance of one, as it is now. None: the driver or the card does not say.

    Attributes:
        index: As `nvidia-smi` counts; of an instance that of its GPU.
        instance: Number of the MIG instance; None: the GPU itself.
        uuid: "GPU-…" or "MIG-…".
        name: Product name.
        total: Memory in bytes.
        used: What is held of it, by whomever; without what the driver reserves for itself where it tells that apart.
        utilization: Per cent of the last moments in which some kernel ran.
        split: MIG is on: programs see its instances, never the whole.
        problem: Why nothing more is known of it; "" when it answers.
    """

    index: int
    instance: int | None = None
    uuid: str | None = None
    name: str | None = None
    total: int | None = None
    used: int | None = None
    utilization: int | None = None
    split: bool = False
    problem: str = ""

    @property
    def label(self) -> str:
        """How people name it: "0", and "0:1" for an instance."""
        return str(self.index) if self.instance is None else f"{self.index}:{self.instance}"


@frozen
class GpuProcess:
    """A process that holds memory of a GPU.

    Attributes:
        gpu: As `nvidia-smi` counts.
        pid: In the host's numbering; inside a container it may name another process, or none.
        memory: Bytes; None where the driver does not say (WSL2).
        instance: Number of the MIG instance; None: of none.
        uuid: Of the GPU, or the instance, it is on.
        user: Name of its owner, "uid:1234" without a passwd entry; None when there is no such process here.
        uid: The owner's id; None when there is no such process here.
        program: What it calls itself; None when there is no such process here.
        started: When, in seconds since the epoch, to within a second; None when that cannot be told.
    """

    gpu: int
    pid: int
    memory: int | None
    instance: int | None = None
    uuid: str | None = None
    user: str | None = None
    uid: int | None = None
    program: str | None = None
    started: float | None = None

    @property
    def label(self) -> str:
        """How people name the GPU: "0", and "0:1" for a MIG instance."""
        return str(self.gpu) if self.instance is None else f"{self.gpu}:{self.instance}"


@frozen
class Driver:
    """The driver.

    Attributes:
        release: "570.86.10"; None where it does not say.
        cuda: The newest CUDA it knows, as (12, 8); None where it does not say.
    """

    release: str | None = None
    cuda: tuple[int, int] | None = None


@frozen
class Usage:
    """All that was seen at one moment.

    Attributes:
        gpus: By index, MIG instances behind their GPU.
        processes: By GPU and pid.
        driver: The driver itself.
        problem: Why NVML could not be asked; None when it could.
        silent: Labels of the GPUs whose driver does not tell who uses them.
    """

    gpus: tuple[GpuState, ...] = ()
    processes: tuple[GpuProcess, ...] = ()
    driver: Driver = Driver()
    problem: str | None = None
    silent: tuple[str, ...] = ()

    def unseen(self) -> tuple[str, ...]:
        """Labels of the GPUs that hold memory of nobody's that could be seen: of other containers, for one."""
        seen = {process.label for process in self.processes}
        held = [gpu for gpu in self.gpus if not gpu.split and (gpu.used or 0) >= _NOBODYS]
        return tuple(gpu.label for gpu in held if gpu.label not in seen and gpu.label not in self.silent)


def read_usage() -> Usage:
    """Look once. A card that does not answer hides no other. Never raises."""
    gpus: list[GpuState] = []
    processes: list[GpuProcess] = []
    silent: list[str] = []
    try:
        with nvml.open_nvml() as pynvml:
            driver = _driver(pynvml)
            for index in range(pynvml.nvmlDeviceGetCount()):
                try:
                    places = list(_places(pynvml, index))
                except pynvml.NVMLError as error:
                    gpus.append(GpuState(index, problem=nvml.explain_error(error)))
                    continue
                for state, handle in places:
                    gpus.append(state)
                    if state.split:  # who uses it is told by its instances
                        continue
                    found = _processes(pynvml, handle, state)
                    processes += found or ()
                    silent += [state.label] if found is None else []
    except nvml.NvmlUnavailableError as error:
        return Usage(problem=str(error))
    processes.sort(key=lambda process: (process.gpu, process.instance or 0, process.pid))
    return Usage(tuple(gpus), tuple(processes), driver, silent=tuple(silent))


# ---- the driver and its GPUs


def _driver(pynvml: ModuleType) -> Driver:
    release = nvml.ask(pynvml, pynvml.nvmlSystemGetDriverVersion)
    cuda = nvml.ask(pynvml, pynvml.nvmlSystemGetCudaDriverVersion)
    return Driver(
        release=None if release is None else nvml.decode(release),
        cuda=None if cuda is None else (cuda // 1000, cuda % 1000 // 10),
    )


def _places(pynvml: ModuleType, index: int) -> Iterator[tuple[GpuState, Any]]:
    """The GPU, then its instances, each with its handle.

    Raises:
        NVMLError: It does not answer.
    """
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    parts = nvml.list_instances(pynvml, handle)
    yield _state(pynvml, handle, GpuState(index, split=parts is not None)), handle
    for number, part in enumerate(parts or ()):
        yield _state(pynvml, part, GpuState(index, number)), part


def _state(pynvml: ModuleType, handle: Any, known: GpuState) -> GpuState:
    total, used = _memory(pynvml, handle)
    rates = nvml.ask(pynvml, partial(pynvml.nvmlDeviceGetUtilizationRates, handle))
    return replace(
        known,
        uuid=nvml.decode(pynvml.nvmlDeviceGetUUID(handle)),
        name=nvml.decode(pynvml.nvmlDeviceGetName(handle)),
        total=total,
        used=used,
        utilization=None if rates is None else int(rates.gpu),
    )


def _memory(pynvml: ModuleType, handle: Any) -> tuple[int | None, int | None]:
    """Total and used bytes. The second version tells apart what the driver reserves; older drivers lack it."""
    ask = pynvml.nvmlDeviceGetMemoryInfo
    try:
        memory = ask(handle, version=pynvml.nvmlMemory_v2)
    except (pynvml.NVMLError, AttributeError, TypeError):
        memory = nvml.ask(pynvml, partial(ask, handle))
    return (None, None) if memory is None else (int(memory.total), int(memory.used))


# ---- who uses them


def _processes(pynvml: ModuleType, handle: Any, state: GpuState) -> list[GpuProcess] | None:
    """None where the driver does not tell."""
    held = nvml.list_processes(pynvml, handle)
    return None if held is None else [describe(state, pid, memory) for pid, memory in held.items()]


def describe(state: GpuState, pid: int, memory: int | None) -> GpuProcess:
    """A process on a GPU, with what the kernel tells of it here.

    Args:
        state: The GPU.
        pid: Its number.
        memory: Bytes it holds there; None: the driver does not say.
    """
    uid = _owner(pid)
    return GpuProcess(
        gpu=state.index,
        pid=pid,
        memory=memory,
        instance=state.instance,
        uuid=state.uuid,
        uid=uid,
        user=None if uid is None else get_user_name(uid),
        program=_program(pid),
        started=_read_start(pid),
    )


def _owner(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def _program(pid: int) -> str | None:
    """The kernel's name of it; never its arguments, which may hold secrets."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def _read_start(pid: int) -> float | None:
    """When a process started, in seconds since the epoch, to within a second; None when that cannot be told."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The name, in parentheses, may hold blanks and parentheses.
            ticks = int(file.read().rpartition(")")[2].split()[_START_FIELD])
        with open("/proc/stat", encoding="ascii") as file:
            boot = next(int(line.split()[1]) for line in file if line.startswith("btime "))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    return boot + ticks / os.sysconf("SC_CLK_TCK")
