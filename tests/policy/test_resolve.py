"""From a policy to what one process may use: nothing ever widens."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policy.values import (
    CARDS,
    GIB,
    INVENTORY,
    SUBJECT,
    at,
    grants,
    layer,
    layers,
    name,
    origin,
    token_lists,
    uuid,
)
from tfenv.policy.merge import merge
from tfenv.policy.model import (
    AutoChoice,
    Ceiling,
    Device,
    DeviceRule,
    Grant,
    Inventory,
    Layer,
    MemoryLimit,
    Plan,
    RankChoice,
    Seat,
    Selector,
)
from tfenv.policy.resolve import NO_GPU, needs_inventory, resolve, valid_tokens

BLIND = Inventory()
FREE = Grant()


def plan(
    *made: Layer,
    grant: Grant = FREE,
    inventory: Inventory = INVENTORY,
    request: str | None = None,
    seats: tuple[Seat, ...] | None = None,
) -> Plan:
    """The plan of these layers on a machine with two A100 and two T4."""
    tokens = None if request is None else tuple(request.split(",")) if request else ()
    return resolve(merge(made, SUBJECT), grant, inventory, tokens, seats)


def codes(made: Plan) -> list[str]:
    return [finding.code for finding in made.findings]


# ---- which GPUs


@pytest.mark.parametrize("inventory", [INVENTORY, BLIND])
def test_positions_are_written_as_tokens_with_and_without_nvml(inventory: Inventory) -> None:
    """[1, 0] becomes CUDA_VISIBLE_DEVICES=1,0, in the order asked for, under nvidia-smi's numbering."""
    made = plan(layer("project", {"visible_devices": at(1, 0)}), inventory=inventory)
    assert (made.visible, made.pci_order) == ("1,0", True)


def test_positions_count_within_the_grant_and_tokens_stay_verbatim() -> None:
    """Position 1 of a grant of two UUIDs is the second of them, as the scheduler wrote it."""
    grant = Grant((CARDS[3].uuid[:12], CARDS[2].uuid))
    made = plan(layer("project", {"visible_devices": at(1)}), grant=grant)
    assert (made.visible, made.pci_order) == (CARDS[2].uuid, False)


def test_positions_count_within_what_the_administrator_allows() -> None:
    """Position 0 is the first GPU of grant and machine's allowed devices together."""
    machine = layer("machine", ceiling={"allowed_devices": at(2, 3)})
    assert plan(machine, layer("project", {"visible_devices": at(0)})).visible == "2"
    assert plan(machine, layer("user", {"visible_devices": at(1)}), inventory=BLIND).visible == "3"


def test_numbers_of_the_machine_layer_are_the_machines_own() -> None:
    """`allowed_devices = [2]` is nvidia-smi's GPU 2, wherever it stands in the grant."""
    grant = Grant((CARDS[3].uuid, CARDS[2].uuid))
    assert plan(layer("machine", ceiling={"allowed_devices": at(2)}), grant=grant).visible == CARDS[2].uuid


def test_uuids_and_names_select_devices() -> None:
    """A UUID prefix names one card, a glob on the product name all that match, whatever their case."""
    assert plan(layer("project", {"visible_devices": (uuid("GPU-00000002"),)})).visible == "2"
    assert plan(layer("project", {"visible_devices": (name("*t4"),)})).visible == "2,3"


@pytest.mark.parametrize("wish", [at(7), (name("*H200*"),), (uuid("GPU-ffff"),)])
def test_a_wish_that_names_nothing_keeps_the_list_and_says_so(wish: tuple[Selector, ...]) -> None:
    """Nobody trains on the CPU for days because of a typing error."""
    made = plan(layer("project", {"visible_devices": wish}))
    assert made.visible == "0,1,2,3"
    assert codes(made) == ["no-overlap"]
    assert made.findings[0].severity == "error"


def test_a_wish_that_names_too_much_keeps_what_there_is() -> None:
    """[0, 9] on four cards is [0], with a warning."""
    made = plan(layer("project", {"visible_devices": at(0, 9)}))
    assert (made.visible, codes(made)) == ("0", ["no-such-device"])


def test_none_is_honoured() -> None:
    """`visible_devices = "none"` means it, without a finding."""
    made = plan(layer("project", {"visible_devices": ()}))
    assert (made.visible, made.devices, made.findings) == (NO_GPU, (), ())


