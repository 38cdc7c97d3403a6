from __future__ import annotations

import gzip
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tfenv.audit import prometheus, rotation
from tfenv.audit.prometheus import ForeignFileError, export_totals
from tfenv.audit.query import LineTally

WriteLog = Callable[..., "list[dict[str, Any]]"]
Figures = Callable[[], dict[str, str]]
GPU = {"index": 0, "token": "0", "uuid": "GPU-a", "name": "H100", "limit_bytes": 100, "limit_fraction": None}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "collector" / "tfgpu.prom"


@pytest.fixture
def figures(log: Path, target: Path) -> Figures:
    """Export, and return each series with its value."""
    target.parent.mkdir()

    def run() -> dict[str, str]:
        tally = LineTally()
        export_totals(target, [log], tally)
        assert tally.left_out == {}
        lines = [line for line in target.read_text().split("\n") if line and not line.startswith("#")]
        return dict(line.rsplit(" ", 1) for line in lines)

    return run


def count_applied(figures: Figures) -> str | None:
    return figures().get('tfgpu_policy_applied_total{user="alice",gpu="GPU-a"}')


def append_records(log: Path, write_log: WriteLog, *differences: dict[str, Any]) -> None:
    new = log.with_name("new")
    write_log(new, *differences)
    with log.open("ab") as file:
        file.write(new.read_bytes())


