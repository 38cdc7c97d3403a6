"""NVIDIA's Multi-Process Service, whose variables limit a client.

The limit of CUDA_MPS_PINNED_DEVICE_MEM_LIMIT is none of the shares here. It is a size, and the driver itself keeps it.
"""

from __future__ import annotations

from tfenv.launchers.base import Launcher, read_number
from tfenv.policy.model import Share

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def _read_share(environ: Mapping[str, str]) -> Share | None:
    percentage = read_number(environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"))
    if not 0 < percentage <= 100:  # noqa: PLR2004 - per cent
        return None
    return Share("MPS", f"percentage {percentage:g}", fraction=percentage / 100)


LAUNCHER = Launcher("MPS", is_scheduler=False, read_share=_read_share)
