"""Grid Engine: SGE, Univa, Altair."""

from __future__ import annotations

from tfenv.launchers.base import Launcher, describe_by

_JOB = {"id": "JOB_ID", "array_task": "SGE_TASK_ID", "partition": "QUEUE", "name": "JOB_NAME"}

LAUNCHER = Launcher("Grid Engine", read_job=describe_by("grid_engine", _JOB))