def test_each_event_has_its_counter(log: Path, write_log: WriteLog, figures: Figures) -> None:
    """Records are counted by user and GPU, one with two GPUs once for each. Losses and the newest time are there."""
    write_log(
        log,
        {"devices": [GPU, {**GPU, "uuid": "GPU-b"}], "timestamp": "2026-11-05T08:00:00.500000Z"},
        {"devices": [GPU], "event": "policy_clamped", "lost": 3},
        {"devices": None, "event": "policy_failed", "user": "bob", "timestamp": "2026-11-05T07:00:00.000000Z"},
        {"event": "policy_loaded", "timestamp": "of another program"},
        {"event": "policy_disabled", "lost": 2},
        {"event": "policy_changed"},
        {"event": "of a later version"},
    )
    with log.open("ab") as file:
        file.write(b"hello\n")
    found = figures()
    newest = float(found.pop("tfgpu_last_record_timestamp_seconds"))
    assert newest > 1762329600.5  # 2026-11-05T08:00:00.5Z; those without a time of their own are of today
    assert found == {
        'tfgpu_policy_loaded_total{user="alice"}': "1",
        'tfgpu_policy_applied_total{user="alice",gpu="GPU-a"}': "1",
        'tfgpu_policy_applied_total{user="alice",gpu="GPU-b"}': "1",
        'tfgpu_policy_clamped_total{user="alice",gpu="GPU-a"}': "1",
        'tfgpu_policy_failed_total{user="bob",gpu=""}': "1",
        'tfgpu_policy_disabled_total{user="alice"}': "1",
        'tfgpu_policy_changed_total{user="alice"}': "1",
        "tfgpu_records_lost_total": "5",
        "tfgpu_unreadable_lines_total": "1",
    }


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
@pytest.mark.parametrize("empty", [True, False])
def test_promtool_finds_nothing_to_say(
    log: Path, target: Path, write_log: WriteLog, figures: Figures, *, empty: bool
) -> None:
    """The file passes Prometheus's own check, also before there is any record, and with hostile names in it."""
    users = ["alice", 'a"b', "back\\slash\\", "line\nbreak", "böb", "\ud800", "{}", " "]
    write_log(log, *({"user": user, "devices": [GPU]} for user in users[: 0 if empty else None]))
    log.touch()
    figures()
    with target.open("rb") as file:
        checked = subprocess.run(["promtool", "check", "metrics"], stdin=file, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_names_come_back_as_they_were(log: Path, write_log: WriteLog, figures: Figures) -> None:
    """What has to be escaped in a label goes on being one series."""
    names = ["\ud800", 'a"b', "back\\slash\\", "back\\nslash", "line\nbreak", "}", "a,b", "\u2028", "\x85"]
    for times in ("1", "2", "3"):
        append_records(log, write_log, *({"user": name, "devices": [GPU]} for name in names))
        counted = [value for name, value in figures().items() if name.startswith("tfgpu_policy_applied_total")]
        assert counted == [times] * len(names)


def test_only_what_is_new_is_counted(log: Path, write_log: WriteLog, figures: Figures) -> None:
    """Exporting again adds nothing. A record that was added is added once. Half a line is left for the next time."""
    append_records(log, write_log, {"devices": [GPU]})
    assert [count_applied(figures), count_applied(figures)] == ["1", "1"]
    append_records(log, write_log, {"devices": [GPU]}, {"devices": [GPU]})
    whole = log.read_bytes()
    log.write_bytes(whole[:-100])
    assert count_applied(figures) == "2"
    log.write_bytes(whole)
    assert count_applied(figures) == "3"
    assert figures()["tfgpu_unreadable_lines_total"] == "0"


def rename(log: Path) -> None:
    log.rename(log.with_name("audit.jsonl.1"))


def copytruncate(log: Path) -> None:
    shutil.copy(log, log.with_name("audit.jsonl.1"))
    os.truncate(log, 0)


def compress(log: Path) -> None:
    log.with_name("audit.jsonl.1.gz").write_bytes(gzip.compress(log.read_bytes()))
    log.unlink()


@pytest.mark.parametrize("rotate", [rename, copytruncate, compress])
def test_rotation_counts_nothing_twice_and_nothing_away(
    log: Path, write_log: WriteLog, figures: Figures, rotate: Callable[[Path], None]
) -> None:
    """What was counted stays counted wherever it goes, what was added before the rotation is counted behind it."""
    append_records(log, write_log, {"devices": [GPU], "pid": 1})
    assert count_applied(figures) == "1"
    append_records(log, write_log, {"devices": [GPU], "pid": 2})
    rotate(log)
    append_records(log, write_log, {"devices": [GPU], "pid": 3})
    assert count_applied(figures) == "3"
    for old in log.parent.glob("audit.jsonl.*"):
        old.unlink()  # logrotate's oldest
    append_records(log, write_log, {"devices": [GPU], "pid": 4})
    assert count_applied(figures) == "4"


def test_two_logs_with_the_same_records_are_two(log: Path, target: Path, write_log: WriteLog, figures: Figures) -> None:
    """How far a log is read is kept by its path. One that is not named this time is not forgotten."""
    other = log.with_name("other.jsonl")
    for path in (log, other):
        write_log(path, {"devices": [GPU], "pid": 1, "timestamp": "2026-11-05T08:00:00.500000Z"})
    assert count_applied(figures) == "1"
    export_totals(target, [other], LineTally())
    export_totals(target, [log, other], LineTally())
    assert count_applied(figures) == "2"


def test_a_damaged_log_is_counted_once(log: Path, write_log: WriteLog, figures: Figures) -> None:
    """A compressed file that was cut off, or holds something else, is one unreadable line, not one each time."""
    write_log(log, *({"devices": [GPU], "pid": pid} for pid in range(200)))
    log.with_name("audit.jsonl.1.gz").write_bytes(gzip.compress(log.read_bytes())[:-20])
    log.with_name("audit.jsonl.2.gz").write_bytes(b"not compressed")
    log.unlink()
    first = figures()
    assert first["tfgpu_unreadable_lines_total"] == "2"
    assert figures() == first


def test_the_file_is_replaced_in_one_step(target: Path, log: Path, write_log: WriteLog, figures: Figures) -> None:
    """Who reads the old file while the new one is written sees all of it. Nothing else is left in the directory."""
    append_records(log, write_log, {"devices": [GPU]})
    figures()
    with target.open() as before:
        append_records(log, write_log, {"devices": [GPU]})
        figures()
        assert 'gpu="GPU-a"} 1\n' in before.read()
    assert [path.name for path in target.parent.iterdir()] == ["tfgpu.prom"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_a_directory_that_is_full_keeps_the_old_figures(
    target: Path, log: Path, write_log: WriteLog, figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the new file cannot be written, the old one stays as it was, with nothing beside it."""
    append_records(log, write_log, {"devices": [GPU]})
    figures()
    before = target.read_bytes()
    append_records(log, write_log, {"devices": [GPU]})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        figures()
    assert (target.read_bytes(), len(list(target.parent.iterdir()))) == (before, 1)
    monkeypatch.undo()
    assert count_applied(figures) == "2"


@pytest.mark.parametrize("content", ["import tensorflow\n", "# HELP node_x y\n"])
def test_a_file_of_something_else_is_refused(log: Path, target: Path, figures: Figures, content: str) -> None:
    """What was not written by an export is not overwritten."""
    log.touch()
    target.write_text(content)
    with pytest.raises(ForeignFileError):
        figures()
    assert target.read_text() == content


def test_a_file_that_was_changed_by_hand_is_refused(log: Path, target: Path, figures: Figures) -> None:
    """Where the place that was reached cannot be read any more, totals would be wrong."""
    log.touch()
    figures()
    target.write_text(target.read_text().replace("{", "["))
    with pytest.raises(ForeignFileError, match="restart the totals"):
        figures()


def test_labels_are_bounded(log: Path, write_log: WriteLog, figures: Figures, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many users there are, a counter has a bounded number of series. What comes later is counted together."""
    monkeypatch.setattr(prometheus, "_MOST_SERIES", 3)
    for _ in range(2):
        append_records(log, write_log, *({"user": f"user{number}", "devices": [GPU]} for number in range(6)))
    found = {name: value for name, value in figures().items() if "applied" in name}
    assert len(found) == 4
    assert found['tfgpu_policy_applied_total{user="other",gpu="other"}'] == "6"
    assert found['tfgpu_policy_applied_total{user="user0",gpu="GPU-a"}'] == "2"


def test_a_compressed_log_without_end_is_counted_once(
    log: Path, write_log: WriteLog, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands before the bound is counted the first time and not again. The file is named."""
    monkeypatch.setattr(rotation, "_MOST_EXPANDED_BYTES", 1 << 20)
    target.parent.mkdir()
    write_log(log, {"devices": [GPU]})
    bomb = log.with_name("audit.jsonl.1.gz")
    bomb.write_bytes(gzip.compress(log.read_bytes() + b"\n" * (8 << 20)))
    log.unlink()
    tallies = [LineTally(), LineTally()]
    for tally in tallies:
        export_totals(target, [log], tally)
    assert list(tallies[0].left_out) == [bomb]
    assert 'tfgpu_policy_applied_total{user="alice",gpu="GPU-a"} 1\n' in target.read_text()
    assert "tfgpu_unreadable_lines_total 0\n" in target.read_text()


def test_too_many_jobs_are_counted_as_the_users_other_jobs(log: Path, write_log: WriteLog, target: Path) -> None:
    """A label for each job fills no server: the user stays known, and the sum is right."""
    target.parent.mkdir()
    write_log(log, *({"event": "policy_loaded", "job": {"id": str(number)}} for number in range(1002)))
    export_totals(target, [log], LineTally(), by_job=True)
    series = [line for line in target.read_text().split("\n") if line.startswith("tfgpu_policy_loaded_total{")]
    assert len(series) == 1001
    assert 'tfgpu_policy_loaded_total{user="alice",job="other"} 2' in series
