"""Clamping the options of one client of CUDA."""

from __future__ import annotations

from typing import Any

import pytest

from tfenv.frameworks.jax.client_options import GRANULE, ClampResult, ClientView, clamp
from tfenv.policy.model import MemoryLimit, Origin, Plan, PlannedDevice

GIB = 1 << 30
MIB = 1 << 20
CARD = 24 * GIB
ORIGIN = Origin("project", "tfgpu.toml", ("gpu", "memory_limit"))


def view(
    *limits: MemoryLimit | None,
    totals: tuple[int | None, ...] = (),
    growth: bool | None = None,
    visible: str | None = None,
    **others: Any,
) -> ClientView:
    """The policy of as many GPUs as there are limits, of 24 GiB each."""
    sizes = totals or (CARD,) * len(limits)
    devices = tuple(
        PlannedDevice(str(number), limit=limit, cuda_total=size, limited_by=(ORIGIN,) if limit else ())
        for number, (limit, size) in enumerate(zip(limits, sizes, strict=True))
    )
    allocator: Any = "bfc" if any(limits) else others.pop("allocator", None)
    plan = Plan(visible=visible, devices=devices, growth=growth, allocator=allocator)
    return ClientView(plan, dict(enumerate(devices)), len(devices), **others)


def limit(size: int) -> MemoryLimit:
    return MemoryLimit(bytes=size)


def given(options: dict[str, Any], policy: ClientView) -> dict[str, Any]:
    result = clamp(options, policy)
    assert result.options is not None
    return result.options