def test_all_changes_nothing() -> None:
    """ "all" and no word on visibility leave CUDA_VISIBLE_DEVICES alone."""
    assert plan(layer("project", {"visible_devices": "all"})).visible is None
    assert plan(layer("project", {"memory_growth": True})).visible is None


def test_the_fewest_devices_hold() -> None:
    """The smallest max_devices of all layers cuts the list, and the record says so."""
    made = plan(layer("machine", ceiling={"max_devices": 3}), layer("project", ceiling={"max_devices": 2}))
    assert made.visible == "0,1"
    assert "clamped" in codes(made)
    assert plan(layer("machine", ceiling={"max_devices": 2}), inventory=BLIND).visible == "0,1"


def test_the_grant_and_the_administrator_may_leave_nothing_together() -> None:
    """A grant of GPU 0 where GPU 1 is allowed gives neither: no GPU, loudly."""
    made = plan(layer("machine", ceiling={"allowed_devices": at(1)}), grant=Grant(("0",), pci_order=True))
    assert (made.visible, codes(made)) == (NO_GPU, ["no-overlap"])


def test_what_the_administrator_allows_by_name_needs_nvml_and_says_so() -> None:
    """Without NVML nobody knows which cards are meant: no GPU, and the reason is not the grant."""
    by_name = layer("machine", ceiling={"allowed_devices": (name("*A100*"),)})
    made = plan(by_name, inventory=BLIND)
    assert (made.visible, codes(made)) == (NO_GPU, ["no-inventory"])
    by_uuid = layer("machine", ceiling={"allowed_devices": (uuid("GPU-00000001"),)})
    assert codes(plan(by_uuid, grant=Grant(("1",)), inventory=BLIND)) == ["no-inventory"]


def test_require_grant_means_no_gpu_in_a_job_without_one() -> None:
    """Inside a scheduler's job an unset CUDA_VISIBLE_DEVICES means none; outside of one, all."""
    machine = layer("machine", ceiling={"require_grant": True})
    assert plan(machine, grant=Grant(scheduler=True)).visible == NO_GPU
    assert plan(machine, grant=Grant(("1",), scheduler=True)).visible == "1"
    assert plan(machine).visible == "0,1,2,3"


CHOOSING = (
    layer("machine", ceiling={"allowed_devices": at(1, 2, 3)}),
    layer("user", {"visible_devices": AutoChoice(2, when_busy="share")}),
)


def test_an_automatic_choice_leaves_the_candidates_until_the_places_are_known() -> None:
    """`{count = 2}` shows all allowed cards before the choice, and those of the seats after it."""
    made = plan(*CHOOSING)
    assert (made.visible, codes(made)) == ("1,2,3", [])
    assert made.choosing == AutoChoice(2, when_busy="share")
    chosen = plan(*CHOOSING, seats=(Seat(CARDS[3].uuid), Seat(CARDS[1].uuid)))
    assert (chosen.visible, chosen.choosing) == ("1,3", None)


def test_a_seat_outside_the_candidates_widens_nothing() -> None:
    """What somebody chose elsewhere is no way around the ceilings; no seat is no GPU."""
    assert plan(*CHOOSING, seats=(Seat(CARDS[0].uuid), Seat(CARDS[1].uuid))).visible == "1"
    assert plan(*CHOOSING, seats=()).visible == NO_GPU


def test_ceilings_bound_how_many_are_chosen_not_which() -> None:
    """`max_devices = 1` beside `{count = 2}`: one of all the candidates, and a clamp that names the ceiling."""
    made = plan(*CHOOSING, layer("project", ceiling={"max_devices": 1}))
    assert (made.visible, codes(made)) == ("1,2,3", ["clamped"])
    assert made.choosing is not None
    assert made.choosing.count == 1
    assert "project" not in (made.findings[0].path or "")
    few = plan(layer("machine", ceiling={"allowed_devices": at(2)}), CHOOSING[1])
    assert (few.visible, codes(few)) == ("2", ["clamped"])
    assert plan(CHOOSING[1], layer("machine", ceiling={"max_devices": 0})).visible == NO_GPU


def test_the_program_narrows_the_candidates() -> None:
    """CUDA_VISIBLE_DEVICES of the program's own leaves those cards to choose from; a wish for the CPU is kept."""
    assert plan(*CHOOSING, request="3,2,0").visible == "3,2"
    assert plan(*CHOOSING, request="").choosing is None


