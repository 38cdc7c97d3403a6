"""What PyTorch's public calls can apply, where entry points are missing."""

from __future__ import annotations

import sys
from functools import wraps

from tfenv.frameworks.torch.limits import make_limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tfenv.frameworks.base import PolicyCallbacks


def apply_publicly(policy: PolicyCallbacks) -> None:
    """Limit each GPU by torch.cuda.set_per_process_memory_fraction, once torch.cuda is initialised.

    Nothing is opened here, so that a program can still fork after it imported PyTorch.
    """
    cuda: Any = sys.modules.get("torch.cuda")
    original = getattr(cuda, "_lazy_init", None)
    if original is None:
        return

    @wraps(original)
    def lazy_init() -> Any:
        is_first = not cuda.is_initialized()
        if is_first:
            policy.before_listing()
        result = original()
        if is_first and cuda.is_initialized():
            _limit_by_public_calls(policy, cuda)
        return result

    cuda._lazy_init = lazy_init  # noqa: SLF001 - everything public calls it


def _limit_by_public_calls(policy: PolicyCallbacks, cuda: Any) -> None:
    from tfenv.policy.model import Outcome

    ordinals = range(cuda.device_count())
    for gpu in make_limits(policy.get_plan(), ordinals, policy.identify_devices(ordinals)):
        if gpu.fraction is not None and gpu.fraction < 1:
            cuda.set_per_process_memory_fraction(gpu.fraction, gpu.ordinal)
    policy.report(Outcome("degraded", "torch.cuda.init", findings=()))
