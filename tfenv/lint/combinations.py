"""Remarks on files that are right but hardly meant: impossible combinations, cards that are not there.

None of them keeps a policy from being in force, and nothing of this runs where a policy is applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, cast

from tfenv.config.schema import list_device_rules
from tfenv.errors import Finding
from tfenv.identity import find_subject
from tfenv.lint.exceptions import advise_on_exceptions
from tfenv.lint.frameworks import advise_on_frameworks
from tfenv.lint.logs import advise_on_logs
from tfenv.lint.observed import advise_on_observed
from tfenv.lint.reach import KeyPositions, LintRemark, advise_on_reach
from tfenv.lint.shares import advise_on_shares
from tfenv.policy.limits import is_sum_above
from tfenv.policy.merge import apply_observed, combine, merge_groups, select_tables
from tfenv.policy.model import (
    AutoChoice,
    Device,
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
from tfenv.policy.units import format_bytes, format_limit, format_requested_limit
from tfenv.values import frozen, replace

if TYPE_CHECKING:
    from tfenv.config.document import Document

#: Characters of a UUID that tell one card from another nearly always: "GPU-8932f937".
_SHORT_UUID = 12
#: Percentages are sums of binary fractions: 10% three times is a little more than 30%.
_ROUNDING = 1e-9


def advise(
    layers: Iterable[Layer],
    documents: Sequence[Document] = (),
    inventory: Inventory | None = None,
    today: str | None = None,
) -> tuple[Finding, ...]:
    """Say what is right, but probably not what was meant.

    Args:
        layers: Validated, one a file.
        documents: Those they were read from, for lines and columns, and for whom a file is.
        inventory: The machine's GPUs. None: nothing is said of cards.
        today: The day that ends of tables are compared with, as "2027-01-31". None: the machine's.

    Returns:
        Warnings and notes, in the order of the documents and their lines.
    """
    positions = KeyPositions(documents)
    devices = (inventory.devices if inventory is not None else None) or ()
    layers_by_name: dict[LayerName, list[Layer]] = {}
    for layer in layers:
        layers_by_name.setdefault(layer.name, []).append(layer)
    found = [
        remark
        for name, parts in layers_by_name.items()
        for remark in (
            *_check_layer(name, parts, documents, _MachineCards(name, devices), positions),
            *_check_observed(parts, documents, _MachineCards(name, devices), positions),
            *advise_on_exceptions(parts, today),
        )
    ]
    ordered = sorted(dict.fromkeys(found), key=lambda remark: positions.find_sort_key(remark.origin))
    return tuple(_make_finding(remark, positions) for remark in ordered)


def _make_finding(remark: LintRemark, positions: KeyPositions) -> Finding:
    origin = remark.origin
    line, column = positions.find_position(origin)
    key = format_key(origin.key) or None
    return Finding(remark.code, remark.message, remark.severity, origin.path, line, column, key)


def _check_layer(
    name: LayerName,
    parts: Sequence[Layer],
    documents: Sequence[Document],
    cards: _MachineCards,
    positions: KeyPositions,
) -> Iterator[LintRemark]:
    split = _split_parts(parts, documents)
    own = [own for own, _ in split]
    (whole,) = combine(own)
    if name in ("machine", "site"):
        own_documents = [document for document in documents if document.source.layer == name]
        yield from advise_on_reach(own, whole, own_documents, positions)
        yield from advise_on_logs(parts)
    if name == "machine":
        yield from advise_on_shares(whole)
    for view in _list_all_views(split):
        yield from _check_view(view, cards, positions)


def _check_observed(
    parts: Sequence[Layer], documents: Sequence[Document], cards: _MachineCards, positions: KeyPositions
) -> Iterator[LintRemark]:
    """Say of the tables under `[observe]` what would be said of them if they were in force."""
    if all(part.observed is None for part in parts):
        return
    yield from advise_on_observed(parts, positions)
    for view in _list_all_views(_split_parts(list(map(apply_observed, parts)), documents)):
        found = _check_view(view, cards, positions)
        yield from (remark for remark in found if remark.origin.key[0] == "observe")


def _split_parts(parts: Sequence[Layer], documents: Sequence[Document]) -> list[tuple[Layer, list[Tables]]]:
    scopes = {document.source.path: document.source.scope for document in documents}
    return [_split_by_scope(part, scopes.get(part.paths[0]) if part.paths else None) for part in parts]


def _list_all_views(split: Sequence[tuple[Layer, list[Tables]]]) -> Iterator[_TableView]:
    """Yield the tables of a layer, and those that only the people of a single file can know of."""
    (whole,) = combine([own for own, _ in split])
    yield from _list_views(whole)
    yield from (_TableView(tables, tables) for _, others in split for tables in others)


def _split_by_scope(part: Layer, scope: tuple[str, str] | None) -> tuple[Layer, list[Tables]]:
    """Split what a file says to all whom its tables name from the tables that only those it is for can know of."""
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
class _TableView:
    """A table, and what holds for those it is for.

    Attributes:
        own: The table's own keys. Remarks are about them alone.
        effective: The layer's keys for its people, less specific tables included.
    """

    own: Tables
    effective: Tables

    @property
    def allowed_devices(self) -> Setting | None:
        return self.effective.ceiling.get("allowed_devices")

    @property
    def limit_ceiling(self) -> Setting | None:
        return self.effective.ceiling.get("memory_limit")

    @property
    def max_devices(self) -> Setting | None:
        return self.effective.ceiling.get("max_devices")


def _list_views(whole: Layer) -> Iterator[_TableView]:
    yield _TableView(whole.base, whole.base)
    for tables in merge_groups(whole).values():
        yield _TableView(tables, _combine_tables(whole.base, tables))
    for name, tables in whole.users.items():
        subject = find_subject(name) or Subject(name, -1)
        yield _TableView(tables, _combine_tables(*select_tables(whole, subject)))
    for path, tables in whole.projects.items():
        yield _TableView(tables, _combine_tables(*select_tables(whole, Subject("", -1, (), path))))


def _combine_tables(*tables: Tables) -> Tables:
    gpu: dict[str, Setting] = {}
    ceiling: dict[str, Setting] = {}
    for specific in tables:
        gpu.update(specific.gpu)
        ceiling.update(specific.ceiling)
    return Tables(gpu, ceiling)


def _check_view(view: _TableView, cards: _MachineCards, positions: KeyPositions) -> Iterator[LintRemark]:
    yield from _check_max_devices(view)
    yield from _check_numbers(view, cards)
    yield from _check_devices_left(view, positions)
    yield from _check_allowed_devices(view, cards, positions)
    yield from _check_device_count(view, positions)
    yield from _check_growth(view, positions)
    yield from _check_limits_by_ceiling(view, cards, positions)
    yield from _check_splits(view, cards, positions)
    yield from _check_rules(view)
    yield from _check_cards_present(view, cards)
    yield from _check_limits_by_cards(view, cards)
    yield from advise_on_frameworks(view.own, view.effective, cards.totals)


# ---- cards


@frozen
class _MachineCards:
    """The machine's cards, as the selectors of one layer see them."""

    layer: LayerName
    devices: tuple[Device, ...] = ()

    @property
    def totals(self) -> tuple[int, ...]:
        """Memory of each card in bytes, where it is known."""
        return tuple(device.total for device in self.devices if device.total is not None)

    def find_named(self, selector: Selector) -> frozenset[int] | None:
        """Return the indexes of the cards that a selector names.

        None if it cannot be told: no NVML, a MIG device, a position outside of the machine layer.
        """
        if not self.devices or selector.text.startswith("MIG-"):
            return None
        if selector.kind == "position":
            return frozenset({selector.position}) if self.layer == "machine" else None
        return frozenset(device.index for device in self.devices if _matches(selector, device))

    def may_overlap(self, one: Selector, other: Selector) -> bool:
        """Return whether two selectors can name the same card, as far as can be told."""
        if one.kind == other.kind == "position":
            return one.position == other.position
        first, second = self.find_named(one), self.find_named(other)
        if first and second is not None:
            return bool(first & second)
        if one.kind == other.kind == "uuid":
            return one.text.lower().startswith(other.text.lower()) or other.text.lower().startswith(one.text.lower())
        return True

    def find_largest_total(self, selector: Selector) -> int | None:
        """Return the bytes of the largest card that a selector names. None if no card's memory is known."""
        named = self.find_named(selector)
        meant = [device.total for device in self.devices if named is None or device.index in named]
        return max((total for total in meant if total is not None), default=None)


