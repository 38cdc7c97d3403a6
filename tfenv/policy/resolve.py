"""From a policy to what this process may do on this machine: EffectivePolicy, Grant, Inventory -> Plan.

Pure: the same values give the same Plan, with or without a GPU. Each step narrows, none widens:

    grant -> machine's allowed devices -> the files' choice -> fewest devices -> the program's own wish
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import cast

from tfenv.errors import Finding, Severity
from tfenv.policy.model import (
    LAYER_ORDER,
    Allocator,
    AutoChoice,
    Ceiling,
    Device,
    DeviceRule,
    EffectivePolicy,
    Grant,
    Inventory,
    MemoryLimit,
    Origin,
    Plan,
    PlannedDevice,
    RankChoice,
    Selector,
    VisibleDevices,
    dotted,
)
from tfenv.policy.units import format_limit

__all__ = ["NO_GPU", "needs_inventory", "resolve", "valid_tokens"]

#: The value of CUDA_VISIBLE_DEVICES that hides every GPU; "" does too, but some readers take it for unset.
NO_GPU = "-1"

#: Longer numbers are no ordinals: CUDA's own conversion overflows.
_MOST_DIGITS = 10

VISIBILITY_CEILINGS = ("allowed_devices", "max_devices", "require_grant")


# ---- tokens of CUDA_VISIBLE_DEVICES


def valid_tokens(tokens: Sequence[str]) -> tuple[str, ...]:
    """The tokens CUDA honours, verbatim but for blanks: it stops at the first that is none of its forms.

    A GPU named twice leaves no GPU at all, as the driver has it.
    """
    kept: list[str] = []
    for raw in tokens:
        token = raw.strip()
        number = token.isascii() and token.isdigit() and len(token) < _MOST_DIGITS
        if not number and not token.startswith(("GPU-", "MIG-")):
            break
        kept.append(token)
    return tuple(kept) if len(set(kept)) == len(kept) else ()


@dataclass(frozen=True)
class _Card:
    """A GPU the process might use: the token that names it, and what NVML says of it."""

    token: str
    device: Device | None = None

    @property
    def is_instance(self) -> bool:
        """A MIG instance, of which CUDA shows a process one."""
        return self.token.startswith("MIG-") or (self.device is not None and self.device.instance is not None)


@dataclass(frozen=True)
class _Pool:
    """The GPUs still possible. `open`: all the machine has, and nobody knows how many that is."""

    cards: tuple[_Card, ...] = ()
    open: bool = False

    def narrowed(self, cards: Iterable[_Card]) -> _Pool:
        return _Pool(tuple(dict.fromkeys(cards)))


def _identify(token: str, grant: Grant, inventory: Inventory) -> Device | None:
    """The device a token names; None where that cannot be told.

    CUDA counts the fastest first unless told otherwise, NVML by PCI: a number is sure only under
    PCI order, or where all cards are alike.
    """
    devices = inventory.devices or ()
    if token.isdigit():
        alike = len({_model(device) for device in devices}) == 1
        sure = grant.tokens is None or grant.pci_order or alike
        return next((device for device in devices if sure and device.index == int(token)), None)
    named = [device for device in devices if device.uuid.lower().startswith(token.lower())]
    return named[0] if len(named) == 1 else _first_instance(token, devices)


def _model(device: Device) -> str:
    """The product without the size of an instance: "NVIDIA A100" of "NVIDIA A100 MIG 3g.20gb"."""
    return device.name.partition(" MIG ")[0]


def _first_instance(token: str, devices: Sequence[Device]) -> Device | None:
    """What CUDA shows of a GPU that is split and named as a whole."""
    named = [device for device in devices if (device.parent or "").lower().startswith(token.lower())]
    return named[0] if len({device.parent for device in named}) == 1 else None


def _token(device: Device) -> str:
    """What names it in CUDA_VISIBLE_DEVICES: an instance has no number there."""
    return str(device.index) if device.instance is None else device.uuid


def _granted(grant: Grant, inventory: Inventory) -> _Pool:
    if grant.tokens is not None:
        return _Pool(tuple(_Card(token, _identify(token, grant, inventory)) for token in valid_tokens(grant.tokens)))
    if inventory.devices is None:
        return _Pool(open=True)
    return _Pool(tuple(_Card(_token(device), device) for device in inventory.devices))


# ---- selectors


def _same_uuid(text: str, card: _Card) -> bool:
    """Whether a UUID, or the beginning of one, names it; a GPU's names all its instances."""
    known = [card.token] if card.device is None else [card.token, card.device.uuid, card.device.parent or ""]
    return any(name.lower().startswith(text.lower()) for name in known)


