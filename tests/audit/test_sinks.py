from __future__ import annotations

import json
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.conftest import SimulatedGpus
from tfenv.audit import sinks as module
from tfenv.audit.query import LineTally, RecordQuery, read_records
from tfenv.audit.record import AuditRecord, RecordContext, encode_record, make_disabled_record
from tfenv.audit.rotation import find_log_files
from tfenv.audit.sinks import (
    COMPLAINED_VARIABLE,
    AuditLog,
    RefusedLogError,
    SyslogSink,
    append_line,
    expand_path,
    list_log_names,
)
from tfenv.policy.model import AuditSinks

DEFAULT_LOG = AuditSinks().default_log
CheckLine = Callable[[bytes], dict[str, Any]]
RunProgram = Callable[..., "subprocess.CompletedProcess[str]"]
LINE = b'{"timestamp":"x"}\n'
UID = os.geteuid()
as_root = pytest.mark.skipif(UID != 0, reason="needs root, to be somebody else or to mount a file system")


def make_log(*paths: Path, **more: Any) -> AuditLog:
    sinks = AuditSinks(stderr="none", files=tuple(map(str, paths)), default_file=False, **more)
    return AuditLog(sinks, home=None, uid=UID)


def read_whole_records(*paths: Path) -> list[dict[str, Any]]:
    """Return all records. Fail if any line is not one."""
    tally = LineTally()
    records = list(read_records(paths, RecordQuery(), tally))
    assert tally.unreadable == 0
    return [dict(record) for record in records]


# ---- one event, one write


def test_an_event_is_one_valid_line(tmp_path: Path, applied: AuditRecord, check_line: CheckLine) -> None:
    """A record arrives in the log as one line that the schema accepts, in a file only its owner may read."""
    path = tmp_path / "audit.jsonl"
    make_log(path).emit(applied)
    assert check_line(path.read_bytes())["event"] == "policy_applied"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_event_is_one_write(tmp_path: Path, python: RunProgram) -> None:
    """Each event reaches the kernel by exactly one write to the log, as an audit hook of the kernel would see it."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    path = tmp_path / "audit.jsonl"
    trace = tmp_path / "trace"
    program = f"{EMIT}\nfor _ in range(3): log.emit(record)"
    command = ["strace", "-f", "-e", "trace=write,pwrite64,writev", "-P", str(path), "-o", str(trace)]
    run = subprocess.run([*command, sys.executable, "-c", program, str(path)], check=False, env=make_env(), timeout=60)
    if run.returncode:
        pytest.skip("strace may not trace here")
    assert trace.read_text().count("write(") == 3


def test_records_without_structlog_are_the_same_bytes(tmp_path: Path, applied: AuditRecord) -> None:
    """A kept record is written at exit without structlog, byte for byte as with it."""
    with_it, without = tmp_path / "with", tmp_path / "without"
    make_log(with_it).emit(applied)
    log = make_log(without)
    log.keep(applied)
    log.flush()
    assert log._structlog_loggers is None
    assert with_it.read_bytes() == without.read_bytes() == encode_record(applied.as_dict())


def test_all_sinks_get_every_record(tmp_path: Path, applied: AuditRecord) -> None:
    """Sinks of all layers add up: each log has the record, a log named twice has it once."""
    paths = [tmp_path / name for name in ("a", "b")]
    make_log(*paths, required_files=(str(paths[0]),)).emit(applied)
    assert [len(read_whole_records(path)) for path in paths] == [1, 1]


def test_one_bad_log_does_not_silence_the_others(tmp_path: Path, applied: AuditRecord) -> None:
    """A log that cannot be written leaves the others as they are."""
    good = tmp_path / "good"
    make_log(tmp_path / "missing" / "bad", good).emit(applied)
    assert len(read_whole_records(good)) == 1


def test_the_default_log_is_made_in_the_home_of_the_account(
    tmp_path: Path, applied: AuditRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any configured log the user's own is created, below the home it was told and not below $HOME."""
    monkeypatch.setenv("HOME", str(tmp_path / "forged"))
    home = tmp_path / "home"
    home.mkdir()
    AuditLog(AuditSinks("none"), str(home), UID).emit(applied)
    folder = home / ".local/state/tfgpu"
    assert len(read_whole_records(folder / "audit.jsonl")) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not (tmp_path / "forged").exists()


def test_the_default_log_comes_with_a_projects_own(tmp_path: Path, applied: AuditRecord) -> None:
    """A project's log is one more: the user's own still has the record."""
    path = tmp_path / "log"
    AuditLog(AuditSinks("none", (str(path),)), str(tmp_path), UID).emit(applied)
    assert len(read_whole_records(path)) == len(read_whole_records(tmp_path / ".local/state/tfgpu/audit.jsonl")) == 1


def test_without_a_default_log_none_is_made(tmp_path: Path, applied: AuditRecord) -> None:
    """A machine or user layer that switched the default log off leaves the home alone."""
    log = AuditLog(AuditSinks("none", default_file=False), str(tmp_path), UID)
    log.emit(applied)
    assert (list(tmp_path.iterdir()), log.findings) == ([], ())