def test_without_nvml_an_automatic_choice_waits_for_whoever_can_tell() -> None:
    """Nothing is written before the first listing; then the first ones are taken by their numbers."""
    alone = CHOOSING[1]
    assert plan(alone, inventory=BLIND).visible is None
    assert plan(alone, inventory=BLIND, seats=(Seat("0"), Seat("1"))).visible == "0,1"
    granted = plan(alone, inventory=BLIND, grant=Grant(("3", "1", "2")), seats=(Seat("3"), Seat("1")))
    assert granted.visible == "3,1"


def test_memory_total_bounds_a_process_and_is_kept_for_all_of_the_users() -> None:
    """Alone a process may take the user's whole total, and what the user's others leave of it beside them."""
    ceiling = layer("machine", ceiling={"memory_total": MemoryLimit(bytes=16 * GIB)})
    made = plan(ceiling, layer("user", {"visible_devices": at(0), "memory_limit": MemoryLimit(bytes=10 * GIB)}))
    assert made.devices is not None
    assert made.devices[0].limit == MemoryLimit(bytes=10 * GIB)
    assert made.devices[0].user_total == MemoryLimit(bytes=16 * GIB)
    assert made.takes_leases
    unlimited = plan(ceiling, layer("user", {"visible_devices": at(0)}))
    assert [device.limit for device in unlimited.devices or ()] == [MemoryLimit(bytes=16 * GIB)]
    seats = (Seat(CARDS[0].uuid, 6 * GIB),)
    left = plan(ceiling, layer("user", {"visible_devices": at(0)}), seats=seats)
    assert [device.limit for device in left.devices or ()] == [MemoryLimit(bytes=6 * GIB)]
    assert [(f.code, f.held_by) for f in left.findings] == [("clamped", "/etc/tfgpu/tfgpu.toml (ceiling.memory_total)")]


def test_memory_total_of_several_layers_is_the_smallest() -> None:
    """Ceilings hold together, a share of the card among them."""
    made = plan(
        layer("machine", ceiling={"memory_total": MemoryLimit(bytes=16 * GIB)}),
        layer("project", ceiling={"memory_total": MemoryLimit(fraction=0.5)}),
    )
    assert made.devices is not None
    totals = [
        device.user_total.on(device.device.total) for device in made.devices if device.user_total and device.device
    ]
    assert totals == [16 * GIB, 16 * GIB, 8 * GIB, 8 * GIB]


def test_each_rank_takes_its_own_place() -> None:
    """Local ranks spread over the list; more ranks than cards share, with a finding."""
    project = layer("project", {"visible_devices": RankChoice()})
    assert [plan(project, grant=Grant(rank=rank)).visible for rank in range(4)] == ["0", "1", "2", "3"]
    assert plan(project).visible == "0,1,2,3"
    assert codes(plan(project, grant=Grant(("3",), rank=1))) == ["more-ranks-than-gpus"]


# ---- what the program asks


def test_the_program_may_narrow() -> None:
    """CUDA_VISIBLE_DEVICES set by the script is intersected with the policy, in the script's order."""
    project = layer("project", {"visible_devices": at(0, 1, 2)})
    assert plan(project, request="2,1").visible == "2,1"
    assert plan(project, request="").visible == NO_GPU
    assert plan(project, request="-1").visible == NO_GPU


def test_the_program_may_not_widen() -> None:
    """A wish beyond the list is cut to the list, one that leaves nothing keeps it."""
    project = layer("project", {"visible_devices": at(1, 2)})
    wider = plan(project, request="0,1,3")
    assert (wider.visible, codes(wider)) == ("1", ["clamped"])
    elsewhere = plan(project, request="0")
    assert (elsewhere.visible, codes(elsewhere)) == ("1,2", ["no-overlap"])


def test_the_program_chooses_before_devices_are_counted() -> None:
    """Under max_devices = 1 a script that names GPU 2 gets GPU 2, not nothing."""
    assert plan(layer("machine", ceiling={"max_devices": 1}), request="2").visible == "2"


