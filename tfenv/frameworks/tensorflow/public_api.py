"""What TensorFlow's public API can apply, where entry points are missing."""

from __future__ import annotations

import os
import sys
from functools import wraps

from tfenv.frameworks.tensorflow.config_proto import make_view
from tfenv.frameworks.tensorflow.environment import ALLOW_GROWTH
from tfenv.policy.model import Outcome
from tfenv.policy.units import MIB

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tfenv.frameworks.base import PolicyCallbacks


def apply_publicly(policy: PolicyCallbacks) -> None:
    """Apply what the public API can: growth, or a limit without it, at the first listing of devices.

    Nothing is listed here, so that a program can still fork after it imported TensorFlow.
    """
    if policy.get_plan().growth:
        os.environ[ALLOW_GROWTH] = "true"
    context_class = getattr(sys.modules.get("tensorflow.python.eager.context"), "Context", None)
    original = getattr(context_class, "_initialize_physical_devices", None)
    if context_class is None or original is None:
        return

    @wraps(original)
    def initialize_physical_devices(self: Any, *args: Any, **kwargs: Any) -> Any:
        first = getattr(self, "_physical_devices", None) is None
        if first:
            policy.before_listing()
        result = original(self, *args, **kwargs)
        if first:
            _limit_by_public_calls(policy)
        return result

    context_class._initialize_physical_devices = initialize_physical_devices  # noqa: SLF001 - there is no public one


def _limit_by_public_calls(policy: PolicyCallbacks) -> None:
    config = sys.modules["tensorflow"].config
    gpus = config.list_physical_devices("GPU")
    view = make_view(policy.get_plan(), range(len(gpus)))
    for gpu, device in zip(view.gpus, gpus, strict=True):
        limit = gpu.limit if gpu.binding else None
        if limit is not None:
            logical = config.LogicalDeviceConfiguration(memory_limit=limit // MIB)
            config.set_logical_device_configuration(device, [logical])
    policy.report(Outcome("degraded", "tf.config", findings=()))
