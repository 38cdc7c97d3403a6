"""Which GPUs a process may see. Pure. Each step narrows, none widens:

grant -> machine's allowed devices -> the files' choice -> the program's own wish -> fewest devices

Where the files let tfenv choose ({count = …}), what is left are the candidates, until the seats are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

from tfenv.errors import PROGRAM
from tfenv.policy.model import (
    AutoChoice,
    Ceiling,
    EffectivePolicy,
    Grant,
    Inventory,
    Origin,
    RankChoice,
    Seat,
    Selector,
    VisibleDevices,
    origins_text,
)
from tfenv.policy.notes import Notes, by_layer
from tfenv.policy.pool import Card, Pool, granted, identify, same_card, selected, valid_tokens

__all__ = ["governs_visibility", "needs_inventory", "shown_before_choice", "shown_together", "visible_pools"]

_CEILINGS = ("allowed_devices", "max_devices", "require_grant")


# ---- in words


def _names(cards: Iterable[Card]) -> str:
    return ", ".join(card.token for card in cards) or "none"


def _room_text(pool: Pool) -> str:
    return f"{len(pool.cards)} GPU{'s' if len(pool.cards) != 1 else ''} ({_names(pool.cards)})"


def _under(origins: Sequence[Origin]) -> str:
    return f" under {origins_text(origins)}" if origins else ""


def _list(selectors: Iterable[Selector]) -> str:
    return ", ".join(str(selector) for selector in selectors)


# ---- what administrators and others allow


def _lacks_required_grant(policy: EffectivePolicy, grant: Grant) -> Origin | None:
    """The key that asks for a grant, where a scheduler's job has none."""
    required = [c for c in policy.ceilings if c.key == "require_grant" and c.value is True]
    if not required or not grant.scheduler or grant.tokens is not None:
        return None
    return min(required, key=by_layer).origin


def _room(policy: EffectivePolicy, grant: Grant, inventory: Inventory, notes: Notes) -> Pool:
    """Where positions of users' and projects' files count: the grant within the machine layer's `allowed_devices`."""
    pool = granted(grant, inventory)
    holder = _lacks_required_grant(policy, grant)
    if holder is not None:
        notes.add("no-grant", "the scheduler granted no GPU (CUDA_VISIBLE_DEVICES is unset)", holder)
        return pool.narrowed((), holder)
    for ceiling in _allowed(policy):
        if ceiling.origin.layer == "machine":
            pool = _administrators_room(pool, ceiling, notes)
    return pool


def _allowed(policy: EffectivePolicy) -> list[Ceiling]:
    return sorted((c for c in policy.ceilings if c.key == "allowed_devices"), key=by_layer)


def _administrators_room(pool: Pool, ceiling: Ceiling, notes: Notes) -> Pool:
    """An administrator's list may leave nothing."""
    selectors = cast("tuple[Selector, ...]", ceiling.value)
    found, missing = selected(selectors, pool, ceiling.origin)
    kept = found if pool.open else [card for card in pool.cards if card in found]
    if selectors and not kept and (pool.open or pool.cards):
        _note_nothing_allowed(missing, pool, ceiling.origin, notes)
    return pool.narrowed(kept, ceiling.origin)


def _note_nothing_allowed(missing: Sequence[Selector], pool: Pool, origin: Origin, notes: Notes) -> None:
    if pool.open or any(card.device is None for card in pool.cards):
        text = f"{_list(missing)}: cannot be told without NVML which GPUs these are: no GPU"
        notes.add("no-inventory", text, origin)
    else:
        notes.add("no-overlap", f"allows none of the {_room_text(pool)} that were granted: no GPU", origin)


