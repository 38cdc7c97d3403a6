"""Which GPUs a process may see. Pure.

Visibility is a list of steps. `decide_visibility` takes the GPUs of the grant through all of them, one after another.
Each step narrows the set or leaves it as it is. None widens it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from tfenv.errors import PROGRAM
from tfenv.policy.clamps import FindingCollector
from tfenv.policy.device_set import (
    Card,
    DeviceSet,
    exceeds_job,
    find_device,
    is_same_card,
    keep_valid_tokens,
    list_granted,
    select_devices,
)
from tfenv.policy.limits import get_device_rules, mixes_sizes_and_shares
from tfenv.policy.model import (
    Allocation,
    AutoChoice,
    EffectivePolicy,
    Grant,
    Inventory,
    Origin,
    PlanInputs,
    RankChoice,
    Selector,
    VisibleDevices,
    format_origins,
)
from tfenv.values import replace


def decide_visibility(inputs: PlanInputs, findings: FindingCollector) -> DeviceSet:
    """Return the GPUs this process may use, and add to the findings what was cut.

    While `choosing` of the set is not None, its cards are the candidates of an automatic choice.
    """
    asked, asked_findings = _take_steps(inputs)
    handed = inputs.grant.handed
    if handed is not None and tuple(inputs.request or ()) == handed and _has_lost(asked_findings, PROGRAM):
        # What a parent wrote for a child is the child's grant. Positions count in it, if that leaves the child a GPU.
        grant = replace(inputs.grant, tokens=handed, handed=None)
        given, given_findings = _take_steps(replace(inputs, grant=grant, request=None))
        if given.cards and not _has_lost(given_findings):
            asked, asked_findings = given, given_findings
    findings.findings += asked_findings.findings
    return asked


def _has_lost(findings: FindingCollector, asked_by: str | None = None) -> bool:
    """Return whether somebody asked for GPUs and got none of them. With `asked_by`, whether it got not all of them."""
    if asked_by is None:
        return any(finding.code == "no-overlap" for finding in findings.findings)
    return any(finding.asked_by == asked_by for finding in findings.findings)


def _take_steps(inputs: PlanInputs) -> tuple[DeviceSet, FindingCollector]:
    device_set, findings = list_granted(inputs.grant, inputs.inventory), FindingCollector()
    ungoverned = (_keep_cuda_default, _drop_without_driver, _drop_without_allocation)
    governed = (
        _report_beyond_job,
        _require_grant,
        _drop_without_driver,
        _keep_allowed_by_machine,
        _keep_allowed_by_others,
        _apply_file_choice,
        _apply_program_request,
        _keep_fewest,
        _warn_of_ranks_on_one_gpu,
        _keep_shown_together,
        _drop_without_allocation,
    )
    for step in governed if governs_visibility(inputs) else ungoverned:
        device_set = step(device_set, inputs, findings)
    return device_set, findings


# ---- in words


def _join_tokens(cards: Iterable[Card]) -> str:
    return ", ".join(card.token for card in cards) or "none"


def _join_selectors(selectors: Iterable[Selector]) -> str:
    return ", ".join(str(selector) for selector in selectors)


def _describe_devices(device_set: DeviceSet) -> str:
    plural = "s" if len(device_set.cards) != 1 else ""
    return f"{len(device_set.cards)} GPU{plural} ({_join_tokens(device_set.cards)})"


def _describe_usable(device_set: DeviceSet) -> str:
    holders = _describe_holders(device_set.narrowed_by)
    return f"the GPUs that this process may use{holders} ({_join_tokens(device_set.cards)})"


def _describe_not_among(selectors: Sequence[Selector]) -> str:
    """Return the selectors with a verb: "7 is not among", "name:*A100* matches none of"."""
    one = len(selectors) == 1
    if any(selector.kind == "name" for selector in selectors):
        verb = "matches none of" if one else "match none of"
    else:
        verb = "is not among" if one else "are not among"
    return f"{_join_selectors(selectors)} {verb}"


def _describe_grant(grant: Grant) -> str:
    return "" if grant.tokens is None else f"the grant ({','.join(grant.tokens)})"


def _describe_holders(origins: Sequence[Origin]) -> str:
    return f" under {format_origins(origins)}" if origins else ""


# ---- what administrators and others allow


def _report_beyond_job(device_set: DeviceSet, inputs: PlanInputs, findings: FindingCollector) -> DeviceSet:
    """Say what CUDA_VISIBLE_DEVICES named at the start that is not the job's. `list_granted` has left it out."""
    grant = inputs.grant
    if grant.listed == ():
        findings.add("no-grant", f"{grant.launcher} gave this step of the job no GPU", None, "note")
        return device_set
    if grant.tokens is None or not exceeds_job(grant, grant.tokens, inputs.inventory):
        return device_set
    wanted, kept = keep_valid_tokens(grant.tokens), [card.token for card in device_set.cards]
    if set(wanted) <= set(kept):
        return device_set  # the scheduler counts the job's GPUs anew
    held_by = f"what {grant.launcher} gave this job ({_join_tokens(device_set.cards)})"
    wish = (f"CUDA_VISIBLE_DEVICES = {', '.join(wanted)}", _join_tokens(device_set.cards))
    text = f"CUDA_VISIBLE_DEVICES={','.join(grant.tokens)} goes beyond {held_by}"
    if set(wanted) & set(kept):
        findings.add_clamp(text, None, asked_by=PROGRAM, held_by=held_by, wish=wish)
    elif wanted:
        findings.add("no-overlap", text, None, asked_by=PROGRAM, held_by=held_by, wish=wish)
    return device_set


