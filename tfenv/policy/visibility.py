"""Which GPUs a process may see. Pure. Each step narrows, none widens:

grant -> machine's allowed devices -> the files' choice -> the program's own wish -> fewest devices

Where the files let tfenv choose ({count = …}), what is left are the candidates, until the seats are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from tfenv.errors import PROGRAM
from tfenv.policy.clamps import Notes, layer_sort_key
from tfenv.policy.device_set import Card, DeviceSet, granted, identify, keep_valid_tokens, same_card, selected
from tfenv.policy.model import (
    Allocation,
    AutoChoice,
    Ceiling,
    EffectivePolicy,
    Grant,
    Inventory,
    Origin,
    RankChoice,
    Selector,
    VisibleDevices,
    format_origins,
)
from tfenv.values import replace

__all__ = ["governs_visibility", "needs_inventory", "shown_before_choice", "shown_together", "decide_visible_devices"]

_CEILINGS = ("allowed_devices", "max_devices", "require_grant")


# ---- in words


def _names(cards: Iterable[Card]) -> str:
    return ", ".join(card.token for card in cards) or "none"


def _describe_devices(device_set: DeviceSet) -> str:
    return f"{len(device_set.cards)} GPU{'s' if len(device_set.cards) != 1 else ''} ({_names(device_set.cards)})"


def _under(origins: Sequence[Origin]) -> str:
    return f" under {format_origins(origins)}" if origins else ""


def _list(selectors: Iterable[Selector]) -> str:
    return ", ".join(str(selector) for selector in selectors)


# ---- what administrators and others allow


def _lacks_required_grant(policy: EffectivePolicy, grant: Grant) -> Origin | None:
    """The key that asks for a grant, where a scheduler's job has none."""
    required = [c for c in policy.ceilings if c.key == "require_grant" and c.value is True]
    if not required or not grant.scheduler or grant.tokens is not None:
        return None
    return min(required, key=layer_sort_key).origin


def _addressable(policy: EffectivePolicy, grant: Grant, inventory: Inventory, notes: Notes) -> DeviceSet:
    """Where positions of users' and projects' files count: the grant within the machine layer's `allowed_devices`."""
    device_set = granted(grant, inventory)
    holder = _lacks_required_grant(policy, grant)
    if holder is not None:
        notes.add("no-grant", "the scheduler granted no GPU (CUDA_VISIBLE_DEVICES is unset)", holder)
        return device_set.restrict((), holder)
    for ceiling in _allowed(policy):
        if ceiling.origin.layer == "machine":
            device_set = _apply_machine_ceiling(device_set, ceiling, notes)
    return device_set


def _allowed(policy: EffectivePolicy) -> list[Ceiling]:
    return sorted((c for c in policy.ceilings if c.key == "allowed_devices"), key=layer_sort_key)


def _apply_machine_ceiling(device_set: DeviceSet, ceiling: Ceiling, notes: Notes) -> DeviceSet:
    """An administrator's list may leave nothing."""
    selectors = cast("tuple[Selector, ...]", ceiling.value)
    found, missing = selected(selectors, device_set, ceiling.origin)
    kept = found if device_set.unbounded else [card for card in device_set.cards if card in found]
    if selectors and not kept and (device_set.unbounded or device_set.cards):
        _note_nothing_allowed(missing, device_set, ceiling.origin, notes)
    return device_set.restrict(kept, ceiling.origin)


def _note_nothing_allowed(missing: Sequence[Selector], device_set: DeviceSet, origin: Origin, notes: Notes) -> None:
    if device_set.unbounded or any(card.device is None for card in device_set.cards):
        text = f"{_list(missing)}: cannot be told without NVML which GPUs these are: no GPU"
        notes.add("no-inventory", text, origin)
    else:
        notes.add("no-overlap", f"allows none of the {_describe_devices(device_set)} that were granted: no GPU", origin)


def _apply_allowed(
    device_set: DeviceSet, addressable: DeviceSet, ceilings: Iterable[Ceiling], notes: Notes
) -> DeviceSet:
    """Keep what the other layers' `allowed_devices` name; a list of one's own that leaves nothing is a mistake."""
    for ceiling in ceilings:
        selectors = cast("tuple[Selector, ...]", ceiling.value)
        found, missing = selected(selectors, addressable, ceiling.origin)
        kept = found if device_set.unbounded else [card for card in device_set.cards if card in found]
        if selectors and not kept:
            _no_overlap(selectors, device_set, ceiling.origin, notes)
            continue
        _note_missing(missing, addressable, ceiling.origin, notes)
        device_set = device_set.restrict(kept, ceiling.origin)
    return device_set