def _apply_allowed(pool: Pool, room: Pool, ceilings: Iterable[Ceiling], notes: Notes) -> Pool:
    """Keep what the other layers' `allowed_devices` name; a list of one's own that leaves nothing is a mistake."""
    for ceiling in ceilings:
        selectors = cast("tuple[Selector, ...]", ceiling.value)
        found, missing = selected(selectors, room, ceiling.origin)
        kept = found if pool.open else [card for card in pool.cards if card in found]
        if selectors and not kept:
            _no_overlap(selectors, pool, ceiling.origin, notes)
            continue
        _note_missing(missing, room, ceiling.origin, notes)
        pool = pool.narrowed(kept, ceiling.origin)
    return pool


def _note_missing(missing: Sequence[Selector], room: Pool, origin: Origin, notes: Notes) -> None:
    if missing:
        text = f"{_list(missing)}: not among the {_room_text(room)} this process may use{_under(room.by)}"
        notes.add("no-such-device", text, origin, "warning", asked_by=origin, held_by=room.by)


# ---- the files' choice


def _apply_choice(pool: Pool, room: Pool, policy: EffectivePolicy, grant: Grant, notes: Notes) -> Pool:
    setting = policy.settings.get("visible_devices")
    if setting is None:
        return pool
    choice = cast(VisibleDevices, setting.value)
    if isinstance(choice, str | AutoChoice):  # "all", or some that are chosen when everything else is known
        return pool
    if isinstance(choice, RankChoice):
        return _own_place(pool, choice, grant, setting.origin, notes)
    return _chosen(pool, room, choice, setting.origin, notes)


def _chosen(pool: Pool, room: Pool, choice: Sequence[Selector], origin: Origin, notes: Notes) -> Pool:
    if not choice:
        return pool.narrowed((), origin)
    found, missing = selected(choice, room, origin)
    kept = found if pool.open else [card for card in found if card in pool.cards]
    if not kept:
        _no_overlap(choice, pool, origin, notes)
        return pool
    _note_missing(missing, room, origin, notes)
    lost = [card for card in found if not any(same_card(card, other) for other in kept)]
    if lost:  # a grant that names one GPU in two ways loses none
        holders = pool.held_from(lost)
        text = f"{_names(found)}: only {_names(kept)} is within the ceilings{_under(holders)}"
        notes.clamped(text, origin, asked_by=origin, held_by=holders)
    return pool.narrowed(kept, origin)


def _no_overlap(choice: Sequence[Selector], pool: Pool, origin: Origin, notes: Notes) -> None:
    """A file's wish that leaves no GPU keeps the list: nobody trains on the CPU for days without knowing."""
    if pool.open:
        notes.add("no-inventory", f"{_list(choice)}: cannot be told without NVML; all GPUs stay visible", origin)
    elif pool.cards:
        room = f"{_room_text(pool)} this process may use{_under(pool.by)}"
        text = f"{_list(choice)}: none of the {room}; those stay visible"
        notes.add("no-overlap", text, origin, asked_by=origin, held_by=pool.by)


def _first(pool: Pool, count: int, by: Origin) -> Pool:
    if pool.open:
        return pool.narrowed((Card(str(position)) for position in range(count)), by)
    return pool.narrowed(pool.cards[:count], by)


# ---- ranks


def _own_place(pool: Pool, choice: RankChoice, grant: Grant, origin: Origin, notes: Notes) -> Pool:
    """Each local rank takes its own place in the list: [0] for all would pile every rank on one card."""
    rank = grant.rank if choice.rank == "auto" else choice.rank
    if rank is None:
        return pool
    if pool.open:
        return pool.narrowed((Card(str(rank)),), origin)
    if not pool.cards:
        return pool
    if rank >= len(pool.cards):
        _note_shared(rank, pool, grant, origin, notes)
    return pool.narrowed([pool.cards[rank % len(pool.cards)]], origin)


