"""Which cards CUDA shows to this process, once it is open. Nothing here creates a context."""

from __future__ import annotations

from tfenv.values import frozen

_SUCCESS = 0


@frozen
class CudaDevice:
    """One GPU as CUDA shows it.

    Attributes:
        uuid: Hex digits, without a prefix.
        total: Memory in bytes that CUDA can give. None: CUDA does not say.
    """

    uuid: str
    total: int | None


def open_driver() -> None:
    """Open CUDA, as a framework is about to. Nothing happens where there is no driver, or it refuses."""
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1").cuInit(0)
    except (OSError, AttributeError):
        return


def read_devices() -> tuple[CudaDevice, ...] | None:
    """Return the GPUs by CUDA ordinal. None: CUDA is not open, or does not say.

    CUDA counts the fastest first unless told otherwise, and what it shows was settled when it was opened, perhaps
    by another library: only it can tell which card is which. It knows their sizes where NVML does not (WSL2).
    """
    import ctypes

    try:
        cuda = ctypes.CDLL("libcuda.so.1")  # the framework has it loaded
        count = ctypes.c_int()
        if cuda.cuDeviceGetCount(ctypes.byref(count)) != _SUCCESS:
            return None
        # The second version tells the slices of one card apart (MIG).
        get_uuid = getattr(cuda, "cuDeviceGetUuid_v2", None) or cuda.cuDeviceGetUuid
        get_total = getattr(cuda, "cuDeviceTotalMem_v2", None)
        found = []
        for ordinal in range(count.value):
            device, uuid, total = ctypes.c_int(), (ctypes.c_ubyte * 16)(), ctypes.c_size_t()
            if cuda.cuDeviceGet(ctypes.byref(device), ordinal) != _SUCCESS or get_uuid(uuid, device) != _SUCCESS:
                return None
            told = get_total is not None and get_total(ctypes.byref(total), device) == _SUCCESS
            found.append(CudaDevice(bytes(uuid).hex(), total.value if told else None))
    except (OSError, AttributeError):
        return None
    return tuple(found)


def has_active_context() -> bool:
    """Return whether something in this process uses a GPU: the driver has an active primary context for it.

    Nothing is loaded or opened by asking. False where CUDA is not loaded, not open, or does not say.
    """
    import ctypes
    import os

    try:
        cuda = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        count, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
        if cuda.cuDeviceGetCount(ctypes.byref(count)) != _SUCCESS:
            return False
        for device in range(count.value):
            state = cuda.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
            if state == _SUCCESS and active.value:
                return True
    except (OSError, AttributeError):
        return False
    return False
