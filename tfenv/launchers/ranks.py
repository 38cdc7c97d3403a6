"""The rank that a launcher gave to a process: its place among the processes of one job, on this host or on all."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: Local ranks, the launcher nearest to the process first: srun's stays set under an mpirun inside the job.
_RANK_VARIABLES = (
    "LOCAL_RANK",
    "HOROVOD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "SLURM_LOCALID",
)

#: Ranks among all processes of a job, likewise.
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


def read_local_rank(environ: Mapping[str, str]) -> int | None:
    """Return the rank that the innermost launcher set.

    Returns:
        None outside of a job, and where the variable holds no number.
    """
    return _read_first(environ, _RANK_VARIABLES)


def read_global_rank(environ: Mapping[str, str]) -> int | None:
    """Return the rank among all processes of the job, on all hosts, as `read_local_rank` does."""
    return _read_first(environ, _GLOBAL_RANK_VARIABLES)


def _read_first(environ: Mapping[str, str], names: Iterable[str]) -> int | None:
    for name in names:
        value = environ.get(name, "")
        if value.isascii() and value.isdigit() and len(value) < _MOST_DIGITS:
            return int(value)
    return None
