"""The GPUs a process might use: tokens, cards, what selectors name, and which key narrowed them. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile

from tfenv.policy.model import AutoChoice, Device, Grant, Inventory, Origin, Selector
from tfenv.values import frozen, replace

#: A number as the driver reads it. Whatever follows is ignored. Longer ones overflow its conversion.
_NUMBER = re.compile(r"\s*([+-]?\d{1,9})(?!\d)", re.ASCII)
_PREFIXES = ("GPU-", "MIG-")


# ---- tokens of CUDA_VISIBLE_DEVICES


def keep_valid_tokens(tokens: Sequence[str]) -> tuple[str, ...]:
    """Return the tokens CUDA honours: numbers in their plain form, or UUIDs without the blanks around them.

    The first token decides which of both the list is of. CUDA stops at the first that is not of that kind. A GPU that
    is named twice leaves no GPU at all.
    """
    read = _read_uuid if tokens and tokens[0].strip().startswith(_PREFIXES) else _read_number
    kept: list[str] = []
    for raw in tokens:
        token = read(raw)
        if token is None:
            break
        kept.append(token)
    return tuple(kept) if len(set(kept)) == len(kept) else ()


def _read_number(raw: str) -> str | None:
    match = _NUMBER.match(raw)
    return str(int(match[1])) if match is not None and int(match[1]) >= 0 else None


def _read_uuid(raw: str) -> str | None:
    token = raw.strip()
    return token if token.startswith(_PREFIXES) and token not in _PREFIXES else None


# ---- cards


@frozen
class Card:
    """A GPU the process might use: the token that names it, and what NVML says of it."""

    token: str
    device: Device | None = None

    @property
    def is_instance(self) -> bool:
        """Whether it is a MIG instance. CUDA shows a process one of those."""
        return self.token.startswith("MIG-") or (self.device is not None and self.device.instance is not None)

    @property
    def identity(self) -> str:
        """What names it in an allocation: the UUID, or the token where that is not known."""
        return self.device.uuid if self.device is not None else self.token


def is_same_card(first: Card, second: Card) -> bool:
    """Return whether both are one GPU, as far as that can be told."""
    if first.device is not None and second.device is not None:
        return first.device.uuid == second.device.uuid
    return first.token == second.token


@frozen
class DeviceSet:
    """The GPUs that are still possible.

    Attributes:
        cards: The GPUs in CUDA's order.
        unbounded: It is all GPUs of a machine, and their number is unknown. `cards` is empty then.
        narrowings: Each key that took GPUs away, with the cards it left. The outermost comes first.
        numbered: The set in which positions count. None: this one.
        choosing: How tfenv still chooses among the cards. None: the process gets all of them.
    """

    cards: tuple[Card, ...] = ()
    unbounded: bool = False
    narrowings: tuple[tuple[Origin, tuple[Card, ...]], ...] = ()
    numbered: DeviceSet | None = None
    choosing: AutoChoice | None = None

    def restrict(self, cards: Iterable[Card], by: Origin | None = None) -> DeviceSet:
        """Keep only these cards. `by` is the key that takes the others away. None: the program itself, or CUDA."""
        kept = tuple(dict.fromkeys(cards))
        fewer = self.unbounded or set(kept) != set(self.cards)
        narrowings = (*self.narrowings, (by, kept)) if by is not None and fewer else self.narrowings
        return replace(self, cards=kept, unbounded=False, narrowings=narrowings)

    @property
    def addressable(self) -> DeviceSet:
        """The set in which positions count."""
        return self.numbered or self

    @property
    def narrowed_by(self) -> tuple[Origin, ...]:
        """The keys that narrowed it, the outermost first."""
        return tuple(dict.fromkeys(origin for origin, _ in self.narrowings))

    def find_holders(self, cards: Iterable[Card]) -> tuple[Origin, ...]:
        """Return for cards that are not among these the outermost key that took each away."""
        found = [self._find_holder(card) for card in cards]
        return tuple(dict.fromkeys(origin for origin in found if origin is not None))

    def _find_holder(self, card: Card) -> Origin | None:
        for origin, left in self.narrowings:
            if not any(is_same_card(card, other) for other in left):
                return origin
        return None


def find_device(token: str, grant: Grant, inventory: Inventory) -> Device | None:
    """Find the device a token names.

    CUDA counts the fastest GPU first unless it is told otherwise, NVML by PCI address. A number is certain only
    under PCI order, where all cards are alike, or once CUDA has told which card it is.

    Returns:
        None where it cannot be told which device it is.
    """
    devices = inventory.devices or ()
    if uuid := inventory.named.get(token):  # CUDA's UUIDs have digits alone: "GPU-" or "MIG-" is not theirs
        digits = uuid.partition("-")[2]
        return next((device for device in devices if device.uuid.partition("-")[2] == digits), None)
    if token.isdigit():
        # An instance is called "NVIDIA A100 MIG 3g.20gb", its GPU "NVIDIA A100".
        alike = len({device.name.partition(" MIG ")[0] for device in devices}) == 1
        certain = grant.tokens is None or grant.pci_order or alike
        return next((device for device in devices if certain and device.index == int(token)), None)
    named = [device for device in devices if device.uuid.lower().startswith(token.lower())]
    return named[0] if len(named) == 1 else _find_first_instance(token, devices)


def _find_first_instance(token: str, devices: Sequence[Device]) -> Device | None:
    """Find what CUDA shows of a GPU that is split and named as a whole."""
    named = [device for device in devices if (device.parent or "").lower().startswith(token.lower())]
    return named[0] if len({device.parent for device in named}) == 1 else None


def _is_absent(token: str, inventory: Inventory) -> bool:
    """Return whether the machine certainly has no such GPU: CUDA ends the list there."""
    if not inventory.devices or inventory.lost or "/" in token:  # "MIG-GPU-…/1/0" is in no UUID
        return False
    if token.isdigit():
        return int(token) >= len({device.index for device in inventory.devices})
    known = [uuid for device in inventory.devices for uuid in (device.uuid, device.parent) if uuid is not None]
    return not any(uuid.lower().startswith(token.lower()) for uuid in known)


def exceeds_job(grant: Grant, tokens: Sequence[str] | None, inventory: Inventory) -> bool:
    """Return whether a value of CUDA_VISIBLE_DEVICES names GPUs that are not in the scheduler's own list.

    Args:
        grant: Its `listed` is that list.
        tokens: The value. None: it is unset, which shows all GPUs.
        inventory: The machine's GPUs. Where there are as many as were given, all of them are the job's.
    """
    if grant.listed is None or (grant.listed and len(_number_shown(inventory)) == len(grant.listed)):
        return False
    return tokens is None or not set(keep_valid_tokens(tokens)) <= set(grant.listed)


def _number_shown(inventory: Inventory) -> list[int]:
    """Return the numbers of the machine's GPUs, those that do not answer included."""
    return sorted({*(device.index for device in inventory.devices or ()), *inventory.lost})


