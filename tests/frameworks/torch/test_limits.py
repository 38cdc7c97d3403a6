"""Limits as fractions of a card, without PyTorch."""

from __future__ import annotations

from tfenv.frameworks.torch.limits import compute_fraction, describe_devices, find_smallest, make_limits
from tfenv.policy.model import Device, MemoryLimit, Plan, PlannedDevice

GIB = 1 << 30


def make_device(index: int, total: int | None, limit: MemoryLimit | None) -> PlannedDevice:
    """Make a planned GPU."""
    return PlannedDevice(str(index), Device(index, f"GPU-{index}", "Simulated GPU", total), limit)


def test_a_size_becomes_the_fraction_that_gives_it_back() -> None:
    """PyTorch rounds the fraction of its total to whole bytes: it gets exactly the limit."""
    for total in (24 * GIB, 25_757_220_864, 84_987_740_160):
        for size in (1, 1000 << 20, 12_345_678_901):
            assert round((compute_fraction(MemoryLimit(bytes=size), total) or 0) * total) == size


def test_a_share_is_cut_to_whole_bytes() -> None:
    """10% of a card that it does not divide are never rounded up."""
    fraction = compute_fraction(MemoryLimit(fraction=0.1), 24 * GIB)
    assert fraction is not None
    assert round(fraction * 24 * GIB) == int(24 * GIB * 0.1)


def test_the_smaller_of_a_size_and_a_share_holds() -> None:
    """Where both hold together, the card tells which is smaller."""
    assert compute_fraction(MemoryLimit(bytes=12 * GIB, fraction=0.25), 24 * GIB) == 0.25
    assert compute_fraction(MemoryLimit(bytes=3 * GIB, fraction=0.25), 24 * GIB) == 0.125


def test_a_card_of_unknown_size_has_no_fraction_for_a_size() -> None:
    """A share needs no size. A size does, and nobody guesses one."""
    assert compute_fraction(MemoryLimit(fraction=0.5), None) == 0.5
    assert compute_fraction(MemoryLimit(bytes=GIB), None) is None


def test_a_limit_beyond_the_card_is_all_of_it() -> None:
    """What cannot be reached is no limit."""
    assert compute_fraction(MemoryLimit(bytes=80 * GIB), 24 * GIB) == 1
    assert compute_fraction(MemoryLimit(), 24 * GIB) == 1
    assert compute_fraction(None, None) == 1


def test_in_a_limited_cgroup_pytorch_still_counts_the_whole_card() -> None:
    """Half of the 8 GiB that CUDA reports is a sixth of the card of 24 GiB, of which PyTorch takes a fraction."""
    assert compute_fraction(MemoryLimit(fraction=0.5), 8 * GIB, 24 * GIB) == 1 / 6
    assert compute_fraction(MemoryLimit(bytes=6 * GIB), 8 * GIB, 24 * GIB) == 1 / 4


def test_the_setting_holds_the_smallest_fraction() -> None:
    """One setting is for all GPUs, so that it is the smallest that is known."""
    assert find_smallest([0.5, None, 0.25, 1.0]) == 0.25
    assert find_smallest([None]) == 1


def test_a_gpu_that_is_not_allowed_gets_nothing() -> None:
    """A GPU that CUDA shows and the plan does not have is limited to 0, and left out of the record."""
    device = make_device(1, 24 * GIB, MemoryLimit(bytes=6 * GIB))
    limits = make_limits(Plan(devices=(device,)), [0, 1], {1: device})
    assert [gpu.fraction for gpu in limits] == [0.0, 0.25]
    assert [(outcome.index, outcome.limit) for outcome in describe_devices(limits)] == [(1, 6 * GIB)]


def test_gpus_that_cannot_be_told_apart_are_taken_in_their_order() -> None:
    """Without UUIDs the plan's order counts, and its common limit is for those that it does not name."""
    devices = (make_device(0, 24 * GIB, None), make_device(1, 24 * GIB, MemoryLimit(bytes=6 * GIB)))
    assert [gpu.fraction for gpu in make_limits(Plan(devices=devices), [0, 1], None)] == [1.0, 0.25]
    assert [gpu.fraction for gpu in make_limits(Plan(limit=MemoryLimit(fraction=0.5)), [0, 1], None)] == [0.5, 0.5]
