from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tfenv.audit.query import LineTally, RecordQuery, parse_moment, read_newest, read_records, select_records
from tfenv.audit.record import encode_record

WriteLog = Callable[..., "list[dict[str, Any]]"]
ALL = RecordQuery()


def read_pids(path: Path, query: RecordQuery = ALL, tally: LineTally | None = None) -> list[int]:
    return [record["pid"] for record in read_records([path], query, tally or LineTally())]


@pytest.fixture
def log(tmp_path: Path, write_log: WriteLog) -> Path:
    """Four records that differ in all that can be asked for."""
    path = tmp_path / "log"
    write_log(
        path,
        {"pid": 1, "timestamp": "2026-11-05T08:00:00.000000Z", "event": "policy_loaded", "status": "failed"},
        {"pid": 2, "timestamp": "2026-11-05T09:00:00.000000Z", "user": "böb", "uid": 77, "status": "clamped"},
        {
            "pid": 3,
            "timestamp": "2026-11-05T10:00:00.000000Z",
            "project": "/srv/visionary",
            "script": "/opt/x.py",
            "devices": [{"token": "0"}, {"token": "7"}],
        },
        {
            "pid": 4,
            "timestamp": "2026-11-05T11:00:00.000000Z",
            "project": None,
            "script": "/srv/vision/sub/train.py",
            "devices": [{"token": "0", "uuid": "GPU-abcd", "name": "NVIDIA H100"}],
        },
    )
    return path


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (RecordQuery(), [1, 2, 3, 4]),
        (RecordQuery(events=frozenset({"policy_loaded"})), [1]),
        (RecordQuery(users=frozenset({"böb"})), [2]),
        (RecordQuery(users=frozenset({"böb", "alice"})), [1, 2, 3, 4]),
        (RecordQuery(uids=frozenset({77})), [2]),
        (RecordQuery(uids=frozenset({7})), []),
        (RecordQuery(outcomes=frozenset({"clamped", "failed"})), [1, 2]),
        (RecordQuery(project="/srv/vision"), [1, 2, 4]),
        (RecordQuery(project="/"), [1, 2, 3, 4]),
        (RecordQuery(script="train.py"), [4]),
        (RecordQuery(script="/opt/*"), [3]),
        (RecordQuery(since="2026-11-05T10:00:00.000000Z"), [3, 4]),
        (RecordQuery(until="2026-11-05T10:00:00.000000Z"), [1, 2]),
        (RecordQuery(since="2026-11-05T09:00:00.000000Z", until="2026-11-05T11:00:00.000000Z"), [2, 3]),
        (RecordQuery(gpus=frozenset({"GPU-abc"})), [4]),
        (RecordQuery(gpus=frozenset({"7", "name:*H1*"})), [3, 4]),
        (RecordQuery(gpus=frozenset({"GPU-"}), users=frozenset({"böb"})), []),
        (RecordQuery(since="2026-11-05T08:30:00.000000Z", users=frozenset({"alice"})), [3, 4]),
    ],
    ids=lambda value: "query" if isinstance(value, RecordQuery) else str(value),  # the order of a set is no name
)
def test_a_query_finds_what_it_asks_for(log: Path, query: RecordQuery, found: list[int]) -> None:
    """Every filter alone, and two together."""
    assert read_pids(log, query) == found


@settings(suppress_health_check=list(HealthCheck))
@given(st.text(max_size=8), st.text(max_size=8), st.integers(0, 99), st.booleans())
def test_the_quick_look_at_the_bytes_never_changes_the_answer(user: str, other: str, uid: int, spaced: bool) -> None:
    """What is skipped without parsing would not have matched, whatever the names and however JSON is spaced."""
    record = {"timestamp": "2026-11-05T08:00:00.000000Z", "event": "policy_applied", "user": user, "uid": uid}
    line = json.dumps(record, ensure_ascii=not spaced, separators=(", ", ": ") if spaced else (",", ":"))
    for query in (RecordQuery(users=frozenset({other})), RecordQuery(users=frozenset({user}), uids=frozenset({uid}))):
        assert bool(list(select_records([line.encode()], query, LineTally()))) == query.matches(record)


def test_torn_and_foreign_lines_are_counted_and_skipped(log: Path) -> None:
    """Half records, other programs' lines, zeros and JSON that is no record are counted. Empty lines are not."""
    whole = log.read_bytes()
    junk = [b"hello", b'{"a":1}', b"[]", b"\0" * 50, b"\xff\xfe", b"[" * 9000, whole[:90]]
    log.write_bytes(b"\n".join([*junk, b"", b"  "]) + b"\n" + whole)
    tally = LineTally()
    assert read_pids(log, ALL, tally) == [1, 2, 3, 4]
    assert tally.unreadable == len(junk)


