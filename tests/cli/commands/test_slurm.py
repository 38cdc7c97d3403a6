"""`tfgpu slurm`: no task fails because of it, and it says what Slurm can read, or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Tfgpu

TASK = {"SLURM_JOB_PARTITION": "gpu", "SLURM_JOB_ID": "14", "SLURM_STEP_ID": "0"}


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


@pytest.mark.parametrize("action", ["task-prolog"])
def test_what_goes_wrong_is_said_and_no_failure(action: str, tfgpu: Tfgpu) -> None:
    """Outside of Slurm: status 0, nothing on stdout, and what to do on stderr."""
    done = tfgpu("slurm", action)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith(f"tfgpu slurm {action}: SLURM_JOB_")


@pytest.mark.parametrize("action", ["task-prolog"])
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