def _matches(selector: Selector, device: Device) -> bool:
    """Return whether a selector names the card. A GPU's UUID names its MIG instances, too."""
    if selector.kind == "name":
        return fnmatchcase(device.name.lower(), selector.text.lower())
    return any((uuid or "").lower().startswith(selector.text.lower()) for uuid in (device.uuid, device.parent))


def _list_selectors(setting: Setting | None) -> tuple[Selector, ...]:
    """Return the selectors of visible_devices or allowed_devices. () if it is not a list."""
    return cast("tuple[Selector, ...]", setting.value) if setting and isinstance(setting.value, tuple) else ()


def _join_selectors(selectors: Iterable[Selector]) -> str:
    return ", ".join(str(selector) for selector in selectors)


# ---- which devices


def _check_max_devices(view: _TableView) -> Iterator[LintRemark]:
    most, visible = view.own.ceiling.get("max_devices"), view.effective.gpu.get("visible_devices")
    if most is None or most.value == 0 or (visible is not None and visible.value != "all"):
        return
    message = (
        "alone it gives everybody the first GPU; write visible_devices = {count = 1} beside it, which chooses a free "
        "one, or give users or groups a visible_devices or allowed_devices of their own"
    )
    yield LintRemark(most.origin, "first-card-for-all", message)


