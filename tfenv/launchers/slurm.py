"""Slurm."""

from __future__ import annotations

from tfenv.launchers.base import Launcher, pick

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_JOB = {
    "id": "SLURM_JOB_ID",
    "array_id": "SLURM_ARRAY_JOB_ID",
    "array_task": "SLURM_ARRAY_TASK_ID",
    "step": "SLURM_STEP_ID",
    "partition": "SLURM_JOB_PARTITION",
    "user": "SLURM_JOB_USER",
    "name": "SLURM_JOB_NAME",
}


def _read_job(environ: Mapping[str, str]) -> dict[str, str]:
    return {"scheduler": "slurm", **pick(environ, _JOB)}


LAUNCHER = Launcher("Slurm", read_job=_read_job)