def most(result: ClampResult, total: int = CARD) -> int:
    """The most bytes XLA takes of a card under these options: it rounds up to whole granules."""
    assert result.options is not None
    granules = -(-int(result.options["memory_fraction"] * total) // GRANULE)
    return granules * GRANULE + int(result.options["collective_memory_size"])


def codes(result: ClampResult) -> list[str]:
    return [finding.code for finding in result.findings]


@pytest.mark.parametrize("size", [GIB, 1000 * MIB, 1001 * MIB, 1000 * MIB + 1, 7 * GIB // 3, 23 * GIB, CARD - 1])
def test_a_limit_is_never_exceeded_however_the_fraction_is_rounded(size: int) -> None:
    """The fraction is a 32-bit float and XLA rounds up, and still a client takes no byte more than its limit."""
    result = clamp({"memory_fraction": 1.0}, view(limit(size)))
    assert size - 4 * MIB <= most(result) <= size
    assert result.devices[0].limit == most(result)


def test_a_fraction_of_the_card_needs_no_size() -> None:
    """A percentage limits a card whose memory nobody tells."""
    options = given({}, view(MemoryLimit(fraction=0.25), totals=(None,)))
    assert options["memory_fraction"] == 0.25


def test_a_size_of_a_card_of_unknown_memory_is_a_fault() -> None:
    """A size is no fraction of a card whose memory nobody tells, and nothing is made up."""
    with pytest.raises(ValueError, match="nobody tells"):
        clamp({}, view(limit(GIB), totals=(None,)))


def test_without_a_limit_or_growth_the_options_stay() -> None:
    """A policy that says nothing of memory changes nothing."""
    options = {"memory_fraction": 1.5, "preallocate": True, "allocator": "platform"}
    assert given(options, view(None)) == options


def test_growth_holds_whatever_the_program_asks() -> None:
    """A program that asks for all its memory at once gets growth, and a note."""
    result = clamp({"preallocate": True}, view(None, growth=True))
    assert result.options is not None
    assert result.options["preallocate"] is False
    assert codes(result) == ["clamped"]


@pytest.mark.parametrize("wish", [0.9, 1.5, -0.5, float("nan"), float("inf")])
def test_a_wider_fraction_becomes_the_limit(wish: float) -> None:
    """Fractions beyond the limit become the limit, those that are no fraction too, and are noted."""
    result = clamp({"memory_fraction": wish}, view(limit(GIB), sources={"memory_fraction": "XLA_CLIENT_MEM_FRACTION"}))
    assert GIB - 4 * MIB <= most(result) <= GIB
    assert codes(result) == ["clamped"]
    assert "XLA_CLIENT_MEM_FRACTION" in result.findings[0].message
    assert result.findings[0].path == "tfgpu.toml"


@pytest.mark.parametrize("wish", [0.3, 0.0, 0.02])
def test_a_narrower_fraction_stays(wish: float) -> None:
    """A fraction within the limit is the program's own."""
    result = clamp({"memory_fraction": wish}, view(limit(12 * GIB)))
    assert result.options is not None
    assert result.options["memory_fraction"] == pytest.approx(wish, rel=1e-6)
    assert result.options["memory_fraction"] <= wish
    assert result.findings == ()


def test_a_limit_above_what_jax_takes_by_itself_is_no_invitation() -> None:
    """JAX takes three quarters of a card. A limit of more does not make it take more."""
    assert given({}, view(limit(23 * GIB)))["memory_fraction"] == 0.75


def test_a_limit_of_the_whole_card_holds_what_goes_beyond_it() -> None:
    """A fraction above 1 is managed memory, which no limit of a card holds."""
    assert given({"memory_fraction": 1.5}, view(limit(CARD)))["memory_fraction"] == 1.0


@pytest.mark.parametrize(
    ("asked", "allocator"),
    [("platform", "default"), ("cuda_async", "default"), ("bfc", "bfc"), ("vmm", "vmm"), ("default", "default")],
)
def test_an_allocator_stays_if_it_keeps_a_limit(asked: str, allocator: str) -> None:
    """Allocators that keep no fraction are replaced under a limit, and that is noted."""
    result = clamp({"allocator": asked}, view(limit(GIB)))
    assert result.options is not None
    assert result.options["allocator"] == allocator
    assert codes(result) == ([] if asked == allocator else ["clamped"])


@pytest.mark.parametrize(
    ("written", "allocator"), [("cuda_malloc", "platform"), ("cuda_malloc_async", "cuda_async"), ("bfc", "default")]
)
def test_the_files_allocator_is_used_by_the_name_jax_has_for_it(written: str, allocator: str) -> None:
    """Without a limit the file may choose the allocator."""
    assert given({"allocator": "platform"}, view(None, allocator=written))["allocator"] == allocator


def test_memory_for_collectives_is_part_of_the_limit() -> None:
    """What the program reserves for collectives comes off its fraction, and is half of the limit at most."""
    small = clamp({"collective_memory_size": 512 * MIB}, view(limit(4 * GIB)))
    large = clamp({"collective_memory_size": 16 * GIB}, view(limit(4 * GIB)))
    none = clamp({}, view(limit(4 * GIB)))
    assert small.options is not None
    assert large.options is not None
    assert small.options["collective_memory_size"] == 512 * MIB
    assert large.options["collective_memory_size"] == 2 * GIB
    assert most(small) <= 4 * GIB
    assert most(large) <= 4 * GIB
    assert 4 * GIB - 8 * MIB <= most(none) <= 4 * GIB
    assert codes(small) == codes(none) == []
    assert codes(large) == ["clamped"]


def test_unlike_cards_share_the_smallest_fraction_and_a_warning_says_what_each_gets() -> None:
    """A size is another fraction of another card. The smallest holds for all, and nobody is left to guess."""
    result = clamp({}, view(limit(2 * GIB), limit(2 * GIB), totals=(CARD, 80 * GIB)))
    assert most(result, 80 * GIB) <= 2 * GIB
    warning = next(finding for finding in result.findings if finding.code == "unsupported")
    assert warning.severity == "warning"
    assert "GPU 0 gets 616.0 MiB, GPU 1 gets 2.0 GiB" in warning.message


def test_like_cards_and_percentages_need_no_warning() -> None:
    """The same fraction everywhere takes nothing from anybody."""
    assert codes(clamp({}, view(limit(GIB), limit(GIB)))) == []
    half = MemoryLimit(fraction=0.5)
    assert codes(clamp({}, view(half, half, totals=(CARD, 80 * GIB)))) == []


# ---- which GPUs


def test_all_gpus_that_cuda_shows_are_not_named() -> None:
    """Where the policy hides none, JAX lists GPUs as it always does."""
    assert "visible_devices" not in given({}, view(None, None))


def test_gpus_that_the_policy_does_not_allow_are_left_out() -> None:
    """Something opened CUDA before the policy could hide cards. A client is not given those."""
    policy = view(limit(GIB), None)
    narrowed = ClientView(policy.plan, {0: policy.devices[0]}, shown=2)
    assert given({}, narrowed)["visible_devices"] == [0]
    assert given({"visible_devices": [0, 1]}, narrowed)["visible_devices"] == [0]


def test_gpus_beyond_what_cuda_shows_leave_the_allowed_ones_where_the_policy_hides_some() -> None:
    """A program that counts from the whole machine is not left without a GPU because a policy hides cards."""
    result = clamp({"visible_devices": [3]}, view(None, None, visible="0,1"))
    assert result.options is not None
    assert result.options["visible_devices"] == [0, 1]
    assert codes(result) == ["no-overlap"]


@pytest.mark.parametrize("wish", [[3], [-1], []])
def test_gpus_that_nobody_has_are_jaxs_own_business(wish: list[int]) -> None:
    """Where the policy hides nothing, JAX says itself that there is no such GPU."""
    assert clamp({"visible_devices": wish}, view(limit(GIB), limit(GIB))).options is None


def test_a_negative_ordinal_is_no_wish_for_the_allowed_gpus() -> None:
    """-1 means no GPU, also where the policy hides some."""
    assert clamp({"visible_devices": [-1]}, view(None, visible="0")).options is None


@pytest.mark.parametrize(
    "options",
    [
        {"memory_fraction": "0.9"},
        {"memory_fraction": 1},
        {"preallocate": "true"},
        {"collective_memory_size": True},
        {"visible_devices": "0"},
        {"visible_devices": [0.5]},
        {"allocator": None},
    ],
)
def test_types_that_jax_refuses_are_left_to_it(options: dict[str, Any]) -> None:
    """JAX refuses an option of the wrong type in its own words."""
    assert clamp(options, view(limit(GIB))).options is None


# ---- several clients of a process


def test_a_second_client_gets_the_rest() -> None:
    """Two clients of a process together take no more than the limit."""
    first = clamp({"memory_fraction": 0.1}, view(limit(4 * GIB)))
    second = clamp({}, view(limit(4 * GIB), promised=first.promises))
    assert most(first) + most(second) <= 4 * GIB
    assert most(second) > GIB
    assert second.devices[0].limit == most(first) + most(second)


def test_a_second_client_beside_one_that_may_take_all_is_not_created() -> None:
    """There is nothing left for it."""
    first = clamp({}, view(limit(GIB), limit(GIB)))
    second = clamp({}, view(limit(GIB), limit(GIB), promised=first.promises))
    assert second.is_spent
    assert second.options is None


def test_a_second_client_gets_the_gpus_that_have_something_left() -> None:
    """A client that has one GPU leaves the other to the next."""
    first = clamp({"visible_devices": [0]}, view(limit(GIB), limit(GIB)))
    second = given({}, view(limit(GIB), limit(GIB), promised=first.promises))
    assert second["visible_devices"] == [1]


# ---- plugins that know ranges


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0.5, 0.5)),
        ({"memory_fraction": 0.25}, (0.25, 0.25)),
        ({"memory_fraction_policy": "0.25-0.9"}, (0.25, 0.5)),
        ({"memory_fraction_policy": "0.75+"}, (0.5, 0.5)),
        ({"memory_fraction_policy": "0.25"}, (0.25, 0.25)),
        ({"memory_fraction_policy": "nonsense"}, (0.5, 0.5)),
    ],
)
def test_a_range_is_written_where_the_plugin_knows_ranges(
    options: dict[str, Any], expected: tuple[float, float]
) -> None:
    """A bare fraction may be only what a client starts with. The range's end is a cap."""
    half = MemoryLimit(fraction=0.5)
    written = given(options, view(half, totals=(None,), takes_range=True))
    start, cap = written["memory_fraction_policy"].split("-")
    assert (float(start), float(cap)) == expected
    assert written["memory_fraction"] == expected[0]


def test_a_range_of_the_program_is_held_whatever_the_plugin_is_thought_to_know() -> None:
    """The plugin may be newer than the JAX that loads it, and a range would override the fraction."""
    written = given({"memory_fraction_policy": "0.9-0.9"}, view(limit(GIB)))
    assert float(written["memory_fraction_policy"].split("-")[1]) * CARD <= GIB


@pytest.mark.parametrize("options", [{"memory_fraction": -0.5}, {"collective_memory_size": 0}, {"preallocate": False}])
def test_what_stays_is_no_clamp(options: dict[str, Any]) -> None:
    """Without a limit nothing is changed, and nothing is noted."""
    result = clamp(options, view(None))
    assert result.options == options
    assert result.findings == ()


def test_no_size_for_collectives_is_no_wish() -> None:
    """0 means as much as is needed, which a limit may cut without a note."""
    assert codes(clamp({"collective_memory_size": 0}, view(limit(GIB)))) == []


def test_a_range_is_not_written_to_a_plugin_that_refuses_it() -> None:
    """Older plugins refuse an option that they do not know."""
    assert "memory_fraction_policy" not in given({}, view(limit(GIB)))