def _require_grant(device_set: DeviceSet, inputs: PlanInputs, findings: FindingCollector) -> DeviceSet:
    """Leave no GPU to a process that has no grant, where `require_grant` asks for one."""
    grant = inputs.grant
    if grant.listed == ():
        return device_set  # there is none already
    for ceiling in inputs.policy.list_ceilings("require_grant"):
        if ceiling.value == "always" and not grant.scheduler:
            text = 'this process is not in a job of a scheduler, and "always" leaves GPUs to jobs alone'
        elif ceiling.value and grant.scheduler and not _has_grant(grant):
            text = f"{grant.launcher or 'the scheduler'} gave this job no GPU"
            if not grant.unlisted:
                text += " (CUDA_VISIBLE_DEVICES is not set)"
        else:
            continue
        # The policy is in force: there is no GPU. So this is none of the errors that `on_error` is for.
        findings.add("no-grant", text, ceiling.origin, "note")
        return device_set.restrict((), ceiling.origin)
    return device_set


def _drop_without_driver(device_set: DeviceSet, inputs: PlanInputs, findings: FindingCollector) -> DeviceSet:
    """Leave no GPU to a job that was given none, where there is no driver. On the CPU there is nothing to enforce."""
    grant, inventory = inputs.grant, inputs.inventory
    usable = device_set.unbounded or device_set.cards
    if not inventory.no_driver or not usable or not grant.scheduler or _has_grant(grant):
        return device_set
    findings.add("no-grant", f"{grant.launcher} gave this job no GPU ({inventory.problem})", None, "note")
    return DeviceSet()


def _has_grant(grant: Grant) -> bool:
    """Return whether the scheduler gave some GPU: by its own list, or else by CUDA_VISIBLE_DEVICES."""
    return bool(grant.listed) or grant.mounted or (grant.tokens is not None and not grant.unlisted)


def _list_allowed(policy: EffectivePolicy) -> list[tuple[tuple[Selector, ...], Origin]]:
    ceilings = policy.list_ceilings("allowed_devices")
    return [(cast("tuple[Selector, ...]", ceiling.value), ceiling.origin) for ceiling in ceilings]


def _keep_allowed_by_machine(device_set: DeviceSet, inputs: PlanInputs, findings: FindingCollector) -> DeviceSet:
    """Apply the administrator's lists, which may leave nothing. Positions count among the GPUs that are left."""
    for selectors, origin in _list_allowed(inputs.policy):
        if origin.layer == "machine":
            found, missing = select_devices(selectors, device_set, origin)
            kept = found if device_set.unbounded else [card for card in device_set.cards if card in found]
            if selectors and not kept and (device_set.unbounded or device_set.cards):
                _report_nothing_allowed(missing, device_set, origin, findings)
            device_set = device_set.restrict(kept, origin)
    return replace(device_set, numbered=device_set)


def _report_nothing_allowed(
    missing: Sequence[Selector], device_set: DeviceSet, origin: Origin, findings: FindingCollector
) -> None:
    if device_set.unbounded or any(card.device is None for card in device_set.cards):
        text = f"{_join_selectors(missing)}: without NVML, tfenv cannot tell which GPUs these are, so none is visible"
        findings.add("no-inventory", text, origin)
    else:
        text = f"allows none of the GPUs that the job was given ({_join_tokens(device_set.cards)}), so none is visible"
        findings.add("no-overlap", text, origin)


