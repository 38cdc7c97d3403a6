"""What a process would lose if the tables under [observe] were in force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.machine import CARDS, GIB, INVENTORY
from tfenv.config.document import Trust, read
from tfenv.config.schema import validate
from tfenv.policy.merge import merge, merge_observed
from tfenv.policy.model import (
    DeviceOutcome,
    Grant,
    Inventory,
    Layer,
    Outcome,
    Source,
    Subject,
    WouldClamp,
    format_key,
)
from tfenv.policy.observe import find_losses
from tfenv.policy.resolve import resolve

ALICE = Subject("alice", 1000, ("students",), "/srv/vision")


def read_layer(text: str) -> Layer:
    layer, findings = validate(read(Source("machine", "/etc/tfgpu/tfgpu.toml", text=text), Trust(0)))
    assert findings == ()
    return layer


def observe(text: str, *, growth: bool | None = None, limit: int | None = None) -> tuple[WouldClamp, ...]:
    """Return what a process would lose that has all the policy gives it.

    Args:
        text: The machine's file.
        growth: Whether its memory grows.
        limit: The program's own smaller limit in bytes. None: it takes what it may.
    """
    layer = read_layer(text)
    plan = resolve(merge([layer], ALICE), Grant(), INVENTORY)
    devices = tuple(
        planned.describe(
            index,
            None,
            limit=limit or (None if planned.limit is None else planned.limit.on(planned.total)),
            fraction=None,
        )
        for index, planned in enumerate(plan.devices or ())
    )
    observed = merge_observed([layer], ALICE)
    assert observed is not None
    return find_losses(
        Outcome("applied", devices=devices, growth=growth),
        resolve(observed.policy, Grant(), INVENTORY),
        observed.policy,
    )


NOW = '[ceiling]\nallowed_devices = [0]\nmemory_limit = "8GiB"\n'
#: Under [observe] -> key, what the process has, what it would have, the keys that would hold.
LOSSES = {
    "a smaller limit": (
        '[observe.ceiling]\nmemory_limit = "4GiB"',
        "memory_limit",
        "8.0 GiB",
        "4.0 GiB",
        "observe.ceiling.memory_limit",
    ),
    "a share of the card": (
        '[observe.ceiling]\nmemory_limit = "10%"',
        "memory_limit",
        "8.0 GiB",
        "4.0 GiB",
        "observe.ceiling.memory_limit",
    ),
    "a total": (
        '[observe.ceiling]\nmemory_total = "2GiB"',
        "memory_total",
        "8.0 GiB",
        "2.0 GiB",
        "observe.ceiling.memory_total",
    ),
    "a group's": (
        '[observe.group.students.ceiling]\nmemory_limit = "1GiB"',
        "memory_limit",
        "8.0 GiB",
        "1.0 GiB",
        "observe.group.students.ceiling.memory_limit",
    ),
    "a user's": (
        '[observe.user.alice.gpu]\nmemory_limit = "1GiB"',
        "memory_limit",
        "8.0 GiB",
        "1.0 GiB",
        "observe.user.alice.gpu.memory_limit",
    ),
    "a project's": (
        '[observe.project."/srv".ceiling]\nmemory_limit = "1GiB"',
        "memory_limit",
        "8.0 GiB",
        "1.0 GiB",
        'observe.project."/srv".ceiling.memory_limit',
    ),
    "a card's": (
        '[[observe.gpu.device]]\nmatch = 0\nmemory_limit = "1GiB"',
        "memory_limit",
        "8.0 GiB",
        "1.0 GiB",
        "observe.gpu.device[0]",
    ),
    "other GPUs": (
        "[observe.ceiling]\nallowed_devices = [3]",
        "allowed_devices",
        CARDS[0].uuid,
        "no GPU",
        "observe.ceiling.allowed_devices",
    ),
    "no GPU": (
        '[observe.gpu]\nvisible_devices = "none"',
        "visible_devices",
        CARDS[0].uuid,
        "no GPU",
        "observe.gpu.visible_devices",
    ),
}


@pytest.mark.parametrize(("text", "key", "asked", "given_", "held_by"), LOSSES.values(), ids=LOSSES)
def test_what_would_be_lost_is_told_with_its_key(text: str, key: str, asked: str, given_: str, held_by: str) -> None:
    """The key, what the process has, what it would have, and the place of the table that would take it."""
    (lost,) = observe(f"{NOW}{text}\n")
    assert (lost.key, lost.asked, lost.given, lost.gpu) == (key, asked, given_, CARDS[0].uuid)
    assert [format_key(origin.key) for origin in lost.held_by] == [held_by]


#: Under [observe], what takes nothing from a process that has 8 GiB of GPU 0.
HARMLESS = {
    "the same": '[observe.ceiling]\nmemory_limit = "8GiB"',
    "more": '[observe.ceiling]\nmemory_limit = "20GiB"',
    "no limit": '[observe.ceiling]\nmemory_limit = "none"',
    "somebody else's": '[observe.user.bob.ceiling]\nmemory_limit = "1GiB"',
    "another group's": '[observe.group.staff.ceiling]\nmemory_limit = "1GiB"',
    "another project's": '[observe.project."/srv/visio".ceiling]\nmemory_limit = "1GiB"',
    "another card's": '[[observe.gpu.device]]\nmatch = 1\nmemory_limit = "1GiB"',
    "an exception from it": '[observe.ceiling]\nmemory_limit = "1GiB"\n[user.alice.ceiling]\nmemory_limit = "8GiB"',
    "an expired one": '[observe.user.alice]\nexpires = 2020-01-01\n[observe.user.alice.ceiling]\nmemory_limit = "1GiB"',
    "more GPUs": "[observe.ceiling]\nallowed_devices = [0, 1]",
    "one of them, chosen": "[observe.gpu]\nvisible_devices = {count = 1}",
    "growth that it has": "[observe.ceiling]\nrequire_memory_growth = true",
    "nothing": "[observe]\ntell = true",
}


@pytest.mark.parametrize("text", HARMLESS.values(), ids=HARMLESS)
def test_what_takes_nothing_is_not_told(text: str) -> None:
    """As much or more, or for others, is no loss."""
    assert observe(f"{NOW}{text}\n", growth=True) == ()


def test_a_program_that_asks_for_little_loses_nothing() -> None:
    """Its own limit of 1 GiB is below the one of 4 GiB that is tried. Rounding is no loss either."""
    text = f'{NOW}[observe.ceiling]\nmemory_limit = "4GiB"\n'
    assert observe(text, limit=GIB) == ()
    assert observe(text, limit=4 * GIB + (1 << 20)) == ()
    assert len(observe(text, limit=5 * GIB)) == 1


def test_growth_that_would_be_required_is_told() -> None:
    """A program that takes all of its limit at once would have to grow."""
    (lost,) = observe(f"{NOW}[observe.ceiling]\nrequire_memory_growth = true\n", growth=False)
    assert (lost.key, lost.asked, lost.given, lost.gpu) == ("memory_growth", "off", "on", "")


def test_fewer_chosen_gpus_are_told_as_a_number() -> None:
    """Nobody knows yet which of the two it would be."""
    (lost,) = observe("[ceiling]\nallowed_devices = [0, 1]\n[observe.gpu]\nvisible_devices = {count = 1}\n")
    assert (lost.key, lost.asked, lost.given, lost.gpu) == ("visible_devices", "2 GPUs", "1 GPU", "")


def test_another_gpu_of_the_same_number_is_no_loss() -> None:
    """Where free GPUs would be chosen, the number counts. The process would have another one."""
    text = "[gpu]\nvisible_devices = [3]\n[observe.gpu]\nvisible_devices = {count = 1}\n"
    assert observe(f"{text}[observe.ceiling]\nallowed_devices = [0, 1]\n") == ()


def test_what_the_policy_in_force_would_take_is_no_loss() -> None:
    """A process in which it could not be applied has no limit. Only the keys that are tried are told."""
    layer = read_layer(f"{NOW}[observe.ceiling]\nmax_devices = 1\nrequire_memory_growth = true\n")
    observed = merge_observed([layer], ALICE)
    assert observed is not None
    plan = resolve(observed.policy, Grant(), INVENTORY)
    devices = tuple(DeviceOutcome(i, CARDS[i].uuid, CARDS[i].uuid, total=40 * GIB) for i in range(2))
    outcome = Outcome("too_late", devices=devices, growth=False)
    lost = find_losses(outcome, plan, observed.policy, merge([layer], ALICE))
    assert [(one.key, one.given) for one in lost] == [("max_devices", "no GPU"), ("memory_growth", "on")]
    assert len(find_losses(outcome, plan, observed.policy)) == 3


def test_no_limit_is_all_of_the_card() -> None:
    """A process without a limit has the card's 40 GiB, and 50 % of that would be 20."""
    (lost,) = observe('[ceiling]\nallowed_devices = [0]\n[observe.ceiling]\nmemory_limit = "50%"\n')
    assert (lost.asked, lost.given, lost.asked_bytes, lost.given_bytes) == ("no limit", "20.0 GiB", 40 * GIB, 20 * GIB)