def _matches(selector: Selector, position: int, card: _Card, *, machine_numbers: bool) -> bool:
    if selector.kind == "name":
        return card.device is not None and fnmatchcase(card.device.name.lower(), selector.text.lower())
    if selector.kind == "uuid":
        return _same_uuid(selector.text, card)
    if not machine_numbers:
        return selector.position == position
    if card.device is not None:
        return selector.position == card.device.index
    return card.token == selector.text


def _select(selector: Selector, room: _Pool, *, machine_numbers: bool) -> list[_Card]:
    if room.open:
        return [] if selector.kind == "name" else [_Card(selector.text)]
    cards = enumerate(room.cards)
    return [card for i, card in cards if _matches(selector, i, card, machine_numbers=machine_numbers)]


def _selected(selectors: Sequence[Selector], room: _Pool, origin: Origin) -> tuple[list[_Card], list[Selector]]:
    """The cards the selectors name, in the order of the selectors, and the selectors that name none.

    Args:
        selectors: From one key of one file.
        room: Where positions count: the grant within the machine's allowed devices.
        origin: In the machine layer a number is the machine's own, as nvidia-smi shows it.
    """
    machine_numbers = origin.layer == "machine"
    found: list[_Card] = []
    missing: list[Selector] = []
    for selector in selectors:
        cards = _select(selector, room, machine_numbers=machine_numbers)
        found.extend(card for card in cards if card not in found)
        if not cards:
            missing.append(selector)
    return found, missing


# ---- what happened on the way


class _Notes:
    """Collects findings while a Plan is made."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def add(self, code: str, message: str, origin: Origin | None, severity: Severity = "error") -> None:
        self.findings.append(
            Finding(
                code,
                message,
                severity,
                path=origin.path if origin else None,
                key=dotted(origin.key) if origin else None,
            )
        )

    def clamped(self, message: str, origin: Origin) -> None:
        self.add("clamped", message, origin, "note")


def _names(cards: Iterable[_Card]) -> str:
    return ", ".join(card.token for card in cards) or "none"


def _room_text(pool: _Pool) -> str:
    return f"{len(pool.cards)} GPU{'s' if len(pool.cards) != 1 else ''} ({_names(pool.cards)})"


# ---- the steps


def _administrators_room(pool: _Pool, ceilings: Iterable[Ceiling], notes: _Notes) -> _Pool:
    """The grant within the machine layer's `allowed_devices`; an administrator's list may leave nothing."""
    for ceiling in ceilings:
        selectors = cast("tuple[Selector, ...]", ceiling.value)
        found, missing = _selected(selectors, pool, ceiling.origin)
        kept = found if pool.open else [card for card in pool.cards if card in found]
        if selectors and not kept and (pool.open or pool.cards):
            _note_nothing_allowed(missing, pool, ceiling.origin, notes)
        pool = pool.narrowed(kept)
    return pool


def _note_nothing_allowed(missing: Sequence[Selector], pool: _Pool, origin: Origin, notes: _Notes) -> None:
    if pool.open or any(card.device is None for card in pool.cards):
        text = f"{_list(missing)}: cannot be told without NVML which GPUs these are: no GPU"
        notes.add("no-inventory", text, origin)
    else:
        notes.add("no-overlap", f"allows none of the {_room_text(pool)} that were granted: no GPU", origin)


def _by_layer(ceiling: Ceiling) -> tuple[int, str, str]:
    """A fixed order, so that the order in which ceilings were collected never matters."""
    return LAYER_ORDER.index(ceiling.origin.layer), ceiling.origin.path, dotted(ceiling.origin.key)


def _apply_allowed(pool: _Pool, room: _Pool, ceilings: Iterable[Ceiling], notes: _Notes) -> _Pool:
    """Keep what the other layers' `allowed_devices` name; a list of one's own that leaves nothing is a mistake."""
    for ceiling in sorted(ceilings, key=_by_layer):
        selectors = cast("tuple[Selector, ...]", ceiling.value)
        found, missing = _selected(selectors, room, ceiling.origin)
        kept = found if pool.open else [card for card in pool.cards if card in found]
        if selectors and not kept:
            _no_overlap(selectors, pool, ceiling.origin, notes)
            continue
        _note_missing(missing, room, ceiling.origin, notes)
        pool = pool.narrowed(kept)
    return pool


def _note_missing(missing: Sequence[Selector], room: _Pool, origin: Origin, notes: _Notes) -> None:
    if missing:
        text = f"{_list(missing)}: not among the {_room_text(room)} this process may use"
        notes.add("no-such-device", text, origin, "warning")


def _list(selectors: Iterable[Selector]) -> str:
    return ", ".join(str(selector) for selector in selectors)


def _apply_choice(pool: _Pool, room: _Pool, policy: EffectivePolicy, grant: Grant, notes: _Notes) -> _Pool:
    """The files' own choice, `visible_devices`."""
    setting = policy.settings.get("visible_devices")
    if setting is None:
        return pool
    choice = cast(VisibleDevices, setting.value)
    if isinstance(choice, str):  # "all"
        return pool
    if isinstance(choice, AutoChoice):
        _note_not_chosen(choice, setting.origin, notes)
        return _first(pool, choice.count)
    if isinstance(choice, RankChoice):
        return _own_place(pool, choice, grant, setting.origin, notes)
    return _chosen(pool, room, choice, setting.origin, notes)


