"""What a real driver makes of CUDA_VISIBLE_DEVICES.

Measured on 2026-11-26 on one NVIDIA H100 80GB HBM3 with driver 580.159.04, and again on an H200, see
docs/hardware.md.
"""

from __future__ import annotations

#: Answers of cuInit.
SUCCESS, NO_DEVICE, INVALID_DEVICE = 0, 100, 101

#: The value, and what cuInit answers on a machine with one GPU. 0: that GPU is visible. "{uuid}" is its UUID,
#: "{uuid:.8}" the first eight characters of it.
REAL_ANSWERS = {
    "0": SUCCESS,
    "0,0": INVALID_DEVICE,
    "0,7": SUCCESS,
    "7,0": NO_DEVICE,
    "-1": NO_DEVICE,
    "": NO_DEVICE,
    " 0": SUCCESS,
    "0 ": SUCCESS,
    "00": SUCCESS,
    "+0": SUCCESS,
    "0x0": SUCCESS,
    "0,,0": SUCCESS,
    "0,-1,0": SUCCESS,
    "a": NO_DEVICE,
    "{uuid}": SUCCESS,
    "{uuid:.12}": SUCCESS,
    "{uuid:.5}": SUCCESS,
    "{lower}": NO_DEVICE,
    "{upper}": SUCCESS,
    "{uuid},0": SUCCESS,
    "GPU-": NO_DEVICE,
    "MIG-0": NO_DEVICE,
}


def fill_in(value: str, uuid: str) -> str:
    """Return a value of the table for a GPU with this UUID."""
    return value.format(uuid=uuid, lower=uuid.lower(), upper=uuid.upper())
