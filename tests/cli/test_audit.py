from __future__ import annotations

import json
import os
import pwd
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tfenv.audit.gpu_totals import summarize_groups
from tfenv.audit.query import RecordQuery, make_group
from tfenv.audit.record import ProcessFacts, RecordContext, encode_record, make_outcome_record
from tfenv.cli import audit
from tfenv.errors import Finding
from tfenv.policy.model import DeviceOutcome, Outcome, Start, Subject

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import argparse, sys
from tfenv.audit.gpu_totals import summarize_groups
from tfenv.cli import audit
parser = argparse.ArgumentParser(prog="tfgpu")
audit.add_parser(parser.add_subparsers())
args = parser.parse_args()
sys.exit(args.run(args))
"""

Tfgpu = Callable[..., "subprocess.CompletedProcess[str]"]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", PROGRAM, "audit", *map(str, arguments)]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


@pytest.fixture
def tfgpu() -> Tfgpu:
    """Runs `tfgpu audit` with the given arguments in a real process."""

    def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments), env=environment(**variables), capture_output=True, text=True, timeout=60, check=False
        )

    return run


def line(pid: int, user: str = "alice", **differences: Any) -> bytes:
    device = DeviceOutcome(0, "0", "GPU-8932f937-d72c", "H100", limit=8 << 30)
    process = ProcessFacts(pid, 1, "node1", "/srv/vision/train.py", "3.11.7", "tensorflow", "2.21.0")
    outcome = Outcome("applied", "entry_point", (device,), True, findings=(Finding("clamped", "less", "note"),))
    record = make_outcome_record(RecordContext(process, Subject(user, 1000, project="/srv/vision")), outcome)
    return encode_record({**record.as_dict(), "timestamp": f"2026-11-05T09:00:{pid % 60:02}.000000Z", **differences})


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Thirty records of alice and one of bob."""
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"".join(line(pid) for pid in range(30)) + line(30, "bob", status="clamped"))
    return path


def test_a_table_of_the_newest_twenty(tfgpu: Tfgpu, log: Path) -> None:
    """Without options the newest twenty records are shown as a table with what matters, one line each."""
    run = tfgpu("--file", log)
    head, *rows = run.stdout.splitlines()
    assert (run.returncode, run.stderr, len(rows)) == (0, "", 20)
    assert head.split()[:2] == ["time", "(UTC)"]
    cells = "2026-11-05 09:00:29  alice  29  applied  GPU-8932f937  8.0 GiB  on  train.py  clamped"
    assert rows[-2].split() == cells.split()


def test_json_is_every_record_unchanged(tfgpu: Tfgpu, log: Path) -> None:
    """`--format json` gives the lines of the log themselves."""
    assert tfgpu("--file", log, "--format", "json").stdout.encode() == log.read_bytes()


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--user", "bob"], 1),
        (["--user", "bob", "--user", "alice"], 31),
        (["--uid", "1000"], 31),
        (["--uid", "1"], 0),
        (["--event", "applied"], 31),
        (["--event", "policy_loaded"], 0),
        (["--outcome", "clamped"], 1),
        (["--gpu", "GPU-8932"], 31),
        (["--gpu", "GPU-8932", "--gpu", "1", "--outcome", "applied"], 30),
        (["--gpu", "name:A*"], 0),
        (["--until", "2026-11-05T09:00:25Z"], 25),
        (["--project", "/srv/vision/"], 31),
        (["--project", "/srv/vis"], 0),
        (["--script", "train*"], 31),
        (["--since", "2026-11-05T09:00:25Z"], 6),
        (["-n", "3"], 3),
        (["-n", "0"], 0),
    ],
    ids=str,
)
def test_filters(tfgpu: Tfgpu, log: Path, options: list[str], count: int) -> None:
    """Each option narrows what is shown."""
    assert tfgpu("--file", log, "--format", "json", *options).stdout.count("\n") == count


