"""Slurm. Besides CUDA_VISIBLE_DEVICES it lists the GPUs of a job and of each step in variables of its own.

What it sets is measured with Slurm 22.05. `sbatch` from inside of a step hands that step's variables to the new job.
Only SLURM_JOB_GPUS and SLURM_GPUS_ON_NODE, the number of GPUs, are always of the process's own job and step.
"""

from __future__ import annotations

from tfenv.launchers.base import Launcher, describe_by, read_number
from tfenv.policy.model import Share

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
#: What --gres=mps sets.
_PERCENTAGE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
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


def _read_share(environ: Mapping[str, str]) -> Share | None:
    """Return the share that a task has of the GPUs on its node.

    Slurm counts shards and the percentage of MPS for the job or step on the node, so its tasks there divide them.
    A job of whole GPUs that was submitted from a step with shards inherits their number, and has too small a share.
    """
    tasks, gpus = _count_tasks(environ), int(read_number(environ.get("SLURM_GPUS_ON_NODE")))
    among = "" if tasks == 1 else f" among {tasks} tasks"
    shards = int(read_number(environ.get("SLURM_SHARDS_ON_NODE")))
    if shards > 0:
        text = f"{shards} shard{'' if shards == 1 else 's'}{among}"
        return Share("Slurm", text, fraction=1 / tasks, shards=shards, gpus=max(gpus, 1))
    percentage = read_number(environ.get(_PERCENTAGE))
    # Slurm sets this variable for whole GPUs, and not for --gres=mps: the percentage is then the program's own.
    if 0 < percentage <= 100 and "GPU_DEVICE_ORDINAL" not in environ:  # noqa: PLR2004 - per cent
        return Share("Slurm", f"MPS percentage {percentage:g}{among}", fraction=percentage / 100 / tasks)
    return Share("Slurm", f"{gpus} GPU{'' if gpus == 1 else 's'}") if gpus > 0 else None


def _count_tasks(environ: Mapping[str, str]) -> int:
    """Return how many tasks the step has on this node. In a batch script: how many the job asked for.

    Slurm writes "2(x3),1" for three nodes of 2 tasks, and one of 1. Where it does not name this node, the largest
    number counts. In a step this variable is the step's.
    """
    node, largest = int(read_number(environ.get("SLURM_NODEID"), -1)), 1
    for part in environ.get("SLURM_TASKS_PER_NODE", "").split(","):
        number, _, times = part.partition("(x")
        tasks, nodes = max(int(read_number(number)), 1), int(read_number(times.rstrip(")"), 1))
        if 0 <= node < nodes:
            return tasks
        node, largest = node - nodes, max(largest, tasks)
    return largest


LAUNCHER = Launcher(
    "Slurm",
    read_job=describe_by("slurm", _JOB),
    read_devices=_read_devices,
    lists_devices=True,
    read_share=_read_share,
    has_own_gpus=_has_own_gpus,
)
