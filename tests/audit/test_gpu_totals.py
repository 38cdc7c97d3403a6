from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tfenv.audit import duckdb_engine, gpu_totals
from tfenv.audit.gpu_totals import summarize_groups, summarize_logs
from tfenv.audit.query import LineTally, RecordGroup, RecordQuery, make_group, read_groups, select_records

WriteLog = Callable[..., "list[dict[str, Any]]"]
needs_duckdb = pytest.mark.skipif(not duckdb_engine.is_installed(), reason="DuckDB is not installed: tfenv[audit]")
GPU = {"index": 0, "token": "0", "uuid": "GPU-a", "name": "H100", "limit_bytes": 100, "limit_fraction": None}
USES = ("policy_applied", "policy_clamped", "policy_failed")


def make_use(**fields: Any) -> RecordGroup:
    return make_group({"timestamp": "1", "event": "policy_applied", "user": "alice", "pid": 1, **fields})


def test_a_summary_counts_per_user_and_gpu(write_log: WriteLog, tmp_path: Path) -> None:
    """Processes are counted once, plans are no use, the largest limits and the newest time are kept."""
    write_log(
        tmp_path / "log",
        {"pid": 1, "devices": [GPU], "timestamp": "1"},
        {"pid": 1, "devices": [GPU, {**GPU, "uuid": None, "token": "1"}], "timestamp": "2"},
        {"pid": 2, "devices": [{**GPU, "limit_bytes": 300}], "event": "policy_clamped", "timestamp": "3"},
        {"pid": 3, "devices": [GPU], "event": "policy_loaded"},
        {"pid": 4, "devices": None, "event": "policy_failed", "user": "bob", "timestamp": "4"},
    )
    rows = [row.as_dict() for row in summarize_logs([tmp_path / "log"], RecordQuery(), LineTally())]
    shown = ("user", "gpu", "processes", "clamped", "failed", "given_bytes", "last")
    assert [tuple(row[key] for key in shown) for row in rows] == [
        ("alice", "1", 1, 0, 0, 100, "2"),
        ("alice", "GPU-a", 2, 1, 0, 300, "3"),
        ("bob", "", 1, 0, 1, None, "4"),
    ]


def test_what_was_asked_is_each_gpus_own() -> None:
    """A program's split is summed up per GPU, in the order of the record's GPUs. A fraction holds for all of them."""
    devices = [GPU, {**GPU, "uuid": "GPU-b", "limit_bytes": None, "limit_fraction": 0.25}]
    asked = {"virtual_devices": [[1000.5, 500.0], []], "per_process_gpu_memory_fraction": 0.5}
    smaller = {"virtual_devices": [[10.0]], "per_process_gpu_memory_fraction": 0.4}
    rows = summarize_groups([make_use(devices=devices, asked=asked), make_use(devices=devices, asked=smaller)])
    limits = [(row.gpu, row.asked_bytes, row.asked_fraction, row.given_bytes, row.given_fraction) for row in rows]
    assert limits == [
        ("GPU-a", int(1500.5 * (1 << 20)), 0.5, 100, None),
        ("GPU-b", None, 0.5, None, 0.25),
    ]


def test_a_summary_of_one_gpu_leaves_out_the_others(tmp_path: Path, write_log: WriteLog) -> None:
    """`--gpu` chooses among the GPUs of a record, too."""
    write_log(tmp_path / "log", {"devices": [GPU, {**GPU, "uuid": "GPU-b"}]}, {"devices": [{**GPU, "uuid": "GPU-c"}]})
    rows = summarize_logs([tmp_path / "log"], RecordQuery(gpus=frozenset({"GPU-b"})), LineTally())
    assert [row.gpu for row in rows] == ["GPU-b"]


@pytest.mark.parametrize("events", [{"policy_loaded"}, {"policy_failed"}])
def test_a_summary_keeps_to_the_events_asked_for(tmp_path: Path, write_log: WriteLog, events: set[str]) -> None:
    """`--event failed` counts failures only. A plan is no use, whatever is asked."""
    write_log(tmp_path / "log", *({"event": event, "pid": 1} for event in (*USES, "policy_loaded")))
    rows = summarize_logs([tmp_path / "log"], RecordQuery(events=frozenset(events)), LineTally())
    assert [row.failed for row in rows] == [1] * (events == {"policy_failed"})


# ---- DuckDB and plain reading agree


