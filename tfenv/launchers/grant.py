"""What the scheduler or the parent process gave this process: the outermost ceiling."""

from __future__ import annotations

import os

from tfenv.jobs import identify_job
from tfenv.launchers.parent import InheritedGrant, narrow_grant, read_boot_id, read_inherited_grant, split_tokens
from tfenv.launchers.registry import find_launchers
from tfenv.policy.model import Grant
from tfenv.values import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import TypeVar

    from tfenv.launchers.base import Launcher
    from tfenv.policy.model import Share

    _T = TypeVar("_T")


def read_grant(start: Mapping[str, str], environ: Mapping[str, str], boot_id: str) -> tuple[Grant, InheritedGrant]:
    """Return what was granted to this process.

    Args:
        start: The variables as they were when the process started.
        environ: The environment now, for what schedulers and launchers set.
        boot_id: This boot's id.

    Returns:
        The grant, and what to pass on: the original grant and what an ancestor's program asked for.
    """
    launchers = tuple(find_launchers(environ))
    inherited = read_inherited_grant(start, boot_id, identify_job(environ))
    assigned_late = any(launcher.assigns_late is not None and launcher.assigns_late() for launcher in launchers)
    if assigned_late and environ.get("CUDA_VISIBLE_DEVICES") != start.get("CUDA_VISIBLE_DEVICES"):
        inherited = narrow_grant(inherited, environ.get("CUDA_VISIBLE_DEVICES"))
    share, inherited = _read_share(launchers, environ, inherited)
    listed = _ask_first([launcher.read_devices for launcher in launchers], environ)
    grant = Grant(
        tokens=split_tokens(inherited.grant),
        pci_order=start.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID",
        scheduler=any(launcher.is_scheduler for launcher in launchers),
        rank=_ask_first([launcher.read_rank for launcher in launchers], environ),
        launcher=next((one.name for one in launchers if one.is_scheduler or one.assigns_late is not None), ""),
        listed=listed,
        unlisted=listed is None and any(launcher.lists_devices for launcher in launchers),
        mounted=any(one.mounts_devices is not None and one.mounts_devices(environ) for one in launchers),
        handed=split_tokens(inherited.request) if inherited.handed else None,
        own_gpus=any(launcher.has_own_gpus is not None and launcher.has_own_gpus(environ) for launcher in launchers),
        share=share,
        job=_describe_job(launchers, environ),
    )
    return grant, inherited


def _ask_first(
    questions: Iterable[Callable[[Mapping[str, str]], _T | None] | None], environ: Mapping[str, str]
) -> _T | None:
    """Return the answer of the nearest launcher that has one."""
    answers = (question(environ) for question in questions if question is not None)
    return next((answer for answer in answers if answer is not None), None)


def _read_share(
    launchers: Iterable[Launcher], environ: Mapping[str, str], inherited: InheritedGrant
) -> tuple[Share | None, InheritedGrant]:
    """Return the share of this process, and what to pass on of it.

    What Ray gives is a part of what a scheduler gave to Ray. Only Ray's is passed on: a child process cannot ask for
    it, and reads the other ones itself. The limit of MPS holds beside them.
    """
    late, scheduled, beside = inherited.share, None, None
    for launcher in launchers:
        share = launcher.read_share(environ) if launcher.read_share is not None else None
        if launcher.assigns_late is not None:
            late = share or late
        elif launcher.is_scheduler:
            scheduled = scheduled or share
        else:
            beside = beside or share
    inherited = replace(inherited, share=late)
    given = _nest(late, scheduled) if late and scheduled else late or scheduled
    if given is None or beside is None:
        return given or beside, inherited
    if given.shards is not None:  # how much that is of a GPU, only the policy says
        return _nest(beside, given), inherited
    return min(given, beside, key=lambda share: share.fraction), inherited


def _nest(share: Share, outer: Share) -> Share:
    """Return a share of a share."""
    text = share.text if outer.is_whole else f"{share.text} of {outer.giver}'s {outer.text}"
    return replace(share, text=text, fraction=share.fraction * outer.fraction, shards=outer.shards, gpus=outer.gpus)


def _describe_job(launchers: Iterable[Launcher], environ: Mapping[str, str]) -> dict[str, str]:
    """Describe the job. Of two launchers the outer one names it: Ray inside of a Slurm job is Slurm's."""
    job: dict[str, str] = {}
    for launcher in launchers:
        if launcher.read_job is not None:
            job.update(launcher.read_job(environ))
    return job


def read_assignment(environ: Mapping[str, str]) -> str | None:
    """Return the CUDA_VISIBLE_DEVICES that a launcher assigned by now to what runs in this process.

    Returns:
        None where no launcher assigns GPUs to a process that runs, or where it does not say which.
    """
    questions = (launcher.read_assignment for launcher in find_launchers(environ))
    answers = (question() for question in questions if question is not None)
    return next((answer for answer in answers if answer is not None), None)


def read_current_grant() -> tuple[Grant, tuple[str, ...] | None]:
    """Return what a process that starts here and now is granted.

    Returns:
        The grant, and the tokens that an ancestor's program asked for. None instead of tokens: it asked for nothing.
    """
    grant, inherited = read_grant(os.environ, os.environ, read_boot_id())
    return grant, split_tokens(inherited.request)