def test_what_does_not_compare_is_not_claimed() -> None:
    """A share of a card whose size nobody knows is neither more nor less than a size."""
    layer = read_layer('[observe.ceiling]\nmemory_limit = "50%"\n')
    observed = merge_observed([layer], ALICE)
    assert observed is not None
    plan = resolve(observed.policy, Grant(tokens=("0",)), Inventory())
    for device, count in (
        (DeviceOutcome(0, "0", limit=GIB), 0),
        (DeviceOutcome(0, "0", fraction=0.9), 1),
        (DeviceOutcome(0, "0"), 1),
    ):
        assert len(find_losses(Outcome("applied", devices=(device,)), plan, observed.policy)) == count


SIZES = st.integers(1, 40)
GPUS = st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True)


@given(now=SIZES, later=SIZES, devices=GPUS, allowed=GPUS)
def test_a_loss_is_told_exactly_where_the_observed_policy_gives_less(
    now: int, later: int, devices: list[int], allowed: list[int]
) -> None:
    """Each GPU that would be gone, and each that would have less memory, and no other."""
    text = f'[ceiling]\nmemory_limit = "{now}GiB"\n[gpu]\nvisible_devices = {devices}\n'
    lost = observe(f'{text}[observe.ceiling]\nmemory_limit = "{later}GiB"\nallowed_devices = {allowed}\n')
    kept = set(devices) & set(allowed)
    gone = {CARDS[i].uuid for i in set(devices) - set(allowed)} if kept else None
    less = {CARDS[i].uuid for i in kept} if later < now else set()
    if gone is not None:
        assert {entry.gpu for entry in lost if entry.given == "no GPU"} == gone
        assert {entry.gpu for entry in lost if entry.key == "memory_limit"} == less