@pytest.fixture
def long_log(tmp_path: Path, write_log: WriteLog) -> Path:
    """Write records of all events, of several users, hosts, GPUs and requests, some of a shape that is not ours."""
    chosen = random.Random(5)
    devices: list[object] = [
        None,
        [],
        [GPU],
        [{**GPU, "limit_fraction": 0.5, "limit_bytes": None}, {**GPU, "uuid": None, "token": "1"}],
        [5, {"uuid": 7, "limit_bytes": True}],
        [{"uuid": "GPU-b", "limit_bytes": 1.5, "limit_fraction": 1}],
        "none",
    ]
    asked: list[object] = [
        {},
        {"virtual_devices": [[100.0, 50], [7]]},
        {"per_process_gpu_memory_fraction": 0.4},
        "much",
        [1],
    ]
    users = ["alice", "böb", "DOMAIN\\carol", None, 5, ["x"], "🦊"]
    values: dict[str, list[Any]] = {
        "event": [*USES, *USES, "policy_loaded", "other"],
        "user": users,
        "uid": [1000, 1001, "1000", None],
        "host": ["a", "b", None, 1],
        "pid": [1, 2, 3, 4, -5, 1.0, None, "6", 10**30],
        "devices": devices,
        "asked": asked,
        "status": ["applied", "clamped", None],
        "project": ["/srv/vision", "/srv/vis", None],
        "script": ["/srv/vision/train.py", None],
        "timestamp": [f"2026-11-05T{hour:02}:00:00.000000Z" for hour in range(24)] + ["2026-11-05", "2026-11-06T\\"],
    }
    path = tmp_path / "log"
    write_log(path, *({name: chosen.choice(choices) for name, choices in values.items()} for _ in range(600)))
    return path


QUERIES = {
    "all": RecordQuery(),
    "since": RecordQuery(since="2026-11-05T10:00:00.000000Z"),
    "until": RecordQuery(until="2026-11-05T10:00:00.000000Z"),
    "day": RecordQuery(since="2026-11-05T03:00:00.000000Z", until="2026-11-05T10:00:00.000000Z"),
    "users": RecordQuery(users=frozenset({"böb", "alice"})),
    "uid": RecordQuery(uids=frozenset({1000})),
    "outcome": RecordQuery(outcomes=frozenset({"clamped"}), events=frozenset({"policy_failed"})),
    "project": RecordQuery(project="/srv/vision"),
    "script": RecordQuery(script="train*"),
    "gpu": RecordQuery(gpus=frozenset({"1", "GPU-b"})),
}
JUNK = (
    b"hello",
    b'{"timestamp":"2026-11-05T08:00:00.000000Z","event":"policy_ap',
    b'{"timestamp":"2026-11-05T08:00:00.000000Z","event":"policy_applied",}',
    b'{"timestamp":"2026-11-05T08:00:00.000000Z","event":5}',
    b'{"timestamp":"2026-11-05T08:00:00.000000Z"}',
    b'{"timestamp":"2026-11-05T08:00:00.000000Z","event":"policy_applied","user":"\\ud800"}',
    b'{"timestamp":"2026-11-05T08:00:00.000000Z","event":"policy_applied","user":NaN}',
    b'{"event":"policy_failed","timestamp":"2026-11-05T08:00:00.000000Z","user":"turned round"}',
    b' {"timestamp" : "2026-11-05T08:00:00.000000Z", "event": "policy_failed", "user": "spaced"}',
    b'{"timestamp":"2026-11-05T23:59:59.99999\\"","event":"policy_applied","user":"quoted"}',
    b'{"timestamp":"2026-11-05T23:59:59.999990Z","event":"policy_applied","user":"quoted"}',
    b'{"timestamp":"2026-11-05T01:00:00.0{"timestamp":"2026-11-05T12:00:00.000000Z","event":"policy_failed","user":"l"}',
    b'{"timestamp":"2026-11-05T23:00:00.0{"timestamp":"2026-11-05T04:00:00.000000Z","event":"policy_failed","user":"s"}',
    b"[]",
    b"null",
    b"[" * 3000,
    b"",
    b"   ",
    b'"quoted","csv"',
    b"#comment",
)
#: Bytes that are no text, or that DuckDB takes for more than one column or line: plain reading takes over.
ODD_BYTES = (b"\xff\xfe", b"a\x01b", b"a\rb", b"\0" * 50, b"crlf\r", b"x" * 3_000_000)


