"""What tfenv asks of a framework, and what a framework's entry points ask of the policy.

Only type checkers load this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Protocol

from tfenv.errors import Finding
from tfenv.policy.model import DeviceOutcome, Outcome, Plan, PlannedDevice
from tfenv.policy.supports import Capability

#: The devices that each entry point created last. The latest entry point comes last.
CreatedDevices = Mapping[str, tuple[DeviceOutcome, ...]]
#: Devices, each with the most bytes that the process held of it at one time.
Peaks = tuple[tuple[DeviceOutcome, int], ...]


class PolicyCallbacks(Protocol):
    """What an entry point asks of the policy of its process."""

    def before_listing(self, sleep: Callable[[float], object] | None = None) -> None:
        """Settle which GPUs are visible. Call it just before the framework opens CUDA: it is the last moment.

        Args:
            sleep: Waits for so many seconds, or less, while no GPU is free. Other threads may fork. None: time.sleep.

        Raises:
            PolicyError: The policy cannot be applied and `on_error = "fail"`.
        """
        ...

    def identify_devices(self, ordinals: Sequence[int] | None = None) -> Mapping[int, PlannedDevice] | None:
        """Find the plan's GPUs among those that the framework lists, each with the limit that is left of it here.

        Args:
            ordinals: The GPUs that the framework lists, as CUDA counts. None: all that CUDA shows. CUDA is opened to
                list them, so the framework must be about to open it.

        Returns:
            The planned device of each ordinal. Ordinals that are left out are not allowed. None means that the GPUs
            cannot be told apart.

        Raises:
            PolicyError: Some are not the plan's and `on_error = "fail"`.
        """
        ...

    def count_shown_devices(self) -> int | None:
        """Return how many GPUs CUDA shows, those included that the framework ignores. None means unknown."""
        ...

    def get_plan(self) -> Plan:
        """Return what this process may use, as decided at the first listing."""
        ...

    def measure_devices(self) -> tuple[PlannedDevice, ...] | None:
        """Return the GPUs with their sizes, and with what is left of their limits here.

        NVML tells the sizes, or CUDA if it is open already. Nothing is opened, settled or promised. It is for a
        framework that has to be limited before it opens CUDA.

        Returns:
            () means that nothing is left for this framework. None means that nobody knows the GPUs.
        """
        ...

    def is_cpu_only(self) -> bool:
        """Return whether this framework may create no GPU. Ask after `identify_devices`.

        Either the policy failed and `on_error = "cpu"`, or other frameworks have all that the process may take.
        """
        ...

    def check_use(self) -> None:
        """Refuse GPUs that were opened before and are another task's by now.

        Raises:
            PolicyError: They are, and `on_error = "fail"`.
        """
        ...

    def report(self, outcome: Outcome) -> None:
        """Write down what happened at an entry point.

        Raises:
            PolicyError: The outcome holds an error and `on_error = "fail"`.
        """
        ...

    def report_unkept(self, finding: Finding, entry_point: str) -> None:
        """Write down that an entry point is about to pass what the policy does not allow, and cannot be held.

        With `on_error = "cpu"`, `is_cpu_only` is true afterwards.

        Raises:
            PolicyError: `on_error = "fail"`.
        """
        ...

    def report_fault(self, error: Exception, entry_point: str) -> None:
        """Write down a fault of tfenv's own at an entry point.

        Raises:
            PolicyError: `on_error = "fail"`.
        """
        ...


class Framework(Protocol):
    """A framework that opens GPUs, as tfenv applies policies to it.

    Attributes:
        name: Its top-level package, whose import is watched.
        title: Its name in messages.
        supports: What of a policy it can keep. A key outside of it becomes the finding "unsupported".
        first_listing: The entry point that opens CUDA, as records name it.
        public_api: What `apply_publicly` uses, for messages.
    """

    name: str
    title: str
    supports: frozenset[Capability]
    first_listing: str
    public_api: str

    def version(self) -> str | None:
        """Return the version of the framework that is loaded. None means unknown."""
        ...

    def devices_exist(self, *, gpu_is_open: bool) -> bool:
        """Return whether this framework has created devices in this process, by whatever way.

        Args:
            gpu_is_open: A GPU is in use in this process, and no other framework has devices.
        """
        ...

    def read_peaks(self, created: CreatedDevices) -> Peaks:
        """Return the most bytes that this process held of each device, at its end.

        Nothing is imported or opened for it, and it does not raise.

        Args:
            created: What the process created.

        Returns:
            The devices whose peak is known. () means that the framework does not tell.
        """
        ...

    def can_use_gpus(self) -> bool:
        """Return whether the build that is loaded can use GPUs at all, as it is set up. Nothing is opened for it."""
        ...

    def find_master(self, earlier: Sequence[str]) -> str | None:
        """Return the framework that the program computes with, where it imports this one only to help it.

        Where memory is limited and no file says how frameworks share it, this one goes without a GPU then.

        Args:
            earlier: The frameworks whose import began before that of this one.

        Returns:
            The top-level package of that framework. None: there is none.
        """
        ...

    def release_memory(self) -> bool:
        """Give back all that this framework may take of the GPUs, if it holds none of their memory.

        Returns:
            Whether it did. False where the framework keeps what it was promised.
        """
        ...

    def prepare(self, plan: Plan, environ: MutableMapping[str, str]) -> list[Finding]:
        """Clear the variables that would defeat the plan, and set those that it asks for.

        Args:
            plan: What this process may use.
            environ: The environment. It is changed in place.

        Returns:
            A note for each variable of the program that was cleared.
        """
        ...

    def intercept(self, policy: PolicyCallbacks) -> tuple[str, ...]:
        """Wrap the entry points of the framework that is loaded. A second call only changes the policy.

        Returns:
            The entry points that this framework does not have.
        """
        ...

    def watch_use(self, policy: PolicyCallbacks) -> None:
        """Ask the policy from now on whenever the program uses devices that exist. A second call changes nothing."""
        ...

    def apply_publicly(self, policy: PolicyCallbacks) -> None:
        """Apply what the framework's public calls can, where entry points are missing."""
        ...
