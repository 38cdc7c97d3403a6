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

from tests.cli.conftest import TFGPU, Tfgpu, run_on_terminal
from tests.shared_machine import ALICE, BOB, SharedMachine
from tfenv.audit.gpu_totals import summarize_records
from tfenv.audit.job_report import make_job_report
from tfenv.audit.query import RecordQuery
from tfenv.audit.record import ProcessFacts, RecordContext, encode_record, make_outcome_record
from tfenv.cli import own_logs
from tfenv.cli.commands import audit
from tfenv.cli.job_table import build_job_report
from tfenv.cli.tables import print_renderable
from tfenv.errors import Finding
from tfenv.policy.model import DeviceOutcome, Outcome, Start, Subject

RunAudit = Callable[..., "subprocess.CompletedProcess[str]"]
AUDIT: list[str | Path] = [*TFGPU, "audit"]


@pytest.fixture
def run_audit(tfgpu: Tfgpu) -> RunAudit:
    """Return what runs `tfgpu audit` with arguments, and with variables by name."""
    return lambda *arguments, **variables: tfgpu("audit", *arguments, env=variables)


def encode_line(pid: int, user: str = "alice", **differences: Any) -> bytes:
    device = DeviceOutcome(0, "0", "GPU-8932f937-d72c", "H100", limit=8 << 30)
    process = ProcessFacts(pid, 1, "node1", "/srv/vision/train.py", "3.11.7", "tensorflow", "2.21.0")
    outcome = Outcome("applied", "entry_point", (device,), True, findings=(Finding("clamped", "less", "note"),))
    record = make_outcome_record(RecordContext(process, Subject(user, 1000, project="/srv/vision")), outcome)
    return encode_record({**record.as_dict(), "timestamp": f"2026-11-05T09:00:{pid % 60:02}.000000Z", **differences})


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Write thirty records of alice and one of bob."""
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"".join(encode_line(pid) for pid in range(30)) + encode_line(30, "bob", status="clamped"))
    return path


def test_a_table_of_the_newest_twenty(run_audit: RunAudit, log: Path) -> None:
    """Without options the newest twenty records are shown as a table with what matters, one line each."""
    run = run_audit("--file", log)
    head, *rows = run.stdout.splitlines()
    assert (run.returncode, run.stderr, len(rows)) == (0, "", 20)
    assert head.split()[:2] == ["time", "(UTC)"]
    cells = "2026-11-05 09:00:29  alice  29  applied  GPU-8932f937  8.0 GiB  on  train.py  clamped"
    assert rows[-2].split() == cells.split()


def test_json_is_every_record_unchanged(run_audit: RunAudit, log: Path) -> None:
    """`--format json` gives the lines of the log themselves."""
    assert run_audit("--file", log, "--format", "json").stdout.encode() == log.read_bytes()


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
        (["--job", "14"], 0),
        (["--since", "2026-11-05T09:00:25Z"], 6),
        (["-n", "3"], 3),
        (["-n", "0"], 0),
    ],
    ids=str,
)
def test_filters(run_audit: RunAudit, log: Path, options: list[str], count: int) -> None:
    """Each option narrows what is shown."""
    assert run_audit("--file", log, "--format", "json", *options).stdout.count("\n") == count


def test_changes_of_files_can_be_asked_for(run_audit: RunAudit, log: Path) -> None:
    """`--event changed` shows what `tfgpu watch` wrote, and nothing else."""
    log.write_bytes(encode_line(1, event="policy_changed") + encode_line(2))
    shown = run_audit("--file", log, "--event", "changed", "--format", "json")
    assert [json.loads(record)["event"] for record in shown.stdout.splitlines()] == ["policy_changed"]


def test_rotated_logs_are_read(run_audit: RunAudit, log: Path) -> None:
    """What logrotate made of a log is read with it, oldest first, and once, also where a shell names both."""
    log.rename(log.with_name("audit.jsonl.1"))
    log.write_bytes(encode_line(31))
    for paths in ([log], [log, log.with_name("audit.jsonl.1")]):
        records = [json.loads(text) for text in run_audit("--format", "json", "--file", *paths).stdout.splitlines()]
        assert [record["pid"] for record in records] == list(range(32))


def test_what_nothing_here_can_decompress_is_named(variables: dict[str, str], log: Path) -> None:
    """A .zst without a module that reads it is left out, with a line that says what would help, and exit code 1."""
    log.with_name("audit.jsonl.1.zst").touch()
    blocked = "import sys; sys.modules.update({'compression.zstd': None, 'backports.zstd': None})\n"
    blocked += "from tfenv.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", blocked, "audit", "--file", str(log)]
    run = subprocess.run(command, env=variables, capture_output=True, check=False)
    assert (run.returncode, run.stdout.count(b"\n")) == (1, 21)
    assert b"audit.jsonl.1.zst: nothing here can decompress it" in run.stderr
    assert b"tfenv[audit]" in run.stderr


def test_a_pipe_is_read_to_its_end(tfgpu: Tfgpu, log: Path) -> None:
    """`journalctl -t tfgpu -o cat | tfgpu audit --file /dev/stdin` shows what journald kept."""
    for options, lines in (([], 21), (["--format", "json"], 31), (["summary"], 3)):
        shown = tfgpu("audit", *options, "--file", "/dev/stdin", stdin=log.read_text())
        assert (shown.stdout.count("\n"), shown.stderr) == (lines, "")


def test_a_summary_per_user_and_gpu(run_audit: RunAudit, log: Path) -> None:
    """Processes, limits asked and given, clamps and failures of each user on each GPU, as a table and as JSON."""
    with log.open("ab") as file:
        asked = {"per_process_gpu_memory_fraction": 0.9}
        file.write(encode_line(31, "bob", event="policy_clamped", asked=asked, cut=[*asked, "memory_growth"]))
    _, *rows = run_audit("summary", "--file", log).stdout.splitlines()
    cut = "memory_growth, per_process_gpu_memory_fraction"
    assert [row.split("  ") for row in map(_collapse_spaces, rows)] == [
        ["alice", "GPU-8932f937-d72c", "30", "-", "8.0 GiB", "0", "-", "0", "2026-11-05 09:00:29"],
        ["bob", "GPU-8932f937-d72c", "2", "90%", "8.0 GiB", "1", cut, "0", "2026-11-05 09:00:31"],
    ]
    shown = run_audit("summary", "--file", log, "--format", "json").stdout
    assert [json.loads(text) for text in shown.splitlines()][1] == {
        "user": "bob",
        "gpu": "GPU-8932f937-d72c",
        "processes": 2,
        "clamped": 1,
        "cut": {"memory_growth": 1, "per_process_gpu_memory_fraction": 1},
        "failed": 0,
        "asked_bytes": None,
        "asked_fraction": 0.9,
        "given_bytes": 8 << 30,
        "given_fraction": None,
        "last": "2026-11-05T09:00:31.000000Z",
    }


def _collapse_spaces(row: str) -> str:
    return re.sub(" {2,}", "  ", row)


LOST_WISH = Finding(
    "clamped",
    "less",
    "note",
    asked_by="/home/bob/.config/tfgpu/tfgpu.toml (gpu.memory_limit)",
    asked="memory_limit = 70.0 GiB",
    given="8.0 GiB",
)
LOST_GROWTH = Finding(
    "clamped", "on", "note", asked_by="/srv/p/tfgpu.toml", asked="memory_growth = false", given="true"
)


def encode_clamped(pid: int, *findings: Finding, asked: int | None = None) -> bytes:
    device = DeviceOutcome(0, "0", "GPU-8932f937-d72c", "H100", limit=8 << 30, asked=asked)
    process = ProcessFacts(pid, 1, "node1", "/srv/vision/train.py", "3.11.7", "tensorflow", "2.21.0")
    outcome = Outcome("clamped", "entry_point", (device,), True, findings=findings)
    return encode_record(make_outcome_record(RecordContext(process, Subject("bob", 1000)), outcome).as_dict())


def test_what_was_asked_and_not_given_is_shown(run_audit: RunAudit, tmp_path: Path, variables: dict[str, str]) -> None:
    """The table and the summary show what a file asked for beside what it was given, on narrow terminals the size."""
    log = tmp_path / "log"
    log.write_bytes(encode_clamped(1, LOST_WISH, LOST_GROWTH, asked=70 << 30) + encode_clamped(2, LOST_GROWTH))
    options = ["--outcome", "clamped", "--file", str(log)]
    _, *rows = map(_collapse_spaces, run_audit(*options).stdout.splitlines())
    assert [row.split("  ")[3:7] for row in rows] == [
        ["clamped", "GPU-8932f937", "memory_limit = 70.0 GiB; memory_growth = false", "8.0 GiB"],
        ["clamped", "GPU-8932f937", "memory_growth = false", "8.0 GiB"],
    ]
    shown, code = run_on_terminal(["audit", *options], variables | {"COLUMNS": "80"}, tmp_path)
    narrow = [_collapse_spaces(line).strip().split("  ")[2:] for line in shown.splitlines()[1:]]
    assert (code, narrow) == (
        0,
        [["GPU-8932f937", "70.0 GiB", "8.0 GiB", "clamped"], ["GPU-8932f937", "false", "8.0 GiB", "clamped"]],
    )
    _, row = map(_collapse_spaces, run_audit("summary", "--file", log).stdout.splitlines())
    assert row.split("  ")[2:7] == ["2", "70.0 GiB", "8.0 GiB", "2", "memory_growth, memory_limit"]


def test_virtual_devices_are_shown_as_sizes(run_audit: RunAudit, tmp_path: Path) -> None:
    """TensorFlow counts them in MiB. People read sizes, in a pipe as on a terminal. Programs get the number."""
    log = tmp_path / "log"
    split = Finding("clamped", "less", "note", asked_by="program", asked="virtual_devices = [[65536.0, 512], [1024]]")
    log.write_bytes(encode_clamped(1, split))
    assert "  virtual_devices = [[64.0 GiB, 512.0 MiB], [1.0 GiB]]  " in run_audit("--file", log).stdout
    assert "virtual_devices = [[65536.0, 512], [1024]]" in run_audit("--file", log, "--format", "json").stdout


def test_a_summary_takes_the_filters_before_it_and_behind_it(run_audit: RunAudit, log: Path) -> None:
    """`tfgpu audit --user bob summary` is `tfgpu audit summary --user bob`."""
    for words in (["--user", "bob", "summary"], ["summary", "--user", "bob"]):
        assert run_audit(*words, "--file", log, "--format", "json").stdout.count("\n") == 1


@pytest.mark.parametrize(("name", "head"), [("table", "time"), ("text", "time"), ("json", '{"timestamp"')])
def test_the_table_is_also_called_text(run_audit: RunAudit, log: Path, name: str, head: str) -> None:
    """`--format text`, as other commands have it, is the table."""
    assert run_audit("--file", log, "--format", name).stdout.startswith(head)


def test_figures_for_prometheus(run_audit: RunAudit, log: Path, tmp_path: Path) -> None:
    """`export` writes the file and prints nothing. Lines that are no records are counted there, and on stderr."""
    figures = tmp_path / "tfgpu.prom"
    run = run_audit("export", "--prometheus", figures, "--file", log)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert 'tfgpu_policy_applied_total{user="alice",gpu="GPU-8932f937-d72c"} 30' in figures.read_text().splitlines()
    with log.open("ab") as file:
        file.write(b"torn\n")
    run = run_audit("export", "--prometheus", figures, "--file", log)
    assert (run.returncode, run.stderr) == (1, "tfgpu audit: 1 line is not an audit record\n")


def test_a_file_of_something_else_is_not_overwritten(run_audit: RunAudit, log: Path, tmp_path: Path) -> None:
    """`--prometheus train.py` is refused, with exit code 2."""
    program = tmp_path / "train.py"
    program.write_text("import tensorflow\n")
    run = run_audit("export", "--prometheus", program, "--file", log)
    assert (run.returncode, program.read_text()) == (2, "import tensorflow\n")
    assert "train.py: this command did not write it" in run.stderr


def test_unreadable_lines_are_counted_on_stderr(run_audit: RunAudit, log: Path) -> None:
    """Lines that are no records are left out, counted on stderr, and make the exit code 1."""
    with log.open("ab") as file:
        file.write(b"torn\n{}\n")
    run = run_audit("--file", log)
    assert (run.returncode, run.stderr) == (1, "tfgpu audit: 2 lines are not audit records\n")
    assert len(run.stdout.splitlines()) == 21


def test_a_log_that_was_named_and_is_not_there(run_audit: RunAudit, tmp_path: Path) -> None:
    """Exit code 2 and one line that names the file."""
    run = run_audit("--file", tmp_path / "none")
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
def test_wrong_usage(run_audit: RunAudit, options: list[str]) -> None:
    """What cannot be understood is exit code 2 with a message, never a traceback."""
    run = run_audit(*options)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr


def test_the_own_log_is_found_by_the_account_and_not_by_home(run_audit: RunAudit, tmp_path: Path) -> None:
    """A forged $HOME moves nothing."""
    planted = tmp_path / ".local/state/tfgpu/audit.jsonl"
    planted.parent.mkdir(parents=True)
    planted.write_bytes(encode_line(1, "planted"))
    assert "planted" not in run_audit(HOME=str(tmp_path)).stdout
    home = pwd.getpwuid(os.geteuid()).pw_dir
    assert own_logs._find_own_logs()[0] == [Path(home, ".local/state/tfgpu/audit.jsonl")]


def test_root_reads_the_logs_of_all_users(tmp_path: Path) -> None:
    """Where each user has a log of their own, `<uid>` means everybody's to root, and one's own to others."""
    for name in ("0.jsonl", "1000.jsonl", "1001.jsonl", "1000.jsonl.1", "x.jsonl", "notes"):
        (tmp_path / name).touch()
    for uid, found in ((0, ["0.jsonl", "1000.jsonl", "1001.jsonl"]), (1001, ["1001.jsonl"])):
        start = Start(cwd="/", uid=uid, home="/root", config_home="/root/.config")
        assert own_logs._expand_log(f"{tmp_path}/<uid>.jsonl", start) == [tmp_path / name for name in found]
        folders = [tmp_path / name.removesuffix(".jsonl") / "audit.jsonl" for name in found]
        for folder in folders:
            folder.parent.mkdir(exist_ok=True)
            folder.touch()
        assert own_logs._expand_log(f"{tmp_path}/<uid>/audit.jsonl", start) == folders


def test_names_in_the_log_cannot_steer_the_terminal(run_audit: RunAudit, log: Path) -> None:
    """Escapes in a foreign record are shown, in the table and in JSON."""
    hostile = {"timestamp": "2026-11-05T09:00:00Z\x1b[2J", "event": "a\nb", "user": "[red]x\u2028", "script": "\x9b"}
    log.write_text(json.dumps(hostile, ensure_ascii=False) + "\n")
    table, raw = run_audit("--file", log).stdout, run_audit("--file", log, "--format", "json").stdout
    assert "[red]x\\u2028" in table
    assert table.count("\n") == 2
    assert table.replace("\n", "").isprintable()
    assert raw.isascii()
    assert json.loads(raw) == hostile


def test_no_color_is_kept(run_audit: RunAudit, log: Path) -> None:
    """With NO_COLOR not even a terminal gets colours."""
    shown = run_audit("--file", log, NO_COLOR="1", FORCE_COLOR="1").stdout
    assert "\x1b[3" not in shown


def test_a_reader_that_goes_away_is_no_error(variables: dict[str, str], log: Path) -> None:
    """`tfgpu audit | head -1` ends quietly."""
    log.write_bytes(log.read_bytes() * 300)
    command = [*AUDIT, "--file", log, "--format", "json"]
    shown = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert shown.stdout is not None
    assert shown.stderr is not None
    shown.stdout.readline()
    shown.stdout.close()
    assert (shown.stderr.read(), shown.wait(timeout=20)) == (b"", 0)
    shown.stderr.close()


@pytest.mark.parametrize("shape", ["json", "text"])
def test_follow_shows_what_comes_and_survives_rotation(variables: dict[str, str], log: Path, shape: str) -> None:
    """`--follow` shows the newest, then each new record, in the file that replaced the log as well. Ctrl-C ends it."""
    command = [*AUDIT, "--file", log, "--follow", "-n", "2", "--format", shape]
    shown = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE)
    assert shown.stdout is not None
    try:
        received = [shown.stdout.readline() for _ in range(2)]
        with log.open("ab") as file:
            file.write(encode_line(1001))
        received.append(shown.stdout.readline())
        log.rename(log.with_name("audit.jsonl.1"))
        log.write_bytes(encode_line(1002))
        received.append(shown.stdout.readline())
        time.sleep(0.1)
        shown.send_signal(signal.SIGINT)
        assert shown.wait(timeout=20) == 130
    finally:
        shown.kill()
        shown.stdout.close()
    for text, pid in zip(received, (b"29", b"30", b"1001", b"1002"), strict=True):
        assert pid in text


# ---- jobs


def encode_of_job(pid: int, job: dict[str, str], event: str = "policy_applied", **fields: Any) -> bytes:
    devices = [{"index": 0, "token": "0", "uuid": "GPU-8932f937-d72c", "name": "H100", "limit_fraction": None}]
    devices[0] |= {"limit_bytes": 8 << 30} | ({"peak_bytes": 7 << 30} if event == "policy_ended" else {})
    return encode_line(pid, event=event, status=None, devices=devices, job=job, **fields)


SLURM = {"scheduler": "slurm", "id": "14", "step": "0"}


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """Write what two ranks of a step did, of which one was killed, an array's task, and a process without a job."""
    path = tmp_path / "jobs.jsonl"
    ranks = [{**SLURM, "rank": str(rank)} for rank in range(2)]
    task = {"scheduler": "slurm", "id": "16", "array_id": "15", "array_task": "3"}
    lost = {
        "code": "clamped",
        "severity": "note",
        "message": "less",
        "asked": "memory_limit = 70.0 GiB",
        "given": "8 GiB",
    }
    path.write_bytes(
        encode_of_job(1, ranks[0], "policy_clamped", findings=[lost])
        + encode_of_job(2, ranks[1])
        + encode_of_job(1, ranks[0], "policy_ended", duration_ms=65_000)
        + encode_of_job(3, task)
        + encode_line(4)
    )
    return path


