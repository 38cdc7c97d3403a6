"""A program that cannot be governed from inside: what the environment holds is all there is."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from tfenv.errors import Finding
    from tfenv.frameworks.base import CreatedDevices, Peaks, PolicyCallbacks
    from tfenv.policy.model import Plan
    from tfenv.policy.supports import Capability


class OpaqueProgram:
    """A program as if it were a framework. CUDA_VISIBLE_DEVICES holds for it, and nothing else does."""

    name = "opaque"
    supports: frozenset[Capability] = frozenset()
    first_listing = ""
    public_api = "CUDA_VISIBLE_DEVICES"

    def __init__(self, title: str) -> None:
        """
        Args:
            title: What messages call it.
        """
        self.title = title

    def version(self) -> str | None:
        """Return None: its version is unknown."""
        return None

    def devices_exist(self, *, gpu_is_open: bool) -> bool:  # noqa: ARG002 - the protocol's
        """Return False: it was not started yet."""
        return False

    def read_peaks(self, created: CreatedDevices) -> Peaks:  # noqa: ARG002 - the protocol's
        """Return (): nobody in this process can ask it."""
        return ()

    def can_use_gpus(self) -> bool:
        """Return True: it may."""
        return True

    def find_master(self, earlier: Sequence[str]) -> str | None:  # noqa: ARG002 - the protocol's
        """Return None: nobody knows what it computes with."""
        return None

    def release_memory(self) -> bool:
        """Return False: nothing of it is in this process."""
        return False

    def prepare(self, plan: Plan, environ: MutableMapping[str, str]) -> list[Finding]:  # noqa: ARG002 - the protocol's
        """Return []: no variable limits memory for every program."""
        return []

    def intercept(self, policy: PolicyCallbacks) -> tuple[str, ...]:  # noqa: ARG002 - the protocol's
        """Return (): it has no entry points here."""
        return ()

    def watch_use(self, policy: PolicyCallbacks) -> None:
        """Do nothing: nothing of it is in this process."""

    def apply_publicly(self, policy: PolicyCallbacks) -> None:
        """Do nothing: nothing of it is in this process."""
