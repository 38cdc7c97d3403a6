"""How full and how busy each GPU is, and who uses it: asked of NVML, for people who look.

A richer reading than `inventory`, which every program waits for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tfenv.devices import cgroups, nvml
from tfenv.devices.cgroups import LimitSupport
from tfenv.identity import get_user_name
from tfenv.policy.model import Wall
from tfenv.values import frozen, replace

if TYPE_CHECKING:
    from types import ModuleType

#: From so many bytes on somebody must hold them. An idle card holds some hundred MiB by itself where the driver
#: does not tell apart what it reserves.
_SOMEBODYS_BYTES = 1 << 30
#: The field of /proc/PID/stat that tells the start, counted behind the name.
_START_FIELD = 19


@frozen
class GpuState:
    """A GPU, or a MIG instance of one, as it is now. None: the driver or the card does not say.

    Attributes:
        index: As `nvidia-smi` counts. Of an instance that of its GPU.
        instance: Number of the MIG instance. None: the GPU itself.
        uuid: "GPU-…" or "MIG-…".
        name: Product name.
        total: Memory in bytes that CUDA can give.
        used: What is held of it, by whomever.
        reserved: What the driver keeps for itself. It is beside `total` and `used`. None: it does not tell that apart,
            and it is part of both.
        utilization: Per cent of the last moments in which some kernel ran.
        split: MIG is on: programs see its instances, never the whole.
        problem: Why nothing more is known of it. "" when it answers.
        wall: The limit that the driver keeps for a cgroup of this process. None: there is none.
    """

    index: int
    instance: int | None = None
    uuid: str | None = None
    name: str | None = None
    total: int | None = None
    used: int | None = None
    reserved: int | None = None
    utilization: int | None = None
    split: bool = False
    problem: str = ""
    wall: Wall | None = None

    @property
    def label(self) -> str:
        """How people name it: "0", and "0:1" for an instance."""
        return _format_label(self.index, self.instance)


@frozen
class GpuProcess:
    """A process that holds memory of a GPU.

    Attributes:
        gpu: As `nvidia-smi` counts.
        pid: As the machine counts. Inside a container that is no number of a process there.
        memory: Bytes. None where the driver does not say (WSL2).
        instance: Number of the MIG instance. None: of none.
        uuid: Of the GPU, or the instance, it is on.
        user: Name of its owner, "uid:1234" without a passwd entry. None when there is no such process here.
        uid: The owner's id. None when there is no such process here.
        program: What it calls itself. None when there is no such process here.
        started: When, in seconds since the epoch, to within a second. None when that cannot be told.
        start_ticks: The same in clock ticks since the machine did, which no change of the clock moves.
        wall: The limit that the driver keeps for its cgroup on this GPU. None: there is none, or it cannot be told.
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
    start_ticks: int | None = None
    wall: Wall | None = None

    @property
    def label(self) -> str:
        """How people name the GPU: "0", and "0:1" for a MIG instance."""
        return _format_label(self.gpu, self.instance)


def _format_label(gpu: int, instance: int | None) -> str:
    return str(gpu) if instance is None else f"{gpu}:{instance}"


@frozen
class DriverInfo:
    """The driver.

    Attributes:
        release: "570.86.10". None where it does not say.
        cuda: The newest CUDA it knows, as (12, 8). None where it does not say.
    """

    release: str | None = None
    cuda: tuple[int, int] | None = None


@frozen
class GpuUsage:
    """How all GPUs of the machine were used at one moment.

    Attributes:
        gpus: By index, MIG instances behind their GPU.
        processes: By GPU and pid.
        driver: The driver itself.
        problem: Why NVML could not be asked. None when it could.
        silent: Labels of the GPUs whose driver does not tell who uses them.
        limit_support: Whether the driver keeps limits for cgroups. None: NVML could not be asked.
    """

    gpus: tuple[GpuState, ...] = ()
    processes: tuple[GpuProcess, ...] = ()
    driver: DriverInfo = DriverInfo()
    problem: str | None = None
    silent: tuple[str, ...] = ()
    limit_support: LimitSupport | None = None

    def list_unseen(self) -> tuple[str, ...]:
        """Return the labels of the GPUs whose memory is used by nobody that can be seen, as by another container."""
        seen = {process.label for process in self.processes}
        used = [gpu for gpu in self.gpus if not gpu.split and (gpu.used or 0) >= _SOMEBODYS_BYTES]
        return tuple(gpu.label for gpu in used if gpu.label not in seen and gpu.label not in self.silent)


def read_usage() -> GpuUsage:
    """Look once at all GPUs. A card that does not answer hides no other. Never raises."""
    gpus: list[GpuState] = []
    processes: list[GpuProcess] = []
    silent: list[str] = []
    try:
        with nvml.open_nvml() as pynvml:
            driver = _read_driver(pynvml)
            support = cgroups.read_support(pynvml)
            walls = _WallFinder(pynvml, support)
            for index in range(pynvml.nvmlDeviceGetCount()):
                try:
                    states = list(_read_states(pynvml, index, walls))
                except pynvml.NVMLError as error:
                    gpus.append(GpuState(index, problem=nvml.explain_error(error)))
                    continue
                for state, handle in states:
                    gpus.append(state)
                    if state.split:  # its instances tell who uses it
                        continue
                    sizes = nvml.list_processes(pynvml, handle)
                    is_here = nvml.counts_pids_as_here()
                    describe = describe_process if is_here else _make_process
                    found = [describe(state, pid, size) for pid, size in (sizes or {}).items()]
                    processes += [walls.add_to_process(process, handle) for process in found] if is_here else found
                    silent += [state.label] if sizes is None else []
    except nvml.NvmlUnavailableError as error:
        return GpuUsage(problem=str(error))
    processes.sort(key=lambda process: (process.gpu, process.instance or 0, process.pid))
    return GpuUsage(tuple(gpus), tuple(processes), driver, silent=tuple(silent), limit_support=support)


