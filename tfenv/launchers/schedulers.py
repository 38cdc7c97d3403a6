"""The jobs of schedulers: whether a process runs inside one."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

#: A scheduler's job is one that sets any of these.
_JOB_VARIABLES = ("SLURM_JOB_ID", "RAY_JOB_ID", "LSB_JOBID", "PBS_JOBID", "SGE_TASK_ID", "FLUX_JOB_ID")


def is_in_job(environ: Mapping[str, str]) -> bool:
    """Tell whether a scheduler's variables are set."""
    return any(name in environ for name in _JOB_VARIABLES)