def test_a_job_has_a_column_of_its_own(run_audit: RunAudit, jobs: Path) -> None:
    """A table shows the step or the array's task. Without any job there is no such column."""
    head, *rows = map(_collapse_spaces, run_audit("--file", jobs).stdout.splitlines())
    assert head.split("  ")[3] == "job"
    assert [row.split("  ")[3] for row in rows] == ["14.0", "14.0", "14.0", "15_3", "applied"]
    assert "job" not in run_audit("--file", jobs, "--job", "nobody's").stdout


@pytest.mark.parametrize(
    ("job", "pids"), [("14", [1, 2, 1]), ("14.0", [1, 2, 1]), ("15_3", [3]), ("15", [3]), ("1", [])]
)
def test_the_records_of_a_job_can_be_asked_for(run_audit: RunAudit, jobs: Path, job: str, pids: list[int]) -> None:
    """`--job` takes a job, an array, a task or a step."""
    shown = run_audit("--file", jobs, "--job", job, "--format", "json").stdout
    assert [json.loads(line)["pid"] for line in shown.splitlines()] == pids


def test_the_end_of_a_process_shows_its_peak(run_audit: RunAudit, jobs: Path) -> None:
    """`--event ended` has the peak beside the limit."""
    _, row = run_audit("--file", jobs, "--event", "ended").stdout.splitlines()
    assert "8.0 GiB; peak 88%" in row