def test_changes_of_files_can_be_asked_for(tfgpu: Tfgpu, log: Path) -> None:
    """`--event changed` shows what `tfgpu watch` wrote, and nothing else."""
    log.write_bytes(line(1, event="policy_changed") + line(2))
    shown = tfgpu("--file", log, "--event", "changed", "--format", "json")
    assert [json.loads(record)["event"] for record in shown.stdout.splitlines()] == ["policy_changed"]


def test_rotated_logs_are_read(tfgpu: Tfgpu, log: Path) -> None:
    """What logrotate made of a log is read with it, oldest first, and once, also where a shell names both."""
    log.rename(log.with_name("audit.jsonl.1"))
    log.write_bytes(line(31))
    for paths in ([log], [log, log.with_name("audit.jsonl.1")]):
        records = [json.loads(text) for text in tfgpu("--format", "json", "--file", *paths).stdout.splitlines()]
        assert [record["pid"] for record in records] == list(range(32))


def test_what_nothing_here_can_decompress_is_named(tfgpu: Tfgpu, log: Path) -> None:
    """A .zst without a module that reads it is left out, with a line that says what would help, and exit code 1."""
    log.with_name("audit.jsonl.1.zst").touch()
    blocked = f"import sys; sys.modules.update({{'compression.zstd': None, 'backports.zstd': None}})\n{PROGRAM}"
    run = subprocess.run(
        [sys.executable, "-c", blocked, "audit", "--file", log], env=environment(), capture_output=True, check=False
    )
    assert (run.returncode, run.stdout.count(b"\n")) == (1, 21)
    assert b"audit.jsonl.1.zst is left out" in run.stderr
    assert b"tfenv[audit]" in run.stderr


def test_a_pipe_is_read_to_its_end(log: Path) -> None:
    """`journalctl -t tfgpu -o cat | tfgpu audit --file /dev/stdin` shows what journald kept."""
    for options, lines in (([], 21), (["--format", "json"], 31), (["summary"], 3)):
        shown = subprocess.run(
            command(*options, "--file", "/dev/stdin"),
            env=environment(),
            input=log.read_bytes(),
            capture_output=True,
            check=False,
        )
        assert (shown.stdout.count(b"\n"), shown.stderr) == (lines, b"")


def test_a_summary_per_user_and_gpu(tfgpu: Tfgpu, log: Path) -> None:
    """Processes, limits asked and given, clamps and failures of each user on each GPU, as a table and as JSON."""
    with log.open("ab") as file:
        file.write(line(31, "bob", event="policy_clamped", asked={"per_process_gpu_memory_fraction": 0.9}))
    _, *rows = tfgpu("summary", "--file", log).stdout.splitlines()
    assert [row.split("  ") for row in map(_narrow, rows)] == [
        ["alice", "GPU-8932f937-d72c", "30", "-", "8.0 GiB", "0", "0", "2026-11-05 09:00:29"],
        ["bob", "GPU-8932f937-d72c", "2", "90%", "8.0 GiB", "1", "0", "2026-11-05 09:00:31"],
    ]
    shown = tfgpu("summary", "--file", log, "--format", "json").stdout
    assert [json.loads(text) for text in shown.splitlines()][1] == {
        "user": "bob",
        "gpu": "GPU-8932f937-d72c",
        "processes": 2,
        "clamped": 1,
        "failed": 0,
        "asked_bytes": None,
        "asked_fraction": 0.9,
        "given_bytes": 8 << 30,
        "given_fraction": None,
        "last": "2026-11-05T09:00:31.000000Z",
    }


def _narrow(row: str) -> str:
    return re.sub(" {2,}", "  ", row)


def test_a_summary_takes_the_filters_before_it_and_behind_it(tfgpu: Tfgpu, log: Path) -> None:
    """`tfgpu audit --user bob summary` is `tfgpu audit summary --user bob`."""
    for words in (["--user", "bob", "summary"], ["summary", "--user", "bob"]):
        assert tfgpu(*words, "--file", log, "--format", "json").stdout.count("\n") == 1