def test_the_logs_are_named_in_order_and_once() -> None:
    """The administrator's log comes first, the default last, and a log named twice is one."""
    assert list_log_names(AuditSinks(files=("/u", "/m"), required_files=("/m",))) == ("/m", "/u", DEFAULT_LOG)
    assert list_log_names(AuditSinks(files=("/u", DEFAULT_LOG))) == ("/u", DEFAULT_LOG)
    assert list_log_names(AuditSinks(default_file=False)) == ()


def test_the_default_log_is_made_where_the_state_directory_is(tmp_path: Path, applied: AuditRecord) -> None:
    """In $XDG_STATE_HOME its folder is made, private, also for a user without a home. Another folder is not."""
    default = tmp_path / "state" / "tfgpu" / "audit.jsonl"
    log = AuditLog(AuditSinks("none", (f"{tmp_path}/other/log.jsonl",), default_log=str(default)), None, UID)
    log.emit(applied)
    assert default.read_bytes().count(b"\n") == 1
    assert default.parent.stat().st_mode & 0o777 == 0o700
    assert [finding.path for finding in log.findings] == [f"{tmp_path}/other/log.jsonl"]


@pytest.mark.parametrize("home", [None, "nonexistent"])
def test_a_user_without_a_home_has_no_default_log_and_no_complaint(
    tmp_path: Path, applied: AuditRecord, capfd: pytest.CaptureFixture[str], home: str | None
) -> None:
    """A uid without a passwd entry, or with /nonexistent as its home, hears nothing of a log it cannot have."""
    log = AuditLog(AuditSinks(), None if home is None else str(tmp_path / home), UID)
    log.emit(applied)
    log.open_now()
    assert list(tmp_path.iterdir()) == []
    assert [(finding.code, finding.severity) for finding in log.findings] == [("no-default-log", "note")]
    assert capfd.readouterr().err == ""
    assert COMPLAINED_VARIABLE not in os.environ


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("~/a", "/home/x/a"),
        ("/var/log/tfgpu/<uid>.jsonl", "/var/log/tfgpu/1234.jsonl"),
        ("~/<uid>", "/home/x/1234"),
    ],
)
def test_paths_expand(path: str, expanded: str) -> None:
    """`~` is the home, `<uid>` the number."""
    assert expand_path(path, "/home/x/", 1234) == expanded


@pytest.mark.parametrize(("path", "home"), [("relative", "/home/x"), ("~bob/a", "/home/x"), ("~/a", None)])
def test_paths_that_lead_nowhere_are_refused(path: str, home: str | None) -> None:
    """A relative path, another user's home, or a home that is not there is refused."""
    with pytest.raises(RefusedLogError):
        expand_path(path, home, 1234)


# ---- planted paths


def plant_symlink(path: Path) -> None:
    (path.parent / "victim").write_text("mine\n")
    path.symlink_to("victim")


def plant_fifo(path: Path) -> None:
    os.mkfifo(path)


def plant_hard_link(path: Path) -> None:
    (path.parent / "victim").write_text("mine\n")
    os.link(path.parent / "victim", path)


def plant_directory(path: Path) -> None:
    path.mkdir()


def plant_device(path: Path) -> None:
    path.symlink_to("/dev/full")