def test_a_table_with_jobs_fits_on_eighty_characters(jobs: Path, variables: dict[str, str], tmp_path: Path) -> None:
    """One line for each record, and each job readable."""
    with jobs.open("ab") as file:
        file.write(encode_of_job(5, {"scheduler": "slurm", "id": "12345678", "step": "0"}, user="a-long-user-name"))
    shown, code = run_on_terminal(["audit", "--file", str(jobs)], variables | {"COLUMNS": "80"}, tmp_path)
    lines = re.sub(r"\x1b\[\d*m", "", shown).splitlines()
    assert (code, len(lines)) == (0, 7)
    assert max(map(len, lines)) <= 80
    assert "12345678.0" in lines[-1]
    assert "peak 88%" in shown


def test_a_job_report_shows_each_process(run_audit: RunAudit, jobs: Path) -> None:
    """`tfgpu audit job 14`: limits, peaks, times, what was cut, and which process has no end."""
    done = run_audit("job", "14", "--file", jobs)
    title, _, head, *rows = map(_collapse_spaces, done.stdout.splitlines())
    assert (done.returncode, done.stderr) == (0, "")
    assert title == "job 14: 1 GPU, peak 7.0 GiB of 8.0 GiB (88%), 2 processes"
    assert head.split("  ") == ["pid", "role", "program", "GPU", "limit", "peak", "time"]
    assert rows[0].strip().split("  ") == [
        "1", "rank 0", "/srv/vision/train.py", "GPU-8932f937-d72c", "8.0 GiB", "7.0 GiB", "█████████░ 88%", "1min 5s"
    ]  # fmt: skip
    assert rows[1].strip().split("  ")[:2] == ["2", "rank 1"]
    assert rows[3:] == [
        "asked for more  memory_limit = 70.0 GiB (got 8 GiB)",
        "no end  pid 2: still running, killed, or had no GPU; its peak and time are not known",
    ]


