"""`tfgpu slurm`: no task fails because of it, and it says what Slurm can read, or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pytest

from tests.cli.conftest import Tfgpu
from tests.deploy.test_slurm_step import STEPD
from tfenv.audit.record import format_timestamp

TASK = {"SLURM_JOB_PARTITION": "gpu", "SLURM_JOB_ID": "14", "SLURM_STEP_ID": "0"}
GPU = {"SLURM_STEP_GPUS": "0", "SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "0"}
GIB = 1 << 30


def make_ended(pid: int, peak: int, **job: str) -> str:
    """Return the record of a process that ran for 3 s and held so much of GPU 0, as a line of the log."""
    device = {"uuid": "GPU-a0fa4e00", "limit_bytes": 8 * GIB, "peak_bytes": peak}
    record = {"timestamp": "2026-11-05T09:00:00.000000Z", "event": "policy_ended", "pid": pid, "job": job}
    return json.dumps({**record, "host": "node1", "user": "alice", "duration_ms": 3000, "devices": [device]})


#: Of two steps of job 14, of a task of the array 14, and of a job with that name.
LOG = [
    make_ended(1, 2 * GIB, id="14", step="0"),
    make_ended(2, 4 * GIB, id="14", step="1"),
    make_ended(3, 6 * GIB, id="15", step="0", array_id="14", array_task="0"),
    make_ended(4, 7 * GIB, id="16", step="0", name="14"),
]


@pytest.fixture
def epilog(tfgpu: Tfgpu, project: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return what runs the TaskEpilog in a project whose log has those records."""
    (project / "tfgpu.toml").write_text('[audit]\nfile = "audit.jsonl"\n')
    (project / "audit.jsonl").write_text("".join(f"{line}\n" for line in LOG))
    return lambda **environ: tfgpu("slurm", "task-epilog", env=environ)


def test_the_task_prolog_prints_for_slurm(tfgpu: Tfgpu, tmp_path: Path) -> None:
    """Each line of stdout is one that Slurm carries out. There is nothing else."""
    (tmp_path / "gpu.toml").touch()
    done = tfgpu("slurm", "task-prolog", "--folder", tmp_path, env=TASK)
    assert (done.returncode, done.stderr) == (0, "")
    path = f"{tmp_path}/gpu.toml"
    assert done.stdout == f"export TFGPU_SITE_CONFIG={path}\nexport TFGPU_SLURM_SITE=14.0 {path}\n"


def test_it_prints_nothing_for_a_partition_without_a_file(tfgpu: Tfgpu, tmp_path: Path) -> None:
    """Also where there is no folder."""
    done = tfgpu("slurm", "task-prolog", "--folder", tmp_path / "none", env=TASK)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("action", ["task-prolog", "task-epilog"])
def test_what_goes_wrong_is_said_and_no_failure(action: str, tfgpu: Tfgpu) -> None:
    """Outside of Slurm: status 0, nothing on stdout, and what to do on stderr."""
    done = tfgpu("slurm", action)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith(f"tfgpu slurm {action}: SLURM_JOB_")


@pytest.mark.parametrize("action", ["task-prolog", "task-epilog"])
def test_it_runs_without_the_environment_of_a_login(action: str, tmp_path: Path) -> None:
    """With --export=NONE a task has Slurm's variables, and neither PATH nor HOME nor USER."""
    (tmp_path / "gpu.toml").touch()
    options = ("--folder", str(tmp_path)) if action == "task-prolog" else ()
    done = subprocess.run(
        [sys.executable, "-I", "-m", "tfenv", "slurm", action, *options],
        env=TASK, cwd="/", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) is (action == "task-prolog")