@pytest.mark.parametrize("plant", [plant_symlink, plant_fifo, plant_hard_link, plant_directory, plant_device])
def test_a_planted_path_is_refused(
    tmp_path: Path, applied: AuditRecord, plant: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """A symlink, FIFO, hard link, directory or device in place of the log is not written to and does not hang."""
    path = tmp_path / "log"
    plant(path)
    log = make_log(path)
    log.emit(applied)
    assert [(finding.code, finding.severity) for finding in log.findings] == [("refused-log", "warning")]
    assert capfd.readouterr().err.count("\n") == 1
    if (tmp_path / "victim").exists():
        assert (tmp_path / "victim").read_text() == "mine\n"


def test_a_fifo_with_a_reader_is_refused_too(tmp_path: Path) -> None:
    """A FIFO that somebody listens on can be opened, and still gets nothing."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(RefusedLogError):
        append_line(str(path), LINE, UID)
    assert os.read(reader, 10) == b""
    os.close(reader)


@as_root
def test_a_fifo_that_may_only_be_written_does_not_hang(tmp_path: Path, python: RunProgram) -> None:
    """Nobody reads the FIFO, and opening it for writing alone would wait for a reader for ever."""
    path = Path(f"/tmp/tfenv-test-fifo-{os.getpid()}")  # tmp_path is closed to the other user
    os.mkfifo(path)
    try:
        os.chmod(path, 0o222)
        run = python(f"{EMIT}\nos.seteuid(4242)\nlog.emit(record)\nprint(log.findings[0].code)", str(path))
        assert run.stdout == "refused-log\n"
    finally:
        path.unlink()


def test_character_devices_are_refused() -> None:
    """/dev/full is no log."""
    with pytest.raises(RefusedLogError):
        append_line("/dev/full", LINE, UID)


@as_root
def test_a_strangers_file_is_refused(tmp_path: Path) -> None:
    """A log that belongs to neither me nor root is refused. Root's is not."""
    path = tmp_path / "log"
    path.touch()
    os.chown(path, 4242, -1)
    with pytest.raises(RefusedLogError):
        append_line(str(path), LINE, UID)
    os.chown(path, 0, -1)
    append_line(str(path), LINE, 4343)
    assert path.read_bytes() == LINE


def test_a_log_that_the_machine_asks_for_is_an_error_when_it_is_refused(tmp_path: Path, applied: AuditRecord) -> None:
    """Severity tells on_error whether a log that failed was the administrator's."""
    path = tmp_path / "log"
    path.symlink_to("victim")
    log = make_log(path, required_files=(str(path),))
    log.emit(applied)
    assert [(finding.code, finding.severity) for finding in log.findings] == [("refused-log", "error")]


@as_root
@pytest.mark.parametrize("kind", ["file", "FIFO", "symlink", "directory"])
def test_a_required_log_that_a_stranger_planted_is_a_warning(tmp_path: Path, applied: AuditRecord, kind: str) -> None:
    """It names who did it and never triggers `on_error`. The record goes to the other logs."""
    path, other = tmp_path / "log", tmp_path / "other"
    if kind == "symlink":
        path.symlink_to("victim")
    else:
        {"file": path.touch, "FIFO": lambda: os.mkfifo(path), "directory": path.mkdir}[kind]()
    os.chown(path, 65534, -1, follow_symlinks=False)
    log = make_log(path, other, required_files=(str(path),))
    log.emit(applied)
    log.open_now()
    assert [(finding.code, finding.severity) for finding in log.findings] == [("refused-log", "warning")]
    assert "it belongs to nobody" in log.findings[0].message
    assert other.read_bytes() == encode_record(applied.as_dict())


def test_a_project_cannot_lead_its_log_out_by_a_symlinked_directory(tmp_path: Path, applied: AuditRecord) -> None:
    """A cloned repository with `logs -> ~/.ssh` does not get a line into ~/.ssh."""
    project, secret = tmp_path / "project", tmp_path / "secret"
    project.mkdir()
    secret.mkdir()
    (project / "logs").symlink_to(secret)
    sinks = AuditSinks("none", (f"{project}/logs/audit.jsonl",), default_file=False)
    log = AuditLog(sinks, None, UID, str(project))
    log.emit(applied)
    assert [finding.code for finding in log.findings] == ["refused-log"]
    assert list(secret.iterdir()) == []


@pytest.mark.parametrize("content", [b"import tensorflow\n", b'{"name": "x"}\n', b"x", b'{"time\nx', b"\x00" * 100])
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, applied: AuditRecord, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    """A project that names its own train.py as the log gets no line into it."""
    path = tmp_path / "train.py"
    path.write_bytes(content)
    log = make_log(path)
    log.emit(applied)
    log.open_now()
    assert [(finding.code, finding.severity) for finding in log.findings] == [("refused-log", "warning")]
    assert path.read_bytes() == content
    assert "it contains something other than audit records" in capfd.readouterr().err


@pytest.mark.parametrize("begin", [b"", b"\n", b"{", b'{"timesta', b'{"ti\n', b'{"timestamp":"2026'])
def test_a_log_whose_first_record_was_torn_is_still_a_log(tmp_path: Path, applied: AuditRecord, begin: bytes) -> None:
    """Wherever a full disk cut off the first record, all writers after it are let in, also those of later processes."""
    path = tmp_path / "log"
    path.write_bytes(begin)
    for _ in range(3):
        module._known_logs.clear()
        make_log(path).emit(applied)
    assert path.read_bytes().count(encode_record(applied.as_dict())) == 3


def test_a_log_is_looked_at_once_and_a_new_one_anew(tmp_path: Path, python: RunProgram) -> None:
    """Not every event reads the beginning of the log. A file that takes its place is read again."""
    path = tmp_path / "log"
    program = f"""{EMIT}
reads = []
pread = os.pread
os.pread = lambda file, size, offset: (reads.append(offset) if offset == 0 else None, pread(file, size, offset))[1]
for _ in range(5): log.emit(record)
os.rename(sys.argv[1], sys.argv[1] + ".1")
open(sys.argv[1], "w").write("import tensorflow")
log.emit(record)
print(len(reads), log.findings[0].code)
"""
    # The first look finds an empty file, the second a record, the third the other file.
    assert python(program, str(path)).stdout == "3 refused-log\n"


# ---- a log that the machine asks for


def test_open_now_writes_what_was_kept(tmp_path: Path, applied: AuditRecord) -> None:
    """The record of the import is in the log before devices are created, once."""
    path = tmp_path / "log"
    log = make_log(path, required_files=(str(path),))
    log.keep(applied)
    log.open_now()
    log.open_now()
    assert path.read_bytes() == encode_record(applied.as_dict())
    assert log.findings == ()


@pytest.mark.parametrize("kept", [True, False])
def test_open_now_shows_that_a_required_log_cannot_be_written(
    tmp_path: Path, applied: AuditRecord, *, kept: bool
) -> None:
    """Also where nothing was kept, as in a forked child, the administrator's log is found missing. Others are not."""
    required, other = tmp_path / "missing" / "log", tmp_path / "nowhere" / "log"
    log = make_log(other, required_files=(str(required),))
    if kept:
        log.keep(applied)
    log.open_now()
    errors = [(finding.code, finding.path) for finding in log.findings if finding.severity == "error"]
    assert errors == [("log-not-written", str(required))]
    assert len(log.findings) == 1 + kept


def test_open_now_leaves_no_trace_but_the_file(tmp_path: Path) -> None:
    """Trying a required log out makes the file and no record."""
    path = tmp_path / "log"
    log = make_log(required_files=(str(path),))
    log.open_now()
    assert (path.read_bytes(), log.findings) == (b"", ())


# ---- what goes wrong


def make_env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


#: A program that has a `log` on the file named by its first argument, and a `record`.
EMIT = """
import os, sys, resource, signal
from tfenv.audit.record import RecordContext, ProcessFacts, make_disabled_record
from tfenv.audit.sinks import AuditLog
from tfenv.policy.model import AuditSinks, Subject
log = AuditLog(AuditSinks("none", (sys.argv[1],), default_file=False), None, os.geteuid())
subject = Subject("alice", os.geteuid(), project="p" * 600)
record = make_disabled_record(RecordContext(ProcessFacts.collect("tensorflow"), subject))
"""


def test_a_full_disk_is_one_line_on_stderr_and_a_count_later(
    tmp_path: Path, python: RunProgram, check_line: CheckLine
) -> None:
    """When the file may not grow, the program goes on, says so once, and the next record counts what was lost."""
    path = tmp_path / "log"
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, ({}, resource.RLIM_INFINITY))"
    program = f"""{EMIT}
log.emit(record)
{limit.format(1500)}
for _ in range(3): log.emit(record)
{limit.format("resource.RLIM_INFINITY")}
log.emit(record); log.emit(record)
print("went on")
"""
    run = python(program, str(path))
    assert (run.returncode, run.stdout) == (0, "went on\n")
    assert run.stderr.count("\n") == 1
    assert "the program goes on" in run.stderr
    first, torn, healed, last = path.read_bytes().splitlines(keepends=True)
    check_line(first)
    with pytest.raises(ValueError, match="Invalid control character"):
        json.loads(torn)
    assert check_line(healed)["lost"] == 3
    assert "lost" not in check_line(last)


