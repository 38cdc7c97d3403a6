"""Runs logs through another policy, in as many processes as there are cores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from tfenv.audit.gpu_totals import list_filtered
from tfenv.audit.log_parts import LogPart, map_parts, split_logs
from tfenv.audit.query import LineTally, RecordQuery, list_logged_devices, read_lines
from tfenv.audit.record_groups import Example, GroupedRecords, RecordGroup
from tfenv.audit.rotation import LogOrigin
from tfenv.identity import find_subject
from tfenv.pipeline import allows_project_files
from tfenv.policy.merge import select_tables
from tfenv.policy.model import EffectivePolicy, Layer, Origin, Subject
from tfenv.replay.draft import DraftPolicy, is_for
from tfenv.replay.knowledge import Knowledge
from tfenv.replay.verdict import Change, Gap, Kind, PolicyLookup, Verdict, judge, read_subject
from tfenv.values import replace

#: Where devices are created.
_CREATES = frozenset({"policy_applied", "policy_clamped", "policy_failed"})
#: Fields of a record that every answer depends on.
_FIELDS = (
    "event", "user", "uid", "groups", "framework", "devices", "growth", "grant", "launcher", "asked", "findings",
    "sources", "truncated", "dropped",
)  # fmt: skip
#: Of them those that say whose it is.
_SUBJECT = ("user", "uid", "groups", "project")
#: Different records that are remembered at a time.
_MOST_GROUPS = 20_000


@dataclass
class ReplayRow:
    """What programs of one user would have had of one GPU.

    Attributes:
        user: Name.
        gpu: The GPU's UUID or token. "": it is about no single GPU.
        kind: Less than they had, more, or none of their GPUs.
        key: The key that decides.
        programs: Which programs, as hashes.
        change: What it would have been for the newest of them.
        example: The newest of them.
        held_by: All keys that decide.
    """

    user: str
    gpu: str
    kind: Kind
    key: str
    programs: set[int]
    change: Change
    example: Example
    held_by: set[Origin]

    @property
    def name(self) -> tuple[str, str, str, str]:
        """What tells it from other rows."""
        return self.user, self.kind, self.gpu, self.key

    def add(self, other: ReplayRow) -> None:
        """Count the programs of a row of the same name."""
        self.programs |= other.programs
        self.held_by |= other.held_by
        if other.example.timestamp > self.example.timestamp:
            self.change, self.example = other.change, other.example


@dataclass
class ReplayResult:
    """What comes of all records.

    Attributes:
        rows: What would have been another, by user, outcome, GPU and key.
        programs: All programs that were run through the policy, as hashes.
        users: Whose they are.
        unknown: Programs of which the log does not hold enough.
        gaps: Programs by what the log does not hold of them.
    """

    rows: dict[tuple[str, str, str, str], ReplayRow] = field(default_factory=dict)
    programs: set[int] = field(default_factory=set)
    users: set[str] = field(default_factory=set)
    unknown: set[int] = field(default_factory=set)
    gaps: dict[Gap, set[int]] = field(default_factory=dict)

    def add(self, other: ReplayResult) -> None:
        """Count what another part of the logs holds."""
        for row in other.rows.values():
            self.add_row(row)
        self.programs |= other.programs
        self.users |= other.users
        self.unknown |= other.unknown
        for gap, programs in other.gaps.items():
            self.gaps.setdefault(gap, set()).update(programs)

    def add_row(self, row: ReplayRow) -> None:
        """Count the programs of a row."""
        if row.name in self.rows:
            self.rows[row.name].add(row)
        else:
            self.rows[row.name] = row

    def list_rows(self) -> list[ReplayRow]:
        """Return the rows: first who would have had nothing or less, by user and GPU."""
        order = {"nothing": 0, "less": 1, "more": 2}
        return sorted(self.rows.values(), key=lambda row: (order[row.kind], row.user, row.gpu, row.key))

    def count(self, kind: Kind) -> int:
        """Return how many programs have a row of this kind."""
        return len({program for row in self.rows.values() if row.kind == kind for program in row.programs})

    def count_unknown(self) -> int:
        """Return of how many programs nothing can be told."""
        return len(self.unknown.difference(*(row.programs for row in self.rows.values())))


def replay_logs(
    logs: Sequence[Path], query: RecordQuery, tally: LineTally, policy: DraftPolicy, *, observed: bool = False
) -> ReplayResult:
    """Run the wanted records of all logs through a policy.

    Args:
        logs: The logs.
        query: Which records are wanted.
        tally: Counts what is no record, and gets the logs that are left out.
        policy: What the records are run through.
        observed: As if the policy's tables under `[observe]` were in force.

    Raises:
        OSError: A log cannot be read.
    """
    query = replace(query, events=query.events & _CREATES if query.events else _CREATES)
    replayer = _Replayer(query, policy, observed=observed)
    work = partial(_read_part, query, tally.origin, policy, observed)
    for found, part_tally in map_parts(work, split_logs(logs, query.since)) if query.events else ():
        replayer.add(found)
        tally.add(part_tally)
    return replayer.finish()


@dataclass
class _Part:
    """What comes of a part of a log: records that are not judged yet, and the answers to those that were too many."""

    records: GroupedRecords
    knowledge: Knowledge
    result: ReplayResult


def _read_part(
    query: RecordQuery, origin: LogOrigin, policy: DraftPolicy, observed: bool, part: LogPart
) -> tuple[_Part, LineTally]:
    tally = LineTally(origin=origin)
    replayer = _Replayer(query, policy, observed=observed)
    replayer.add_lines(read_lines(part.path, query, tally, part.begin, part.stop), tally)
    return replayer.part, tally


class _Replayer:
    """Judges groups of equal records, once everything is read that may be known of their GPUs.

    Attributes:
        part: What it has so far.
    """

    def __init__(self, query: RecordQuery, policy: DraftPolicy, *, observed: bool) -> None:
        self._query = query
        self._lookup = make_lookup(policy, observed=observed)
        fields = (*_FIELDS, *(["project"] if self._lookup.has_projects else ()), *list_filtered(query, by_job=False))
        self.part = _Part(GroupedRecords(fields, query), Knowledge(), ReplayResult())
        self._verdicts: dict[tuple[object, ...], Verdict] = {}

    def add_lines(self, lines: Iterable[bytes], tally: LineTally) -> None:
        """Add the records in the lines."""
        for group in self.part.records.add_lines(lines, tally):
            self.part.knowledge.learn(group.record)
            self._judge_many()

    def add(self, part: _Part) -> None:
        """Add what another process read."""
        self.part.records.merge(part.records.groups)
        self.part.knowledge.add(part.knowledge)
        self.part.result.add(part.result)
        self._judge_many()

    def _judge_many(self) -> None:
        if len(self.part.records.groups) >= _MOST_GROUPS:
            self.finish()

    def finish(self) -> ReplayResult:
        """Return what comes of all records so far."""
        self._verdicts.clear()  # by now more may be known of GPUs
        for key, group in self.part.records.list_wanted(_SUBJECT):
            if list_logged_devices(group.record):
                self._judge(key, group)
        self.part.records.groups.clear()
        return self.part.result

    def _judge(self, key: tuple[object, ...], group: RecordGroup) -> None:
        verdict, result = self._find_verdict(key, group), self.part.result
        user, programs = str(group.record.get("user")), group.processes
        result.programs |= programs
        result.users.add(user)
        for gap in verdict.gaps:
            result.gaps.setdefault(gap, set()).update(programs)
        if not verdict.is_known:
            result.unknown |= programs
        for change in verdict.changes:
            if not self._query.gpus or not change.gpu or self._is_wanted(group, change.gpu):
                held_by, example = set(change.held_by), group.example
                result.add_row(
                    ReplayRow(user, change.gpu, change.kind, change.key, set(programs), change, example, held_by)
                )

    def _find_verdict(self, key: tuple[object, ...], group: RecordGroup) -> Verdict:
        """Return the verdict, which is the same for all whose policy is the same."""
        subject, gaps = read_subject(group.record, self._lookup)
        if subject is None:
            return Verdict((), gaps)
        policy = self._lookup.merge_for(subject)
        name = (id(policy), *key)
        if name not in self._verdicts:
            self._verdicts[name] = judge(group.record, policy, self._lookup, self.part.knowledge)
        verdict = self._verdicts[name]
        return replace(verdict, gaps=(*gaps, *verdict.gaps)) if gaps else verdict

    def _is_wanted(self, group: RecordGroup, gpu: str) -> bool:
        wanted = [device for device in list_logged_devices(group.record) if self._query.matches_gpu(device)]
        return any(gpu in (device.get("uuid"), device.get("token")) for device in wanted)


def make_lookup(policy: DraftPolicy, *, observed: bool = False) -> PolicyLookup:
    """Return how to ask a policy about records. What holds for one subject is worked out once for all who are alike."""
    merged: dict[tuple[object, ...], EffectivePolicy] = {}
    layers = [each for layer in policy.layers for each in (layer, layer.observed) if each is not None]
    scoped = [document.source for document in policy.documents if document.source.scope is not None]

    def merge_for(subject: Subject) -> EffectivePolicy:
        key = (*_list_tables(layers, subject), *(is_for(source, subject) for source in scoped))
        if key not in merged:
            merged[key] = policy.merge_for(subject, observed=observed)
        return merged[key]

    return PolicyLookup(
        merge_for,
        cache(find_subject),
        has_groups=any(layer.groups for layer in layers)
        or any(source.scope and source.scope[0] == "group" for source in scoped),
        has_projects=any(layer.projects for layer in layers),
        allows_project_files=allows_project_files(policy.layers),
    )


def _list_tables(layers: Iterable[Layer], subject: Subject) -> Iterable[int]:
    """Return what tells the tables apart that are for a subject."""
    return (id(tables) for layer in layers for tables in select_tables(layer, subject))
