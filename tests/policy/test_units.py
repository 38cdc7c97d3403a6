"""Sizes and durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfenv.policy.model import MemoryLimit
from tfenv.policy.units import MIB, format_bytes, format_limit, format_requested_limit, parse_duration, parse_limit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", MemoryLimit(bytes=8 << 30)),
        ("512MiB", MemoryLimit(bytes=512 * MIB)),
        ("8GB", MemoryLimit(bytes=8 * 10**9)),
        ("8 GiB", MemoryLimit(bytes=8 << 30)),
        ("0.5gib", MemoryLimit(bytes=512 * MIB)),
        ("40%", MemoryLimit(fraction=0.4)),
        ("100%", MemoryLimit(fraction=1.0)),
        ("none", MemoryLimit()),
    ],
)
def test_sizes_are_read_in_binary_and_decimal_units(text: str, expected: MemoryLimit) -> None:
    """GiB and MiB are powers of 1024, GB and MB of 1000, per cent a fraction of the card."""
    assert parse_limit(text) == expected


@pytest.mark.parametrize(
    "text", ["", "8", "8G", "GiB", "-1GiB", "8GiBs", "0%", "101%", "1KB", "nan%", "1e3MiB", "٣GiB"]
)
def test_a_text_that_is_no_size_is_refused_with_an_example(text: str) -> None:
    """A bare number, a unit with two meanings and an impossible percentage are refused."""
    with pytest.raises(ValueError, match=r"GiB|%|MiB"):
        parse_limit(text)


@given(st.integers(min_value=2, max_value=10**6), st.sampled_from(["MiB", "GiB", "MB", "GB", "TB", "TiB"]))
def test_a_size_grows_with_its_number(number: int, unit: str) -> None:
    """Twice the number is twice the size, in every unit."""
    once, twice = parse_limit(f"{number}{unit}").bytes, parse_limit(f"{2 * number}{unit}").bytes
    assert once is not None
    assert twice == 2 * once


def test_a_percentage_needs_the_card() -> None:
    """A fraction is a size only where the card's total is known, a size is one anywhere."""
    assert parse_limit("50%").on(24 << 30) == 12 << 30
    assert parse_limit("50%").on(None) is None
    assert parse_limit("8GiB").on(None) == 8 << 30


def test_limits_are_shown_with_one_decimal() -> None:
    """People read GiB with one decimal, percentages as they were written."""
    assert format_bytes(8 << 30) == "8.0 GiB"
    assert format_bytes(3) == "3 B"
    assert format_bytes(5 << 40) == "5.0 TiB"
    assert format_limit(parse_limit("40%")) == "40%"
    assert format_limit(None) == format_limit(MemoryLimit()) == "unlimited"
    assert format_requested_limit(MemoryLimit()) == '"none" (no limit)'


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("10min", 600), ("2h", 7200), ("1d", 86400), ("1.5 h", 5400)]
)
def test_durations_are_in_seconds(text: str, seconds: float) -> None:
    """s, min, h and d are understood."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "10m", "min", "-1s"])
def test_a_text_that_is_no_duration_is_refused_with_an_example(text: str) -> None:
    """`10m` could be minutes or months: it is refused with an example."""
    with pytest.raises(ValueError, match="10min"):
        parse_duration(text)
