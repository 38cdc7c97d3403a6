"""`memory_limit = "granted"`: the share that a launcher gave, and what holds where nobody gave one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policy.values import (
    CARDS,
    GIB,
    SUBJECT,
    RandomCase,
    cases,
    list_codes,
    make_layer,
    make_origin,
    make_table,
    pick,
    pick_name,
    plan,
)
from tfenv.policy.limits import mixes_sizes_and_shares
from tfenv.policy.merge import merge
from tfenv.policy.model import DeviceRule, EffectivePolicy, Grant, Layer, MemoryLimit, Plan, Share
from tfenv.policy.resolve import resolve
from tfenv.sharing.request import request_from_plan
from tfenv.values import replace

GRANTED = MemoryLimit(granted=True)
QUARTER = Grant(("0", "2"), pci_order=True, launcher="Ray", share=Share("Ray", "num_gpus=0.25", 0.25))
SHARDS = Grant(("0",), pci_order=True, launcher="Slurm", share=Share("Slurm", "3 shards", shards=3))
NOTHING_SAID = Grant(("0", "2"), pci_order=True)
FIRST_CARD: dict[str, object] = {"visible_devices": pick(0)}


def list_bytes(made: Plan) -> list[int | None]:
    """What the process may take of each card."""
    return [d.limit.on(d.device.total) if d.limit and d.device else None for d in made.devices or ()]


def split_into_shards(number: int) -> Layer:
    """The machine's file, with `shards_per_gpu`."""
    return replace(make_layer("machine"), machine=make_table("machine", "machine", {"shards_per_gpu": number}))


@pytest.mark.parametrize("section", ["gpu", "ceiling"])
def test_the_share_is_of_each_cards_memory(section: str) -> None:
    """A quarter of 40 GiB and of 16 GiB, as a setting and as a ceiling."""
    made = plan(make_layer("project", **{section: {"memory_limit": GRANTED}}), grant=QUARTER)  # type: ignore[arg-type]
    assert list_bytes(made) == [10 * GIB, 4 * GIB]
    assert (made.share, made.allocator, list_codes(made)) == (QUARTER.share, "bfc", [])


@pytest.mark.parametrize(("size", "holds"), [(GIB, GIB), (12 * GIB, 10 * GIB)])
def test_the_smaller_of_the_share_and_another_ceiling_holds(size: int, holds: int) -> None:
    """On the card of 40 GiB, 1 GiB is tighter than the quarter, and 12 GiB is not."""
    other = make_layer("user", ceiling={"memory_limit": MemoryLimit(bytes=size)})
    made = plan(make_layer("machine", ceiling={"memory_limit": GRANTED}), other, grant=QUARTER)
    assert list_bytes(made)[0] == holds


def test_a_wish_above_the_share_is_clamped_to_it() -> None:
    """The clamp names the file that asked and the ceiling that holds."""
    wish = make_layer("project", {"memory_limit": MemoryLimit(bytes=30 * GIB), **FIRST_CARD})
    made = plan(make_layer("machine", ceiling={"memory_limit": GRANTED}), wish, grant=QUARTER)
    assert list_bytes(made) == [10 * GIB]
    (clamp,) = (finding for finding in made.findings if finding.code == "clamped")
    assert (clamp.asked, clamp.given) == ("memory_limit = 30.0 GiB", "25%")


def test_an_entry_for_some_gpus_may_be_granted() -> None:
    """`[[gpu.device]]` with "granted" limits its cards to the share, and the table's limit the others."""
    rule = DeviceRule(pick_name("*A100*"), make_origin("project", "gpu", "device", 0), GRANTED)
    gpu: dict[str, object] = {"device": (rule,), "memory_limit": MemoryLimit(bytes=GIB)}
    assert list_bytes(plan(make_layer("project", gpu), grant=QUARTER)) == [10 * GIB, GIB]
    assert list_bytes(plan(make_layer("project", gpu), grant=NOTHING_SAID)) == [GIB, GIB]


SHARES: dict[str, tuple[Share, int, float]] = {
    "three of four": (Share("Slurm", "", shards=3), 4, 0.75),
    "divided among two tasks": (Share("Slurm", "", 0.5, shards=3), 4, 0.375),
    "no more than a GPU": (Share("Slurm", "", shards=5), 4, 1.0),
    "seven of two GPUs: at least three of each": (Share("Slurm", "", shards=7, gpus=2), 4, 0.75),
    "three of two GPUs: at least one of each": (Share("Slurm", "", shards=3, gpus=2), 4, 0.25),
    "twelve of three GPUs": (Share("Slurm", "", shards=12, gpus=3), 4, 1.0),
}


@pytest.mark.parametrize(("share", "per_gpu", "fraction"), SHARES.values(), ids=SHARES)
def test_shards_are_a_part_of_a_gpu(share: Share, per_gpu: int, fraction: float) -> None:
    """Of shards of several GPUs only the fewest that each can hold are certain."""
    assert share.measure(per_gpu) == fraction


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 6), st.data())
def test_tasks_together_never_have_more_than_the_shards(held: list[int], tasks: int, data: st.DataObject) -> None:
    """However shards lie on the GPUs, all tasks together stay within the shards of each GPU, to the byte."""
    per_gpu = data.draw(st.integers(max(held), 12))
    total = data.draw(st.sampled_from([card.total or 0 for card in CARDS] + [84_954_578_944, 25_393_692_672]))
    fraction = Share("Slurm", "", 1 / tasks, shards=sum(held), gpus=len(held)).measure(per_gpu)
    limit = MemoryLimit(fraction=fraction).on(total)
    assert limit is not None
    assert limit * tasks * per_gpu <= min(held) * total


