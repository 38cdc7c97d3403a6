"""Which step of a job Slurm started this process for, as a TaskProlog or TaskEpilog."""

from __future__ import annotations

import os
import time
from glob import glob

from tfenv.values import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

#: The step of a batch script.
BATCH = "batch"
_TITLE = b"slurmstepd: ["
_MOST_PARENTS = 4
#: Fields of /proc/PID/stat behind the process's name, from 0 (proc(5)).
_PARENT, _START = 1, 19


@frozen
class SlurmStep:
    """A step, as one of its tasks begins or ends on this node.

    Attributes:
        name: "0", "1", or `BATCH`.
        is_last_task: No other task of the step runs on this node.
        seconds: How long the step has been running on this node. None: it is not known.
    """

    name: str
    is_last_task: bool
    seconds: float | None = None


def find_step(environ: Mapping[str, str]) -> SlurmStep:
    """Find the step by Slurm's process for it, the parent of this process or of the shell around it.

    Its title tells the step: "slurmstepd: [14.batch]". The variables may be those of another job: a batch script that
    is submitted from a step inherits SLURM_STEP_ID. They count where /proc is hidden. The tasks of the step are the
    children of that process. It runs TaskEpilogs one by one.
    """
    job, child, parent = environ.get("SLURM_JOB_ID", ""), os.getpid(), os.getppid()
    for _ in range(_MOST_PARENTS):
        try:
            title, grandparent, seconds = _read_process(parent)
        except (OSError, ValueError):  # it has just ended, or /proc is hidden
            break
        if title.startswith(_TITLE):
            named, _, step = title[len(_TITLE) :].partition(b"]")[0].decode("ascii", "replace").partition(".")
            if named == job and step:  # "interactive" is salloc's, and ends with its job, too
                return SlurmStep(step if step.isdigit() else BATCH, _list_children(parent) <= {str(child)}, seconds)
        child, parent = parent, grandparent
    return SlurmStep(environ.get("SLURM_STEP_ID") or BATCH, environ.get("SLURM_LOCALID", "0") == "0")


def _read_process(pid: int) -> tuple[bytes, int, float]:
    """Return the title of a process, its parent, and how long it has been running, in seconds."""
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        title = file.read(100)
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    started = int(fields[_START]) / os.sysconf("SC_CLK_TCK")
    return title, int(fields[_PARENT]), time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _list_children(pid: int) -> set[str]:
    """Return the children of a process, also those that have ended and that it did not ask after."""
    children: set[str] = set()
    for path in glob(f"/proc/{pid}/task/*/children"):
        with open(path) as file:
            children.update(file.read().split())
    return children