@as_root
def test_a_disk_without_space_loses_records_and_nothing_else(tmp_path: Path, applied: AuditRecord) -> None:
    """On a real full file system emit returns, and what is in the log stays readable."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", tmp_path], check=False)
    if mounted.returncode:
        pytest.skip("may not mount here")
    try:
        log = make_log(tmp_path / "log")
        for _ in range(50):
            log.emit(applied)
        tally = LineTally()
        kept = list(read_records([tmp_path / "log"], RecordQuery(), tally))
        assert 0 < len(kept) < 50
        assert tally.unreadable <= 1
        assert [finding.code for finding in log.findings] == ["log-not-written"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


#: Runs a program in a mount namespace of its own, so that a file system that is full or read-only goes with it.
IN_NAMESPACE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=16k none "$1" && shift && exec "$@"', "sh"]


FILL = """
fill = open(folder + "/fill", "wb", 0)
try: fill.write(bytes(16 << 10))
except OSError: pass
"""
REMOUNT = "subprocess.run(['mount', '-o', 'remount,{}', folder], check=True)"


def may_mount() -> bool:
    run = subprocess.run([*IN_NAMESPACE, "/mnt", "true"], capture_output=True, check=False)
    return run.returncode == 0


@pytest.mark.parametrize(
    ("break_it", "mend_it", "reason"),
    [
        (FILL, "os.truncate(fill.name, 0)", "No space"),
        (REMOUNT.format("ro"), REMOUNT.format("rw"), "Read-only"),
    ],
    ids=["full", "read-only"],
)
def test_a_file_system_that_takes_nothing(
    tmp_path: Path, check_line: CheckLine, break_it: str, mend_it: str, reason: str
) -> None:
    """Full or read-only: one line on stderr, and the next record that gets through counts what was lost."""
    if not may_mount():
        pytest.skip("may not mount here")
    program = f"""{EMIT}
