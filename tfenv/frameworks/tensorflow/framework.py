"""TensorFlow, as the registry knows it."""

from __future__ import annotations

import os
import sys

from tfenv.frameworks.tensorflow.entry_points import FIRST_LISTING, intercept, watch_use
from tfenv.frameworks.tensorflow.environment import prepare_environment
from tfenv.frameworks.tensorflow.peaks import read_peaks  # at its exit a process may have another root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from tfenv.errors import Finding
    from tfenv.frameworks.base import CreatedDevices, Framework, Peaks, PolicyCallbacks
    from tfenv.policy.model import Plan
    from tfenv.policy.supports import Capability


class TensorFlow:
    """TensorFlow, and with it Keras on the TensorFlow backend. The attributes are those of `base.Framework`."""

    name = "tensorflow"
    title = "TensorFlow"
    supports: frozenset[Capability] = frozenset(("growth", "limit", "limit_per_gpu", "split", "allocator", "choice"))
    first_listing = FIRST_LISTING
    public_api = "tf.config"

    def version(self) -> str | None:
        """Return the version of the TensorFlow that is loaded. None means unknown."""
        return getattr(sys.modules.get("tensorflow"), "__version__", None)

    def devices_exist(self, *, gpu_is_open: bool) -> bool:
        """Return whether TensorFlow has created devices in this process.

        Sessions, `list_local_devices` and servers leave no trace in Python, so an open GPU is taken for theirs.
        """
        module = sys.modules.get("tensorflow.python.eager.context")
        context = getattr(module, "_context", None)
        return gpu_is_open or getattr(context, "_context_handle", None) is not None

    def read_peaks(self, created: CreatedDevices) -> Peaks:
        """Return the peaks of the eager context's devices. Without one there are none: sessions tell nobody theirs."""
        return read_peaks(created)

    def can_use_gpus(self) -> bool:
        """Return whether it is built for CUDA."""
        module = sys.modules.get("tensorflow")
        return module is not None and bool(module.test.is_built_with_cuda())

    def find_master(self, earlier: Sequence[str]) -> str | None:
        """Return JAX, or Keras's other backend, where the program imports TensorFlow to read its data.

        TensorFlow imports JAX by itself if it is installed. That one is not earlier.
        """
        backend = os.environ.get("KERAS_BACKEND")
        if backend in ("jax", "torch") and backend in sys.modules:
            return backend
        return "jax" if "jax" in earlier else None

    def release_memory(self) -> bool:
        """Return False: the limits of its devices are those they were created with."""
        return False

    def prepare(self, plan: Plan, environ: MutableMapping[str, str]) -> list[Finding]:
        """Clear the variables that would defeat the plan, and set the allocator that it asks for."""
        return prepare_environment(plan, environ)

    def intercept(self, policy: PolicyCallbacks) -> tuple[str, ...]:
        """Wrap TensorFlow's entry points, and return those that are missing."""
        return intercept(policy)

    def watch_use(self, policy: PolicyCallbacks) -> None:
        """Ask the policy whenever the program uses TensorFlow's devices or lists them once more."""
        watch_use(policy)

    def apply_publicly(self, policy: PolicyCallbacks) -> None:
        """Apply what `tf.config` can, at the first listing of devices."""
        from tfenv.frameworks.tensorflow.public_api import apply_publicly

        apply_publicly(policy)


FRAMEWORK: Framework = TensorFlow()