def _check_numbers(view: _TableView, cards: _MachineCards) -> Iterator[LintRemark]:
    """Find numbers where UUIDs are meant: in the machine layer they are nvidia-smi's, which shift."""
    if cards.layer != "machine":
        return
    lists = [view.own.gpu.get("visible_devices"), view.own.ceiling.get("allowed_devices")]
    named = [(setting.origin, _list_selectors(setting)) for setting in lists if setting is not None]
    named += [(rule.origin, (rule.match,)) for rule in list_device_rules(view.own.gpu)]
    for origin, selectors in named:
        if numbers := [selector.position for selector in selectors if selector.kind == "position"]:
            yield LintRemark(origin, "numbers-in-machine-layer", _suggest_uuids(numbers, cards.devices))


def _suggest_uuids(numbers: Iterable[int], devices: Sequence[Device]) -> str:
    shift = "numbers shift inside containers and Slurm's cgroups"
    known = [f'"{device.uuid[:_SHORT_UUID]}" for {device.index}' for device in devices if device.index in numbers]
    if known:
        return f"{shift}; write {', '.join(known)}"
    return f"{shift}; write the UUIDs that `nvidia-smi -L` shows"


def _check_devices_left(view: _TableView, positions: KeyPositions) -> Iterator[LintRemark]:
    """Find a choice under a ceiling that leaves no device."""
    visible = view.own.gpu.get("visible_devices")
    if visible is None or visible.value in ("all", ()):
        return
    for ceiling, none in ((view.allowed_devices, ()), (view.max_devices, 0)):
        if ceiling is not None and ceiling.value == none:
            where = positions.describe(ceiling.origin, visible.origin)
            message = f"no device is left: {where} allows none; remove one of them"
            yield LintRemark(visible.origin, "no-devices-left", message)


