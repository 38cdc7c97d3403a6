"""JAX, as the registry knows it."""

from __future__ import annotations

import sys

from tfenv.frameworks.jax.entry_points import (
    FIRST_LISTING,
    apply_publicly,
    can_use_cuda,
    intercept,
    watch_use,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence
    from typing import Any

    from tfenv.errors import Finding
    from tfenv.frameworks.base import CreatedDevices, Framework, Peaks, PolicyCallbacks
    from tfenv.policy.model import Plan
    from tfenv.policy.supports import Capability


class Jax:
    """JAX, and with it Keras on the JAX backend. The attributes are those of `base.Framework`."""

    name = "jax"
    title = "JAX"
    supports: frozenset[Capability] = frozenset(("growth", "limit", "allocator", "choice"))
    first_listing = FIRST_LISTING
    public_api = "the variables XLA_CLIENT_MEM_FRACTION, XLA_PYTHON_CLIENT_PREALLOCATE and XLA_PYTHON_CLIENT_ALLOCATOR"

    def version(self) -> str | None:
        """Return the version of the JAX that is loaded. None means unknown."""
        return getattr(sys.modules.get("jax"), "__version__", None)

    def can_use_gpus(self) -> bool:
        """Return whether a plugin of CUDA is installed, and JAX_PLATFORMS does not exclude it."""
        return can_use_cuda()

    def find_master(self, earlier: Sequence[str]) -> str | None:  # noqa: ARG002 - the protocol's
        """Return None: a program that imports JAX computes with it."""
        return None

    def devices_exist(self, *, gpu_is_open: bool) -> bool:  # noqa: ARG002 - JAX's clients leave a trace
        """Return whether JAX has a client of GPUs in this process."""
        return bool(_list_devices())

    def read_peaks(self, created: CreatedDevices) -> Peaks:
        """Return the peaks of the client that was created last, as its allocators count them."""
        try:
            devices = list(created.values())[-1]
            peaks = [int(device.memory_stats()["peak_bytes_in_use"]) for device in _list_devices()]
            return tuple(zip(devices, peaks, strict=True))
        except Exception:  # noqa: BLE001 - an allocator that counts nothing, and names of a new JAX
            return ()

    def release_memory(self) -> bool:
        """Return False: the limit of a client is the one it was created with."""
        return False

    def prepare(self, plan: Plan, environ: MutableMapping[str, str]) -> list[Finding]:
        """Clear the variables that would defeat the plan."""
        from tfenv.frameworks.jax.environment import prepare_environment

        return prepare_environment(plan, environ)

    def intercept(self, policy: PolicyCallbacks) -> tuple[str, ...]:
        """Wrap JAX's entry points, and return those that are missing."""
        return intercept(policy)

    def watch_use(self, policy: PolicyCallbacks) -> None:
        """Ask the policy whenever the program asks JAX for its devices once more."""
        watch_use(policy)

    def apply_publicly(self, policy: PolicyCallbacks) -> None:
        """Write the policy into the variables that JAX reads."""
        apply_publicly(policy)


def _list_devices() -> list[Any]:
    """Return the GPUs of the clients that are there, as CUDA counts. No client is created for it."""
    clients = getattr(sys.modules.get("jax._src.xla_bridge"), "_backends", {}).values()
    found = [device for client in clients if client.platform == "gpu" for device in client.local_devices()]
    return sorted(found, key=lambda device: int(device.local_hardware_id))


FRAMEWORK: Framework = Jax()