def test_the_task_prolog_loads_little(tmp_path: Path) -> None:
    """It runs before every task: it reads no policy, and asks for no GPU."""
    program = (
        "import sys; from tfenv.cli.main import main; main(['slurm', 'task-prolog', '--folder', sys.argv[1]]); "
        "print([n for n in sys.modules if n.startswith(('tfenv.', 'rich', 'tomli', 'pynvml', 'structlog'))])"
    )
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TFGPU_"))}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environ | TASK | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "tfenv.deploy.task_prolog" in done.stdout
    assert not any(word in done.stdout for word in ("tfenv.pipeline", "tfenv.config", "pynvml", "tomli", "rich"))


# ---- the TaskEpilog

Epilog = Callable[..., subprocess.CompletedProcess[str]]
CASES = {
    "a batch script": ({"SLURM_JOB_ID": "14"}, "job 14: 1 GPU, peak 4.0 GiB of 8.0 GiB (50%), 2 processes, 3.0s"),
    "a step": (TASK, "job 14.0: 1 GPU, peak 2.0 GiB of 8.0 GiB (25%), 1 process, 3.0s"),
    "a task of an array": (
        {"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "14", "SLURM_ARRAY_TASK_ID": "0"},
        "job 14_0: 1 GPU, peak 6.0 GiB of 8.0 GiB (75%), 1 process, 3.0s",
    ),
}


@pytest.mark.parametrize(("variables", "line"), CASES.values(), ids=CASES)
def test_the_line_is_about_this_job_or_step_alone(variables: dict[str, str], line: str, epilog: Epilog) -> None:
    """It is on stderr, where Slurm shows it to the user. Jobs of a like name do not count."""
    done = epilog(**variables, **GPU)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"tfgpu: {line}\n")


NOTHING = {
    "a job without GPUs": TASK,
    "a step without GPUs": {**TASK, "SLURM_JOB_GPUS": "0"},
    "a job without records": {**TASK, **GPU, "SLURM_JOB_ID": "99"},
    "a task that is not the last one": {**TASK, **GPU, "SLURM_LOCALID": "1"},
}


@pytest.mark.parametrize("variables", NOTHING.values(), ids=NOTHING)
def test_there_is_no_line_where_there_is_nothing_to_say(variables: dict[str, str], epilog: Epilog) -> None:
    """Status 0, and not a word."""
    done = epilog(**variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_older_job_of_the_same_number_does_not_count(epilog: Epilog, project: Path) -> None:
    """Numbers come again. What was recorded before Slurm's process for the step began is of another job."""
    assert epilog(**TASK, **GPU).stderr
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TFGPU_"))}
    environ |= {**TASK, **GPU, "PYTHONPATH": str(Path(__file__).parents[3])}
    program = f"{sys.executable} -m tfenv slurm task-epilog; true"
    for when, printed in (("2026-11-05T09:00:00.000000Z", False), (format_timestamp(datetime.now(timezone.utc)), True)):
        line = json.dumps({**json.loads(LOG[0]), "timestamp": when})
        (project / "audit.jsonl").write_text(f"{line}\n")
        done = subprocess.run(
            [sys.executable, "-c", STEPD, "slurmstepd: [14.0]", program, "alone"],
            env=environ, cwd=project, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stderr.startswith("tfgpu: job 14.0: 1 GPU") is printed


def test_it_reads_the_policy_of_the_job_also_with_dash_i(epilog: Epilog, project: Path) -> None:
    """Python's -I keeps the job's PYTHONPATH away. The project's and the site's file count as in the job's programs."""
    line = epilog(**TASK, **GPU).stderr
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TFGPU_", "XDG_"))}
    site = {"TFGPU_SITE_CONFIG": str(project / "site.toml")}
    for name, log, variables in (("tfgpu.toml", "audit.jsonl", {}), ("site.toml", project / "audit.jsonl", site)):
        (project / name).write_text(f'[audit]\nfile = "{log}"\n')
        done = subprocess.run(
            [sys.executable, "-I", "-m", "tfenv", "slurm", "task-epilog"],
            env={**environ, **TASK, **GPU, **variables, "XDG_STATE_HOME": str(project / "state")},
            cwd=project, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stderr == line
        (project / name).unlink()