def _check_allowed_devices(view: _TableView, cards: _MachineCards, positions: KeyPositions) -> Iterator[LintRemark]:
    """Find choices that the allowed devices leave out, whole or in part. Cards that are not here are told elsewhere."""
    visible, allowed = view.effective.gpu.get("visible_devices"), view.allowed_devices
    if visible is None or allowed is None or not _list_selectors(allowed):
        return
    chosen = [selector for selector in _list_selectors(visible) if not _is_missing(selector, cards)]
    inside = [one for one in chosen if any(cards.may_overlap(one, other) for other in _list_selectors(allowed))]
    outside = [selector for selector in chosen if selector not in inside]
    if outside and "visible_devices" in view.own.gpu:
        where = positions.describe(allowed.origin, visible.origin)
        never = "they are never visible" if outside[1:] else "it is never visible"
        message = f"{where} does not allow {_join_selectors(outside)}, so {never}"
        yield LintRemark(visible.origin, "outside-ceiling", message)
    elif outside and not inside and "allowed_devices" in view.own.ceiling:
        where = positions.describe(visible.origin, allowed.origin)
        message = f"allows none of the visible_devices of {where}; add a visible_devices beside it"
        yield LintRemark(allowed.origin, "outside-ceiling", message)


def _check_device_count(view: _TableView, positions: KeyPositions) -> Iterator[LintRemark]:
    """Find a choice of more devices than a ceiling lets pass."""
    visible, most = view.own.gpu.get("visible_devices"), view.max_devices
    if visible is None:
        return
    chosen = isinstance(visible.value, AutoChoice)
    wanted = visible.value.count if isinstance(visible.value, AutoChoice) else len(_list_selectors(visible))
    if most is not None and 0 < cast("int", most.value) < wanted:
        where = positions.describe(most.origin, visible.origin)
        yield LintRemark(visible.origin, "above-ceiling", f"asks for {wanted} devices, but {where} allows {most.value}")
    allowed = _list_selectors(view.allowed_devices)
    single = all(selector.kind != "name" for selector in allowed)
    if view.allowed_devices is not None and single and chosen and 0 < len(allowed) < wanted:
        where = positions.describe(view.allowed_devices.origin, visible.origin)
        yield LintRemark(
            visible.origin, "above-ceiling", f"asks for {wanted} devices, but {where} allows {len(allowed)}"
        )


def _check_rules(view: _TableView) -> Iterator[LintRemark]:
    """Find entries that never count: the first one that matches a device does."""
    earlier: list[Selector] = []
    for rule in list_device_rules(view.own.gpu):
        if any(other == rule.match or (other.kind, other.text) == ("name", "*") for other in earlier):
            message = f"is ignored: an earlier entry matches {rule.match}, and the first match counts"
            yield LintRemark(rule.origin, "never-counts", message)
        earlier.append(rule.match)


def _check_cards_present(view: _TableView, cards: _MachineCards) -> Iterator[LintRemark]:
    """Find selectors of cards that this machine lacks. A project's file may name those of several machines."""
    lists = [view.own.gpu.get("visible_devices"), view.own.ceiling.get("allowed_devices")]
    named = [(setting.origin, _list_selectors(setting)) for setting in lists if setting is not None]
    if cards.layer == "machine":
        named += [(rule.origin, (rule.match,)) for rule in list_device_rules(view.own.gpu)]
    for origin, selectors in named:
        missing = [selector for selector in selectors if _is_missing(selector, cards)]
        if missing and (cards.layer == "machine" or len(missing) == len(selectors)):
            message = f"this machine has no GPU {' or '.join(map(str, missing))}; write one that `nvidia-smi -L` lists"
            yield LintRemark(origin, "no-such-device", message)


def _is_missing(selector: Selector, cards: _MachineCards) -> bool:
    if selector.kind == "position":
        return bool(cards.devices) and selector.position >= len(cards.devices)
    return cards.find_named(selector) == frozenset()


# ---- how much memory


def _list_limits(tables: Tables) -> Iterator[tuple[Setting, Selector | None]]:
    """List every limit that is a setting, with the selector of the devices it is for. None: for all."""
    if (limit := tables.gpu.get("memory_limit")) is not None:
        yield limit, None
    for rule in list_device_rules(tables.gpu):
        if rule.memory_limit is not None:
            yield Setting(rule.memory_limit, rule.origin), rule.match


