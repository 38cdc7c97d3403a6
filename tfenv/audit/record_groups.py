"""Records that say the same of different processes, gathered: what they mean is worked out once for all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

from tfenv.audit.line_decoder import choose_decoder
from tfenv.audit.query import LineTally, LoggedRecord, RecordQuery, decode_json, parse_line
from tfenv.values import replace

#: What tells processes apart, and an example of them.
_PROCESS_FIELDS = ("host", "pid", "start_ticks", "script")
_Texts = tuple[bytes, ...]
#: Values of fields that are remembered at a time.
_MOST_VALUES = 20_000


class Example(NamedTuple):
    """The newest process of some records. Of two, the one with the larger tuple is newer.

    Attributes:
        timestamp: When, as records have it.
        host: Its machine.
        pid: Its process id. None: the record does not say.
        script: Its program. None: it has no file.
    """

    timestamp: str
    host: str
    pid: int | None
    script: str | None


class RecordGroup:
    """Records that differ in nothing but time, process and program.

    Attributes:
        record: What they say in the fields that count.
        processes: What tells their processes apart, as a hash: a million of them are to fit into memory.
        timestamp: Of the newest.
    """

    __slots__ = ("_texts", "processes", "record", "timestamp")

    def __init__(self, record: LoggedRecord) -> None:
        if not isinstance(record.get("event"), str):
            raise ValueError("a record has the name of an event")  # noqa: TRY004 - what is read is no argument
        self.record = record
        self.processes: set[int] = set()
        self.timestamp = ""
        self._texts: _Texts = ()

    def add(self, timestamp: str, texts: _Texts) -> None:
        """Add a record. `texts` is its process as JSON, in the order of `_PROCESS_FIELDS`."""
        self.processes.add(hash(texts[:3]))
        if timestamp >= self.timestamp:
            self.timestamp, self._texts = timestamp, texts

    def merge(self, other: RecordGroup) -> None:
        """Add what others gathered of the same record."""
        self.processes |= other.processes
        if other.timestamp >= self.timestamp:
            self.timestamp, self._texts = other.timestamp, other._texts

    @property
    def example(self) -> Example:
        """The newest process."""
        host, pid, _, script = (decode_json(text) if text else None for text in self._texts)
        return Example(
            self.timestamp, str(host), pid if type(pid) is int else None, script if isinstance(script, str) else None
        )


class GroupedRecords:
    """The wanted records of some logs, in groups.

    Attributes:
        groups: By what they say, as JSON.
    """

    def __init__(self, fields: Sequence[str], query: RecordQuery, needle: bytes = b"") -> None:
        """Gather records.

        Args:
            fields: What counts of them. Only these are in `RecordGroup.record`. "event" is among them, and what the
                query's filters need.
            query: Which are wanted.
            needle: A wanted record has this in it.
        """
        self.groups: dict[_Texts, RecordGroup] = {}
        self._fields = tuple(dict.fromkeys(fields))
        self._query = query
        self._needle = needle
        self._values: dict[bytes, Any] = {}
        self._events = frozenset(map(_encode, query.events))
        self._filters_time = bool(query.since or query.until)

    def add_lines(self, lines: Iterable[bytes], tally: LineTally) -> Iterator[RecordGroup]:
        """Add the records in the lines, and count in the tally what is none. Yield each new group."""
        decode = choose_decoder((*_PROCESS_FIELDS, *self._fields))
        names = ("timestamp", *_PROCESS_FIELDS, *self._fields)
        split = len(_PROCESS_FIELDS)
        event = split + self._fields.index("event")
        for line in lines:
            if self._needle and self._needle not in line and b"\\" not in line and line.endswith(b"}"):
                continue
            try:
                timestamp, _, texts = decode(line)
                if self._events and texts[event] not in self._events and _is_plain_text(texts[event]):
                    continue
                is_new = self._learn(texts[split:])
            except (ValueError, RecursionError):  # what is no record, or not as `decode` takes it
                record = parse_line(line, tally, names)
                if record is None or (self._query.events and record["event"] not in self._query.events):
                    continue
                timestamp = cast("str", record["timestamp"])
                texts = tuple(_encode(record[name]) if name in record else b"" for name in names[1:])
                is_new = self._learn(texts[split:])
            if not self._filters_time or self._query.is_in_time(timestamp):
                self.groups[texts[split:]].add(timestamp, texts[:split])
            if is_new:
                yield self.groups[texts[split:]]

    def _learn(self, key: _Texts) -> bool:
        """Make the group of a record. Return whether there was none."""
        if key in self.groups:
            return False
        if len(self._values) >= _MOST_VALUES:
            self._values.clear()
        self.groups[key] = RecordGroup({n: self._decode(t) for n, t in zip(self._fields, key, strict=True) if t})
        return True

    def _decode(self, text: bytes) -> Any:
        """Return a value. Most groups differ in one field, and share the others."""
        if text not in self._values:
            self._values[text] = decode_json(text)
        return self._values[text]

    def list_wanted(self, without: Collection[str] = ()) -> Iterator[tuple[tuple[bytes, ...], RecordGroup]]:
        """Yield the groups of records that the query wants, each with its fields as JSON but for those named."""
        timeless = replace(self._query, since="", until="")
        places = [place for place, name in enumerate(self._fields) if name not in without]
        for key, group in self.groups.items():
            if group.processes and timeless.matches({**group.record, "timestamp": ""}):
                yield tuple(key[place] for place in places), group

    def merge(self, groups: dict[_Texts, RecordGroup]) -> None:
        """Add what others gathered with the same fields."""
        for key, group in groups.items():
            known = self.groups.get(key)
            if known is None:
                self.groups[key] = group
            else:
                known.merge(group)


def _is_plain_text(text: bytes) -> bool:
    """Tell whether a value of JSON is a text that has no second spelling."""
    return text[:1] == b'"' and b"\\" not in text


def _encode(value: object) -> bytes:
    import json

    return json.dumps(value, separators=(",", ":")).encode("ascii")
