"""How the page says sizes, times and names. What others wrote into a log is made visible, and cannot steer a page."""

from __future__ import annotations

from tfenv.audit.report.times import DAY_MS, HOUR_MS
from tfenv.errors import escape_for_terminal
from tfenv.policy.units import format_bytes

_MINUTE_MS, _SECOND_MS = 60_000, 1000
_SHORT_ID = len("GPU-12345678")
_LONGEST_NAME = 60


def show(text: str, most: int = 120) -> str:
    """Return other people's text for the page: control characters and those that turn the writing direction escaped."""
    return clip(escape_for_terminal(text), most)


def clip(text: str, most: int) -> str:
    """Return the text, of a long one the beginning."""
    if len(text) <= most:
        return text
    return f"{text[: most - 1]}…" if most > 1 else ""


def count(number: int, one: str, several: str) -> str:
    """Return a number with what it counts."""
    return f"{number:,} {one if number == 1 else several}"


def format_size(size: int) -> str:
    """Return a size, "?" if it is not told."""
    return "?" if size < 0 else format_bytes(size)


def format_part(millionths: int) -> str:
    """Return a part as a percentage, "" if it is not told."""
    return "" if millionths < 0 else f"{millionths / 10_000:.0f}%"


def format_ms(ms: int) -> str:
    """Return a time of two units at most: "3 d 4 h", "12 min", "0.5 s"."""
    if ms < _MINUTE_MS:
        return f"{ms / _SECOND_MS:.1f} s" if ms < 10 * _SECOND_MS else f"{ms // _SECOND_MS} s"
    if ms < 10 * _MINUTE_MS:
        return f"{ms // _MINUTE_MS} min {ms % _MINUTE_MS // _SECOND_MS} s"
    if ms < HOUR_MS:
        return f"{ms // _MINUTE_MS} min"
    if ms < DAY_MS:
        return f"{ms // HOUR_MS} h {ms % HOUR_MS // _MINUTE_MS} min"
    return f"{ms // DAY_MS:,} d {ms % DAY_MS // HOUR_MS} h"


def name_gpu(host: str, gpu: str, model: str = "") -> str:
    """Name a GPU: "gpu1 GPU-a0fa4e00 (NVIDIA A10)"."""
    shown = show(gpu[:_SHORT_ID] if gpu.startswith(("GPU-", "MIG-")) else f"GPU {gpu}" if gpu else "all GPUs", 40)
    return f"{show(host, _LONGEST_NAME)} {shown}{f' ({show(model, 40)})' if model else ''}"


def name_process(user: str, script: str, job: str) -> str:
    """Name a process: "alice train.py, job 14"."""
    program = show(script.rpartition("/")[2], _LONGEST_NAME) if script else "(no script)"
    return f"{show(user, _LONGEST_NAME)} {program}{f', job {show(job, 40)}' if job else ''}"
