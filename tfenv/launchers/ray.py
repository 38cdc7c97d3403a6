"""Ray. It writes CUDA_VISIBLE_DEVICES in a worker just before a task's or actor's code runs.

Nothing of Ray's is imported. A module of its that the process has loaded is asked.
"""

from __future__ import annotations

import sys

from tfenv.launchers.base import Launcher, pick
from tfenv.policy.model import Share

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

#: Ray's mode of a process that runs tasks and actors. A driver has another one.
_WORKER = 1
#: RAY_JOB_ID of a worker that was started before there was a job for it.
_NO_JOB = "ffffffff"


def _is_ours(environ: Mapping[str, str]) -> bool:
    """Return whether this process is a worker, or one that a worker started. A driver is none."""
    return "RAY_JOB_ID" in environ or _is_worker()


def _is_worker() -> bool:
    return getattr(_get_worker(), "mode", None) == _WORKER


def _get_worker() -> Any:
    return getattr(sys.modules.get("ray._private.worker"), "global_worker", None)


def _ask_context(question: str) -> Any:
    """Ask Ray's runtime context of a worker. None: Ray does not say, for whatever reason."""
    if not _is_worker():
        return None
    try:
        context = sys.modules["ray.runtime_context"].get_runtime_context()
        return getattr(context, question)()
    except Exception:  # noqa: BLE001 - another version of Ray must not cost the program its GPUs
        return None


def _read_job(environ: Mapping[str, str]) -> dict[str, str]:
    """Describe the job, and in a worker the actor or the task. The variable of a worker started early names no job."""
    job = {"scheduler": "ray", **pick(environ, {"ray_job": "RAY_JOB_ID"})}
    if job.get("ray_job") == _NO_JOB:
        del job["ray_job"]
    task = "" if _ask_context("get_actor_id") else _ask_context("get_task_name")
    told = {"ray_job": _ask_context("get_job_id"), "actor": _name_actor(), "task": task}
    return job | {name: value for name, value in told.items() if value and isinstance(value, str)}


def _name_actor() -> str | None:
    """Return the actor's name or else its class. None: the process runs no actor.

    The task's name tells the class, too, but not in a thread, and Ray Train runs the training in one.
    """
    name = _ask_context("get_actor_name")
    if name or name is None:
        return name if isinstance(name, str) else None
    try:
        worker = _get_worker()
        return type(worker.actors[worker.actor_id]).__name__
    except Exception:  # noqa: BLE001 - as above
        return None


def _read_assignment() -> str | None:
    """Return the GPUs of the task that runs now, as Ray writes them into CUDA_VISIBLE_DEVICES.

    Returns:
        None where Ray does not say.
    """
    assigned = _ask_context("get_accelerator_ids")
    try:
        return ",".join(str(number) for number in assigned["GPU"])
    except (KeyError, TypeError):
        return None


def _read_share(_environ: Mapping[str, str]) -> Share | None:
    """Return what the task or actor asked for as num_gpus. None: no GPU, or Ray does not say."""
    resources = _ask_context("get_assigned_resources")
    gpus = resources.get("GPU") if isinstance(resources, dict) else None
    if not isinstance(gpus, (int, float)) or not gpus > 0:
        return None
    return Share("Ray", f"num_gpus={gpus:g}", fraction=min(float(gpus), 1.0))


LAUNCHER = Launcher(
    "Ray",
    is_ours=_is_ours,
    assigns_late=_is_worker,
    read_assignment=_read_assignment,
    read_job=_read_job,
    read_share=_read_share,
)
