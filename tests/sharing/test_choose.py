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
    Wall,
)
from tfenv.sharing.choose import (
    choose_gpus,
    find_claimed_gpus,
    fits_but_for_overhead,
    is_possible,
    needs_unleased_memory,
    share_gpus,
    waits_for_ancestor,
)
from tfenv.sharing.occupancy import Occupancy, describe_occupancy
from tfenv.sharing.request import Candidate, GpuRequest, request_from_plan
from tfenv.values import replace

ALICE, BOB = 1000, 1001
TOTAL = 24 * GIB


def make_candidates(need: int | None = None, gpus: str = "abcd", **more: int) -> tuple[Candidate, ...]:
    return tuple(Candidate(gpu, TOTAL, need, **more) for gpu in gpus)


def make_request(
    count: int = 1, need: int | None = None, gpus: str = "abcd", uid: int = ALICE, **more: int
) -> GpuRequest:
    return GpuRequest(uid, make_candidates(need, gpus, **more), count)


def make_lease(gpu: str, limit: int | None = None, uid: int = BOB, pid: int = 7, name: str = "l") -> Lease:
    return Lease(name, Allocation(gpu, limit), uid, f"uid:{uid}", pid)


def choose(made: GpuRequest, *leases: Lease, **occupancy: object) -> str | None:
    """The GPUs that are chosen, as one word. None: the process has to wait."""
    allocations = choose_gpus(made, Occupancy(leases, **occupancy))  # type: ignore[arg-type]
    return None if allocations is None else "".join(allocation.uuid for allocation in allocations)


# ---- free memory


def test_a_process_without_a_limit_takes_a_card_whole() -> None:
    """It gets a card that nobody holds, and no other process gets a part of it."""
    assert choose(make_request(), make_lease("a", 1 * GIB), make_lease("b")) == "c"
    assert choose(make_request(need=1 * GIB, gpus="ab"), make_lease("a"), make_lease("b")) is None
    assert choose(make_request(gpus="a"), make_lease("a", 1 * GIB)) is None


def test_limited_processes_share_a_card_up_to_its_memory() -> None:
    """Three times 8 GiB fit on 24 GiB, a fourth does not."""
    eight = 8 * GIB
    assert choose(make_request(need=eight, gpus="a"), *[make_lease("a", eight)] * 2) == "a"
    assert choose(make_request(need=eight, gpus="a"), *[make_lease("a", eight)] * 3) is None


def test_the_card_with_the_most_free_memory_comes_first() -> None:
    """Memory is free that neither leases nor strangers have. Among equals the policy's order counts."""
    memory = {"d": MemoryUse(10 * GIB, {5: 10 * GIB})}
    leases = [make_lease("a", 12 * GIB), make_lease("c", 2 * GIB)]
    assert choose(make_request(4, need=GIB), *leases, memory=memory) == "bcda"
    assert choose(make_request(2, need=GIB)) == "ab"


def test_memory_of_processes_without_a_lease_is_taken() -> None:
    """A stranger's 20 GiB leave 4. The card is not free for a process that takes it whole."""
    memory = {"a": MemoryUse(20 * GIB, {5: 20 * GIB})}
    assert choose(make_request(need=5 * GIB, gpus="a"), memory=memory) is None
    assert choose(make_request(need=4 * GIB, gpus="a"), memory=memory) == "a"
    assert choose(make_request(gpus="a"), memory=memory) is None


def test_what_a_display_takes_is_not_noticed() -> None:
    """Two times 12 GiB fit on 24 GiB though the driver and a display hold some MiB."""
    memory = {"a": MemoryUse(12 * GIB + UNNOTICED_BYTES - 1, {7: 12 * GIB, 5: UNNOTICED_BYTES - 1})}
    assert choose(make_request(need=12 * GIB, gpus="a"), make_lease("a", 12 * GIB), memory=memory) == "a"
    assert choose(make_request(gpus="a"), memory={"a": MemoryUse(UNNOTICED_BYTES - 1, {5: UNNOTICED_BYTES - 1})}) == "a"


