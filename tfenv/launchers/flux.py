"""Flux."""

from __future__ import annotations

from tfenv.launchers.base import Launcher, pick

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_JOB = {"id": "FLUX_JOB_ID"}


def _read_job(environ: Mapping[str, str]) -> dict[str, str]:
    return {"scheduler": "flux", **pick(environ, _JOB)}


LAUNCHER = Launcher("Flux", read_job=_read_job)
