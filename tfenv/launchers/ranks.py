"""MPI, torchrun, Horovod and srun: a process's place among the processes of one job, on this host and on all."""

from __future__ import annotations

from tfenv.launchers.base import Launcher
from tfenv.launchers.registry import RANK_VARIABLES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: Ranks among all processes of a job, the launcher nearest to the process first.
_GLOBAL_RANK_VARIABLES = (
    "RANK",
    "HOROVOD_RANK",
    "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_RANK",
    "PMI_RANK",
    "SLURM_PROCID",
)
#: Longer numbers are no ranks; Python refuses to convert very long ones at all.
_MOST_DIGITS = 10


def _read_rank(environ: Mapping[str, str]) -> int | None:
    """Return the local rank that the launcher nearest to the process set. None: no variable holds a number."""
    return _read_first(environ, RANK_VARIABLES)


def _read_job(environ: Mapping[str, str]) -> dict[str, str]:
    rank = _read_first(environ, _GLOBAL_RANK_VARIABLES)
    return {} if rank is None else {"rank": str(rank)}


def _read_first(environ: Mapping[str, str], names: Iterable[str]) -> int | None:
    for name in names:
        value = environ.get(name, "")
        if value.isascii() and value.isdigit() and len(value) < _MOST_DIGITS:
            return int(value)
    return None


LAUNCHER = Launcher("MPI", is_scheduler=False, read_rank=_read_rank, read_job=_read_job)