import subprocess
folder = os.path.dirname(sys.argv[1])
log.emit(record)
{break_it}
for _ in range(20): log.emit(record)
{mend_it}
log.emit(record); log.emit(record)
print(open(sys.argv[1]).read())
"""
    path = str(tmp_path / "log")
    command = [*IN_NAMESPACE, str(tmp_path), sys.executable, "-c", program, path]
    run = subprocess.run(command, env=make_env(), capture_output=True, text=True, check=False, timeout=60)
    assert (run.returncode, run.stderr.count("\n")) == (0, 1), run.stderr
    assert reason in run.stderr
    assert run.stderr.endswith("the program goes on [log-not-written]\n")
    lines = run.stdout.rstrip().splitlines(keepends=True)
    records = [check_line(line.rstrip().encode() + b"\n") for line in lines if is_whole_line(line)]
    assert len(lines) - len(records) <= 1
    lost = [record["lost"] for record in records if "lost" in record]
    assert (len(lost), sum(lost) + len(records)) == (1, 23)


def is_whole_line(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


@as_root
def test_a_log_without_permission_is_one_line_on_stderr(tmp_path: Path, python: RunProgram) -> None:
    """EACCES: the program goes on, with one line for any number of events."""
    os.chmod(tmp_path, 0o700)
    program = f"{EMIT}\nos.seteuid(4242)\nfor _ in range(3): log.emit(record)\nprint('on')"
    run = python(program, str(tmp_path / "log"))
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (0, "on\n", 1)
    assert "Permission denied" in run.stderr


def test_children_do_not_repeat_the_complaint(tmp_path: Path, python: RunProgram) -> None:
    """What the parent said about a log that failed, neither its forked nor its spawned children say again."""
    program = f"""{EMIT}
import subprocess
log.emit(record)
if len(sys.argv) == 2:
    if not os.fork(): log.emit(record); os._exit(0)
    os.wait()
    subprocess.run([sys.executable, "-c", sys.stdin.read(), sys.argv[1], "child"], check=True)
    print("on")
"""
    path = str(tmp_path / "missing" / "log")
    command = [sys.executable, "-c", program, path]
    run = subprocess.run(
        command, input=program, env=make_env(), capture_output=True, text=True, check=False, timeout=60
    )
    assert (run.stdout, run.stderr.count("the program goes on")) == ("on\n", 1)
    alone = python(program, path, "child")
    assert alone.stderr.count("the program goes on") == 1  # so the child would have spoken


def test_a_path_with_a_nul_is_lost_like_any_other(applied: AuditRecord) -> None:
    """A path that no system call takes raises nothing."""
    log = make_log(Path("/tmp/a\x00b"))
    log.emit(applied)
    assert [finding.code for finding in log.findings] == ["log-not-written"]


def test_a_name_in_the_complaint_cannot_steer_the_terminal(
    tmp_path: Path, applied: AuditRecord, capfd: pytest.CaptureFixture[str]
) -> None:
    """The line about a log that failed escapes what is in its path."""
    make_log(tmp_path / "missing\x1b[31m\n" / "log").emit(applied)
    complaint = capfd.readouterr().err
    assert "\x1b" not in complaint
    assert complaint.count("\n") == 1


def test_closed_descriptors_do_not_matter(tmp_path: Path, python: RunProgram) -> None:
    """A program that closes every descriptor (a daemon) and goes on logging loses nothing and raises nothing."""
    path = tmp_path / "log"
    run = python(f"{EMIT}\nlog.emit(record)\nos.closerange(0, 256)\nlog.emit(record)\nos._exit(0)", str(path))
    assert run.returncode == 0
    assert len(read_whole_records(path)) == 2


#: Runs a program where /etc has a tfgpu.toml, without touching the machine's own.
WITH_MACHINE_FILE = """
mount -t tmpfs none "$1" && mkdir -p "$1/upper/tfgpu" "$1/work" && printf '%s' "$2" > "$1/upper/tfgpu/tfgpu.toml" &&
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$1/upper,workdir=$1/work" /etc && shift 2 && exec "$@"
"""


@as_root
@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("on_error", "said"), [("fail", ["log-not-written", "log-not-written", "False"]), ("warn", ["2", "2", "True"])]
)
def test_a_machines_log_that_is_missing_has_its_say(
    tmp_path: Path, simulated_gpus: SimulatedGpus, on_error: str, said: list[str]
) -> None:
    """With `on_error = "fail"` in /etc/tfgpu TensorFlow gets PolicyError, each time, and CUDA stays closed."""
    machine = f'on_error = "{on_error}"\n[audit]\nfile = "{tmp_path}/missing/<uid>.jsonl"\n'
    in_namespace = ["unshare", "--mount", "sh", "-c", WITH_MACHINE_FILE, "sh", str(tmp_path), machine]
    if subprocess.run([*in_namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not mount here")
    program = """
import os, sys, tfenv, tensorflow as tf
for _ in range(2):
    try: print(len(tf.config.list_physical_devices("GPU")))
    except tfenv.PolicyError as error: print(*(finding.code for finding in error.findings))
print(os.path.exists(sys.argv[1]) and "cuInit" in open(sys.argv[1]).read())
"""
    calls = tmp_path / "calls"
    run = [sys.executable, "-m", "tfenv", "run", "--", sys.executable, "-c", program, str(calls)]
    environment = simulated_gpus("2x24GiB", log=calls)
    done = subprocess.run(
        [*in_namespace, *run], env=environment, cwd="/", capture_output=True, text=True, check=False, timeout=200
    )
    assert done.stdout.splitlines() == said, done.stderr


# ---- many writers


def write_many(path: Path, processes: int, records: int) -> list[int]:
    """Fork writers, and return the pids."""
    program = f"""{EMIT}
log.emit(record)
pids = []
for _ in range({processes}):
    pid = os.fork()
    if not pid:
        record = make_disabled_record(RecordContext(ProcessFacts.collect(), subject))
        for _ in range({records}): log.emit(record)
        os._exit(0)
    pids.append(pid)