def _chosen(pool: _Pool, room: _Pool, choice: Sequence[Selector], origin: Origin, notes: _Notes) -> _Pool:
    if not choice:
        return _Pool()
    found, missing = _selected(choice, room, origin)
    kept = found if pool.open else [card for card in found if card in pool.cards]
    if not kept:
        _no_overlap(choice, pool, origin, notes)
        return pool
    _note_missing(missing, room, origin, notes)
    if len(kept) < len(found):
        notes.clamped(f"{_names(found)}: only {_names(kept)} is within the ceilings", origin)
    return pool.narrowed(kept)


def _no_overlap(choice: Sequence[Selector], pool: _Pool, origin: Origin, notes: _Notes) -> None:
    """A file's wish that leaves no GPU keeps the list: nobody trains on the CPU for days without knowing."""
    if pool.open:
        notes.add("no-inventory", f"{_list(choice)}: cannot be told without NVML; all GPUs stay visible", origin)
    elif pool.cards:
        text = f"{_list(choice)}: none of the {_room_text(pool)} this process may use; those stay visible"
        notes.add("no-overlap", text, origin)


def _note_not_chosen(choice: AutoChoice, origin: Origin, notes: _Notes) -> None:
    """Which GPU is free is not looked at yet: who relies on it must know."""
    if choice.min_free is not None or choice.timeout_s is not None or choice.when_busy != AutoChoice.when_busy:
        text = f"min_free, when_busy and timeout have no effect yet: the first {choice.count} allowed are taken"
        notes.add("not-honoured", text, origin, "warning")


def _first(pool: _Pool, count: int) -> _Pool:
    if pool.open:
        return _Pool(tuple(_Card(str(position)) for position in range(count)))
    return pool.narrowed(pool.cards[:count])


def _own_place(pool: _Pool, choice: RankChoice, grant: Grant, origin: Origin, notes: _Notes) -> _Pool:
    """Each local rank takes its own place in the list: [0] for all would pile every rank on one card."""
    rank = grant.rank if choice.rank == "auto" else choice.rank
    if rank is None:
        return pool
    if pool.open:
        return _Pool((_Card(str(rank)),))
    if not pool.cards:
        return pool
    if rank >= len(pool.cards):
        notes.add("more-ranks-than-gpus", f"local rank {rank} shares a GPU: there are {_room_text(pool)}", origin)
    return pool.narrowed([pool.cards[rank % len(pool.cards)]])


