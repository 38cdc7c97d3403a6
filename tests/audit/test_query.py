from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tfenv.audit.query import Query, Tail, Tally, last, parse_since, read, select, summarize, with_rotated
from tfenv.audit.record import encode

WriteLog = Callable[..., "list[dict[str, Any]]"]
ALL = Query()


def pids(path: Path, query: Query = ALL, tally: Tally | None = None) -> list[int]:
    return [record["pid"] for record in read([path], query, tally or Tally())]


@pytest.fixture
def log(tmp_path: Path, write_log: WriteLog) -> Path:
    """Four records that differ in all that can be asked for."""
    path = tmp_path / "log"
    write_log(
        path,
        {"pid": 1, "timestamp": "2026-11-05T08:00:00.000000Z", "event": "policy_loaded", "status": "failed"},
        {"pid": 2, "timestamp": "2026-11-05T09:00:00.000000Z", "user": "böb", "uid": 77, "status": "clamped"},
        {"pid": 3, "timestamp": "2026-11-05T10:00:00.000000Z", "project": "/srv/visionary", "script": "/opt/x.py"},
        {"pid": 4, "timestamp": "2026-11-05T11:00:00.000000Z", "project": None, "script": "/srv/vision/sub/train.py"},
    )
    return path


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (Query(), [1, 2, 3, 4]),
        (Query(events=frozenset({"policy_loaded"})), [1]),
        (Query(users=frozenset({"böb"})), [2]),
        (Query(users=frozenset({"böb", "alice"})), [1, 2, 3, 4]),
        (Query(uids=frozenset({77})), [2]),
        (Query(uids=frozenset({7})), []),
        (Query(statuses=frozenset({"clamped", "failed"})), [1, 2]),
        (Query(project="/srv/vision"), [1, 2, 4]),
        (Query(project="/"), [1, 2, 3, 4]),
        (Query(script="train.py"), [4]),
        (Query(script="/opt/*"), [3]),
        (Query(since="2026-11-05T10:00:00.000000Z"), [3, 4]),
        (Query(since="2026-11-05T08:30:00.000000Z", users=frozenset({"alice"})), [3, 4]),
    ],
    ids=lambda value: "query" if isinstance(value, Query) else str(value),  # the order of a set is no name
)
def test_a_query_finds_what_it_asks_for(log: Path, query: Query, found: list[int]) -> None:
    """Every filter alone, and two together."""
    assert pids(log, query) == found


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=8), st.text(max_size=8), st.integers(0, 99), st.booleans())
def test_the_quick_look_at_the_bytes_never_changes_the_answer(user: str, other: str, uid: int, spaced: bool) -> None:
    """What is skipped without parsing would not have matched, whatever the names and however JSON is spaced."""
    record = {"timestamp": "2026-11-05T08:00:00.000000Z", "event": "policy_applied", "user": user, "uid": uid}
    line = json.dumps(record, ensure_ascii=not spaced, separators=(", ", ": ") if spaced else (",", ":"))
    for query in (Query(users=frozenset({other})), Query(users=frozenset({user}), uids=frozenset({uid}))):
        assert bool(list(select([line.encode()], query, Tally()))) == query.matches(record)


def test_torn_and_foreign_lines_are_counted_and_skipped(log: Path) -> None:
    """Half records, other programs' lines, zeros and JSON that is no record are counted; empty lines are not."""
    whole = log.read_bytes()
    junk = [b"hello", b'{"a":1}', b"[]", b"\0" * 50, b"\xff\xfe", b"[" * 9000, whole[:90]]
    log.write_bytes(b"\n".join([*junk, b"", b"  "]) + b"\n" + whole)
    tally = Tally()
    assert pids(log, ALL, tally) == [1, 2, 3, 4]
    assert tally.unreadable == len(junk)


def test_a_record_behind_a_torn_one_is_found(log: Path) -> None:
    """Where a killed writer left half a line, the whole record that follows on the same line is read."""
    first, *others = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(first[:120] + b"".join([first, *others]))
    tally = Tally()
    assert pids(log, ALL, tally) == [1, 2, 3, 4]
    assert tally.unreadable == 1


def test_the_last_line_needs_no_newline(log: Path) -> None:
    """A log that was copied without its last byte keeps its last record."""
    log.write_bytes(log.read_bytes()[:-1])
    assert pids(log) == [1, 2, 3, 4]