def _note_missing(missing: Sequence[Selector], addressable: DeviceSet, origin: Origin, notes: Notes) -> None:
    if missing:
        within = f"{_describe_devices(addressable)} this process may use{_under(addressable.by)}"
        text = f"{_list(missing)}: not among the {within}"
        notes.add("no-such-device", text, origin, "warning", asked_by=origin, held_by=addressable.by)


# ---- the files' choice


def _apply_choice(
    device_set: DeviceSet, addressable: DeviceSet, policy: EffectivePolicy, grant: Grant, notes: Notes
) -> DeviceSet:
    setting = policy.settings.get("visible_devices")
    if setting is None:
        return device_set
    choice = cast(VisibleDevices, setting.value)
    if isinstance(choice, str | AutoChoice):  # "all", or some that are chosen when everything else is known
        return device_set
    if isinstance(choice, RankChoice):
        return _take_own_rank(device_set, choice, grant, setting.origin, notes)
    return _chosen(device_set, addressable, choice, setting.origin, notes)


def _chosen(
    device_set: DeviceSet, addressable: DeviceSet, choice: Sequence[Selector], origin: Origin, notes: Notes
) -> DeviceSet:
    if not choice:
        return device_set.restrict((), origin)
    found, missing = selected(choice, addressable, origin)
    kept = found if device_set.unbounded else [card for card in found if card in device_set.cards]
    if not kept:
        _no_overlap(choice, device_set, origin, notes)
        return device_set
    _note_missing(missing, addressable, origin, notes)
    lost = [card for card in found if not any(same_card(card, other) for other in kept)]
    if lost:  # a grant that names one GPU in two ways loses none
        holders = device_set.held_from(lost)
        text = f"{_names(found)}: only {_names(kept)} is within the ceilings{_under(holders)}"
        notes.clamped(text, origin, asked_by=origin, held_by=holders)
    return device_set.restrict(kept, origin)


def _no_overlap(choice: Sequence[Selector], device_set: DeviceSet, origin: Origin, notes: Notes) -> None:
    """A file's wish that leaves no GPU keeps the list: nobody trains on the CPU for days without knowing."""
    if device_set.unbounded:
        notes.add("no-inventory", f"{_list(choice)}: cannot be told without NVML; all GPUs stay visible", origin)
    elif device_set.cards:
        addressable = f"{_describe_devices(device_set)} this process may use{_under(device_set.by)}"
        text = f"{_list(choice)}: none of the {addressable}; those stay visible"
        notes.add("no-overlap", text, origin, asked_by=origin, held_by=device_set.by)


def _first(device_set: DeviceSet, count: int, by: Origin) -> DeviceSet:
    if device_set.unbounded:
        return device_set.restrict((Card(str(position)) for position in range(count)), by)
    return device_set.restrict(device_set.cards[:count], by)


# ---- ranks


def _take_own_rank(device_set: DeviceSet, choice: RankChoice, grant: Grant, origin: Origin, notes: Notes) -> DeviceSet:
    """Each local rank takes its own place in the list: [0] for all would pile every rank on one card."""
    rank = grant.rank if choice.rank == "auto" else choice.rank
    if rank is None:
        return device_set
    if device_set.unbounded:
        return device_set.restrict((Card(str(rank)),), origin)
    if not device_set.cards:
        return device_set
    if rank >= len(device_set.cards):
        _note_shared(rank, device_set, grant, origin, notes)
    return device_set.restrict([device_set.cards[rank % len(device_set.cards)]], origin)


def _note_shared(rank: int, device_set: DeviceSet, grant: Grant, origin: Origin, notes: Notes) -> None:
    """Of a grant of one GPU it cannot be told whether each rank was given one of its own, as by --gpus-per-task=1."""
    if grant.tokens is not None and len(grant.tokens) == 1:
        text = (
            f"local rank {rank} was granted one GPU ({_names(device_set.cards)}): shared, unless each rank has its own"
        )
        notes.add("more-ranks-than-gpus", text, origin, "warning")
    else:
        text = f"local rank {rank} shares a GPU: there are {_describe_devices(device_set)}"
        notes.add("more-ranks-than-gpus", text, origin)


def _note_ranks_on_one_gpu(
    device_set: DeviceSet, addressable: DeviceSet, policy: EffectivePolicy, grant: Grant, notes: Notes
) -> None:
    """Say when files give every rank of a job the same one of several GPUs."""
    choice = policy.settings.get("visible_devices")
    own = choice is not None and isinstance(choice.value, RankChoice | AutoChoice)
    several = addressable.unbounded or len(addressable.cards) > 1
    if not grant.rank or own or not several or len(device_set.cards) != 1 or not device_set.steps:
        return
    origin, _ = device_set.steps[-1]
    text = f"every local rank is given the same GPU ({_names(device_set.cards)}), and this is local rank {grant.rank}"
    text += ': write visible_devices = {rank = "auto"} to give each its own'
    notes.add("ranks-share-a-gpu", text, origin, "warning")


