"""Logs that are run through another policy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.audit.test_observed_totals import encode
from tfenv.audit import log_parts
from tfenv.audit.query import LineTally, RecordQuery
from tfenv.replay import run
from tfenv.replay.draft import read_draft
from tfenv.replay.run import ReplayResult, replay_logs

STUDENTS = '[group.students.ceiling]\nmemory_limit = "4GiB"\n'


def replay(
    folder: Path,
    *lines: bytes,
    text: str = STUDENTS,
    query: RecordQuery = RecordQuery(),  # noqa: B008 - it is frozen
    observed: bool = False,
) -> ReplayResult:
    (folder / "log").write_bytes(b"".join(lines))
    (folder / "tfgpu.toml").write_text(text)
    policy = read_draft(str(folder / "tfgpu.toml"), "2026-11-05")
    return replay_logs([folder / "log"], query, LineTally(), policy, observed=observed)


def tell(result: ReplayResult) -> list[tuple[str, str, str, int, str]]:
    rows = result.list_rows()
    return [(row.user, row.kind, row.gpu, len(row.programs), row.example.timestamp[17:19]) for row in rows]


def test_programs_are_counted_by_user_and_gpu(tmp_path: Path) -> None:
    """A process counts once, whatever it did. The newest is the example."""
    lines = [encode(1, groups=["students"]), encode(2, groups=["students"]), encode(2, groups=["students"])]
    lines += [encode(3, "bob", groups=[]), encode(4, "carol", "GPU-b", groups=["students"]), encode(5, devices=[])]
    result = replay(tmp_path, *lines)
    assert tell(result) == [("alice", "less", "GPU-a", 2, "02"), ("carol", "less", "GPU-b", 1, "04")]
    assert (len(result.programs), result.users, result.count("less")) == (4, {"alice", "bob", "carol"}, 3)
    example = result.list_rows()[0].example
    assert (example.host, example.pid, example.script) == ("node1", 2, "/srv/train.py")


@pytest.mark.parametrize(
    ("query", "users"),
    [
        (RecordQuery(users=frozenset({"bob"})), ["bob"]),
        (RecordQuery(uids=frozenset({1})), []),
        (RecordQuery(hosts=frozenset({"node1"})), ["alice", "bob"]),
        (RecordQuery(hosts=frozenset({"node2"})), []),
        (RecordQuery(gpus=frozenset({"GPU-b"})), ["bob"]),
        (RecordQuery(events=frozenset({"policy_clamped"})), []),
        (RecordQuery(events=frozenset({"policy_ended"})), []),
        (RecordQuery(since="2026-11-05T09:00:02"), ["bob"]),
        (RecordQuery(until="2026-11-05T09:00:02"), ["alice"]),
        (RecordQuery(script="train.py"), ["alice", "bob"]),
        (RecordQuery(project="/srv/other"), []),
    ],
    ids=str,
)
def test_filters_choose_records(tmp_path: Path, query: RecordQuery, users: list[str]) -> None:
    """The filters of the other reports hold here, too."""
    lines = encode(1, groups=["students"]), encode(3, "bob", "GPU-b", groups=["students"])
    assert [user for user, *_ in tell(replay(tmp_path, *lines, query=query))] == users


def make_lines() -> list[bytes]:
    """Return records of three users, of which some lack the size that others tell."""
    devices: list[dict[str, Any]] = [
        {"index": 0, "token": "0", "uuid": f"GPU-{gpu}", "name": "A100", "limit_bytes": 8 << 30, **total}
        for gpu in range(3)
        for total in ({}, {"total_bytes": 40 << 30})
    ]
    return [encode(pid, f"user{pid % 3}", groups=["students"], devices=[devices[pid % 6]]) for pid in range(60)]


@pytest.mark.parametrize("has_msgspec", [True, False])
def test_parts_change_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_msgspec: bool) -> None:
    """However the log is cut, and with msgspec or without, what one part lacks is known from another."""
    text = '[group.students.ceiling]\nmemory_limit = "10%"\n'
    whole = replay(tmp_path, *make_lines(), text=text)
    assert (whole.count("less"), whole.unknown) == (60, set())
    monkeypatch.setattr(log_parts, "_SMALLEST_PART_BYTES", 3000)
    if not has_msgspec:
        monkeypatch.setitem(sys.modules, "msgspec", None)
    assert tell(replay(tmp_path, *make_lines(), text=text)) == tell(whole)


def test_more_records_than_are_remembered_are_answered_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With little memory the answer is the same where each record holds all that it needs."""
    whole = replay(tmp_path, *make_lines())
    monkeypatch.setattr(run, "_MOST_GROUPS", 2)
    assert tell(replay(tmp_path, *make_lines())) == tell(whole)


def test_junk_ends_nothing(tmp_path: Path) -> None:
    """Lines that are no records are counted, and the others are answered."""
    junk = (b"junk", b'{"timestamp":"1","event":7}', b"[]", b"\x00\xff", b'{"timestamp":"1"', b"{" * 5000)
    (tmp_path / "log").write_bytes(b"\n".join([*junk, encode(1, groups=["students"])]))
    (tmp_path / "tfgpu.toml").write_text(STUDENTS)
    tally = LineTally()
    result = replay_logs([tmp_path / "log"], RecordQuery(), tally, read_draft(str(tmp_path / "tfgpu.toml")))
    assert (result.count("less"), tally.unreadable) == (1, len(junk))


def test_files_of_groups_and_users_count_for_their_own(tmp_path: Path) -> None:
    """A directory is read as /etc/tfgpu is, with all its files."""
    for name, limit in {"groups/students.toml": 4, "users/bob.toml": 2}.items():
        (tmp_path / "draft" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "draft" / name).write_text(f'[ceiling]\nmemory_limit = "{limit}GiB"\n')
    (tmp_path / "draft" / "tfgpu.toml").write_text('[project."/srv/x".ceiling]\nmemory_limit = "1GiB"\n')
    log = tmp_path / "log"
    log.write_bytes(
        encode(1, groups=["students"]) + encode(2, "bob", groups=[]) + encode(3, "carol", groups=[], project="/srv/x/y")
    )
    result = replay_logs([log], RecordQuery(), LineTally(), read_draft(str(tmp_path / "draft")))
    changes = {row.user: row.change.would_have for row in result.list_rows()}
    assert changes == {"alice": "4.0 GiB", "bob": "2.0 GiB", "carol": "1.0 GiB"}
