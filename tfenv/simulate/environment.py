"""Describes simulated GPUs, and gives a child process the environment that shows them to it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tfenv.policy.units import MIB, format_bytes, parse_limit
from tfenv.simulate.build import PRELOADED, build_libraries
from tfenv.values import frozen

#: How many GPUs the stub libraries can simulate (MAX_GPUS in machine.h).
MAX_GPUS = 32
#: Into how many MIG instances each can be split (MAX_INSTANCES in machine.h).
MAX_INSTANCES = 7
_NAME_BYTES = 95
_GROUP = re.compile(
    r"(?:(?P<count>\d{1,4}) ?x ?)?(?P<size>\d[^:x/]*)(?:/mig=(?P<instances>[^:/]*))?(?::(?P<name>.*))?",
    re.ASCII | re.DOTALL,
)
_SIZE = re.compile(r"\d{1,15}(?:\.\d{1,6})? ?[A-Za-z]+", re.ASCII)
_INSTANCES = re.compile(r"(?:(?P<count>\d{1,4}) ?x ?)?(?P<size>[^x]+)", re.ASCII)


@frozen
class SimulatedGpu:
    """One GPU that is not there.

    Attributes:
        memory: Its memory in bytes, as NVML tells it. Only whole MiB count, here and below.
        name: Product name, as NVML and TensorFlow show it.
        capability: Compute capability, "major.minor". TensorFlow ignores GPUs below 3.5 or what it was built for.
        multiprocessors: TensorFlow ignores GPUs that have fewer than 8 beside bigger ones.
        utilisation: What NVML reports, in per cent.
        instances: Memory in bytes of its MIG instances. () when it is not split.
        reserved: Bytes of its memory that the driver keeps for itself. CUDA gives the rest.
        context: Bytes that each process takes by opening it.
        cgroup_limits: Who keeps limits for cgroups: nobody ("none"), as with older drivers, the kernel ("dmem"), the
            kernel for cgroups down to a depth ("dmem/2"), or the driver ("misc"). All GPUs of a machine have the same.
    """

    memory: int
    name: str = "Simulated GPU"
    capability: str = "8.0"
    multiprocessors: int = 108
    utilisation: int = 0
    instances: tuple[int, ...] = ()
    reserved: int = 0
    context: int = 0
    cgroup_limits: str = "none"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"none|misc|dmem(/\d{1,2})?", self.cgroup_limits, re.ASCII):
            text = f'"{self.cgroup_limits}" does not say who keeps limits for cgroups'
            raise ValueError(f'{text}; write "dmem", "dmem/2", "misc" or "none"')
        if self.memory < MIB:
            raise ValueError(f"a simulated GPU needs at least 1 MiB, not {self.memory} bytes")
        if not re.fullmatch(r"\d{1,2}\.\d", self.capability, re.ASCII):
            raise ValueError(f'"{self.capability}" is not a compute capability; write "8.0"')
        if not 0 <= self.reserved < self.memory or self.context < 0:
            sizes = f"{format_bytes(self.reserved)} reserved and {format_bytes(self.context)} per context"
            text = f"cannot simulate a GPU of {format_bytes(self.memory)} with {sizes}"
            raise ValueError(f"{text}; reserve less than its memory")
        _check_name(self.name)
        _check_instances(self.instances, self.memory)


def _check_name(name: str) -> None:
    # ',' and ':' separate items in TFGPU_SIMULATE. NVML's buffer for names has 96 bytes.
    if not name.isprintable() or not name.strip() or set(name) & set(",:"):
        raise ValueError(f'{name!r} is not a name for a GPU; write one such as "NVIDIA A100", without "," and ":"')
    if len(name.encode()) > _NAME_BYTES:
        raise ValueError(f'the name "{name}" is too long; at most {_NAME_BYTES} bytes are allowed')


def _check_instances(instances: Sequence[int], memory: int) -> None:
    if len(instances) > MAX_INSTANCES:
        raise ValueError(f"a GPU has at most {MAX_INSTANCES} MIG instances, not {len(instances)}")
    if sum(instances) > memory:
        text = f"{format_bytes(sum(instances))} of MIG instances do not fit into a GPU of {format_bytes(memory)}"
        raise ValueError(f'{text}; write "80GiB/mig=2x40GiB"')
    if any(instance < MIB for instance in instances):
        raise ValueError("a MIG instance needs at least 1 MiB")


def parse_gpus(text: str) -> tuple[SimulatedGpu, ...]:
    """Read a description of GPUs.

    Args:
        text: "4x24GiB", "2x24GiB,1x80GiB", with names "2x24GiB:NVIDIA A100,80GiB:NVIDIA H100", split into MIG
            instances "80GiB/mig=1x40GiB+2x20GiB:NVIDIA A100".

    Raises:
        ValueError: Its text says what is wrong and what would be right.
    """
    gpus = tuple(gpu for group in text.split(",") for gpu in _parse_group(group.strip(), text))
    if len(gpus) > MAX_GPUS:
        raise ValueError(f'"{text}" describes {len(gpus)} GPUs; at most {MAX_GPUS} can be simulated')
    return gpus


def _parse_group(group: str, text: str) -> tuple[SimulatedGpu, ...]:
    match = _GROUP.fullmatch(group)
    if match is None:
        raise ValueError(f'"{text}" does not describe GPUs; write "4x24GiB" or "2x24GiB:NVIDIA A100,1x80GiB"')
    count = int(match["count"] or 1)
    if not 1 <= count <= MAX_GPUS:
        raise ValueError(f'"{group}" asks for {count} GPUs; write a number from 1 to {MAX_GPUS}')
    name = SimulatedGpu.name if match["name"] is None else match["name"].strip()
    size = parse_size(match["size"], "the size of a GPU")
    gpu = SimulatedGpu(size, name, instances=_parse_instances(match["instances"]))
    return (gpu,) * count


def parse_size(text: str, what: str = "a size") -> int:
    """Parse a size such as "24GiB" to bytes.

    Args:
        text: What somebody wrote.
        what: How the message names it.

    Raises:
        ValueError: The text is not a size. The message says what would be right.
    """
    # "40%" and "none" are limits, but not sizes.
    size = parse_limit(text).bytes if _SIZE.fullmatch(text.strip()) else None
    if size is None:
        raise ValueError(f'"{text}" is not {what}; write "24GiB"')
    return size


def _parse_instances(text: str | None) -> tuple[int, ...]:
    """Return the sizes in "1x40GiB+2x20GiB"."""
    sizes: list[int] = []
    for item in () if text is None else text.split("+"):
        match = _INSTANCES.fullmatch(item.strip())
        if match is None:
            raise ValueError(f'"{text}" does not describe MIG instances; write "2x20GiB" or "1x40GiB+2x20GiB"')
        sizes += [parse_size(match["size"], "the size of a MIG instance")] * min(int(match["count"] or 1), MAX_GPUS)
    if text is not None and not sizes:
        raise ValueError(f'"{text}" has no MIG instances; leave "/mig=" out')
    return tuple(sizes)


def build_environment(
    gpus: Sequence[SimulatedGpu],
    *,
    log: str | os.PathLike[str] | None = None,
    processes: str | os.PathLike[str] | None = None,
    libraries: str | os.PathLike[str] | None = None,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the whole environment for a child process that is to see `gpus` and no others.

    Args:
        gpus: In the order of their PCI buses. Empty: a driver without a GPU.
        log: File to which each request to the driver is appended as a JSON line. Without it processes
            do not see what the others allocate, neither in CUDA's free memory nor in NVML.
        processes: File of "<gpu> <pid> <MiB>" lines, memory that other users' processes hold, of a MIG
            instance "<gpu>:<instance> <pid> <MiB>". It is read anew at each request, so it may change meanwhile. The
            child complains on stderr of a file that cannot be read.
        libraries: Folder with the stub libraries. None: they are built, unless they are in the user's cache.
        base: What the child inherits besides. None: this process's environment.

    Raises:
        SimulationError: The stub libraries could not be built.
        ValueError: More GPUs than can be simulated, or GPUs that differ in who keeps limits for cgroups.
    """
    if len(gpus) > MAX_GPUS:
        raise ValueError(f"at most {MAX_GPUS} GPUs can be simulated, not {len(gpus)}")
    if len({gpu.cgroup_limits for gpu in gpus}) > 1:
        raise ValueError("one driver keeps the limits for cgroups; give all GPUs the same cgroup_limits")
    result = dict(os.environ if base is None else base)
    inherited = result.get("LD_LIBRARY_PATH")
    folder = os.fspath(libraries or build_libraries())
    result["LD_LIBRARY_PATH"] = f"{folder}:{inherited}" if inherited else folder
    preloaded = result.get("LD_PRELOAD")
    ours = f"{folder}/{PRELOADED}"
    result["LD_PRELOAD"] = f"{ours}:{preloaded}" if preloaded else ours
    result["TFGPU_SIMULATE"] = _encode_gpus(gpus)
    for variable, path in (("TFGPU_SIMULATE_LOG", log), ("TFGPU_SIMULATE_PROCESSES", processes)):
        result.pop(variable, None)
        if path is not None:
            result[variable] = str(Path(path).absolute())  # children change directory
    return result


def _encode_gpus(gpus: Sequence[SimulatedGpu]) -> str:
    """Return the value of TFGPU_SIMULATE, as machine.h describes it."""
    columns = {
        "memory_mib": [str(gpu.memory // MIB) for gpu in gpus],
        "reserved_mib": [str(gpu.reserved // MIB) for gpu in gpus],
        "context_mib": [str(gpu.context // MIB) for gpu in gpus],
        "name": [gpu.name for gpu in gpus],
        "capability": [gpu.capability for gpu in gpus],
        "multiprocessors": [str(gpu.multiprocessors) for gpu in gpus],
        "utilisation": [str(gpu.utilisation) for gpu in gpus],
        "cgroup_limits": [gpu.cgroup_limits for gpu in gpus],
        "mig": ["+".join(str(size // MIB) for size in gpu.instances) or "0" for gpu in gpus],
    }
    return ",".join([f"count={len(gpus)}", *(f"{key}={':'.join(values)}" for key, values in columns.items())])