def _apply_count(pool: _Pool, ceilings: Iterable[Ceiling], notes: _Notes) -> _Pool:
    for ceiling in ceilings:
        most = cast(int, ceiling.value)
        if pool.open or len(pool.cards) > most:
            if not pool.open:
                notes.clamped(f"at most {most} of {_room_text(pool)}", ceiling.origin)
            pool = _first(pool, most)
    return pool


def _apply_request(pool: _Pool, request: Sequence[str], grant: Grant, inventory: Inventory, notes: _Notes) -> _Pool:
    """What the program itself wrote into CUDA_VISIBLE_DEVICES may narrow; a wish for nothing else keeps the list."""
    tokens = valid_tokens(request)
    if not tokens:
        return _Pool()
    wanted = [_Card(token, _identify(token, grant, inventory)) for token in tokens]
    if pool.open:
        return _Pool(tuple(wanted))
    kept = [card for wish in wanted for card in pool.cards if _same_card(wish, card)]
    text = ",".join(request)
    if not kept and pool.cards:
        notes.add(
            "no-overlap",
            f'the program set CUDA_VISIBLE_DEVICES="{text}", none of the {_room_text(pool)} it may use; those stay',
            None,
        )
        return pool
    if len(kept) < len(wanted):
        text = f'the program set CUDA_VISIBLE_DEVICES="{text}"; it may use {_names(kept)} of these'
        notes.findings.append(Finding("clamped", text, "note"))
    return pool.narrowed(kept)


def _same_card(a: _Card, b: _Card) -> bool:
    if a.device is not None and b.device is not None:
        return a.device.uuid == b.device.uuid
    return a.token == b.token


# ---- limits


def _tightest(limits: Sequence[MemoryLimit], total: int | None) -> MemoryLimit | None:
    """The smallest of the limits; bytes and fractions compare only where the card's total is known."""
    sizes = [limit.bytes for limit in limits if limit.bytes is not None]
    fractions = [limit.fraction for limit in limits if limit.fraction is not None]
    if not sizes and not fractions:
        return None
    both = MemoryLimit(bytes=min(sizes, default=None), fraction=min(fractions, default=None))
    if total is None or both.bytes is None or both.fraction is None:
        return both
    return MemoryLimit(bytes=both.bytes) if both.on(total) == both.bytes else MemoryLimit(fraction=both.fraction)


def _rule_for(card: _Card, position: int, rules: Sequence[DeviceRule]) -> DeviceRule | None:
    for rule in rules:
        if _matches(rule.match, position, card, machine_numbers=rule.origin.layer == "machine"):
            return rule
    return None


def _wished_limit(policy: EffectivePolicy, rule: DeviceRule | None) -> tuple[MemoryLimit | None, Origin | None]:
    if rule is not None and rule.memory_limit is not None:
        return rule.memory_limit, rule.origin
    setting = policy.settings.get("memory_limit")
    return (cast(MemoryLimit, setting.value), setting.origin) if setting is not None else (None, None)


def _is_above(wish: MemoryLimit, limit: MemoryLimit, total: int | None) -> bool:
    """Whether the wish is surely larger; without the card's total a size and a share do not compare."""
    if (
        limit.bytes is not None
        and limit.fraction is not None
        and wish
        in (
            MemoryLimit(bytes=limit.bytes),
            MemoryLimit(fraction=limit.fraction),
        )
    ):
        return False
    return wish != limit and (wish.unlimited or wish.on(total) != limit.on(total) or wish.on(total) is None)


def _limit_on(policy: EffectivePolicy, rule: DeviceRule | None, total: int | None, notes: _Notes) -> MemoryLimit | None:
    wish, origin = _wished_limit(policy, rule)
    ceilings = sorted((c for c in policy.ceilings if c.key == "memory_limit"), key=_by_layer)
    bounds = [cast(MemoryLimit, ceiling.value) for ceiling in ceilings]
    limit = _tightest([*bounds, *([wish] if wish is not None else [])], total)
    if wish is not None and origin is not None and limit is not None and _is_above(wish, limit, total):
        holder = next((c.origin for c in ceilings if c.value == limit), ceilings[0].origin if ceilings else origin)
        notes.clamped(f"{format_limit(wish)} is above the ceiling of {format_limit(limit)} from {holder}", origin)
    return limit


