"""Which step a TaskProlog or TaskEpilog runs for, and whether its task is the last one of the step on the node."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tfenv.deploy.slurm_step import SlurmStep, find_step

ROOT = Path(__file__).parents[2]
LEAKED = {"SLURM_JOB_ID": "15", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "0"}
#: Becomes a process of another title, which starts the program below a shell, perhaps beside another task.
STEPD = """
import os, sys
title, program, other = sys.argv[1:]
start = (
    "import subprocess, sys;"
    "other = subprocess.Popen(['sleep', '100']) if sys.argv[2] == 'beside another task' else None;"
    "subprocess.check_call(['sh', '-c', sys.argv[1]]); other and other.kill()"
)
os.execv(sys.executable, [title, "-c", start, program, other])
"""
ASK = """
import os
from tfenv.deploy.slurm_step import find_step
step = find_step(os.environ)
assert step.seconds is None or 0 <= step.seconds < 60, step.seconds
print(step.name, step.is_last_task, "" if step.seconds is None else "new", end="")
"""


def find_below(title: str, other: str = "alone") -> str:
    """What a program finds below a shell below a process of this title."""
    done = subprocess.run(
        [sys.executable, "-c", STEPD, title, f"{sys.executable} -c '{ASK}'; true", other],
        env={"PYTHONPATH": str(ROOT), **LEAKED},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_step_is_the_one_that_slurm_runs() -> None:
    """A batch script that was submitted from step 0 of another job has that step's variable, and is not step 0."""
    assert find_below("slurmstepd: [15.batch]") == "batch True new"
    assert find_below("slurmstepd: [15.interactive]") == "batch True new"
    assert find_below("slurmstepd: [15.3]") == "3 True new"
    assert find_below("slurmstepd: [14.batch]") == "0 True"
    assert find_below("python") == "0 True"


def test_a_task_beside_others_is_not_the_last_one() -> None:
    """Slurm's process for the step has other children as long as other tasks run."""
    assert find_below("slurmstepd: [15.3]", "beside another task") == "3 False new"


def test_without_slurms_process_the_first_task_counts_as_the_last() -> None:
    """/proc may be hidden. Slurm sets SLURM_STEP_ID in the tasks of srun alone."""
    assert find_step({"SLURM_JOB_ID": "15"}) == SlurmStep("batch", is_last_task=True)
    assert find_step({**LEAKED, "SLURM_LOCALID": "1"}) == SlurmStep("0", is_last_task=False)