def _keep_allowed_by_others(device_set: DeviceSet, inputs: PlanInputs, findings: FindingCollector) -> DeviceSet:
    """Apply the lists of users and projects. A list of one's own that would leave nothing is a mistake."""
    for selectors, origin in _list_allowed(inputs.policy):
        if origin.layer == "machine":
            continue
        found, missing = select_devices(selectors, device_set.addressable, origin)
        kept = found if device_set.unbounded else [card for card in device_set.cards if card in found]
        if selectors and not kept:
            _report_no_overlap(selectors, device_set, origin, findings, inputs.grant)
            continue
        _report_missing(missing, device_set.addressable, origin, findings, inputs.grant)
        device_set = device_set.restrict(kept, origin)
    return device_set


def _report_missing(
    missing: Sequence[Selector],
    addressable: DeviceSet,
    origin: Origin,
    findings: FindingCollector,
    grant: Grant,
    wish: tuple[str, str] | None = None,
) -> None:
    if missing:
        text = f"{_describe_not_among(missing)} {_describe_usable(addressable)}"
        held_by = addressable.narrowed_by or _describe_grant(grant)
        findings.add("no-such-device", text, origin, "warning", asked_by=origin, held_by=held_by, wish=wish)


# ---- the files' choice


def _apply_file_choice(device_set: DeviceSet, inputs: PlanInputs, findings: FindingCollector) -> DeviceSet:
    """Keep what `visible_devices` names."""
    if inputs.choice is None:
        return device_set
    choice, origin = cast(VisibleDevices, inputs.choice.value), inputs.choice.origin
    if isinstance(choice, RankChoice):
        return _keep_own_rank(device_set, choice, origin, inputs.grant, findings)
    if isinstance(choice, tuple):
        return _keep_selected(device_set, choice, origin, inputs.grant, findings)
    return device_set  # "all", or an automatic choice, which is made when everything else is known


def _keep_selected(
    device_set: DeviceSet, choice: Sequence[Selector], origin: Origin, grant: Grant, findings: FindingCollector
) -> DeviceSet:
    if not choice:
        return device_set.restrict((), origin)
    found, missing = select_devices(choice, device_set.addressable, origin)
    kept = found if device_set.unbounded else [card for card in found if card in device_set.cards]
    asked = f"visible_devices = {_join_selectors(choice)}"
    if not kept:
        _report_no_overlap(choice, device_set, origin, findings, grant, (asked, _join_tokens(device_set.cards)))
        return device_set
    wish = (asked, _join_tokens(kept))
    _report_missing(missing, device_set.addressable, origin, findings, grant, wish)
    lost = [card for card in found if not any(is_same_card(card, other) for other in kept)]
    if lost:  # a grant that names one GPU in two ways loses none
        holders = device_set.find_holders(lost)
        within = f"only {_join_tokens(kept)} is within the ceilings{_describe_holders(holders)}"
        findings.add_clamp(f"{_join_tokens(found)}: {within}", origin, asked_by=origin, held_by=holders, wish=wish)
    return device_set.restrict(kept, origin)


def _report_no_overlap(
    choice: Sequence[Selector],
    device_set: DeviceSet,
    origin: Origin,
    findings: FindingCollector,
    grant: Grant,
    wish: tuple[str, str] | None = None,
) -> None:
    """Report a file's request that leaves no GPU. The list stays, or somebody would train on the CPU unawares."""
    if device_set.unbounded:
        text = f"{_join_selectors(choice)}: without NVML, tfenv cannot tell which GPUs these are"
        findings.add("no-inventory", text, origin)
    elif device_set.cards:
        text = f"{_describe_not_among(choice)} {_describe_usable(device_set)}; write one of them"
        held_by = device_set.narrowed_by or _describe_grant(grant)
        findings.add("no-overlap", text, origin, asked_by=origin, held_by=held_by, wish=wish)


def _keep_own_rank(
    device_set: DeviceSet, choice: RankChoice, origin: Origin, grant: Grant, findings: FindingCollector
) -> DeviceSet:
    """Give each local rank its own place in the list. [0] for all would pile every rank on one card."""
    rank = grant.rank if choice.rank == "auto" else choice.rank
    if not (device_set.unbounded or device_set.cards) or (choice.rank == "auto" and grant.own_gpus):
        return device_set  # the launcher has divided the GPUs already
    if rank is None:
        shown = "all GPUs" if device_set.unbounded else _describe_devices(device_set)
        text = f"no launcher gave this process a local rank, so it has {shown}"
        findings.add("no-rank", text, origin, "warning")
        return device_set
    if device_set.unbounded:
        return device_set.restrict((Card(str(rank)),), origin)
    if rank >= len(device_set.cards):
        _report_shared_rank(rank, device_set, origin, grant, findings)
    return device_set.restrict([device_set.cards[rank % len(device_set.cards)]], origin)


