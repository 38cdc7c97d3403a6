"""OpenPBS, PBS Pro and Torque."""

from __future__ import annotations

from tfenv.launchers.base import Launcher, describe_by

_JOB = {
    "id": "PBS_JOBID",
    "array_task": "PBS_ARRAY_INDEX",
    "partition": "PBS_QUEUE",
    "user": "PBS_O_LOGNAME",
    "name": "PBS_JOBNAME",
}

LAUNCHER = Launcher("PBS", read_job=describe_by("pbs", _JOB))
