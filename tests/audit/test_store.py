"""A store of Parquet files: nothing twice, nothing lost, and the same totals as from the logs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfenv.audit.gpu_totals import summarize_logs
from tfenv.audit.query import LineTally, RecordQuery, read_records
from tfenv.audit.store import (
    Compaction,
    StoreBusyError,
    StoreError,
    compact_logs,
    is_store,
    list_record_files,
    read_store_lines,
    summarize_store,
)

ALL = RecordQuery()


def make_line(number: int, **fields: Any) -> str:
    record = {
        "timestamp": f"2026-11-0{1 + number % 3}T09:00:{number % 60:02}.{number:06}Z",
        "event": "policy_applied",
        "host": "node1",
        "user": "alice",
        "pid": number // 3,
        "devices": [{"index": 0, "uuid": "GPU-8932f937", "limit_bytes": 8 << 30, "limit_fraction": None}],
        **fields,
    }
    return json.dumps(record, separators=(",", ":")) + "\n"


def write_log(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("".join(lines))
    return path


def compact(logs: Sequence[Path], folder: Path) -> Compaction:
    return compact_logs(logs, folder, ALL, LineTally())


def list_lines(folder: Path) -> list[str]:
    return sorted(line.decode() for path in list_record_files(folder) for line in read_store_lines(path))


def test_each_record_is_in_the_store_once_as_it_was_written(tmp_path: Path) -> None:
    """Logs that grow, that are rotated, and that hold what others hold add what is new, byte for byte."""
    lines = [make_line(number) for number in range(30)]
    log, store = write_log(tmp_path / "a.jsonl", lines[:20]), tmp_path / "store"
    assert compact([log], store) == Compaction(20, 0, 0)
    assert compact([log], store) == Compaction(0, 0, 1)
    write_log(log, lines)
    assert compact([log], store) == Compaction(10, 20, 0)
    log.rename(tmp_path / "a.jsonl.1")
    other = write_log(tmp_path / "b.jsonl", [*lines[:5], make_line(99)])
    assert compact([tmp_path / "a.jsonl.1", other], store) == Compaction(1, 35, 0)
    assert list_lines(store) == sorted(line.strip() for line in (*lines, make_line(99)))


def test_a_record_of_a_damaged_line_is_kept_and_the_damage_counted(tmp_path: Path) -> None:
    """What stands behind a torn line is read alike from log and store."""
    log = write_log(tmp_path / "a.jsonl", ['{"timestamp":"2026-11-01T0' + make_line(1), "torn\n", make_line(2)])
    tally = LineTally()
    assert compact_logs([log], tmp_path / "store", ALL, tally).added == 2
    assert tally.unreadable == 2
    stored = list(read_records(list_record_files(tmp_path / "store"), ALL, LineTally()))
    logged = list(read_records([log], ALL, LineTally()))
    assert sorted(map(json.dumps, stored)) == sorted(map(json.dumps, logged))


def test_a_record_without_a_time_of_ours_has_a_place(tmp_path: Path) -> None:
    """Its day is unknown. It is neither lost nor the newest."""
    log = write_log(tmp_path / "a.jsonl", [make_line(1, timestamp="yesterday"), make_line(2)])
    compact([log], tmp_path / "store")
    assert (tmp_path / "store" / "records" / "day=unknown").is_dir()
    (row,) = summarize_store(tmp_path / "store", ALL).rows
    assert (row.process_count, row.last) == (1, "2026-11-03T09:00:02.000002Z")


def test_two_cannot_write_at_a_time(tmp_path: Path) -> None:
    """The second is told so, and the store stays as it is."""
    log, store = write_log(tmp_path / "a.jsonl", [make_line(1)]), tmp_path / "store"
    compact([log], store)
    hold = "fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    program = f"import fcntl; f = open({str(store / '.lock')!r}, 'w'); {hold}"
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(StoreBusyError, match="another process writes into it"):
        compact([write_log(tmp_path / "b.jsonl", [make_line(2)])], store)
    other.communicate(b"\n")
    assert list_lines(store) == [make_line(1).strip()]


def test_what_was_interrupted_goes_on(tmp_path: Path) -> None:
    """A run that was killed between the two kinds of rows left one. The next adds the other, and no row twice."""
    lines = [make_line(number) for number in range(9)]
    log, store = write_log(tmp_path / "a.jsonl", lines), tmp_path / "store"
    compact([log], store)
    for part in list_record_files(store):
        part.unlink()
    (store / "state.json").unlink()
    (store / ".work").mkdir()
    (store / ".work" / "part.parquet").write_text("half")
    assert compact([log], store) == Compaction(9, 0, 0)
    assert list_lines(store) == sorted(line.strip() for line in lines)
    (row,) = summarize_store(store, ALL).rows
    assert row.process_count == 3
    assert is_store(store)


def test_a_damaged_file_of_a_store_is_named(tmp_path: Path) -> None:
    """The summary ends with one line that names the store. The records of the other files are still read."""
    log, store = write_log(tmp_path / "a.jsonl", [make_line(number) for number in range(3)]), tmp_path / "store"
    compact([log], store)
    for kind in ("uses", "records"):
        (store / kind / "day=2026-11-02" / "part-000000.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(StoreError, match=str(store)):
        summarize_store(store, ALL)
    tally = LineTally()
    assert len(list(read_records(list_record_files(store), ALL, tally))) == 2
    assert [path.parent.name for path in tally.left_out] == ["day=2026-11-02"]


EVENTS = ["policy_applied", "policy_clamped", "policy_failed", "policy_ended", "policy_loaded"]
USERS, GPUS = ["alice", "bob", "o'hara"], ["GPU-1", "GPU-2"]
SIZES = st.none() | st.integers(0, 1 << 40)
DEVICES = st.builds(
    lambda uuid, limit, fraction, asked: {
        "uuid": uuid, "limit_bytes": limit, "limit_fraction": fraction, "asked_bytes": asked,
    },
    st.sampled_from(GPUS), SIZES, st.none() | st.floats(0, 1), SIZES,
)  # fmt: skip
RECORDS = st.fixed_dictionaries(
    {
        "event": st.sampled_from(
            ["policy_applied", "policy_clamped", "policy_failed", "policy_ended", "policy_loaded"]
        ),
        "user": st.sampled_from(USERS),
        "host": st.sampled_from(["node1", "node2"]),
        "pid": st.integers(1, 3),
        "devices": st.lists(DEVICES, max_size=2) | st.none(),
        "cut": st.lists(st.sampled_from(["memory_limit", "memory_growth"]), max_size=2),
        "repeats": st.integers(1, 5),
    }
)
QUERIES = st.builds(
    RecordQuery,
    events=st.sampled_from([frozenset(), frozenset({"policy_clamped"})]),
    users=st.sampled_from([frozenset(), frozenset({"o'hara"}), frozenset({"alice", "bob"})]),
    since=st.sampled_from(["", "2026-11-02T00:00:00.000000Z"]),
    until=st.sampled_from(["", "2026-11-02T09:00:10.000000Z"]),
)


# An example takes 0.2 s.
@settings(max_examples=min(settings().max_examples // 4, 100))
@given(records=st.lists(RECORDS, max_size=12), query=QUERIES)
def test_the_totals_are_those_of_the_logs(
    records: list[dict[str, Any]], query: RecordQuery, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the records and filters are, the store's rows and the logs' are the same."""
    folder = tmp_path_factory.mktemp("store")
    log = write_log(folder / "a.jsonl", [make_line(number, **record) for number, record in enumerate(records)])
    compact([log], folder / "store")
    stored = [row.as_dict() for row in summarize_store(folder / "store", query).rows]
    assert stored == [row.as_dict() for row in summarize_logs([log], query, LineTally())]


