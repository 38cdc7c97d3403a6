"""Kubernetes, whose device plugins mount the devices of GPUs into a container.

NVIDIA's plugin also says in NVIDIA_VISIBLE_DEVICES which they are: UUIDs, "void" with CDI, or a path with its strategy
`volume-mounts`. "all" comes from an image. The container runtime then shows every GPU of the node to a pod that asked
for none (NVIDIA/k8s-device-plugin#61). Other vendors' plugins set nothing.
"""

from __future__ import annotations

from tfenv.launchers.base import Launcher

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_VARIABLE = "NVIDIA_VISIBLE_DEVICES"
#: Values that no device plugin sets.
_OF_IMAGES = ("all", "none")
_PREFIXES = ("GPU-", "MIG-")
#: The namespace of the pod, where its service account is mounted.
_NAMESPACE_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"


def _read_devices(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the UUIDs of the GPUs that the plugin names. A privileged container sees all others, too."""
    named = tuple(token.strip() for token in environ.get(_VARIABLE, "").split(","))
    return named if all(token.startswith(_PREFIXES) and token not in _PREFIXES for token in named) else None


def _mounts_devices(environ: Mapping[str, str]) -> bool:
    return environ.get(_VARIABLE) not in _OF_IMAGES


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


LAUNCHER = Launcher(
    "Kubernetes",
    read_job=_read_job,
    read_devices=_read_devices,
    lists_devices=True,
    mounts_devices=_mounts_devices,
)
