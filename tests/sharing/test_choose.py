"""Which GPUs a process may have beside those who hold leases and those who came earlier."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policy.values import CARDS, GIB
from tfenv.policy.model import (
    UNNOTICED_BYTES,
    Allocation,
    AutoChoice,
    Lease,
    MemoryLimit,
    MemoryUse,
    Plan,
    PlannedDevice,
)
from tfenv.sharing.choose import (
    Candidate,
    GpuRequest,
    Occupancy,
    choose,
    claimed,
    is_possible,
    request_from_plan,
    share,
    waits_for_ancestor,
)

ALICE, BOB = 1000, 1001
TOTAL = 24 * GIB


def candidates(need: int | None = None, gpus: str = "abcd", **more: int) -> tuple[Candidate, ...]:
    return tuple(Candidate(gpu, TOTAL, need, **more) for gpu in gpus)


def gpu_request(
    count: int = 1, need: int | None = None, gpus: str = "abcd", uid: int = ALICE, **more: int
) -> GpuRequest:
    return GpuRequest(uid, candidates(need, gpus, **more), count)


def lease(gpu: str, limit: int | None = None, uid: int = BOB, pid: int = 7, name: str = "l") -> Lease:
    return Lease(name, Allocation(gpu, limit), uid, f"uid:{uid}", pid)


def chosen(made: GpuRequest, *leases: Lease, **occupancy: object) -> str | None:
    """The GPUs that are chosen, as one word; None: the process has to wait."""
    allocations = choose(made, Occupancy(leases, **occupancy))  # type: ignore[arg-type]
    return None if allocations is None else "".join(allocation.uuid for allocation in allocations)


# ---- room


def test_a_process_without_a_limit_takes_a_card_whole() -> None:
    """It gets one that nobody holds, and nobody gets in beside it."""
    assert chosen(gpu_request(), lease("a", 1 * GIB), lease("b")) == "c"
    assert chosen(gpu_request(need=1 * GIB, gpus="ab"), lease("a"), lease("b")) is None
    assert chosen(gpu_request(gpus="a"), lease("a", 1 * GIB)) is None


def test_limited_processes_share_a_card_up_to_its_memory() -> None:
    """Three times 8 GiB fit on 24 GiB, a fourth does not."""
    eight = 8 * GIB
    assert chosen(gpu_request(need=eight, gpus="a"), *[lease("a", eight)] * 2) == "a"
    assert chosen(gpu_request(need=eight, gpus="a"), *[lease("a", eight)] * 3) is None


def test_the_card_with_the_most_room_comes_first() -> None:
    """Room is what neither leases nor strangers have; among equals the policy's order counts."""
    memory = {"d": MemoryUse(10 * GIB, {5: 10 * GIB})}
    unavailable = [lease("a", 12 * GIB), lease("c", 2 * GIB)]
    assert chosen(gpu_request(4, need=GIB), *unavailable, memory=memory) == "bcda"
    assert chosen(gpu_request(2, need=GIB)) == "ab"


def test_memory_of_processes_without_a_lease_is_taken() -> None:
    """A stranger's 20 GiB leave 4; a card is not free for a process that takes it whole."""
    memory = {"a": MemoryUse(20 * GIB, {5: 20 * GIB})}
    assert chosen(gpu_request(need=5 * GIB, gpus="a"), memory=memory) is None
    assert chosen(gpu_request(need=4 * GIB, gpus="a"), memory=memory) == "a"
    assert chosen(gpu_request(gpus="a"), memory=memory) is None


def test_what_a_display_takes_is_not_noticed() -> None:
    """Two times 12 GiB fit on 24 GiB though the driver and a display hold some MiB."""
    memory = {"a": MemoryUse(12 * GIB + UNNOTICED_BYTES - 1, {7: 12 * GIB, 5: UNNOTICED_BYTES - 1})}
    assert chosen(gpu_request(need=12 * GIB, gpus="a"), lease("a", 12 * GIB), memory=memory) == "a"
    assert chosen(gpu_request(gpus="a"), memory={"a": MemoryUse(UNNOTICED_BYTES - 1, {5: UNNOTICED_BYTES - 1})}) == "a"


def test_memory_of_leased_processes_is_not_counted_twice() -> None:
    """A process may use what its lease says, or a little more for its context, and not be taken for a stranger."""
    memory = {"a": MemoryUse(9 * GIB, {7: 9 * GIB})}
    assert chosen(gpu_request(need=16 * GIB, gpus="a"), lease("a", 8 * GIB), memory=memory) == "a"
    assert chosen(gpu_request(need=16 * GIB, gpus="a"), lease("a", 8 * GIB, pid=8), memory=memory) is None