# ---- what the program asks


def _apply_request(
    device_set: DeviceSet, request: Sequence[str], grant: Grant, inventory: Inventory, notes: Notes
) -> DeviceSet:
    """What the program itself wrote into CUDA_VISIBLE_DEVICES may narrow; a wish for nothing else keeps the list."""
    tokens = keep_valid_tokens(request)
    if not tokens:
        return device_set.restrict(())
    wanted = [Card(token, identify(token, grant, inventory)) for token in tokens]
    if device_set.unbounded:
        return device_set.restrict(wanted)
    kept = [card for wish in wanted for card in device_set.cards if same_card(wish, card)]
    if not kept and not device_set.cards:
        return device_set
    if len(kept) < len(wanted):
        refused = [wish for wish in wanted if not any(same_card(wish, card) for card in device_set.cards)]
        _note_request(_set_by_program(request), refused, kept, device_set, grant, notes)
    return device_set.restrict(kept) if kept else device_set


def _set_by_program(request: Sequence[str]) -> str:
    return f'the program set CUDA_VISIBLE_DEVICES="{",".join(request)}"'


def _note_request(
    asked: str, refused: Sequence[Card], kept: Sequence[Card], device_set: DeviceSet, grant: Grant, notes: Notes
) -> None:
    """Name what held: the keys that took the GPUs away, or else the grant, or the machine, that they are not in."""
    holders = device_set.held_from(refused)
    origin = holders[0] if holders else None
    given = "this machine's GPUs" if grant.tokens is None else f"the grant ({','.join(grant.tokens)})"
    held_by = format_origins(holders) or given
    if kept:
        text = f"{asked}; it may use {_names(kept)} of these, under {held_by}"
        notes.clamped(text, origin, asked_by=PROGRAM, held_by=held_by)
    else:
        text = f"{asked}, none of the {_describe_devices(device_set)} it may use under {held_by}; those stay"
        notes.add("no-overlap", text, origin, asked_by=PROGRAM, held_by=held_by)


# ---- fewest devices


def _apply_count(
    device_set: DeviceSet, ceilings: Iterable[Ceiling], asked_by: Origin | str | None, notes: Notes
) -> DeviceSet:
    """The smallest `max_devices` of all layers."""
    ceiling = min(ceilings, key=lambda c: (cast(int, c.value), layer_sort_key(c)), default=None)
    if ceiling is None:
        return device_set
    most = cast(int, ceiling.value)
    if not device_set.unbounded and len(device_set.cards) > most:
        text = f"at most {most} of {_describe_devices(device_set)}"
        notes.clamped(text, ceiling.origin, asked_by=asked_by, held_by=(ceiling.origin,))
    return (
        _first(device_set, most, ceiling.origin) if device_set.unbounded or len(device_set.cards) > most else device_set
    )


def _asked_by(policy: EffectivePolicy, request: Sequence[str] | None) -> Origin | str | None:
    """Who asked for the GPUs that are left before they are counted; None: nobody, it is all there are."""
    if request is not None:
        return PROGRAM
    setting = policy.settings.get("visible_devices")
    return setting.origin if setting is not None else None


# ---- free ones


def _auto_choice(policy: EffectivePolicy) -> tuple[AutoChoice, Origin] | None:
    setting = policy.settings.get("visible_devices")
    if setting is None or not isinstance(setting.value, AutoChoice):
        return None
    return setting.value, setting.origin


def _within_ceilings(
    choice: AutoChoice, origin: Origin, device_set: DeviceSet, ceilings: Sequence[Ceiling], notes: Notes
) -> AutoChoice:
    """The choice with as many GPUs as `max_devices` and the candidates admit."""
    most = min(ceilings, key=lambda c: (cast(int, c.value), layer_sort_key(c)), default=None)
    if most is not None and choice.count > cast(int, most.value):
        text = f"at most {most.value} instead of count = {choice.count}"
        notes.clamped(text, origin, asked_by=origin, held_by=(most.origin,))
        choice = replace(choice, count=cast(int, most.value))
    if not device_set.unbounded and choice.count > len(device_set.cards):
        text = (
            f"count = {choice.count}: there are {_describe_devices(device_set)} to choose from{_under(device_set.by)}"
        )
        notes.clamped(text, origin, asked_by=origin, held_by=device_set.by or _describe_devices(device_set))
        choice = replace(choice, count=len(device_set.cards))
    return choice


def _once_each(device_set: DeviceSet) -> DeviceSet:
    """A grant may name one GPU in two ways; it is one candidate all the same."""
    firsts = {card.identity: card for card in reversed(device_set.cards)}
    return (
        device_set
        if len(firsts) == len(device_set.cards)
        else device_set.restrict(card for card in device_set.cards if card in firsts.values())
    )


