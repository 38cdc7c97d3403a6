"""Tokens of CUDA_VISIBLE_DEVICES, and what selectors name."""

from __future__ import annotations

import pytest

from tests.cuda_visible_devices import REAL_ANSWERS, SUCCESS, fill_in
from tfenv.launchers.parent import split_tokens
from tfenv.policy.device_set import keep_valid_tokens, list_granted
from tfenv.policy.model import Device, Grant, Inventory

H100 = Device(0, "GPU-ba052eab-8833-45b1-b295-b810be44b3b4", "NVIDIA H100 80GB HBM3", 85017493504)


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
        ("1,GPU-ab", ("1",)),
        ("GPU-ab,1", ("GPU-ab",)),
        ("GPU-ab,GPU-ab", ()),
        ("GPU-", ()),
        ("gpu-ab", ()),
        ("+1,02,3x", ("1", "2", "3")),
        ("1,01", ()),
        ("0,\u0661", ("0",)),
        ("void", ()),
        ("0," + "9" * 6000, ("0",)),
        ("\u0661", ()),
    ],
)
def test_tokens_are_cut_where_cuda_stops(value: str, kept: tuple[str, ...]) -> None:
    """Numbers, or else UUIDs, count up to the first entry that is none. A GPU named twice leaves none."""
    assert keep_valid_tokens(value.split(",")) == kept


@pytest.mark.parametrize("value", REAL_ANSWERS)
def test_a_grant_is_what_a_real_driver_makes_of_it(value: str) -> None:
    """Each value leaves as many GPUs of a machine with one as a real driver shows."""
    grant = Grant(split_tokens(fill_in(value, H100.uuid)))
    granted = list_granted(grant, Inventory(devices=(H100,)))
    assert [card.device for card in granted.cards] == [H100] * (REAL_ANSWERS[value] == SUCCESS)
