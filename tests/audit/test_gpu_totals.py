from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tfenv.audit import gpu_totals, log_parts
from tfenv.audit.gpu_totals import summarize_logs, summarize_records
from tfenv.audit.query import LineTally, LoggedRecord, RecordQuery

WriteLog = Callable[..., "list[dict[str, Any]]"]
needs_msgspec = pytest.mark.skipif(find_spec("msgspec") is None, reason="msgspec is not installed: tfenv[audit]")
GPU = {"index": 0, "token": "0", "uuid": "GPU-a", "name": "H100", "limit_bytes": 100, "limit_fraction": None}
USES = ("policy_applied", "policy_clamped", "policy_failed")


def make_use(**fields: Any) -> LoggedRecord:
    return {"timestamp": "1", "event": "policy_applied", "user": "alice", "pid": 1, **fields}


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
    rows = summarize_records([make_use(devices=devices, asked=asked), make_use(devices=devices, asked=smaller)])
    limits = [(row.gpu, row.asked_bytes, row.asked_fraction, row.given_bytes, row.given_fraction) for row in rows]
    assert limits == [
        ("GPU-a", int(1500.5 * (1 << 20)), 0.5, 100, None),
        ("GPU-b", None, 0.5, None, 0.25),
    ]


def test_what_a_file_asked_for_is_summed_up_beside_what_the_program_did() -> None:
    """The larger of both counts for each GPU, and what was cut is counted by name. Older records lack both."""
    devices = [{**GPU, "asked_bytes": 700, "asked_fraction": 0.9}, {**GPU, "uuid": "GPU-b"}]
    asked = {"virtual_devices": [[0.0001], [0.001]], "per_process_gpu_memory_fraction": 0.5}
    clamped = make_use(event="policy_clamped", devices=devices, asked=asked, cut=["memory_limit", "virtual_devices"])
    old = make_use(event="policy_clamped", devices=[GPU], asked={})
    again = make_use(event="policy_clamped", devices=[GPU], cut=["memory_limit"], repeats=9)
    rows = summarize_records([clamped, old, again])
    assert [(row.gpu, row.asked_bytes, row.asked_fraction, row.clamped, row.cut) for row in rows] == [
        ("GPU-a", 700, 0.9, 11, {"memory_limit": 10, "virtual_devices": 1}),
        ("GPU-b", 1048, 0.5, 1, {"memory_limit": 1, "virtual_devices": 1}),
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


# ---- all ways of reading agree


@pytest.fixture
def long_log(tmp_path: Path, write_log: WriteLog) -> Path:
    """Write records of all events, of several users, hosts, GPUs and requests, some of a shape that is not ours."""
    chosen = random.Random(5)
    devices: list[object] = [
        None,
        [],
        [GPU],
        [{**GPU, "limit_fraction": 0.5, "limit_bytes": None}, {**GPU, "uuid": None, "token": "1"}],
        [5, {"uuid": 7, "limit_bytes": True, "asked_bytes": True, "asked_fraction": "all"}],
        [{**GPU, "asked_bytes": 700, "asked_fraction": 0.9}],
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
        "cut": [None, [], ["memory_limit"], ["memory_limit", "memory_growth"], "memory_limit", [5, ["x"]]],
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
    *(
        b'{"timestamp":"2026-11-05T08:00:00.000000Z","event":"policy_applied",%s:%s}' % (name, value)
        for name in (b'"user"', b'"pid"', b'"zz"', b'"devices"')
        for value in (
            *(b"9" * 5000, b"9" * 400, b"-1e999", b"NaN", b"-Infinity", b"1" * 30, b"[1 , ]", b"[[1e999]]", b"01"),
            *(b"[" * 20000 + b"]" * 20000, b'"\\ud800"', b'"\\x"', b'"\x01"', b'1,"user":"b"', '"é"'.encode(), b"1 }x"),
        )
    ),
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
#: Bytes that are no text, a record in other bytes, lines far longer than any.
ODD_BYTES = (
    *(b"\xff\xfe", b"a\x01b", b"a\rb", b"\0" * 50, b"crlf\r", b"x" * 3_000_000, b"\0" * 200_000),
    b'{"timestamp":"2026-11-05T08:00:00.000000Z","event":"policy_applied","zz":"\xe9"}',
    b'{"timestamp":"2026-11-05T08:00:00.000000Z","event":"policy_applied","zz":"\xed\xa0\x80"}',
    b'\xef\xbb\xbf{"timestamp":"2026-11-05T08:00:00.000000Z","event":"policy_applied"}',
    b'{"timestamp":"2026-11-05T08:00:00.000000Z","event":"policy_applied","zz":"' + b"x" * 140_000 + b'"}',
)


def read_all_ways(log: Path, query: RecordQuery) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Yield the rows, and how many lines are no records: with msgspec, without, and with it in parts of the log."""
    for absent, part_bytes in ((False, 1 << 30), (True, 1 << 30), (False, 777)):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(log_parts, "_SMALLEST_PART_BYTES", part_bytes)
            monkeypatch.setattr(log_parts, "_count_cores", lambda: 1 << 20)
            monkeypatch.setattr(log_parts, "_make_pool", lambda _: None)
            if absent:
                monkeypatch.setitem(sys.modules, "msgspec", None)
            tally = LineTally()
            yield [vars(row) for row in summarize_logs([log], query, tally)], tally.unreadable


def format_rows(rows: list[dict[str, Any]]) -> str:
    return json.dumps(rows, default=sorted, ensure_ascii=True)


def assert_agreement(log: Path, query: RecordQuery) -> int:
    """Check that rows and count are the same, and return how many rows there are."""
    (fast, fast_unreadable), (plain, unreadable), (parts, parts_unreadable) = read_all_ways(log, query)
    assert format_rows(fast) == format_rows(plain) == format_rows(parts)
    assert fast_unreadable == unreadable == parts_unreadable
    return len(plain)


@needs_msgspec
@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_all_ways_of_reading_agree(long_log: Path, query: RecordQuery) -> None:
    """Whatever is asked, also of torn and foreign lines among the records, msgspec gives what plain reading does."""
    lines = [*long_log.read_bytes().splitlines(), *JUNK]
    random.Random(7).shuffle(lines)
    torn = b'{"timestamp":"2026-11-05T08:00:00.000000Z","event":"polic' + lines[3]
    long_log.write_bytes(b"\n".join([*lines, torn, torn, lines[5]]))
    assert assert_agreement(long_log, query) > 0


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


@needs_msgspec
@pytest.mark.parametrize("collector", [None, *COLLECTORS])
def test_msgspec_reads_what_a_collector_wrote_anew(
    collector: str | None, long_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The totals are those of our own bytes, and hardly a line is left to plain reading."""

    def summarize() -> list[str]:
        tables = (summarize_logs([long_log], query, LineTally()) for query in QUERIES.values())
        return [format_rows([vars(row) for row in rows]) for rows in tables]

    ours = summarize()
    if collector is not None:
        rewrite(long_log, collector)
        for query in QUERIES.values():
            assert_agreement(long_log, query)
    left: list[bytes] = []
    monkeypatch.setattr(gpu_totals, "parse_line", lambda line, *_: left.append(line))
    assert summarize() == ours
    assert left == []


@pytest.mark.parametrize("absent", [True, False])
def test_what_is_out_of_time_counts_in_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, absent: bool
) -> None:
    """Neither its limits nor its user are in a summary of later records, however it is written."""
    if absent:
        monkeypatch.setitem(sys.modules, "msgspec", None)
    log = tmp_path / "log"
    early, late = (f"2026-11-05T{hour}:00:00.000000Z" for hour in ("08", "12"))
    device = {"uuid": "GPU-a", "limit_bytes": 5}
    records = (
        {"timestamp": early, "event": "policy_clamped", "user": "a", "devices": [{**device, "limit_bytes": 9}]},
        {"timestamp": early, "event": "policy_clamped", "user": "b", "devices": [device]},
        {"timestamp": early, "event": "policy_clamped", "user": "a", "devices": [device]},
        {"timestamp": late, "event": "policy_clamped", "user": "a", "devices": [device]},
    )
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    (row,) = summarize_logs([log], RecordQuery(since="2026-11-05T10:00:00.000000Z"), LineTally())
    assert (row.user, row.given_bytes, row.clamped, row.last) == ("a", 5, 1, late)


@needs_msgspec
@pytest.mark.parametrize("collector", COLLECTORS)
def test_junk_among_rewritten_records_is_counted_alike(collector: str, long_log: Path) -> None:
    """Torn lines, trailing commas and what follows a record on its line count the same in both ways."""
    rewrite(long_log, collector)
    lines = long_log.read_bytes().splitlines()
    broken = [lines[0][:-1] + b" , }", lines[1] + b" x", lines[2] + lines[3], b" " + lines[4][:40], b'{"a": [1, ]}']
    long_log.write_bytes(b"\n".join([*lines, *broken, *JUNK]))
    for query in QUERIES.values():
        assert_agreement(long_log, query)


@pytest.mark.parametrize("absent", [True, False])
def test_repeats_count_as_often_as_they_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, absent: bool
) -> None:
    """A record of ninety clamps is ninety clamps. A number that is no count is one."""
    if absent:
        monkeypatch.setitem(sys.modules, "msgspec", None)
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
    (row,) = summarize_logs([log], RecordQuery(), LineTally())
    assert row.clamped == 1 + 9 + 90 + 3


