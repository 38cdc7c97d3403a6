"""What `tfgpu check` says of files that are right but hardly meant: impossible combinations, cards that are not there.

It never keeps a policy from being in force, and nothing of it runs where a policy is applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, cast

from tfenv.config.schema import list_device_rules
from tfenv.errors import Finding
from tfenv.identity import find_subject
from tfenv.lint.reach import Advice, Places, advise_on_reach
from tfenv.policy.merge import combine, merge_groups, select_tables
from tfenv.policy.model import (
    AutoChoice,
    Device,
    DeviceRule,
    Inventory,
    Layer,
    LayerName,
    MemoryLimit,
    Selector,
    Setting,
    Subject,
    Tables,
    format_key,
)
from tfenv.policy.units import format_bytes, format_limit
from tfenv.values import frozen, replace

if TYPE_CHECKING:
    from tfenv.config.document import Document

__all__ = ["advise"]

#: Characters of a UUID that tell one card from another nearly always: "GPU-8932f937".
_SHORT_UUID = 12
#: Percentages are sums of binary fractions: 10% three times is a little more than 30%.
_ROUNDING = 1e-9


def advise(
    layers: Iterable[Layer], documents: Sequence[Document] = (), inventory: Inventory | None = None
) -> tuple[Finding, ...]:
    """What is right, but probably not what was meant.

    Args:
        layers: Validated, one a file.
        documents: Those they were read from, for lines and columns, and for whom a file is.
        inventory: The machine's GPUs; without them nothing is said of cards.

    Returns:
        Warnings and notes, in the order of the documents and their lines.
    """
    places = Places(documents)
    devices = (inventory.devices if inventory is not None else None) or ()
    layer_sort_key: dict[LayerName, list[Layer]] = {}
    for layer in layers:
        layer_sort_key.setdefault(layer.name, []).append(layer)
    found = [
        advice
        for name, parts in layer_sort_key.items()
        for advice in _advice_on_layer(name, parts, documents, _Cards(name, devices), places)
    ]
    ordered = sorted(dict.fromkeys(found), key=lambda advice: places.order(advice.origin))
    return tuple(_finding(advice, places) for advice in ordered)


def _finding(advice: Advice, places: Places) -> Finding:
    origin, code, message, severity = advice
    line, column = places.position(origin)
    return Finding(code, message, severity, origin.path, line, column, format_key(origin.key) or None)


def _advice_on_layer(
    name: LayerName, parts: Sequence[Layer], documents: Sequence[Document], cards: _Cards, places: Places
) -> Iterator[Advice]:
    scopes = {document.source.path: document.source.scope for document in documents}
    split = [_by_scope(part, scopes.get(part.paths[0]) if part.paths else None) for part in parts]
    own = [own for own, _ in split]
    (whole,) = combine(own)
    if name == "machine":
        machine_documents = [document for document in documents if document.source.layer == "machine"]
        yield from advise_on_reach(own, whole, machine_documents, places)
    for view in (*_views(whole), *(_View(tables, tables) for _, others in split for tables in others)):
        yield from _advice_on_view(view, cards, places)


def _by_scope(part: Layer, scope: tuple[str, str] | None) -> tuple[Layer, list[Tables]]:
    """What a file says to all whom its tables name, and the tables of which only those it is for can know."""
    if scope is None:
        return part, []
    named = {"group": merge_groups(part), "user": part.users, "project": part.projects}
    mine = {
        kind: {name: found for name, found in tables.items() if scope == (kind, name)} for kind, tables in named.items()
    }
    others = [found for kind, tables in named.items() for name, found in tables.items() if scope != (kind, name)]
    return replace(part, groups=tuple(mine["group"].items()), users=mine["user"], projects={}), others


# ---- what one table is seen with


@frozen
class _View:
    """A table, and what holds for those it is for.

    Attributes:
        own: The table's own keys: only of them something is said.
        all: The layer's keys for its people, less specific tables included.
    """

    own: Tables
    all: Tables

    @property
    def allowed(self) -> Setting | None:
        return self.all.ceiling.get("allowed_devices")

    @property
    def limit(self) -> Setting | None:
        return self.all.ceiling.get("memory_limit")

    @property
    def most(self) -> Setting | None:
        return self.all.ceiling.get("max_devices")


def _views(whole: Layer) -> Iterator[_View]:
    yield _View(whole.base, whole.base)
    for tables in merge_groups(whole).values():
        yield _View(tables, _over(whole.base, tables))
    for name, tables in whole.users.items():
        subject = find_subject(name) or Subject(name, -1)
        yield _View(tables, _over(*select_tables(whole, subject)))
    for path, tables in whole.projects.items():
        yield _View(tables, _over(*select_tables(whole, Subject("", -1, (), path))))


def _over(*tables: Tables) -> Tables:
    gpu: dict[str, Setting] = {}
    ceiling: dict[str, Setting] = {}
    for specific in tables:
        gpu.update(specific.gpu)
        ceiling.update(specific.ceiling)
    return Tables(gpu, ceiling)


def _advice_on_view(view: _View, cards: _Cards, places: Places) -> Iterator[Advice]:
    yield from _first_card_for_all(view)
    yield from _numbers(view, cards)
    yield from _no_devices_left(view, places)
    yield from _outside_allowed(view, cards, places)
    yield from _too_many(view, places)
    yield from _growth_against_its_ceiling(view, places)
    yield from _above_ceiling(view, cards, places)
    yield from _splits_that_do_not_fit(view, cards, places)
    yield from _rules_never_matched(view)
    yield from _cards_not_here(view, cards)
    yield from _above_the_cards(view, cards)


# ---- cards


@frozen
class _Cards:
    """The machine's cards, as the selectors of one layer see them."""

    layer: LayerName
    devices: tuple[Device, ...] = ()

    @property
    def totals(self) -> tuple[int, ...]:
        """Memory of each card in bytes, where it is known."""
        return tuple(device.total for device in self.devices if device.total is not None)

    def named_by(self, selector: Selector) -> frozenset[int] | None:
        """Indexes; None where it cannot be told: no NVML, a MIG device, a position outside of the machine layer."""
        if not self.devices or selector.text.startswith("MIG-"):
            return None
        if selector.kind == "position":
            return frozenset({selector.position}) if self.layer == "machine" else None
        return frozenset(device.index for device in self.devices if _matches(selector, device))

    def may_overlap(self, one: Selector, other: Selector) -> bool:
        """Whether two selectors can name the same card, as far as can be told."""
        if one.kind == other.kind == "position":
            return one.position == other.position
        first, second = self.named_by(one), self.named_by(other)
        if first and second is not None:
            return bool(first & second)
        if one.kind == other.kind == "uuid":
            return one.text.lower().startswith(other.text.lower()) or other.text.lower().startswith(one.text.lower())
        return True

    def total_of(self, selector: Selector) -> int | None:
        """Memory of the largest card it names; None where none is known."""
        named = self.named_by(selector)
        meant = [device.total for device in self.devices if named is None or device.index in named]
        return max((total for total in meant if total is not None), default=None)


