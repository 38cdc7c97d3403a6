"""What a launcher sets for a process, so that `launchers` reads a case as it reads a real job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tfenv.policy.model import Inventory

#: The variables that a job of each launcher has, whatever it was given.
_JOBS: Mapping[str, Mapping[str, str]] = {
    "Slurm": {"SLURM_JOB_ID": "1"},
    "PBS": {"PBS_JOBID": "1"},
    "LSF": {"LSB_JOBID": "1"},
    "Flux": {"FLUX_JOB_ID": "1"},
    "Grid Engine": {"SGE_ROOT": "/opt/sge", "JOB_ID": "1", "SGE_TASK_ID": "undefined"},
    "Kubernetes": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    "Ray": {"RAY_JOB_ID": "01000000"},
}


def build_environment(
    launcher: str | None, grant: Sequence[int | str] | None, rank: int | None, inventory: Inventory
) -> dict[str, str]:
    """Return the variables that a process is started with.

    Args:
        launcher: Whose job it is in. None: it is in none.
        grant: The GPUs that were given. None: nobody said which.
        rank: The local rank. None: there is none.
        inventory: The machine's GPUs.
    """
    variables = dict(_JOBS[launcher]) if launcher is not None else {}
    tokens = None if grant is None else ",".join(map(str, grant))
    if launcher == "Kubernetes":
        # The plugin tells the UUIDs of a pod's GPUs. Without any it tells nothing, and images say "all" or "none".
        uuids = [_find_uuid(device, inventory) for device in grant or ()]
        variables["NVIDIA_VISIBLE_DEVICES"] = ",".join(uuids) or "none"
    elif tokens:
        variables["CUDA_VISIBLE_DEVICES"] = tokens
        if launcher == "Slurm":
            variables |= {"SLURM_JOB_GPUS": tokens, "SLURM_GPUS_ON_NODE": str(len(grant or ()))}
    elif tokens == "" and launcher is None:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if rank is not None:
        variables["LOCAL_RANK"] = str(rank)
    return variables


def _find_uuid(device: int | str, inventory: Inventory) -> str:
    uuids = {each.index: each.uuid for each in inventory.devices or ()}
    return device if isinstance(device, str) else uuids.get(device, f"GPU-{device}")
