"""Memory limits that the driver keeps for cgroups, from release 615 on. Everybody can read them, root can set them.

A limit is for one GPU and for all processes of a cgroup together, whatever program they run. There are two backends.
With "dmem" the kernel counts, and the limits of all cgroups above a process hold. With "misc" the driver counts, and
only the nearest limit holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from tfenv.devices import nvml
from tfenv.policy.model import Wall
from tfenv.values import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any, Literal

    Backend = Literal["dmem", "misc", "none"]

#: The driver takes paths below it, and no others.
CGROUP_ROOT = "/sys/fs/cgroup"
#: The release of the driver that brought these limits.
FIRST_RELEASE = 615
#: Lists what the kernel counts: a line "nvidia/0000:01:00.0/vidmem 85899345920" for each GPU.
_CAPACITY = f"{CGROUP_ROOT}/dmem.capacity"
#: Bytes of a file of the kernel that are read, a line of less than 100 for each GPU.
_LARGEST_FILE = 1 << 16
#: A cgroup that the kernel counts for has it.
_DMEM_FILE = "dmem.max"


@frozen
class CgroupLimits:
    """The limits of a cgroup on one GPU, as the driver tells them.

    Attributes:
        soft: Bytes that are kept free for it. 0: none are.
        hard: Bytes that its processes can take together. None: as many as there are.
        used: Bytes that they hold.
    """

    soft: int = 0
    hard: int | None = None
    used: int = 0


@frozen
class LimitSupport:
    """Whether limits for cgroups can be set here.

    Attributes:
        backend: Who counts: the kernel ("dmem"), the driver ("misc"), nobody ("none").
        problem: Why nobody does, in words. "": somebody does.
    """

    backend: Backend
    problem: str = ""

    def describe(self) -> str:
        """Return in words who keeps limits, or why nobody does."""
        if self.backend == "none":
            return self.problem
        counts = "the kernel counts (dmem)" if self.backend == "dmem" else "the driver itself counts (misc)"
        return f"the driver keeps limits for cgroups, and {counts}"


# ---- where a process is


def find_own_cgroup() -> str | None:
    """Return the cgroup of this process, as "/sys/fs/cgroup/user.slice/user-1001.slice/session-4.scope".

    It costs one read of a file.

    Returns:
        None: cgroup v2 is not what is mounted there, or this process's cgroup is not to be seen in this container.
    """
    return find_cgroup("self")


def find_cgroup(process: int | str) -> str | None:
    """Return the cgroup of a process. None: as `find_own_cgroup`, or there is no such process."""
    lines = _read_kernel_file(f"/proc/{process}/cgroup").splitlines()
    path = next((line[3:] for line in lines if line.startswith("0::/")), None)
    if path is None or path.startswith("/..") or not has_cgroup2():
        return None
    return f"{CGROUP_ROOT}{path}".rstrip("/")


def get_user_slice(uid: int) -> str:
    """Return the cgroup that systemd makes for all sessions of a user."""
    return f"{CGROUP_ROOT}/user.slice/user-{uid}.slice"


def has_cgroup2() -> bool:
    """Return whether cgroup v2 alone is mounted where the driver looks for it."""
    return os.path.exists(f"{CGROUP_ROOT}/cgroup.controllers")


def list_chain(cgroup: str) -> Iterator[str]:
    """Yield a cgroup and those above it, up to the root."""
    while cgroup.startswith(CGROUP_ROOT):
        yield cgroup
        cgroup = os.path.dirname(cgroup)


def is_counted_by_kernel(cgroup: str) -> bool:
    """Return whether a cgroup has the kernel's files for limits ("dmem"): only then it can have one of its own."""
    return os.path.exists(f"{cgroup}/{_DMEM_FILE}")


def find_uncounted(cgroup: str) -> str | None:
    """Return the topmost cgroup on the way to this one without the kernel's files. None: all have them.

    The root never has them.
    """
    below_root = [path for path in list_chain(cgroup) if path != CGROUP_ROOT]
    return next((path for path in reversed(below_root) if not is_counted_by_kernel(path)), None)


# ---- what the driver says