def test_where_processes_are_hidden_leases_explain_memory() -> None:
    """Containers show no processes: only what is beyond all leases is somebody else's."""
    hidden = {"a": MemoryUse(9 * GIB)}
    assert chosen(gpu_request(need=14 * GIB, gpus="a"), lease("a", 8 * GIB), memory=hidden) == "a"
    assert chosen(gpu_request(need=16 * GIB, gpus="a"), lease("a", 8 * GIB), memory=hidden) is None


def test_the_choosers_own_memory_takes_no_room_from_it() -> None:
    """Another library may have opened CUDA in this process already."""
    assert chosen(gpu_request(gpus="a"), memory={"a": MemoryUse(2 * GIB, {99: 2 * GIB})}, pid=99) == "a"


def test_min_free_is_what_must_be_free() -> None:
    """A card with less is busy; one that strangers leave enough of is taken even whole."""
    memory = {"a": MemoryUse(20 * GIB, {5: 20 * GIB})}
    assert chosen(gpu_request(need=GIB, gpus="a", min_free=5 * GIB), memory=memory) is None
    assert chosen(gpu_request(gpus="a", min_free=4 * GIB), memory=memory) == "a"


def test_several_cards_are_taken_together_or_not_at_all() -> None:
    """One free card of two that are wanted is none."""
    assert chosen(gpu_request(2, gpus="ab"), lease("a")) is None
    assert chosen(gpu_request(2, gpus="abc"), lease("a")) == "bc"


# ---- the line


def test_nobody_takes_a_card_that_somebody_waits_for_who_came_earlier() -> None:
    """Who waits for two cards is not overtaken by those who need one, as soon as one of his is free."""
    two = gpu_request(2, gpus="ab", uid=BOB)
    assert chosen(gpu_request(gpus="ab"), lease("a"), ahead=(two,)) is None
    assert chosen(gpu_request(gpus="abc"), lease("a"), ahead=(two,)) == "c"
    assert claimed(gpu_request(gpus="abc"), Occupancy(ahead=(two,))) == {"a", "b"}


def test_who_is_held_up_by_his_own_total_holds_up_nobody_else() -> None:
    """Room on the card would not help him; his own processes behind him still come later."""
    full = gpu_request(need=8 * GIB, gpus="a", uid=BOB, user_total=8 * GIB)
    held = lease("a", 8 * GIB, uid=BOB)
    assert chosen(gpu_request(need=8 * GIB, gpus="a"), held, ahead=(full,)) == "a"
    assert chosen(gpu_request(need=GIB, gpus="a", uid=BOB), held, ahead=(full,)) is None


# ---- a user's total


def fixed(need: int | None, user_total: int, ancestor_leases: str = "") -> GpuRequest:
    return GpuRequest(ALICE, (Candidate("a", TOTAL, need, user_total),), 1, True, frozenset({ancestor_leases} - {""}))


def test_a_process_is_limited_to_what_the_users_others_leave() -> None:
    """16 GiB for all of a user's processes: 10 for the first leave 6; others' leases do not count."""
    first = lease("a", 10 * GIB, uid=ALICE)
    assert choose(fixed(10 * GIB, 16 * GIB), Occupancy((first, lease("a", 8 * GIB)))) == (Allocation("a", 6 * GIB),)
    assert choose(fixed(None, 16 * GIB), Occupancy((first, lease("a", 9 * GIB)))) == (
        Allocation("a", 6 * GIB, shared=True),
    )
    assert choose(fixed(4 * GIB, 16 * GIB), Occupancy((first,))) == (Allocation("a", 4 * GIB),)
    assert choose(fixed(8 * GIB, 16 * GIB), Occupancy((lease("a", 16 * GIB, uid=ALICE),))) is None


def test_a_choice_wants_its_whole_limit_of_the_users_total() -> None:
    """Another card has it; there is none on a card where the user's others took too much."""
    made = gpu_request(need=8 * GIB, gpus="ab", user_total=16 * GIB)
    assert chosen(made, lease("a", 10 * GIB, uid=ALICE)) == "b"
    assert chosen(made, *(lease(gpu, 10 * GIB, uid=ALICE) for gpu in "ab")) is None


# ---- families


