"""What another policy would have given to a process, by what a record says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from tfenv.audit.gpu_totals import read_use
from tfenv.audit.query import LoggedRecord, get_gpu_id, list_logged_devices
from tfenv.policy.model import (
    Device,
    DeviceOutcome,
    EffectivePolicy,
    Grant,
    Inventory,
    Layer,
    MemoryLimit,
    Origin,
    Outcome,
    Plan,
    Subject,
    WouldClamp,
)
from tfenv.policy.observe import find_losses
from tfenv.policy.resolve import resolve
from tfenv.policy.units import MIB, format_bytes, format_limit
from tfenv.values import frozen, replace

Kind = Literal["less", "more", "nothing"]
#: What a log can lack, and what is said of it.
Gap = Literal["groups-as-now", "no-groups", "no-size", "no-number", "own-settings", "cut-short"]

#: Fields of a record that every answer depends on.
_FIELDS = (
    "event", "user", "uid", "groups", "devices", "growth", "grant", "launcher", "asked", "truncated", "dropped",
)  # fmt: skip
#: A smaller difference comes of rounding.
_ROUNDING = 2 * MIB
#: More bytes than this are no card's.
_MOST_BYTES = 1 << 50
#: Digits of the number of a card.
_LONGEST_NUMBER = 4
_GROUPS_DROPPED = frozenset({"groups", "devices"})


@frozen
class Change:
    """What one process would have had of one GPU.

    Attributes:
        kind: Less than it had, more, or none of its GPUs at all.
        gpu: The GPU's UUID or token. "": it is about no single GPU.
        key: The key that decides.
        had: What it had, in words.
        would_have: What it would have had, in words.
        had_bytes: `had` in bytes. None: it is no size.
        would_have_bytes: `would_have` in bytes. None: it is no size.
        held_by: The keys that decide.
    """

    kind: Kind
    gpu: str
    key: str
    had: str
    would_have: str
    had_bytes: int | None = None
    would_have_bytes: int | None = None
    held_by: tuple[Origin, ...] = ()


@frozen
class Verdict:
    """What comes of one record.

    Attributes:
        changes: What would have been another. (): nothing would.
        gaps: What the log does not hold.
        is_known: Whether it could be told at all.
    """

    changes: tuple[Change, ...] = ()
    gaps: tuple[Gap, ...] = ()
    is_known: bool = True


def judge(
    record: LoggedRecord,
    merge_for: Callable[[Subject], EffectivePolicy],
    find_subject: Callable[[str], Subject | None],
    sizes: Mapping[str, int],
) -> Verdict:
    """Return what another policy would have given to the process of a record.

    Args:
        record: Of devices that were created.
        merge_for: The other policy, for a subject.
        find_subject: Looks up a user of today by name, for records without groups.
        sizes: Bytes of cards by UUID, as other records tell them.
    """
    gaps: list[Gap] = []
    dropped = record.get("dropped")
    if record.get("truncated") is True and isinstance(dropped, dict) and not _GROUPS_DROPPED.isdisjoint(dropped):
        return Verdict((), ("cut-short",), is_known=False)
    subject = _read_subject(record, find_subject, gaps)
    if subject is None:
        return Verdict((), (*gaps,), is_known=False)
    devices = [_read_device(entry, place, sizes) for place, entry in enumerate(list_logged_devices(record))]
    policy = _leave_out_settings(merge_for(subject), record, gaps)
    if any(device.total is None for device in devices) and _has_shares(policy):
        gaps.append("no-size")
    if _has_numbers(policy) and (record.get("launcher") or not all(_is_number(device.token) for device in devices)):
        # Which number nvidia-smi gives a card is not in the log, and neither is which card a number was.
        gaps.append("no-number")
        return Verdict((), tuple(gaps), is_known=False)
    plan = resolve(policy, _make_grant(record, devices), _make_inventory(devices))
    outcome = Outcome("applied", devices=tuple(devices), growth=_check_flag(record.get("growth")))
    losses = find_losses(outcome, plan, policy)
    return Verdict((*_tell_losses(losses, devices), *_find_gains(record, devices, plan)), tuple(gaps))


def choose_fields(layers: Iterable[Layer]) -> tuple[str, ...]:
    """Return the fields of a record that its answer depends on. Records that are equal in them have one answer.

    Args:
        layers: Of the policy. The project's path counts only if it has tables of projects, and whether the process
            had files of its own only if it has settings.
    """
    layers = [each for layer in layers for each in (layer, layer.observed) if each is not None]
    tables = [t for each in layers for t in (each.base, *dict(each.groups).values(), *each.users.values())]
    has_projects = any(each.projects for each in layers)
    has_settings = any(t.gpu for t in tables) or has_projects
    return (*_FIELDS, *(["project"] if has_projects else ()), *(["sources"] if has_settings else ()))


# ---- what the record says


def _read_subject(
    record: LoggedRecord, find_subject: Callable[[str], Subject | None], gaps: list[Gap]
) -> Subject | None:
    user, uid, project = record.get("user"), record.get("uid"), record.get("project")
    groups = record.get("groups")
    if not isinstance(user, str) or type(uid) is not int:
        gaps.append("no-groups")
        return None
    if isinstance(groups, list):
        names = tuple(name for name in groups if isinstance(name, str))
    else:
        known = find_subject(user)
        if known is None:
            gaps.append("no-groups")
            return None
        gaps.append("groups-as-now")
        names = known.groups
    return Subject(user, uid, names, project if isinstance(project, str) else None)


def _read_device(entry: Mapping[str, Any], place: int, sizes: Mapping[str, int]) -> DeviceOutcome:
    uuid, token, name = (_check_text(entry.get(key)) for key in ("uuid", "token", "name"))
    total = _check_size(entry.get("total_bytes"))
    return DeviceOutcome(
        index=place,
        token=token or "",
        uuid=uuid,
        name=name,
        limit=_check_size(entry.get("limit_bytes")),
        fraction=_check_fraction(entry.get("limit_fraction")),
        total=sizes.get(uuid or "") if total is None else total,
    )


def _check_text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _check_size(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= _MOST_BYTES else None


def _check_fraction(value: object) -> float | None:
    return min(float(value), 1.0) if isinstance(value, (int, float)) and 0 <= value <= _MOST_BYTES else None


def _check_flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _leave_out_settings(policy: EffectivePolicy, record: LoggedRecord, gaps: list[Gap]) -> EffectivePolicy:
    """Return the policy without its settings if the process had files of its own: theirs are nearer, and not logged."""
    sources = record.get("sources")
    layers = (
        {source.get("layer") for source in sources if isinstance(source, dict)} if isinstance(sources, list) else {}
    )
    if not policy.settings or set(layers) <= {"machine"}:
        return policy
    gaps.append("own-settings")
    return replace(policy, settings={}, overridden={})


def _has_shares(policy: EffectivePolicy) -> bool:
    values = [ceiling.value for ceiling in policy.ceilings] + [setting.value for setting in policy.settings.values()]
    return any(isinstance(value, MemoryLimit) and value.fraction is not None for value in values)


def _has_numbers(policy: EffectivePolicy) -> bool:
    values = [ceiling.value for ceiling in policy.list_ceilings("allowed_devices")]
    values += [policy.settings[key].value for key in ("visible_devices", "device") if key in policy.settings]
    entries = [entry for value in values if isinstance(value, tuple) for entry in value]
    return any(getattr(getattr(entry, "match", entry), "kind", "") == "position" for entry in entries)


def _make_inventory(devices: Sequence[DeviceOutcome]) -> Inventory:
    """Return the cards that the process had. Others of its machine are not in the log."""
    return Inventory(
        tuple(
            Device(
                int(device.token) if _is_number(device.token) else number,
                device.uuid or f"GPU-{number:08x}",
                device.name or "",
                device.total,
            )
            for number, device in enumerate(devices)
        )
    )


def _is_number(token: str) -> bool:
    return token.isascii() and token.isdigit() and len(token) <= _LONGEST_NUMBER


def _make_grant(record: LoggedRecord, devices: Sequence[DeviceOutcome]) -> Grant:
    launcher = _check_text(record.get("launcher")) or ""
    if not isinstance(record.get("grant"), list):
        return Grant(pci_order=True, scheduler=bool(launcher), launcher=launcher)
    tokens = tuple(device.token or device.uuid or "" for device in devices)
    return Grant(tokens, pci_order=True, scheduler=bool(launcher), launcher=launcher)


# ---- what would have been


def _tell_losses(losses: Sequence[WouldClamp], devices: Sequence[DeviceOutcome]) -> Iterator[Change]:
    gone = [lost for lost in losses if lost.given == "no GPU"]
    for lost in losses:
        kind: Kind = "nothing" if lost in gone and len(gone) == len(devices) else "less"
        yield Change(kind, lost.gpu, lost.key, lost.asked, lost.given, lost.asked_bytes, lost.given_bytes, lost.held_by)


def _find_gains(record: LoggedRecord, devices: Sequence[DeviceOutcome], plan: Plan) -> Iterator[Change]:
    """Yield where a process asked for more memory than it was given, and would have had more."""
    entries = list_logged_devices(record)
    for place, device in enumerate(devices):
        use = read_use(record, place, entries[place])
        asked = MemoryLimit(bytes=_check_size(use.asked_bytes), fraction=_check_fraction(use.asked_fraction))
        wanted = asked.on(device.total)
        planned = next((card for card in plan.devices or () if card.token == device.token), plan.find_device(place))
        bound = device.total if planned.limit is None or planned.limit.unlimited else planned.limit.on(device.total)
        if device.limit is None or wanted is None or wanted <= device.limit + _ROUNDING:
            continue
        would_have = wanted if bound is None and planned.limit is None else min(wanted, bound or 0)
        if would_have > device.limit + _ROUNDING:
            held_by = planned.limited_by
            key = held_by[0].key[-1] if held_by else "memory_limit"
            text = format_bytes(would_have) if would_have < (device.total or would_have + 1) else "all of it"
            had = format_limit(MemoryLimit(bytes=device.limit))
            name = key if isinstance(key, str) else "memory_limit"
            yield Change("more", get_gpu_id(entries[place]), name, had, text, device.limit, would_have, held_by)
