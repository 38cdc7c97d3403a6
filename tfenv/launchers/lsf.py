"""IBM Spectrum LSF."""

from __future__ import annotations

from tfenv.launchers.base import Launcher, pick

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_JOB = {"id": "LSB_JOBID", "array_task": "LSB_JOBINDEX", "partition": "LSB_QUEUE", "name": "LSB_JOBNAME"}


def _read_job(environ: Mapping[str, str]) -> dict[str, str]:
    return {"scheduler": "lsf", **pick(environ, _JOB)}


LAUNCHER = Launcher("LSF", read_job=_read_job)
