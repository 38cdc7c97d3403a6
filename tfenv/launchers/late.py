"""Launchers that assign GPUs to a worker after its Python started: Ray and Dask.

Nothing of theirs is imported. A module of theirs that the process has loaded is asked.
"""

from __future__ import annotations

import sys

#: Ray's mode of a process that runs tasks and actors. A driver has another one.
_RAY_WORKER = 1


def assigns_gpus_late() -> bool:
    """Return whether this process is a worker of a launcher that writes CUDA_VISIBLE_DEVICES while it runs."""
    return _is_ray_worker() or _is_dask_worker()


def _is_ray_worker() -> bool:
    worker = getattr(sys.modules.get("ray._private.worker"), "global_worker", None)
    return getattr(worker, "mode", None) == _RAY_WORKER


def _is_dask_worker() -> bool:
    worker = getattr(sys.modules.get("distributed.worker"), "Worker", None)
    return bool(getattr(worker, "_instances", None))