def _matches(selector: Selector, device: Device) -> bool:
    """Whether it names the card; a GPU's UUID names its MIG instances, too."""
    if selector.kind == "name":
        return fnmatchcase(device.name.lower(), selector.text.lower())
    return any((uuid or "").lower().startswith(selector.text.lower()) for uuid in (device.uuid, device.parent))


def _listed(setting: Setting | None) -> tuple[Selector, ...]:
    """The selectors of visible_devices or allowed_devices where it is a list."""
    return cast("tuple[Selector, ...]", setting.value) if setting and isinstance(setting.value, tuple) else ()


def _text(selectors: Iterable[Selector]) -> str:
    return ", ".join(str(selector) for selector in selectors)


# ---- which devices


def _first_card_for_all(view: _View) -> Iterator[Advice]:
    most, visible = view.own.ceiling.get("max_devices"), view.all.gpu.get("visible_devices")
    if most is None or most.value == 0 or (visible is not None and visible.value != "all"):
        return
    message = (
        "alone it gives everybody the first GPU; write visible_devices = {count = 1} beside it, which chooses a free "
        "one, or give users or groups a visible_devices or allowed_devices of their own"
    )
    yield Advice(most.origin, "first-card-for-all", message)


def _numbers(view: _View, cards: _Cards) -> Iterator[Advice]:
    """Numbers where UUIDs are meant: in the machine layer they are nvidia-smi's, which shift."""
    if cards.layer != "machine":
        return
    lists = [view.own.gpu.get("visible_devices"), view.own.ceiling.get("allowed_devices")]
    named = [(setting.origin, _listed(setting)) for setting in lists if setting is not None]
    named += [(rule.origin, (rule.match,)) for rule in list_device_rules(view.own.gpu)]
    for origin, selectors in named:
        if numbers := [selector.position for selector in selectors if selector.kind == "position"]:
            yield Advice(origin, "numbers-in-machine-layer", _use_uuids(numbers, cards.devices))


