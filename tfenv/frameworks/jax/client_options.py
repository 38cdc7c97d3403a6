"""Clamp the options of one client of CUDA to the policy. Pure: from the options JAX wrote to those the plugin gets.

The options say which GPUs a client has (visible_devices, in CUDA ordinals), which allocator, whether it takes its
memory at once (preallocate), and how much: a fraction of each card, which is one for all of them. Another allocator
beside it serves collectives, from collective_memory_size or else from all that the fraction leaves. The rules that
this relies on are in XLA's xla/pjrt/gpu (GpuAllocatorConfig, CreateBFCAllocator, CreateCollectiveBFCAllocator).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from math import ceil
from operator import index
from typing import Any

from tfenv.errors import PROGRAM, Finding
from tfenv.policy.clamps import FindingCollector, report_program_clamp
from tfenv.policy.model import DeviceOutcome, Origin, Plan, PlannedDevice, format_origins
from tfenv.policy.units import MIB, format_bytes
from tfenv.values import field, frozen

#: What the plugin checks at run time.
Options = Mapping[str, Any]

#: XLA rounds an allocator's limit up to whole pieces of this size, in which CUDA maps memory.
GRANULE = 2 * MIB
#: What a client takes that is asked for nothing.
_DEFAULT_FRACTION = 0.75
#: They keep a fraction. "platform" and "cuda_async" do not.
_LIMITED_ALLOCATORS = ("default", "bfc", "vmm")
#: What the file's allocators are called here.
_ALLOCATORS = {"bfc": "default", "cuda_malloc": "platform", "cuda_malloc_async": "cuda_async"}

#: The type that the plugin demands of an option. It refuses another in its own words, and creates no client.
_TYPES: Mapping[str, tuple[type, ...]] = {
    "visible_devices": (list, tuple),
    "preallocate": (bool,),
    "memory_fraction": (float,),
    "memory_fraction_policy": (str,),
    "allocator": (str,),
    "collective_memory_size": (int,),
}
_PLAIN = (str, bool, int, float, list, tuple, dict, type(None))


@frozen
class ClientView:
    """The policy as the creation of a client meets it.

    Attributes:
        plan: What JAX may use.
        devices: The GPUs that the policy allows, by CUDA ordinal.
        shown: How many GPUs CUDA shows. None: unknown.
        promised: What other clients of this process may take of a GPU: bytes, or a fraction where its size is unknown.
        takes_range: The plugin knows memory_fraction_policy, where "0.4-0.4" is a cap whatever a bare fraction is.
        sources: The variable or setting that the program used for an option, by the option.
    """

    plan: Plan
    devices: Mapping[int, PlannedDevice]
    shown: int | None = None
    promised: Mapping[int, float] = field(default_factory=dict)
    takes_range: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)


@frozen
class ClampResult:
    """What a client is given, and what to write down of it.

    Attributes:
        options: None: the program's own go on untouched, and JAX refuses them.
        devices: What each GPU was given.
        asked: What the program asked for on GPUs, in the options' terms.
        given: The same terms as the plugin gets them.
        findings: Notes on what was clamped.
        promises: What the client may take of each limited GPU, as in `ClientView.promised`.
        is_spent: Other clients of the process may take all there is. This one must not be created.
    """

    options: dict[str, Any] | None
    devices: tuple[DeviceOutcome, ...] = ()
    asked: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    promises: Mapping[int, float] = field(default_factory=dict)
    is_spent: bool = False


# ---- which GPUs


def _is_refused(options: Options) -> bool:
    """Return whether the plugin refuses the type of an option."""
    given = ((options[name], kinds) for name, kinds in _TYPES.items() if name in options)
    return any(type(value) in _PLAIN and type(value) not in kinds for value, kinds in given)


def _select_gpus(options: Options, view: ClientView, findings: FindingCollector) -> list[int]:
    """Return the ordinals of the GPUs that a client is to have. []: JAX refuses what was asked for."""
    allowed = sorted(view.devices)
    wish = options.get("visible_devices")
    if not isinstance(wish, Sequence):
        return allowed
    try:
        wanted = sorted({index(entry) for entry in wish})
    except TypeError:
        return []
    kept = [ordinal for ordinal in wanted if ordinal in view.devices]
    is_hidden = view.plan.visible is not None or any(ordinal < (view.shown or 0) for ordinal in wanted)
    if kept or not wanted or wanted[0] < 0 or not is_hidden:
        return kept
    name = view.sources.get("visible_devices", "visible_devices")
    asked, given = ", ".join(map(str, wanted)), ", ".join(map(str, allowed))
    text = f"{PROGRAM} asked for {name} = {asked}, but it has only {given}, as JAX counts the GPUs of the policy"
    wish, held_by = (f"{name} = {asked}", given), "the policy's visible_devices"
    findings.add("no-overlap", text, None, "warning", asked_by=PROGRAM, held_by=held_by, wish=wish)
    return allowed


def _drop_spent(ordinals: Sequence[int], view: ClientView) -> list[int]:
    """Leave out GPUs of which other clients may take all that is allowed."""
    return [ordinal for ordinal in ordinals if not _is_spent(view.devices[ordinal], view.promised.get(ordinal, 0))]


def _is_spent(planned: PlannedDevice, promised: float) -> bool:
    room = _find_room(planned, promised)
    smallest = 2 * GRANULE / planned.total if planned.total else 1e-6
    return promised > 0 and room is not None and room < smallest


# ---- how much


def _find_room(planned: PlannedDevice, promised: float, reserved: int = 0) -> float | None:
    """Return the fraction of a card that a client may take, beside what others were promised. None: all of it.

    Args:
        planned: The card.
        promised: As in `ClientView.promised`.
        reserved: Bytes that another allocator of the same client takes.

    Raises:
        ValueError: The limit is a size, and the card's is unknown.
    """
    limit, total = planned.limit, planned.total
    if limit is None or limit.unlimited:
        return None
    size = limit.on(total)
    if total is None:
        if size is not None:
            raise ValueError(f"nobody tells the memory of GPU {planned.token}, so {size} bytes of it are no fraction")
        return max(0.0, (limit.fraction or 0.0) - promised)
    if size is None or (size >= total and not promised):
        return None
    return max(0, int(size - promised - reserved) // GRANULE) * GRANULE / total


def _round_down(fraction: float) -> float:
    """Return the fraction as a 32-bit float, which is what the plugin keeps, but never more."""
    packed = struct.pack("<f", fraction)
    (rounded,) = struct.unpack("<f", packed)
    if rounded > fraction:
        (bits,) = struct.unpack("<I", packed)
        (rounded,) = struct.unpack("<f", struct.pack("<I", bits - 1))
    return float(rounded)


def _read_fractions(options: Options) -> tuple[float, float]:
    """Return what a client starts with, and what it may grow to. Where that is not to be read, it is the whole card."""
    policy = options.get("memory_fraction_policy")
    if not isinstance(policy, str):
        fraction = float(options.get("memory_fraction", _DEFAULT_FRACTION))
        return fraction, fraction
    start, _, cap = policy.partition("-")
    try:
        first = float(start.rstrip("+ "))
        return first, float(cap) if cap else 1.0 if start.endswith("+") else first
    except ValueError:
        return 1.0, 1.0


def _take_smaller(wish: float, room: float) -> float:
    """Return a fraction within the room. Negative ones and NaN, which are beyond any card to XLA, become the room."""
    return _round_down(wish if 0 <= wish <= room else room)


def _reserve_collective(options: Options, view: ClientView, ordinals: Sequence[int]) -> int:
    """Return the bytes of the allocator for collectives: what the program asks for, or half of the limit, or a granule.

    Left alone it could take all that the fraction leaves of the card.
    """
    wish = int(options.get("collective_memory_size", 0))
    rooms = [_find_room(view.devices[ordinal], view.promised.get(ordinal, 0)) for ordinal in ordinals]
    halves = [
        int(room * (view.devices[ordinal].total or 0)) // 2
        for ordinal, room in zip(ordinals, rooms, strict=True)
        if room is not None
    ]
    return min([wish, *halves]) // GRANULE * GRANULE if wish > GRANULE and min(halves) > GRANULE else GRANULE


def _write_limit(given: dict[str, Any], view: ClientView, ordinals: Sequence[int]) -> Finding | None:
    """Write the fraction that keeps every GPU's limit, and the memory of collectives within it.

    Returns:
        What GPUs lose because there is one fraction for all of them. None: nothing.
    """
    devices, promised = view.devices, view.promised
    reserved = _reserve_collective(given, view, ordinals)
    rooms = {ordinal: _find_room(devices[ordinal], promised.get(ordinal, 0), reserved) for ordinal in ordinals}
    room = min((room for room in rooms.values() if room is not None), default=1.0)
    start, cap = (_take_smaller(wish, room) for wish in _read_fractions(given))
    given["memory_fraction"] = start
    if view.takes_range or "memory_fraction_policy" in given:
        given["memory_fraction_policy"] = f"{start:.17f}-{cap:.17f}"
    if any(room is not None for room in rooms.values()):
        given["collective_memory_size"] = reserved
    return _report_uneven(view, rooms, room, reserved)


def _report_uneven(
    view: ClientView, rooms: Mapping[int, float | None], smallest: float, reserved: int
) -> Finding | None:
    """Report GPUs that get less than their limit, with the sizes that each gets."""
    sizes = {ordinal: (view.devices[ordinal].total or 0, 1.0 if r is None else r) for ordinal, r in rooms.items()}
    if not any(smallest < _NOTABLE * room for _, room in sizes.values()):
        return None
    each = ", ".join(
        f"GPU {place} gets {format_bytes(_compute_size(smallest, total, reserved))}"
        for place, (total, _) in enumerate(sizes.values())
    )
    text = f"JAX has one memory fraction for all GPUs of a process, so the smallest applies: {each}"
    return FindingCollector().add("unsupported", text, next(iter(view.plan.limits), None), "warning")


#: The part of its limit that a GPU may get less without a word: what is reserved is another fraction of another card.
_NOTABLE = 0.99


def _compute_size(fraction: float, total: int, reserved: int) -> int:
    """Return the most bytes that a client takes of a card."""
    return min(total, ceil(fraction * total / GRANULE) * GRANULE + reserved)


def _write_allocator(given: dict[str, Any], plan: Plan, limited: bool) -> None:
    """Write an allocator that keeps the limit, or the file's. One of the program's that keeps it stays."""
    asked = given.get("allocator", "default")
    if limited or plan.allocator == "bfc":
        if asked not in _LIMITED_ALLOCATORS:
            given["allocator"] = "default"
    elif plan.allocator is not None:
        given["allocator"] = _ALLOCATORS[plan.allocator]


# ---- the record


def _describe_devices(
    given: Options, view: ClientView, ordinals: Sequence[int]
) -> tuple[tuple[DeviceOutcome, ...], dict[int, float]]:
    """Describe what each GPU was given by all clients of the process together, and what this one was promised."""
    _, cap = _read_fractions(given)
    outcomes, promises = [], {}
    for place, ordinal in enumerate(ordinals):
        planned = view.devices[ordinal]
        total = planned.total
        limited = planned.limit is not None and not planned.limit.unlimited
        size = None
        if limited and total is not None:
            size = _compute_size(cap, total, int(given.get("collective_memory_size", 0)))
        if limited:
            promises[ordinal] = cap if size is None else float(size)
        outcomes.append(
            planned.describe(
                place,
                total,
                limit=None if size is None else int(size + view.promised.get(ordinal, 0)),
                fraction=cap if limited else None,
            )
        )
    return tuple(outcomes), promises


def _describe_terms(options: Options) -> dict[str, Any]:
    """Describe what options say of GPUs. The default allocator is left out."""
    terms = {name: options[name] for name in _TYPES if name in options and options[name] != "default"}
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in terms.items()}


def _note_clamps(asked: Options, given: Options, view: ClientView, held: str) -> list[Finding]:
    """Return a note for each option in which the program asked for more than it was given."""
    plan = view.plan
    allocated_by = plan.allocated_by or plan.limits
    grown_by = () if plan.grown_by is None else (plan.grown_by,)
    notes = []
    if asked.get("preallocate") is True and given["preallocate"] is False:
        notes.append(_report_clamp("preallocate", True, "memory growth", grown_by, view))
    if asked.get("allocator", given.get("allocator")) != given.get("allocator"):
        notes.append(_report_clamp("allocator", asked["allocator"], str(given["allocator"]), allocated_by, view))
    size = given.get("collective_memory_size", 0)
    if not 0 <= asked.get("collective_memory_size", 0) <= size:
        wish = asked["collective_memory_size"]
        notes.append(_report_clamp("collective_memory_size", wish, format_bytes(size), plan.limits, view))
    for name in ("memory_fraction", "memory_fraction_policy"):
        # A range without a source is JAX's own default.
        is_wish = name == "memory_fraction" or name in view.sources
        if is_wish and name in asked and asked[name] != given[name] and _exceeds(name, asked, given):
            notes.append(_report_clamp(name, asked[name], f"{held} on each GPU", plan.limits, view))
    return notes


def _exceeds(name: str, asked: Options, given: Options) -> bool:
    """Return whether a fraction that was asked for is more than what was given."""
    return not 0 <= _read_fractions({name: asked[name]})[1] <= _read_fractions(given)[1] + _FLOAT_LOSS


#: What a fraction may lose by becoming a 32-bit float. That is no clamp.
_FLOAT_LOSS = 1e-7


def _report_clamp(option: str, wish: object, held: str, by: Sequence[Origin], view: ClientView) -> Finding:
    name = view.sources.get(option, option)
    under = f" under {format_origins(by)}" if by else ""
    return report_program_clamp(
        f"{PROGRAM} asked for {name} = {wish}; it was given {held}{under}", by, (f"{name} = {wish}", held)
    )


# ---- the clamp


def clamp(options: Options, view: ClientView) -> ClampResult:
    """Hold the options of one client to the policy.

    Args:
        options: What JAX and the program wrote. They are not changed.
        view: The policy at this client.

    Returns:
        The narrower of what was asked for and what is allowed. Options that JAX refuses go on untouched, so that the
        error is its own.

    Raises:
        ValueError: A limit is a size, and nobody tells the card's.
    """
    findings = FindingCollector()
    selected = [] if _is_refused(options) else _select_gpus(options, view, findings)
    if not selected:
        return ClampResult(None)
    ordinals = _drop_spent(selected, view)
    if not ordinals:
        return ClampResult(None, is_spent=True)
    plan, given = view.plan, dict(options)
    if "visible_devices" in options or (view.shown is not None and len(ordinals) < view.shown):
        given["visible_devices"] = ordinals
    if plan.growth:
        given["preallocate"] = False
    limits = (view.devices[ordinal].limit for ordinal in ordinals)
    limited = any(limit is not None and not limit.unlimited for limit in limits)
    _write_allocator(given, plan, limited)
    uneven = _write_limit(given, view, ordinals) if limited else None
    devices, promises = _describe_devices(given, view, ordinals)
    held = ", ".join(sorted({format_bytes(d.limit) for d in devices if d.limit is not None})) or "the policy's share"
    notes = (*findings.findings, *_note_clamps(options, given, view, held), *(() if uneven is None else (uneven,)))
    return ClampResult(given, devices, _describe_terms(options), _describe_terms(given), notes, promises)
