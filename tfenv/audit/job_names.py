"""The names by which a record's job is found: `14`, `14_0`, `14.0`, an actor, a pod, a notebook. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tfenv.audit.record import JOB_FIELDS, clip_job_text

#: What records of older versions have in `scheduler`, by the names of today.
_OLD_NAMES = {
    "SLURM_JOB_ID": "id",
    "SLURM_ARRAY_JOB_ID": "array_id",
    "SLURM_ARRAY_TASK_ID": "array_task",
    "SLURM_STEP_ID": "step",
    "SLURM_PROCID": "rank",
    "LSB_JOBID": "id",
    "LSB_JOBINDEX": "array_task",
    "PBS_JOBID": "id",
    "PBS_ARRAY_INDEX": "array_task",
    "FLUX_JOB_ID": "id",
    "JOB_ID": "id",
    "SGE_TASK_ID": "array_task",
    "RAY_JOB_ID": "ray_job",
    "KUBERNETES_POD": "pod",
}
#: Values that name a job, or a part of it, by themselves. The first one is what a table shows.
_NAMING = ("ray_job", "notebook", "pod", "hub_user", "actor", "task", "name")
#: PBS: "14.server", "14[3].server".
_NUMBER_BEGIN = re.compile(r"[0-9]+")
#: Array tasks that mean that there is no array: LSF's and Grid Engine's.
_NO_TASK = ("0", "undefined")


def read_job(record: Mapping[str, Any]) -> dict[str, str]:
    """Return a record's job, by the names of today. {}: it has none."""
    job = record.get("job")
    if isinstance(job, dict):
        return {name: job[name] for name in JOB_FIELDS if isinstance(job.get(name), str)}
    old = record.get("scheduler")
    if not isinstance(old, dict):
        return {}
    return {new: old[name] for name, new in _OLD_NAMES.items() if isinstance(old.get(name), str)}


def list_job_names(job: Mapping[str, str]) -> set[str]:
    """Return all names by which a job is found.

    The number of a job or array is one, followed by `_TASK` or `[TASK]` for a task of the array, and by `.STEP` for a
    step. A notebook has its path and the name of its file.
    """
    names = {job[name] for name in _NAMING if name in job}
    if "notebook" in job:
        names.add(job["notebook"].rpartition("/")[2])
    for number in _list_numbers(job):
        names.add(number)
        if "step" in job:
            names.add(f"{number}.{job['step']}")
    return names


def _list_numbers(job: Mapping[str, str]) -> set[str]:
    """Return the numbers of the job, of its array and of its task."""
    number = job.get("id", "")
    numbers = {number, job.get("array_id", "")}
    begin = _NUMBER_BEGIN.match(number)
    if begin is not None:
        numbers.add(begin[0])
    task = _read_task(job)
    if task:
        array = job.get("array_id") or (begin[0] if begin else number)
        numbers |= {f"{array}_{task}", f"{array}[{task}]"}
    return numbers - {""}


def _read_task(job: Mapping[str, str]) -> str:
    task = job.get("array_task", "")
    return "" if task in _NO_TASK and "array_id" not in job else task


def format_job(job: Mapping[str, str]) -> str:
    """Return the shortest name of the whole job, as `list_job_names` has it. Of an array it is the task's."""
    task = _read_task(job)
    if "array_id" in job and task:
        return f"{job['array_id']}_{task}"
    if "id" in job:
        return job["id"]
    name = next((name for name in _NAMING if name in job), None)
    if name is None:
        return ""
    return job[name].rpartition("/")[2] if name == "notebook" else job[name]


def format_step(job: Mapping[str, str]) -> str:
    """Return the name of the job's step. Where there is none, that of the job."""
    name = format_job(job)
    return f"{name}.{job['step']}" if "id" in job and "step" in job else name


def build_job_prefilter(wanted: str) -> tuple[bytes, ...]:
    """Return byte strings of which a line has one if its job has this name. (): there is nothing to look for."""
    text = clip_job_text(wanted)
    if json.dumps(text) != f'"{text}"':  # JSON may spell it in several ways
        return ()
    begin = re.split(r"[_.\[]", text, maxsplit=1)[0]
    return (f'"{begin}'.encode("ascii"), f"/{text}".encode("ascii"))  # the second is the name of a notebook's file
