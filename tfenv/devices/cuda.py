"""Which cards CUDA shows to this process, once TensorFlow has opened it. Creates no context and opens nothing."""

from __future__ import annotations

__all__ = ["read_uuids"]

_SUCCESS = 0


def read_uuids() -> tuple[str, ...] | None:
    """The UUIDs by CUDA ordinal, in hex and without their prefix; None where CUDA is not open, or does not say.

    CUDA counts the fastest first unless told otherwise, and what it shows was settled when it was opened, perhaps
    by another library: only it can tell which card is which.
    """
    import ctypes

    try:
        cuda = ctypes.CDLL("libcuda.so.1")  # TensorFlow has it loaded
        count = ctypes.c_int()
        if cuda.cuDeviceGetCount(ctypes.byref(count)) != _SUCCESS:
            return None
        # The second version tells the slices of one card apart (MIG).
        get = getattr(cuda, "cuDeviceGetUuid_v2", None) or cuda.cuDeviceGetUuid
        found = []
        for ordinal in range(count.value):
            device, uuid = ctypes.c_int(), (ctypes.c_ubyte * 16)()
            if cuda.cuDeviceGet(ctypes.byref(device), ordinal) != _SUCCESS or get(uuid, device) != _SUCCESS:
                return None
            found.append(bytes(uuid).hex())
    except (OSError, AttributeError):
        return None
    return tuple(found)
