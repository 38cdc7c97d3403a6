"""PyTorch's settings and variables, held to a fraction, without PyTorch."""

from __future__ import annotations

import pytest

from tfenv.frameworks.torch.settings import clamp_settings, prepare_environment, report_fraction_clamp
from tfenv.policy.model import MemoryLimit, Origin, Plan

LIMITED = Plan(
    limit=MemoryLimit(bytes=1 << 30),
    limited_by=(Origin("project", "/srv/tfgpu.toml", ("gpu", "memory_limit")),),
)
FRACTION = "per_process_memory_fraction"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "expandable_segments:True",
        "expandable_segments:True, max_split_size_mb:64",
        f"{FRACTION}:0.1",
        f"{FRACTION}:1.5",
        f"{FRACTION}:abc",
        f"{FRACTION}:",
        f"other_{FRACTION}:0.9",
        f"{FRACTION}s:0.9",
        f"nonsense:{FRACTION}",
    ],
)
def test_what_is_within_the_fraction_or_refused_by_pytorch_stays(text: str) -> None:
    """A text that asks for no more than is allowed, or that PyTorch refuses, goes on as it was written."""
    assert clamp_settings(text, 0.25).text == text


@pytest.mark.parametrize(
    ("text", "clamped"),
    [
        (f"{FRACTION}:0.9", f"{FRACTION}:0.25"),
        (f"{FRACTION}:1", f"{FRACTION}:0.25"),
        (f"{FRACTION}:.9", f"{FRACTION}:0.25"),
        (f"{FRACTION}:9e-1", f"{FRACTION}:0.25"),
        (f" {FRACTION} : 0.9 ", f"{FRACTION}:0.25"),
        ("per_process_ memory_fraction:0. 9", f"{FRACTION}:0.25"),
        (f"expandable_segments:True,{FRACTION}:0.9,foo:1", f"expandable_segments:True,{FRACTION}:0.25,foo:1"),
        (f"roundup_power2_divisions:[256:1],{FRACTION}:0.9", f"roundup_power2_divisions:[256:1],{FRACTION}:0.25"),
        (f"{FRACTION}:0.1,{FRACTION}:0.9", f"{FRACTION}:0.1,{FRACTION}:0.25"),
    ],
)  # fmt: skip
def test_a_larger_fraction_is_cut_and_the_rest_stays(text: str, clamped: str) -> None:
    """However PyTorch can read a larger fraction in a text, the text gets the one that is allowed."""
    assert clamp_settings(text, 0.25).text == clamped


@pytest.mark.parametrize("value", ["0.9x", "0x1p-1", "abc", "nan"])
def test_a_value_that_c_may_read_otherwise_is_not_certain(value: str) -> None:
    """C++ reads numbers in texts that Python refuses: whoever passes such a text on has to set the limit again."""
    assert not clamp_settings(f"{FRACTION}:{value}", 0.25).certain


def test_what_the_program_asked_for_is_the_last_value() -> None:
    """PyTorch takes the last value of a text. A text without one asks for nothing."""
    assert clamp_settings(f"{FRACTION}:0.9,{FRACTION}:0.1", 0.25).asked == 0.1
    assert clamp_settings("expandable_segments:True", 0.25).asked is None


def test_the_variable_that_switches_caching_off_is_cleared_under_a_limit() -> None:
    """Without the caching allocator nothing keeps the limit, so that the variable goes, with a note."""
    environ = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    notes = prepare_environment(LIMITED, environ)
    assert environ == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert [note.code for note in notes] == ["clamped"]
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1" in notes[0].message


def test_without_a_limit_no_variable_is_touched() -> None:
    """A policy that limits no memory leaves the allocator to the program."""
    environ = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert prepare_environment(Plan(visible="0"), environ) == []
    assert environ


def test_a_clamp_names_who_asked_and_which_key_holds() -> None:
    """The note has what the program asked for, what it got, and the key."""
    note = report_fraction_clamp("PYTORCH_ALLOC_CONF", 0.9, 0.25, LIMITED)
    assert (note.asked, note.given, note.key) == ("memory fraction = 0.9", "0.25", "gpu.memory_limit")
    assert "PYTORCH_ALLOC_CONF" in note.message
