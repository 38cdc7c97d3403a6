"""The GPUs a process might use: tokens, cards, what selectors name, and which key narrowed them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from tfenv.policy.model import Device, Grant, Inventory, Origin, Selector
from tfenv.values import frozen

__all__ = ["Card", "DeviceSet", "granted", "identify", "matches", "same_card", "selected", "keep_valid_tokens"]

#: Longer numbers are no ordinals: CUDA's own conversion overflows.
_MOST_DIGITS = 10


# ---- tokens of CUDA_VISIBLE_DEVICES


def keep_valid_tokens(tokens: Sequence[str]) -> tuple[str, ...]:
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


# ---- cards


@frozen
class Card:
    """A GPU the process might use: the token that names it, and what NVML says of it."""

    token: str
    device: Device | None = None

    @property
    def is_instance(self) -> bool:
        """A MIG instance, of which CUDA shows a process one."""
        return self.token.startswith("MIG-") or (self.device is not None and self.device.instance is not None)

    @property
    def identity(self) -> str:
        """By what a seat names it: the UUID, or the token where that is not known."""
        return self.device.uuid if self.device is not None else self.token


def same_card(a: Card, b: Card) -> bool:
    """Whether both are one GPU, as far as that can be told."""
    if a.device is not None and b.device is not None:
        return a.device.uuid == b.device.uuid
    return a.token == b.token


@frozen
class DeviceSet:
    """The GPUs still possible.

    Attributes:
        cards: In CUDA's order.
        unbounded: All the machine has, and nobody knows how many that is; `cards` is empty.
        steps: Each key that took GPUs away, with those it left.
    """

    cards: tuple[Card, ...] = ()
    unbounded: bool = False
    steps: tuple[tuple[Origin, tuple[Card, ...]], ...] = ()

    def restrict(self, cards: Iterable[Card], by: Origin | None = None) -> DeviceSet:
        """Only these are left; `by` is what says so, None: the program's own wish."""
        kept = tuple(dict.fromkeys(cards))
        fewer = self.unbounded or set(kept) != set(self.cards)
        return DeviceSet(kept, steps=(*self.steps, (by, kept)) if by is not None and fewer else self.steps)

    @property
    def by(self) -> tuple[Origin, ...]:
        """The keys that narrowed it, the outermost first."""
        return tuple(dict.fromkeys(origin for origin, _ in self.steps))

    def held_from(self, cards: Iterable[Card]) -> tuple[Origin, ...]:
        """For cards that are not among these: the outermost key that took each away."""
        found = [self._taken_by(card) for card in cards]
        return tuple(dict.fromkeys(origin for origin in found if origin is not None))

    def _taken_by(self, card: Card) -> Origin | None:
        for origin, left in self.steps:
            if not any(same_card(card, other) for other in left):
                return origin
        return None


def identify(token: str, grant: Grant, inventory: Inventory) -> Device | None:
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


def granted(grant: Grant, inventory: Inventory) -> DeviceSet:
    """What the scheduler or the parent gave; without a word of theirs, all the machine has."""
    if grant.tokens is not None:
        cards = tuple(Card(token, identify(token, grant, inventory)) for token in keep_valid_tokens(grant.tokens))
        return DeviceSet() if _names_one_twice(cards) else DeviceSet(cards)
    if inventory.devices is None:
        return DeviceSet(unbounded=True)
    return DeviceSet(tuple(Card(_token(device), device) for device in inventory.devices))


def _names_one_twice(cards: Sequence[Card]) -> bool:
    """By its number and by its UUID, which leaves no GPU as well."""
    known = [card.device.uuid for card in cards if card.device is not None]
    return len(set(known)) < len(known)


# ---- selectors


def _same_uuid(text: str, card: Card) -> bool:
    """Whether a UUID, or the beginning of one, names it; a GPU's names all its instances."""
    known = [card.token] if card.device is None else [card.token, card.device.uuid, card.device.parent or ""]
    return any(name.lower().startswith(text.lower()) for name in known)


def matches(selector: Selector, position: int, card: Card, *, machine_numbers: bool) -> bool:
    """Whether a selector names this card, which has this position in its room."""
    if selector.kind == "name":
        return card.device is not None and fnmatchcase(card.device.name.lower(), selector.text.lower())
    if selector.kind == "uuid":
        return _same_uuid(selector.text, card)
    if not machine_numbers:
        return selector.position == position
    if card.device is not None:
        return selector.position == card.device.index
    return card.token == selector.text


def _select(selector: Selector, addressable: DeviceSet, *, machine_numbers: bool) -> list[Card]:
    if addressable.unbounded:
        return [] if selector.kind == "name" else [Card(selector.text)]
    cards = enumerate(addressable.cards)
    return [card for i, card in cards if matches(selector, i, card, machine_numbers=machine_numbers)]


def selected(
    selectors: Sequence[Selector], addressable: DeviceSet, origin: Origin
) -> tuple[list[Card], list[Selector]]:
    """The cards the selectors name, in the order of the selectors, and the selectors that name none.

    Args:
        selectors: From one key of one file.
        room: Where positions count: the grant within the machine's allowed devices.
        origin: In the machine layer a number is the machine's own, as nvidia-smi shows it.
    """
    machine_numbers = origin.layer == "machine"
    found: list[Card] = []
    missing: list[Selector] = []
    for selector in selectors:
        cards = _select(selector, addressable, machine_numbers=machine_numbers)
        found.extend(card for card in cards if card not in found)
        if not cards:
            missing.append(selector)
    return found, missing