def _use_uuids(numbers: Iterable[int], devices: Sequence[Device]) -> str:
    shift = "numbers shift inside containers and Slurm's cgroups"
    known = [f'"{device.uuid[:_SHORT_UUID]}" for {device.index}' for device in devices if device.index in numbers]
    if known:
        return f"{shift}; write {', '.join(known)}"
    return f"{shift}; write the UUIDs that `nvidia-smi -L` shows"


def _chooses(setting: Setting | None) -> bool:
    return setting is not None and setting.value not in ("all", ())


def _no_devices_left(view: _View, places: Places) -> Iterator[Advice]:
    """A choice under a ceiling that leaves no device."""
    visible = view.own.gpu.get("visible_devices")
    if visible is None or not _chooses(visible):
        return
    for ceiling, none in ((view.allowed, ()), (view.most, 0)):
        if ceiling is not None and ceiling.value == none:
            where = places.text(ceiling.origin, visible.origin)
            message = f"no device is left to choose: {where} allows none; take one of them out"
            yield Advice(visible.origin, "no-devices-left", message)


def _outside_allowed(view: _View, cards: _Cards, places: Places) -> Iterator[Advice]:
    """A choice, or a part of it, that the allowed devices leave out; of what is not in this machine others tell."""
    visible, allowed = view.all.gpu.get("visible_devices"), view.allowed
    if visible is None or allowed is None or not _listed(allowed):
        return
    chosen = [selector for selector in _listed(visible) if not _is_missing(selector, cards)]
    inside = [one for one in chosen if any(cards.may_overlap(one, other) for other in _listed(allowed))]
    outside = [selector for selector in chosen if selector not in inside]
    if outside and "visible_devices" in view.own.gpu:
        where = places.text(allowed.origin, visible.origin)
        message = f"{_text(outside)}: not among the allowed_devices of {where}; never visible"
        yield Advice(visible.origin, "outside-ceiling", message)
    elif outside and not inside and "allowed_devices" in view.own.ceiling:
        where = places.text(visible.origin, allowed.origin)
        message = f"allows nothing of the visible_devices of {where}; write a visible_devices of its own beside it"
        yield Advice(allowed.origin, "outside-ceiling", message)


def _too_many(view: _View, places: Places) -> Iterator[Advice]:
    """A choice of more devices than a ceiling lets pass."""
    visible = view.own.gpu.get("visible_devices")
    if visible is None:
        return
    wanted = visible.value.count if isinstance(visible.value, AutoChoice) else len(_listed(visible))
    if view.most is not None and 0 < cast("int", view.most.value) < wanted:
        message = (
            f"asks for {wanted} devices: {places.text(view.most.origin, visible.origin)} lets {view.most.value} pass"
        )
        yield Advice(visible.origin, "above-ceiling", message)
    allowed = _listed(view.allowed)
    single = all(selector.kind != "name" for selector in allowed)
    if view.allowed is not None and single and isinstance(visible.value, AutoChoice) and 0 < len(allowed) < wanted:
        message = f"asks for {wanted} devices: {places.text(view.allowed.origin, visible.origin)} allows {len(allowed)}"
        yield Advice(visible.origin, "above-ceiling", message)


def _rules_never_matched(view: _View) -> Iterator[Advice]:
    """The first entry that matches counts: a later one for the same devices never does."""
    earlier: list[Selector] = []
    for rule in list_device_rules(view.own.gpu):
        if any(other == rule.match or (other.kind, other.text) == ("name", "*") for other in earlier):
            message = f"never counts: an earlier entry matches {rule.match} already, and the first one counts"
            yield Advice(rule.origin, "never-counts", message)
        earlier.append(rule.match)


def _cards_not_here(view: _View, cards: _Cards) -> Iterator[Advice]:
    """Selectors of cards that this machine does not have. A project's file may name those of several machines."""
    lists = [view.own.gpu.get("visible_devices"), view.own.ceiling.get("allowed_devices")]
    named = [(setting.origin, _listed(setting)) for setting in lists if setting is not None]
    if cards.layer == "machine":
        named += [(rule.origin, (rule.match,)) for rule in list_device_rules(view.own.gpu)]
    for origin, selectors in named:
        missing = [selector for selector in selectors if _is_missing(selector, cards)]
        if missing and (cards.layer == "machine" or len(missing) == len(selectors)):
            message = f"{_text(missing)}: not in this machine; `nvidia-smi -L` lists its {len(cards.devices)} GPUs"
            yield Advice(origin, "no-such-device", message)


def _is_missing(selector: Selector, cards: _Cards) -> bool:
    if selector.kind == "position":
        return bool(cards.devices) and selector.position >= len(cards.devices)
    return cards.named_by(selector) == frozenset()


