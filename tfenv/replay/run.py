"""Runs logs through another policy, in as many processes as there are cores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from tfenv.audit.line_decoder import choose_decoder
from tfenv.audit.log_parts import LogPart, map_parts, split_logs
from tfenv.audit.query import (
    LineTally,
    LoggedRecord,
    RecordQuery,
    decode_json,
    list_logged_devices,
    parse_line,
    read_lines,
)
from tfenv.audit.rotation import LogOrigin
from tfenv.identity import find_subject
from tfenv.policy.model import EffectivePolicy, Origin, Subject
from tfenv.replay.draft import DraftPolicy
from tfenv.replay.verdict import Change, Gap, Kind, Verdict, choose_fields, judge
from tfenv.values import replace

#: Where devices are created.
_CREATES = frozenset({"policy_applied", "policy_clamped", "policy_failed"})
#: Different records that are remembered at a time.
_MOST_KNOWN = 20_000
#: Beyond that no more sizes of cards are remembered.
_MOST_CARDS = 100_000

#: A program: host and pid, as the log spells them. A pid that is used again counts as the same.
_Program = tuple[object, object]


@dataclass
class ReplayRow:
    """What programs of one user would have had of one GPU.

    Attributes:
        user: Name.
        gpu: The GPU's UUID or token. "": it is about no single GPU.
        kind: Less than they had, more, or none of their GPUs.
        key: The key that decides.
        programs: Which programs.
        example: One of them: of the newest record.
        example_record: That record.
        held_by: All keys that decide.
    """

    user: str
    gpu: str
    kind: Kind
    key: str
    programs: set[_Program] = field(default_factory=set)
    example: Change | None = None
    example_record: LoggedRecord = field(default_factory=dict)
    held_by: set[Origin] = field(default_factory=set)

    @property
    def name(self) -> tuple[str, str, str, str]:
        """What tells it from other rows."""
        return self.user, self.kind, self.gpu, self.key

    def add(self, other: ReplayRow) -> None:
        """Count the programs of a row of the same name."""
        self.programs |= other.programs
        self.held_by |= other.held_by
        if self.example is None or other.example_record["timestamp"] > self.example_record["timestamp"]:
            self.example, self.example_record = other.example, other.example_record


@dataclass
class ReplayResult:
    """What comes of all records.

    Attributes:
        rows: What would have been another, by user, GPU and key.
        programs: All programs that were run through the policy.
        users: Whose they are.
        unknown: Programs of which the log does not hold enough.
        gaps: Programs by what the log does not hold of them.
    """

    rows: dict[tuple[str, str, str, str], ReplayRow] = field(default_factory=dict)
    programs: set[_Program] = field(default_factory=set)
    users: set[str] = field(default_factory=set)
    unknown: set[_Program] = field(default_factory=set)
    gaps: dict[Gap, set[_Program]] = field(default_factory=dict)

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
        known = self.rows.setdefault(row.name, ReplayRow(row.user, row.gpu, row.kind, row.key))
        known.add(row)

    def list_rows(self) -> list[ReplayRow]:
        """Return the rows: first who would have had nothing or less, by user and GPU."""
        order = {"nothing": 0, "less": 1, "more": 2}
        return sorted(self.rows.values(), key=lambda row: (order[row.kind], row.user, row.gpu, row.key))

    def count(self, kind: Kind) -> int:
        """Return how many programs have a row of this kind."""
        return len({program for row in self.rows.values() if row.kind == kind for program in row.programs})


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
    result = ReplayResult()
    work = partial(_replay_part, query, tally.origin, policy, observed)
    for found, part_tally in map_parts(work, split_logs(logs, query.since)) if query.events else ():
        result.add(found)
        tally.add(part_tally)
    return result


def _replay_part(
    query: RecordQuery,
    origin: LogOrigin,
    policy: DraftPolicy,
    observed: bool,
    part: LogPart,
) -> tuple[ReplayResult, LineTally]:
    tally = LineTally(origin=origin)
    replayer = _Replayer(query, policy, observed=observed)
    replayer.add_lines(read_lines(part.path, query, tally, part.begin, part.stop), tally)
    return replayer.finish(), tally


class _KnownRecord:
    """Records that have one answer.

    Attributes:
        fields: What they say alike.
        programs: Whose they are.
        newest: The line of the newest.
        timestamp: When that was.
    """

    __slots__ = ("fields", "newest", "programs", "timestamp")

    def __init__(self, fields: LoggedRecord) -> None:
        self.fields = fields
        self.programs: set[_Program] = set()
        self.newest = b""
        self.timestamp = ""

    def count(self, timestamp: str, program: _Program, line: bytes) -> None:
        """Count one of them."""
        self.programs.add(program)
        if timestamp > self.timestamp:
            self.timestamp, self.newest = timestamp, line


class _Replayer:
    """Runs records through a policy. What says the same is worked out once."""

    def __init__(self, query: RecordQuery, policy: DraftPolicy, *, observed: bool) -> None:
        self._query = query
        self._timeless = replace(query, since="", until="")
        self._known: dict[object, _KnownRecord] = {}
        self._sizes: dict[str, int] = {}
        self._result = ReplayResult()
        # The host comes last: it tells programs apart, and no answer depends on it.
        self._fields = (*dict.fromkeys((*choose_fields(policy.layers), *_list_filtered(query))), "host")
        self._events = frozenset(json.dumps(event).encode() for event in query.events)

        @cache
        def merge_for(subject: Subject) -> EffectivePolicy:
            return policy.merge_for(subject, observed=observed)

        self._merge_for = merge_for
        self._find_subject = cache(find_subject)

    def add_lines(self, lines: Iterable[bytes], tally: LineTally) -> None:
        """Count the records in the lines, and in the tally what is none."""
        decode, events = choose_decoder(self._fields), self._events
        has_limits = bool(self._query.since or self._query.until)
        for line in lines:
            try:
                timestamp, pid, texts = decode(line)
                if texts[0] not in events:
                    continue
                key = texts[:-1]
                known = self._known.get(key) or self._learn(key, self._decode_fields(texts))
            except (ValueError, RecursionError):  # what is no record, or not as `decode` takes it
                self._add_slowly(line, tally)
                continue
            if not has_limits or self._query.is_in_time(timestamp):
                known.count(timestamp, (texts[-1], pid), line)

    def _add_slowly(self, line: bytes, tally: LineTally) -> None:
        record = parse_line(line, tally, ("timestamp", "pid", *self._fields))
        if record is None or record["event"] not in self._query.events:
            return
        key = repr([record.get(name) for name in self._fields[:-1]])
        known = self._known.get(key) or self._learn(key, record)
        if self._query.is_in_time(record["timestamp"]):
            program = json.dumps(record.get("host")).encode(), str(record.get("pid")).encode()
            known.count(record["timestamp"], program, line)

    def _decode_fields(self, texts: Iterable[bytes]) -> LoggedRecord:
        return {name: decode_json(text) for name, text in zip(self._fields, texts, strict=True) if text}

    def _learn(self, key: object, record: LoggedRecord) -> _KnownRecord:
        if len(self._known) >= _MOST_KNOWN:
            self._judge_known()
        for device in list_logged_devices(record):
            uuid, total = device.get("uuid"), device.get("total_bytes")
            if isinstance(uuid, str) and type(total) is int and len(self._sizes) < _MOST_CARDS:
                self._sizes[uuid] = total
        known = self._known[key] = _KnownRecord(record)
        return known

    def finish(self) -> ReplayResult:
        """Return what comes of all records so far."""
        self._judge_known()
        return self._result

    def _judge_known(self) -> None:
        for known in self._known.values():
            record = {**known.fields, "timestamp": known.timestamp}
            if known.programs and list_logged_devices(record) and self._timeless.matches(record):
                self._count(known, record)
        self._known.clear()

    def _count(self, known: _KnownRecord, record: LoggedRecord) -> None:
        verdict = judge(record, self._merge_for, self._find_subject, self._sizes)
        user = str(record.get("user"))
        programs = known.programs
        for gap in verdict.gaps:
            self._result.gaps.setdefault(gap, set()).update(programs)
        if not verdict.is_known:
            self._result.unknown |= programs
            return
        self._result.programs |= programs
        self._result.users.add(user)
        for row in self._list_rows(known, verdict, user):
            row.programs = set(programs)
            self._result.add_row(row)

    def _list_rows(self, known: _KnownRecord, verdict: Verdict, user: str) -> Iterator[ReplayRow]:
        newest: Mapping[str, Any] = parse_line(known.newest, LineTally()) or {} if verdict.changes else {}
        example = {name: newest.get(name) for name in ("host", "pid", "script", "job")}
        for change in verdict.changes:
            if self._query.gpus and not self._query.matches_gpu({"uuid": change.gpu, "token": change.gpu}):
                continue
            record = {**example, "timestamp": known.timestamp}
            yield ReplayRow(user, change.gpu, change.kind, change.key, set(), change, record, set(change.held_by))


def _list_filtered(query: RecordQuery) -> list[str]:
    """Name the fields that the query's filters need. Others would make more records different."""
    needed = {
        "status": bool(query.outcomes),
        "project": query.project is not None,
        "script": query.script is not None or query.project is not None,
        "job": bool(query.jobs),
        "scheduler": bool(query.jobs),  # of older versions
    }
    return [name for name in needed if needed[name]]
