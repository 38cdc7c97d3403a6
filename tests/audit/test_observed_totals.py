"""What records say that programs would have lost under [observe], summed up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tfenv.audit import log_parts, observed_totals
from tfenv.audit.observed_totals import ObservedTotals, summarize_observed
from tfenv.audit.query import LineTally, RecordQuery
from tfenv.audit.record import ProcessFacts, RecordContext, encode_record, make_outcome_record
from tfenv.policy.model import DeviceOutcome, Origin, Outcome, Subject, WouldClamp

GIB = 1 << 30
HOLDER = Origin("machine", "/etc/tfgpu/tfgpu.toml", ("observe", "ceiling", "memory_limit"))


def encode(pid: int, user: str = "alice", gpu: str = "GPU-a", has: int = 8, would_have: int = 4, **more: Any) -> bytes:
    """Return a line of a process that has so many GiB and would have fewer."""
    lost = WouldClamp(
        "memory_limit", f"{has}.0 GiB", f"{would_have}.0 GiB", gpu, has * GIB, would_have * GIB, (HOLDER,)
    )
    device = DeviceOutcome(0, "0", gpu, "H100", limit=has * GIB)
    process = ProcessFacts(pid, 1, "node1", "/srv/train.py", "3.11.7", "tensorflow", start_ticks=7)
    outcome = Outcome("applied", "x", (device,), would_clamp=(lost,) if would_have < has else ())
    record = make_outcome_record(RecordContext(process, Subject(user, 1000)), outcome).as_dict()
    return encode_record({**record, "timestamp": f"2026-11-05T09:00:{pid % 60:02}.000000Z", **more})


def read(log: Path, *lines: bytes, query: RecordQuery = RecordQuery(), **options: Any) -> list[ObservedTotals]:  # noqa: B008 - it is frozen
    log.write_bytes(b"".join(lines))
    return summarize_observed([log], query, LineTally(), **options)


def test_a_process_counts_once_for_each_user_key_and_gpu(tmp_path: Path) -> None:
    """The most that one has and the least that one would have are kept, with the keys and the newest time."""
    lines = (encode(1), encode(1), encode(2, has=12, would_have=2), encode(3, "bob"), encode(4, "bob", would_have=8))
    alice, bob = read(tmp_path / "log", *lines)
    assert (alice.user, len(alice.processes), alice.has, alice.would_have) == ("alice", 2, "12.0 GiB", "2.0 GiB")
    assert (alice.held_by, alice.last[17:19]) == ({str(HOLDER)}, "02")
    assert (bob.user, len(bob.processes)) == ("bob", 1)


def test_a_process_id_that_comes_again_is_another_process(tmp_path: Path) -> None:
    """Host and start tell processes apart that have the same number."""
    (row,) = read(tmp_path / "log", encode(1), encode(1, start_ticks=8), encode(1, host="node2"))
    assert len(row.processes) == 3


@pytest.mark.parametrize(
    ("query", "users"),
    [
        (RecordQuery(users=frozenset({"bob"})), ["bob"]),
        (RecordQuery(gpus=frozenset({"GPU-b"})), ["bob"]),
        (RecordQuery(gpus=frozenset({"name:H*"})), ["alice", "bob"]),
        (RecordQuery(since="2026-11-05T09:00:02"), ["bob"]),
        (RecordQuery(until="2026-11-05T09:00:02"), ["alice"]),
        (RecordQuery(script="*.sh"), []),
        (RecordQuery(hosts=frozenset({"node1"})), ["alice", "bob"]),
        (RecordQuery(hosts=frozenset({"node2"})), []),
        (RecordQuery(jobs=frozenset({"14"})), []),
    ],
    ids=str,
)
def test_filters_choose_records(tmp_path: Path, query: RecordQuery, users: list[str]) -> None:
    """The filters of the other reports hold here, too."""
    assert [row.user for row in read(tmp_path / "log", encode(1), encode(3, "bob", "GPU-b"), query=query)] == users


def test_jobs_are_counted_apart_if_asked(tmp_path: Path) -> None:
    """With `by_job` there is a row for each."""
    lines = [encode(number, job={"scheduler": "slurm", "id": str(number)}) for number in (14, 15)]
    assert [row.job for row in read(tmp_path / "log", *lines, by_job=True)] == ["14", "15"]


@pytest.mark.parametrize("has_msgspec", [True, False])
def test_parts_and_flushes_change_no_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_msgspec: bool) -> None:
    """The sums are those of one reading, however the log is cut, whatever is remembered, with msgspec and without."""
    lines = [encode(pid, f"user{pid % 3}", has=8 + pid % 5) for pid in range(60)]
    whole = read(tmp_path / "log", *lines)
    monkeypatch.setattr(log_parts, "_SMALLEST_PART_BYTES", 3000)
    monkeypatch.setattr(observed_totals, "_MOST_GROUPS", 2)
    if not has_msgspec:
        monkeypatch.setitem(__import__("sys").modules, "msgspec", None)
    assert [row.as_dict() for row in read(tmp_path / "log", *lines)] == [row.as_dict() for row in whole]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
LOSS = st.dictionaries(st.sampled_from(["key", "gpu", "asked", "given", "asked_bytes", "given_bytes"]), ANYTHING)


@given(st.lists(LOSS | ANYTHING, max_size=3) | ANYTHING, ANYTHING, st.binary(max_size=20))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_records_of_any_shape_are_read(tmp_path: Path, losses: Any, user: Any, junk: bytes) -> None:
    """What anybody may have written into a log ends no summary."""
    line = json.dumps({"timestamp": "1", "event": "policy_applied", "user": user, "would_clamp": losses})
    rows = read(tmp_path / "log", line.encode() + b"\n", junk + b'"would_clamp"\n')
    assert all(isinstance(row.as_dict(), dict) for row in rows)
