"""What `tfgpu doctor` finds of the frameworks in an environment, and of Keras on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tfenv.cli.diagnosis.gpu_rows import format_driver
from tfenv.cli.diagnosis.row import DoctorRow, Verdict
from tfenv.cli.framework_plan import make_framework_plan
from tfenv.devices.usage import DriverInfo, GpuUsage
from tfenv.errors import escape_for_terminal
from tfenv.explanation import Explanation
from tfenv.frameworks.registry import get_framework, list_frameworks
from tfenv.policy.model import Plan

#: The oldest driver on which programs of a CUDA major version run (NVIDIA's table of minor-version compatibility).
_OLDEST_DRIVER: Mapping[int, int] = {11: 450, 12: 525, 13: 580}


def diagnose_no_frameworks() -> DoctorRow:
    """Return the row of an environment without any framework."""
    titles = ", ".join(get_framework(name).title for name in list_frameworks())
    return DoctorRow("frameworks", "note", f"none of {titles} is installed in that environment")


def diagnose_framework(
    name: str, seen: Mapping[str, Any], explanation: Explanation, usage: GpuUsage, *, only_build: bool
) -> Iterator[DoctorRow]:
    """Yield rows on what a framework sees.

    Args:
        name: Its package.
        seen: Its answer to "describe".
        explanation: What the policy leaves visible.
        usage: What the driver shows.
        only_build: Whether no other framework there is built for CUDA.
    """
    title = get_framework(name).title
    yield from _diagnose_old_driver(title, seen, usage.driver)
    yield _diagnose_listing(name, seen, explanation, only_build=only_build)
    if "devices" in seen:
        yield DoctorRow("devices", "ok" if seen["gpus"] else "note", _format_devices(seen))
        yield _diagnose_default_device(seen)
    yield from _diagnose_several_gpus(seen)


def _diagnose_old_driver(title: str, seen: Mapping[str, Any], driver: DriverInfo) -> Iterator[DoctorRow]:
    """Yield a row if the driver is too old. It may be older than the framework within a major version of CUDA alone."""
    built, _, _ = str(seen["cuda_version"] or "").partition(".")
    if not built.isdigit() or driver.cuda is None or driver.cuda[0] >= int(built):
        return
    oldest = _OLDEST_DRIVER.get(int(built))
    needed = f"driver {oldest} or newer" if oldest else f"a driver for CUDA {built}"
    found = f"too old for {title} {seen['version']}, which is built for CUDA {seen['cuda_version']}"
    yield DoctorRow("driver", "problem", f"{format_driver(driver)}: {found}", f"install {needed}, or an older {title}")


def _diagnose_listing(name: str, seen: Mapping[str, Any], explanation: Explanation, *, only_build: bool) -> DoctorRow:
    """Compare the GPUs that the framework lists with those that the driver has and the policy leaves."""
    title, listed = get_framework(name).title, len(seen["gpus"])
    expected = _count_expected(explanation, make_framework_plan(name, explanation))
    # A framework to which others leave no memory may list GPUs that it cannot use.
    most = _count_expected(explanation, Plan() if explanation.disabled else explanation.plan)
    found = f"{seen['version']} lists {listed} GPU{'' if listed == 1 else 's'}"
    if not seen["cuda"]:
        verdict: Verdict = "problem" if expected and only_build else "note"
        return DoctorRow(title, verdict, f"{found}; it is not built for CUDA", seen["install"])
    found += f", built for CUDA{' ' + seen['cuda_version'] if seen['cuda_version'] else ''}"
    if listed < (expected or 0):
        problem = f"; {seen['problem']}" if seen["problem"] else ""
        advice = seen["install"] if problem else f"read {title}'s messages on stderr"
        return DoctorRow(title, "problem", f"{found}; {expected} should be visible{problem}", advice)
    if most is not None and listed > most:
        return DoctorRow(title, "problem", f"{found}; the policy allows {most}", "see the hook's row")
    names = "" if "devices" in seen or not listed else f": {_list_devices(seen)}"
    return DoctorRow(title, "ok", f"{found}{names}")


def _count_expected(explanation: Explanation, plan: Plan) -> int | None:
    """Return how many GPUs a plan leaves visible. None if that is not known."""
    if explanation.inventory.devices is None:
        return None
    count = len(explanation.inventory.devices if plan.devices is None else plan.devices)
    return count if plan.choosing is None else min(count, plan.choosing.count)


def _list_devices(seen: Mapping[str, Any]) -> str:
    return ", ".join(_format_device(gpu) for gpu in seen["gpus"])


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
    return DoctorRow(
        "default device", "note", "CPU:0", "" if seen["cuda"] else f"install the GPU build: {seen['install']}"
    )


def _diagnose_several_gpus(seen: Mapping[str, Any]) -> Iterator[DoctorRow]:
    count = len(seen["gpus"])
    if count > 1 and "several_gpus" in seen:
        found = f"Keras trains on only one of {count} GPUs, GPU:0, unless you build the model in a strategy's scope"
        yield DoctorRow("several GPUs", "note", found, seen["several_gpus"])


# ---- Keras


def diagnose_keras(backend: str, answers: Mapping[str, Mapping[str, Any]]) -> Iterator[DoctorRow]:
    """Yield a row on the framework that Keras computes with.

    Args:
        backend: That framework's package.
        answers: What each framework answered to "describe", the backend's with what it says of Keras.
    """
    if backend not in list_frameworks():
        yield DoctorRow("Keras", "note", f"runs on {backend}, which no policy applies to")
        return
    title, seen = get_framework(backend).title, answers.get(backend)
    if seen is None:
        found = f"runs on {title}, which does not work in that environment"
        yield DoctorRow("Keras", "problem", found, "set KERAS_BACKEND to a framework that does")
    elif seen["keras"] is None:
        yield DoctorRow("Keras", "problem", f"cannot be imported: {seen['keras_error']}", "pip install keras")
    else:
        count = len(seen["gpus"])
        sees = f"which has {count} GPU{'' if count == 1 else 's'}" if count else "which sees no GPU"
        yield DoctorRow("Keras", "ok" if count else "note", f"{seen['keras']} runs on {title}, {sees}")
