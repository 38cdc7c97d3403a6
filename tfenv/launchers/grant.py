"""What the scheduler or the parent process gave this process: the outermost ceiling."""

from __future__ import annotations

import os

from tfenv.jobs import identify_job, is_in_job
from tfenv.launchers.late import assigns_gpus_late
from tfenv.launchers.parent import InheritedGrant, narrow_grant, read_boot_id, read_inherited_grant, split_tokens
from tfenv.launchers.ranks import read_local_rank
from tfenv.policy.model import Grant

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def read_grant(start: Mapping[str, str], environ: Mapping[str, str], boot_id: str) -> tuple[Grant, InheritedGrant]:
    """Return what was granted to this process.

    Args:
        start: The variables as they were when the process started.
        environ: The environment now, for what schedulers and launchers set.
        boot_id: This boot's id.

    Returns:
        The grant, and what to pass on: the original grant and what an ancestor's program asked for.
    """
    inherited = read_inherited_grant(start, boot_id, identify_job(environ))
    if environ.get("CUDA_VISIBLE_DEVICES") != start.get("CUDA_VISIBLE_DEVICES") and assigns_gpus_late():
        inherited = narrow_grant(inherited, environ.get("CUDA_VISIBLE_DEVICES"))
    grant = Grant(
        tokens=split_tokens(inherited.grant),
        pci_order=start.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID",
        scheduler=is_in_job(environ),
        rank=read_local_rank(environ),
    )
    return grant, inherited


def read_current_grant() -> tuple[Grant, tuple[str, ...] | None]:
    """Return what a process that starts here and now is granted.

    Returns:
        The grant, and the tokens that an ancestor's program asked for. None instead of tokens: it asked for nothing.
    """
    grant, inherited = read_grant(os.environ, os.environ, read_boot_id())
    return grant, split_tokens(inherited.request)