def read_support(pynvml: ModuleType) -> LimitSupport:
    """Return whether limits for cgroups can be set on this machine, and who counts."""
    if not _has_functions(pynvml):
        release = nvml.decode_text(nvml.ask_or_none(pynvml, pynvml.nvmlSystemGetDriverVersion) or "unknown")
        if not hasattr(pynvml, "nvmlDeviceGetMemoryLimits_v1"):
            return LimitSupport("none", "this nvidia-ml-py does not know limits for cgroups; install 13.615 or newer")
        text = f"driver {release} does not keep limits for cgroups; they came with release {FIRST_RELEASE}"
        return LimitSupport("none", text)
    if not has_cgroup2():
        return LimitSupport("none", f"cgroup v2 is not mounted on {CGROUP_ROOT}, where the driver needs it")
    return LimitSupport("dmem" if _read_region_lines(_CAPACITY) else "misc")


def _has_functions(pynvml: ModuleType) -> bool:
    if not hasattr(pynvml, "nvmlDeviceGetMemoryLimits_v1"):
        return False
    indices = range(pynvml.nvmlDeviceGetCount())
    handles = (nvml.ask_or_none(pynvml, pynvml.nvmlDeviceGetHandleByIndex, index) for index in indices)
    first = next((handle for handle in handles if handle is not None), None)
    return first is None or _has_function(pynvml, first)


def _has_function(pynvml: ModuleType, handle: Any) -> bool:
    try:
        _ask(pynvml, handle, CGROUP_ROOT)
    except pynvml.NVMLError as error:
        return type(error).__name__ != "NVMLError_FunctionNotFound"
    return True


def read_limits(pynvml: ModuleType, handle: Any, cgroup: str) -> CgroupLimits | None:
    """Return the limits of a cgroup on a GPU. One that cannot have its own gets those of the nearest above it.

    Returns:
        None: nothing is set, or the driver does not keep limits for this card (MIG) or at all.
    """
    try:
        limits = _ask(pynvml, handle, cgroup)
    except (pynvml.NVMLError, AttributeError):
        return None
    hard = int(limits.hardLimit)
    unlimited = hard == pynvml.NVML_DEVICE_MEMORY_LIMIT_MAX
    return CgroupLimits(int(limits.softLimit), None if unlimited else hard, int(limits.currentUsed))


def read_own_limits(pynvml: ModuleType, handle: Any, cgroup: str, backend: Backend) -> CgroupLimits | None:
    """Return the limits that are set on a cgroup itself, and not on one above it. None: none are.

    Args:
        pynvml: NVML, open.
        handle: The GPU.
        cgroup: Its full path.
        backend: Who counts, as `read_support` says.
    """
    if backend == "dmem":
        return read_limits(pynvml, handle, cgroup) if is_counted_by_kernel(cgroup) else None
    found = read_limits(pynvml, handle, cgroup)
    return None if found == read_limits(pynvml, handle, os.path.dirname(cgroup)) else found


def _ask(pynvml: ModuleType, handle: Any, cgroup: str) -> Any:
    limits = pynvml.c_nvmlGetMemoryLimits_v1_t()
    limits.nameSpace = os.fsencode(cgroup)
    pynvml.nvmlDeviceGetMemoryLimits_v1(handle, limits)
    return limits


def set_limits(pynvml: ModuleType, handle: Any, cgroup: str, limits: CgroupLimits) -> None:
    """Set the limits of a cgroup on a GPU. `used` does not matter.

    Raises:
        NVMLError: This user may not, or the cgroup cannot have limits.
    """
    wanted = pynvml.c_nvmlSetMemoryLimits_v1_t()
    wanted.nameSpace = os.fsencode(cgroup)
    wanted.softLimit = limits.soft
    wanted.hardLimit = pynvml.NVML_DEVICE_MEMORY_LIMIT_MAX if limits.hard is None else limits.hard
    pynvml.nvmlDeviceSetMemoryLimits_v1(handle, wanted)


@frozen
class LimitableGpu:
    """A GPU on which limits can be set.

    Attributes:
        index: As `nvidia-smi` counts.
        uuid: "GPU-…".
        total: Bytes that CUDA can give of the whole card.
        handle: NVML's own, until it is closed.
    """

    index: int
    uuid: str
    total: int
    handle: Any


@frozen
class LimitableGpus:
    """The GPUs of a machine, by whether limits can be set on them.

    Attributes:
        gpus: Those on which they can.
        split: The numbers of those that MIG splits: the driver keeps no limits for them.
        silent: The numbers of those that do not answer, and why.
    """

    gpus: tuple[LimitableGpu, ...]
    split: tuple[int, ...]
    silent: Mapping[int, str]


