"""What a parent process under a policy hands to its children: the grant it was given itself.

A process that narrows CUDA_VISIBLE_DEVICES tells its children, in TFGPU_GRANT, what it was given itself. So position 1
still means the same GPU in a grandchild. The tokens (numbers, GPU-… and MIG-… UUIDs) are opaque here.
"""

from __future__ import annotations

import json

from tfenv.policy.model import Share
from tfenv.values import frozen, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

#: Carries the original grant to child processes.
GRANT_VARIABLE = "TFGPU_GRANT"

#: Of what TFGPU_GRANT holds. Another version's is not read.
_VERSION = 4
#: Characters that describe a share. They go into the record and the line on stderr.
_LONGEST_SHARE = 80
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


@frozen
class InheritedGrant:
    """What a parent under a policy tells its children.

    Attributes:
        grant: The parent's own grant, the value of CUDA_VISIBLE_DEVICES. None: it was unset.
        request: What the parent's program asked for by itself. None: nothing.
        wrote: What the policy made of it: the value children start with. None: it was left alone.
        leases: Ids of the leases of the parent and its ancestors, whose GPUs children share.
        job: The job and step it runs in, as `identify_job` tells. What was given there counts in no other.
        handed: The request is a list that a parent wrote for its child, as drivers do for their workers.
        share: The part of each GPU that the launcher told the parent, and does not tell a child. None: there is none.
    """

    grant: str | None
    request: str | None
    wrote: str | None
    leases: tuple[str, ...] = ()
    job: str = ""
    handed: bool = False
    share: Share | None = None


def split_tokens(value: str | None) -> tuple[str, ...] | None:
    """Split CUDA_VISIBLE_DEVICES at its commas. None when unset, () when empty."""
    if value is None:
        return None
    return tuple(value.split(",")) if value.strip() else ()


def encode_grant(inherited: InheritedGrant, boot_id: str) -> str:
    """Return the value of TFGPU_GRANT."""
    given = [inherited.grant, inherited.request, inherited.wrote, inherited.leases, inherited.handed]
    share = inherited.share and [inherited.share.giver, inherited.share.text, inherited.share.fraction]
    parts = [_VERSION, boot_id, inherited.job, *given, share]
    return json.dumps(parts, separators=(",", ":"))


def _decode_grant(text: str | None, boot_id: str, job: str, current: str | None) -> InheritedGrant | None:
    """Return what the parent said. None: it comes from another boot, host or job, or somebody gave other GPUs since.

    A parent that writes a list of its own for each child (launchers do) asks within what it was given. A list
    that names others is a new grant.
    """
    try:
        version, boot, written_in, grant, request, wrote, leases, handed, share = json.loads(text or "null")
        share = _decode_share(share)
    except (ValueError, TypeError, RecursionError):
        return None
    if version != _VERSION or not boot_id or boot != boot_id or written_in != job:
        return None
    if not all(value is None or isinstance(value, str) for value in (grant, request, wrote)):
        return None
    if (
        not isinstance(handed, bool)
        or not isinstance(leases, list)
        or not all(isinstance(lease, str) for lease in leases)
    ):
        return None
    inherited = InheritedGrant(grant, request, wrote, tuple(leases), job, handed is True, share)
    if wrote == current:
        return inherited
    handed = bool(split_tokens(current))
    return replace(inherited, request=current, wrote=current, handed=handed) if _is_within(current, grant) else None


def _decode_share(share: Any) -> Share | None:
    """Return the share that a parent wrote.

    Raises:
        TypeError, ValueError: No parent wrote that.
    """
    if share is None:
        return None
    giver, text, fraction = share
    words = isinstance(giver, str) and isinstance(text, str) and len(giver) + len(text) <= _LONGEST_SHARE
    if not words or not isinstance(fraction, float) or not 0 < fraction <= 1:
        raise ValueError("not a share")
    return Share(giver, text, fraction)


def narrow_grant(inherited: InheritedGrant, given: str | None) -> InheritedGrant:
    """Take what a launcher gave this process after its start for its grant, if it is within the parent's.

    Args:
        inherited: What the parent was given itself.
        given: The value of CUDA_VISIBLE_DEVICES.
    """
    if given is None or not _is_within(given, inherited.grant):
        return inherited
    return replace(inherited, grant=given, request=None, wrote=given, handed=False)


def _is_within(given: str | None, grant: str | None) -> bool:
    return grant is None or set(split_tokens(given) or ()) <= set(split_tokens(grant) or ())


def read_boot_id(path: str = _BOOT_ID) -> str:
    """Return this boot's id. "" where the kernel does not say."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except (OSError, ValueError):
        return ""


def read_inherited_grant(start: Mapping[str, str], boot_id: str, job: str = "") -> InheritedGrant:
    """Return what the parent handed on, or the current CUDA_VISIBLE_DEVICES as a grant of its own.

    Args:
        start: The variables as they were when the process started.
        boot_id: This boot's id.
        job: The job and step this process runs in. "" outside of a job.
    """
    current = start.get("CUDA_VISIBLE_DEVICES")
    inherited = _decode_grant(start.get(GRANT_VARIABLE), boot_id, job, current)
    return InheritedGrant(grant=current, request=None, wrote=current, job=job) if inherited is None else inherited
