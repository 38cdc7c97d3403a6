"""PyTorch's allocator settings and environment variables, held to the policy."""

from __future__ import annotations

import re

from tfenv.errors import PROGRAM, Finding
from tfenv.policy.clamps import report_program_clamp
from tfenv.policy.model import Plan, format_origins
from tfenv.values import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import MutableMapping

#: The setting that limits memory.
FRACTION = "per_process_memory_fraction"

# Compiled when they are used: most programs set nothing. PyTorch leaves out white space wherever it is, and ends a word
# at these characters.
_SPACE = r"[ \t\n\v\f\r]+"
_ENTRY = rf"(?<![^,:\[\]]){FRACTION}:([^,:\[\]]*)"
_NUMBER = r"\+?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


@frozen
class ClampedSettings:
    """A text of settings, held to the policy.

    Attributes:
        text: What PyTorch is given.
        asked: The fraction that the program's text sets. None: it sets none.
        certain: PyTorch reads the same fraction in it. C++ takes some texts for numbers that Python does not.
    """

    text: str
    asked: float | None = None
    certain: bool = True


def clamp_settings(text: str, fraction: float) -> ClampedSettings:
    """Hold settings that the program wrote to a fraction.

    Args:
        text: As in PYTORCH_ALLOC_CONF: "expandable_segments:True,per_process_memory_fraction:0.5".
        fraction: The most that PyTorch may take.

    Returns:
        The text with a smaller fraction, where it asks for more. Everything else stays as it is, also what PyTorch
        refuses.
    """
    if not text:
        return ClampedSettings(text)
    compact = re.sub(_SPACE, "", text)
    values = [_read_number(value) for value in re.findall(_ENTRY, compact)]
    if not values:
        return ClampedSettings(text)
    known = [value for value in values if value is not None]
    certain = len(known) == len(values)
    asked = values[-1]

    def narrow(match: re.Match[str]) -> str:
        value = _read_number(match[1])
        # PyTorch refuses what is above 1, and says so itself.
        return f"{FRACTION}:{fraction!r}" if value is not None and fraction < value <= 1 else match[0]

    narrowed = re.sub(_ENTRY, narrow, compact)
    return ClampedSettings(text if narrowed == compact else narrowed, asked, certain)


def _read_number(text: str) -> float | None:
    return float(text) if re.fullmatch(_NUMBER, text, re.ASCII) else None


def report_fraction_clamp(where: str, asked: float | None, given: float, plan: Plan) -> Finding:
    """Return the note that the program asked for a larger fraction than the policy allows.

    Args:
        where: The call or the variable that it asked with.
        asked: The fraction it asked for. None: unknown.
        given: The fraction that holds.
        plan: Where the limit comes from.
    """
    wish = "a memory fraction" if asked is None else f"a memory fraction of {asked:g}"
    text = f"{PROGRAM} asked for {wish} with {where}; it was given {given:.4g}{_format_reason(plan)}"
    return report_program_clamp(text, plan.limits, (f"memory fraction = {asked}", f"{given:.4g}"))


_NO_CACHING = ("PYTORCH_NO_CUDA_MEMORY_CACHING", "PYTORCH_NO_HIP_MEMORY_CACHING")


def prepare_environment(plan: Plan, environ: MutableMapping[str, str]) -> list[Finding]:
    """Clear the variables that would defeat the plan.

    Args:
        plan: What this process may use.
        environ: Changed in place.

    Returns:
        A note for each variable that was cleared.
    """
    if not plan.limits:
        return []
    return [_clear_variable(environ, name, plan) for name in _NO_CACHING if name in environ]


def _clear_variable(environ: MutableMapping[str, str], name: str, plan: Plan) -> Finding:
    value = environ.pop(name)
    text = f"{PROGRAM}'s {name}={value} was cleared: without its caching allocator PyTorch keeps no limit"
    return report_program_clamp(f"{text}{_format_reason(plan)}", plan.limits, (f"{name} = {value}", ""))


def report_no_caching(plan: Plan) -> Finding:
    """Return the note that the caching allocator was not switched off."""
    text = f"{PROGRAM} switched the caching allocator off; it stays on, because it keeps the limit"
    return report_program_clamp(f"{text}{_format_reason(plan)}", plan.limits, ("caching_allocator_enable(False)", ""))


def _format_reason(plan: Plan) -> str:
    return f", as {format_origins(plan.limits)} says" if plan.limits else ""
