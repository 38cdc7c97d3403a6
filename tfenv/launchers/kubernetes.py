"""Kubernetes."""

from __future__ import annotations

from tfenv.launchers.base import Launcher

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

#: The namespace of the pod, where its service account is mounted.
_NAMESPACE_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"


def _read_job(environ: Mapping[str, str]) -> dict[str, str]:
    job = {"scheduler": "kubernetes", "pod": environ.get("HOSTNAME", ""), "namespace": _read_namespace()}
    return {name: value for name, value in job.items() if value}


def _read_namespace() -> str:
    """Return the namespace of the pod. "": it is not known."""
    try:
        with open(_NAMESPACE_FILE, encoding="utf-8") as file:
            return file.read(256).strip()
    except (OSError, ValueError):
        return ""


LAUNCHER = Launcher("Kubernetes", is_scheduler=False, read_job=_read_job)
