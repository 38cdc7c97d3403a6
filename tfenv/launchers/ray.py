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

#: Ray's mode of a process that runs tasks and actors. A driver has another one.
_WORKER = 1


def _is_ours(environ: Mapping[str, str]) -> bool:
    """Return whether this process is a worker, or one that a worker started. A driver is none."""
    return "RAY_JOB_ID" in environ or _is_worker()


def _is_worker() -> bool:
    worker = getattr(sys.modules.get("ray._private.worker"), "global_worker", None)
    return getattr(worker, "mode", None) == _WORKER


def _read_job(environ: Mapping[str, str]) -> dict[str, str]:
    return {"scheduler": "ray", **pick(environ, {"ray_job": "RAY_JOB_ID"})}


def _read_share(_environ: Mapping[str, str]) -> Share | None:
    """Return what a task or actor asked for as num_gpus. None: no GPU, or another process than a worker."""
    if not _is_worker():  # asked in a program that is none, Ray may start a cluster
        return None
    try:
        gpus = float(sys.modules["ray"].get_runtime_context().get_assigned_resources().get("GPU", 0))
    except Exception:  # noqa: BLE001 - whatever a version of Ray does here must not end the program
        return None
    return Share("Ray", f"num_gpus={gpus:g}", fraction=min(gpus, 1.0)) if gpus > 0 else None


LAUNCHER = Launcher("Ray", is_ours=_is_ours, assigns_late=_is_worker, read_job=_read_job, read_share=_read_share)