@pytest.mark.parametrize(("name", "head"), [("table", "time"), ("text", "time"), ("json", '{"timestamp"')])
def test_the_table_is_also_called_text(tfgpu: Tfgpu, log: Path, name: str, head: str) -> None:
    """`--format text`, as other commands have it, is the table."""
    assert tfgpu("--file", log, "--format", name).stdout.startswith(head)


def test_figures_for_prometheus(tfgpu: Tfgpu, log: Path, tmp_path: Path) -> None:
    """`export` writes the file and says nothing; lines that are no records are counted there, and on stderr."""
    figures = tmp_path / "tfgpu.prom"
    run = tfgpu("export", "--prometheus", figures, "--file", log)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert 'tfgpu_policy_applied_total{user="alice",gpu="GPU-8932f937-d72c"} 30' in figures.read_text().splitlines()
    with log.open("ab") as file:
        file.write(b"torn\n")
    run = tfgpu("export", "--prometheus", figures, "--file", log)
    assert (run.returncode, run.stderr) == (1, "tfgpu audit: 1 line is not an audit record\n")


def test_a_file_of_something_else_is_not_overwritten(tfgpu: Tfgpu, log: Path, tmp_path: Path) -> None:
    """`--prometheus train.py` is refused, with exit code 2."""
    program = tmp_path / "train.py"
    program.write_text("import tensorflow\n")
    run = tfgpu("export", "--prometheus", program, "--file", log)
    assert (run.returncode, program.read_text()) == (2, "import tensorflow\n")
    assert "train.py: it was not written by this command" in run.stderr


def test_unreadable_lines_are_counted_on_stderr(tfgpu: Tfgpu, log: Path) -> None:
    """Lines that are no records are left out, counted on stderr, and make the exit code 1."""
    with log.open("ab") as file:
        file.write(b"torn\n{}\n")
    run = tfgpu("--file", log)
    assert (run.returncode, run.stderr) == (1, "tfgpu audit: 2 lines are not audit records\n")
    assert len(run.stdout.splitlines()) == 21


def test_a_log_that_was_named_and_is_not_there(tfgpu: Tfgpu, tmp_path: Path) -> None:
    """Exit code 2 and one line that names the file."""
    run = tfgpu("--file", tmp_path / "none")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"tfgpu audit: {tmp_path}/none: No such file or directory\n"


@pytest.mark.parametrize(
    "options",
    [
        ["--since", "yesterday"],
        ["--until", "x"],
        ["--event", "x"],
        ["-n", "-1"],
        ["summary", "--follow"],
        ["export"],
        ["export", "--user", "x", "--prometheus", "y"],
        ["--format", "yaml"],
    ],
)
def test_wrong_usage(tfgpu: Tfgpu, options: list[str]) -> None:
    """What cannot be understood is exit code 2 with a message, never a traceback."""
    run = tfgpu(*options)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr


def test_the_own_log_is_found_by_the_account_and_not_by_home(tfgpu: Tfgpu, tmp_path: Path) -> None:
    """A forged $HOME moves nothing."""
    planted = tmp_path / ".local/state/tfgpu/audit.jsonl"
    planted.parent.mkdir(parents=True)
    planted.write_bytes(line(1, "planted"))
    assert "planted" not in tfgpu(HOME=str(tmp_path)).stdout
    home = pwd.getpwuid(os.geteuid()).pw_dir
    assert audit._own_logs() == [Path(home, ".local/state/tfgpu/audit.jsonl")]


def test_root_reads_the_logs_of_all_users(tmp_path: Path) -> None:
    """Where each user has a log of their own, `<uid>` means everybody's to root, and one's own to others."""
    for name in ("0.jsonl", "1000.jsonl", "1001.jsonl", "1000.jsonl.1", "x.jsonl", "notes"):
        (tmp_path / name).touch()
    for uid, found in ((0, ["0.jsonl", "1000.jsonl", "1001.jsonl"]), (1001, ["1001.jsonl"])):
        start = Start(cwd="/", uid=uid, home="/root", config_home="/root/.config")
        assert audit._expanded(f"{tmp_path}/<uid>.jsonl", start) == [tmp_path / name for name in found]


