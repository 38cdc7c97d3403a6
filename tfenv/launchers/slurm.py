"""Slurm. Besides CUDA_VISIBLE_DEVICES it lists the GPUs of a job and of each step in variables of its own.

What it sets is measured with Slurm 22.05. `sbatch` from inside of a step hands that step's variables to the new job.
Only SLURM_JOB_GPUS and SLURM_GPUS_ON_NODE, the number of GPUs, are always of the process's own job and step.
"""

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
#: How --gpus-per-task and --gpu-bind divide a step's GPUs among its tasks. "closest" may give two tasks the same.
_DIVIDED = ("per_task", "single", "map", "mask")


def _read_devices(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the GPUs of the step, or of the job in a batch script. () for a step without any in a job that has some.

    Returns:
        None: Slurm gave the job no GPU.
    """
    job, step = _split(environ.get("SLURM_JOB_GPUS")), _split(environ.get("SLURM_STEP_GPUS"))
    count = environ.get("SLURM_GPUS_ON_NODE")
    if count is None:  # neither the step nor, without a step, the job has any
        return () if job and "CUDA_VISIBLE_DEVICES" not in environ else job or None
    is_own = step and (not job or set(step) <= set(job)) and (str(len(step)) == count or _has_own_gpus(environ))
    return step if is_own else job or step or None


def _split(value: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (value or "").split(",")))


def _has_own_gpus(environ: Mapping[str, str]) -> bool:
    """Return whether Slurm divided the step's GPUs among its tasks: "gpu:per_task:1"."""
    kind, _, how = environ.get("SLURMD_TRES_BIND", "").partition("gpu:")
    return kind in ("", "gres/") and how.startswith(_DIVIDED)


def _read_job(environ: Mapping[str, str]) -> dict[str, str]:
    return {"scheduler": "slurm", **pick(environ, _JOB)}


LAUNCHER = Launcher(
    "Slurm", read_job=_read_job, read_devices=_read_devices, lists_devices=True, has_own_gpus=_has_own_gpus
)
