"""Sizes of memory as people write them: "8GiB", "512MiB", "8GB", "40%", "none"."""

from __future__ import annotations

import re

from tfenv.policy.model import MemoryLimit

MIB = 1 << 20

# Decimal prefixes are powers of 1000 and binary ones powers of 1024 (IEC 80000-13); "8G" is left
# out because half of its writers mean the one and half the other.
_UNITS = {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_SIZE = re.compile(r"(?P<number>\d{1,15}(?:\.\d{1,6})?) ?(?P<unit>[A-Za-z]+|%)", re.ASCII)


def parse_limit(text: str) -> MemoryLimit:
    """Parse one limit.

    Args:
        text: "8GiB", "512MiB", "8GB", "40%" (of the card's total) or "none".

    Raises:
        ValueError: The text is not a limit. The message says what would be right.
    """
    if text.strip().lower() == "none":
        return MemoryLimit()
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'"{text}" is not a size; write "8GiB", "512MiB", "8GB", "40%" or "none"')
    number, unit = float(match["number"]), match["unit"]
    if unit == "%":
        if not 0 < number <= 100:  # noqa: PLR2004 - per cent
            raise ValueError(f'"{text}" is not between 0% and 100%; for no memory at all use visible_devices = "none"')
        return MemoryLimit(fraction=number / 100)
    factor = _UNITS.get(unit.upper())
    if factor is None:
        raise ValueError(f'"{unit}" is not a unit; write {number:g}GiB, {number:g}MiB, {number:g}GB or {number:g}MB')
    size = int(number * factor)
    if size < MIB:
        raise ValueError(f'"{text}" is less than 1 MiB, the smallest limit that a framework can keep')
    return MemoryLimit(bytes=size)


def parse_duration(text: str) -> float:
    """Parse "30s", "10min", "2h" or "1d" to seconds.

    Raises:
        ValueError: The text is not a duration. The message says what would be right.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?) ?([a-z]+)", text.strip(), re.ASCII)
    if match is None or match[2] not in _SECONDS:
        raise ValueError(f'"{text}" is not a duration; write "30s", "10min", "2h" or "1d"')
    return float(match[1]) * _SECONDS[match[2]]


def format_bytes(size: int) -> str:
    """Format a size in bytes for people, in binary units with one decimal: "8.0 GiB"."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1 << 10:
            return f"{value:.1f} {unit}" if unit != "B" else f"{size} B"
        value /= 1 << 10
    return f"{value:.1f} TiB"


def format_limit(limit: MemoryLimit | None) -> str:
    """Format a limit for people: "8.0 GiB", "40%", "granted" in quotes, "unlimited"."""
    if limit is None or limit.unlimited:
        return "unlimited"
    if limit.granted:
        return '"granted"'
    share = [] if limit.fraction is None else [f"{limit.fraction * 100:g}%"]
    size = [] if limit.bytes is None else [format_bytes(limit.bytes)]
    return " or ".join(size + share)


def format_requested_limit(limit: MemoryLimit) -> str:
    """Format a limit as its author asked for it: "8.0 GiB", "40%", or "none" in quotes."""
    return '"none" (no limit)' if limit.unlimited else format_limit(limit)