def _report_shared_rank(
    rank: int, device_set: DeviceSet, origin: Origin, grant: Grant, findings: FindingCollector
) -> None:
    if grant.tokens is not None and len(grant.tokens) == 1:
        # A launcher may have given each rank one of its own, which cannot be told from one GPU for all.
        granted = f"local rank {rank} was given one GPU ({_join_tokens(device_set.cards)})"
        text = f"{granted}. The ranks share it unless each was given a different one"
        findings.add("more-ranks-than-gpus", text, origin, "warning")
    else:
        verb = "is" if len(device_set.cards) == 1 else "are"
        text = f"local rank {rank} shares a GPU, because there {verb} only {_describe_devices(device_set)}"
        findings.add("more-ranks-than-gpus", text, origin)


def _warn_of_ranks_on_one_gpu(device_set: DeviceSet, inputs: PlanInputs, findings: FindingCollector) -> DeviceSet:
    """Warn where files give every rank of a job the same one of several GPUs. Take nothing away."""
    own = inputs.choice is not None and isinstance(inputs.choice.value, RankChoice | AutoChoice)
    several = device_set.addressable.unbounded or len(device_set.addressable.cards) > 1
    one = len(device_set.cards) == 1 and device_set.narrowings
    if inputs.request is None and inputs.grant.rank and not own and several and one:
        origin, _ = device_set.narrowings[-1]
        same = f"every local rank gets the same GPU ({_join_tokens(device_set.cards)})"
        advice = 'write visible_devices = {rank = "auto"} to give each its own'
        text = f"{same}, and this is local rank {inputs.grant.rank}: {advice}"
        findings.add("ranks-share-a-gpu", text, origin, "warning")
    return device_set


# ---- what the program asks for


def _apply_program_request(device_set: DeviceSet, inputs: PlanInputs, findings: FindingCollector) -> DeviceSet:
    """Keep what the program itself wrote into CUDA_VISIBLE_DEVICES. A request for nothing that is left keeps all."""
    if inputs.request is None:
        return device_set
    tokens = keep_valid_tokens(inputs.request)
    if not tokens:
        return device_set.restrict(())
    wanted = [Card(token, find_device(token, inputs.grant, inputs.inventory)) for token in tokens]
    if device_set.unbounded:
        return device_set.restrict(wanted)
    kept = [card for one in wanted for card in device_set.cards if is_same_card(one, card)]
    if len(kept) < len(wanted) and device_set.cards:
        refused = [one for one in wanted if not any(is_same_card(one, card) for card in device_set.cards)]
        _report_refused_request(refused, kept, device_set, inputs, findings)
    return device_set.restrict(kept) if kept else device_set


def _report_refused_request(
    refused: Sequence[Card],
    kept: Sequence[Card],
    device_set: DeviceSet,
    inputs: PlanInputs,
    findings: FindingCollector,
) -> None:
    """Name the keys that took the GPUs away, or else the grant, or the machine, that they are not in."""
    wanted = f"CUDA_VISIBLE_DEVICES = {', '.join(inputs.request or ())}"
    asked = f'the program set CUDA_VISIBLE_DEVICES="{",".join(inputs.request or ())}"'
    holders = device_set.find_holders(refused)
    origin = holders[0] if holders else None
    held_by = format_origins(holders) or _describe_grant(inputs.grant) or "this machine's GPUs"
    if kept:
        text = f"{asked}; it may use {_join_tokens(kept)} of these, under {held_by}"
        wish = (wanted, _join_tokens(kept))
        findings.add_clamp(text, origin, asked_by=PROGRAM, held_by=held_by, wish=wish)
    else:
        text = f"{asked}, but it may use only {_join_tokens(device_set.cards)}, under {held_by}"
        wish = (wanted, _join_tokens(device_set.cards))
        findings.add("no-overlap", text, origin, asked_by=PROGRAM, held_by=held_by, wish=wish)


# ---- fewest devices