print(*pids)
for pid in pids: assert os.waitpid(pid, 0)[1] == 0
"""
    command = [sys.executable, "-c", program, str(path)]
    run = subprocess.run(command, env=make_env(), capture_output=True, text=True, check=True, timeout=120)
    return [int(pid) for pid in run.stdout.split()]


@pytest.mark.parametrize(
    ("processes", "records"),
    [(16, 250), pytest.param(64, 1000, marks=pytest.mark.exhaustive)],
    ids=["16x250", "64x1000"],
)
def test_many_processes_tear_and_lose_nothing(tmp_path: Path, processes: int, records: int) -> None:
    """Processes that write to one log at once: every record of every one is there, whole."""
    path = tmp_path / "log"
    pids = write_many(path, processes, records)
    written = [record["pid"] for record in read_whole_records(path)]
    assert [written.count(pid) for pid in pids] == [records] * processes


def test_threads_tear_and_lose_nothing(tmp_path: Path, applied: AuditRecord) -> None:
    """Threads that share one AuditLog write every record once."""
    path = tmp_path / "log"
    log = make_log(path)

    def emit_many() -> None:
        for _ in range(100):
            log.emit(applied)

    threads = [threading.Thread(target=emit_many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_whole_records(path)) == 800


def test_sigkill_while_writing_leaves_a_readable_log(tmp_path: Path) -> None:
    """Killed at random moments, a writer loses at most the line it was writing. What it had written is all there."""
    path = tmp_path / "log"
    program = f"{EMIT}\nwhile True:\n log.emit(record)\n os.write(1, b'.')"
    written = 0
    for _ in range(5):
        before = path.stat().st_size if path.exists() else 0
        command = [sys.executable, "-c", program, str(path)]
        writer = subprocess.Popen(command, env=make_env(), stdout=subprocess.PIPE)
        wait_for_growth(path, before + 1)
        time.sleep(random.uniform(0, 0.02))
        writer.kill()
        written += len(writer.communicate()[0])
        tally = LineTally()
        assert written <= len(list(read_records([path], RecordQuery(), tally))) <= written + 5
        assert tally.unreadable <= 5
    assert written > 5


def test_a_torn_end_does_not_swallow_the_next_record(tmp_path: Path, applied: AuditRecord) -> None:
    """After a half record, where a writer was killed, the next one starts on its own line."""
    path = tmp_path / "log"
    path.write_bytes(encode_record(applied.as_dict())[:100])
    make_log(path).emit(applied)
    torn, whole = path.read_bytes().splitlines()
    assert (len(torn), json.loads(whole)["event"]) == (100, "policy_applied")


# ---- rotation


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """Two programs that write all the time. Calling it stops them and gives how many records they wrote."""
    program = f"{EMIT}\nsignal.signal(signal.SIGTERM, lambda *_: (print(count), sys.stdout.flush(), os._exit(0)))\n"
    program += (
        "import time\ncount = 0\nwhile True:\n"
        " signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); log.emit(record); count += 1\n"
        " signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]); time.sleep(0.0005)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "log")]
    running = [subprocess.Popen(command, env=make_env(), stdout=subprocess.PIPE, text=True) for _ in range(2)]

    def stop() -> int:
        for writer in running:
            writer.terminate()
        return sum(int(writer.communicate(timeout=10)[0]) for writer in running)

    yield stop
    for writer in running:
        writer.kill()
        writer.wait()


def wait_for_growth(path: Path, size: int = 20_000) -> None:
    deadline = time.monotonic() + 20
    while not path.exists() or path.stat().st_size < size:
        assert time.monotonic() < deadline, "nobody writes"
        time.sleep(0.005)


def rotate(tmp_path: Path, options: str) -> None:
    configuration = tmp_path / "logrotate.conf"
    configuration.write_text(f"{tmp_path}/log {{\n rotate 20\n missingok\n {options}\n}}\n")
    command = ["/usr/sbin/logrotate", "-f", "-s", f"{tmp_path}/state", str(configuration)]
    subprocess.run(command, check=True, timeout=30)


@pytest.mark.skipif(not os.path.exists("/usr/sbin/logrotate"), reason="logrotate is not installed")
@pytest.mark.parametrize("options", ["nocreate", "create 0600", "compress\n delaycompress\n create 0600"])
def test_logrotate_loses_nothing(tmp_path: Path, writers: Callable[[], int], options: str) -> None:
    """While programs write, logrotate moves the log away five times: all records are in one of the files, once."""
    os.chmod(tmp_path, 0o700)
    for _ in range(5):
        wait_for_growth(tmp_path / "log")
        rotate(tmp_path, options)
    wait_for_growth(tmp_path / "log")
    written = writers()
    logs = find_log_files(tmp_path / "log")
    # A writer may be faster than logrotate's own `create`, which then moves what it wrote aside.
    assert len([log for log in logs if log.suffix != ".backup"]) == 6
    assert len(read_whole_records(*logs)) == written


@pytest.mark.skipif(not os.path.exists("/usr/sbin/logrotate"), reason="logrotate is not installed")
def test_copytruncate_leaves_no_hole_and_tears_nothing(tmp_path: Path, writers: Callable[[], int]) -> None:
    """copytruncate loses by its nature what comes between copy and truncation. All that was there before it is kept."""
    os.chmod(tmp_path, 0o700)
    for _ in range(3):
        wait_for_growth(tmp_path / "log")
        rotate(tmp_path, "copytruncate")
    wait_for_growth(tmp_path / "log")
    written = writers()
    tally = LineTally()
    kept = len(list(read_records(find_log_files(tmp_path / "log"), RecordQuery(), tally)))
    assert tally.unreadable <= 3  # the copy may end in the middle of a record
    assert b"\0" not in (tmp_path / "log").read_bytes()
    assert 4 * (20_000 // 1000) <= kept <= written  # four times there were 20,000 bytes, of records below 1000


# ---- kept records


def test_a_kept_record_comes_before_the_next_event(
    tmp_path: Path, context: RecordContext, applied: AuditRecord
) -> None:
    """What was kept at import is written first, with the time at which it happened."""
    path = tmp_path / "log"
    log = make_log(path)
    loaded = make_disabled_record(context)
    log.keep(loaded)
    assert not path.exists()
    log.emit(applied)
    log.flush()
    records = read_whole_records(path)
    assert [record["event"] for record in records] == ["policy_disabled", "policy_applied"]
    assert records[0]["timestamp"] == loaded.timestamp


def test_a_kept_record_is_written_at_exit_without_structlog(tmp_path: Path, python: RunProgram) -> None:
    """A program that ends after the import leaves its record, and does not pay for structlog."""
    path = tmp_path / "log"
    program = f"{EMIT}\nimport atexit\natexit.register(lambda: print('structlog' in sys.modules))\nlog.keep(record)"
    assert python(program, str(path)).stdout == "False\n"
    assert len(read_whole_records(path)) == 1


def test_a_kept_record_is_written_after_an_uncaught_exception(tmp_path: Path, python: RunProgram) -> None:
    """A traceback of the program does not cost its record."""
    path = tmp_path / "log"
    assert python(f"{EMIT}\nlog.keep(record)\nraise SystemError", str(path)).returncode == 1
    assert len(read_whole_records(path)) == 1


def test_a_forked_child_does_not_write_its_parents_record_again(tmp_path: Path, python: RunProgram) -> None:
    """Children that exit normally, or pass an entry point, leave the kept record to the process that made it."""
    path = tmp_path / "log"
    program = f"""{EMIT}
