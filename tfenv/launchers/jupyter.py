"""Jupyter and JupyterHub: whose notebook a kernel runs. They give no GPUs."""

from __future__ import annotations

from tfenv.launchers.base import Launcher, pick

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def _read_job(environ: Mapping[str, str]) -> dict[str, str]:
    return pick(environ, {"hub_user": "JUPYTERHUB_USER", "notebook": "JPY_SESSION_NAME"})


LAUNCHER = Launcher("Jupyter", is_scheduler=False, read_job=_read_job)
