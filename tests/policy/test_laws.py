"""The laws, by thousands of random policies: settings are replaced, ceilings add up, nothing ever widens."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tests.policy.values import CARDS, SUBJECT, RandomCase, cases, make_origin
from tfenv.policy.clamps import FindingCollector
from tfenv.policy.device_set import DeviceSet, keep_valid_tokens
from tfenv.policy.merge import combine, merge
from tfenv.policy.model import (
    LAYER_ORDER,
    ON_ERROR_ORDER,
    Allocation,
    AutoChoice,
    Ceiling,
    EffectivePolicy,
    Grant,
    Layer,
    LayerName,
    MemoryLimit,
    Plan,
    PlanInputs,
    Setting,
    Table,
)
from tfenv.policy.resolve import NO_GPU, resolve
from tfenv.policy.visibility import decide_visibility, needs_inventory
from tfenv.values import replace

seeds = st.integers(min_value=0, max_value=2**32)

#: Of every size there is in the tests' machines, and one in between.
TOTALS = tuple(sorted({card.total for card in CARDS if card.total is not None} | {24 << 30}))


# ---- merging


@given(cases)
def test_no_layer_removes_another_layers_ceiling(case: RandomCase) -> None:
    """The ceilings of all layers together are those that each layer has alone."""
    together = merge(case.layers, SUBJECT).ceilings
    alone = [ceiling for each in case.layers for ceiling in merge([each], SUBJECT).ceilings]
    assert set(map(repr, together)) == set(map(repr, alone))


@given(cases, seeds)
def test_when_a_layer_was_read_does_not_matter(case: RandomCase, seed: int) -> None:
    """The layer of a file counts, not its place among the other files."""
    mixed = list(case.layers)
    random.Random(seed).shuffle(mixed)
    assert merge(mixed, SUBJECT) == merge(case.layers, SUBJECT)


@given(cases)
def test_merging_is_idempotent(case: RandomCase) -> None:
    """Reading the same files twice changes nothing."""
    once = merge(case.layers, SUBJECT)
    twice = merge([*case.layers, *case.layers], SUBJECT)
    assert replace(twice, audit=once.audit) == once
    assert merge(combine(case.layers), SUBJECT) == once
    assert twice.audit == once.audit


def _move_to_layer(made: Layer, name: str) -> Layer:
    """The same tables in the file of another layer."""

    def move_table(table: Table) -> Table:
        return {
            key: replace(setting, origin=make_origin(name, *setting.origin.key))  # type: ignore[arg-type]
            for key, setting in table.items()
        }

    base = replace(made.base, gpu={}, ceiling=move_table(made.base.ceiling))
    return Layer(name=name, base=base, top=move_table(made.top))  # type: ignore[arg-type]


@given(cases, st.permutations(LAYER_ORDER[:4]))
def test_the_order_of_layers_matters_only_for_settings(case: RandomCase, order: list[LayerName]) -> None:
    """Without settings it makes no difference which layer sets a limit, a count, growth, a grant or on_error.

    `allowed_devices` alone differs: a number of the machine layer is nvidia-smi's, and only its list may leave nothing.
    """
    ceilings_only = [_drop_lists(_move_to_layer(each, each.name)) for each in case.layers]
    elsewhere = [_move_to_layer(each, name) for each, name in zip(ceilings_only, order, strict=True)]
    one, other = (resolve(merge(each, SUBJECT), case.grant, case.inventory) for each in (ceilings_only, elsewhere))
    assert _drop_keys(one) == _drop_keys(other)
    assert merge(ceilings_only, SUBJECT).on_error == merge(elsewhere, SUBJECT).on_error


def _drop_lists(made: Layer) -> Layer:
    kept = {key: setting for key, setting in made.base.ceiling.items() if key != "allowed_devices"}
    return replace(made, base=replace(made.base, ceiling=kept))


def _drop_keys(made: Plan) -> object:
    """A plan without the keys that set its values."""
    devices = None if made.devices is None else [(d.token, d.limit, d.logical_devices) for d in made.devices]
    return made.visible, made.pci_order, devices, made.limit, made.growth, made.allocator


# ---- resolving


@given(cases, seeds)
def test_ceilings_hold_together_in_any_order(case: RandomCase, seed: int) -> None:
    """The order in which ceilings were collected changes neither a plan nor the keys it names."""
    policy = merge(case.layers, SUBJECT)
    mixed = list(policy.ceilings)
    random.Random(seed).shuffle(mixed)
    assert resolve(replace(policy, ceilings=tuple(mixed)), case.grant, case.inventory) == resolve(
        policy, case.grant, case.inventory
    )


@given(cases)
def test_a_plan_is_within_the_grant_and_every_ceiling(case: RandomCase) -> None:
    """Whatever is declared and asked for, on any machine, with NVML or without: tokens, counts, limits and growth hold.

    Tokens of a grant are passed on verbatim, and the same values give the same plan.
    """
    policy = merge(case.layers, SUBJECT)
    needs_inventory(policy, case.grant, case.request)
    made = resolve(policy, case.grant, case.inventory, case.request)
    assert resolve(policy, case.grant, case.inventory, case.request) == made
    _assert_names_holders(made)
    made = _plan_after_choice(policy, case, made)
    if case.grant.tokens is not None and made.visible not in (None, NO_GPU):
        assert set(str(made.visible).split(",")) <= set(keep_valid_tokens(case.grant.tokens))
    for ceiling in policy.ceilings:
        _assert_holds(ceiling, made, case.grant, policy.shards_per_gpu)
    _assert_names_holders(made)


def _plan_after_choice(policy: EffectivePolicy, case: RandomCase, made: Plan) -> Plan:
    """The plan after an automatic choice of enough GPUs, and of each other card of the machine besides."""
    if not made.takes_leases:
        return made
    count = made.choosing.count if made.choosing is not None else len(made.devices or ())
    candidates = [device.device.uuid if device.device else device.token for device in made.devices or ()]
    others = {card.uuid for card in CARDS} - set(candidates)
    allocations = tuple(Allocation(uuid, 2 << 30) for uuid in (*candidates[:count], *sorted(others)))
    after = resolve(
        policy,
        case.grant,
        case.inventory,
        case.request,
        allocations if made.devices is not None else allocations[:count],
    )
    assert after.choosing is None
    assert {device.token for device in after.devices or ()} <= {device.token for device in made.devices or ()} or (
        made.devices is None
    )
    return after


def _assert_holds(ceiling: Ceiling, made: Plan, grant: Grant, shards_per_gpu: int | None) -> None:
    if isinstance(ceiling.value, MemoryLimit) and ceiling.value.granted:
        fraction = None if grant.share is None else grant.share.measure(shards_per_gpu)
        if fraction is None:
            return
        ceiling = replace(ceiling, value=MemoryLimit(fraction=fraction))
    if ceiling.key == "max_devices" and made.devices is not None:
        assert len(made.devices) <= int(str(ceiling.value))
    if ceiling.key == "require_memory_growth" and ceiling.value is True:
        assert made.growth is True
    if ceiling.key == "require_grant" and ceiling.value is True and grant.scheduler and grant.tokens is None:
        assert (made.visible, made.devices) == (NO_GPU, ())
    if isinstance(ceiling.value, MemoryLimit):
        assert made.allocator == "bfc"
        _assert_limited(made.limit, ceiling.value, TOTALS)
        for device in made.devices or ():
            known = device.device.total if device.device is not None else None
            totals = TOTALS if known is None else (known,)
            _assert_limited(device.limit, ceiling.value, totals)
            for total in totals:
                sizes = [part.on(total) or 0 for part in device.logical_devices] if device.device else []
                assert sum(sizes) <= _get_bytes(ceiling.value, total)


def _assert_limited(limit: MemoryLimit | None, bound: MemoryLimit, totals: tuple[int, ...]) -> None:
    assert limit is not None
    for total in totals:
        assert _get_bytes(limit, total) <= _get_bytes(bound, total)


def _get_bytes(limit: MemoryLimit, total: int) -> int:
    """The bytes that a limit leaves of a card. No limit leaves more than there are."""
    size = limit.on(total)
    return total if size is None else min(size, total)


def _assert_names_holders(made: Plan) -> None:
    assert bool(made.limit) == bool(made.limited_by)
    assert (made.growth is None) == (made.grown_by is None)
    assert (made.allocator is None) == (not made.allocated_by)
    for device in made.devices or ():
        assert bool(device.limit) == bool(device.limited_by)
    for finding in made.findings:
        if finding.code == "clamped":
            assert finding.held_by
            assert finding.asked_by or str(finding.key).endswith("max_devices")  # nobody chose: all that were granted


# ---- a project's file


@given(cases)
def test_no_project_file_widens_anything(case: RandomCase) -> None:
    """For every project file: devices, memory, growth, on_error, switches, sinks are within the other layers'."""
    others = case.layers[:-1]
    with_it, without = merge(case.layers, SUBJECT), merge(others, SUBJECT)
    assert set(map(repr, without.ceilings)) <= set(map(repr, with_it.ceilings))
    made = _plan_after_choice(with_it, case, resolve(with_it, case.grant, case.inventory, case.request))
    bounds = _list_allowed(without, case)
    if made.visible is not None and made.devices is not None and not bounds.unbounded:
        assert {device.token for device in made.devices} <= {card.token for card in bounds.cards}
    for ceiling in without.ceilings:
        _assert_holds(ceiling, made, case.grant, without.shards_per_gpu)
    _assert_not_weaker(with_it, without)