def test_reports_read_stores_directories_and_patterns(tmp_path: Path) -> None:
    """A directory stands for all logs in it, a pattern in quotes for what it matches, and a store for its records."""
    for host in ("node1", "node2"):
        (tmp_path / "hosts" / host).mkdir(parents=True)
        lines = [make_line(number, host=host, policy_revision="1.4", groups=[]) for number in range(6)]
        write_log(tmp_path / "hosts" / host / "audit.jsonl", lines)
    write_log(
        tmp_path / "hosts" / "node2" / "audit.jsonl.1", [make_line(8, host="node2", policy_revision="1.3", groups=[])]
    )
    audit("compact", "--into", str(tmp_path / "store"), "--file", str(tmp_path / "hosts"))
    named = [str(tmp_path / "hosts"), str(tmp_path / "hosts" / "*" / "audit.jsonl"), str(tmp_path / "store")]
    for name in named:
        summary = [json.loads(line) for line in audit("summary", "--format", "json", "--file", name).splitlines()]
        assert [(row["user"], row["processes"]) for row in summary] == [("alice", 5)]
        records = audit("--format", "json", "--host", "node2", "--file", name).splitlines()
        assert {json.loads(line)["host"] for line in records} == {"node2"}
        assert len(records) == 7
        rows = [json.loads(line) for line in audit("revisions", "--format", "json", "--file", name).splitlines()]
        assert [(row["host"], row["revision"], row["is_current"]) for row in rows] == [
            ("node1", "1.4", True), ("node2", "1.3", True), ("node2", "1.4", False),
        ]  # fmt: skip


@pytest.mark.parametrize("arguments", [["compact", "--into", "{0}"], ["summary", "--file", "{0}"], ["--file", "{0}"]])
def test_without_duckdb_it_is_said_what_to_install(arguments: list[str], tmp_path: Path) -> None:
    """The last line names the extra. Nothing is made."""
    store = tmp_path / "store"
    if arguments[0] != "compact":
        compact([write_log(tmp_path / "a.jsonl", [make_line(1)])], store)
    program = "import sys; sys.modules['duckdb'] = None; from tfenv.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "audit", *(argument.format(store) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env={"HOME": str(tmp_path)})
    assert done.returncode == (2 if arguments[0] == "compact" else 1)
    assert "tfenv[fleet]" in done.stderr.splitlines()[-1]
    assert store.exists() is (arguments[0] != "compact")


def audit(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tfenv", "audit", *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