def _check_growth(view: _TableView, positions: KeyPositions) -> Iterator[LintRemark]:
    growth, required = view.own.gpu.get("memory_growth"), view.effective.ceiling.get("require_memory_growth")
    if growth is not None and growth.value is False and required is not None and required.value is True:
        message = f"growth stays on because {positions.describe(required.origin, growth.origin)} requires it"
        yield LintRemark(growth.origin, "above-ceiling", message)


def _check_limits_by_ceiling(view: _TableView, cards: _MachineCards, positions: KeyPositions) -> Iterator[LintRemark]:
    """Find limits above the ceiling of the same table or a less specific one: hardly the exception they look like."""
    if view.limit_ceiling is None:
        return
    bound = cast("MemoryLimit", view.limit_ceiling.value)
    for setting, _ in _list_limits(view.own):
        if _is_above(cast("MemoryLimit", setting.value), bound, cards.totals):
            where = positions.describe(view.limit_ceiling.origin, setting.origin)
            asked = format_requested_limit(cast("MemoryLimit", setting.value))
            over = f"{asked} is above the ceiling of {format_limit(bound)} in {where}, which holds"
            message = f"{over}; lower it, or raise the ceiling beside it"
            yield LintRemark(setting.origin, "above-ceiling", message)


def _is_above(limit: MemoryLimit, bound: MemoryLimit, totals: Sequence[int]) -> bool:
    """Return whether a limit is larger on every card. A size and a share compare only if the cards are known."""
    if bound.unlimited or limit.unlimited:
        return limit.unlimited and not bound.unlimited
    if bound.granted or limit.granted:
        return False  # only a job tells
    if limit.bytes is not None and bound.bytes is not None:
        return limit.bytes > bound.bytes
    if limit.fraction is not None and bound.fraction is not None:
        return limit.fraction > bound.fraction + _ROUNDING
    return bool(totals) and all((limit.on(total) or 0) > (bound.on(total) or 0) for total in totals)


def _check_splits(view: _TableView, cards: _MachineCards, positions: KeyPositions) -> Iterator[LintRemark]:
    """Find logical devices that are larger together than the limit, the ceiling or the card: they are scaled down."""
    for rule in list_device_rules(view.own.gpu):
        total = cards.find_largest_total(rule.match)
        limit = None if rule.memory_limit is not None else view.effective.gpu.get("memory_limit")
        for bound in (view.limit_ceiling, limit):
            if bound is not None and is_sum_above(rule.logical_devices, cast("MemoryLimit", bound.value), total):
                message = (
                    f"the logical devices take more together than the {format_limit(cast('MemoryLimit', bound.value))} "
                    f"of {positions.describe(bound.origin, rule.origin)}: they will be scaled down; make them smaller"
                )
                yield LintRemark(rule.origin, "above-ceiling", message)
        if total is not None and is_sum_above(rule.logical_devices, MemoryLimit(bytes=total), total):
            message = f"the logical devices take more together than the card's {format_bytes(total)}; make them smaller"
            yield LintRemark(rule.origin, "above-card", message)


def _check_limits_by_cards(view: _TableView, cards: _MachineCards) -> Iterator[LintRemark]:
    """Find limits that no card of this machine reaches."""
    limits = list(_list_limits(view.own))
    if (ceiling := view.own.ceiling.get("memory_limit")) is not None:
        limits.append((ceiling, None))
    for setting, match in limits:
        size = cast("MemoryLimit", setting.value).bytes
        largest = cards.find_largest_total(match) if match is not None else max(cards.totals, default=None)
        if size is not None and largest is not None and size > largest:
            which = "the largest card here" if match is None else f"the largest card that {match} names here"
            message = f"has no effect: {which} has {format_bytes(largest)}; write less, or a percentage"
            yield LintRemark(setting.origin, "above-card", message)
