"""What happens again is counted, and nothing new goes unrecorded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from jsonschema import Draft7Validator

from tests.conftest import REPOSITORY
from tests.frameworks.harness import World, run_program
from tfenv.errors import Finding
from tfenv.pipeline import LoadedPolicy
from tfenv.policy.model import AuditSinks, EffectivePolicy, Grant, Start, Subject
from tfenv.runtime.reporting import RepeatCounter, Reporter

KIND = ("tensorflow", "TF_NewSessionOptions", "applied", "")


def test_repeats_are_written_at_each_power_of_ten() -> None:
    """The first, the tenth, the hundredth time. The counts add up to what happened."""
    counter = RepeatCounter()
    written = {number: times for number in range(1, 2501) if (times := counter.count(KIND, "the same"))}
    assert written == {1: 1, 10: 9, 100: 90, 1000: 900}


def test_details_are_bounded_and_kinds_are_not() -> None:
    """Of ten thousand sessions that all differ a thousand are written, and one of another kind always."""
    counter = RepeatCounter()
    written = [counter.count(KIND, f"session {number}") for number in range(10_000)]
    assert 1000 < sum(map(bool, written)) < 1010
    assert sum(written) <= 10_000
    assert counter.count((*KIND[:2], "clamped", "clamped"), "asked for 1.5 of the card") == 1


def test_memory_is_bounded() -> None:
    """Whatever a program does, a counter keeps a bounded number of kinds."""
    counter = RepeatCounter()
    for number in range(20_000):
        counter.count((*KIND, str(number)), str(number))
    assert len(counter._counts) < 10_000


def test_a_forked_worker_counts_for_itself() -> None:
    """What the parent wrote is no record of the child."""
    counter = RepeatCounter()
    assert counter.count(KIND, "x") == 1
    child = os.fork()
    if child == 0:
        os._exit(counter.count(KIND, "x"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_record_that_cannot_be_made_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """The program goes on, and the line ends with the code to look up."""
    reporter = Reporter(LoadedPolicy(Start(cwd="/", uid=os.geteuid()), Subject("alice", os.geteuid())), Grant())
    reporter.report_switched_off(None)  # type: ignore[arg-type]
    reporter.report_switched_off(object())  # type: ignore[arg-type]
    line = capfd.readouterr().err
    assert line.startswith("tfgpu: an audit record was not written: AttributeError: ")
    assert line.endswith(" [internal-error]\n")
    assert line.count("\n") == 1


def test_a_program_that_is_refused_in_a_loop_fills_no_log(tmp_path: Path) -> None:
    """Who catches PolicyError and tries again has records of the first, the tenth, the hundredth time."""
    log = tmp_path / "audit.jsonl"
    start = Start(cwd=str(tmp_path), uid=os.geteuid())
    policy = EffectivePolicy(audit=AuditSinks("none", (str(log),), default_file=False))
    reporter = Reporter(LoadedPolicy(start, Subject("me", os.geteuid()), policy=policy), Grant())
    for _ in range(300):
        reporter.report_refused((Finding("gpu-busy", "no GPU is free"),))
    reporter.report_refused((Finding("gpu-lost", "another fault"),))
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record.get("repeats") for record in records] == [None, 9, 90, None]
    assert {record["event"] for record in records} == {"policy_failed"}


SESSIONS = """
import os
import tensorflow as tf
def session(fraction):
    options = tf.compat.v1.GPUOptions(per_process_gpu_memory_fraction=fraction)
    tf.compat.v1.Session(config=tf.compat.v1.ConfigProto(gpu_options=options))
for number in range(150):
    session(0.001 + number / 100000)
for _ in range(30):
    session(0.0005)
session(1.5)
"""


@pytest.mark.tensorflow
def test_a_request_that_is_cut_is_on_record_after_many_sessions(tmp_path: Path) -> None:
    """The session that asked for one and a half of the card is recorded, whatever was before. Repeats have a count."""
    ended = run_program(World('[gpu]\nmemory_limit = "2GiB"\n', gpus="1x24GiB"), SESSIONS, tmp_path)
    assert ended.status == 0, ended.stderr
    schema = Draft7Validator(json.loads((REPOSITORY / "schemas" / "audit.schema.json").read_text()))
    for record in ended.records:
        schema.validate(record)
    asked = [record.get("asked", {}).get("per_process_gpu_memory_fraction") for record in ended.records]
    assert 1.5 in asked
    assert len(ended.records) < 160
    assert any(record.get("repeats", 1) > 1 for record in ended.records)
