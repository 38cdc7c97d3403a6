"""What `tfgpu doctor` finds of GPUs: the driver, and what it shows and does not tell."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tfenv.cli.diagnosis.row import DoctorRow
from tfenv.cli.walls import group_walls
from tfenv.devices.cgroups import find_own_cgroup
from tfenv.devices.usage import DriverInfo, GpuState, GpuUsage
from tfenv.errors import escape_for_terminal
from tfenv.policy.units import format_bytes


def diagnose_gpus(usage: GpuUsage) -> Iterator[DoctorRow]:
    """Yield rows on the driver, and on the GPUs it shows."""
    if usage.problem is not None:
        yield _diagnose_missing_driver(usage.problem)
        return
    yield DoctorRow("driver", "ok", format_driver(usage.driver))
    working = [gpu for gpu in usage.gpus if not gpu.problem and gpu.instance is None]
    if working:
        names = [escape_for_terminal(_format_gpu(gpu, usage)) for gpu in working]
        found = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        yield DoctorRow("GPUs", "ok", found)
    elif not usage.gpus:
        yield DoctorRow("GPUs", "note", "the driver lists none", "compare it with the output of `nvidia-smi -L`")
    for gpu in usage.gpus:
        if gpu.problem:
            yield DoctorRow("GPUs", "problem", f"GPU {gpu.label} does not answer: {gpu.problem}")
    yield from _diagnose_silence(usage)
    if working:
        yield _diagnose_wall(usage)


def _diagnose_missing_driver(problem: str) -> DoctorRow:
    if os.path.exists("/dev/nvidiactl"):
        advice = "a driver is installed: run `nvidia-smi`, and reboot if the driver was updated"
        return DoctorRow("driver", "problem", problem, advice)
    return DoctorRow("driver", "note", problem, "try policies with `tfgpu simulate`")


def format_driver(driver: DriverInfo) -> str:
    """Return the driver's release and the CUDA that it has."""
    cuda = "" if driver.cuda is None else f", CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"
    return f"{driver.release or 'unknown version'}{cuda}"


def _format_gpu(gpu: GpuState, usage: GpuUsage) -> str:
    size = "" if gpu.total is None else f" {format_bytes(gpu.total)}"
    parts = sum(other.index == gpu.index and other.instance is not None for other in usage.gpus)
    split = f" in {parts} MIG instance{'' if parts == 1 else 's'}" if gpu.split else ""
    return f"{gpu.name}{size}{split}"


def _diagnose_wall(usage: GpuUsage) -> DoctorRow:
    """Return the row on the limits that the driver keeps for cgroups. That there are none is never a problem."""
    support = usage.limit_support
    if support is None or support.backend == "none":
        why = "" if support is None else support.problem
        return DoctorRow("wall", "note", "the driver of WSL2 keeps no limits for cgroups" if _is_wsl() else why)
    keeps = support.describe()
    whole = [gpu for gpu in usage.gpus if gpu.instance is None and not gpu.split]
    if not whole:
        return DoctorRow("wall", "note", f"{keeps}, but not for MIG instances")
    walls = [f"GPU {labels}: {text}" for labels, text in group_walls((gpu.label, gpu.wall) for gpu in whole)]
    if walls:
        return DoctorRow("wall", "ok", f"{keeps}; {'; '.join(walls)}")
    if find_own_cgroup() is None:
        return DoctorRow("wall", "note", f"{keeps}, but the cgroup of this process cannot be seen in this container")
    return DoctorRow("wall", "ok", f"{keeps}; none holds for this process")


def _is_wsl() -> bool:
    return os.path.exists("/dev/dxg")


def _diagnose_silence(usage: GpuUsage) -> Iterator[DoctorRow]:
    """Yield rows on what this driver does not tell. Percentages and free GPUs depend on it."""
    why = "the driver of WSL2 reports less" if _is_wsl() else "this driver or card does not report it"
    if any(gpu.total is None and not gpu.problem for gpu in usage.gpus):
        found = f"cannot tell how much memory they have: {why}"
        yield DoctorRow("GPUs", "note", found, "write limits as sizes, not percentages")
    if usage.silent:
        yield DoctorRow("GPUs", "note", f"cannot tell who uses GPU {', '.join(usage.silent)}: {why}")
    if usage.list_unseen():
        found = f"GPU {', '.join(usage.list_unseen())} is in use, but not by a process that is visible here"
        yield DoctorRow("GPUs", "note", found, "look outside this container")
