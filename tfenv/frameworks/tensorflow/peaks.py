"""The most memory that TensorFlow's allocators had given out, read from what is loaded, at the process's end."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from tfenv.frameworks.base import CreatedDevices, Peaks
    from tfenv.policy.model import DeviceOutcome


def read_peaks(created: CreatedDevices) -> Peaks:
    """Return the peaks of the eager context's devices, of a split one the sum of its parts'.

    Args:
        created: The devices of each entry point, the latest last.
    """
    # Whatever begins so gives the eager context its devices.
    of_context = [devices for entry_point, devices in created.items() if entry_point.startswith("TFE_")]
    try:
        return add_up_parts(of_context[-1], _read_logical_peaks()) if of_context else ()
    except Exception:  # noqa: BLE001 - an allocator that counts nothing, and names of a new TensorFlow
        return ()


def _read_logical_peaks() -> list[int]:
    """Return the peak of each logical GPU of the eager context."""
    context = getattr(sys.modules.get("tensorflow.python.eager.context"), "_context", None)
    handle = getattr(context, "_context_handle", None)
    if handle is None:
        return []
    read = sys.modules["tensorflow.python.pywrap_tfe"].TFE_GetMemoryInfo
    return [int(read(handle, name)["peak"]) for name in _list_local_gpus(context)]


def _list_local_gpus(context: Any) -> list[str]:
    """List the logical GPUs. To ask for one of another task of a cluster would crash the process."""
    server = context._server_def or context._collective_ops_server_def  # noqa: SLF001 - there is no public one
    task = "" if server is None else f"/job:{server.job_name}/replica:0/task:{server.task_index}"
    devices = context._logical_devices or ()  # noqa: SLF001 - the public one would initialise it
    return [device.name for device in devices if device.name.startswith(f"{task}/device:GPU:")]


def add_up_parts(devices: Sequence[DeviceOutcome], peaks: Sequence[int]) -> Peaks:
    """Return the peak of each device. () where there are not as many logical GPUs as they were split into."""
    parts = [max(1, len(device.logical_devices)) for device in devices]
    if sum(parts) != len(peaks):
        return ()
    begins = [sum(parts[:place]) for place in range(len(parts))]
    return tuple(
        (device, sum(peaks[begin : begin + count])) for device, begin, count in zip(devices, begins, parts, strict=True)
    )
