"""The environment variables that decide what a client of JAX takes."""

from __future__ import annotations

import os
import re

from tfenv.errors import PROGRAM, Finding
from tfenv.policy.clamps import report_program_clamp
from tfenv.policy.model import Plan, format_origins

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

_UNIFIED = "TF_FORCE_UNIFIED_MEMORY"
_FLAGS = "XLA_FLAGS"
#: Flags that take memory beside the fraction, or replace it.
_DEFEATING_FLAGS = re.compile(
    r"--?xla_gpu_(?:memory_fraction_policy=\S*|temp_buffer_use_separate_color(?:=(?!false|0)\S*)?)(?!\S)", re.IGNORECASE
)
_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
_ALLOCATOR = "XLA_PYTHON_CLIENT_ALLOCATOR"
#: JAX refuses both together.
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
#: The variable that JAX makes an option of, where the options that a program lists do not say it.
_VARIABLES = {
    "preallocate": (_PREALLOCATE,),
    "allocator": (_ALLOCATOR,),
    "memory_fraction": _FRACTIONS,
    "memory_fraction_policy": _FRACTIONS,
    "collective_memory_size": ("XLA_PYTHON_CLIENT_COLLECTIVE_MEM_SIZE_MB",),
}


def prepare_environment(plan: Plan, environ: MutableMapping[str, str]) -> list[Finding]:
    """Clear the variables that would defeat a limit.

    Args:
        plan: What JAX may use.
        environ: Changed in place. JAX reads it when it creates a client.

    Returns:
        A note for each variable of the program that was cleared.
    """
    if not plan.limits:
        return []
    notes = []
    if _UNIFIED in environ:
        value = environ.pop(_UNIFIED)
        notes.append(_report_cleared(plan, f"{_UNIFIED} = {value}", "managed memory cannot be limited"))
    found = _DEFEATING_FLAGS.findall(environ.get(_FLAGS, ""))
    if found:
        environ[_FLAGS] = _DEFEATING_FLAGS.sub("", environ[_FLAGS]).strip()
        notes.append(_report_cleared(plan, f"{_FLAGS} = {' '.join(found)}", "it would take memory beside the limit"))
    return notes


def _report_cleared(plan: Plan, asked: str, why: str) -> Finding:
    text = f"{PROGRAM}'s {asked} was cleared: {why}, as {format_origins(plan.limits)} says"
    return report_program_clamp(text, plan.limits, (asked, ""))


def find_sources(environ: Mapping[str, str], listed: str | Mapping[str, object] | None) -> dict[str, str]:
    """Return what the program set each option of a client with.

    Args:
        environ: The environment.
        listed: jax.config.jax_pjrt_client_create_options: "key:value;key:value", or a mapping.
    """
    sources = {"visible_devices": "jax_cuda_visible_devices"}
    sources |= {option: name for option, names in _VARIABLES.items() for name in names if environ.get(name)}
    options = [entry.partition(":")[0] for entry in listed.split(";")] if isinstance(listed, str) else listed or ()
    is_variable = environ.get("JAX_PJRT_CLIENT_CREATE_OPTIONS") == listed
    list_name = "JAX_PJRT_CLIENT_CREATE_OPTIONS" if is_variable else "jax_pjrt_client_create_options"
    return sources | {option: f"{list_name}: {option}" for option in options}


def limit_by_variables(plan: Plan, environ: MutableMapping[str, str]) -> None:
    """Write the policy into the variables that JAX reads, as far as they can express it."""
    prepare_environment(plan, environ)
    if plan.growth:
        environ[_PREALLOCATE] = "false"
    if not plan.limits:
        return
    environ[_ALLOCATOR] = "default"
    devices = [(device.limit, device.total) for device in plan.devices or ()] or [(plan.limit, None)]
    sizes = [(limit.on(total), limit.fraction, total) for limit, total in devices if limit is not None]
    fractions = [size / total if total and size is not None else fraction for size, fraction, total in sizes]
    known = [fraction for fraction in fractions if fraction is not None]
    if not known or len(known) < len(fractions):
        return
    name = next((name for name in _FRACTIONS if name in environ), _FRACTIONS[0])
    wish = re.fullmatch(r"\d*\.?\d+", environ.get(name, ""))
    environ[name] = f"{min([*known, *([] if wish is None else [float(wish[0])])]):.7f}"


def find_library(platform: str, environ: Mapping[str, str]) -> str:
    """Return the library of a plugin that PJRT_NAMES_AND_LIBRARY_PATHS names. "": it does not."""
    entries = (entry.partition(os.pathsep) for entry in environ.get("PJRT_NAMES_AND_LIBRARY_PATHS", "").split(","))
    return next((library for name, _, library in entries if name == platform), "")