def test_memory_of_leased_processes_is_not_counted_twice() -> None:
    """A process may use what its lease says, or a little more for its context, and not be taken for a stranger."""
    memory = {"a": MemoryUse(9 * GIB, {7: 9 * GIB})}
    assert choose(make_request(need=16 * GIB, gpus="a"), make_lease("a", 8 * GIB), memory=memory) == "a"
    assert choose(make_request(need=16 * GIB, gpus="a"), make_lease("a", 8 * GIB, pid=8), memory=memory) is None


def test_where_processes_are_hidden_leases_explain_memory() -> None:
    """Containers show no processes: only what is beyond all leases is somebody else's."""
    hidden = {"a": MemoryUse(9 * GIB)}
    assert choose(make_request(need=14 * GIB, gpus="a"), make_lease("a", 8 * GIB), memory=hidden) == "a"
    assert choose(make_request(need=16 * GIB, gpus="a"), make_lease("a", 8 * GIB), memory=hidden) is None


def test_the_choosers_own_memory_counts_as_free() -> None:
    """Another library may have opened CUDA in this process already."""
    assert choose(make_request(gpus="a"), memory={"a": MemoryUse(2 * GIB, {99: 2 * GIB})}, pid=99) == "a"


def test_min_free_is_what_must_be_free() -> None:
    """A card with less is busy. One that strangers leave enough of is taken even whole."""
    memory = {"a": MemoryUse(20 * GIB, {5: 20 * GIB})}
    assert choose(make_request(need=GIB, gpus="a", min_free=5 * GIB), memory=memory) is None
    assert choose(make_request(gpus="a", min_free=4 * GIB), memory=memory) == "a"


def test_several_cards_are_taken_together_or_not_at_all() -> None:
    """One free card is not enough for a process that asks for two."""
    assert choose(make_request(2, gpus="ab"), make_lease("a")) is None
    assert choose(make_request(2, gpus="abc"), make_lease("a")) == "bc"


# ---- the queue


def test_nobody_takes_a_card_that_somebody_waits_for_who_came_earlier() -> None:
    """A process that waits for two cards is not overtaken by those who need one when one of the two is free."""
    two = make_request(2, gpus="ab", uid=BOB)
    assert choose(make_request(gpus="ab"), make_lease("a"), ahead=(two,)) is None
    assert choose(make_request(gpus="abc"), make_lease("a"), ahead=(two,)) == "c"
    assert find_claimed_gpus(make_request(gpus="abc"), Occupancy(ahead=(two,))) == {"a", "b"}


def test_a_process_that_its_users_total_holds_up_holds_up_nobody_else() -> None:
    """Free memory on the card would not help it. Processes of its user behind it still come later."""
    full = make_request(need=8 * GIB, gpus="a", uid=BOB, user_total=8 * GIB)
    held = make_lease("a", 8 * GIB, uid=BOB)
    assert choose(make_request(need=8 * GIB, gpus="a"), held, ahead=(full,)) == "a"
    assert choose(make_request(need=GIB, gpus="a", uid=BOB), held, ahead=(full,)) is None


# ---- a user's total


def make_fixed(need: int | None, user_total: int, ancestor_leases: str = "") -> GpuRequest:
    return GpuRequest(ALICE, (Candidate("a", TOTAL, need, user_total),), 1, True, frozenset({ancestor_leases} - {""}))