def _find_smallest_count(policy: EffectivePolicy) -> tuple[int, Origin] | None:
    """Return the smallest `max_devices` and its key. None: there is none."""
    counts = [(cast(int, ceiling.value), ceiling.origin) for ceiling in policy.list_ceilings("max_devices")]
    return min(counts, key=lambda count: count[0], default=None)


def _keep_fewest(device_set: DeviceSet, inputs: PlanInputs, findings: FindingCollector) -> DeviceSet:
    """Hold to `max_devices`: so many are chosen automatically, or the first so many are kept."""
    setting = inputs.choice
    if setting is not None and isinstance(setting.value, AutoChoice) and (device_set.unbounded or device_set.cards):
        # A grant may name one GPU in two ways. It is one candidate all the same.
        identities = [card.identity for card in device_set.cards]
        cards = [card for i, card in enumerate(device_set.cards) if card.identity not in identities[:i]]
        device_set = device_set if len(cards) == len(identities) else device_set.restrict(cards)
        choice = _limit_choice(setting.value, setting.origin, device_set, inputs.policy, findings)
        if choice.count > 0 and inputs.allocations is None:
            return replace(device_set, choosing=choice)
        if choice.count > 0:
            return _keep_allocated(device_set, inputs.allocations or (), setting.origin)
    asked_by = PROGRAM if inputs.request is not None else (setting.origin if setting is not None else None)
    return _apply_max_devices(device_set, inputs.policy, asked_by, findings)


def _apply_max_devices(
    device_set: DeviceSet, policy: EffectivePolicy, asked_by: Origin | str | None, findings: FindingCollector
) -> DeviceSet:
    """Keep the first cards. `asked_by` asked for those that are left. None: nobody did, they are all there are."""
    count = _find_smallest_count(policy)
    if count is None or (not device_set.unbounded and len(device_set.cards) <= count[0]):
        return device_set
    most, origin = count
    if device_set.unbounded:
        return device_set.restrict((Card(str(position)) for position in range(most)), origin)
    kept = device_set.restrict(device_set.cards[:most], origin)
    text = f"at most {most} of {_describe_devices(device_set)}"
    name = "CUDA_VISIBLE_DEVICES" if asked_by == PROGRAM else "visible_devices"
    wish = (f"{name} = {_join_tokens(device_set.cards)}", _join_tokens(kept.cards))
    findings.add_clamp(text, origin, asked_by=asked_by, held_by=(origin,), wish=wish)
    return kept


def _limit_choice(
    choice: AutoChoice, origin: Origin, device_set: DeviceSet, policy: EffectivePolicy, findings: FindingCollector
) -> AutoChoice:
    """Lower the number of GPUs to what `max_devices` and the candidates allow."""
    ceiling = _find_smallest_count(policy)
    if ceiling is not None and choice.count > ceiling[0]:
        text = f"at most {ceiling[0]} instead of count = {choice.count}"
        wish = (f"visible_devices = {{count = {choice.count}}}", f"{{count = {ceiling[0]}}}")
        findings.add_clamp(text, origin, asked_by=origin, held_by=(ceiling[1],), wish=wish)
        choice = replace(choice, count=ceiling[0])
    if not device_set.unbounded and choice.count > len(device_set.cards):
        candidates, holders = _describe_devices(device_set), device_set.narrowed_by
        text = f"count = {choice.count}: there are {candidates} to choose from{_describe_holders(holders)}"
        wish = (f"visible_devices = {{count = {choice.count}}}", f"{{count = {len(device_set.cards)}}}")
        findings.add_clamp(text, origin, asked_by=origin, held_by=holders or candidates, wish=wish)
        choice = replace(choice, count=len(device_set.cards))
    return choice


def _keep_allocated(device_set: DeviceSet, allocations: Sequence[Allocation], origin: Origin) -> DeviceSet:
    """Keep the candidates that were chosen, in the order in which the policy names them."""
    chosen = [allocation.uuid for allocation in allocations]
    if device_set.unbounded:
        return device_set.restrict(map(Card, chosen), origin)
    return device_set.restrict([card for card in device_set.cards if card.identity in chosen], origin)


def limit_before_choice(device_set: DeviceSet, policy: EffectivePolicy) -> DeviceSet:
    """Return what is visible until some of the candidates are chosen: ceilings hold for who opens CUDA earlier."""
    if device_set.choosing is None:
        return device_set
    return _apply_max_devices(device_set, policy, None, FindingCollector())


# ---- what CUDA shows