def read_both_ways(log: Path, query: RecordQuery) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Yield the rows, and how many lines are no records, of DuckDB and of plain reading."""
    for make_groups in (duckdb_engine.group_records, read_groups):
        tally = LineTally()
        rows = summarize_groups(make_groups(log, query, tally), query)
        yield [{**vars(row)} for row in rows], tally.unreadable


def format_rows(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, default=sorted, ensure_ascii=True)


def assert_agreement(log: Path, query: RecordQuery) -> int:
    """Check that rows and count are the same, and return how many rows there are."""
    (fast, fast_unreadable), (plain, unreadable) = read_both_ways(log, query)
    assert format_rows(fast) == format_rows(plain)
    assert fast_unreadable == unreadable
    return len(plain)


@needs_duckdb
@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_both_ways_of_reading_agree(long_log: Path, query: RecordQuery) -> None:
    """Whatever is asked, also of torn and foreign lines among the records, DuckDB's answer is that of plain reading."""
    lines = [*long_log.read_bytes().splitlines(), *JUNK]
    random.Random(7).shuffle(lines)
    torn = b'{"timestamp":"2026-11-05T08:00:00.000000Z","event":"polic' + lines[3]
    long_log.write_bytes(b"\n".join([*lines, torn, torn, lines[5]]))
    assert assert_agreement(long_log, query) > 0