def test_a_process_is_limited_to_what_the_users_others_leave() -> None:
    """16 GiB for all of a user's processes: 10 for the first leave 6. Leases of other users do not count."""
    first = make_lease("a", 10 * GIB, uid=ALICE)
    rest, shared = Allocation("a", 6 * GIB), Allocation("a", 6 * GIB, shared=True)
    assert choose_gpus(make_fixed(10 * GIB, 16 * GIB), Occupancy((first, make_lease("a", 8 * GIB)))) == (rest,)
    assert choose_gpus(make_fixed(None, 16 * GIB), Occupancy((first, make_lease("a", 9 * GIB)))) == (shared,)
    assert choose_gpus(make_fixed(4 * GIB, 16 * GIB), Occupancy((first,))) == (Allocation("a", 4 * GIB),)
    assert choose_gpus(make_fixed(8 * GIB, 16 * GIB), Occupancy((make_lease("a", 16 * GIB, uid=ALICE),))) is None


def test_a_choice_wants_its_whole_limit_of_the_users_total() -> None:
    """A card where the user's others took too much is not chosen, another one is."""
    made = make_request(need=8 * GIB, gpus="ab", user_total=16 * GIB)
    assert choose(made, make_lease("a", 10 * GIB, uid=ALICE)) == "b"
    assert choose(made, *(make_lease(gpu, 10 * GIB, uid=ALICE) for gpu in "ab")) is None


# ---- ancestors


def test_a_child_shares_the_card_of_its_parent() -> None:
    """It cannot wait for it, and takes no other. The allocation tells where too little memory is free."""
    child = GpuRequest(ALICE, make_candidates(8 * GIB), 1, ancestor_leases=frozenset({"parent"}))
    parent = make_lease("c", 20 * GIB, uid=ALICE, name="parent")
    assert choose_gpus(child, Occupancy((parent,))) == (Allocation("c", 8 * GIB, shared=True),)
    small = make_lease("c", 8 * GIB, uid=ALICE, name="parent")
    assert choose_gpus(child, Occupancy((small,))) == (Allocation("c", 8 * GIB),)
    assert choose_gpus(child, Occupancy()) == (Allocation("a", 8 * GIB),), "the parent is gone"


def test_a_child_does_not_wait_for_its_parents_share_of_the_total() -> None:
    """The parent may be waiting for the child."""
    occupancy = Occupancy((make_lease("a", 16 * GIB, uid=ALICE, name="parent"),))
    child = make_fixed(8 * GIB, 16 * GIB, ancestor_leases="parent")
    assert choose_gpus(child, occupancy) is None
    assert waits_for_ancestor(child, occupancy)
    assert not waits_for_ancestor(make_fixed(8 * GIB, 16 * GIB), occupancy)


# ---- sharing


def test_sharing_takes_the_least_used_card() -> None:
    """It does so without enough free memory, and the allocation tells it."""
    occupancy = Occupancy((make_lease("a"), make_lease("b", 20 * GIB)))
    assert share_gpus(make_request(need=8 * GIB, gpus="ab"), occupancy) == (Allocation("b", 8 * GIB, shared=True),)


def test_sharing_keeps_the_users_total() -> None:
    """A ceiling is not lifted because nothing is free."""
    occupancy = Occupancy((make_lease("a", 16 * GIB, uid=ALICE),))
    assert share_gpus(make_request(need=8 * GIB, gpus="a", user_total=16 * GIB), occupancy) == ()


def test_what_an_empty_machine_could_not_give_is_impossible() -> None:
    """More free memory than any card has."""
    assert not is_possible(make_request(gpus="ab", min_free=25 * GIB))
    assert is_possible(make_request(2, gpus="ab", min_free=24 * GIB))


# ---- from a plan


def test_a_request_has_what_the_plan_needs_of_each_card() -> None:
    """Percentages become bytes of that card, a split its sum. No limit is the whole card."""
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
def test_unknown_cards_make_no_request(devices: tuple[PlannedDevice, ...] | None) -> None:
    """Without NVML nobody can tell what is free."""
    assert request_from_plan(Plan(devices=devices, choosing=AutoChoice(1)), ALICE) is None


# ---- the law

