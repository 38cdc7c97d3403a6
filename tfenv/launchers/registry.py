"""Which launchers a process was started by. A launcher's module is imported only in a process that is its."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tfenv.launchers.base import Launcher

#: Local ranks, the launcher nearest to the process first: srun's stays set under an mpirun inside the job. Those of
#: torchrun, Horovod, Open MPI, MVAPICH, Intel MPI, Cray's MPICH and PALS, LSF's jsrun, Flux, Slurm.
RANK_VARIABLES = (
    "LOCAL_RANK",
    "HOROVOD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "PMI_LOCAL_RANK",
    "PALS_LOCAL_RANKID",
    "JSM_NAMESPACE_LOCAL_RANK",
    "FLUX_TASK_LOCAL_ID",
    "SLURM_LOCALID",
)
#: Modules here, and the variables of which one tells that the process is the launcher's. The nearest to the
#: process comes first: Ray inside of a Slurm job assigns what Slurm gave to Ray.
_BY_VARIABLE = (
    ("jupyter", ("JUPYTERHUB_USER", "JPY_SESSION_NAME")),
    ("ranks", RANK_VARIABLES),
    ("slurm", ("SLURM_JOB_ID",)),
    ("pbs", ("PBS_JOBID",)),
    ("lsf", ("LSB_JOBID",)),
    ("flux", ("FLUX_JOB_ID",)),
    ("grid_engine", ("SGE_TASK_ID",)),
    ("mps", ("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT")),
    ("kubernetes", ("KUBERNETES_SERVICE_HOST",)),
)
#: Modules here, and the module of the launcher that a process of its has loaded.
_BY_MODULE = (("ray", "ray._private.worker"), ("dask", "distributed.worker"))
#: A worker of Ray's that has not loaded that module, and what a worker starts.
_RAY_VARIABLE = "RAY_JOB_ID"


def find_launchers(environ: Mapping[str, str]) -> Iterator[Launcher]:
    """Find the launchers that started this process, the nearest first."""
    for name, loaded in _BY_MODULE:
        if loaded in sys.modules or (name == "ray" and _RAY_VARIABLE in environ):
            yield from _ask(name, environ)
    for name, variables in _BY_VARIABLE:
        if any(variable in environ for variable in variables):
            yield from _ask(name, environ)


def _ask(name: str, environ: Mapping[str, str]) -> Iterator[Launcher]:
    launcher: Launcher = __import__(f"tfenv.launchers.{name}", fromlist=("LAUNCHER",)).LAUNCHER
    if launcher.is_ours is None or launcher.is_ours(environ):
        yield launcher