def _cut_to_job(grant: Grant, inventory: Inventory) -> tuple[str, ...]:
    """Return the value of CUDA_VISIBLE_DEVICES that is worth what the scheduler listed. The value only narrows it.

    A scheduler that hides the other GPUs' device files (Slurm with ConstrainDevices) counts the job's from 0 in
    CUDA_VISIBLE_DEVICES, and in its own list as the machine does.
    """
    listed = keep_valid_tokens(grant.listed or ())
    wanted = keep_valid_tokens(grant.tokens or ())
    shown = _number_shown(inventory)
    if shown and any(token.isdigit() and int(token) > shown[-1] for token in listed):
        within = tuple(token for token in wanted if not token.isdigit() or int(token) <= shown[-1])
        return within[: len(listed)] or tuple(map(str, shown[: len(listed)]))
    named = tuple(token for token in wanted if _is_listed(token, listed, grant, inventory))
    return named[: len(listed)] or listed


def _is_listed(token: str, listed: tuple[str, ...], grant: Grant, inventory: Inventory) -> bool:
    """Return whether the scheduler's list has a GPU. Slurm lists numbers, and for MIG instances numbers of its own."""
    if token in listed:
        return True
    device = find_device(token, grant, inventory)
    numbers = bool(listed) and listed[0].isdigit()
    if device is None or (numbers and device.instance is not None):
        return not token.isdigit()
    return str(device.index) in listed if numbers else {device.uuid, device.parent or ""} & set(listed) != set()


def list_granted(grant: Grant, inventory: Inventory) -> DeviceSet:
    """Return the GPUs that the scheduler or the parent gave, or else all GPUs of the machine."""
    tokens = _cut_to_job(grant, inventory) if exceeds_job(grant, grant.tokens, inventory) else grant.tokens
    if tokens is not None:
        given = takewhile(lambda token: not _is_absent(token, inventory), keep_valid_tokens(tokens))
        cards = tuple(Card(token, find_device(token, grant, inventory)) for token in given)
        known = [card.device.uuid for card in cards if card.device is not None]
        # Two beginnings of one UUID leave no GPU at all, too.
        return DeviceSet(cards) if len(set(known)) == len(known) else DeviceSet()
    if inventory.devices is None:
        return DeviceSet(unbounded=True)
    # CUDA_VISIBLE_DEVICES has no numbers for instances.
    names = (str(device.index) if device.instance is None else device.uuid for device in inventory.devices)
    return DeviceSet(tuple(map(Card, names, inventory.devices)))


# ---- selectors


def _has_uuid(card: Card, text: str) -> bool:
    """Return whether a UUID, or the beginning of one, names the card. A GPU's UUID names all its instances."""
    known = [card.token] if card.device is None else [card.token, card.device.uuid, card.device.parent or ""]
    return any(name.lower().startswith(text.lower()) for name in known)


def matches_card(selector: Selector, origin: Origin, card: Card, position: int) -> bool:
    """Return whether a selector names the card that has this position in the addressable set.

    In the machine layer a number is not a position. It is the machine's own, as nvidia-smi shows it.
    """
    if selector.kind == "name":
        return card.device is not None and fnmatchcase(card.device.name.lower(), selector.text.lower())
    if selector.kind == "uuid":
        return _has_uuid(card, selector.text)
    if origin.layer != "machine":
        return selector.position == position
    if card.device is not None:
        return selector.position == card.device.index
    return card.token == selector.text


def select_devices(
    selectors: Sequence[Selector], addressable: DeviceSet, origin: Origin
) -> tuple[list[Card], list[Selector]]:
    """Find the cards that the selectors of one key name.

    Returns:
        The cards in the order of the selectors, and the selectors that name none.
    """
    found: list[Card] = []
    missing: list[Selector] = []
    for selector in selectors:
        if addressable.unbounded:
            cards = [] if selector.kind == "name" else [Card(selector.text)]
        else:
            numbered = enumerate(addressable.cards)
            cards = [card for position, card in numbered if matches_card(selector, origin, card, position)]
        found.extend(card for card in cards if card not in found)
        if not cards:
            missing.append(selector)
    return found, missing