_needs = st.one_of(st.none(), st.integers(1, 24).map(lambda size: size * GIB))
_requests = st.builds(
    make_request,
    st.integers(1, 3),
    _needs,
    st.sampled_from(["a", "ab", "bc", "abcd"]),
    st.sampled_from([ALICE, BOB]),
)


@given(st.lists(_requests, max_size=12))
def test_no_card_is_ever_over_committed(requests: list[GpuRequest]) -> None:
    """In whatever order processes come, their allocations fit on the cards, and nobody shares a whole card."""
    leases: list[Lease] = []
    for number, made in enumerate(requests):
        allocations = choose_gpus(made, Occupancy(tuple(leases)))
        leases += [Lease(str(number), allocation, made.uid, "", number) for allocation in allocations or ()]
        assert allocations is None or len({allocation.uuid for allocation in allocations}) == made.count
    for gpu in "abcd":
        on_it = [lease.allocation.limit for lease in leases if lease.allocation.uuid == gpu]
        assert sum(TOTAL if limit is None else limit for limit in on_it) <= TOTAL


# ---- what has no lease, and what a process takes beside its limit


def test_who_waits_for_what_has_no_lease_holds_up_nobody() -> None:
    """22 GiB of a card on which a stranger has 3: those who come later and fit are served."""
    memory = {"a": MemoryUse(3 * GIB, {5: 3 * GIB})}
    first = make_request(need=22 * GIB, gpus="a", uid=BOB)
    later = make_request(need=4 * GIB, gpus="a")
    assert needs_unleased_memory(first, Occupancy(memory=memory))
    assert choose(later, memory=memory, ahead=(first,)) == "a"
    assert choose(replace(later, uid=BOB), memory=memory, ahead=(first,)) == "a", "one's own user's, too"
    satisfiable = make_request(need=20 * GIB, gpus="a", uid=BOB)
    assert choose(later, make_lease("a", 10 * GIB), memory=memory, ahead=(satisfiable,)) is None


def test_a_process_takes_more_than_its_limit() -> None:
    """Two limits of half a card do not fit on it, when each process takes 600 MiB beside its limit."""
    half = TOTAL // 2
    assert choose(make_request(need=half, gpus="a"), make_lease("a", half)) == "a"
    overhead = 600 << 20
    lease = replace(make_lease("a", half), overhead=overhead)
    assert choose(make_request(need=half, gpus="a", overhead=overhead), lease) is None
    assert choose(make_request(need=half - 2 * overhead, gpus="a", overhead=overhead), lease) == "a"
    assert is_possible(make_request(need=TOTAL, gpus="a", overhead=overhead)), "a whole card is no more than a card"
    assert fits_but_for_overhead(make_request(need=half, gpus="a", overhead=overhead), Occupancy((lease,)))
    assert not fits_but_for_overhead(make_request(need=half + 1, gpus="a", overhead=overhead), Occupancy((lease,)))
    assert not fits_but_for_overhead(make_request(need=half, gpus="a"), Occupancy((lease, lease)))


def test_memory_of_a_lease_of_another_container_counts_once() -> None:
    """Its pid is unknown here: what NVML shows of somebody is its memory, up to what its lease allows."""
    lease = make_lease("a", 8 * GIB, pid=0)
    memory = {"a": MemoryUse(8 * GIB, {4242: 8 * GIB})}
    assert choose(make_request(need=16 * GIB, gpus="a"), lease, memory=memory) == "a"
    more = {"a": MemoryUse(12 * GIB, {4242: 12 * GIB})}
    assert choose(make_request(need=16 * GIB, gpus="a"), lease, memory=more) is None


def test_what_is_in_the_way_is_named() -> None:
    """The largest of those without a lease, by pid, program and size."""
    memory = {"a": MemoryUse(3 * GIB, {812: GIB, 813: 2 * GIB})}
    text = describe_occupancy(Occupancy(memory=memory), {"a": "0"}, {812: "Xorg", 813: "python"}.get)
    assert text == "GPU 0: 3.0 GiB used without a lease (pid 813 python 2.0 GiB, pid 812 Xorg 1.0 GiB)"


