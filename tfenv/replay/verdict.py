"""What another policy would have given to a process, by what a record says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from tfenv.audit.gpu_totals import read_use
from tfenv.audit.query import LoggedRecord, get_gpu_id, list_logged_devices
from tfenv.frameworks.registry import get_framework, list_frameworks
from tfenv.policy.budget import apply_framework_share
from tfenv.policy.device_set import keep_valid_tokens
from tfenv.policy.limits import get_device_rules
from tfenv.policy.model import (
    Device,
    DeviceOutcome,
    EffectivePolicy,
    Grant,
    Inventory,
    MemoryLimit,
    Outcome,
    Plan,
    RankChoice,
    Selector,
    Subject,
    WouldClamp,
)
from tfenv.policy.observe import ROUNDING, find_losses, find_planned, name_key
from tfenv.policy.resolve import resolve
from tfenv.policy.supports import drop_unsupported
from tfenv.policy.units import format_bytes, format_limit
from tfenv.replay.knowledge import Knowledge, read_size
from tfenv.values import field, frozen, replace

Kind = Literal["less", "more", "nothing"]
#: What a log can lack, and what is said of it.
Gap = Literal[
    "groups-as-now", "no-user", "cut-short", "no-size", "no-number", "no-card", "no-rank", "no-share", "no-grant",
    "other-gpus", "own-settings",
]  # fmt: skip
#: The answer is known all the same.
HARMLESS_GAPS: frozenset[Gap] = frozenset({"groups-as-now"})

#: The number that a card has here of which it is not known. No policy names it.
_NO_NUMBER = 1 << 20
#: It hands out GPUs when a worker starts, and is no scheduler.
_NO_SCHEDULERS = ("", "Dask")


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
        held_by: The places of the keys that decide.
    """

    kind: Kind
    gpu: str
    key: str
    had: str
    would_have: str
    had_bytes: int | None = None
    would_have_bytes: int | None = None
    held_by: tuple[Any, ...] = ()


