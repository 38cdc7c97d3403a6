"""How much: limits, splits, growth and the allocator."""

from __future__ import annotations

import pytest

from tests.policy.values import CARDS, GIB, NO_NVML, PATHS, list_codes, make_layer, make_origin, pick, pick_name, plan
from tfenv.policy.model import (
    DEFAULT_OVERHEAD,
    Allocation,
    AutoChoice,
    DeviceRule,
    Inventory,
    MemoryLimit,
    Plan,
    PlannedDevice,
    Wall,
)
from tfenv.policy.resolve import NO_GPU
from tfenv.policy.units import MIB
from tfenv.values import replace


def test_a_limit_is_clamped_to_the_ceiling_of_each_card() -> None:
    """50 % of 40 GiB and of 16 GiB, where 10 GiB are asked for, are 10 and 8."""
    made = plan(
        make_layer("machine", ceiling={"memory_limit": MemoryLimit(fraction=0.5)}),
        make_layer("project", {"memory_limit": MemoryLimit(bytes=10 * GIB), "visible_devices": pick(0, 2)}),
    )
    assert [d.limit.on(d.device.total) for d in made.devices or () if d.limit and d.device] == [10 * GIB, 8 * GIB]
    assert "clamped" in list_codes(made)


def test_rules_differ_by_device_and_the_first_match_wins() -> None:
    """A rule by name replaces the table's limit on its cards only, and its split is scaled to the ceiling."""
    where, small = make_origin("project", "gpu", "device", 0), MemoryLimit(bytes=4 * GIB)
    rules = (
        DeviceRule(pick_name("*A100*"), where, MemoryLimit(bytes=20 * GIB), (MemoryLimit(bytes=10 * GIB),) * 2),
        DeviceRule(pick(0)[0], where, MemoryLimit(bytes=1 * GIB)),
    )
    made = plan(
        make_layer("machine", ceiling={"memory_limit": MemoryLimit(bytes=12 * GIB)}),
        make_layer("project", {"device": rules, "memory_limit": small, "visible_devices": pick(0, 2)}),
    )
    first, second = made.devices or ()
    assert first.limit == MemoryLimit(bytes=12 * GIB)
    assert first.logical_devices == (MemoryLimit(bytes=6 * GIB),) * 2
    assert (second.limit, second.logical_devices) == (small, ())


def test_a_position_means_the_same_gpu_in_every_key() -> None:
    """`match = 2` is the GPU that `visible_devices = [2]` shows, though TensorFlow then calls it GPU:0."""
    rule = DeviceRule(pick(2)[0], make_origin("project", "gpu", "device", 0), MemoryLimit(bytes=GIB))
    made = plan(make_layer("project", {"device": (rule,), "visible_devices": pick(2)}))
    assert [device.limit for device in made.devices or ()] == [MemoryLimit(bytes=GIB)]
    blind = plan(make_layer("project", {"device": (rule,), "visible_devices": pick(2)}), inventory=NO_NVML)
    assert [device.limit for device in blind.devices or ()] == [MemoryLimit(bytes=GIB)]


def test_a_limit_implies_the_allocator_that_keeps_it() -> None:
    """A limit overrules cuda_malloc_async. Alone it stays."""
    asked: dict[str, object] = {"allocator": "cuda_malloc_async"}
    assert plan(make_layer("project", asked)).allocator == "cuda_malloc_async"
    assert plan(make_layer("project", {**asked, "memory_limit": MemoryLimit(bytes=GIB)})).allocator == "bfc"
    assert plan(make_layer("project", {"memory_growth": True})).allocator is None


def test_required_growth_overrules_a_request_for_none() -> None:
    """`memory_growth = false` under `require_memory_growth` is growth, with a note."""
    required = make_layer("machine", ceiling={"require_memory_growth": True})
    made = plan(required, make_layer("project", {"memory_growth": False}))
    assert (made.growth, list_codes(made)) == (True, ["clamped"])
    assert plan(make_layer("project", {"memory_growth": False})).growth is False
    assert plan(make_layer("project", {"memory_limit": MemoryLimit(bytes=GIB)})).growth is None


# ---- what holds


def test_all_of_a_card_is_no_limit_beside_a_size() -> None:
    """1000 MiB and a ceiling of 100 % are 1000 MiB, also on unknown cards. 100 % alone stays 100 %."""
    everything = make_layer("machine", ceiling={"memory_limit": MemoryLimit(fraction=1.0)})
    small = MemoryLimit(bytes=1000 * MIB)
    made = plan(everything, make_layer("project", {"memory_limit": small}), inventory=NO_NVML)
    assert (made.limit, made.limited_by) == (small, (make_origin("project", "gpu", "memory_limit"),))
    assert made.pci_order is False
    assert plan(everything, inventory=NO_NVML).limit == MemoryLimit(fraction=1.0)