def test_a_job_report_fits_on_eighty_characters(jobs: Path, variables: dict[str, str], tmp_path: Path) -> None:
    """One line for each process, without the bar."""
    shown, code = run_on_terminal(["audit", "job", "14", "--file", str(jobs)], variables | {"COLUMNS": "80"}, tmp_path)
    row = next(line for line in shown.splitlines() if "rank 0" in line)
    assert code == 0
    assert _collapse_spaces(row).strip().split("  ")[-3:] == ["7.0 GiB", "88%", "1min 5s"]


def test_a_job_report_is_json_for_programs(run_audit: RunAudit, jobs: Path) -> None:
    """One value with all processes."""
    told = json.loads(run_audit("job", "14.0", "--file", jobs, "--format", "json").stdout)
    assert (told["job"], [process["pid"] for process in told["processes"]]) == ("14.0", [1, 2])
    assert told["processes"][0]["gpus"][0]["peak_bytes"] == 7 << 30


def test_a_job_without_records_is_said(run_audit: RunAudit, jobs: Path) -> None:
    """It is no error: it may have used no GPU."""
    done = run_audit("job", "99", "--file", jobs)
    assert (done.returncode, done.stdout) == (0, "")
    assert "no process of job 99 used a GPU" in done.stderr


def test_a_summary_counts_jobs_apart_if_asked(run_audit: RunAudit, jobs: Path) -> None:
    """`--by-job` has a row for each job, user and GPU. Without it there is neither the rows nor the column."""
    head, *rows = map(_collapse_spaces, run_audit("summary", "--by-job", "--file", jobs).stdout.splitlines())
    assert head.split("  ")[:4] == ["user", "job", "GPU", "processes"]
    assert [row.split("  ")[:4] for row in rows if "GPU-" in row] == [
        ["alice", "GPU-8932f937-d72c", "1", "-"],
        ["alice", "14", "GPU-8932f937-d72c", "2"],
        ["alice", "15_3", "GPU-8932f937-d72c", "1"],
    ]
    told = [json.loads(line) for line in run_audit("summary", "--format", "json", "--file", jobs).stdout.splitlines()]
    assert [(row["processes"], "job" in row) for row in told] == [(4, False)]