def test_names_in_the_log_cannot_steer_the_terminal(tfgpu: Tfgpu, log: Path) -> None:
    """Escapes in a foreign record are shown, in the table and in JSON."""
    hostile = {"timestamp": "2026-11-05T09:00:00Z\x1b[2J", "event": "a\nb", "user": "[red]x\u2028", "script": "\x9b"}
    log.write_text(json.dumps(hostile, ensure_ascii=False) + "\n")
    table, raw = tfgpu("--file", log).stdout, tfgpu("--file", log, "--format", "json").stdout
    assert "[red]x\\u2028" in table
    assert table.count("\n") == 2
    assert table.replace("\n", "").isprintable()
    assert raw.isascii()
    assert json.loads(raw) == hostile


def test_no_color_is_kept(tfgpu: Tfgpu, log: Path) -> None:
    """With NO_COLOR not even a terminal gets colours."""
    shown = tfgpu("--file", log, NO_COLOR="1", FORCE_COLOR="1").stdout
    assert "\x1b[3" not in shown


def test_a_reader_that_goes_away_is_no_error(log: Path) -> None:
    """`tfgpu audit | head -1` ends quietly."""
    log.write_bytes(log.read_bytes() * 300)
    shown = subprocess.Popen(
        command("--file", log, "--format", "json"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert shown.stdout is not None
    assert shown.stderr is not None
    shown.stdout.readline()
    shown.stdout.close()
    assert (shown.stderr.read(), shown.wait(timeout=20)) == (b"", 0)
    shown.stderr.close()


@pytest.mark.parametrize("shape", ["json", "text"])
def test_follow_shows_what_comes_and_survives_rotation(log: Path, shape: str) -> None:
    """`--follow` shows the newest, then each new record, also in the file that replaced the log; Ctrl-C ends it."""
    shown = subprocess.Popen(
        command("--file", log, "--follow", "-n", "2", "--format", shape), env=environment(), stdout=subprocess.PIPE
    )
    assert shown.stdout is not None
    try:
        received = [shown.stdout.readline() for _ in range(2)]
        with log.open("ab") as file:
            file.write(line(1001))
        received.append(shown.stdout.readline())
        log.rename(log.with_name("audit.jsonl.1"))
        log.write_bytes(line(1002))
        received.append(shown.stdout.readline())
        time.sleep(0.1)
        shown.send_signal(signal.SIGINT)
        assert shown.wait(timeout=20) == 130
    finally:
        shown.kill()
        shown.stdout.close()
    for text, pid in zip(received, (b"29", b"30", b"1001", b"1002"), strict=True):
        assert pid in text


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
FIELDS = ("user", "uid", "pid", "status", "script", "project", "devices", "findings", "growth", "limit_bytes", "host")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, json_values)), st.text(), st.text())
def test_records_of_any_shape_are_shown(fields: dict[str, Any], timestamp: str, event: str) -> None:
    """A record whose fields have other types than ours (a newer version, another program) is no traceback."""
    record = {**fields, "timestamp": timestamp, "event": event}
    assert all(cell.isprintable() for cell in audit._row(record))
    for row in summarize_groups([make_group({**record, "event": "policy_applied"})]):
        audit._summary_row(row)
    query = RecordQuery(users=frozenset({"a"}), uids=frozenset({1}), project="/a", script="x")
    query.matches(record)


def test_without_a_file_the_log_of_the_policy_here_is_read(tmp_path: Path) -> None:
    """`tfgpu audit` in a project whose file names a log shows that log."""
    (tmp_path / "tfgpu.toml").write_text('[audit]\nfile = "here.jsonl"\n')
    line = '{"timestamp":"2026-01-02T03:04:05.000000Z","event":"policy_applied","level":"info","user":"zoe","pid":4}'
    (tmp_path / "here.jsonl").write_text(line + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "tfenv", "audit", "--format", "json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert '"zoe"' in done.stdout, done.stderr
