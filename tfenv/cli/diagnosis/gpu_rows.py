"""What `tfgpu doctor` finds of GPUs: the driver, what TensorFlow makes of it, Keras, and what costs people time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from tfenv.cli.diagnosis.row import DoctorRow
from tfenv.devices.usage import DriverInfo, GpuState, GpuUsage
from tfenv.errors import escape_for_terminal
from tfenv.explanation import Explanation
from tfenv.policy.model import Plan
from tfenv.policy.units import format_bytes

_GPU_BUILD = "pip install 'tensorflow[and-cuda]'"
#: The oldest driver on which programs of a CUDA major version run (NVIDIA's table of minor-version compatibility).
_OLDEST_DRIVER: Mapping[int, int] = {11: 450, 12: 525, 13: 580}


# ---- the driver


def diagnose_gpus(usage: GpuUsage) -> Iterator[DoctorRow]:
    """Yield rows on the driver, and on the GPUs it shows."""
    if usage.problem is not None:
        yield _diagnose_missing_driver(usage.problem)
        return
    yield DoctorRow("driver", "ok", _format_driver(usage.driver))
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


def _format_driver(driver: DriverInfo) -> str:
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


# ---- TensorFlow


def diagnose_tensorflow(seen: Mapping[str, Any], explanation: Explanation, usage: GpuUsage) -> Iterator[DoctorRow]:
    """Yield rows on what TensorFlow and Keras see.

    Args:
        seen: The probe's answer to "tensorflow".
        explanation: What the policy leaves visible.
        usage: What the driver shows.
    """
    yield from _diagnose_old_driver(seen, usage.driver)
    yield _diagnose_listing(seen, explanation)
    yield DoctorRow("devices", "ok" if seen["gpus"] else "note", _format_devices(seen))
    yield _diagnose_default_device(seen)
    yield _diagnose_keras(seen)
    yield from _diagnose_strategy(seen)


def _diagnose_old_driver(seen: Mapping[str, Any], driver: DriverInfo) -> Iterator[DoctorRow]:
    """Yield a row if the driver is too old. It may be older than TensorFlow within a major version of CUDA alone."""
    built, _, _ = str(seen["cuda_version"] or "").partition(".")
    if not built.isdigit() or driver.cuda is None or driver.cuda[0] >= int(built):
        return
    oldest = _OLDEST_DRIVER.get(int(built))
    needed = f"driver {oldest} or newer" if oldest else f"a driver for CUDA {built}"
    found = f"too old for TensorFlow {seen['version']}, which is built for CUDA {seen['cuda_version']}"
    yield DoctorRow(
        "driver", "problem", f"{_format_driver(driver)}: {found}", f"install {needed}, or an older TensorFlow"
    )


def _diagnose_listing(seen: Mapping[str, Any], explanation: Explanation) -> DoctorRow:
    """Compare the GPUs that TensorFlow lists with those that the driver has and the policy leaves."""
    expected, listed = _count_expected(explanation), len(seen["gpus"])
    found = f"{seen['version']} lists {listed} GPU{'' if listed == 1 else 's'}"
    if not seen["cuda"]:
        return DoctorRow(
            "TensorFlow", "problem" if expected else "note", f"{found}; it is not built for CUDA", _GPU_BUILD
        )
    found += f", built for CUDA{' ' + seen['cuda_version'] if seen['cuda_version'] else ''}"
    if listed < (expected or 0):
        missing = seen["missing_libraries"]
        libraries = f"; not found: {', '.join(missing)}" if missing else ""
        advice = _GPU_BUILD if missing else "read TensorFlow's messages on stderr"
        return DoctorRow("TensorFlow", "problem", f"{found}; {expected} should be visible{libraries}", advice)
    if expected is not None and listed > expected:
        return DoctorRow("TensorFlow", "problem", f"{found}; the policy allows {expected}", "see the hook's row")
    return DoctorRow("TensorFlow", "ok", found)


def _count_expected(explanation: Explanation) -> int | None:
    """Return how many GPUs should be visible. None if that is not known."""
    if explanation.inventory.devices is None:
        return None
    plan = Plan() if explanation.disabled else explanation.plan
    count = len(explanation.inventory.devices if plan.devices is None else plan.devices)
    return count if plan.choosing is None else min(count, plan.choosing.count)


def _format_devices(seen: Mapping[str, Any]) -> str:
    gpus = {gpu["device"]: gpu for gpu in seen["gpus"]}
    return ", ".join(_format_device(gpus[name]) if name in gpus else name for name in seen["devices"])


def _format_device(gpu: Mapping[str, Any]) -> str:
    capability = f" (compute capability {gpu['capability']})" if gpu["capability"] else ""
    return f"{gpu['device']} {escape_for_terminal(gpu['name'])}{capability}".replace("  ", " ")


def _diagnose_default_device(seen: Mapping[str, Any]) -> DoctorRow:
    if seen["gpus"]:
        first = seen["gpus"][0]
        found = f"{first['device']} {escape_for_terminal(first['name'])}".strip()
        return DoctorRow("default device", "ok", found)
    return DoctorRow("default device", "note", "CPU:0", "" if seen["cuda"] else f"install the GPU build: {_GPU_BUILD}")


def _diagnose_keras(seen: Mapping[str, Any]) -> DoctorRow:
    if seen["keras"] is None:
        return DoctorRow("Keras", "problem", f"cannot be imported: {seen['keras_error']}", "pip install keras")
    backend = seen["keras_backend"]
    if backend != "tensorflow":
        advice = "set KERAS_BACKEND=tensorflow; this policy does not govern other backends"
        return DoctorRow("Keras", "note", f"{seen['keras']} runs on {backend}", advice)
    sees = "sees TensorFlow's GPUs" if seen["gpus"] else "sees no GPU, like TensorFlow"
    return DoctorRow("Keras", "ok" if seen["gpus"] else "note", f"{seen['keras']} {sees}")


def _diagnose_strategy(seen: Mapping[str, Any]) -> Iterator[DoctorRow]:
    count = len(seen["gpus"])
    if count > 1:
        found = f"Keras trains on only one of {count} GPUs, GPU:0, unless you build the model in a strategy's scope"
        advice = "build and compile it in `with tf.distribute.MirroredStrategy().scope():`"
        yield DoctorRow("several GPUs", "note", found, advice)