def _keep_shown_together(device_set: DeviceSet, inputs: PlanInputs, findings: FindingCollector) -> DeviceSet:
    """Keep one MIG instance, or whole GPUs: CUDA shows a process nothing beside an instance (NVIDIA's MIG user guide).

    Candidates of an automatic choice stay, whatever they are.
    """
    instances = [card for card in device_set.cards if card.is_instance]
    if not instances or len(device_set.cards) == 1 or device_set.choosing is not None:
        return device_set
    whole = [card for card in device_set.cards if not card.is_instance]
    kept = whole if not device_set.cards[0].is_instance else instances[:1]
    left = f"{_join_tokens(kept)} of {_join_tokens(device_set.cards)}"
    text = f"{left}: CUDA shows a process either one MIG instance or whole GPUs"
    findings.add("one-instance", text, inputs.choice.origin if inputs.choice else None, "note")
    return device_set.restrict(kept)


def _drop_without_allocation(device_set: DeviceSet, inputs: PlanInputs, _: FindingCollector) -> DeviceSet:
    """Leave no GPU where the user's other processes left nothing of their total."""
    return device_set.restrict(()) if inputs.allocations is not None and not inputs.allocations else device_set


def _keep_cuda_default(device_set: DeviceSet, inputs: PlanInputs, _: FindingCollector) -> DeviceSet:
    """Return what CUDA shows by itself: what the program asked for, or else the grant."""
    if inputs.request is not None:
        device_set = list_granted(replace(inputs.grant, tokens=tuple(inputs.request)), inputs.inventory)
    if instance := next((card for card in device_set.cards if card.is_instance), None):
        return DeviceSet((instance,))  # CUDA shows it alone, whatever stands before it
    unlisted = inputs.grant.tokens is None and inputs.request is None
    ordered = inputs.grant.pci_order or sets_pci_order(inputs, governed=False)
    if unlisted and not ordered and len({device.name for device in inputs.inventory.devices or ()}) > 1:
        # CUDA puts the fastest first: which of the unlike cards is GPU:0 cannot be told.
        return DeviceSet(unbounded=True)
    return device_set


def sets_pci_order(inputs: PlanInputs, *, governed: bool) -> bool:
    """Return whether the Plan sets CUDA's order to nvidia-smi's, which counts in the numbers that we write.

    It matters where the Plan writes a list (`governed`), and where limits differ by card: a position is to be the same
    card in every key. Under an inherited list the order is part of that list, and CUDA tells later which card is which.
    """
    by_card = (
        bool(get_device_rules(inputs.policy))
        or mixes_sizes_and_shares(inputs.policy)
        or bool(inputs.policy.list_ceilings("memory_total"))  # leases are by UUID
        or any(device.wall is not None for device in inputs.inventory.devices or ())
    )
    return inputs.grant.tokens is None and (governed or (by_card and inputs.request is None))


# ---- what a policy says of visibility


def needs_inventory(policy: EffectivePolicy, grant: Grant, request: Sequence[str] | None = None) -> bool:
    """Return whether visibility cannot be decided without NVML: names, or numbers beside UUIDs."""
    allowed = _list_allowed(policy)
    setting = policy.settings.get("visible_devices")
    chosen = [(setting.value, setting.origin)] if setting is not None and isinstance(setting.value, tuple) else []
    selectors = [(selector.kind, origin.layer) for named, origin in (*allowed, *chosen) for selector in named]
    if any(exceeds_job(grant, value, Inventory()) for value in (grant.tokens, request or grant.tokens)):
        return True
    tokens = keep_valid_tokens(grant.tokens or ()) + keep_valid_tokens(request or ())
    kinds = {kind for kind, _ in selectors}
    numbers = any(token.isdigit() for token in tokens) or ("position", "machine") in selectors
    uuids = "uuid" in kinds or any(not token.isdigit() for token in tokens)
    positions_of_names = "position" in kinds and bool(allowed)
    return "name" in kinds or (numbers and uuids) or (positions_of_names and uuids and grant.tokens is None)


def governs_visibility(inputs: PlanInputs) -> bool:
    """Return whether the policy decides which GPUs are visible. Otherwise CUDA_VISIBLE_DEVICES is left alone.

    A value that names more than the scheduler's own list is not left alone either.
    """
    grant, request = inputs.grant, inputs.request
    chosen = inputs.choice is not None and inputs.choice.value != "all"
    ceilings = inputs.policy.list_ceilings("allowed_devices", "max_devices", "require_grant")
    value = grant.tokens if request is None else request
    return chosen or bool(ceilings) or exceeds_job(grant, value, inputs.inventory)