log.keep(record)
for passed in (False, True):
    pid = os.fork()
    if not pid:
        if passed: log.emit(record)
        sys.exit(0)
    os.waitpid(pid, 0)
"""
    assert python(program, str(path)).returncode == 0
    assert len(read_whole_records(path)) == 2  # one child's own event, and the parent's at its exit


def test_a_child_does_not_report_its_parents_losses(tmp_path: Path, python: RunProgram) -> None:
    """`lost` counts what this process lost."""
    path = tmp_path / "later" / "log"
    program = f"""{EMIT}
log.emit(record)
os.mkdir(os.path.dirname(sys.argv[1]))
pid = os.fork()
log.emit(record)
if pid: os.waitpid(pid, 0)
"""
    assert python(program, str(path)).returncode == 0
    assert sorted(record.get("lost", 0) for record in read_whole_records(path)) == [0, 1]


# ---- structlog, gc, other sinks


def test_the_programs_structlog_is_left_alone(tmp_path: Path, applied: AuditRecord, check_line: CheckLine) -> None:
    """Logging configures nothing global, and a configuration of the program changes no record."""
    assert not structlog.is_configured()
    path = tmp_path / "log"
    log = make_log(path)
    log.emit(applied)
    assert not structlog.is_configured()
    structlog.configure(processors=[lambda *_: "mine"], cache_logger_on_first_use=True)
    try:
        log.emit(applied)
        make_log(path).emit(applied)
    finally:
        structlog.reset_defaults()
    assert [check_line(line)["event"] for line in path.read_bytes().splitlines(keepends=True)] == ["policy_applied"] * 3


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(tmp_path: Path, python: RunProgram, enabled: bool) -> None:
    """The import of structlog pauses the garbage collector and leaves it as the program had it."""
    switch = "enable" if enabled else "disable"
    program = f"{EMIT}\nimport gc\ngc.{switch}()\nassert 'structlog' not in sys.modules\nlog.emit(record)\n"
    program += "print('structlog' in sys.modules, gc.isenabled())"
    assert python(program, str(tmp_path / "log")).stdout == f"True {enabled}\n"


def test_no_collection_runs_while_structlog_is_imported(tmp_path: Path, python: RunProgram) -> None:
    """However full the memory is, the import of structlog sets off no collection."""
    program = f"""{EMIT}
import gc
from tfenv.audit import sinks
def watch(phase, _):
    spec = getattr(sys.modules.get("structlog"), "__spec__", None)
    if spec and spec._initializing: os.write(1, b"collected")
