"""`tfgpu ps`: who uses which GPU, and whether under a policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Tfgpu
from tfenv.cli.process_records import read_user_records
from tfenv.devices.usage import GpuProcess
from tfenv.policy.model import AuditSinks
from tfenv.simulate.environment import build_environment, parse_gpus

GIB = 1 << 30
UUIDS = [f"GPU-a{gpu}fa4e00-0000-4000-8000-00000000000{gpu}" for gpu in range(2)]
NOBODY = 2**22 + 1


class SimulatedMachine:
    """Two GPUs, what is held of them, and this user's audit log."""

    def __init__(self, project: Path, log: Path) -> None:
        self.project = project
        self.log = log
        self.held = project / "held"
        self.env = build_environment(parse_gpus("2x24GiB"), processes=self.held, log=project / "requests", base={})

    def hold(self, *lines: str) -> None:
        self.held.write_text("".join(f"{line}\n" for line in lines))

    def record(self, event: str = "policy_applied", *, age_s: float = 0.0, **fields: object) -> None:
        """Write a record of the process `pid`."""
        when = datetime.now(timezone.utc) - timedelta(seconds=age_s)
        given = {"index": 0, "uuid": UUIDS[0], "limit_bytes": 8 * GIB, "limit_fraction": None}
        record = {
            "timestamp": when.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "event": event,
            "host": os.uname().nodename,
            "uid": os.geteuid(),
            "script": "/srv/train.py",
            "devices": [given],
            "sources": [
                {"layer": "machine", "path": "/etc/tfgpu/tfgpu.toml"},
                {"layer": "project", "path": "/srv/t.toml"},
            ],
        }
        with self.log.open("a") as log:
            log.write(json.dumps(record | fields) + "\n")


@pytest.fixture
def machine(project: Path) -> SimulatedMachine:
    (project / "tfgpu.toml").write_text("[audit]\nfile = 'audit.jsonl'\n")
    return SimulatedMachine(project, project / "audit.jsonl")


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """Start a process with a secret among its arguments."""
    with subprocess.Popen([sys.executable, "-c", "input()", "--password=secret"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def read_processes(tfgpu: Tfgpu, machine: SimulatedMachine) -> list[dict[str, Any]]:
    result = tfgpu("ps", "--format", "json", env=machine.env)
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)["processes"]
    return found


def test_a_governed_process(tfgpu: Tfgpu, machine: SimulatedMachine, child: subprocess.Popen[bytes]) -> None:
    """A process with a record comes with its script, its limit on that GPU and the files of its policy."""
    machine.hold(f"0 {child.pid} 5000", f"1 {child.pid} 6000")
    machine.record(pid=child.pid)
    first, second = read_processes(tfgpu, machine)
    assert (first["gpu"], first["uuid"], first["pid"], first["uid"]) == (0, UUIDS[0], child.pid, os.geteuid())
    assert (first["memory_bytes"], first["limit_bytes"], first["state"]) == (5000 << 20, 8 * GIB, "within")
    assert (first["script"], first["sources"][-1]) == ("/srv/train.py", "/srv/t.toml")
    assert (second["gpu"], second["limit_bytes"]) == (1, None)


@pytest.mark.parametrize(
    ("given", "held", "limit", "state"),
    [
        ({"limit_bytes": 4 * GIB}, 4 * 1024 + 900, 4 * GIB, "within"),
        ({"limit_bytes": 4 * GIB}, 4 * 1024 + 1100, 4 * GIB, "over"),
        ({"limit_fraction": 0.5}, 14000, 12 * GIB, "over"),
        ({}, 24000, None, "within"),
    ],
)
def test_over_its_limit(
    tfgpu: Tfgpu, machine: SimulatedMachine, child: subprocess.Popen[bytes], given: dict[str, object], held: int,
    limit: int | None, state: str,
) -> None:  # fmt: skip
    """Beyond its limit, in bytes or as a share, is who holds more than that and what CUDA itself takes."""
    machine.hold(f"0 {child.pid} {held}")
    machine.record(pid=child.pid, devices=[{"uuid": UUIDS[0], **given}])
    (row,) = read_processes(tfgpu, machine)
    assert (row["limit_bytes"], row["state"]) == (limit, state)


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({}, "within"),
        ({"event": "policy_disabled"}, "switched off"),
        ({"event": "policy_failed"}, "failed"),
        ({"age_s": 86400.0}, "ungoverned"),
        ({"host": "elsewhere"}, "ungoverned"),
        ({"uid": 1}, "ungoverned"),
        ({"pid": 1}, "ungoverned"),
    ],
)
def test_whose_record_it_is(
    tfgpu: Tfgpu, machine: SimulatedMachine, child: subprocess.Popen[bytes], fields: dict[str, Any], state: str
) -> None:
    """A record counts for this very process: not one that had its number before, has it elsewhere, or is another's."""
    machine.hold(f"0 {child.pid} 100")
    machine.record(**({"pid": child.pid} | fields))
    (row,) = read_processes(tfgpu, machine)
    assert row["state"] == state
    assert row["script"] == (None if state == "ungoverned" else "/srv/train.py")


