"""One process: when it had its GPUs, in whatever order its records come and whatever the clock does."""

from __future__ import annotations

from itertools import permutations

import pytest

from tfenv.audit.report.process_use import (
    FrameworkGpu,
    Interval,
    ProcessUse,
    add_up_frameworks,
    find_interval,
    merge_records,
    read_framework_gpus,
)


def make_use(moment: int, **fields: object) -> ProcessUse:
    """Return what a record of that moment says."""
    return ProcessUse("gpu1", 100, "alice", moment, moment, **fields)  # type: ignore[arg-type]


def begin(moment: int) -> ProcessUse:
    return make_use(moment, begun=moment, begun_in=frozenset({"tensorflow"}))


def end(moment: int, ran: int | None = None, framework: str = "tensorflow") -> ProcessUse:
    return make_use(moment, ended=moment, ran_ms=ran, ended_in=frozenset({framework}))


def test_from_the_first_device_to_the_end() -> None:
    """A process has its GPUs from its first device on, not from its start."""
    use = begin(10_000)
    use.merge(end(70_000, ran=69_000))
    assert find_interval(use) == Interval(10_000, 70_000)
    assert use.is_complete


def test_without_an_end_it_goes_to_its_last_record() -> None:
    """A process that was killed is open, up to the last that was heard of it."""
    use = begin(10_000)
    use.merge(begin(50_000))
    assert find_interval(use) == Interval(10_000, 50_000, is_open=True)
    assert not use.is_complete


def test_without_a_begin_it_goes_from_its_start() -> None:
    """An end tells how long the process ran. Without that nothing is known but the end."""
    assert find_interval(end(70_000, ran=20_000)) == Interval(50_000, 70_000, is_cut=True)
    assert find_interval(end(70_000)) == Interval(70_000, 70_000, is_cut=True)


@pytest.mark.parametrize(("began", "ended", "ran"), [(90_000, 60_000, 30_000), (10_000, 3_600_000, 40_000)])
def test_the_clock_was_set(began: int, ended: int, ran: int) -> None:
    """Set back or forward, the time that the process measured itself counts."""
    use = begin(began)
    use.merge(end(ended, ran=ran))
    assert find_interval(use) == Interval(ended - ran, ended, is_shifted=True)


def test_what_was_before_does_not_count() -> None:
    """With `--since` a process begins there."""
    use = end(70_000, ran=20_000)
    assert find_interval(use, since=60_000) == Interval(60_000, 70_000, is_cut=True)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_numbers_that_are_used_again(order: tuple[int, ...]) -> None:
    """Records without a start: an end closes its process, and what comes later is another, in any order."""
    records = [begin(10_000), end(20_000, ran=11_000), begin(500_000), end(900_000, ran=401_000)]
    uses = list(merge_records([records[number] for number in order]))
    assert [find_interval(use) for use in uses] == [Interval(10_000, 20_000), Interval(500_000, 900_000)]


def test_a_killed_process_before_one_of_the_same_number() -> None:
    """An end tells how long its process ran: what was before is of one that was killed."""
    uses = list(merge_records([begin(10_000), begin(500_000), end(900_000, ran=401_000), begin(950_000)]))
    assert [find_interval(use) for use in uses] == [
        Interval(10_000, 10_000, is_open=True), Interval(500_000, 900_000), Interval(950_000, 950_000, is_open=True)
    ]  # fmt: skip


def test_two_frameworks_end_one_process() -> None:
    """Each framework records the end: it is one process all the same."""
    uses = list(merge_records([begin(10_000), end(20_000, 11_000), end(20_004, 11_004, "torch")]))
    assert [(use.ended, use.ended_in) for use in uses] == [(20_004, frozenset({"tensorflow", "torch"}))]


def test_frameworks_share_a_card() -> None:
    """What two frameworks might take of one card is added, and unknown if one of them is."""
    both = (FrameworkGpu("jax", "GPU-1", "A10", 4, 24, 3), FrameworkGpu("torch", "GPU-1", "A10", 2, 24, 1))
    assert [tuple(card) for card in add_up_frameworks(both)] == [("GPU-1", "A10", 6, 24, 4)]
    unlimited = (both[0], FrameworkGpu("torch", "GPU-1"))
    assert [tuple(card) for card in add_up_frameworks(unlimited)] == [("GPU-1", "A10", -1, 24, -1)]


@pytest.mark.parametrize("devices", [[], [3], {}, "x", [{"limit_bytes": True}], [{"peak_bytes": -1}, {"uuid": 7}]])
def test_devices_that_are_none(devices: object) -> None:
    """Whatever somebody wrote there, it is read as far as it makes sense."""
    assert all(gpu.limit == gpu.peak == -1 for gpu in read_framework_gpus("tensorflow", devices))


def test_a_fraction_of_a_known_card() -> None:
    """A limit as a part of the card is in bytes where the card's size is told."""
    device = {"uuid": "GPU-1", "limit_fraction": 0.5, "total_bytes": 1000}
    assert read_framework_gpus("jax", [device])[0].limit == 500
