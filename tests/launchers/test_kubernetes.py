"""Kubernetes: which GPUs a pod was given, and which pod it is."""

from __future__ import annotations

import pytest

from tfenv.launchers.grant import read_grant

POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "train-0"}
FIRST, SECOND = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-3e6f1c2a-0000-5000-8000-000000000001"


@pytest.mark.parametrize(
    ("value", "listed", "mounted"),
    [
        (FIRST, (FIRST,), True),
        (f"{FIRST},{SECOND}", (FIRST, SECOND), True),
        ("void", None, True),
        ("/var/run/nvidia-container-devices", None, True),
        (None, None, True),
        ("0,1", None, True),
        ("all", None, False),
        ("none", None, False),
    ],
)
def test_what_a_device_plugin_gave_was_given(value: str | None, listed: tuple[str, ...] | None, mounted: bool) -> None:
    """UUIDs are a list. "all" is of the image: a pod that asked for no GPU sees all of the node's."""
    environ = POD | ({} if value is None else {"NVIDIA_VISIBLE_DEVICES": value})
    grant, _ = read_grant(environ, environ, "b0")
    assert (grant.launcher, grant.listed, grant.mounted) == ("Kubernetes", listed, mounted)
    assert (grant.scheduler, grant.unlisted) == (True, listed is None)
    assert grant.job == {"scheduler": "kubernetes", "pod": "train-0"}


def test_a_container_without_kubernetes_is_no_pod() -> None:
    """Docker sets NVIDIA_VISIBLE_DEVICES, too, and counts the container's GPUs from 0."""
    environ = {"NVIDIA_VISIBLE_DEVICES": "all", "HOSTNAME": "c0ffee"}
    grant, _ = read_grant(environ, environ, "b0")
    assert (grant.launcher, grant.scheduler, grant.job) == ("", False, {})