gc.callbacks.append(watch)
gc.set_threshold(10)
{{}}
print(" done")
"""
    path = str(tmp_path / "log")
    assert python(program.format("import structlog"), path).stdout.startswith("collected")
    assert python(program.format("sinks._import_structlog()"), path).stdout == " done\n"


def test_without_structlog_the_log_is_written_all_the_same(
    tmp_path: Path, python: RunProgram, check_line: CheckLine
) -> None:
    """In a half uninstalled environment records still arrive."""
    path = tmp_path / "log"
    run = python(f"{EMIT}\nsys.modules['structlog'] = None\nlog.emit(record)", str(path))
    assert (run.returncode, run.stderr) == (0, "")
    check_line(path.read_bytes())


def test_importing_the_audit_imports_nothing_heavy(python: RunProgram) -> None:
    """structlog, jsonschema, rich and socket are not imported with the audit."""
    heavy = "{'structlog', 'jsonschema', 'rich', 'socket', 'logging', 'syslog', 'gzip'}"
    assert python(f"{EMIT}\nprint({heavy} & set(sys.modules))", "/x").stdout == "set()\n"


def test_json_on_stderr_is_the_record(applied: AuditRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`stderr = "json"` prints the same line that the log gets."""
    path = tmp_path / "log"
    AuditLog(AuditSinks("json", (str(path),), default_file=False), None, UID).emit(applied)
    assert capsys.readouterr().err.encode() == path.read_bytes()


def test_syslog_gets_a_datagram_with_priority_and_tag(
    tmp_path: Path, applied: AuditRecord, check_line: CheckLine
) -> None:
    """A record arrives at the system's log socket with facility user, the level's severity, and our name."""
    address = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(address)
        SyslogSink(address).write(encode_record(applied.as_dict()), "warning")
        head, _, body = server.recv(8192).partition(b": ")
    assert head == b"<12>tfgpu[%d]" % os.getpid()
    assert check_line(body + b"\n")["event"] == "policy_applied"


@pytest.mark.parametrize(("required", "severity"), [(True, "error"), (False, "warning")])
def test_a_syslog_that_is_not_there(
    tmp_path: Path,
    applied: AuditRecord,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    *,
    required: bool,
    severity: str,
) -> None:
    """Without a daemon the program goes on, with one line. It is an error where the machine asks for syslog."""
    monkeypatch.setattr(module, "SYSLOG_SOCKET", str(tmp_path / "socket"))
    log = make_log(tmp_path / "log", syslog=True, required_syslog=required)
    log.emit(applied)
    log.emit(applied)
    assert [(finding.code, finding.severity) for finding in log.findings] == [("log-not-written", severity)]
    assert capfd.readouterr().err.count("\n") == 1
    assert len(read_whole_records(tmp_path / "log")) == 2


@pytest.mark.parametrize("listening", [True, False])
def test_open_now_asks_whether_a_required_syslog_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, listening: bool
) -> None:
    """It is found out before devices are created, and nothing is written for that."""
    monkeypatch.setattr(module, "SYSLOG_SOCKET", str(tmp_path / "socket"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.setblocking(False)
        if listening:
            server.bind(module.SYSLOG_SOCKET)
        log = make_log(syslog=True, required_syslog=True)
        log.open_now()
        assert [finding.severity for finding in log.findings] == ["error"] * (not listening)
        with pytest.raises(BlockingIOError):
            server.recv(100)


def test_syslog_counts_what_it_lost(
    tmp_path: Path, applied: AuditRecord, check_line: CheckLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the daemon was away records were lost. The first one after that says how many."""
    monkeypatch.setattr(module, "SYSLOG_SOCKET", str(tmp_path / "socket"))
    log = make_log(syslog=True)
    for _ in range(3):
        log.emit(applied)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(module.SYSLOG_SOCKET)
        log.emit(applied)
        log.emit(applied)
        first, second = (check_line(server.recv(8192).partition(b": ")[2] + b"\n") for _ in range(2))
    assert (first["lost"], "lost" in second) == (3, False)


def test_a_syslog_that_does_not_read_never_blocks(tmp_path: Path, applied: AuditRecord) -> None:
    """When the socket's queue is full, the record is given up at once."""
    address = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(address)
        sink, line = SyslogSink(address), encode_record(applied.as_dict())
        with pytest.raises(BlockingIOError):
            any(sink.write(line, "info") for _ in range(10_000))  # type: ignore[func-returns-value]


def test_no_blank_line_comes_of_many_writers(tmp_path: Path) -> None:
    """A line of somebody else that is half written is no torn one: 16 writers leave their lines and nothing else."""
    path = tmp_path / "log"
    line = encode_record({"timestamp": "2026-11-05T09:31:07.123456Z", "event": "x" * 1500})
    program = f"""
import os, sys
from tfenv.audit.sinks import append_line
for _ in range(500):
    append_line(sys.argv[1], {line!r}, os.geteuid())
"""
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path)]) for _ in range(16)]
    assert [writer.wait() for writer in writers] == [0] * 16
    assert set(path.read_bytes().splitlines(keepends=True)) == {line}
    assert path.read_bytes().count(b"\n") == 16 * 500
