"""Tokens of CUDA_VISIBLE_DEVICES, and what selectors name."""

from __future__ import annotations

import pytest

from tfenv.policy.device_set import keep_valid_tokens


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("0,1", ("0", "1")),
        (" 0 , 1", ("0", "1")),
        ("0,-1,1", ("0",)),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("0,0", ()),
        ("MIG-GPU-8932f937/1/0,GPU-ab", ("MIG-GPU-8932f937/1/0", "GPU-ab")),
        ("void", ()),
        ("0," + "9" * 6000, ("0",)),
        ("\u0661", ()),
    ],
)
def test_tokens_are_cut_where_cuda_stops(value: str, kept: tuple[str, ...]) -> None:
    """Numbers and UUIDs count up to the first entry that is neither. A GPU named twice leaves none."""
    assert keep_valid_tokens(value.split(",")) == kept
