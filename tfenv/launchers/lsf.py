"""IBM Spectrum LSF."""

from __future__ import annotations

from tfenv.launchers.base import Launcher, describe_by

_JOB = {"id": "LSB_JOBID", "array_task": "LSB_JOBINDEX", "partition": "LSB_QUEUE", "name": "LSB_JOBNAME"}

LAUNCHER = Launcher("LSF", read_job=describe_by("lsf", _JOB))