def test_the_key_that_limits_each_card_is_known() -> None:
    """Half of an A100 is more than 10 GiB, half of a T4 less: on each card another key holds."""
    machine = make_layer("machine", ceiling={"memory_limit": MemoryLimit(fraction=0.5)})
    project = make_layer("project", {"memory_limit": MemoryLimit(bytes=10 * GIB), "visible_devices": pick(0, 2)})
    mine = make_origin("project", "gpu", "memory_limit")
    administrators = make_origin("machine", "ceiling", "memory_limit")
    made = plan(machine, project)
    assert [device.limited_by for device in made.devices or ()] == [(mine,), (administrators,)]
    assert (made.limits, made.allocated_by) == ((mine, administrators), (mine, administrators))
    blind = plan(machine, project, inventory=NO_NVML)
    assert [device.limited_by for device in blind.devices or ()] == [(mine, administrators)] * 2


def test_equal_ceilings_are_told_apart_by_their_layer() -> None:
    """Where user and machine set the same value, the administrator's key is the one that holds."""
    same: dict[str, object] = {"memory_limit": MemoryLimit(bytes=GIB), "require_memory_growth": True}
    made = plan(make_layer("user", ceiling=same), make_layer("machine", ceiling=same))
    assert made.limited_by == (make_origin("machine", "ceiling", "memory_limit"),)
    assert made.grown_by == make_origin("machine", "ceiling", "require_memory_growth")


def test_a_files_request_above_a_ceiling_names_who_asked_and_what_held() -> None:
    """The finding is about the key that asked, and names the ceiling."""
    machine = make_layer("machine", ceiling={"memory_limit": MemoryLimit(bytes=GIB), "require_memory_growth": True})
    asked: dict[str, object] = {"memory_limit": MemoryLimit(), "memory_growth": False, "allocator": "cuda_malloc"}
    findings = {finding.key: finding for finding in plan(machine, make_layer("project", asked)).findings}
    held = {"gpu.memory_limit": "memory_limit", "gpu.memory_growth": "require_memory_growth"}
    held["gpu.allocator"] = "memory_limit"
    assert set(findings) == set(held)
    for key, ceiling in held.items():
        assert findings[key].asked_by == f"{PATHS['project']} ({key})"
        assert findings[key].held_by == f"{PATHS['machine']} (ceiling.{ceiling})"


# ---- over all processes of a user


def test_memory_total_bounds_a_process_and_is_kept_for_all_of_the_users() -> None:
    """Alone a process may take the user's whole total, and what the user's others leave of it beside them."""
    ceiling = make_layer("machine", ceiling={"memory_total": MemoryLimit(bytes=16 * GIB)})
    made = plan(ceiling, make_layer("user", {"visible_devices": pick(0), "memory_limit": MemoryLimit(bytes=10 * GIB)}))
    assert made.devices is not None
    assert made.devices[0].limit == MemoryLimit(bytes=10 * GIB)
    assert made.devices[0].user_total == MemoryLimit(bytes=16 * GIB)
    assert made.takes_leases
    unlimited = plan(ceiling, make_layer("user", {"visible_devices": pick(0)}))
    assert [device.limit for device in unlimited.devices or ()] == [MemoryLimit(bytes=16 * GIB)]
    allocations = (Allocation(CARDS[0].uuid, 6 * GIB),)
    left = plan(ceiling, make_layer("user", {"visible_devices": pick(0)}), allocations=allocations)
    assert [device.limit for device in left.devices or ()] == [MemoryLimit(bytes=6 * GIB)]
    assert [(f.code, f.held_by) for f in left.findings] == [("clamped", "/etc/tfgpu/tfgpu.toml (ceiling.memory_total)")]


@pytest.mark.parametrize("settings", [{}, {"visible_devices": pick(0)}, {"visible_devices": AutoChoice(1)}])
def test_without_an_allocation_no_gpu_is_visible(settings: dict[str, object]) -> None:
    """Where the user's other processes have all of the total, nothing is visible, whatever the policy lists."""
    ceiling = make_layer("machine", ceiling={"memory_total": MemoryLimit(bytes=16 * GIB)})
    made = plan(ceiling, make_layer("user", settings), allocations=())
    assert (made.visible, made.devices) == (NO_GPU, ())


