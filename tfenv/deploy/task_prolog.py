"""What Slurm's TaskProlog prints so that each task finds the file of its partition.

Slurm runs the TaskProlog before every task, as the job's user and with the task's environment. A line
`export NAME=VALUE` or `unset NAME` of its stdout changes that environment. Measured with Slurm 22.05: the batch script
and all tasks of srun are tasks. If the TaskProlog ends with another status than 0, the task fails. What it writes on
stderr is lost. https://slurm.schedmd.com/prolog_epilog.html
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

#: The files of the partitions: `FOLDER/PARTITION.toml`.
FOLDER = "/etc/tfgpu/slurm"
_VARIABLE = "TFGPU_SITE_CONFIG"
#: Which step the file was named for, and the file: "14.0 /etc/tfgpu/slurm/gpu.toml". A job that is submitted from a
#: task inherits both variables. A value of TFGPU_SITE_CONFIG that is not the one in here is somebody else's.
_STAMP = "TFGPU_SLURM_SITE"
_STEPD = b"slurmstepd: ["
_FEW_PARENTS = 4


def format_task_prolog(environ: Mapping[str, str], folder: str = FOLDER) -> tuple[str, ...]:
    """Return the lines that name the partition's file as the site's in the task.

    A value that was set by somebody else is kept. One that was set for another step is replaced, or removed if the
    partition has no file.

    Args:
        environ: The environment of the task.
        folder: Where the files of the partitions are.

    Raises:
        ValueError: This is no task of Slurm's.
    """
    partition = environ.get("SLURM_JOB_PARTITION", "")
    if not partition:
        raise ValueError("SLURM_JOB_PARTITION is not set; name this command in Slurm's TaskProlog")
    value = environ.get(_VARIABLE)
    is_ours = bool(value) and value == environ.get(_STAMP, "").partition(" ")[2]
    if value is not None and not is_ours:
        return ()
    path = _find_file(partition, folder)
    if path is None:
        return (f"unset {_VARIABLE}", f"unset {_STAMP}") if is_ours else ()
    step = f"{environ.get('SLURM_JOB_ID', '')}.{find_step(environ)}"
    return (f"export {_VARIABLE}={path}", f"export {_STAMP}={step} {path}")


def _find_file(partition: str, folder: str) -> str | None:
    """Return the path of the partition's file. None: there is none. One that cannot be read is reported by the task."""
    if "/" in partition or partition.startswith("."):
        return None
    path = os.path.join(os.path.abspath(folder), f"{partition}.toml")
    return path if os.path.lexists(path) else None


def find_step(environ: Mapping[str, str]) -> str:
    """Return the step of the task that this process was started for: "0", or "batch" for the batch script.

    A batch script that was submitted from a step inherits that step's SLURM_STEP_ID, so the title of Slurm's process
    counts for more: "slurmstepd: [14.batch]". It is this process's parent, or the parent of the shell around it.
    """
    job, parent = environ.get("SLURM_JOB_ID", ""), os.getppid()
    for _ in range(_FEW_PARENTS):
        try:
            with open(f"/proc/{parent}/cmdline", "rb") as file:
                title = file.read(100)
            with open(f"/proc/{parent}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, ValueError):  # /proc is hidden, or it has just ended
            break
        if title.startswith(_STEPD):
            named, _, step = title[len(_STEPD) :].partition(b"]")[0].decode("ascii", "replace").partition(".")
            if named == job and step:
                return step
    return environ.get("SLURM_STEP_ID") or "batch"