def _seated(device_set: DeviceSet, allocations: Sequence[Allocation], origin: Origin) -> DeviceSet:
    """The candidates that were chosen, in the order in which the policy names them."""
    chosen = [allocation.uuid for allocation in allocations]
    if device_set.unbounded:
        return device_set.restrict([Card(token) for token in chosen], origin)
    return device_set.restrict([card for card in device_set.cards if card.identity in chosen], origin)


# ---- the whole


def decide_visible_devices(
    policy: EffectivePolicy,
    grant: Grant,
    inventory: Inventory,
    request: Sequence[str] | None,
    allocations: Sequence[Allocation] | None,
    notes: Notes,
) -> tuple[DeviceSet, DeviceSet, AutoChoice | None]:
    """The room where positions count, the GPUs within it that the process may see, and what is still to be chosen."""
    addressable = _addressable(policy, grant, inventory, notes)
    device_set = _apply_allowed(
        addressable, addressable, [c for c in _allowed(policy) if c.origin.layer != "machine"], notes
    )
    device_set = _apply_choice(device_set, addressable, policy, grant, notes)
    if request is not None:
        device_set = _apply_request(device_set, request, grant, inventory, notes)
    counts = [c for c in policy.ceilings if c.key == "max_devices"]
    automatic = _auto_choice(policy)
    if automatic is not None and (device_set.unbounded or device_set.cards):
        device_set = _once_each(device_set)
        choice = _within_ceilings(*automatic, device_set, counts, notes)
        if choice.count > 0:
            return (
                (addressable, device_set, choice)
                if allocations is None
                else (addressable, _seated(device_set, allocations, automatic[1]), None)
            )
    device_set = _apply_count(device_set, counts, _asked_by(policy, request), notes)
    if request is None:
        _note_ranks_on_one_gpu(device_set, addressable, policy, grant, notes)
    return addressable, device_set, None


def shown_before_choice(device_set: DeviceSet, policy: EffectivePolicy) -> DeviceSet:
    """What is visible until some of the candidates are chosen: ceilings hold for who opens CUDA earlier, too."""
    return _apply_count(device_set, [c for c in policy.ceilings if c.key == "max_devices"], None, Notes())


def shown_together(device_set: DeviceSet, policy: EffectivePolicy, notes: Notes) -> DeviceSet:
    """CUDA shows a process one MIG instance and nothing beside it, or whole GPUs (NVIDIA's MIG user guide)."""
    instances = [card for card in device_set.cards if card.is_instance]
    if not instances or len(device_set.cards) == 1:
        return device_set
    whole = [card for card in device_set.cards if not card.is_instance]
    kept = whole if not device_set.cards[0].is_instance else instances[:1]
    setting = policy.settings.get("visible_devices")
    text = f"{_names(kept)} of {_names(device_set.cards)}: CUDA shows a process one MIG instance alone, or whole GPUs"
    notes.add("one-instance", text, setting.origin if setting else None, "note")
    return device_set.restrict(kept)


def _selectors(policy: EffectivePolicy) -> list[tuple[Selector, Origin]]:
    """Every selector of the policy with where it stands."""
    found: list[tuple[Selector, Origin]] = []
    setting = policy.settings.get("visible_devices")
    if setting is not None and isinstance(setting.value, tuple):
        found += [(selector, setting.origin) for selector in setting.value]
    for ceiling in policy.ceilings:
        if ceiling.key == "allowed_devices":
            found += [(selector, ceiling.origin) for selector in cast("tuple[Selector, ...]", ceiling.value)]
    return found


def needs_inventory(policy: EffectivePolicy, grant: Grant, request: Sequence[str] | None = None) -> bool:
    """Whether visibility cannot be decided without asking NVML: names, or numbers beside UUIDs."""
    selectors = _selectors(policy)
    tokens = keep_valid_tokens(grant.tokens or ()) + keep_valid_tokens(request or ())
    kinds = {selector.kind for selector, _ in selectors}
    numbers = any(token.isdigit() for token in tokens) or any(
        selector.kind == "position" and origin.layer == "machine" for selector, origin in selectors
    )
    uuids = "uuid" in kinds or any(not token.isdigit() for token in tokens)
    positions_of_names = "position" in kinds and any(c.key == "allowed_devices" for c in policy.ceilings)
    return "name" in kinds or (numbers and uuids) or (positions_of_names and uuids and grant.tokens is None)


def governs_visibility(policy: EffectivePolicy) -> bool:
    """Whether the policy says anything of which GPUs are visible; if not, CUDA_VISIBLE_DEVICES is left alone."""
    setting = policy.settings.get("visible_devices")
    chosen = setting is not None and setting.value != "all"
    return chosen or any(ceiling.key in _CEILINGS for ceiling in policy.ceilings)