# ---- a cgroup that the driver limits

SLICE = 77
OVERHEAD = 1 * GIB


def make_walled(need: int, wall: int = 8 * GIB, **more: int) -> GpuRequest:
    return make_request(need=need, gpus="a", overhead=OVERHEAD, wall=wall, cgroup=SLICE, **more)


def make_neighbour(limit: int | None, pid: int = 7, cgroups: tuple[int, ...] = (78, SLICE)) -> Lease:
    return replace(make_lease("a", limit, uid=ALICE, pid=pid), overhead=OVERHEAD, cgroups=cgroups)


def test_what_processes_take_beside_their_limits_counts_in_a_cgroup() -> None:
    """8 GiB for all: 3 and 1 of one process leave 3 for another that takes 1 beside it."""
    assert choose(make_walled(3 * GIB), make_neighbour(3 * GIB)) == "a"
    assert choose(make_walled(3 * GIB + 1), make_neighbour(3 * GIB)) is None
    assert choose(make_walled(7 * GIB), make_neighbour(3 * GIB, cgroups=(79,))) == "a", "it is in another cgroup"
    assert choose(make_walled(7 * GIB), make_neighbour(3 * GIB, cgroups=())) == "a"
    assert choose(make_walled(4 * GIB), make_neighbour(None)) is None, "it may take all of it"


def test_what_has_no_lease_counts_in_a_cgroup() -> None:
    """A program that nobody governs leaves less of it. What leased processes hold is not counted twice."""
    memory = {"a": MemoryUse(6 * GIB, {7: 2 * GIB, 8: 3 * GIB, 9: 1 * GIB}, walled=5 * GIB)}
    assert choose(make_walled(1 * GIB), make_neighbour(2 * GIB), memory=memory) == "a"
    assert choose(make_walled(1 * GIB + 1), make_neighbour(2 * GIB), memory=memory) is None
    hidden = {"a": MemoryUse(6 * GIB, None, walled=5 * GIB)}
    assert choose(make_walled(2 * GIB), make_neighbour(2 * GIB), memory=hidden) == "a"
    assert choose(make_walled(2 * GIB + 1), make_neighbour(2 * GIB), memory=hidden) is None
    assert needs_unleased_memory(make_walled(5 * GIB), Occupancy(memory=memory))


def test_a_process_that_its_cgroup_holds_up_holds_up_nobody_else() -> None:
    """Others, of other users and outside of the cgroup, take what is free of the card."""
    waiting = replace(make_walled(7 * GIB), uid=BOB)
    neighbour = replace(make_neighbour(6 * GIB), uid=BOB)
    assert choose(make_request(need=8 * GIB, gpus="a"), neighbour, ahead=(waiting,)) == "a"


def test_sharing_keeps_the_limit_of_the_cgroup() -> None:
    """Nobody is promised what the driver would refuse."""
    (given_,) = share_gpus(make_walled(7 * GIB), Occupancy((make_neighbour(4 * GIB),)))
    assert given_ == Allocation("a", 2 * GIB)


def test_a_request_knows_the_cgroup() -> None:
    """The card's own size counts among all users, and the driver's limit within the cgroup."""
    wall = Wall(8 * GIB, 0, "/sys/fs/cgroup/user.slice", SLICE, CARDS[0].total, (78, SLICE))
    card = replace(CARDS[0], total=8 * GIB, wall=wall)
    plan = Plan(devices=(PlannedDevice("0", card, MemoryLimit(fraction=0.5), user_total=MemoryLimit(bytes=9 * GIB)),))
    made = request_from_plan(plan, ALICE)
    assert made is not None
    assert made.cgroups == (78, SLICE)
    assert made.candidates == (Candidate(card.uuid, 40 * GIB, 4 * GIB, 9 * GIB, 0, 0, 8 * GIB, SLICE),)
