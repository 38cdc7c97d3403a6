from __future__ import annotations

import bz2
import gzip
import lzma
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tfenv.audit import rotation
from tfenv.audit.gpu_totals import summarize_logs
from tfenv.audit.query import LineTally, RecordQuery, read_newest, read_records
from tfenv.audit.rotation import LogOrigin, LogRefusedError, LogTail, find_all_log_files, find_log_files, open_log

WriteLog = Callable[..., "list[dict[str, Any]]"]
ALL = RecordQuery()


def test_rotated_logs_come_oldest_first(tmp_path: Path) -> None:
    """Numbers count down, dates up, the log itself is last. Other files are not taken for logs."""
    names = [
        "log.10.gz",
        "log.3.zst",
        "log.2.xz",
        "log.1",
        "log-2026-11-03.bz2",
        "log-20261104.gz",
        "log-20261105",
        "log",
    ]
    for name in [*names, "log.old", "log.1.swp", "log.1.zip", "other.1"]:
        (tmp_path / name).touch()
    assert [path.name for path in find_log_files(tmp_path / "log")] == names


def test_a_log_is_read_once_however_it_was_named(tmp_path: Path) -> None:
    """`--file log*` names a log and what was rotated away from it. One that is not there stays, and is an error."""
    for name in ("log", "log.1", "log.2.gz"):
        (tmp_path / name).touch()
    named = [tmp_path / name for name in ("log", "log.1", "log.2.gz", "gone")]
    assert find_all_log_files(named) == [tmp_path / name for name in ("log.2.gz", "log.1", "log", "gone")]