def test_a_policy_without_a_word_on_visibility_leaves_the_programs_list() -> None:
    """Only growth is declared: whatever the program writes stays."""
    made = plan(layer("project", {"memory_growth": True}), grant=Grant(("0",), pci_order=True), request="3")
    assert made.visible is None
    assert devices_of(made) == [CARDS[3]]


# ---- how much


def test_a_limit_is_clamped_to_the_ceiling_of_each_card() -> None:
    """50 % of 40 GiB and of 16 GiB, and a wish of 10 GiB: 10 and 8."""
    made = plan(
        layer("machine", ceiling={"memory_limit": MemoryLimit(fraction=0.5)}),
        layer("project", {"memory_limit": MemoryLimit(bytes=10 * GIB), "visible_devices": at(0, 2)}),
    )
    assert [d.limit.on(d.device.total) for d in made.devices or () if d.limit and d.device] == [10 * GIB, 8 * GIB]
    assert "clamped" in codes(made)


def test_rules_differ_by_device_and_the_first_match_wins() -> None:
    """A rule by name replaces the table's limit on its cards only, and its split is scaled to the ceiling."""
    where = origin("project", "gpu", "device", 0)
    rules = (
        DeviceRule(name("*A100*"), where, MemoryLimit(bytes=20 * GIB), (MemoryLimit(bytes=10 * GIB),) * 2),
        DeviceRule(at(0)[0], where, MemoryLimit(bytes=1 * GIB)),
    )
    made = plan(
        layer("machine", ceiling={"memory_limit": MemoryLimit(bytes=12 * GIB)}),
        layer("project", {"device": rules, "memory_limit": MemoryLimit(bytes=4 * GIB), "visible_devices": at(0, 2)}),
    )
    first, second = made.devices or ()
    assert first.limit == MemoryLimit(bytes=12 * GIB)
    assert first.logical_devices == (MemoryLimit(bytes=6 * GIB),) * 2
    assert (second.limit, second.logical_devices) == (MemoryLimit(bytes=4 * GIB), ())


def test_a_position_means_the_same_gpu_in_every_key() -> None:
    """`match = 2` is the GPU that `visible_devices = [2]` shows, though TensorFlow then calls it GPU:0."""
    rule = DeviceRule(at(2)[0], origin("project", "gpu", "device", 0), MemoryLimit(bytes=GIB))
    made = plan(layer("project", {"device": (rule,), "visible_devices": at(2)}))
    assert [device.limit for device in made.devices or ()] == [MemoryLimit(bytes=GIB)]
    blind = plan(layer("project", {"device": (rule,), "visible_devices": at(2)}), inventory=BLIND)
    assert [device.limit for device in blind.devices or ()] == [MemoryLimit(bytes=GIB)]


def test_a_limit_implies_the_allocator_that_keeps_it() -> None:
    """cuda_malloc_async is a wish that a limit overrules; alone it stands."""
    wish: dict[str, object] = {"allocator": "cuda_malloc_async"}
    assert plan(layer("project", wish)).allocator == "cuda_malloc_async"
    assert plan(layer("project", {**wish, "memory_limit": MemoryLimit(bytes=GIB)})).allocator == "bfc"
    assert plan(layer("project", {"memory_growth": True})).allocator is None


def test_required_growth_beats_a_wish_for_none() -> None:
    """`memory_growth = false` under `require_memory_growth` is growth, with a note."""
    made = plan(layer("machine", ceiling={"require_memory_growth": True}), layer("project", {"memory_growth": False}))
    assert (made.growth, codes(made)) == (True, ["clamped"])
    assert plan(layer("project", {"memory_growth": False})).growth is False
    assert plan(layer("project", {"memory_limit": MemoryLimit(bytes=GIB)})).growth is None


def test_unlike_cards_in_cudas_own_order_are_not_guessed() -> None:
    """Without a list CUDA counts the fastest first: which card GPU:0 is cannot be told, so no card is named."""
    made = plan(layer("project", {"memory_limit": MemoryLimit(bytes=GIB)}))
    assert (made.devices, made.limit, made.pci_order) == (None, MemoryLimit(bytes=GIB), False)
    alike = replace(INVENTORY, devices=CARDS[:2])
    assert [d.device for d in plan(layer("project", {"memory_growth": True}), inventory=alike).devices or ()] == [
        *CARDS[:2]
    ]