def test_a_clock_that_was_set_changes_nothing(
    tfgpu: Tfgpu, machine: SimulatedMachine, child: subprocess.Popen[bytes]
) -> None:
    """What the process recorded before is still its own: the moment it started counts by the kernel's clock."""
    ticks = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    machine.hold(f"0 {child.pid} 100")
    machine.record(pid=child.pid, age_s=3600.0, start_ticks=ticks)
    assert read_processes(tfgpu, machine)[0]["state"] == "within"
    machine.log.unlink()
    machine.record(pid=child.pid, start_ticks=ticks - 100)
    assert read_processes(tfgpu, machine)[0]["state"] == "ungoverned", "an earlier process had its number"


def test_the_job_of_a_process(tfgpu: Tfgpu, machine: SimulatedMachine, child: subprocess.Popen[bytes]) -> None:
    """Its job and step are in a column of their own, if any process shown has a job, and in the JSON."""
    machine.hold(f"0 {child.pid} 5000")
    machine.record(pid=child.pid)
    assert "job" not in tfgpu("ps", env=machine.env).stdout
    assert read_processes(tfgpu, machine)[0]["job"] is None
    machine.record(
        pid=child.pid, job={"scheduler": "slurm", "id": "16", "array_id": "14", "array_task": "0", "step": "0"}
    )
    head, row = tfgpu("ps", env=machine.env).stdout.splitlines()
    assert head.split()[:5] == ["GPU", "user", "pid", "job", "memory"]
    assert row.split()[2:4] == [str(child.pid), "14_0.0"]
    assert read_processes(tfgpu, machine)[0]["job"] == "14_0.0"


def test_the_newest_record_counts(tfgpu: Tfgpu, machine: SimulatedMachine, child: subprocess.Popen[bytes]) -> None:
    """Of several records of a process the newest that speaks of the GPU is believed, in a rotated log as well."""
    machine.hold(f"0 {child.pid} 100")
    machine.record(pid=child.pid, devices=[{"uuid": UUIDS[0], "limit_bytes": 3 * GIB}])
    machine.log.rename(f"{machine.log}.1")
    assert read_processes(tfgpu, machine)[0]["limit_bytes"] == 3 * GIB
    machine.record(pid=child.pid, devices=[{"uuid": UUIDS[0], "limit_bytes": 2 * GIB}])
    machine.record(pid=child.pid, devices=[])
    assert read_processes(tfgpu, machine)[0]["limit_bytes"] == 2 * GIB


def test_several_frameworks_share_a_limit(
    tfgpu: Tfgpu, machine: SimulatedMachine, child: subprocess.Popen[bytes]
) -> None:
    """The frameworks of a process are named, and it may take what all of them may. One without a limit has no end."""
    machine.hold(f"0 {child.pid} 100")
    machine.record(pid=child.pid, framework="tensorflow", devices=[{"uuid": UUIDS[0], "limit_bytes": 2 * GIB}])
    assert (read_processes(tfgpu, machine)[0]["frameworks"]) == ["tensorflow"]
    machine.record(pid=child.pid, framework="torch", devices=[{"uuid": UUIDS[0], "limit_bytes": 6 * GIB}])
    (row,) = read_processes(tfgpu, machine)
    assert (row["frameworks"], row["limit_bytes"]) == (["tensorflow", "torch"], 8 * GIB)
    head, line = tfgpu("ps", env=machine.env).stdout.splitlines()
    assert head.split()[-2:] == ["framework", "policy"]
    assert line.split()[-3:-1] == ["tensorflow,", "torch"]
    machine.record(pid=child.pid, framework="torch", devices=[{"uuid": UUIDS[0], "limit_bytes": None}])
    assert read_processes(tfgpu, machine)[0]["limit_bytes"] is None


def test_arguments_are_never_shown(tfgpu: Tfgpu, machine: SimulatedMachine, child: subprocess.Popen[bytes]) -> None:
    """A process shows by the kernel's name of it. Its arguments, which may hold secrets, are shown nowhere."""
    machine.hold(f"0 {child.pid} 100")
    text = tfgpu("ps", env=machine.env).stdout
    assert "secret" not in text + tfgpu("ps", "--format", "json", env=machine.env).stdout
    line = next(line for line in text.splitlines() if str(child.pid) in line)
    assert line.split()[-1] == "ungoverned"
    assert Path(f"/proc/{child.pid}/comm").read_text().strip() in line


def test_who_cannot_be_seen(tfgpu: Tfgpu, machine: SimulatedMachine) -> None:
    """A process that is not visible here keeps its number and memory, and a line says why nothing more is known."""
    machine.hold(f"0 {NOBODY} 100")
    (row,) = read_processes(tfgpu, machine)
    assert (row["user"], row["program"], row["state"], row["memory_bytes"]) == (None, None, "unknown", 100 << 20)
    assert f"pid {NOBODY}  not visible here" in tfgpu("ps", env=machine.env).stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process as another user")