def _note_shared(rank: int, pool: Pool, grant: Grant, origin: Origin, notes: Notes) -> None:
    """Of a grant of one GPU it cannot be told whether each rank was given one of its own, as by --gpus-per-task=1."""
    if grant.tokens is not None and len(grant.tokens) == 1:
        text = f"local rank {rank} was granted one GPU ({_names(pool.cards)}): shared, unless each rank has its own"
        notes.add("more-ranks-than-gpus", text, origin, "warning")
    else:
        text = f"local rank {rank} shares a GPU: there are {_room_text(pool)}"
        notes.add("more-ranks-than-gpus", text, origin)


def _note_piled(pool: Pool, room: Pool, policy: EffectivePolicy, grant: Grant, notes: Notes) -> None:
    """Say when files give every rank of a job the same one of several GPUs."""
    choice = policy.settings.get("visible_devices")
    own = choice is not None and isinstance(choice.value, RankChoice | AutoChoice)
    several = room.open or len(room.cards) > 1
    if not grant.rank or own or not several or len(pool.cards) != 1 or not pool.steps:
        return
    origin, _ = pool.steps[-1]
    text = f"every local rank is given the same GPU ({_names(pool.cards)}), and this is local rank {grant.rank}"
    text += ': write visible_devices = {rank = "auto"} to give each its own'
    notes.add("ranks-share-a-gpu", text, origin, "warning")


# ---- what the program asks


def _apply_request(pool: Pool, request: Sequence[str], grant: Grant, inventory: Inventory, notes: Notes) -> Pool:
    """What the program itself wrote into CUDA_VISIBLE_DEVICES may narrow; a wish for nothing else keeps the list."""
    tokens = valid_tokens(request)
    if not tokens:
        return pool.narrowed(())
    wanted = [Card(token, identify(token, grant, inventory)) for token in tokens]
    if pool.open:
        return pool.narrowed(wanted)
    kept = [card for wish in wanted for card in pool.cards if same_card(wish, card)]
    if not kept and not pool.cards:
        return pool
    if len(kept) < len(wanted):
        refused = [wish for wish in wanted if not any(same_card(wish, card) for card in pool.cards)]
        _note_request(_set_by_program(request), refused, kept, pool, grant, notes)
    return pool.narrowed(kept) if kept else pool


def _set_by_program(request: Sequence[str]) -> str:
    return f'the program set CUDA_VISIBLE_DEVICES="{",".join(request)}"'


def _note_request(
    asked: str, refused: Sequence[Card], kept: Sequence[Card], pool: Pool, grant: Grant, notes: Notes
) -> None:
    """Name what held: the keys that took the GPUs away, or else the grant, or the machine, that they are not in."""
    holders = pool.held_from(refused)
    origin = holders[0] if holders else None
    given = "this machine's GPUs" if grant.tokens is None else f"the grant ({','.join(grant.tokens)})"
    held_by = origins_text(holders) or given
    if kept:
        text = f"{asked}; it may use {_names(kept)} of these, under {held_by}"
        notes.clamped(text, origin, asked_by=PROGRAM, held_by=held_by)
    else:
        text = f"{asked}, none of the {_room_text(pool)} it may use under {held_by}; those stay"
        notes.add("no-overlap", text, origin, asked_by=PROGRAM, held_by=held_by)


# ---- fewest devices


def _apply_count(pool: Pool, ceilings: Iterable[Ceiling], asked_by: Origin | str | None, notes: Notes) -> Pool:
    """The smallest `max_devices` of all layers."""
    ceiling = min(ceilings, key=lambda c: (cast(int, c.value), by_layer(c)), default=None)
    if ceiling is None:
        return pool
    most = cast(int, ceiling.value)
    if not pool.open and len(pool.cards) > most:
        text = f"at most {most} of {_room_text(pool)}"
        notes.clamped(text, ceiling.origin, asked_by=asked_by, held_by=(ceiling.origin,))
    return _first(pool, most, ceiling.origin) if pool.open or len(pool.cards) > most else pool


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
    choice: AutoChoice, origin: Origin, pool: Pool, ceilings: Sequence[Ceiling], notes: Notes
) -> AutoChoice:
    """The choice with as many GPUs as `max_devices` and the candidates admit."""
    most = min(ceilings, key=lambda c: (cast(int, c.value), by_layer(c)), default=None)
    if most is not None and choice.count > cast(int, most.value):
        text = f"at most {most.value} instead of count = {choice.count}"
        notes.clamped(text, origin, asked_by=origin, held_by=(most.origin,))
        choice = replace(choice, count=cast(int, most.value))
    if not pool.open and choice.count > len(pool.cards):
        text = f"count = {choice.count}: there are {_room_text(pool)} to choose from{_under(pool.by)}"
        notes.clamped(text, origin, asked_by=origin, held_by=pool.by or _room_text(pool))
        choice = replace(choice, count=len(pool.cards))
    return choice


