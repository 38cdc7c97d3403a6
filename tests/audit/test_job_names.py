from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfenv.audit.gpu_totals import summarize_logs
from tfenv.audit.job_names import format_job, format_step, list_job_names, read_job
from tfenv.audit.query import LineTally, RecordQuery, read_newest, read_records, select_records
from tfenv.audit.record import JOB_FIELDS, clip_job_text

WriteLog = Callable[..., "list[dict[str, Any]]"]

BATCH = {"scheduler": "slurm", "id": "14", "partition": "gpu", "user": "alice", "name": "train"}
STEP = {**BATCH, "step": "0", "rank": "3"}
TASK = {"scheduler": "slurm", "id": "16", "array_id": "14", "array_task": "0", "step": "0"}
PBS = {"scheduler": "pbs", "id": "14[3].head.cluster", "array_task": "3"}
LSF = {"scheduler": "lsf", "id": "14", "array_task": "0"}
ACTOR = {"scheduler": "ray", "ray_job": "01000000", "actor": "Trainer"}
RAY_IN_SLURM = {**STEP, **ACTOR, "scheduler": "slurm"}
NOTEBOOK = {"notebook": "/home/alice/vision/Untitled 1.ipynb", "hub_user": "alice"}
POD = {"scheduler": "kubernetes", "pod": "train-0", "namespace": "vision"}


@pytest.mark.parametrize(
    ("job", "names"),
    [
        ({}, set()),
        (BATCH, {"14", "train"}),
        (STEP, {"14", "14.0", "train"}),
        (TASK, {"14", "16", "14_0", "14[0]", "14.0", "16.0", "14_0.0", "14[0].0"}),
        (PBS, {"14", "14[3].head.cluster", "14_3", "14[3]"}),
        (LSF, {"14"}),
        (ACTOR, {"01000000", "Trainer"}),
        (RAY_IN_SLURM, {"14", "14.0", "train", "01000000", "Trainer"}),
        (NOTEBOOK, {"/home/alice/vision/Untitled 1.ipynb", "Untitled 1.ipynb", "alice"}),
        (POD, {"train-0"}),
    ],
)
def test_a_job_is_found_by_each_of_its_names(job: dict[str, str], names: set[str]) -> None:
    """Numbers, tasks and steps as the schedulers write them. A partition or a namespace is no job."""
    assert list_job_names(job) == names


@pytest.mark.parametrize(
    ("job", "whole", "step"),
    [
        ({}, "", ""),
        (BATCH, "14", "14"),
        (STEP, "14", "14.0"),
        (TASK, "14_0", "14_0.0"),
        (ACTOR, "01000000", "01000000"),
        (RAY_IN_SLURM, "14", "14.0"),
        (NOTEBOOK, "Untitled 1.ipynb", "Untitled 1.ipynb"),
        (POD, "train-0", "train-0"),
    ],
)
def test_a_job_is_shown_by_its_shortest_name(job: dict[str, str], whole: str, step: str) -> None:
    """An array's task and the step belong to the name, and what is shown is a name to find it by."""
    assert (format_job(job), format_step(job)) == (whole, step)
    assert {whole, step} - {""} <= list_job_names(job)


def test_the_job_of_an_older_record_is_known() -> None:
    """Records of older versions have variables of schedulers in `scheduler`."""
    old = {"SLURM_JOB_ID": "16", "SLURM_ARRAY_JOB_ID": "14", "SLURM_ARRAY_TASK_ID": "0", "SLURM_PROCID": "1"}
    assert read_job({"scheduler": old}) == {"id": "16", "array_id": "14", "array_task": "0", "rank": "1"}
    assert read_job({"scheduler": {}}) == read_job({"scheduler": 3, "job": []}) == {}


def test_what_is_no_text_in_a_job_is_left_out() -> None:
    """Anybody may have written the record."""
    assert read_job({"job": {"id": 14, "step": "0", "name": None, "token": "secret"}}) == {"step": "0"}


@pytest.fixture
def log(tmp_path: Path, write_log: WriteLog) -> Path:
    """Write one record of each job, and one of an older version."""
    path = tmp_path / "log"
    jobs = (BATCH, STEP, TASK, PBS, ACTOR, NOTEBOOK, POD)
    records = [{"pid": number, "job": job} for number, job in enumerate(jobs, 1)]
    write_log(path, *records, {"pid": 8, "scheduler": {"SLURM_JOB_ID": "14"}}, {"pid": 9})
    return path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("14", [1, 2, 3, 4, 8]),
        ("14.0", [2, 3]),
        ("14_0", [3]),
        ("14_0.0", [3]),
        ("16", [3]),
        ("14[3]", [4]),
        ("1", []),
        ("slurm", []),
        ("Trainer", [5]),
        ("Untitled 1.ipynb", [6]),
        ("train-0", [7]),
        ("train", [1, 2]),
        ("böb", []),
    ],
)
def test_records_of_a_job_are_found_from_either_end(log: Path, name: str, found: list[int]) -> None:
    """`--job 14` has all steps and tasks, `14_0` one task of the array, `14.0` one step."""
    query = RecordQuery(jobs=frozenset({name}))
    assert [record["pid"] for record in read_records([log], query, LineTally())] == found
    assert [record["pid"] for record in read_newest([log], query, LineTally(), 20)] == found


def test_a_summary_counts_one_job_only(log: Path) -> None:
    """`summary --job 14_0` leaves out other tasks, and finds older records."""
    for name, processes in (("14_0", 1), ("14", 5), ("nobody's", 0)):
        rows = summarize_logs([log], RecordQuery(jobs=frozenset({name})), LineTally())
        assert sum(len(row.processes) for row in rows) == processes


texts = st.one_of(st.sampled_from(["14", "14_0", "14.0", "14[3].head", "a/b", "ü", 'q"', "\\", "x" * 300]), st.text())
jobs_ = st.dictionaries(st.sampled_from(JOB_FIELDS), texts.filter(bool).map(clip_job_text), max_size=6)


@given(jobs_)
def test_no_record_of_a_job_is_skipped_unread(job: dict[str, str]) -> None:
    """Whatever a job is called, the look at the bytes of a line leaves in what each of its names finds."""
    line = json.dumps({"timestamp": "2026", "event": "policy_applied", "job": job}).encode("ascii")
    for name in list_job_names(job):
        assert list(select_records([line], RecordQuery(jobs=frozenset({name})), LineTally())), name


@given(jobs_)
def test_whatever_is_shown_of_a_job_finds_it(job: dict[str, str]) -> None:
    """What the column "job" shows can be given to `--job`."""
    assert {format_job(job), format_step(job)} - {""} <= list_job_names(job)
