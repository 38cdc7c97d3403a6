"""Dask. A Nanny writes the worker's variables, CUDA_VISIBLE_DEVICES among them, after its Python started."""

from __future__ import annotations

import sys

from tfenv.launchers.base import Launcher


def _is_worker() -> bool:
    worker = getattr(sys.modules.get("distributed.worker"), "Worker", None)
    return bool(getattr(worker, "_instances", None))


LAUNCHER = Launcher("Dask", is_scheduler=False, is_ours=lambda _: _is_worker(), assigns_late=_is_worker)
