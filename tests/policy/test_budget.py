"""One memory limit for all frameworks of a process: whatever they are given together stays within it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policy.values import CARDS, GIB, SUBJECT, make_layer
from tfenv.policy.budget import Budget, BudgetBook, Claimant, apply_framework_share, list_promises
from tfenv.policy.merge import merge
from tfenv.policy.model import (
    DeviceOutcome,
    EffectivePolicy,
    Grant,
    Inventory,
    MemoryLimit,
    Plan,
    PlannedDevice,
    Wall,
)
from tfenv.policy.resolve import resolve
from tfenv.policy.units import MIB
from tfenv.values import replace

TITLES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}


def gib(size: float) -> MemoryLimit:
    return MemoryLimit(bytes=int(size * GIB))


def claim(name: str, yields_to: str | None = None) -> Claimant:
    return Claimant(name, TITLES[name], yields_to)


def make_policy(limit: str | MemoryLimit | None = None, **shares: MemoryLimit) -> EffectivePolicy:
    gpu: dict[str, object] = {} if limit is None else {"memory_limit": limit}
    return merge([make_layer("project", gpu | ({"frameworks": shares} if shares else {}))], SUBJECT)


class Process:
    """A process on the first two cards, whose frameworks use them one after another."""

    def __init__(self, policy: EffectivePolicy, *, sized: bool = True) -> None:
        self.policy, self.book = policy, BudgetBook()
        self.plan = resolve(policy, Grant(("0", "1"), pci_order=True), Inventory(CARDS) if sized else Inventory())

    def open(self, name: str, yields_to: str | None = None) -> Budget:
        """What a framework gets. It uses all of it."""
        cards = dict(enumerate(self.plan.devices or ()))
        budget = self.book.fit(self.plan, cards, self.policy, claim(name, yields_to))
        self.book = self.book.record(claim(name, yields_to), budget.list_limits())
        return budget


def list_sizes(budget: Budget) -> list[int | None]:
    """What it may take of each card, in bytes."""
    assert budget.devices is not None
    return [None if card.limit is None else card.limit.on(card.total) for card in budget.devices.values()]


def test_the_first_framework_has_all_of_the_limit() -> None:
    """Alone, a framework is given the plan as it is, without a finding."""
    process = Process(make_policy(gib(8)))
    budget = process.open("torch")
    assert (budget.plan, budget.spent, budget.findings) == (process.plan, False, ())
    assert list_sizes(budget) == [8 * GIB] * 2


@pytest.mark.parametrize("limit", [gib(8), MemoryLimit(fraction=0.25)])
@pytest.mark.parametrize("sized", [True, False])
def test_the_second_gets_no_gpu(limit: MemoryLimit, sized: bool) -> None:
    """Whoever comes second sees no GPU, and the finding names the first, the key and what to write."""
    process = Process(make_policy(limit), sized=sized)
    process.open("torch")
    budget = process.open("tensorflow")
    assert (budget.spent, budget.devices) == (True, {})
    (finding,) = budget.findings
    assert (finding.code, finding.severity, finding.key) == ("budget-spent", "warning", "gpu.memory_limit")
    assert finding.message.startswith("PyTorch has all of the process's memory limit, so TensorFlow gets no GPU;")
    assert 'frameworks = {torch = "' in finding.message


def test_what_the_finding_advises_gives_both_a_gpu() -> None:
    """With the shares that the message names, each framework has half."""
    process = Process(
        make_policy(gib(8), torch=MemoryLimit(bytes=4096 * MIB), tensorflow=MemoryLimit(bytes=4096 * MIB))
    )
    assert list_sizes(process.open("tensorflow")) == list_sizes(process.open("torch")) == [4 * GIB] * 2


def test_without_a_limit_nobody_loses_anything() -> None:
    """Frameworks of an unlimited process all have the plan as it is."""
    process = Process(merge([make_layer("project", {"memory_growth": True})], SUBJECT))
    for name in TITLES:
        budget = process.open(name, yields_to="jax" if name == "tensorflow" else None)
        assert (budget.plan, budget.findings) == (process.plan, ())


@pytest.mark.parametrize("limit", [MemoryLimit(fraction=1.0), gib(40), gib(80)])
def test_a_limit_that_leaves_the_whole_card_is_no_budget(limit: MemoryLimit) -> None:
    """Where the limit is the card itself there is nothing to divide, as without a limit."""
    process = Process(make_policy(limit))
    process.open("torch")
    budget = process.open("tensorflow", yields_to="jax")
    assert (budget.plan, budget.spent, budget.findings) == (process.plan, False, ())


@pytest.mark.parametrize("order", [("jax", "tensorflow"), ("tensorflow", "jax")])
def test_shares_hold_in_any_order(order: tuple[str, str]) -> None:
    """Each framework has its share, whichever comes first, and a third has what the shares leave."""
    process = Process(make_policy(gib(8), jax=gib(5), tensorflow=gib(2)))
    given = {name: list_sizes(process.open(name)) for name in order}
    assert given == {"jax": [5 * GIB] * 2, "tensorflow": [2 * GIB] * 2}
    assert list_sizes(process.open("torch")) == [1 * GIB] * 2


def test_what_the_shares_leave_is_reserved_for_those_they_name() -> None:
    """A framework without a share that comes first leaves the others theirs. With nothing left it gets no GPU."""
    assert list_sizes(Process(make_policy(gib(8), jax=gib(6))).open("tensorflow")) == [2 * GIB] * 2
    assert Process(make_policy(gib(8), jax=gib(8))).open("tensorflow").spent


def test_a_share_above_the_limit_is_cut_to_it() -> None:
    """The limit is the ceiling of every share, and of their sum."""
    process = Process(make_policy(gib(8), jax=gib(7), torch=gib(20)))
    assert list_sizes(process.open("jax")) == [7 * GIB] * 2
    assert list_sizes(process.open("torch")) == [1 * GIB] * 2


def test_a_share_without_a_limit_is_a_limit() -> None:
    """`[gpu.frameworks]` alone limits those it names, with the allocator that keeps it. The others are unlimited."""
    process = Process(make_policy(None, jax=gib(6)))
    budget = process.open("jax")
    assert list_sizes(budget) == [6 * GIB] * 2
    assert process.plan.allocator == "bfc"
    assert [origin.key for origin in budget.plan.limits] == [("gpu", "frameworks")]
    assert list_sizes(process.open("tensorflow")) == [None] * 2


def test_a_share_is_in_the_plan_before_anything_is_open() -> None:
    """The plan of a framework has the limits of its share, on each card and where no card is known."""
    policy = make_policy(gib(8), jax=gib(6))
    process = Process(policy)
    plan = apply_framework_share(process.plan, policy, "jax")
    assert [card.limit for card in plan.devices or ()] == [gib(6)] * 2
    assert {origin.key for card in plan.devices or () for origin in card.limited_by} == {("gpu", "frameworks")}
    assert apply_framework_share(process.plan, policy, "torch") == process.plan
    assert apply_framework_share(Plan(), policy, "jax").limit == gib(6)


def test_a_framework_yields_to_the_one_that_computes() -> None:
    """TensorFlow beside JAX has no GPU under a limit, even if it comes first, unless a file gives shares."""
    budget = Process(make_policy(gib(8))).open("tensorflow", yields_to="jax")
    assert budget.spent
    assert "jax has all of the process's memory limit, so TensorFlow gets no GPU" in budget.findings[0].message
    shared = Process(make_policy(gib(8), tensorflow=gib(2)))
    assert list_sizes(shared.open("tensorflow", yields_to="jax")) == [2 * GIB] * 2


def test_cards_have_budgets_of_their_own() -> None:
    """A framework that used one card leaves all of the other."""
    process = Process(make_policy(gib(8)))
    cards = process.plan.devices or ()
    used = DeviceOutcome(0, cards[0].token, cards[0].identity, limit=8 * GIB)
    process.book = process.book.record(claim("jax"), list_promises([used]))
    budget = process.open("tensorflow")
    assert budget.devices is not None
    assert list(budget.devices) == [1]
    assert [card.identity for card in budget.plan.devices or ()] == [cards[1].identity]


def test_a_split_shrinks_with_its_card() -> None:
    """Logical GPUs fit what is left of the limit together."""
    card = PlannedDevice("0", CARDS[0], gib(8), (gib(6), gib(2)))
    plan = Plan(visible="0", devices=(card,))
    book = BudgetBook().record(claim("torch"), {card.identity: gib(4)})
    budget = book.fit(plan, {0: card}, make_policy(gib(8)), claim("tensorflow"))
    assert budget.devices is not None
    assert budget.devices[0].logical_devices == (gib(3), gib(1))


sizes = st.one_of(
    st.integers(1, 50).map(lambda count: MemoryLimit(bytes=count * GIB)),
    st.integers(1, 100).map(lambda percent: MemoryLimit(fraction=percent / 100)),
)


@given(
    limit=st.none() | sizes,
    shares=st.dictionaries(st.sampled_from(sorted(TITLES)), sizes),
    order=st.lists(st.sampled_from(sorted(TITLES)), min_size=1, max_size=6),
    sized=st.booleans(),
)
def test_together_they_never_pass_the_limit(
    limit: MemoryLimit | None, shares: Mapping[str, MemoryLimit], order: list[str], sized: bool
) -> None:
    """Whatever the shares, the order and what is known of the cards: the promises fit the limit of each card."""
    process = Process(make_policy(limit, **shares), sized=sized)
    for name in order:
        process.open(name)
    if limit is None:
        return
    # A limit that leaves the whole card is none.
    for card, device in zip(process.plan.devices or (), CARDS, strict=False):
        given = [limits[card.identity] for limits in process.book.promises.values() if card.identity in limits]
        total = device.total
        bound = limit.on(total)
        assert bound is not None
        assert total is not None
        assert bound >= total or sum(promise.on(total) or 0 for promise in given) <= bound


def test_a_limit_of_the_driver_alone_takes_no_gpu_away() -> None:
    """It holds for all frameworks of all processes together, and no file says how to divide it."""
    process = Process(make_policy())
    walls = [replace(card, wall=Wall(8 * GIB, 0, "/sys/fs/cgroup/a", 7, card.total)) for card in CARDS]
    process.plan = resolve(process.policy, Grant(("0", "1"), pci_order=True), Inventory(tuple(walls)))
    expected = [8 * GIB - process.policy.process_overhead] * 2
    assert [list_sizes(process.open(name)) for name in ("tensorflow", "jax")] == [expected] * 2
