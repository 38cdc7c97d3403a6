"""Slurm."""

from __future__ import annotations

from tfenv.launchers.base import Launcher, pick, read_number
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

_MPS = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"


def _read_job(environ: Mapping[str, str]) -> dict[str, str]:
    return {"scheduler": "slurm", **pick(environ, _JOB)}


def _read_share(environ: Mapping[str, str]) -> Share | None:
    """Return the share that a task has of the GPUs on its node.

    Slurm counts shards and the percentage of MPS for the job or step on the node, so its tasks there divide them
    (measured with Slurm 22.05).
    """
    tasks, gpus = _count_tasks(environ), int(read_number(environ.get("SLURM_GPUS_ON_NODE")))
    among = "" if tasks == 1 else f" among {tasks} tasks"
    shards = int(read_number(environ.get("SLURM_SHARDS_ON_NODE")))
    if shards > 0:
        text = f"{shards} shard{'' if shards == 1 else 's'}{among}"
        return Share("Slurm", text, fraction=1 / tasks, shards=shards, gpus=max(gpus, 1))
    percentage = read_number(environ.get(_MPS))
    # Beside --gres=mps Slurm leaves this variable unset. With it the percentage is the program's own.
    if 0 < percentage <= 100 and "GPU_DEVICE_ORDINAL" not in environ:  # noqa: PLR2004 - per cent
        return Share("Slurm", f"{percentage:g}% of a GPU by MPS{among}", fraction=percentage / 100 / tasks)
    return Share("Slurm", f"{gpus} GPU{'' if gpus == 1 else 's'}") if gpus > 0 else None


def _count_tasks(environ: Mapping[str, str]) -> int:
    """Return how many tasks the step has on this node. In a batch script: how many the job asked for.

    Slurm writes "2(x3),1" for three nodes of 2 tasks, and one of 1. Where it does not name this node, the largest
    number counts.
    """
    node, largest = int(read_number(environ.get("SLURM_NODEID"), -1)), 1
    for part in (environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")).split(","):
        number, _, times = part.partition("(x")
        tasks, nodes = max(int(read_number(number)), 1), int(read_number(times.rstrip(")"), 1))
        if 0 <= node < nodes:
            return tasks
        node, largest = node - nodes, max(largest, tasks)
    return largest


LAUNCHER = Launcher("Slurm", read_job=_read_job, read_share=_read_share)