# ---- how much memory


def _limits(tables: Tables) -> Iterator[tuple[Setting, Selector | None]]:
    """Every limit that is a wish, with the devices it is for; None: all."""
    if (limit := tables.gpu.get("memory_limit")) is not None:
        yield limit, None
    for rule in list_device_rules(tables.gpu):
        if rule.memory_limit is not None:
            yield Setting(rule.memory_limit, rule.origin), rule.match


def _growth_against_its_ceiling(view: _View, places: Places) -> Iterator[Advice]:
    growth, required = view.own.gpu.get("memory_growth"), view.all.ceiling.get("require_memory_growth")
    if growth is not None and growth.value is False and required is not None and required.value is True:
        message = f"growth stays on: {places.text(required.origin, growth.origin)} requires it"
        yield Advice(growth.origin, "above-ceiling", message)


def _above_ceiling(view: _View, cards: _Cards, places: Places) -> Iterator[Advice]:
    """A limit above the ceiling of the same table, or of a less specific one: hardly the exception it looks like."""
    if view.limit is None:
        return
    bound = cast("MemoryLimit", view.limit.value)
    for wish, _ in _limits(view.own):
        if _is_above(cast("MemoryLimit", wish.value), bound, cards.totals):
            message = (
                f"{format_limit(cast('MemoryLimit', wish.value))} is above the ceiling of {format_limit(bound)} in "
                f"{places.text(view.limit.origin, wish.origin)}, which holds; lower it, or raise the ceiling beside it"
            )
            yield Advice(wish.origin, "above-ceiling", message)


def _is_above(wish: MemoryLimit, bound: MemoryLimit, totals: Sequence[int]) -> bool:
    """Whether it is larger on every card; a size and a share compare only where the cards are known."""
    if bound.unlimited or wish.unlimited:
        return wish.unlimited and not bound.unlimited
    if wish.bytes is not None and bound.bytes is not None:
        return wish.bytes > bound.bytes
    if wish.fraction is not None and bound.fraction is not None:
        return wish.fraction > bound.fraction + _ROUNDING
    return bool(totals) and all((wish.on(total) or 0) > (bound.on(total) or 0) for total in totals)


def _splits_that_do_not_fit(view: _View, cards: _Cards, places: Places) -> Iterator[Advice]:
    """Logical devices that are larger together than the limit, the ceiling or the card: they are scaled down."""
    for rule in list_device_rules(view.own.gpu):
        total = cards.total_of(rule.match)
        limit = None if rule.memory_limit is not None else view.all.gpu.get("memory_limit")
        for bound in (view.limit, limit):
            if bound is not None and _sum_is_above(rule, cast("MemoryLimit", bound.value), total):
                message = (
                    f"the logical devices take more together than the {format_limit(cast('MemoryLimit', bound.value))} "
                    f"of {places.text(bound.origin, rule.origin)}: they are scaled down; make them smaller"
                )
                yield Advice(rule.origin, "above-ceiling", message)
        if total is not None and _sum_is_above(rule, MemoryLimit(bytes=total), total):
            message = f"the logical devices take more together than the card's {format_bytes(total)}; make them smaller"
            yield Advice(rule.origin, "above-card", message)


def _sum_is_above(rule: DeviceRule, bound: MemoryLimit, total: int | None) -> bool:
    if bound.unlimited:
        return False
    sizes = sum(size.bytes for size in rule.logical_devices if size.bytes is not None)
    shares = sum(size.fraction for size in rule.logical_devices if size.fraction is not None)
    if total is not None:
        return sizes + int(total * shares) > (bound.on(total) or 0)
    return bool(bound.bytes is not None and sizes > bound.bytes) or bool(
        bound.fraction is not None and shares > bound.fraction + _ROUNDING
    )


def _above_the_cards(view: _View, cards: _Cards) -> Iterator[Advice]:
    """A limit that no card of this machine reaches."""
    wishes = list(_limits(view.own))
    if (ceiling := view.own.ceiling.get("memory_limit")) is not None:
        wishes.append((ceiling, None))
    for setting, match in wishes:
        size = cast("MemoryLimit", setting.value).bytes
        largest = cards.total_of(match) if match is not None else max(cards.totals, default=None)
        if size is not None and largest is not None and size > largest:
            which = "the largest card here" if match is None else f"the largest card that {match} names here"
            message = f"limits nothing: {which} has {format_bytes(largest)}; write less, or a percentage"
            yield Advice(setting.origin, "above-card", message)
