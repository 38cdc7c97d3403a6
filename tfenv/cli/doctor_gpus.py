"""`tfgpu doctor`'s rows on GPUs: the driver, what TensorFlow makes of it, Keras, and what costs people time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from tfenv.cli.diagnosis import Row
from tfenv.devices.usage import DriverInfo, GpuState, GpuUsage
from tfenv.errors import escape_for_terminal
from tfenv.explanation import Explanation
from tfenv.policy.model import Plan
from tfenv.policy.units import format_bytes

__all__ = ["gpu_rows", "tensorflow_rows"]

_GPU_BUILD = "pip install 'tensorflow[and-cuda]'"
#: The oldest driver on which programs of a CUDA major version run (NVIDIA's table of minor-version compatibility).
_OLDEST_DRIVER: Mapping[int, int] = {11: 450, 12: 525, 13: 580}


# ---- the driver


def gpu_rows(usage: GpuUsage) -> Iterator[Row]:
    """The driver, and the GPUs it shows."""
    if usage.problem is not None:
        yield _driverless(usage.problem)
        return
    yield Row("driver", "ok", _driver_text(usage.driver))
    working = [gpu for gpu in usage.gpus if not gpu.problem and gpu.instance is None]
    if working:
        names = [_gpu_text(gpu, usage) for gpu in working]
        yield Row(
            "GPUs",
            "ok",
            ", ".join(f"{names.count(name)} x {escape_for_terminal(name)}" for name in dict.fromkeys(names)),
        )
    elif not usage.gpus:
        yield Row("GPUs", "note", "the driver shows none", "see what `nvidia-smi -L` says")
    for gpu in usage.gpus:
        if gpu.problem:
            yield Row("GPUs", "problem", f"GPU {gpu.label} does not answer: {gpu.problem}")
    yield from _silence_rows(usage)


def _driverless(problem: str) -> Row:
    if os.path.exists("/dev/nvidiactl"):
        advice = "a driver is there: compare it with `nvidia-smi`, and restart after a driver update"
        return Row("driver", "problem", problem, advice)
    return Row("driver", "note", problem, "try policies with `tfgpu simulate`")


def _driver_text(driver: DriverInfo) -> str:
    cuda = "" if driver.cuda is None else f", CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"
    return f"{driver.release or 'of unknown release'}{cuda}"


def _gpu_text(gpu: GpuState, usage: GpuUsage) -> str:
    size = "" if gpu.total is None else f" {format_bytes(gpu.total)}"
    parts = sum(other.index == gpu.index and other.instance is not None for other in usage.gpus)
    split = f" in {parts} MIG instance{'' if parts == 1 else 's'}" if gpu.split else ""
    return f"{gpu.name}{size}{split}"


def _silence_rows(usage: GpuUsage) -> Iterator[Row]:
    """What this driver does not tell: percentages and free GPUs depend on it."""
    why = "this is WSL2, whose driver tells less" if os.path.exists("/dev/dxg") else "this driver or card does not say"
    if any(gpu.total is None and not gpu.problem for gpu in usage.gpus):
        yield Row(
            "GPUs", "note", f"the size of their memory is unknown: {why}", "write limits as sizes, not in per cent"
        )
    if usage.silent:
        yield Row("GPUs", "note", f"who uses GPU {', '.join(usage.silent)} is unknown: {why}")
    if usage.list_unseen():
        found = f"GPU {', '.join(usage.list_unseen())} is used by nobody that can be seen here"
        yield Row("GPUs", "note", found, "look outside of this container")


# ---- TensorFlow


def tensorflow_rows(seen: Mapping[str, Any], explanation: Explanation, usage: GpuUsage) -> Iterator[Row]:
    """What TensorFlow and Keras see, as the probe told."""
    yield from _too_old_rows(seen, usage.driver)
    yield _listed_row(seen, explanation)
    yield Row("devices", "ok" if seen["gpus"] else "note", _devices_text(seen))
    yield _default_row(seen)
    yield _keras_row(seen)
    yield from _several_rows(seen)


def _too_old_rows(seen: Mapping[str, Any], driver: DriverInfo) -> Iterator[Row]:
    """Within one major version of CUDA a program runs on older drivers; across them on none."""
    built, _, _ = str(seen["cuda_version"] or "").partition(".")
    if not built.isdigit() or driver.cuda is None or driver.cuda[0] >= int(built):
        return
    oldest = _OLDEST_DRIVER.get(int(built))
    needed = f"driver {oldest} or newer" if oldest else f"a driver for CUDA {built}"
    found = f"too old for TensorFlow {seen['version']}, which is built for CUDA {seen['cuda_version']}"
    yield Row("driver", "problem", f"{_driver_text(driver)}: {found}", f"install {needed}, or an older TensorFlow")


def _listed_row(seen: Mapping[str, Any], explanation: Explanation) -> Row:
    """Compare what TensorFlow lists with what the driver has and the policy leaves."""
    expected, listed = _expected(explanation), len(seen["gpus"])
    found = f"{seen['version']} lists {listed} GPU{'' if listed == 1 else 's'}"
    if not seen["cuda"]:
        return Row("TensorFlow", "problem" if expected else "note", f"{found}; it is not built for CUDA", _GPU_BUILD)
    found += f", built for CUDA{' ' + seen['cuda_version'] if seen['cuda_version'] else ''}"
    if listed < (expected or 0):
        missing = seen["missing_libraries"]
        libraries = f"; not found: {', '.join(missing)}" if missing else ""
        advice = _GPU_BUILD if missing else "see what TensorFlow says on stderr"
        return Row("TensorFlow", "problem", f"{found}; {expected} should be visible{libraries}", advice)
    if expected is not None and listed > expected:
        return Row("TensorFlow", "problem", f"{found}; the policy leaves {expected}", "see the row of the hook")
    return Row("TensorFlow", "ok", found)


def _expected(explanation: Explanation) -> int | None:
    """How many GPUs should be visible; None where that is not known."""
    if explanation.inventory.devices is None:
        return None
    plan = Plan() if explanation.disabled else explanation.plan
    count = len(explanation.inventory.devices if plan.devices is None else plan.devices)
    return count if plan.choosing is None else min(count, plan.choosing.count)


def _devices_text(seen: Mapping[str, Any]) -> str:
    """All physical devices, GPUs with name and compute capability."""
    gpus = {gpu["device"]: gpu for gpu in seen["gpus"]}
    return ", ".join(_device_text(gpus[name]) if name in gpus else name for name in seen["devices"])


def _device_text(gpu: Mapping[str, Any]) -> str:
    capability = f" (compute capability {gpu['capability']})" if gpu["capability"] else ""
    return f"{gpu['device']} {escape_for_terminal(gpu['name'])}{capability}".replace("  ", " ")


def _default_row(seen: Mapping[str, Any]) -> Row:
    if seen["gpus"]:
        return Row(
            "default device",
            "ok",
            f"{seen['gpus'][0]['device']} {escape_for_terminal(seen['gpus'][0]['name'])}".strip(),
        )
    return Row("default device", "note", "CPU:0", "" if seen["cuda"] else f"install the GPU build: {_GPU_BUILD}")


def _keras_row(seen: Mapping[str, Any]) -> Row:
    if seen["keras"] is None:
        return Row("Keras", "problem", f"cannot be imported: {seen['keras_error']}", "pip install keras")
    backend = seen["keras_backend"]
    if backend != "tensorflow":
        advice = "set KERAS_BACKEND=tensorflow; this policy does not govern other backends"
        return Row("Keras", "note", f"{seen['keras']} runs on {backend}", advice)
    sees = "sees TensorFlow's GPUs" if seen["gpus"] else "sees no GPU, as TensorFlow"
    return Row("Keras", "ok" if seen["gpus"] else "note", f"{seen['keras']} {sees}")


def _several_rows(seen: Mapping[str, Any]) -> Iterator[Row]:
    count = len(seen["gpus"])
    if count > 1:
        found = f"Keras trains on GPU:0 alone, of {count}, unless the model is built in a strategy's scope"
        advice = "build and compile it in `with tf.distribute.MirroredStrategy().scope():`"
        yield Row("several GPUs", "note", found, advice)
