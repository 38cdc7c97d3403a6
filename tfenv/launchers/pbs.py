"""OpenPBS, PBS Pro and Torque."""

from __future__ import annotations

from tfenv.launchers.base import Launcher, pick

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_JOB = {
    "id": "PBS_JOBID",
    "array_task": "PBS_ARRAY_INDEX",
    "partition": "PBS_QUEUE",
    "user": "PBS_O_LOGNAME",
    "name": "PBS_JOBNAME",
}


def _read_job(environ: Mapping[str, str]) -> dict[str, str]:
    return {"scheduler": "pbs", **pick(environ, _JOB)}


LAUNCHER = Launcher("PBS", read_job=_read_job)
