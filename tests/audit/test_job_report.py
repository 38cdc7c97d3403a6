from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import pytest

from tfenv.audit.job_report import JobReport, format_duration, format_job_lines, make_job_report
from tfenv.audit.record import (
    AuditRecord,
    ProcessFacts,
    RecordContext,
    encode_record,
    format_timestamp,
    make_disabled_record,
    make_ended_record,
    make_failed_record,
    make_outcome_record,
)
from tfenv.errors import Finding
from tfenv.policy.model import DeviceOutcome, Grant, Outcome, Subject
from tfenv.values import replace

GIB = 1 << 30
FIRST = DeviceOutcome(0, "0", "GPU-aaaa", "NVIDIA H100", limit=8 * GIB)
SECOND = DeviceOutcome(1, "1", "GPU-bbbb", "NVIDIA H100", limit=8 * GIB)
CUT = Finding("clamped", "memory_limit is clamped", "note", asked="memory_limit = 70.0 GiB", given="8.0 GiB")


def make_context(pid: int, **job: str) -> RecordContext:
    process = ProcessFacts(pid, 1, "node1", "/srv/train.py", "3.11.7", "tensorflow", "2.21.0", start_ticks=pid)
    job = {"scheduler": "slurm", "id": "14", "step": "0", **job}
    return RecordContext(process, Subject("alice", 1000), Grant(("0", "1"), job=job))


def read(record: AuditRecord, second: int) -> Mapping[str, Any]:
    """Return the record as a reader finds it in the log, made at this second of an hour."""
    time = format_timestamp(datetime(2026, 11, 5, 9, second // 60, second % 60, tzinfo=timezone.utc))
    found: dict[str, Any] = json.loads(encode_record({**record.as_dict(), "timestamp": time}))
    return found


def make_process(
    pid: int, devices: Sequence[DeviceOutcome], peaks: Sequence[int], **job: str
) -> list[Mapping[str, Any]]:
    """Make the records of a process that got its devices after 10 s and ended after 70."""
    context, outcome = make_context(pid, **job), Outcome("applied", "TFE_ContextOptionsSetConfig", tuple(devices))
    ended = make_ended_record(context, zip(devices, peaks, strict=True), 70_000)
    return [read(ended, 70), read(make_outcome_record(context, outcome), 10)]


def test_a_report_has_each_process_with_its_limits_and_peaks() -> None:
    """Records come in any order. What a process is within its step belongs to it."""
    records = make_process(2, (FIRST, SECOND), (GIB, 2 * GIB), rank="1") + make_process(1, (FIRST,), (7 * GIB,))
    report = make_job_report("14", records)
    assert [(process.pid, process.role, process.seconds) for process in report.processes] == [
        (1, "", 70.0),
        (2, "rank 1", 70.0),
    ]
    assert [[gpu.peak_bytes for gpu in process.gpus] for process in report.processes] == [[7 * GIB], [GIB, 2 * GIB]]
    assert report.processes[0].began == "2026-11-05T09:00:00.000000Z"
    assert (report.gpus, report.seconds) == (("GPU-aaaa", "GPU-bbbb"), 70.0)
    assert report.fullest is not None
    assert report.fullest.part == 7 / 8


def test_two_frameworks_of_a_process_count_together() -> None:
    """A process that computes with JAX and reads with TensorFlow has both limits and both peaks of its card."""
    half = replace(FIRST, limit=4 * GIB)
    jax = [{**record, "framework": "jax"} for record in make_process(1, (half,), (3 * GIB,))]
    report = make_job_report("14", [*make_process(1, (half,), (GIB,)), *jax])
    (process,) = report.processes
    assert [(gpu.limit_bytes, gpu.peak_bytes) for gpu in process.gpus] == [(8 * GIB, 4 * GIB)]


def test_a_process_that_did_not_end_has_no_peak_and_no_time() -> None:
    """One that was killed is in the report all the same, and the job's time is not known."""
    killed = make_outcome_record(make_context(3), Outcome("applied", "x", (FIRST,)))
    report = make_job_report("14", [*make_process(1, (FIRST,), (GIB,)), read(killed, 20)])
    process = report.processes[1]
    assert (process.pid, process.ended, process.seconds, process.gpus[0].peak_bytes) == (3, None, None, None)
    assert report.seconds is None
    assert format_job_lines(report) == ("job 14: 1 GPU, peak 1.0 GiB of 8.0 GiB (12%), 2 processes",)


def test_the_lines_say_what_was_used_and_what_was_cut() -> None:
    """At the end of a job: one line on its GPUs, and one on what it asked for and did not get."""
    clamped = make_outcome_record(make_context(1), Outcome("clamped", "x", (FIRST,), findings=(CUT,)))
    report = make_job_report("14", [*make_process(1, (FIRST,), (7 * GIB,)), read(clamped, 11)])
    assert format_job_lines(report) == (
        "job 14: 1 GPU, peak 7.0 GiB of 8.0 GiB (88%), 1 process, 1min 10s",
        "job 14: asked for more: memory_limit = 70.0 GiB (got 8.0 GiB)",
    )


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (make_failed_record(make_context(1), (Finding("x", "no such GPU"), Finding("y", "z", "note"))), "no such GPU"),
        (make_disabled_record(make_context(1)), "TFGPU_DISABLE switched the policy off"),
    ],
)
def test_a_policy_that_was_not_in_force_is_said(record: AuditRecord, reason: str) -> None:
    """It is more important than what was cut."""
    report = make_job_report("14", [read(record, 1)])
    assert report.failed == (reason,)
    assert format_job_lines(report) == ("job 14: no GPU, 1 process", f"job 14: not in force: {reason}")


def test_a_job_without_records_used_no_gpu_under_a_policy() -> None:
    """The line says so instead of nothing."""
    assert format_job_lines(JobReport("14")) == ("job 14: no process used a GPU under a policy",)


def test_the_report_is_json() -> None:
    """Programs get all of it, under the names of the record."""
    told = json.loads(json.dumps(make_job_report("14", make_process(1, (FIRST,), (GIB,))).as_dict()))
    assert (told["job"], told["seconds"], told["gpus"]) == ("14", 70.0, ["GPU-aaaa"])
    assert told["processes"][0]["job"] == {"scheduler": "slurm", "id": "14", "step": "0"}
    assert told["processes"][0]["gpus"] == [
        {
            "gpu": "GPU-aaaa",
            "name": "NVIDIA H100",
            "limit_bytes": 8 * GIB,
            "limit_fraction": None,
            "peak_bytes": GIB,
        }
    ]


def test_a_hostile_record_breaks_no_report() -> None:
    """Anybody may have written the log."""
    base = {"timestamp": "nonsense", "event": "policy_ended", "duration_ms": -1, "devices": [{"peak_bytes": "x"}, 3]}
    odd = {"timestamp": "2026", "event": "policy_clamped", "pid": "x", "job": 3, "findings": [1, {"asked": 2}]}
    report = make_job_report("14", [base, {**base, "duration_ms": 1e300, "pid": 2}, odd])
    assert len(report.processes) == 3
    json.dumps(report.as_dict())
    format_job_lines(report)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0s"), (3.21, "3.2s"), (59.99, "60.0s"), (61, "1min 1s"), (4321, "1h 12min")]
)
def test_a_duration_has_two_units_at_most(seconds: float, text: str) -> None:
    """Seconds of a job that took a day are of no interest."""
    assert format_duration(seconds) == text