class _WallFinder:
    """Finds the limits that the driver keeps for cgroups. It asks for each cgroup and GPU once."""

    def __init__(self, pynvml: ModuleType, support: LimitSupport) -> None:
        """
        Args:
            pynvml: NVML, open.
            support: Whether there are such limits.
        """
        self._pynvml = pynvml
        self._is_useless = support.backend == "none"
        self._readers: dict[str, cgroups.WallReader] = {}
        self._known: dict[tuple[str | None, str], Wall | None] = {}

    def add_to_gpu(self, state: GpuState, handle: Any) -> GpuState:
        """Return a GPU with the limit of this process's cgroup, and with the memory of the whole card."""
        wall = self._find("self", state.uuid, handle)
        if wall is None:
            return state
        card = nvml.read_card_memory(self._pynvml, handle)
        if card is None:
            return replace(state, wall=wall)
        return replace(state, wall=wall, total=card.total, used=card.used, reserved=card.reserved)

    def add_to_process(self, process: GpuProcess, handle: Any) -> GpuProcess:
        """Return a process on a GPU with the limit of its cgroup."""
        return replace(process, wall=self._find(process.pid, process.uuid, handle))

    def _find(self, process: int | str, uuid: str | None, handle: Any) -> Wall | None:
        cgroup = None if self._is_useless else cgroups.find_cgroup(process)
        if cgroup is None:
            return None
        if (uuid, cgroup) not in self._known:
            reader = self._readers.setdefault(cgroup, cgroups.WallReader(self._pynvml, cgroup))
            self._known[uuid, cgroup] = reader.read(handle)
        return self._known[uuid, cgroup]


# ---- the driver and its GPUs


def _read_driver(pynvml: ModuleType) -> DriverInfo:
    release = nvml.ask_or_none(pynvml, pynvml.nvmlSystemGetDriverVersion)
    cuda = nvml.ask_or_none(pynvml, pynvml.nvmlSystemGetCudaDriverVersion)
    return DriverInfo(
        release=None if release is None else nvml.decode_text(release),
        cuda=None if cuda is None else (cuda // 1000, cuda % 1000 // 10),
    )


def _read_states(pynvml: ModuleType, index: int, walls: _WallFinder) -> Iterator[tuple[GpuState, Any]]:
    """Yield the GPU, then its instances, each with its handle.

    Raises:
        NVMLError: It does not answer.
    """
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    parts = nvml.list_instances(pynvml, handle)
    whole = _read_state(pynvml, handle, GpuState(index, split=parts is not None))
    yield (walls.add_to_gpu(whole, handle) if parts is None else whole), handle
    for number, part in enumerate(parts or ()):
        yield _read_state(pynvml, part, GpuState(index, number)), part


def _read_state(pynvml: ModuleType, handle: Any, known: GpuState) -> GpuState:
    memory = nvml.read_memory_info(pynvml, handle)
    rates = nvml.ask_or_none(pynvml, pynvml.nvmlDeviceGetUtilizationRates, handle)
    return replace(
        known,
        uuid=nvml.decode_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=nvml.decode_text(pynvml.nvmlDeviceGetName(handle)),
        total=None if memory is None else memory.total,
        used=None if memory is None else memory.used,
        reserved=None if memory is None else memory.reserved,
        utilization=None if rates is None else int(rates.gpu),
    )


# ---- who uses them


def describe_process(state: GpuState, pid: int, memory: int | None) -> GpuProcess:
    """Return a process on a GPU, with what the kernel tells of it here.

    Args:
        state: The GPU.
        pid: Its number here.
        memory: Bytes it holds there. None: the driver does not say.
    """
    uid, ticks, boot = _read_owner(pid), _read_start_ticks(pid), _read_boot_time()
    return replace(
        _make_process(state, pid, memory),
        uid=uid,
        user=None if uid is None else get_user_name(uid),
        program=_read_program(pid),
        started=None if ticks is None or boot is None else boot + ticks / os.sysconf("SC_CLK_TCK"),
        start_ticks=ticks,
    )


def _make_process(state: GpuState, pid: int, memory: int | None) -> GpuProcess:
    return GpuProcess(state.index, pid, memory, state.instance, state.uuid)


def _read_owner(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def _read_program(pid: int) -> str | None:
    """Return the kernel's name of it, never its arguments, which may hold secrets."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def _read_start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since the machine did. None: it cannot be told."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The name, in parentheses, may hold blanks and parentheses.
            return int(file.read().rpartition(")")[2].split()[_START_FIELD])
    except (OSError, ValueError, IndexError):
        return None


def _read_boot_time() -> float | None:
    """Return when the machine started, in seconds since the epoch, by the clock on the wall. None: it is not told."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            return next(float(line.split()[1]) for line in file if line.startswith("btime "))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
