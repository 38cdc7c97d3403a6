"""The scheduler's job that a process runs in, told by the variables that schedulers set. Pure."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

#: Ids of a job, of its step and of its task in an array. JOB_ID is too common a name to mean Grid Engine by itself,
#: and HOSTNAME is a pod only inside Kubernetes: see `_read_ids`.
_ID_VARIABLES = (
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID",
    "LSB_JOBID", "LSB_JOBINDEX", "PBS_JOBID", "PBS_ARRAY_INDEX", "FLUX_JOB_ID", "RAY_JOB_ID",
)  # fmt: skip
#: Characters of one id that tell jobs apart.
_LONGEST_ID = 64


def _read_ids(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the ids of the job and its step, by the name of the variable that they came in. {} outside of a job."""
    ids = {name: environ[name] for name in _ID_VARIABLES if environ.get(name)}
    if "SGE_ROOT" in environ and environ.get("JOB_ID"):
        ids["JOB_ID"] = environ["JOB_ID"]
        if environ.get("SGE_TASK_ID"):
            ids["SGE_TASK_ID"] = environ["SGE_TASK_ID"]
    if "KUBERNETES_SERVICE_HOST" in environ and environ.get("HOSTNAME"):
        ids["KUBERNETES_POD"] = environ["HOSTNAME"]
    return ids


def identify_job(environ: Mapping[str, str]) -> str:
    """Return a text that is the same for all processes of one step of a job, and for no others. "" outside of a job."""
    return ",".join(f"{name}={value[:_LONGEST_ID]}" for name, value in _read_ids(environ).items())