def test_a_record_behind_a_torn_one_is_found(log: Path) -> None:
    """Where a killed writer left half a line, the whole record that follows on the same line is read."""
    first, *others = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(first[:120] + b"".join([first, *others]))
    tally = LineTally()
    assert read_pids(log, ALL, tally) == [1, 2, 3, 4]
    assert tally.unreadable == 1


def test_a_record_in_time_behind_a_torn_one_that_is_not(log: Path) -> None:
    """`since` and `until` go by each record's own time."""
    records = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(records[0][:120] + records[3] + records[3][:120] + records[0])
    tally = LineTally()
    assert read_pids(log, RecordQuery(since="2026-11-05T10:30:00.000000Z"), tally) == [4]
    assert read_pids(log, RecordQuery(until="2026-11-05T08:30:00.000000Z"), tally) == [1]


def test_the_last_line_needs_no_newline(log: Path) -> None:
    """A log that was copied without its last byte keeps its last record."""
    log.write_bytes(log.read_bytes()[:-1])
    assert read_pids(log) == [1, 2, 3, 4]


def test_a_file_of_zeros_is_read_without_collecting_it(tmp_path: Path, log: Path) -> None:
    """A sparse file of many megabytes without a newline is some unreadable lines."""
    whole = log.read_bytes()
    with log.open("wb") as file:
        file.truncate(50 << 20)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + whole)
    tally = LineTally()
    assert read_pids(log, ALL, tally)[-4:] == [1, 2, 3, 4]
    assert tally.unreadable > 0
    assert [record["pid"] for record in read_newest([log], ALL, LineTally(), 4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_last_is_the_newest_oldest_first(log: Path, count: int) -> None:
    """The newest records, in the order of time."""
    assert [record["pid"] for record in read_newest([log], ALL, LineTally(), count)] == [1, 2, 3, 4][
        max(0, 4 - count) :
    ]


def test_last_of_a_long_log_reads_only_its_end(tmp_path: Path, write_log: WriteLog) -> None:
    """The newest records of a log with a damaged beginning are found without meeting the damage."""
    path = tmp_path / "log"
    write_log(path, *({"pid": number, "project": "p" * 900} for number in range(500)))
    path.write_bytes(b"damage\n" + path.read_bytes())
    tally = LineTally()
    assert [record["pid"] for record in read_newest([path], ALL, tally, 200)] == list(range(300, 500))
    assert tally.unreadable == 0


def test_last_of_several_logs_is_merged_by_time(tmp_path: Path, write_log: WriteLog) -> None:
    """Records of two logs come in one order."""
    for name, hours in (("a", (1, 3)), ("b", (2, 4))):
        write_log(tmp_path / name, *({"pid": hour, "timestamp": f"2026-11-05T0{hour}:00:00.0Z"} for hour in hours))
    assert [record["pid"] for record in read_newest([tmp_path / "a", tmp_path / "b"], ALL, LineTally(), 3)] == [2, 3, 4]


def test_a_log_that_was_last_changed_too_long_ago_is_not_read(log: Path) -> None:
    """No record is younger than the file's last change, give or take what two machines' clocks may differ by."""
    since = RecordQuery(since="2026-11-05T09:30:00.000000Z")
    for changed, found in (("08:29", []), ("08:31", [3, 4])):
        moment = datetime.fromisoformat(f"2026-11-05T{changed}:00+00:00").timestamp()
        os.utime(log, (moment, moment))
        assert read_pids(log, since) == found
        assert [record["pid"] for record in read_newest([log], since, LineTally(), 9)] == found


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
    """A duration counts back from now. A time keeps its zone."""
    assert parse_moment(text, datetime(2026, 11, 5, 12, tzinfo=timezone.utc)) == moment


@pytest.mark.parametrize("text", ["", "yesterday", "2 hours ago", "-1h", "999999999d", "2026-13-01"])
def test_since_says_what_would_be_right(text: str) -> None:
    """What is neither a duration nor a time is refused with examples."""
    with pytest.raises(ValueError, match="write"):
        parse_moment(text)


def test_reading_gives_back_what_was_written(log: Path) -> None:
    """A record that is read and encoded again is the same line."""
    assert b"".join(encode_record(record) for record in read_records([log], ALL, LineTally())) == log.read_bytes()