@needs_duckdb
def test_duckdb_does_the_work(long_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of our own shape are grouped by DuckDB: few groups, and none of them read by plain reading."""
    monkeypatch.setattr(duckdb_engine, "read_groups", None)
    groups = list(duckdb_engine.group_records(long_log, RecordQuery(), LineTally()))
    assert any(group.times > 1 for group in groups)


#: How collectors write records anew: jq and Python with blanks, rsyslog and Vector with their own order of keys.
COLLECTORS: dict[str, Callable[[dict[str, Any]], str]] = {
    "blanks": json.dumps,
    "sorted": lambda record: json.dumps(record, sort_keys=True, separators=(",", ":")),
    "both, indented by one": lambda record: " " + json.dumps(record, sort_keys=True, separators=(" , ", " : ")),
    "reversed": lambda record: json.dumps(dict(reversed(record.items()))),
}


def rewrite(log: Path, collector: str) -> None:
    """Write each record of a log as a collector does."""
    records = [json.loads(line) for line in log.read_bytes().splitlines()]
    log.write_text("".join(f"{COLLECTORS[collector](record)}\n" for record in records))


@needs_duckdb
@pytest.mark.parametrize("collector", COLLECTORS)
def test_duckdb_groups_what_a_collector_wrote_anew(
    collector: str, long_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The totals are those of our own bytes, and no more lines are left to plain reading."""
    left: list[bytes] = []

    def note(lines: list[bytes], *rest: Any) -> Iterator[Any]:
        left.extend(lines)
        return select_records(lines, *rest)

    monkeypatch.setattr(duckdb_engine, "read_groups", None)
    monkeypatch.setattr(duckdb_engine, "select_records", note)
    ours = [vars(row) for row in summarize_groups(duckdb_engine.group_records(long_log, RecordQuery(), LineTally()))]
    odd = len(left)
    rewrite(long_log, collector)
    groups = duckdb_engine.group_records(long_log, RecordQuery(), LineTally())
    assert format_rows([vars(row) for row in summarize_groups(groups)]) == format_rows(ours)
    assert len(left) <= 2 * odd
    monkeypatch.undo()
    for query in QUERIES.values():
        assert_agreement(long_log, query)


@needs_duckdb
@pytest.mark.parametrize("collector", COLLECTORS)
def test_junk_among_rewritten_records_is_counted_alike(collector: str, long_log: Path) -> None:
    """Torn lines, trailing commas and what follows a record on its line count the same in both ways."""
    rewrite(long_log, collector)
    lines = long_log.read_bytes().splitlines()
    broken = [lines[0][:-1] + b" , }", lines[1] + b" x", lines[2] + lines[3], b" " + lines[4][:40], b'{"a": [1, ]}']
    long_log.write_bytes(b"\n".join([*lines, *broken, *JUNK]))
    for query in QUERIES.values():
        assert_agreement(long_log, query)


@pytest.mark.parametrize("make_groups", [duckdb_engine.group_records, read_groups])
def test_repeats_count_as_often_as_they_happened(make_groups: Any, tmp_path: Path) -> None:
    """A record of ninety clamps is ninety clamps. A number that is no count is one."""
    log = tmp_path / "audit.jsonl"
    base: dict[str, Any] = {
        "timestamp": "2026-11-05T09:31:07.123456Z",
        "event": "policy_clamped",
        "user": "a",
        "pid": 1,
        "host": "h",
    }
    repeats: list[dict[str, Any]] = [
        {},
        {"repeats": 9},
        {"repeats": 90},
        {"repeats": -5},
        {"repeats": "x"},
        {"repeats": True},
    ]
    log.write_text("".join(json.dumps({**base, **each}) + "\n" for each in repeats))
    (row,) = summarize_groups(make_groups(log, RecordQuery(), LineTally()))
    assert row.clamped == 1 + 9 + 90 + 3


@needs_duckdb
@pytest.mark.parametrize("odd", ODD_BYTES, ids=lambda odd: repr(odd[:6]))
def test_bytes_that_duckdb_does_not_take(long_log: Path, odd: bytes) -> None:
    """A log with binary junk in it is read all the same, and to the same end."""
    begin, end = long_log.read_bytes()[:9000], long_log.read_bytes()[9000:]
    long_log.write_bytes(begin + b"\n" + odd + b"\n" + end)
    assert assert_agreement(long_log, RecordQuery()) > 0


@needs_duckdb
@settings(suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damage_anywhere_changes_both_answers_alike(long_log: Path, data: st.DataObject) -> None:
    """Bytes lost, doubled or changed at any place of a log."""
    whole = long_log.read_bytes().splitlines(keepends=True)[:12]
    damaged = bytearray(b"".join(whole))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        end = place + data.draw(st.integers(0, 30))
        damaged[place:end] = data.draw(st.sampled_from([b"", b",", b"}", b'"', b"\n"]))
    assume(not any(map(has_a_key_twice, bytes(damaged).splitlines())))
    log = long_log.with_name("damaged")
    log.write_bytes(damaged)
    assert_agreement(log, RecordQuery())


def has_a_key_twice(line: bytes) -> bool:
    """Two records that were melted into one: JSON leaves open which of the two values counts (RFC 8259, section 4)."""
    twice = []

    def look(pairs: list[tuple[str, object]]) -> None:
        twice.append(len(dict(pairs)) < len(pairs))

    with suppress(ValueError):
        json.loads(line, object_pairs_hook=look)
    return any(twice)


@needs_duckdb
@pytest.mark.parametrize("cut", [0, 15])
def test_compressed_logs_agree(long_log: Path, cut: int) -> None:
    """DuckDB decompresses itself. What is cut off is counted as it is elsewhere."""
    packed = long_log.with_name("log.1.gz")
    data = gzip.compress(long_log.read_bytes())
    packed.write_bytes(data[: len(data) - cut])
    assert assert_agreement(packed, RecordQuery()) > 0


@needs_duckdb
@pytest.mark.parametrize("name", ["log*", "log[1]", "l?g", "a'b"])
def test_a_path_is_no_pattern(long_log: Path, name: str) -> None:
    """A file name with signs that DuckDB would expand is that file alone."""
    odd = long_log.rename(long_log.with_name(name))
    (long_log.with_name("log1")).write_bytes(b"another\n")
    assert assert_agreement(odd, RecordQuery()) > 0


@needs_duckdb
def test_a_log_that_cannot_be_read_is_said_in_the_same_words(tmp_path: Path) -> None:
    """A missing file is FileNotFoundError, with its name, for DuckDB too."""
    for make_groups in (duckdb_engine.group_records, read_groups):
        with pytest.raises(FileNotFoundError, match="none"):
            list(make_groups(tmp_path / "none", RecordQuery(), LineTally()))


@needs_duckdb
@pytest.mark.parametrize(("small", "used"), [(0, True), (1 << 30, False)])
def test_a_short_log_does_not_wait_for_duckdb(
    long_log: Path, monkeypatch: pytest.MonkeyPatch, small: int, used: bool
) -> None:
    """DuckDB is imported where there is enough to read."""
    calls: list[Path] = []
    monkeypatch.setattr(gpu_totals, "_SMALL_LOGS_BYTES", small)

    def group_records(log: Path, *_: object) -> list[RecordGroup]:
        calls.append(log)
        return []

    monkeypatch.setattr(duckdb_engine, "group_records", group_records)
    rows = summarize_logs([long_log], RecordQuery(), LineTally())
    assert (calls == [long_log], rows == []) == (used, used)


@pytest.mark.parametrize("broken", [True, False])
def test_without_duckdb_a_long_log_is_read_all_the_same(
    long_log: Path, monkeypatch: pytest.MonkeyPatch, *, broken: bool
) -> None:
    """Not installed, or installed and of no use here: plain reading gives the answer."""
    monkeypatch.setattr(gpu_totals, "_SMALL_LOGS_BYTES", 0)
    monkeypatch.setattr(duckdb_engine, "is_installed", lambda: broken)
    monkeypatch.setitem(sys.modules, "duckdb", None)
    plain = summarize_groups(read_groups(long_log, RecordQuery(), LineTally()))
    assert summarize_logs([long_log], RecordQuery(), LineTally()) == plain


@needs_duckdb
def test_duckdb_leaves_nothing_beside_the_program(long_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No temporary files in the working directory."""
    monkeypatch.chdir(long_log.parent)
    list(duckdb_engine.group_records(long_log, RecordQuery(), LineTally()))
    assert [path.name for path in long_log.parent.iterdir()] == ["log"]
