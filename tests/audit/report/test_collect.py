"""Reading logs for the report: the sums are those of the records, whatever their order and the parts of the logs."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.audit.report.records import CARD, GIB, MONDAY, Run, collect, make_device, make_record, write_log
from tfenv.audit import log_parts
from tfenv.audit.query import LineTally, RecordQuery
from tfenv.audit.report.collect import Collection
from tfenv.audit.report.times import BIN_MS, LocalClock
from tfenv.audit.report.totals import TimeBins, sum_bins
from tfenv.audit.report.view import make_view

pytest.importorskip("msgspec", reason="of the extra report")

DAY = 86_400_000
OTHER_CARD = "GPU-b0fa4e00-0000-4000-8000-000000000000"

runs = st.builds(
    Run,
    user=st.sampled_from(["alice", "bob"]),
    host=st.sampled_from(["gpu1", "gpu2"]),
    begin=st.integers(0, 3 * DAY),
    length=st.integers(0, 5 * DAY),
    has_end=st.booleans(),
    gpus=st.sampled_from([(), (CARD,), (OTHER_CARD,), (CARD, OTHER_CARD)]),
    peak=st.sampled_from([None, 0, GIB, 8 * GIB]),
    waited_ms=st.sampled_from([None, 0, 999, 1000, 600_000]),
    clamps=st.integers(0, 3),
)
several_runs = st.lists(runs, max_size=8).map(
    lambda found: [Run(**{**vars(run), "pid": 100 + number % 3, "ticks": number}) for number, run in enumerate(found)]
)


def collect_in_parts(log: Path, part_bytes: int) -> Collection:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(log_parts, "_SMALLEST_PART_BYTES", part_bytes)
        monkeypatch.setattr(log_parts, "_count_cores", lambda: 1 << 20)
        monkeypatch.setattr(log_parts, "_make_pool", lambda _: None)
        return collect(log)


def describe(collection: Collection) -> Any:
    """Return everything that the page shows, as values that can be compared."""
    view = make_view(collection, LocalClock())
    totals = collection.totals
    return {
        "view": [
            view.begin,
            view.end,
            view.heat,
            view.peaks,
            view.events,
            view.waits_by_day,
            view.waits_by_user,
            view.idle,
        ],
        "gpus": [
            (row.host, row.gpu, row.lanes, row.rest, row.rest_ms, row.totals.bins.list_bins()) for row in view.gpus
        ],
        "counts": [totals.processes, totals.still_open, totals.without_gpu, totals.idle_count, totals.idle_ms],
    }


@settings(max_examples=60, deadline=None)
@given(several_runs, st.randoms(use_true_random=False), st.sampled_from([300, 777, 4000]))
def test_sums_are_those_of_the_records(
    tmp_path_factory: pytest.TempPathFactory, found: list[Run], chosen: Any, part_bytes: int
) -> None:
    """Shuffled and in parts, the page has the same figures, and they are the sums over the processes."""
    log = tmp_path_factory.mktemp("log") / "audit.jsonl"
    records = [record for run in found for record in run.make_records()]
    in_order = collect(write_log(log, records))
    chosen.shuffle(records)
    shuffled = collect_in_parts(write_log(log, records), part_bytes)
    assert describe(shuffled) == describe(in_order)

    totals, events = shuffled.totals, shuffled.events
    lengths = [(run.length if run.has_end else 0) * len(run.gpus) for run in found]
    assert sum(row.ms for row in totals.gpus.values()) == sum(lengths) == sum(sum_bins(totals.gpus).values())
    assert sum(row.ms for row in totals.peaks.values()) == sum(lengths)
    assert totals.processes == len(found)
    assert totals.still_open == sum(not run.has_end for run in found)
    assert sum(events.causes.values()) == sum(run.clamps for run in found)
    assert sum(events.records.values()) == len(records)
    assert sum(map(len, totals.waits.values())) == sum(run.waited_ms is not None for run in found)
    view = make_view(shuffled, LocalClock())
    assert sum(map(sum, view.heat)) == sum(lengths)
    assert sum(row.rest_ms + sum(bar.ms for _, bar in row.lanes) for row in view.gpus) == sum(lengths)
    assert (
        sum(sum(by_cause.values()) for by_cause in view.events["clamped"].counts.values())
        == view.events["clamped"].total
    )


@given(st.lists(st.tuples(st.integers(0, 50 * BIN_MS), st.integers(0, 50 * BIN_MS)), max_size=10))
def test_bins_hold_each_millisecond_once(intervals: list[tuple[int, int]]) -> None:
    """What falls into the half hours is what was added, bin by bin."""
    bins, expected = TimeBins(), Counter[int]()
    for begin, length in intervals:
        bins.add_interval(begin, begin + length)
        for number in range(begin // BIN_MS, (begin + length) // BIN_MS + 1):
            expected[number] += max(0, min(begin + length, (number + 1) * BIN_MS) - max(begin, number * BIN_MS))
    assert bins.list_bins() == {number: ms for number, ms in sorted(expected.items()) if ms}


def test_one_process_in_two_logs_counts_once(tmp_path: Path) -> None:
    """Records that stand in two logs are of one process, which has its GPU once."""
    records = Run().make_records()
    collection = collect(write_log(tmp_path / "a", records), write_log(tmp_path / "b", records))
    assert [(row.processes, row.ms) for row in collection.totals.gpus.values()] == [(1, 3_600_000)]


def test_rotated_and_compressed_logs(tmp_path: Path) -> None:
    """A process that began in a log that was rotated away ends in the next one."""
    first, *_, last = Run().make_records()[1:]
    with gzip.open(tmp_path / "audit.jsonl.2.gz", "wt") as file:
        file.write(json.dumps(first))
    log = write_log(tmp_path / "audit.jsonl", [last])
    collection = collect(log, tmp_path / "audit.jsonl.2.gz")
    assert [(row.processes, row.ms, row.still_open) for row in collection.totals.gpus.values()] == [(1, 3_600_000, 0)]


def test_users_and_times(tmp_path: Path) -> None:
    """Only the wanted user counts, and only from the wanted time on."""
    log = write_log(
        tmp_path / "log", [*Run().make_records(), *Run(user="bob", ticks=2, begin=-1000, length=5000).make_records()]
    )
    of_bob = collect(log, query=RecordQuery(users=frozenset({"bob"})))
    assert list(of_bob.totals.peaks) == [("bob", "gpu1", CARD)]
    late = collect(log, query=RecordQuery(since="2025-11-03T00:00:02.000000Z"))
    assert {key[0]: row.ms for key, row in late.totals.peaks.items()} == {"alice": 3_598_000, "bob": 2000}


@pytest.mark.parametrize(
    "fields",
    [
        {"pid": "x", "host": 3, "user": None},
        {"devices": "x", "choice": [], "cut": 7, "findings": {}, "would_clamp": 1, "job": 9},
        {"repeats": -5, "duration_ms": -1, "lost": "many", "script": ["x"]},
        {"repeats": 1 << 80, "duration_ms": 1e300, "pid": 1 << 70, "start_ticks": 1 << 70},
        {
            "devices": [{"uuid": {"a": 1}, "limit_bytes": 1e300, "peak_bytes": -3, "name": 5}],
            "choice": {"waited_ms": "x"},
        },
        {"would_clamp": [{"key": 5}, 7], "cut": [None], "framework": 3},
    ],
)
@pytest.mark.parametrize("event", ["applied", "clamped", "ended", "failed"])
def test_records_of_others(tmp_path: Path, event: str, fields: dict[str, Any]) -> None:
    """Whatever stands in a record, it is read as far as it makes sense, and the page can be made."""
    log = write_log(tmp_path / "log", [make_record(event, MONDAY, **fields)])
    collection = collect(log)
    assert sum(collection.events.records.values()) + collection.events.misdated == 1
    make_view(collection, LocalClock())


@pytest.mark.parametrize("time", ["1970-01-01T00:00:00.000000Z", "2099-01-01T00:00:00.000000Z", "yesterday", ""])
def test_a_time_that_cannot_be_right_is_counted(tmp_path: Path, time: str) -> None:
    """A record of a machine whose clock was wrong is left out, and said."""
    log = write_log(tmp_path / "log", [{**make_record("applied", MONDAY), "timestamp": time}])
    collection = collect(log)
    assert (collection.events.misdated, collection.totals.processes) == (1, 0)


def test_lines_that_are_no_records_are_counted(tmp_path: Path) -> None:
    """Torn and foreign lines cost nothing but themselves."""
    log = tmp_path / "log"
    whole = json.dumps(Run().make_records()[1])
    log.write_text(f"{whole}\n{whole[:100]}\nnonsense\n\n", encoding="utf-8")
    tally = LineTally()
    assert collect(log, tally=tally).totals.processes == 1
    assert tally.unreadable == 2


def test_causes(tmp_path: Path) -> None:
    """Clamps are counted by what was cut, failures by their codes, and what would be cut by its keys."""
    finding = {"code": "no-nvml", "severity": "error"}
    records = [
        make_record("clamped", MONDAY, cut=["memory_limit", "visible_devices"]),
        make_record("clamped", MONDAY, findings=[{"asked": "memory_limit = 70.0 GiB"}]),
        make_record("failed", MONDAY, findings=[finding, {"code": "x", "severity": "note"}], repeats=10),
        make_record("disabled", MONDAY),
        make_record("applied", MONDAY, would_clamp=[{"key": "memory_limit"}, {"key": "memory_limit"}]),
    ]
    view = make_view(collect(write_log(tmp_path / "log", records)), LocalClock())
    assert view.events["clamped"].causes == (("memory_limit", 1), ("memory_limit, visible_devices", 1))
    assert view.events["failed"].causes == (("no-nvml", 10), ("switched off (TFGPU_DISABLE)", 1))
    assert view.events["would_clamp"].causes == (("memory_limit", 1),)


def test_idle(tmp_path: Path) -> None:
    """Half an hour with less than a tenth of what a process might take is idle, and no peak is not known."""
    minute = 60_000
    cases = [
        Run(ticks=1, length=30 * minute, peak=0),
        Run(ticks=2, length=29 * minute, peak=0),
        Run(ticks=3, length=40 * minute, peak=GIB),
        Run(ticks=4, length=40 * minute, peak=None),
        Run(ticks=5, length=40 * minute, peak=8 * GIB // 10),
    ]
    totals = collect(write_log(tmp_path / "log", [record for run in cases for record in run.make_records()])).totals
    assert (totals.checked, totals.idle_count, totals.unmeasured) == (3, 2, 1)
    assert [idle.ms for idle in totals.idle] == [30 * minute, 40 * minute]


def test_too_many_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the log: the processes that were silent the longest are closed, counted and said."""
    monkeypatch.setattr("tfenv.audit.report.collect.MOST_PROCESSES", 10)
    found = [Run(ticks=number, begin=number * 1000, has_end=False) for number in range(50)]
    collection = collect(write_log(tmp_path / "log", [record for run in found for record in run.make_records()]))
    assert collection.totals.processes == 50
    assert collection.closed_early > 0


def test_a_card_without_a_size(tmp_path: Path) -> None:
    """A process without a limit on a card of unknown size is neither idle nor not."""
    devices = [make_device(limit=None, peak=5)]
    log = write_log(tmp_path / "log", [make_record("ended", MONDAY, devices=devices, duration_ms=4e6)])
    assert collect(log).totals.unmeasured == 1