def _fit(parts: Sequence[MemoryLimit], limit: MemoryLimit | None, total: int | None) -> tuple[MemoryLimit, ...]:
    """The split, scaled down where its sum passes the limit (or the card)."""
    sizes = [size for part in parts if (size := part.on(total)) is not None]
    if len(sizes) != len(parts):
        return tuple(parts)
    bound = limit.on(total) if limit is not None else total
    if bound is None or sum(sizes) <= bound:
        return tuple(MemoryLimit(bytes=size) for size in sizes)
    return tuple(MemoryLimit(bytes=size * bound // sum(sizes)) for size in sizes)


def _position(card: _Card, room: _Pool) -> int:
    """A position means the same GPU in every key: its place in the room, not among the visible."""
    if card in room.cards:
        return room.cards.index(card)
    return int(card.token) if card.token.isdigit() else -1


def _planned(card: _Card, position: int, policy: EffectivePolicy, notes: _Notes) -> PlannedDevice:
    total = card.device.total if card.device is not None else None
    rule = _rule_for(card, position, _rules(policy))
    limit = _limit_on(policy, rule, total, notes)
    parts = rule.logical_devices if rule is not None else ()
    fitted = _fit(parts, limit, total)
    if rule is not None and parts and sum(p.bytes or 0 for p in fitted) < sum(p.on(total) or 0 for p in parts):
        notes.clamped(f"logical_devices are scaled down to fit {format_limit(limit)}", rule.origin)
    return PlannedDevice(card.token, card.device, limit, fitted)


def _rules(policy: EffectivePolicy) -> tuple[DeviceRule, ...]:
    setting = policy.settings.get("device")
    return cast("tuple[DeviceRule, ...]", setting.value) if setting is not None else ()


# ---- growth and allocator


def _growth(policy: EffectivePolicy, notes: _Notes) -> bool | None:
    setting = policy.settings.get("memory_growth")
    required = [c for c in policy.ceilings if c.key == "require_memory_growth" and c.value is True]
    if required and setting is not None and setting.value is False:
        notes.clamped(f"growth stays on: required by {required[0].origin}", setting.origin)
    if required:
        return True
    return cast(bool, setting.value) if setting is not None else None


def _allocator(policy: EffectivePolicy, limited: bool, notes: _Notes) -> Allocator | None:
    """The cuda_malloc allocators do not keep a limit, so a limit implies bfc."""
    setting = policy.settings.get("allocator")
    wish = cast(Allocator, setting.value) if setting is not None else None
    if not limited:
        return wish
    if wish not in (None, "bfc") and setting is not None:
        notes.clamped(f'allocator "{wish}" does not keep a memory limit: "bfc" is used', setting.origin)
    return "bfc"


# ---- the whole


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
    return chosen or any(ceiling.key in VISIBILITY_CEILINGS for ceiling in policy.ceilings)


def _room(policy: EffectivePolicy, grant: Grant, inventory: Inventory, notes: _Notes) -> _Pool:
    """Where positions of users' and projects' files count."""
    pool = _granted(grant, inventory)
    if _lacks_required_grant(policy, grant, notes):
        return _Pool()
    ours = [c for c in _allowed(policy) if c.origin.layer == "machine"]
    return _administrators_room(pool, ours, notes)


def _allowed(policy: EffectivePolicy) -> list[Ceiling]:
    return [ceiling for ceiling in policy.ceilings if ceiling.key == "allowed_devices"]


def _visible_pool(
    room: _Pool,
    policy: EffectivePolicy,
    grant: Grant,
    inventory: Inventory,
    request: Sequence[str] | None,
    notes: _Notes,
) -> _Pool:
    pool = _apply_allowed(room, room, [c for c in _allowed(policy) if c.origin.layer != "machine"], notes)
    pool = _apply_choice(pool, room, policy, grant, notes)
    if request is not None:
        pool = _apply_request(pool, request, grant, inventory, notes)
    return _apply_count(pool, [c for c in policy.ceilings if c.key == "max_devices"], notes)


def _shown_together(pool: _Pool, policy: EffectivePolicy, notes: _Notes) -> _Pool:
    """CUDA shows a process one MIG instance and nothing beside it, or whole GPUs (NVIDIA's MIG user guide)."""
    instances = [card for card in pool.cards if card.is_instance]
    if not instances or len(pool.cards) == 1:
        return pool
    whole = [card for card in pool.cards if not card.is_instance]
    kept = whole if whole and not pool.cards[0].is_instance else instances[:1]
    setting = policy.settings.get("visible_devices")
    text = f"{_names(kept)} of {_names(pool.cards)}: CUDA shows a process one MIG instance alone, or whole GPUs"
    notes.add("one-instance", text, setting.origin if setting else None, "note")
    return pool.narrowed(kept)


def _lacks_required_grant(policy: EffectivePolicy, grant: Grant, notes: _Notes) -> bool:
    required = [c for c in policy.ceilings if c.key == "require_grant" and c.value is True]
    if not required or not grant.scheduler or grant.tokens is not None:
        return False
    notes.add("no-grant", "the scheduler granted no GPU (CUDA_VISIBLE_DEVICES is unset)", required[0].origin)
    return True


def _ungoverned_pool(
    policy: EffectivePolicy, grant: Grant, inventory: Inventory, request: Sequence[str] | None
) -> _Pool:
    """What CUDA will show by itself: the program's own value where it set one, otherwise the grant."""
    current = grant if request is None else replace(grant, tokens=tuple(request))
    if instance := next((card for card in _granted(current, inventory).cards if card.is_instance), None):
        return _Pool((instance,))  # whatever stands before it: see `_shown_together`
    ordered = current.pci_order or _sets_order(policy, current, request, governed=False)
    if current.tokens is None and not ordered and len({d.name for d in inventory.devices or ()}) > 1:
        # CUDA puts the fastest first: which of the unlike cards is GPU:0 cannot be told.
        return _Pool(open=True)
    return _granted(current, inventory)


def resolve(policy: EffectivePolicy, grant: Grant, inventory: Inventory, request: Sequence[str] | None = None) -> Plan:
    """Decide what this process may use.

    Args:
        policy: The merged policy.
        grant: What the scheduler or the parent gave.
        inventory: The machine's GPUs; without them visibility by position and limits in bytes still work.
        request: Tokens the program itself wrote into CUDA_VISIBLE_DEVICES after it started; None: none.

    Returns:
        The Plan; it never allows more than the grant and the ceilings do.
    """
    notes = _Notes()
    governed = governs_visibility(policy)
    if governed:
        room = _room(policy, grant, inventory, notes)
        pool = _shown_together(_visible_pool(room, policy, grant, inventory, request, notes), policy, notes)
    else:
        room = pool = _ungoverned_pool(policy, grant, inventory, request)
    devices = [_planned(card, _position(card, room), policy, notes) for card in pool.cards]
    default = _limit_on(policy, None, None, _Notes())
    limited = default is not None or any(device.limit is not None for device in devices)
    return Plan(
        visible=_visible_value(pool) if governed and not pool.open else None,
        pci_order=_sets_order(policy, grant, request, governed=governed and bool(pool.cards)),
        devices=None if pool.open else tuple(devices),
        limit=default,
        growth=_growth(policy, notes),
        allocator=_allocator(policy, limited, notes),
        findings=tuple(dict.fromkeys(notes.findings)),
        machine_count=None if inventory.devices is None else len(inventory.devices),
    )


def _visible_value(pool: _Pool) -> str:
    return ",".join(card.token for card in pool.cards) or NO_GPU


def _mixes_sizes_and_shares(policy: EffectivePolicy) -> bool:
    """Whether it takes the card to tell which limit is the smallest."""
    found = [c.value for c in policy.ceilings if c.key == "memory_limit"]
    found += [policy.settings["memory_limit"].value] if "memory_limit" in policy.settings else []
    limits = [limit for limit in found if isinstance(limit, MemoryLimit)]
    return any(limit.bytes is not None for limit in limits) and any(limit.fraction is not None for limit in limits)


def _sets_order(policy: EffectivePolicy, grant: Grant, request: Sequence[str] | None, *, governed: bool) -> bool:
    """Numbers we write are nvidia-smi's; under an inherited list the order is part of that list."""
    by_identity = any(rule.match.kind != "position" for rule in _rules(policy)) or _mixes_sizes_and_shares(policy)
    return grant.tokens is None and (governed or (by_identity and request is None))