def compress_zstd(data: bytes) -> bytes:
    zstd = pytest.importorskip("backports.zstd", reason="Python 3.14 or tfenv[audit] brings it")
    packed: bytes = zstd.compress(data)
    return packed


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", compress_zstd)],
    ids=[".gz", ".bz2", ".xz", ".zst"],
)
def test_compressed_logs_are_read(
    tmp_path: Path, write_log: WriteLog, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    """Each compression is read like the log itself. A file that is cut off gives what it holds, and is counted."""
    log, packed = tmp_path / "log", tmp_path / f"log.1{suffix}"
    write_log(log, *({"pid": pid, "project": f"p{pid}" * 90} for pid in range(40)))
    packed.write_bytes(compress(log.read_bytes()))
    assert [record["pid"] for record in read_records([packed], ALL, LineTally())] == list(range(40))
    assert [record["pid"] for record in read_newest([packed, log], ALL, LineTally(), 80)][-1] == 39
    packed.write_bytes(packed.read_bytes()[:-15])
    tally = LineTally()
    assert len(list(read_records([packed], ALL, tally))) <= 40
    assert tally.unreadable >= 1
    packed.write_bytes(b"not compressed")
    assert list(read_records([packed], ALL, tally)) == []


def test_a_log_that_nothing_here_can_decompress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a module for it the file is told apart, and opening it says what would help."""
    for name in ("compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    log = tmp_path / "log.1.zst"
    log.touch()
    with pytest.raises(LogRefusedError, match=r"tfenv\[audit\]"):
        open_log(log)
    tally = LineTally()
    assert list(read_records([log], ALL, tally)) == []
    assert list(tally.left_out) == [log]


def test_old_compressed_logs_are_left_alone(tmp_path: Path, write_log: WriteLog) -> None:
    """Where the newest records are in newer files, an older one is not even opened."""
    write_log(tmp_path / "log", *({"pid": pid} for pid in range(5)))
    old = tmp_path / "log.1.gz"
    old.write_bytes(b"not compressed")
    os.utime(old, (0, 0))
    tally = LineTally()
    assert len(read_newest([old, tmp_path / "log"], ALL, tally, 5)) == 5
    assert tally.unreadable == 0
    read_newest([old, tmp_path / "log"], ALL, tally, 6)
    assert tally.unreadable == 1


def test_a_tail_gives_what_is_appended(tmp_path: Path) -> None:
    """Only whole lines, only new ones, also of a log that does not exist yet."""
    path = tmp_path / "log"
    tail = LogTail(path)
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
    tail = LogTail(path)
    assert (tail.poll(), tail.position) == ([], 4)
    tail.close()


def test_a_tail_survives_rotation(tmp_path: Path) -> None:
    """After rename and create: the rest of the old file, what a late writer adds to it, then the new one."""
    path = tmp_path / "log"
    path.write_bytes(b"old\n")
    tail = LogTail(path)
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
    tail = LogTail(path)
    path.write_bytes(b"1\n")
    assert tail.poll() == [b"1"]
    tail.close()


# ---- whose a log is


PLANTED = LogOrigin(is_trusted=False, name="~/logs/<uid>/audit.jsonl")


@pytest.mark.parametrize(
    ("name", "path", "owner"),
    [
        ("/var/log/tfgpu/<uid>.jsonl", "/var/log/tfgpu/1001.jsonl", 1001),
        ("/var/log/tfgpu/<uid>.jsonl", "/var/log/tfgpu/1001.jsonl.2.gz", 1001),
        ("/var/log/tfgpu/<uid>/audit.jsonl", "/var/log/tfgpu/1001/audit.jsonl-20261105", 1001),
        ("/var/log/<uid>/<uid>.jsonl", "/var/log/7/7.jsonl", 7),
        ("~/logs/<uid>.jsonl", "/home/alice/logs/5.jsonl", 5),
        ("/srv/2024/audit.jsonl", "/srv/2024/audit.jsonl", None),
        ("/srv/20261105.jsonl", "/srv/20261105.jsonl", None),
    ],
)
def test_whose_a_log_is_stands_where_the_policy_has_the_users_number(name: str, path: str, owner: int | None) -> None:
    """Numbers elsewhere in a path are no users."""
    assert LogOrigin(is_trusted=False, name=name).find_owner(Path(path)) == owner


@pytest.mark.parametrize("kind", ["fifo", "link", "directory", "socket"])
def test_what_is_no_log_is_refused_once_it_is_open(tmp_path: Path, kind: str) -> None:
    """A FIFO does not hang, a link is not followed, and neither descriptor stays open."""
    path = tmp_path / "log"
    (tmp_path / "real").write_bytes(b"secret\n")
    server = socket.socket(socket.AF_UNIX)
    make: dict[str, Callable[[], object]] = {
        "fifo": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(tmp_path / "real"),
        "directory": path.mkdir,
        "socket": lambda: server.bind(str(path)),
    }
    make[kind]()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(LogRefusedError, match="not a regular file"):
        open_log(path, PLANTED)
    assert os.listdir("/proc/self/fd") == before
    tail = LogTail(path, PLANTED)
    assert (tail.poll(), tail.refusal) == ([], "it is not a regular file")
    server.close()


def test_a_log_that_is_exchanged_after_it_was_found_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is what was opened: there is no moment between the look and the reading."""
    log = tmp_path / "5.jsonl"
    log.write_bytes(b"{}\n")
    os.chown(log, 5, 5)
    origin = LogOrigin(is_trusted=False, name=f"{tmp_path}/<uid>.jsonl")
    really_open = os.open

    def exchange_and_open(path: Path, flags: int) -> int:
        log.unlink()
        log.write_bytes(b"{}\n")
        os.chown(log, 6, 6)
        return really_open(path, flags)

    open_log(log, origin).close()
    monkeypatch.setattr(os, "open", exchange_and_open)
    with pytest.raises(LogRefusedError, match="belongs to uid 6, not to uid 5"):
        open_log(log, origin)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", compress_zstd)],
    ids=[".gz", ".bz2", ".xz", ".zst"],
)
def test_a_compressed_log_that_expands_without_end_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    """A small file of gigabytes is named, and read no further than any log would go. Others are read."""
    monkeypatch.setattr(rotation, "_MOST_EXPANDED_BYTES", 1 << 20)
    bomb = tmp_path / f"log.1{suffix}"
    bomb.write_bytes(compress(b"\n" * (8 << 20)))
    for read in (
        lambda tally: list(read_records([bomb], ALL, tally)),
        lambda tally: summarize_logs([bomb], ALL, tally),
    ):
        tally = LineTally()
        assert read(tally) == []
        assert (tally.unreadable, list(tally.left_out)) == (0, [bomb])
        assert "expands" in tally.left_out[bomb]