def _once_each(pool: Pool) -> Pool:
    """A grant may name one GPU in two ways; it is one candidate all the same."""
    firsts = {card.identity: card for card in reversed(pool.cards)}
    return (
        pool
        if len(firsts) == len(pool.cards)
        else pool.narrowed(card for card in pool.cards if card in firsts.values())
    )


def _seated(pool: Pool, seats: Sequence[Seat], origin: Origin) -> Pool:
    """The candidates that were chosen, in the order in which the policy names them."""
    chosen = [seat.uuid for seat in seats]
    if pool.open:
        return pool.narrowed([Card(token) for token in chosen], origin)
    return pool.narrowed([card for card in pool.cards if card.identity in chosen], origin)


# ---- the whole


def visible_pools(
    policy: EffectivePolicy,
    grant: Grant,
    inventory: Inventory,
    request: Sequence[str] | None,
    seats: Sequence[Seat] | None,
    notes: Notes,
) -> tuple[Pool, Pool, AutoChoice | None]:
    """The room where positions count, the GPUs within it that the process may see, and what is still to be chosen."""
    room = _room(policy, grant, inventory, notes)
    pool = _apply_allowed(room, room, [c for c in _allowed(policy) if c.origin.layer != "machine"], notes)
    pool = _apply_choice(pool, room, policy, grant, notes)
    if request is not None:
        pool = _apply_request(pool, request, grant, inventory, notes)
    counts = [c for c in policy.ceilings if c.key == "max_devices"]
    automatic = _auto_choice(policy)
    if automatic is not None and (pool.open or pool.cards):
        pool = _once_each(pool)
        choice = _within_ceilings(*automatic, pool, counts, notes)
        if choice.count > 0:
            return (room, pool, choice) if seats is None else (room, _seated(pool, seats, automatic[1]), None)
    pool = _apply_count(pool, counts, _asked_by(policy, request), notes)
    if request is None:
        _note_piled(pool, room, policy, grant, notes)
    return room, pool, None


def shown_before_choice(pool: Pool, policy: EffectivePolicy) -> Pool:
    """What is visible until some of the candidates are chosen: ceilings hold for who opens CUDA earlier, too."""
    return _apply_count(pool, [c for c in policy.ceilings if c.key == "max_devices"], None, Notes())


def shown_together(pool: Pool, policy: EffectivePolicy, notes: Notes) -> Pool:
    """CUDA shows a process one MIG instance and nothing beside it, or whole GPUs (NVIDIA's MIG user guide)."""
    instances = [card for card in pool.cards if card.is_instance]
    if not instances or len(pool.cards) == 1:
        return pool
    whole = [card for card in pool.cards if not card.is_instance]
    kept = whole if not pool.cards[0].is_instance else instances[:1]
    setting = policy.settings.get("visible_devices")
    text = f"{_names(kept)} of {_names(pool.cards)}: CUDA shows a process one MIG instance alone, or whole GPUs"
    notes.add("one-instance", text, setting.origin if setting else None, "note")
    return pool.narrowed(kept)


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
    tokens = valid_tokens(grant.tokens or ()) + valid_tokens(request or ())
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