def test_figures_by_job_are_a_file_of_their_own(run_audit: RunAudit, jobs: Path, tmp_path: Path) -> None:
    """Series of jobs are many, so they are there only if asked for, and never mixed with others."""
    plain, by_job = tmp_path / "tfgpu.prom", tmp_path / "jobs.prom"
    assert run_audit("export", "--prometheus", plain, "--file", jobs).returncode == 0
    assert run_audit("export", "--by-job", "--prometheus", by_job, "--file", jobs).returncode == 0
    assert "job=" not in plain.read_text()
    assert 'tfgpu_policy_applied_total{user="alice",gpu="GPU-8932f937-d72c",job="14"} 1\n' in by_job.read_text()
    for options, target in (([], by_job), (["--by-job"], plain)):
        before = target.read_text()
        refused = run_audit("export", *options, "--prometheus", target, "--file", jobs)
        assert (refused.returncode, target.read_text()) == (2, before)
        assert "--by-job; name another file" in refused.stderr


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
FIELDS = (
    "user", "uid", "pid", "status", "script", "project", "devices", "findings", "growth", "limit_bytes", "host", "job",
    "scheduler", "duration_ms",
)  # fmt: skip


@settings(suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, json_values)), st.text(), st.text())
def test_records_of_any_shape_are_shown(fields: dict[str, Any], timestamp: str, event: str) -> None:
    """A record whose fields have other types than ours (a newer version, another program) is no traceback."""
    record = {**fields, "timestamp": timestamp, "event": event}
    assert all(cell.isprintable() for cell in audit._format_record(record))
    audit._format_narrow_record(record, audit._NARROW_JOB_COLUMNS)
    for name in ("policy_clamped", "policy_failed", "policy_ended"):
        print_renderable(build_job_report(make_job_report("14", [{**record, "event": name}])))
    for row in summarize_records([{**record, "event": "policy_applied"}]):
        audit._format_summary_row(row)
    query = RecordQuery(users=frozenset({"a"}), uids=frozenset({1}), jobs=frozenset({"14"}), project="/a", script="x")
    query.matches(record)