def test_another_users_log(tfgpu: Tfgpu, machine: SimulatedMachine) -> None:
    """Where another user's log cannot be found nothing is claimed of his policy, whatever other logs say of his pid."""
    with subprocess.Popen(["sleep", "600"], user=54321) as process:
        machine.hold(f"1 {process.pid} 100")
        machine.record(pid=process.pid)
        (row,) = read_processes(tfgpu, machine)
        process.kill()
    assert (row["user"], row["uid"], row["state"]) == ("uid:54321", 54321, "unknown")


def test_nobody(tfgpu: Tfgpu, machine: SimulatedMachine) -> None:
    """GPUs that nobody uses are said to be free. Memory that nobody seen here holds is reported."""
    machine.hold()
    assert tfgpu("ps", env=machine.env).stdout.startswith(
        "nobody  no process that is visible from here uses GPU memory"
    )
    machine.hold(f"0 {NOBODY} 5000")
    machine.env["TFGPU_SIMULATE"] += ",processes_error=3:0"
    assert "GPU 0   the driver does not report who uses it" in tfgpu("ps", env=machine.env).stdout


def test_no_driver_to_ask(tfgpu: Tfgpu, machine: SimulatedMachine) -> None:
    """A driver that cannot be asked is said, and the exit code is 1."""
    machine.env["TFGPU_SIMULATE"] += ",init_error=9"
    result = tfgpu("ps", env=machine.env)
    assert (result.returncode, "installed but not loaded" in result.stdout) == (1, True)


HOLDER = """
import os, sys
from tfenv.sharing import lease
with lease.lock_directories() as directories:
    allocations = [{"uuid": sys.argv[1], "limit": 5 << 30, "shared": False}]
    content = {"pid": os.getpid(), "script": "/srv/leased.py", "since": 1.0, "allocations": allocations, "parent": None}
    kept = lease.create_entry("lease", content, next(iter(directories.values())))
print(flush=True)
input()
"""


def test_leases(tfgpu: Tfgpu, machine: SimulatedMachine, variables: dict[str, str]) -> None:
    """A process with a lease is shown before it holds memory, with what it may take. Nobody else has its lease."""
    env = variables | machine.env
    command = [sys.executable, "-c", HOLDER, UUIDS[1]]
    machine.hold()
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        (row,) = read_processes(tfgpu, machine)
        machine.hold(f"1 {process.pid} 9000", f"1 {os.getpid()} 100")
        found = {row["pid"]: row for row in read_processes(tfgpu, machine)}
        process.kill()
    holding, beside = found[process.pid], found[os.getpid()]
    assert (beside["state"], beside["lease"]) == ("ungoverned", False)
    wanted = ("gpu", "pid", "script", "limit_bytes", "lease")
    assert [row[key] for key in wanted] == [1, process.pid, "/srv/leased.py", 5 * GIB, True]
    assert (row["memory_bytes"], row["state"]) == (0, "within")
    assert [holding[key] for key in wanted] == [row[key] for key in wanted]
    assert (holding["memory_bytes"], holding["state"]) == (9000 << 20, "over")


def test_records_in_a_state_directory_of_the_processs_own(tmp_path: Path) -> None:
    """A process whose XDG_STATE_HOME moved its log is no ungoverned one: its environment says where to look."""
    log = tmp_path / "tfgpu" / "audit.jsonl"
    log.parent.mkdir()
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, env=environment) as program:
        record = {"timestamp": "2026-11-05T10:00:00.000000Z", "event": "policy_applied", "uid": os.geteuid()}
        log.write_text(json.dumps({**record, "pid": program.pid, "host": os.uname().nodename}) + "\n")
        process = GpuProcess(0, program.pid, None, uid=os.geteuid())
        (records,) = read_user_records([process], AuditSinks()).values()
        program.communicate()
    assert len(records.by_pid[program.pid]) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a PID namespace")
def test_a_lease_of_a_container(tfgpu: Tfgpu, machine: SimulatedMachine, variables: dict[str, str]) -> None:
    """Its process is number 1 in there. Here it is shown by the number that it has here, and number 1 has no lease."""
    env = variables | machine.env
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    machine.hold()
    with subprocess.Popen(
        [*unshare, sys.executable, "-c", HOLDER, UUIDS[1]], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        if process.stdout.readline() != b"\n":
            pytest.skip("no PID namespace here")
        pid = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
        (before,) = read_processes(tfgpu, machine)
        machine.hold(f"1 {pid} 500", "1 1 300")
        found = {row["pid"]: row for row in read_processes(tfgpu, machine)}
        process.communicate(b"\n", timeout=20)
    assert (before["pid"], before["lease"], before["memory_bytes"]) == (pid, True, 0)
    assert [(row["lease"], row["memory_bytes"]) for row in (found[pid], found[1])] == [
        (True, 500 << 20),
        (False, 300 << 20),
    ]
    assert len(found) == 2