def _list_allowed(policy: EffectivePolicy, case: RandomCase) -> DeviceSet:
    """The GPUs that the ceilings leave to choose from, however many may be chosen."""
    kept = tuple(c for c in policy.ceilings if c.key in ("allowed_devices", "require_grant"))
    choice = Setting(AutoChoice(1), make_origin("user", "gpu", "visible_devices"))
    free = EffectivePolicy({"visible_devices": choice}, ceilings=kept)
    return decide_visibility(PlanInputs(free, case.grant, case.inventory), FindingCollector())


def _assert_not_weaker(with_it: EffectivePolicy, without: EffectivePolicy) -> None:
    assert ON_ERROR_ORDER.index(with_it.on_error) >= ON_ERROR_ORDER.index(without.on_error)
    assert with_it.allow_disable == without.allow_disable
    assert set(without.audit.files) <= set(with_it.audit.files)
    assert with_it.audit.required_files == without.audit.required_files
    assert with_it.audit.syslog >= without.audit.syslog
    assert with_it.audit.default_file == without.audit.default_file


@given(cases)
def test_the_nearest_layer_that_sets_a_key_wins(case: RandomCase) -> None:
    """project > user > site > machine, key by key. The values that lost are kept, nearest first."""
    policy = merge(case.layers, SUBJECT)
    for key in {key for each in case.layers for key in each.base.gpu}:
        values = [each.base.gpu[key] for each in reversed(case.layers) if key in each.base.gpu]
        assert [policy.settings[key], *policy.overridden.get(key, ())] == values
    assert [LAYER_ORDER.index(each.name) for each in case.layers] == [0, 1, 2, 3]


@given(cases)
def test_the_strictest_on_error_wins(case: RandomCase) -> None:
    """No nearer layer weakens what a farther one asks for."""
    values = [str(each.top["on_error"].value) for each in case.layers if "on_error" in each.top]
    assert merge(case.layers, SUBJECT).on_error == max(values, key=["warn", "cpu", "fail"].index, default="warn")
