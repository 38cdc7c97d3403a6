"""PyTorch, as the registry knows it."""

from __future__ import annotations

import sys

from tfenv.frameworks.torch.entry_points import INIT
from tfenv.frameworks.torch.interception import get_installed, intercept, is_built_with_cuda, watch_use
from tfenv.frameworks.torch.peaks import read_peaks  # at its exit a process may have another root
from tfenv.frameworks.torch.settings import prepare_environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from tfenv.errors import Finding
    from tfenv.frameworks.base import CreatedDevices, Framework, Peaks, PolicyCallbacks
    from tfenv.policy.model import Plan
    from tfenv.policy.supports import Capability


class PyTorch:
    """PyTorch, and with it Keras on the PyTorch backend. The attributes are those of `base.Framework`."""

    name = "torch"
    title = "PyTorch"
    supports: frozenset[Capability] = frozenset(("growth", "limit", "limit_per_gpu", "choice"))
    first_listing = INIT
    public_api = "torch.cuda.set_per_process_memory_fraction"

    def version(self) -> str | None:
        """Return the version of the PyTorch that is loaded. None means unknown."""
        version = getattr(sys.modules.get("torch"), "__version__", None)
        return None if version is None else str(version)

    def devices_exist(self, *, gpu_is_open: bool) -> bool:
        """Return whether PyTorch uses GPUs in this process. TorchScript leaves no trace in Python."""
        is_initialized = getattr(sys.modules.get("torch.cuda"), "is_initialized", bool)
        return gpu_is_open or bool(is_initialized())

    def read_peaks(self, created: CreatedDevices) -> Peaks:
        """Return the peaks of what the allocator held. There are none where torch.cuda was not initialised."""
        return read_peaks(created)

    def can_use_gpus(self) -> bool:
        """Return whether it is built for GPUs."""
        return is_built_with_cuda()

    def find_master(self, earlier: Sequence[str]) -> str | None:  # noqa: ARG002 - the protocol's
        """Return None: no other framework imports PyTorch to be helped."""
        return None

    def release_memory(self) -> bool:
        """Lower all limits to 0, if no memory is reserved."""
        installed = get_installed()
        return installed is not None and installed.release_memory()

    def prepare(self, plan: Plan, environ: MutableMapping[str, str]) -> list[Finding]:
        """Clear the variables that would defeat the plan."""
        return prepare_environment(plan, environ)

    def intercept(self, policy: PolicyCallbacks) -> tuple[str, ...]:
        """Wrap PyTorch's entry points, and return those that are missing."""
        return intercept(policy)

    def watch_use(self, policy: PolicyCallbacks) -> None:
        """Ask the policy whenever the program uses torch.cuda or moves a module."""
        watch_use(policy)

    def apply_publicly(self, policy: PolicyCallbacks) -> None:
        """Apply what public calls can, when torch.cuda is initialised."""
        from tfenv.frameworks.torch.public_api import apply_publicly

        apply_publicly(policy)


FRAMEWORK: Framework = PyTorch()