def list_limitable(pynvml: ModuleType) -> LimitableGpus:
    """Return all GPUs of this machine. One that does not answer hides no other."""
    gpus: list[LimitableGpu] = []
    split: list[int] = []
    silent: dict[int, str] = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = nvml.decode_text(pynvml.nvmlDeviceGetUUID(handle))
        except pynvml.NVMLError as error:
            silent[index] = nvml.explain_error(error)
            continue
        if nvml.list_instances(pynvml, handle) is not None:
            split.append(index)
            continue
        card = nvml.read_card_memory(pynvml, handle)
        if card is None:
            silent[index] = "the driver does not say how large it is"
        else:
            gpus.append(LimitableGpu(index, uuid, card.total, handle))
    return LimitableGpus(tuple(gpus), tuple(split), silent)


# ---- what holds for this process


class WallReader:
    """Finds what the driver lets this process take of each GPU.

    Where the driver keeps no such limits, it costs a question to the driver. Otherwise it costs one read of a file
    besides, and then a question for each GPU ("misc") or a read for each cgroup from the root down to the process that
    the kernel counts for ("dmem").
    """

    def __init__(self, pynvml: ModuleType, cgroup: str | None = None) -> None:
        """
        Args:
            pynvml: NVML, open.
            cgroup: The cgroup of another process, which counts instead. None: that of this process.
        """
        self._pynvml = pynvml
        self._cgroup = cgroup
        self._limited: list[str] | None = None  # None: nobody looked
        self._is_useless = not hasattr(pynvml, "nvmlDeviceGetMemoryLimits_v1")

    def read(self, handle: Any) -> Wall | None:
        """Return the limit that holds on a GPU. None: none does."""
        if self._is_useless:
            return None
        if self._limited is None:
            self._cgroup = (self._cgroup or find_own_cgroup()) if _has_function(self._pynvml, handle) else None
            self._limited = [] if self._cgroup is None else _list_limited(self._cgroup)
            self._is_useless = not self._limited
        if self._is_useless or self._cgroup is None:
            return None
        return _find_tightest(self._pynvml, handle, self._cgroup, self._limited)


def _list_limited(cgroup: str) -> list[str]:
    """Return the cgroups that the driver has to be asked about: with "dmem" those of the chain that are limited.

    With "misc" the driver tells of a cgroup what the nearest one above it has.
    """
    counted: dict[str, list[str]] = {}
    for path in reversed(list(list_chain(cgroup))):
        if lines := _read_region_lines(f"{path}/{_DMEM_FILE}"):
            counted[path] = lines
        elif path != CGROUP_ROOT:  # the root has no such file, and those below get it from above
            break
    if not counted:
        return [cgroup]
    return [path for path, lines in reversed(counted.items()) if any(not line.endswith(" max") for line in lines)]


def _read_region_lines(path: str) -> list[str]:
    return [line for line in _read_kernel_file(path).splitlines() if line.startswith("nvidia/")]


def _read_kernel_file(path: str) -> str:
    """Return what the kernel says in a file. "": it cannot be read. `open` takes three times as long."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.fsdecode(os.read(descriptor, _LARGEST_FILE))
    except OSError:
        return ""
    finally:
        os.close(descriptor)


def _find_tightest(pynvml: ModuleType, handle: Any, cgroup: str, asked: list[str]) -> Wall | None:
    found = [(path, limits) for path in asked if (limits := read_limits(pynvml, handle, path)) is not None]
    limited = [(limits.hard, limits, path) for path, limits in found if limits.hard is not None]
    if not limited:
        return None
    hard, limits, path = min(limited, key=lambda entry: entry[0])
    if path == cgroup and not is_counted_by_kernel(path):  # it may be that of one above
        same = (above for above in list_chain(cgroup) if read_limits(pynvml, handle, above) == limits)
        *_, path = same
    card = nvml.read_card_memory(pynvml, handle)
    chain = tuple(map(_read_id, list_chain(cgroup)))
    return Wall(hard, limits.used, path, _read_id(path), None if card is None else card.total, chain)


def _read_id(cgroup: str) -> int:
    """Return what names a cgroup in every container: its number in the kernel. 0: it is gone."""
    try:
        return os.stat(cgroup).st_ino
    except OSError:
        return 0


def find_reported_total(total: int | None, reserved: int | None, wall: Wall) -> int | None:
    """Return what CUDA reports as a card's memory, in bytes. It is the limit if the process's own cgroup has one.

    Args:
        total: Bytes that NVML's second version says CUDA can give. None: unknown.
        reserved: Bytes that it says the driver keeps. None: unknown.
        wall: The limit that holds.
    """
    if total is None or total + (reserved or 0) > wall.limit:
        return total
    return wall.limit if wall.card_total is None else min(wall.limit, wall.card_total)
