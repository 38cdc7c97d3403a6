"""Which cards CUDA shows to this process, once the framework has opened it. Creates no context and opens nothing."""

from __future__ import annotations

_SUCCESS = 0


def read_uuids() -> tuple[str, ...] | None:
    """Return the UUIDs by CUDA ordinal, in hex and without their prefix. None: CUDA is not open, or does not say.

    CUDA counts the fastest first unless told otherwise, and what it shows was settled when it was opened, perhaps
    by another library: only it can tell which card is which.
    """
    import ctypes

    try:
        cuda = ctypes.CDLL("libcuda.so.1")  # the framework has it loaded
        count = ctypes.c_int()
        if cuda.cuDeviceGetCount(ctypes.byref(count)) != _SUCCESS:
            return None
        # The second version tells the slices of one card apart (MIG).
        get_uuid = getattr(cuda, "cuDeviceGetUuid_v2", None) or cuda.cuDeviceGetUuid
        found = []
        for ordinal in range(count.value):
            device, uuid = ctypes.c_int(), (ctypes.c_ubyte * 16)()
            if cuda.cuDeviceGet(ctypes.byref(device), ordinal) != _SUCCESS or get_uuid(uuid, device) != _SUCCESS:
                return None
            found.append(bytes(uuid).hex())
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