def test_a_child_shares_the_card_of_its_parent() -> None:
    """It cannot wait for it, and takes no other; where there is no room left, that is noted."""
    child = GpuRequest(ALICE, candidates(8 * GIB), 1, ancestor_leases=frozenset({"parent"}))
    parent = lease("c", 20 * GIB, uid=ALICE, name="parent")
    assert choose(child, Occupancy((parent,))) == (Allocation("c", 8 * GIB, shared=True),)
    roomy = lease("c", 8 * GIB, uid=ALICE, name="parent")
    assert choose(child, Occupancy((roomy,))) == (Allocation("c", 8 * GIB),)
    assert choose(child, Occupancy()) == (Allocation("a", 8 * GIB),), "the parent is gone"


def test_a_child_does_not_wait_for_its_parents_share_of_the_total() -> None:
    """The parent may be waiting for the child."""
    occupancy = Occupancy((lease("a", 16 * GIB, uid=ALICE, name="parent"),))
    child = fixed(8 * GIB, 16 * GIB, ancestor_leases="parent")
    assert choose(child, occupancy) is None
    assert waits_for_ancestor(child, occupancy)
    assert not waits_for_ancestor(fixed(8 * GIB, 16 * GIB), occupancy)


# ---- giving up


def test_sharing_takes_the_least_used_card() -> None:
    """Whether or not there is room; the place says so."""
    occupancy = Occupancy((lease("a"), lease("b", 20 * GIB)))
    assert share(gpu_request(need=8 * GIB, gpus="ab"), occupancy) == (Allocation("b", 8 * GIB, shared=True),)


def test_sharing_keeps_the_users_total() -> None:
    """A ceiling is not lifted because nothing is free."""
    occupancy = Occupancy((lease("a", 16 * GIB, uid=ALICE),))
    assert share(gpu_request(need=8 * GIB, gpus="a", user_total=16 * GIB), occupancy) == ()


def test_what_an_empty_machine_could_not_give_is_not_waited_for() -> None:
    """More free memory than any card has."""
    assert not is_possible(gpu_request(gpus="ab", min_free=25 * GIB))
    assert is_possible(gpu_request(2, gpus="ab", min_free=24 * GIB))


# ---- from a plan


def test_a_wish_says_what_the_plan_needs_of_each_card() -> None:
    """Percentages become bytes of that card, a split its sum; no limit is the whole card."""
    planned = (
        PlannedDevice("0", CARDS[0], MemoryLimit(fraction=0.5), user_total=MemoryLimit(bytes=30 * GIB)),
        PlannedDevice("2", CARDS[2], None, (MemoryLimit(bytes=GIB), MemoryLimit(bytes=GIB))),
        PlannedDevice("3", CARDS[3]),
    )
    automatic = AutoChoice(2, min_free=MemoryLimit(fraction=0.25))
    made = request_from_plan(Plan(devices=planned, choosing=automatic), ALICE, ["parent"])
    assert made == GpuRequest(
        ALICE,
        (
            Candidate(CARDS[0].uuid, 40 * GIB, 20 * GIB, 30 * GIB, 10 * GIB),
            Candidate(CARDS[2].uuid, 16 * GIB, 2 * GIB, None, 4 * GIB),
            Candidate(CARDS[3].uuid, 16 * GIB, None, None, 4 * GIB),
        ),
        2,
        ancestor_leases=frozenset({"parent"}),
    )


@pytest.mark.parametrize("devices", [None, (), (PlannedDevice("0"),)])
def test_cards_that_are_unknown_make_no_wish(devices: tuple[PlannedDevice, ...] | None) -> None:
    """Without NVML nobody can tell what is free."""
    assert request_from_plan(Plan(devices=devices, choosing=AutoChoice(1)), ALICE) is None


# ---- the law

_needs = st.one_of(st.none(), st.integers(1, 24).map(lambda size: size * GIB))
_wishes = st.builds(
    gpu_request,
    st.integers(1, 3),
    _needs,
    st.sampled_from(["a", "ab", "bc", "abcd"]),
    st.sampled_from([ALICE, BOB]),
)


@given(st.lists(_wishes, max_size=12))
def test_no_card_is_ever_over_committed(wishes: list[GpuRequest]) -> None:
    """Whoever comes in whatever order: places that are not shared fit on their cards, and whole cards are alone."""
    leases: list[Lease] = []
    for number, made in enumerate(wishes):
        allocations = choose(made, Occupancy(tuple(leases)))
        leases += [Lease(str(number), allocation, made.uid, "", number) for allocation in allocations or ()]
        assert allocations is None or len({allocation.uuid for allocation in allocations}) == made.count
    for gpu in "abcd":
        on_it = [lease.allocation.limit for lease in leases if lease.allocation.uuid == gpu]
        assert sum(TOTAL if limit is None else limit for limit in on_it) <= TOTAL
