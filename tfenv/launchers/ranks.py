"""MPI, torchrun, Horovod and srun: the local rank, a process's place among the processes of one job on this host."""

from __future__ import annotations

from tfenv.launchers.base import Launcher
from tfenv.launchers.registry import RANK_VARIABLES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

#: Longer numbers are no ranks; Python refuses to convert very long ones at all.
_MOST_DIGITS = 10


def _read_rank(environ: Mapping[str, str]) -> int | None:
    """Return the rank that the launcher nearest to the process set. None: no variable holds a number."""
    for name in RANK_VARIABLES:
        value = environ.get(name, "")
        if value.isascii() and value.isdigit() and len(value) < _MOST_DIGITS:
            return int(value)
    return None


LAUNCHER = Launcher("MPI", is_scheduler=False, read_rank=_read_rank)
