"""What the scheduler or the parent process gave this process: the outermost ceiling.

CUDA_VISIBLE_DEVICES is read as opaque tokens (numbers, GPU-… and MIG-… UUIDs). A process that narrows it
tells its children, in TFGPU_GRANT, what it was given itself, so that position 1 still means the same GPU
in a grandchild.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tfenv.policy.model import Grant

__all__ = ["VARIABLE", "Carried", "carry", "current_grant", "read_boot_id", "read_grant", "tokens_of"]

#: Carries the original grant to child processes.
VARIABLE = "TFGPU_GRANT"

_BOOT_ID = "/proc/sys/kernel/random/boot_id"

#: A scheduler's job is one that sets any of these.
_SCHEDULER_VARIABLES = ("SLURM_JOB_ID", "RAY_JOB_ID", "LSB_JOBID", "PBS_JOBID", "SGE_TASK_ID", "FLUX_JOB_ID")

#: Local ranks, the launcher nearest to the process first: srun's stays set under an mpirun inside the job.
_RANK_VARIABLES = (
    "LOCAL_RANK",
    "HOROVOD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "SLURM_LOCALID",
)


#: Longer numbers are no ranks; Python refuses to convert very long ones at all.
_MOST_DIGITS = 10


@dataclass(frozen=True)
class Carried:
    """What a parent under a policy tells its children.

    Attributes:
        grant: The parent's own grant, the value of CUDA_VISIBLE_DEVICES; None: it was unset.
        request: What the parent's program asked for by itself; None: nothing.
        wrote: What the policy made of it: the value children start with; None: it was left alone.
        leases: Ids of the leases of the parent and its ancestors, whose GPUs children share.
    """

    grant: str | None
    request: str | None
    wrote: str | None
    leases: tuple[str, ...] = ()


def tokens_of(value: str | None) -> tuple[str, ...] | None:
    """CUDA_VISIBLE_DEVICES split at its commas; None when unset, () when empty."""
    if value is None:
        return None
    return tuple(value.split(",")) if value.strip() else ()


def carry(carried: Carried, boot_id: str) -> str:
    """The value of TFGPU_GRANT."""
    parts = [1, boot_id, carried.grant, carried.request, carried.wrote, carried.leases]
    return json.dumps(parts, separators=(",", ":"))


def _read_carried(text: str | None, boot_id: str, current: str | None) -> Carried | None:
    """The parent's word, unless it comes from another boot or host, or somebody gave other GPUs since.

    A parent that writes a list of its own for each child (launchers do) asks within what it was given; a list
    that names others is a new grant (a scheduler's step).
    """
    try:
        version, boot, grant, request, wrote, leases = json.loads(text or "null")
    except (ValueError, TypeError, RecursionError):
        return None
    if version != 1 or not boot_id or boot != boot_id:
        return None
    if not all(value is None or isinstance(value, str) for value in (grant, request, wrote)):
        return None
    if not isinstance(leases, list) or not all(isinstance(lease, str) for lease in leases):
        return None
    carried = Carried(grant, request, wrote, tuple(leases))
    if carried.wrote == current:
        return carried
    return replace(carried, request=current) if _within(current, carried.grant) else None


def _within(current: str | None, grant: str | None) -> bool:
    return grant is None or set(tokens_of(current) or ()) <= set(tokens_of(grant) or ())


def read_boot_id(path: str = _BOOT_ID) -> str:
    """This boot's id; "" where the kernel does not say."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except (OSError, ValueError):
        return ""


def read_grant(start: Mapping[str, str], environ: Mapping[str, str], boot_id: str) -> tuple[Grant, Carried]:
    """Tell what was granted.

    Args:
        start: The variables as they were when the process started.
        environ: The environment now, for what schedulers and launchers set.
        boot_id: This boot's id.

    Returns:
        The grant, and what to pass on: the original grant and what an ancestor's program asked for.
    """
    current = start.get("CUDA_VISIBLE_DEVICES")
    carried = _read_carried(start.get(VARIABLE), boot_id, current)
    if carried is None:
        carried = Carried(grant=current, request=None, wrote=current)
    grant = Grant(
        tokens=tokens_of(carried.grant),
        pci_order=start.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID",
        scheduler=any(name in environ for name in _SCHEDULER_VARIABLES),
        rank=_rank(environ),
    )
    return grant, carried


def current_grant() -> tuple[Grant, tuple[str, ...] | None]:
    """What a process that starts here and now is granted, and what an ancestor's program asked for; None: nothing."""
    grant, carried = read_grant(os.environ, os.environ, read_boot_id())
    return grant, tokens_of(carried.request)


def _rank(environ: Mapping[str, str]) -> int | None:
    for name in _RANK_VARIABLES:
        value = environ.get(name, "")
        if value.isascii() and value.isdigit() and len(value) < _MOST_DIGITS:
            return int(value)
    return None