def test_a_file_of_zeros_is_read_without_collecting_it(tmp_path: Path, log: Path) -> None:
    """A sparse file of many megabytes without a newline is some unreadable lines."""
    whole = log.read_bytes()
    with log.open("wb") as file:
        file.truncate(50 << 20)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + whole)
    tally = Tally()
    assert pids(log, ALL, tally)[-4:] == [1, 2, 3, 4]
    assert tally.unreadable > 0
    assert [record["pid"] for record in last([log], ALL, Tally(), 4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_last_is_the_newest_oldest_first(log: Path, count: int) -> None:
    """The newest records, in the order of time."""
    assert [record["pid"] for record in last([log], ALL, Tally(), count)] == [1, 2, 3, 4][max(0, 4 - count) :]


def test_last_of_a_long_log_reads_only_its_end(tmp_path: Path, write_log: WriteLog) -> None:
    """The newest records of a log with a damaged beginning are found without meeting the damage."""
    path = tmp_path / "log"
    write_log(path, *({"pid": number, "project": "p" * 900} for number in range(500)))
    path.write_bytes(b"damage\n" + path.read_bytes())
    tally = Tally()
    assert [record["pid"] for record in last([path], ALL, tally, 200)] == list(range(300, 500))
    assert tally.unreadable == 0


def test_last_of_several_logs_is_merged_by_time(tmp_path: Path, write_log: WriteLog) -> None:
    """Records of two logs come in one order."""
    for name, hours in (("a", (1, 3)), ("b", (2, 4))):
        write_log(tmp_path / name, *({"pid": hour, "timestamp": f"2026-11-05T0{hour}:00:00.0Z"} for hour in hours))
    assert [record["pid"] for record in last([tmp_path / "a", tmp_path / "b"], ALL, Tally(), 3)] == [2, 3, 4]


def test_rotated_logs_come_oldest_first(tmp_path: Path) -> None:
    """Numbers count down, dates up, the log itself is last; other files are not taken for logs."""
    names = ["log.10.gz", "log.2", "log.1", "log-20261104.gz", "log-20261105", "log"]
    for name in [*names, "log.old", "log.1.swp", "other.1"]:
        (tmp_path / name).touch()
    assert [path.name for path in with_rotated(tmp_path / "log")] == names


def test_compressed_logs_are_read(log: Path, write_log: WriteLog) -> None:
    """A .gz is read like the log; one that is cut off gives what it holds and counts as damaged."""
    packed = log.with_name("log.1.gz")
    packed.write_bytes(gzip.compress(log.read_bytes()))
    assert pids(packed) == [1, 2, 3, 4]
    assert [record["pid"] for record in last([packed, log], ALL, Tally(), 2)] == [4, 4]
    packed.write_bytes(packed.read_bytes()[:-12])
    tally = Tally()
    pids(packed, ALL, tally)
    assert tally.unreadable >= 1


def test_a_tail_gives_what_is_appended(tmp_path: Path) -> None:
    """Only whole lines, only new ones, also of a log that does not exist yet."""
    path = tmp_path / "log"
    tail = Tail(path)
    assert tail.poll() == []
    path.write_bytes(b"1\n2")
    assert tail.poll() == [b"1"]
    with path.open("ab") as file:
        file.write(b"2\n3\n")
    assert tail.poll() == [b"22", b"3"]
    tail.close()


def test_a_tail_begins_at_the_end(tmp_path: Path) -> None:
    """What was there before is not repeated."""
    path = tmp_path / "log"
    path.write_bytes(b"old\n")
    tail = Tail(path)
    assert (tail.poll(), tail.position) == ([], 4)
    tail.close()


def test_a_tail_survives_rotation(tmp_path: Path) -> None:
    """After rename and create: the rest of the old file, what a late writer adds to it, then the new one."""
    path = tmp_path / "log"
    path.write_bytes(b"old\n")
    tail = Tail(path)
    late = path.open("ab", buffering=0)
    late.write(b"1\n")
    path.rename(tmp_path / "log.1")
    assert tail.poll() == [b"1"]
    path.write_bytes(b"4\n")
    late.write(b"2\n")
    assert tail.poll() == [b"2"]
    late.write(b"3\n")
    assert tail.poll() == [b"3", b"4"]
    late.close()
    tail.close()


def test_a_tail_survives_copytruncate(tmp_path: Path) -> None:
    """A log that became shorter is read from its beginning."""
    path = tmp_path / "log"
    path.write_bytes(b"a long line\n")
    tail = Tail(path)
    path.write_bytes(b"1\n")
    assert tail.poll() == [b"1"]
    tail.close()


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2h", "2026-11-05T10:00:00.000000Z"),
        ("30min", "2026-11-05T11:30:00.000000Z"),
        ("7d", "2026-10-29T12:00:00.000000Z"),
        ("2026-11-05T09:30:00Z", "2026-11-05T09:30:00.000000Z"),
        ("2026-11-05T09:30:00+02:00", "2026-11-05T07:30:00.000000Z"),
    ],
)
def test_since(text: str, moment: str) -> None:
    """A duration counts back from now; a time keeps its zone."""
    assert parse_since(text, datetime(2026, 11, 5, 12, tzinfo=timezone.utc)) == moment


@pytest.mark.parametrize("text", ["", "yesterday", "2 hours ago", "-1h", "999999999d", "2026-13-01"])
def test_since_says_what_would_be_right(text: str) -> None:
    """What is neither a duration nor a time is refused with examples."""
    with pytest.raises(ValueError, match="write"):
        parse_since(text)


def test_a_summary_counts_per_user_and_gpu(context: Any, write_log: WriteLog, tmp_path: Path) -> None:
    """Processes are counted once, plans are no use, the largest limit and the newest time are kept."""
    gpu = {"index": 0, "token": "0", "uuid": "GPU-a", "name": None, "limit_bytes": 100, "limit_fraction": None}
    records = write_log(
        tmp_path / "log",
        {"pid": 1, "devices": [gpu], "timestamp": "1"},
        {"pid": 1, "devices": [gpu, {**gpu, "uuid": None, "token": "1"}], "timestamp": "2"},
        {"pid": 2, "devices": [{**gpu, "limit_bytes": 300}], "event": "policy_clamped", "timestamp": "3"},
        {"pid": 3, "devices": [gpu], "event": "policy_loaded"},
        {"pid": 4, "devices": None, "event": "policy_failed", "user": "bob", "timestamp": "4"},
    )
    rows = [(r.user, r.gpu, len(r.processes), r.clamped, r.failed, r.limit_bytes, r.last) for r in summarize(records)]
    assert rows == [
        ("alice", "1", 1, 0, 0, 100, "2"),
        ("alice", "GPU-a", 2, 1, 0, 300, "3"),
        ("bob", "", 1, 0, 1, None, "4"),
    ]


def test_reading_gives_back_what_was_written(log: Path) -> None:
    """A record that is read and encoded again is the same line."""
    assert b"".join(encode(record) for record in read([log], ALL, Tally())) == log.read_bytes()