# ---- tokens


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
        ("void", ()),
        ("0," + "9" * 6000, ("0",)),
        ("\u0661", ()),
    ],
)
def test_tokens_are_cut_where_cuda_stops(value: str, kept: tuple[str, ...]) -> None:
    """Numbers and UUIDs count up to the first entry that is neither; a GPU named twice leaves none."""
    assert valid_tokens(value.split(",")) == kept


def test_nvml_is_asked_only_where_visibility_needs_it() -> None:
    """Positions need no NVML; names do, and numbers beside UUIDs do."""

    def needs(*made: Layer, grant: Grant = FREE, request: tuple[str, ...] | None = None) -> bool:
        return needs_inventory(merge(made, SUBJECT), grant, request)

    by_position = layer("project", {"visible_devices": at(0, 1)})
    assert not needs(by_position)
    assert not needs(by_position, grant=Grant((CARDS[0].uuid,)))
    assert needs(layer("project", {"visible_devices": (name("*"),)}))
    assert needs(layer("machine", ceiling={"allowed_devices": at(0)}), grant=Grant((CARDS[0].uuid,)))
    assert needs(layer("project", {"visible_devices": (uuid("GPU-1"),)}), request=("0",))


# ---- the law


def devices_of(made: Plan) -> list[Device]:
    return [device.device for device in made.devices or () if device.device is not None]


@given(layers("machine"), layers("user"), layers("project"), grants, token_lists)
def test_no_file_and_no_program_widens(
    machine: Layer, user: Layer, project: Layer, grant: Grant, request: tuple[str, ...] | None
) -> None:
    """Whatever user, project and program say, every device and limit stays within grant and machine's ceilings."""
    policy = merge([machine, user, project], SUBJECT)
    made = resolve(policy, grant, INVENTORY, request)
    bounds = resolve(merge([_allowed_only(machine)], SUBJECT), grant, INVENTORY)
    if made.visible is not None and bounds.devices is not None:
        allowed = {device.token for device in bounds.devices or ()}
        assert {device.token for device in made.devices or ()} <= allowed
    for ceiling in policy.ceilings:
        _assert_holds(ceiling, made)


def _values(made: Layer) -> dict[str, object]:
    return {key: setting.value for key, setting in made.base.ceiling.items()}


def _allowed_only(made: Layer) -> Layer:
    return layer(
        "machine", ceiling={k: v for k, v in _values(made).items() if k in ("allowed_devices", "require_grant")}
    )


def _assert_holds(ceiling: Ceiling, made: Plan) -> None:
    if ceiling.key == "max_devices" and made.devices is not None:
        assert len(made.devices) <= int(str(ceiling.value))
    if ceiling.key == "require_memory_growth" and ceiling.value is True:
        assert made.growth is True
    if ceiling.key == "memory_limit" and isinstance(ceiling.value, MemoryLimit):
        assert made.limit is not None
        for device in made.devices or ():
            assert device.limit is not None
            total = device.device.total if device.device is not None else None
            given_size, bound = device.limit.on(total), ceiling.value.on(total)
            assert total is None or (given_size is not None and bound is not None and given_size <= bound)


@given(layers("machine"), layers("user"), layers("project"), grants)
def test_ceilings_hold_together_in_any_order(machine: Layer, user: Layer, project: Layer, grant: Grant) -> None:
    """The order in which ceilings were collected never shows in the plan."""
    policy = merge([machine, user, project], SUBJECT)
    plans = [
        resolve(replace(policy, ceilings=order), grant, INVENTORY)
        for order in itertools.islice(itertools.permutations(policy.ceilings), 12)
    ]
    for made in plans:
        assert (made.visible, made.devices, made.limit, made.growth) == (
            plans[0].visible,
            plans[0].devices,
            plans[0].limit,
            plans[0].growth,
        )


@given(layers("machine"), layers("user"), layers("project"), grants, token_lists, st.booleans())
def test_resolving_never_raises_and_repeats_itself(
    machine: Layer,
    user: Layer,
    project: Layer,
    grant: Grant,
    request: tuple[str, ...] | None,
    blind: bool,
) -> None:
    """Any policy on any machine gives a plan, and the same one again."""
    policy = merge([machine, user, project], SUBJECT)
    inventory = BLIND if blind else INVENTORY
    needs_inventory(policy, grant, request)
    assert resolve(policy, grant, inventory, request) == resolve(policy, grant, inventory, request)
