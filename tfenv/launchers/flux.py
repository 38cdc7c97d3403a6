"""Flux."""

from __future__ import annotations

from tfenv.launchers.base import Launcher, describe_by

_JOB = {"id": "FLUX_JOB_ID"}

LAUNCHER = Launcher("Flux", read_job=describe_by("flux", _JOB))
