"""Slurm: which GPUs it gave, as Slurm 22.05 says in its variables. Measured in real jobs, see tests/engines."""

from __future__ import annotations

import pytest

from tfenv.launchers.grant import read_grant

SUBMITTED_FROM_A_STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_GPUS": "0,1"}
CASES = {
    "srun --gres=gpu:2": ({"SLURM_STEP_GPUS": "0,1", "SLURM_GPUS_ON_NODE": "2"}, "0,1", ("0", "1")),
    "srun": ({}, None, None),
    "a batch script": ({"SLURM_JOB_GPUS": "0,1", "SLURM_GPUS_ON_NODE": "2"}, "0,1", ("0", "1")),
    "its step of one": (
        {"SLURM_JOB_GPUS": "0,1", "SLURM_STEP_GPUS": "0", "SLURM_GPUS_ON_NODE": "1"},
        "0",
        ("0",),
    ),
    "its step of none": ({"SLURM_JOB_GPUS": "0,1"}, None, ()),
    "a step's own sbatch without gres": (SUBMITTED_FROM_A_STEP, None, None),
    "a step's own sbatch with one": (
        SUBMITTED_FROM_A_STEP | {"SLURM_JOB_GPUS": "2", "SLURM_GPUS_ON_NODE": "1"},
        "2",
        ("2",),
    ),
    "a step's own sbatch with its first GPU and another": (
        SUBMITTED_FROM_A_STEP | {"SLURM_STEP_GPUS": "0"} | {"SLURM_JOB_GPUS": "0,3", "SLURM_GPUS_ON_NODE": "2"},
        "0,3",
        ("0", "3"),
    ),
    "ConstrainDevices": ({"SLURM_STEP_GPUS": "2", "SLURM_GPUS_ON_NODE": "1"}, "0", ("2",)),
    "salloc's shell": ({"SLURM_TASKS_PER_NODE": "1"}, None, None),
}


@pytest.mark.parametrize(("variables", "visible", "listed"), CASES.values(), ids=CASES)
def test_slurm_lists_the_gpus_of_the_step_or_else_of_the_job(
    variables: dict[str, str], visible: str | None, listed: tuple[str, ...] | None
) -> None:
    """A step's list that another job handed on counts for nothing. None: Slurm gave no GPU."""
    environ = {"SLURM_JOB_ID": "14", **variables, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})}
    grant, _ = read_grant(environ, environ, "b0")
    assert (grant.launcher, grant.scheduler, grant.listed) == ("Slurm", True, listed)
    assert grant.unlisted == (listed is None)


@pytest.mark.parametrize(
    ("bind", "own"),
    [("gpu:per_task:1", True), ("gres/gpu:single:1", True), ("gpu:closest", False), ("cpu:map", False), (None, False)],
)
def test_tasks_among_which_slurm_divided_the_gpus_have_their_own(bind: str | None, own: bool) -> None:
    """`--gpus-per-task=1`: there is one GPU for each rank, and each lists its own."""
    environ = {"SLURM_JOB_ID": "14", "SLURM_STEP_GPUS": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_LOCALID": "1"}
    environ |= {} if bind is None else {"SLURMD_TRES_BIND": bind}
    grant, _ = read_grant(environ, environ, "b0")
    assert grant.own_gpus == own
    assert not own or grant.listed == ("1",)


def test_an_array_task_is_known_by_both_its_ids() -> None:
    """14_0 has a job id of its own, 16 for example."""
    environ = {
        "SLURM_JOB_ID": "16",
        "SLURM_ARRAY_JOB_ID": "14",
        "SLURM_ARRAY_TASK_ID": "0",
        "SLURM_JOB_PARTITION": "gpu",
        "SLURM_JOB_USER": "alice",
    }
    job = read_grant(environ, environ, "b0")[0].job
    assert job == {
        "scheduler": "slurm", "id": "16", "array_id": "14", "array_task": "0", "partition": "gpu", "user": "alice"
    }  # fmt: skip