# ---- nothing tells the share


def test_without_a_share_the_next_layers_limit_holds() -> None:
    """ "granted" counts as if the project had not written it, and the finding names what holds."""
    user = make_layer("user", {"memory_limit": MemoryLimit(bytes=GIB)})
    made = plan(user, make_layer("project", {"memory_limit": GRANTED, **FIRST_CARD}))
    assert list_bytes(made) == [GIB]
    (finding,) = made.findings
    assert (finding.code, finding.severity, finding.key) == ("no-share", "warning", "gpu.memory_limit")
    assert "no launcher gave this process a share of a GPU" in finding.message
    assert "/home/a/.config/tfgpu/tfgpu.toml (gpu.memory_limit) holds instead" in finding.message
    assert made.share is None


def test_without_a_share_the_other_ceilings_hold() -> None:
    """A ceiling that is not known is left out. A limit of another layer stays."""
    layers = (
        make_layer("machine", ceiling={"memory_limit": GRANTED}),
        make_layer("user", ceiling={"memory_limit": MemoryLimit(bytes=GIB)}),
    )
    assert list_bytes(plan(*layers, grant=NOTHING_SAID)) == [GIB, GIB]
    alone = plan(layers[0])
    assert (alone.limit, alone.allocator) == (None, None)
    assert [finding.key for finding in alone.findings] == ["ceiling.memory_limit"]


def test_shards_of_unknown_size_say_what_to_write() -> None:
    """Slurm's shards are no share until the machine's file says how many a GPU has."""
    project = make_layer("project", {"memory_limit": GRANTED})
    (finding,) = plan(project, grant=SHARDS).findings
    assert finding.code == "no-share"
    assert "Slurm gave 3 shards and does not say of how many" in finding.message
    assert "write shards_per_gpu in [machine] of /etc/tfgpu/tfgpu.toml" in finding.message
    assert list_bytes(plan(split_into_shards(4), project, grant=SHARDS)) == [30 * GIB]


def test_only_the_machines_file_says_how_many_shards_a_gpu_has() -> None:
    """A project that could would have as much as it likes."""
    stranger = replace(make_layer("project"), machine=make_table("project", "machine", {"shards_per_gpu": 1}))
    assert merge([split_into_shards(4), stranger], SUBJECT).shards_per_gpu == 4
    assert merge([stranger], SUBJECT).shards_per_gpu is None


@pytest.mark.parametrize(("tokens", "codes"), [((), []), (("0",), ["no-share"])])
def test_a_process_without_gpus_misses_no_share(tokens: tuple[str, ...], codes: list[str]) -> None:
    """There is nothing to limit in a job that has no GPU."""
    made = plan(make_layer("machine", ceiling={"memory_limit": GRANTED}), grant=Grant(tokens, launcher="Slurm"))
    assert [code for code in list_codes(made) if code == "no-share"] == codes


# ---- what else reads a limit


def test_a_share_beside_a_size_needs_the_cards() -> None:
    """Only the card tells which of them is the smaller, so NVML is asked."""
    mixed: dict[str, Any] = {"memory_limit": GRANTED}
    policy = merge([make_layer("project", mixed, {"memory_limit": MemoryLimit(bytes=GIB)})], SUBJECT)
    assert mixes_sizes_and_shares(policy)
    assert not mixes_sizes_and_shares(merge([make_layer("project", mixed)], SUBJECT))


def test_a_lease_is_for_the_share() -> None:
    """Who shares a card under "granted" declares the bytes that follow from it."""
    made = plan(make_layer("project", {"memory_limit": GRANTED}), grant=QUARTER)
    asked = request_from_plan(made, uid=1000)
    assert asked is not None
    assert [candidate.need for candidate in asked.candidates] == [10 * GIB, 4 * GIB]


@given(cases)
def test_no_process_under_a_granted_ceiling_takes_more_than_its_share(case: RandomCase) -> None:
    """Whatever layers say and programs ask for: with a share, each GPU's limit is within it."""
    share = case.grant.share or QUARTER.share
    assert share is not None
    # In a layer of its own: a more specific table of the same layer may replace it.
    ceiling = make_layer("run", ceiling={"memory_limit": GRANTED})
    policy: EffectivePolicy = merge([*case.layers, split_into_shards(4), ceiling], SUBJECT)
    fraction = share.measure(policy.shards_per_gpu)
    made = resolve(policy, replace(case.grant, share=share), case.inventory, case.request)
    assert fraction is not None
    for device in made.devices or ():
        total = device.total or 24 * GIB
        assert device.limit is not None
        allowed = device.limit.on(total)
        assert allowed is not None
        assert allowed <= total * fraction
        assert sum(part.on(total) or 0 for part in device.logical_devices) <= total * fraction or device.total is None
    assert "no-share" not in list_codes(made)
