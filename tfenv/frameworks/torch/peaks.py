"""The most memory that PyTorch's allocator had taken of each GPU, read at the process's end."""

from __future__ import annotations

import sys

from tfenv.frameworks.torch.entry_points import INIT, read_reserved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tfenv.frameworks.base import CreatedDevices, Peaks


def read_peaks(created: CreatedDevices) -> Peaks:
    """Return the peak of each GPU.

    Args:
        created: The devices of each entry point, the latest last.
    """
    cuda, core = sys.modules.get("torch.cuda"), sys.modules.get("torch._C")
    try:
        if cuda is None or not cuda.is_initialized():
            return ()
        return tuple((device, read_reserved(core, device.index, "peak")) for device in created.get(INIT, ()))
    except Exception:  # noqa: BLE001 - an allocator of the program's own counts nothing
        return ()