@needs_msgspec
@pytest.mark.parametrize("odd", ODD_BYTES, ids=lambda odd: repr(odd[:6]))
def test_bytes_that_are_no_record(long_log: Path, odd: bytes) -> None:
    """A log with binary junk in it is read all the same, and to the same end."""
    begin, end = long_log.read_bytes()[:9000], long_log.read_bytes()[9000:]
    long_log.write_bytes(begin + b"\n" + odd + b"\n" + end)
    assert assert_agreement(long_log, RecordQuery()) > 0


@needs_msgspec
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
    log = long_log.with_name("damaged")
    log.write_bytes(damaged)
    assert_agreement(log, RecordQuery())


@needs_msgspec
@pytest.mark.parametrize("cut", [0, 15])
def test_compressed_logs_agree(long_log: Path, cut: int) -> None:
    """A compressed log is read whole. What is cut off is counted alike."""
    packed = long_log.with_name("log.1.gz")
    data = gzip.compress(long_log.read_bytes())
    packed.write_bytes(data[: len(data) - cut])
    assert assert_agreement(packed, RecordQuery()) > 0


def test_a_log_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A missing file is FileNotFoundError, with its name."""
    with pytest.raises(FileNotFoundError, match="none"):
        summarize_logs([tmp_path / "none"], RecordQuery(), LineTally())


def test_a_long_log_is_read_by_several_processes(long_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is counted once, whatever the place where one process's part of the log ends, and in what order."""
    whole, tally = summarize_logs([long_log], RecordQuery(), LineTally()), LineTally()
    monkeypatch.setattr(log_parts, "_SMALLEST_PART_BYTES", 9000)
    monkeypatch.setattr(log_parts, "_count_cores", lambda: 3)
    long_log.write_bytes(long_log.read_bytes() + b"junk\n")
    assert summarize_logs([long_log], RecordQuery(), tally) == whole
    assert tally.unreadable == 1


def test_a_log_that_cannot_be_read_is_an_error_in_another_process_too(
    long_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong in a process that helps is said in the same words."""
    monkeypatch.setattr(log_parts, "_SMALLEST_PART_BYTES", 9000)
    monkeypatch.setattr(log_parts, "_count_cores", lambda: 3)

    def fail(*_: object) -> Iterator[bytes]:
        raise PermissionError(13, "Permission denied", str(long_log))

    monkeypatch.setattr(gpu_totals, "read_lines", fail)
    with pytest.raises(PermissionError, match="log"):
        summarize_logs([long_log], RecordQuery(), LineTally())
