"""What Slurm's TaskProlog prints so that each task finds the file of its partition.

Slurm runs the TaskProlog before every task, as the job's user and with the task's environment. A line
`export NAME=VALUE` or `unset NAME` of its stdout changes that environment. Measured with Slurm 22.05: the batch script
and all tasks of srun are tasks. If the TaskProlog ends with another status than 0, the task fails. What it writes on
stderr is lost. https://slurm.schedmd.com/prolog_epilog.html
"""

from __future__ import annotations

import os

from tfenv.deploy.slurm_step import find_step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

#: The files of the partitions: `FOLDER/PARTITION.toml`.
FOLDER = "/etc/tfgpu/slurm"
_VARIABLE = "TFGPU_SITE_CONFIG"
#: Which step the file was named for, and the file: "14.0 /etc/tfgpu/slurm/gpu.toml". A job that is submitted from a
#: task inherits both variables. A value of TFGPU_SITE_CONFIG that is not the one in here is somebody else's.
_STAMP = "TFGPU_SLURM_SITE"


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
    step = f"{environ.get('SLURM_JOB_ID', '')}.{find_step(environ).name}"
    return (f"export {_VARIABLE}={path}", f"export {_STAMP}={step} {path}")


def _find_file(partition: str, folder: str) -> str | None:
    """Return the path of the partition's file. None: there is none. One that cannot be read is reported by the task."""
    if "/" in partition or partition.startswith("."):
        return None
    path = os.path.join(os.path.abspath(folder), f"{partition}.toml")
    return path if os.path.lexists(path) else None
