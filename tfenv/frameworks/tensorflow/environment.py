"""The environment variables that TensorFlow reads by itself."""

from __future__ import annotations

import re

from tfenv.errors import PROGRAM, Finding
from tfenv.policy.clamps import report_program_clamp
from tfenv.policy.model import Origin, Plan, format_origins

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

_UNIFIED = "TF_FORCE_UNIFIED_MEMORY"
ALLOW_GROWTH = "TF_FORCE_GPU_ALLOW_GROWTH"
_ALLOCATOR = "TF_GPU_ALLOCATOR"
_MIN_SYSTEM_MEMORY = "TF_DEVICE_MIN_SYS_MEMORY_IN_MB"


def prepare_environment(plan: Plan, environ: MutableMapping[str, str]) -> list[Finding]:
    """Clear the variables that would defeat the plan, and set the allocator that it asks for.

    Args:
        plan: What this process may use.
        environ: Changed in place. TensorFlow reads it when it creates an allocator.

    Returns:
        A note for each variable of the program that was cleared.
    """
    notes: list[Finding] = []
    limited = plan.limit is not None or any(device.limit is not None for device in plan.devices or ())
    if plan.growth and environ.get(ALLOW_GROWTH) == "false":
        by = () if plan.grown_by is None else (plan.grown_by,)
        notes.append(_clear_variable(environ, ALLOW_GROWTH, "memory growth is on", by))
    if plan.allocator == "bfc" and environ.get(_ALLOCATOR, "") not in ("", "bfc"):
        why = "the policy's allocator is bfc, the one that keeps a limit"
        notes.append(_clear_variable(environ, _ALLOCATOR, why, plan.allocated_by))
    elif plan.allocator not in (None, "bfc"):
        environ[_ALLOCATOR] = str(plan.allocator)
    if limited and _XLA_DEVICES.search(environ.get(_XLA_FLAGS, "")):
        notes.append(_remove_xla_devices(environ, plan.limits))
    if limited:
        notes += [_clear_variable(environ, name, why, plan.limits) for name, why in _DEFEATS_A_LIMIT if name in environ]
    return notes


_XLA_FLAGS = "TF_XLA_FLAGS"
#: The deprecated XLA_GPU devices have an allocator of their own, which no ConfigProto limits.
_XLA_DEVICES = re.compile(r"--?tf_xla_enable_xla_devices(?:=(?:true|1|t|yes))?(?![\w=-])", re.IGNORECASE)


def _remove_xla_devices(environ: MutableMapping[str, str], by: Sequence[Origin]) -> Finding:
    found = _XLA_DEVICES.search(environ[_XLA_FLAGS])
    asked = f"{_XLA_FLAGS} = {found[0] if found else ''}"
    environ[_XLA_FLAGS] = _XLA_DEVICES.sub("", environ[_XLA_FLAGS]).strip()
    text = f"{PROGRAM}'s {_XLA_FLAGS} asked for XLA_GPU devices, which cannot be limited"
    return report_program_clamp(f"{text}{_format_reason(by)}", by, (asked, "no XLA_GPU devices"))


_DEFEATS_A_LIMIT = (
    (_UNIFIED, "managed memory cannot be limited"),
    (_MIN_SYSTEM_MEMORY, "it would override a percentage"),
)


def _clear_variable(environ: MutableMapping[str, str], name: str, why: str, by: Sequence[Origin]) -> Finding:
    value = environ.pop(name)
    text = f"{PROGRAM}'s {name}={value} was cleared: {why}"
    return report_program_clamp(f"{text}{_format_reason(by)}", by, (f"{name} = {value}", ""))


def _format_reason(by: Sequence[Origin]) -> str:
    return f", as {format_origins(by)} says" if by else ""
