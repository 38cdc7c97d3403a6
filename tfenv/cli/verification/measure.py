"""How `tfgpu verify` measures a framework: it plans what to take, lets a child take it, and asks NVML meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tfenv.audit.query import LoggedRecord, list_logged_devices
from tfenv.cli.diagnosis.interpreter import NoAnswerError, build_framework_command
from tfenv.cli.process_records import read_user_records
from tfenv.cli.verification.child import ChildProgram
from tfenv.cli.verification.measurement import FrameworkMeasurement, GpuMeasurement, Promise, judge_growth
from tfenv.devices import nvml
from tfenv.devices.usage import GpuState, GpuUsage, describe_process, read_usage
from tfenv.frameworks.registry import get_framework
from tfenv.pipeline import current_start, load
from tfenv.policy.model import MemoryLimit, Plan, PlannedDevice
from tfenv.policy.units import MIB
from tfenv.values import replace

#: Into so many pieces a limit is cut: what is left of it when a piece is refused is less than one.
_PIECES = 64
#: What is taken of a GPU that nothing limits.
MODEST_BYTES = 64 * MIB


def measure_framework(name: str, python: str, plan: Plan, timeout_s: float) -> FrameworkMeasurement:
    """Let a framework take memory of its GPUs until it is refused, and measure what it got.

    Args:
        name: Its package. It is installed in that interpreter.
        python: The interpreter.
        plan: What the policy promises of it.
        timeout_s: Seconds until the child must be done. It may wait for a free GPU.

    Raises:
        OSError: There is no such interpreter.
    """
    made = FrameworkMeasurement(name, get_framework(name).title)
    options = ["modest"] if find_unlimited(plan) and plan.growth is not True else []
    command = build_framework_command(python, name, "fill", options)
    before = read_usage()
    try:
        with ChildProgram(command, {}, timeout_s) as child:
            return _measure_child(child, made, plan, before)
    except NoAnswerError as error:
        return replace(made, problem=Promise("unproven", str(error)))


def find_unlimited(plan: Plan) -> bool:
    """Return whether the process may see a GPU that nothing limits."""
    if plan.devices is None:
        return plan.limit is None
    return any(is_unlimited(device.limit, device.total) for device in plan.devices)


def is_unlimited(limit: MemoryLimit | None, total: int | None) -> bool:
    """Return whether a limit leaves a card of `total` bytes (None: unknown) whole."""
    size = None if limit is None else limit.on(total)
    return limit is None or limit.unlimited or (size is not None and total is not None and size >= total)


def _measure_child(
    child: ChildProgram, made: FrameworkMeasurement, plan: Plan, before: GpuUsage
) -> FrameworkMeasurement:
    listed = child.read()
    gpus = tuple(_identify(shown, before) for shown in listed["gpus"])
    made = replace(made, version=listed["version"], visible=_judge_visibility(gpus, plan, built=listed["cuda"]))
    if not gpus:
        return made
    planned = [_find_planned(gpu.uuid, plan) for gpu in gpus]
    child.send({"parts": [max(1, len(device.logical_devices)) if device else 1 for device in planned]})
    child.read()
    records = _read_records(child.pid)
    gpus = tuple(_promise(gpu, plan, records, shown) for gpu, shown in zip(gpus, listed["gpus"], strict=True))
    gpus = tuple(replace(gpu, first=_read_memory(child.pid, gpu, before)) for gpu in gpus)
    child.send({"gpus": [{"piece": gpu.piece, "stop": _find_stop(gpu)} for gpu in gpus]})
    taken = child.read()["gpus"]
    after = read_usage()
    gpus = tuple(_complete(gpu, child.pid, result, before, after) for gpu, result in zip(gpus, taken, strict=True))
    return replace(made, gpus=gpus, growth=judge_growth(gpus, promised=plan.growth is True))


# ---- which GPU


def _strip_uuid(uuid: str) -> str:
    """Return the digits of a UUID, as CUDA gives them, of "GPU-…" or "MIG-…"."""
    return uuid.partition("-")[2].replace("-", "").lower() or uuid


def _identify(shown: Mapping[str, Any], usage: GpuUsage) -> GpuMeasurement:
    state = next((gpu for gpu in usage.gpus if gpu.uuid and _strip_uuid(gpu.uuid) == shown["uuid"]), None)
    if state is None or state.uuid is None:
        return GpuMeasurement(None, shown["uuid"])
    return GpuMeasurement(state.label, state.uuid, state.name)


def _find_planned(uuid: str, plan: Plan) -> PlannedDevice | None:
    devices = plan.devices or ()
    return next((device for device in devices if device.device is not None and device.device.uuid == uuid), None)


def _judge_visibility(gpus: Sequence[GpuMeasurement], plan: Plan, *, built: bool) -> Promise:
    """Compare the GPUs that the framework lists with those of the plan."""
    if not gpus and not built:
        return Promise("none", "it is not built for CUDA")
    if plan.devices is None:
        return Promise() if gpus else Promise("unproven", "it lists no GPU, see `tfgpu doctor`")
    strange = [gpu for gpu in gpus if _find_planned(gpu.uuid, plan) is None]
    if strange and all(device.device is not None for device in plan.devices):
        labels = ", ".join(gpu.label or gpu.uuid for gpu in strange)
        return Promise("broken", f"it lists GPU {labels}, which the policy hides")
    expected = len(plan.devices) if plan.choosing is None else min(plan.choosing.count, len(plan.devices))
    if len(gpus) > expected:
        return Promise("broken", f"it lists {len(gpus)} GPUs, and the policy leaves {expected}")
    if len(gpus) < expected:
        return Promise("unproven", f"it lists {len(gpus)} of {expected} GPUs, see `tfgpu doctor`")
    return Promise("kept")


# ---- how much


def _promise(
    gpu: GpuMeasurement, plan: Plan, records: Iterable[LoggedRecord], shown: Mapping[str, Any]
) -> GpuMeasurement:
    """Add the limit: the plan's, or what the process recorded if that is less."""
    planned, total = _find_planned(gpu.uuid, plan), shown["total"]
    limit = planned.limit if planned is not None else plan.limit
    size = None if limit is None or is_unlimited(limit, total) else limit.on(total)
    if size is None:  # a limit on record is the framework's own
        return replace(gpu, piece=MODEST_BYTES)
    size = min(size, *_list_recorded_limits(gpu, records, total), total)
    return replace(gpu, limit=size, piece=max(MIB, size // _PIECES // MIB * MIB))


def _list_recorded_limits(gpu: GpuMeasurement, records: Iterable[LoggedRecord], total: int) -> Iterable[int]:
    for record in records:
        for device in list_logged_devices(record):
            size, fraction = device.get("limit_bytes"), device.get("limit_fraction")
            if device.get("uuid") == gpu.uuid and isinstance(size, int):
                yield size
            elif device.get("uuid") == gpu.uuid and isinstance(fraction, float):
                yield int(fraction * total)


def _find_stop(gpu: GpuMeasurement) -> int:
    """Return how much the child takes at most: one piece more than it may, which shows that nothing refuses it."""
    return 0 if gpu.limit is None else gpu.limit


def _read_records(pid: int) -> tuple[LoggedRecord, ...]:
    process = describe_process(GpuState(0), pid, None)
    found = read_user_records([process], load(current_start()).policy.audit).get(os.geteuid())
    return () if found is None else found.by_pid.get(pid, ())


# ---- what NVML says


def _complete(
    gpu: GpuMeasurement, pid: int, result: Mapping[str, Any], before: GpuUsage, after: GpuUsage
) -> GpuMeasurement:
    """Add what the framework gave, and what NVML says of it."""
    state = _find_state(gpu, after)
    free = None if state is None or state.total is None or state.used is None else max(0, state.total - state.used)
    wall = None if state is None else state.wall
    return replace(
        gpu,
        allocated=result["allocated"],
        refusal=result["refused"],
        error=result["error"],
        memory=_find_memory(pid, gpu, before, after),
        is_process=_counts_processes(),
        card_free=free,
        wall_free=None if wall is None else max(0, wall.limit - wall.used),
    )


def _counts_processes() -> bool:
    return nvml.counts_pids_as_here()


def _read_memory(pid: int, gpu: GpuMeasurement, before: GpuUsage) -> int | None:
    return _find_memory(pid, gpu, before, read_usage())


def _find_memory(pid: int, gpu: GpuMeasurement, before: GpuUsage, now: GpuUsage) -> int | None:
    """Return what a process holds of a GPU, or else by how much more of it is in use than before."""
    if _counts_processes():
        held = (process.memory for process in now.processes if process.pid == pid and process.uuid == gpu.uuid)
        return next(held, None)
    was, state = _find_state(gpu, before), _find_state(gpu, now)
    if was is None or state is None or was.used is None or state.used is None:
        return None
    return max(0, state.used - was.used)


def _find_state(gpu: GpuMeasurement, usage: GpuUsage) -> GpuState | None:
    return next((state for state in usage.gpus if state.uuid == gpu.uuid), None)