def test_without_a_file_the_log_of_the_policy_here_is_read(run_audit: RunAudit, project: Path) -> None:
    """`tfgpu audit` in a project whose file names a log shows that log."""
    (project / "tfgpu.toml").write_text('[audit]\nfile = "here.jsonl"\n')
    line = '{"timestamp":"2026-01-02T03:04:05.000000Z","event":"policy_applied","level":"info","user":"zoe","pid":4}'
    (project / "here.jsonl").write_text(line + "\n")
    done = run_audit("--format", "json")
    assert '"zoe"' in done.stdout, done.stderr


PLANTED_POLICY = '[audit]\nfile = "/var/log/tfgpu/<uid>.jsonl"\n'


@pytest.mark.parametrize(
    "command", [("audit",), ("audit", "summary"), ("audit", "export", "--prometheus", "/srv/tf.prom")]
)
def test_what_somebody_else_planted_is_left_out_and_named(
    shared_machine: SharedMachine, command: tuple[str, ...]
) -> None:
    """A FIFO holds nothing up, and a log of another's name is not read as that user's. The others are, with exit 1."""
    shared_machine.clear()
    shared_machine.policy({"tfgpu.toml": PLANTED_POLICY})
    record = {"timestamp": "2026-11-05T10:00:00.000000Z", "event": "policy_applied", "user": "bob", "uid": BOB.uid}
    line = json.dumps(record) + "\n"
    folder = "/var/log/tfgpu"
    for name in shared_machine.path(folder).iterdir():
        name.unlink()
    shared_machine.write(f"{folder}/{BOB.uid}.jsonl", line, BOB)
    shared_machine.write(f"{folder}/{BOB.uid}.jsonl.1", line, ALICE)
    shared_machine.write(f"{folder}/99999.jsonl", line, ALICE)
    os.mkfifo(shared_machine.path(f"{folder}/{ALICE.uid}.jsonl"))
    done = shared_machine.tfgpu(*command)
    assert done.returncode == 1, done.stderr
    assert sorted(re.findall(r"skipped (\S+): (.*)", done.stderr)) == [
        (f"{folder}/{ALICE.uid}.jsonl", "it is not a regular file"),
        (f"{folder}/{BOB.uid}.jsonl.1", f"it belongs to uid {ALICE.uid}, not to uid {BOB.uid}"),
        (f"{folder}/99999.jsonl", f"it belongs to uid {ALICE.uid}, not to uid 99999"),
    ]
    assert len(command) > 1 or done.stdout.count("bob") == 1


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 400, "NaN", "-Infinity", "1e999", "[" * 20000 + "]" * 20000])
@pytest.mark.parametrize("command", [(), ("--format", "json"), ("summary",), ("summary", "--format", "json")])
def test_a_number_that_no_record_has_makes_a_line_unreadable(
    tmp_path: Path, run_audit: RunAudit, command: tuple[str, ...], number: str
) -> None:
    """The line is counted, the others are read, and JSON has no NaN."""
    log = tmp_path / "log"
    whole = encode_line(1)
    broken = whole.replace(str(8 << 30).encode(), number.encode())
    assert broken != whole
    log.write_bytes(whole + broken + encode_line(2))
    done = run_audit(*command, "--file", log)
    assert done.returncode == 1, done.stderr
    assert "tfgpu audit: 1 line is not an audit record" in done.stderr
    assert "internal error" not in done.stderr
    assert not re.search("NaN|Infinity", done.stdout)


def test_a_narrow_terminal_has_a_line_for_each_record(log: Path, variables: dict[str, str], tmp_path: Path) -> None:
    """At 80 characters: time, user, GPUs, limit and outcome. Nothing is wrapped."""
    arguments = ["audit", "--file", str(log), "-n", "5"]
    shown, code = run_on_terminal(arguments, variables | {"COLUMNS": "80"}, tmp_path)
    lines = [line for line in shown.splitlines() if line.strip()]
    assert (code, len(lines)) == (0, 6), shown
    assert "outcome" in lines[0]
    assert "(UTC)" not in lines[0]
    assert all(re.match(r"\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines[1:])


def test_minutes_are_written_as_everybody_does(tfgpu: Tfgpu, log: Path) -> None:
    """`--since 5m` is five minutes. Where nothing is found that is said."""
    done = tfgpu("audit", "--file", log, "--since", "5m")
    assert (done.returncode, done.stdout) == (0, "")
    assert "no records" in done.stderr