@frozen
class Verdict:
    """What comes of one record.

    Attributes:
        changes: What would have been another. (): nothing would.
        gaps: What the log does not hold.
    """

    changes: tuple[Change, ...] = ()
    gaps: tuple[Gap, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether it could be told at all."""
        return bool(self.changes) or HARMLESS_GAPS.issuperset(self.gaps)


@frozen
class PolicyLookup:
    """The other policy, as records are asked about it.

    Attributes:
        merge_for: Returns what holds for a subject.
        find_subject: Looks up a user as he is on this machine now, for records without groups.
        has_groups: Whether it has tables of groups.
        has_projects: Whether it has tables of projects.
        allows_project_files: Whether a project's own file counts.
    """

    merge_for: Callable[[Subject], EffectivePolicy]
    find_subject: Callable[[str], Subject | None]
    has_groups: bool = True
    has_projects: bool = True
    allows_project_files: bool = True


def read_subject(record: LoggedRecord, lookup: PolicyLookup) -> tuple[Subject | None, tuple[Gap, ...]]:
    """Return whose process a record is of, and what the log does not hold of that. None: it cannot be told."""
    user, uid, groups, project = (record.get(name) for name in ("user", "uid", "groups", "project"))
    if not isinstance(user, str) or type(uid) is not int:
        return None, ("no-user",)
    is_clipped = record.get("truncated") is True and isinstance(project, str) and "..." in project
    if (is_clipped and lookup.has_projects) or ("groups" in _read_dropped(record) and lookup.has_groups):
        return None, ("cut-short",)
    home = project if isinstance(project, str) else None
    if isinstance(groups, list) or not lookup.has_groups:
        names = groups if isinstance(groups, list) else ()
        return Subject(user, uid, tuple(name for name in names if isinstance(name, str)), home), ()
    known = lookup.find_subject(user)
    return (None, ("no-user",)) if known is None else (Subject(user, uid, known.groups, home), ("groups-as-now",))


def judge(record: LoggedRecord, policy: EffectivePolicy, lookup: PolicyLookup, knowledge: Knowledge) -> Verdict:
    """Return what another policy would have given to the process of a record. It depends on no field of the subject.

    Args:
        record: Of devices that were created. Its values may be anything.
        policy: The other policy, merged for the record's subject.
        lookup: The other policy.
        knowledge: What other records tell of the GPUs.
    """
    return _Judge(record, lookup, knowledge).judge(policy)


@frozen
class _Comparison:
    """What a process would have lost, the plan that says so, and what the log lacks to tell it."""

    plan: Plan = field(default_factory=Plan)
    losses: tuple[WouldClamp, ...] = ()
    gaps: tuple[Gap, ...] = ()


class _Judge:
    def __init__(self, record: LoggedRecord, lookup: PolicyLookup, knowledge: Knowledge) -> None:
        self._record = record
        self._lookup = lookup
        self._knowledge = knowledge
        self._dropped = _read_dropped(record)
        self._own_files = self._read_own_files()
        self._entries = list_logged_devices(record)
        self._devices = [_read_device(entry, place, knowledge) for place, entry in enumerate(self._entries)]

    def judge(self, policy: EffectivePolicy) -> Verdict:
        gaps: list[Gap] = []
        bare = replace(policy, settings={}, overridden={}) if policy.settings else policy
        # The settings of a file of one's own are nearer than the machine's. What they are is not in the log.
        has_own = self._own_files != ()
        certain = self._compare(bare if has_own else policy)
        if not certain.losses:
            gaps += certain.gaps
            if has_own and policy.settings:
                possible = self._compare(policy)
                if possible.losses or possible.gaps:
                    gaps.append("own-settings")
            if "devices" in self._dropped:
                gaps.append("cut-short")
        changes = [*_tell_losses(certain.losses, self._devices)]
        if self._record["event"] == "policy_clamped" and not certain.losses and not gaps:
            changes += self._find_gains(certain.plan, bare, gaps)
        return Verdict(tuple(changes), tuple(dict.fromkeys(gaps)))

    def _read_own_files(self) -> tuple[str, ...]:
        """Return the files beside the machine's that the process read. Where the log does not hold them: ("",)."""
        sources = self._record.get("sources")
        if not isinstance(sources, list) or "sources" in self._dropped:
            return ("",)
        others = [source for source in sources if isinstance(source, dict) and source.get("layer") != "machine"]
        if not self._lookup.allows_project_files:
            others = [source for source in others if source.get("layer") != "project"]
        return tuple(str(source.get("path")) for source in others)

    # -- what it would have lost

    def _compare(self, policy: EffectivePolicy) -> _Comparison:
        if policy.silent:
            return _Comparison()
        gaps = tuple(self._list_gaps(policy))
        if gaps:
            return _Comparison(gaps=gaps)
        plan = self._plan(policy)
        if plan is None:
            return _Comparison(gaps=("no-card",))
        growth = self._record.get("growth")
        outcome = Outcome("applied", devices=tuple(self._devices), growth=growth if isinstance(growth, bool) else None)
        losses = find_losses(outcome, plan, policy)
        return _Comparison(plan, losses, tuple(self._list_later_gaps(plan)))

    def _list_gaps(self, policy: EffectivePolicy) -> Iterator[Gap]:
        """Yield what the log would have to hold for this policy, and does not."""
        selectors = list(_list_selectors(policy))
        kinds = {selector.kind for selector in selectors}
        uuids = [device.uuid or "" for device in self._devices]
        if "position" in kinds and any(uuid not in self._knowledge.numbers for uuid in uuids):
            yield "no-number"
        if "name" in kinds and any(device.name is None for device in self._devices):
            yield "no-card"
        names_whole_gpus = any(s.kind == "uuid" and not s.text.upper().startswith("MIG-") for s in selectors)
        if "uuid" in kinds and (not all(uuids) or (names_whole_gpus and any(u.startswith("MIG-") for u in uuids))):
            yield "no-card"  # whose instance it is, is not in the log
        choice = policy.settings.get("visible_devices")
        if choice is not None and isinstance(choice.value, RankChoice):
            yield "no-rank"
        if any(limit.granted for limit in _list_limits(policy)):
            yield "no-share"
        needs_grant = any(ceiling.value is True for ceiling in policy.list_ceilings("require_grant"))
        if needs_grant and self._is_in_job and not self._record.get("grant"):
            yield "no-grant"

    @property
    def _is_in_job(self) -> bool:
        return str(self._record.get("launcher") or "") not in _NO_SCHEDULERS

    def _plan(self, policy: EffectivePolicy) -> Plan | None:
        """Return what the process would have been allowed of what it had. None: its GPUs cannot be told apart."""
        uuids = tuple(device.uuid for device in self._devices if device.uuid)
        tokens = tuple(device.token for device in self._devices if device.token)
        inventory = Inventory()
        if len(uuids) == len(self._devices):
            tokens = uuids
            numbers = [self._knowledge.numbers.get(uuid) for uuid in uuids]
            inventory = Inventory(
                tuple(
                    Device(_NO_NUMBER + place if number is None else number, uuid, device.name or "", device.total)
                    for place, (uuid, number, device) in enumerate(zip(uuids, numbers, self._devices, strict=True))
                )
            )
        if len(tokens) != len(self._devices):
            governs = policy.list_ceilings("allowed_devices", "max_devices") or "visible_devices" in policy.settings
            plan = None if governs else resolve(policy, Grant(), Inventory())
        elif keep_valid_tokens(tokens) != tokens or _share_a_beginning(tokens):
            plan = None
        else:
            launcher = str(self._record.get("launcher") or "")
            plan = resolve(policy, Grant(tokens, scheduler=self._is_in_job, launcher=launcher), inventory)
        return None if plan is None else self._fit_framework(plan, policy)

    def _fit_framework(self, plan: Plan, policy: EffectivePolicy) -> Plan:
        name = self._record.get("framework")
        if name not in list_frameworks():
            return plan
        framework = get_framework(str(name))
        plan = drop_unsupported(plan, policy, framework.supports, framework.title)
        return apply_framework_share(plan, policy, framework.name)

    def _list_later_gaps(self, plan: Plan) -> Iterator[Gap]:
        if any(f.code == "no-overlap" and (f.key or "").endswith("visible_devices") for f in plan.findings):
            yield "other-gpus"
        for device in self._devices:
            planned = find_planned(device, plan)
            if planned is not None and not _is_comparable(device, planned.limit):
                yield "no-size"

    # -- what it would have got

    def _find_gains(self, plan: Plan, bare: EffectivePolicy, gaps: list[Gap]) -> Iterator[Change]:
        """Yield where the process asked for more memory than it was given, and would have had more."""
        # A file that asked for more has its own setting in the place of the machine's.
        bare_plan = self._compare(bare).plan
        for place, (entry, device) in enumerate(zip(self._entries, self._devices, strict=True)):
            by_file, asked = self._read_wish(entry, place)
            planned = find_planned(device, bare_plan if by_file else plan)
            has = device.memory_limit
            if planned is None or has.unlimited or asked is None:
                continue
            limit = planned.limit or MemoryLimit()
            would_have = _take_smaller(asked, limit, device.total)
            if would_have is None or has.on(device.total) is None:
                if asked != has:
                    gaps.append("no-size")
            elif would_have > (has.on(device.total) or 0) + ROUNDING:
                if self._own_files and {"findings", "sources"} & self._dropped:
                    gaps.append("cut-short")
                elif not self._is_held_by_own_files():
                    key = name_key(planned.limited_by, "memory_limit")
                    sizes = has.on(device.total), would_have
                    texts = format_limit(has), format_bytes(would_have)
                    yield Change("more", get_gpu_id(entry), key, *texts, *sizes, planned.limited_by)
        if {"asked", "findings"} & self._dropped:
            gaps.append("cut-short")

    def _read_wish(self, entry: Mapping[str, Any], place: int) -> tuple[bool, MemoryLimit | None]:
        """Return whether a file asked for memory of a GPU, or else the program, and how much. None: neither did."""
        size, fraction = read_size(entry.get("asked_bytes")), _read_fraction(entry.get("asked_fraction"))
        if size is not None or fraction is not None:
            return True, MemoryLimit(bytes=size) if size is not None else MemoryLimit(fraction=fraction)
        try:
            use = read_use(self._record, place, entry)
        except (OverflowError, ValueError):  # a split of sizes that no float holds
            return False, None
        asked = self._record.get("asked")
        jax = asked.get("memory_fraction") if isinstance(asked, dict) else None
        size, fraction = read_size(use.asked_bytes), _read_fraction(use.asked_fraction) or _read_fraction(jax)
        if size is None and fraction is None:
            return False, None
        return False, MemoryLimit(bytes=size) if size is not None else MemoryLimit(fraction=fraction)

    def _is_held_by_own_files(self) -> bool:
        """Tell whether a file beside the machine's held what was asked for. It would hold all the same."""
        findings = self._record.get("findings")
        held = [f.get("held_by") for f in findings if isinstance(f, dict)] if isinstance(findings, list) else []
        return any(f"{path} (" in str(text) for text in held for path in self._own_files if path)


# ---- what the record says


def _read_dropped(record: LoggedRecord) -> frozenset[str]:
    dropped = record.get("dropped")
    return frozenset(dropped) if record.get("truncated") is True and isinstance(dropped, dict) else frozenset()


def _read_device(entry: Mapping[str, Any], place: int, knowledge: Knowledge) -> DeviceOutcome:
    uuid, token, name = (_read_text(entry.get(key)) for key in ("uuid", "token", "name"))
    total = read_size(entry.get("total_bytes"))
    return DeviceOutcome(
        index=place,
        token=token or "",
        uuid=uuid,
        name=name,
        limit=read_size(entry.get("limit_bytes")),
        fraction=_read_fraction(entry.get("limit_fraction")),
        total=knowledge.totals.get(uuid or "") if total is None else total,
    )


def _read_text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _read_fraction(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1 else None


# ---- what the policy asks of a record


def _list_selectors(policy: EffectivePolicy) -> Iterator[Selector]:
    values: list[object] = [ceiling.value for ceiling in policy.list_ceilings("allowed_devices")]
    if "visible_devices" in policy.settings:
        values.append(policy.settings["visible_devices"].value)
    for value in values:
        if isinstance(value, tuple):
            yield from value
    yield from (rule.match for rule in get_device_rules(policy))


def _list_limits(policy: EffectivePolicy) -> Iterator[MemoryLimit]:
    values: list[object] = [ceiling.value for ceiling in policy.ceilings]
    if "memory_limit" in policy.settings:
        values.append(policy.settings["memory_limit"].value)
    values += [rule.memory_limit for rule in get_device_rules(policy)]
    yield from (value for value in values if isinstance(value, MemoryLimit))


def _share_a_beginning(tokens: Iterable[str]) -> bool:
    """Tell whether one of the names of cards begins with another: the driver would not know which is meant."""
    ordered = sorted(token.lower() for token in tokens if not token.isdigit())
    return any(later.startswith(one) for one, later in pairwise(ordered))


# ---- sizes


def _is_comparable(device: DeviceOutcome, limit: MemoryLimit | None) -> bool:
    """Tell whether what a process has and a limit can be compared."""
    if device.total is not None or limit is None or limit.unlimited:
        return True
    if limit.fraction is None:
        return device.limit is not None
    return limit.bytes is None and device.limit is None


def _take_smaller(asked: MemoryLimit, limit: MemoryLimit, total: int | None) -> int | None:
    """Return what of a wish is within a limit, in bytes. None: unknown without the card's size."""
    wanted = asked.on(total)
    if wanted is None or limit.unlimited:
        return wanted
    if total is None and limit.fraction is not None:
        return None
    return min(wanted, limit.on(total) or 0)


def _tell_losses(losses: Sequence[WouldClamp], devices: Sequence[DeviceOutcome]) -> Iterator[Change]:
    gone = [lost for lost in losses if lost.given == "no GPU"]
    has_none = len([lost for lost in gone if lost.gpu]) == len(devices) or any(not lost.gpu for lost in gone)
    for lost in losses:
        kind: Kind = "nothing" if lost in gone and has_none else "less"
        yield Change(kind, lost.gpu, lost.key, lost.asked, lost.given, lost.asked_bytes, lost.given_bytes, lost.held_by)
