"""Grid Engine: SGE, Univa, Altair."""

from __future__ import annotations

from tfenv.launchers.base import Launcher, pick

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_JOB = {"id": "JOB_ID", "array_task": "SGE_TASK_ID", "partition": "QUEUE", "name": "JOB_NAME"}


def _read_job(environ: Mapping[str, str]) -> dict[str, str]:
    return {"scheduler": "grid_engine", **pick(environ, _JOB)}


LAUNCHER = Launcher("Grid Engine", read_job=_read_job)