def test_memory_total_of_several_layers_is_the_smallest() -> None:
    """Ceilings hold together, a share of the card among them."""
    made = plan(
        make_layer("machine", ceiling={"memory_total": MemoryLimit(bytes=16 * GIB)}),
        make_layer("project", ceiling={"memory_total": MemoryLimit(fraction=0.5)}),
    )
    assert made.devices is not None
    totals = [
        device.user_total.on(device.device.total) for device in made.devices if device.user_total and device.device
    ]
    assert totals == [16 * GIB, 16 * GIB, 8 * GIB, 8 * GIB]


# ---- what the driver keeps

SLICE = "/sys/fs/cgroup/user.slice/user-1000.slice"


def build_walls(size: int, *, reported: bool = False) -> Inventory:
    """The four cards in a cgroup that may take `size` bytes of each."""
    walls = [Wall(size, 0, SLICE, 7, card.total, (9, 7)) for card in CARDS]
    totals = [size if reported else card.total for card in CARDS]
    found = zip(CARDS, walls, totals, strict=True)
    return Inventory(devices=tuple(replace(card, wall=wall, total=total) for card, wall, total in found))


def get_first(made: Plan) -> PlannedDevice:
    assert made.devices
    return made.devices[0]


def test_a_process_is_limited_below_what_the_driver_allows() -> None:
    """The framework refuses before the driver does: what a process takes beside its limit counts for the driver."""
    made = plan(make_layer("project", {"memory_growth": True}), inventory=build_walls(8 * GIB))
    first = get_first(made)
    assert first.limit == MemoryLimit(bytes=8 * GIB - DEFAULT_OVERHEAD)
    assert list(map(str, first.limited_by)) == [f"{SLICE} (hard_limit)"]
    assert (made.allocator, first.user_total) == ("bfc", None)
    small = plan(make_layer("project", {"memory_growth": True}), inventory=build_walls(800 * MIB))
    assert get_first(small).limit == MemoryLimit(bytes=400 * MIB), "half, where the overhead leaves little"


def test_a_tighter_limit_stays_below_the_drivers() -> None:
    """2 GiB stay 2 GiB in a cgroup of 8, and 10 GiB are cut. The record says by what."""
    two, ten = (make_layer("user", {"memory_limit": MemoryLimit(bytes=size * GIB)}) for size in (2, 10))
    assert get_first(plan(two, inventory=build_walls(8 * GIB))).limit == MemoryLimit(bytes=2 * GIB)
    cut = plan(ten, inventory=build_walls(8 * GIB))
    assert get_first(cut).limit == MemoryLimit(bytes=8 * GIB - DEFAULT_OVERHEAD)
    assert [(f.code, f.held_by) for f in cut.findings] == [("clamped", f"{SLICE} (hard_limit)")]


def test_a_share_is_of_what_cuda_reports_but_a_total_is_of_the_card() -> None:
    """CUDA reports the limit of a process's own cgroup as the card's memory.

    `memory_total` may be where that limit came from: half of a card of 40 GiB, and not half of the half.
    """
    inventory = build_walls(20 * GIB, reported=True)
    half = MemoryLimit(fraction=0.5)
    asked = get_first(plan(make_layer("user", {"memory_limit": half}), inventory=inventory))
    assert (asked.limit, asked.total) == (half, 20 * GIB)
    total = get_first(plan(make_layer("machine", ceiling={"memory_total": half}), inventory=inventory))
    assert total.user_total == MemoryLimit(bytes=20 * GIB)
    assert total.limit == MemoryLimit(bytes=20 * GIB - DEFAULT_OVERHEAD)
    reached = get_first(plan(make_layer("user", {"memory_limit": half}), inventory=build_walls(20 * GIB)))
    assert reached.limit == MemoryLimit(bytes=20 * GIB - DEFAULT_OVERHEAD), "half of the card, less the overhead"


def test_what_a_cgroups_other_processes_leave_is_said() -> None:
    """A choice that got less than the limit of its cgroup has the limit that was left."""
    choosing = make_layer("user", {"visible_devices": AutoChoice(1, when_busy="share")})
    allocations = (Allocation(CARDS[0].uuid, 3 * GIB, shared=True),)
    made = plan(choosing, inventory=build_walls(8 * GIB), allocations=allocations)
    assert get_first(made).limit == MemoryLimit(bytes=3 * GIB)
    assert "that the cgroup's other processes leave" in made.findings[0].message


def test_unlike_cards_in_a_limited_cgroup_are_told_apart() -> None:
    """Each card has its own limit there, so CUDA is to count as NVML does."""
    walls = build_walls(8 * GIB)
    assert plan(make_layer("user", {"memory_growth": True})).devices is None
    made = plan(make_layer("user", {"memory_growth": True}), inventory=walls)
    assert made.pci_order
    assert made.devices is not None
    assert len(made.devices) == len(CARDS)
