"""What `tfgpu doctor` finds of GPUs: the driver, and what it shows and does not tell."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tfenv.cli.diagnosis.row import DoctorRow
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


def _diagnose_silence(usage: GpuUsage) -> Iterator[DoctorRow]:
    """Yield rows on what this driver does not tell. Percentages and free GPUs depend on it."""
    why = "the driver of WSL2 reports less" if os.path.exists("/dev/dxg") else "this driver or card does not report it"
    if any(gpu.total is None and not gpu.problem for gpu in usage.gpus):
        found = f"cannot tell how much memory they have: {why}"
        yield DoctorRow("GPUs", "note", found, "write limits as sizes, not percentages")
    if usage.silent:
        yield DoctorRow("GPUs", "note", f"cannot tell who uses GPU {', '.join(usage.silent)}: {why}")
    if usage.list_unseen():
        found = f"GPU {', '.join(usage.list_unseen())} is in use, but not by a process that is visible here"
        yield DoctorRow("GPUs", "note", found, "look outside this container")
