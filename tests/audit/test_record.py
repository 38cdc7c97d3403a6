from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator

from tfenv.audit import record as module
from tfenv.audit.record import (
    JOB_FIELDS,
    MAX_RECORD_BYTES,
    AuditRecord,
    ProcessFacts,
    RecordContext,
    encode_record,
    make_changed_record,
    make_disabled_record,
    make_ended_record,
    make_failed_record,
    make_loaded_record,
    make_outcome_record,
    make_wall_record,
)
from tfenv.errors import Finding
from tfenv.policy.model import (
    DatedTable,
    Device,
    DeviceOutcome,
    EffectivePolicy,
    Grant,
    MemoryLimit,
    Origin,
    Outcome,
    OutcomeStatus,
    Plan,
    PlannedDevice,
    Share,
    Source,
    Subject,
    Wall,
    WouldClamp,
)
from tfenv.values import replace

CheckLine = Callable[[bytes], dict[str, Any]]
HOSTILE = "a\nb\x1b[31mc\u2028d\u2029e\x85f\udcffg\x00\U0001f600"


def encode_as_line(record: AuditRecord) -> bytes:
    return encode_record(record.as_dict())


def test_every_event_is_valid_against_the_schema(
    context: RecordContext, outcome: Outcome, check_line: CheckLine, schema: dict[str, Any]
) -> None:
    """Each event makes a record that the published schema accepts, and the schema knows no others."""
    policy, plan, finding = (
        EffectivePolicy(),
        Plan(),
        Finding("unknown-key", "no such key", path="/a", line=1, column=2),
    )
    change = {"key": "gpu.memory_growth", "old": None, "new": True, "old_origin": None, "new_origin": "/a:2"}
    records = [
        make_loaded_record(context, policy, plan, (finding,), 1.25),
        make_outcome_record(context, outcome),
        make_outcome_record(context, replace(outcome, status="clamped")),
        make_failed_record(context, (finding,), policy, outcome),
        make_disabled_record(context),
        make_changed_record(context, policy, plan, [change], (finding,)),
        make_ended_record(context, ((device, 1) for device in outcome.devices), 2.5),
        make_wall_record(context, "/sys/fs/cgroup/a", "alice", "dmem", [("GPU-a", None, 8 << 30)]),
    ]
    events = [check_line(encode_as_line(record))["event"] for record in records]
    assert events == schema["properties"]["event"]["enum"]


def test_a_plan_is_recorded_in_tensorflows_own_numbers(context: RecordContext, check_line: CheckLine) -> None:
    """Devices of a plan are numbered as TensorFlow will number them, with limits in bytes or as a fraction."""
    devices = (
        PlannedDevice("2", Device(2, "GPU-a", "H100", 80 << 30), MemoryLimit(bytes=8 << 30)),
        PlannedDevice("3", None, MemoryLimit(fraction=0.4)),
    )
    record = check_line(
        encode_as_line(make_loaded_record(context, EffectivePolicy(), Plan("2,3", devices=devices, growth=True)))
    )
    assert [device["index"] for device in record["devices"]] == [0, 1]
    assert [device["limit_bytes"] for device in record["devices"]] == [8 << 30, None]
    assert [device["limit_fraction"] for device in record["devices"]] == [None, 0.4]
    assert (record["visible"], record["growth"], record["grant"]) == ("2,3", True, ["0", "1"])
    assert record["sources"] == [{"layer": "project", "path": "/srv/vision/tfgpu.toml", "sha256": "ab" * 32}]


def test_the_share_of_a_launcher_is_recorded(context: RecordContext, check_line: CheckLine) -> None:
    """Where a limit is "granted": who gave the share, in which words, and what part of a GPU it is."""
    plan = Plan(limit=MemoryLimit(fraction=0.25), share=Share("Ray", "num_gpus=0.25", 0.25))
    record = check_line(encode_as_line(make_loaded_record(context, EffectivePolicy(), plan)))
    assert record["share"] == {"launcher": "Ray", "given": "num_gpus=0.25", "fraction": 0.25}
    assert "share" not in check_line(encode_as_line(make_loaded_record(context, EffectivePolicy(), Plan())))


def test_a_grant_that_was_unset_is_null_and_an_empty_one_is_not(context: RecordContext, check_line: CheckLine) -> None:
    """Unset CUDA_VISIBLE_DEVICES (all GPUs) and an empty one (none) stay apart in the log."""
    unset = make_disabled_record(replace(context, grant=Grant(tokens=None)))
    empty = make_disabled_record(replace(context, grant=Grant(tokens=())))
    assert check_line(encode_as_line(unset))["grant"] is None
    assert check_line(encode_as_line(empty))["grant"] == []
    assert "launcher" not in check_line(encode_as_line(unset))


def test_a_record_says_who_gave_the_gpus_and_which(context: RecordContext, check_line: CheckLine) -> None:
    """Slurm lists a job's GPUs itself. A script's own value of CUDA_VISIBLE_DEVICES is not what was given."""
    given = Grant(("0", "1", "2", "3"), launcher="Slurm", listed=("2",))
    record = check_line(encode_as_line(make_disabled_record(replace(context, grant=given))))
    assert (record["launcher"], record["grant"]) == ("Slurm", ["2"])


@pytest.mark.parametrize(
    ("status", "event", "level"),
    [
        ("applied", "policy_applied", "info"),
        ("degraded", "policy_applied", "warning"),
        ("clamped", "policy_clamped", "info"),
        ("too_late", "policy_failed", "error"),
        ("failed", "policy_failed", "error"),
        ("cpu", "policy_failed", "error"),
    ],
)
def test_an_outcome_finds_its_event(context: RecordContext, status: OutcomeStatus, event: str, level: str) -> None:
    """The status of an outcome decides the event, and a policy that is not in force is an error."""
    record = make_outcome_record(context, Outcome(status))
    assert (record.event, record.level) == (event, level)


def test_what_was_asked_and_not_given_is_on_record(
    context: RecordContext, outcome: Outcome, check_line: CheckLine
) -> None:
    """A clamped record names what was cut, and of each GPU what was asked. Others have no such field."""
    wish = Finding("clamped", "less", "note", asked="memory_limit = 70.0 GiB", given="12.0 GiB")
    device = replace(outcome.devices[0], asked=70 << 30, asked_fraction=0.9)
    clamped = replace(outcome, status="clamped", devices=(device,), findings=(wish, replace(wish, message="same")))
    record = check_line(encode_as_line(make_outcome_record(context, clamped)))
    assert record["cut"] == ["memory_limit"]
    assert (record["findings"][0]["asked"], record["findings"][0]["given"]) == (wish.asked, wish.given)
    assert (record["devices"][0]["asked_bytes"], record["devices"][0]["asked_fraction"]) == (70 << 30, 0.9)
    plain = check_line(encode_as_line(make_outcome_record(context, outcome)))
    assert "cut" not in plain
    assert not {"asked_bytes", "asked_fraction"} & set(plain["devices"][0])


def test_the_level_follows_the_worst_finding(context: RecordContext) -> None:
    """A note leaves a record at info, a warning makes it a warning, an error an error."""
    for severity, level in (("note", "info"), ("warning", "warning"), ("error", "error")):
        record = make_loaded_record(context, EffectivePolicy(), Plan(), (Finding("x", "y", severity),))  # type: ignore[arg-type]
        assert record.level == level


def test_hostile_names_stay_inside_one_ascii_line(context: RecordContext, check_line: CheckLine) -> None:
    """Newlines, ANSI escapes, U+2028 and bytes that are not UTF-8 in names neither break nor colour the line."""
    hostile = replace(
        context,
        process=replace(context.process, script=f"/{HOSTILE}", host=HOSTILE),
        subject=Subject(HOSTILE, 1, project=HOSTILE),
        sources=(Source("user", HOSTILE),),
    )
    record = check_line(encode_as_line(make_failed_record(hostile, (Finding("x", HOSTILE, path=HOSTILE),))))
    assert record["user"] == HOSTILE.replace("\udcff", "\\udcff")
    assert "\udcff" not in json.dumps(record, ensure_ascii=False)


def test_the_timestamp_is_the_moment_of_the_event_in_utc(context: RecordContext) -> None:
    """A record carries the time it was made, in UTC with microseconds and a Z."""
    before = datetime.now(timezone.utc)
    stamp = make_disabled_record(context).timestamp
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", stamp)
    assert before <= datetime.fromisoformat(stamp.replace("Z", "+00:00")) <= datetime.now(timezone.utc)


def test_what_json_cannot_hold_becomes_text(context: RecordContext, check_line: CheckLine) -> None:
    """NaN, infinity, bytes and objects in what a program asked for do not make the record unreadable."""
    asked: Any = {"fraction": float("nan"), 3: float("inf"), "raw": b"\xff", "nested": {"list": (1, {2})}}
    record = check_line(encode_as_line(make_outcome_record(context, Outcome("applied", asked=asked))))
    assert record["asked"] == {"fraction": "nan", "3": "inf", "raw": "b'\\xff'", "nested": {"list": [1, [2]]}}


def test_process_facts_come_from_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """pid, parent, host and version are the kernel's and the interpreter's."""
    process = ProcessFacts.collect("tensorflow", "2.21.0")
    assert (process.pid, process.ppid, process.host) == (os.getpid(), os.getppid(), os.uname().nodename)
    assert sys.version.startswith(process.python)
    monkeypatch.setattr(sys, "argv", ["train.py", "--token=secret"])
    assert "secret" not in repr(ProcessFacts.collect())


def test_a_record_names_its_job_and_nothing_else_that_a_launcher_tells(
    context: RecordContext, check_line: CheckLine
) -> None:
    """The job is recorded by the names of the allowlist. A token that a launcher hands over is not."""
    job = {"scheduler": "slurm", "id": "15", "array_id": "14", "array_task": "0", "rank": "", "jwt": "secret"}
    record = check_line(encode_as_line(make_disabled_record(replace(context, grant=Grant(job=job)))))
    assert record["job"] == {"scheduler": "slurm", "id": "15", "array_id": "14", "array_task": "0"}


def test_a_record_outside_of_a_job_names_none(context: RecordContext, check_line: CheckLine) -> None:
    """Without a launcher's job there is no `job`."""
    assert "job" not in check_line(encode_as_line(make_disabled_record(context)))


def test_a_long_value_of_the_job_is_shortened(context: RecordContext, check_line: CheckLine) -> None:
    """A job whose name fills a page costs the record nothing else."""
    job = dict.fromkeys(JOB_FIELDS, "n" * 5000)
    record = check_line(encode_as_line(make_disabled_record(replace(context, grant=Grant(job=job)))))
    assert all(50 < len(value) <= 128 for value in record["job"].values())
    assert "truncated" not in record


def test_the_schema_knows_what_is_recorded_of_a_job(schema: dict[str, Any]) -> None:
    """Every name that a job may have is described in the schema, in the record's order."""
    assert tuple(schema["properties"]["job"]["properties"]) == JOB_FIELDS


def test_the_end_of_a_process_has_its_devices_and_their_peaks(context: RecordContext, check_line: CheckLine) -> None:
    """A peak that the framework does not tell is left out, and so is a time that is not known."""
    devices = [(DeviceOutcome(place, str(place), limit=8 << 30), peak) for place, peak in enumerate((7, None))]
    record = check_line(encode_as_line(make_ended_record(context, devices, 61_000.5)))
    assert (record["event"], record["level"], record["duration_ms"]) == ("policy_ended", "info", 61_000.5)
    assert [device.get("peak_bytes") for device in record["devices"]] == [7, None]
    assert "duration_ms" not in check_line(encode_as_line(make_ended_record(context, devices, None)))


def test_the_schema_describes_every_field(schema: dict[str, Any]) -> None:
    """The schema is itself valid, and nothing in it goes without a description."""
    Draft7Validator.check_schema(schema)
    assert list(schema["properties"]) == list(module._ORDER)

    def check(node: dict[str, Any], path: str) -> None:
        assert node.get("description"), path
        for name, child in node.get("properties", {}).items():
            check(child, f"{path}.{name}")
        if "items" in node:
            check(node["items"], f"{path}[]")

    check(schema, "")


def test_long_messages_go_first_and_the_record_says_so(context: RecordContext, check_line: CheckLine) -> None:
    """A record that is too long loses the ends of its findings' messages before anything else."""
    findings = tuple(Finding("x", "m" * 900, path="/f", line=n) for n in range(1, 7))
    record = check_line(encode_as_line(make_failed_record(context, findings)))
    assert record["truncated"] is True
    assert len(record["findings"]) == 6
    assert record["sources"]
    assert record["dropped"] == {}


def test_dropped_findings_are_counted(context: RecordContext, check_line: CheckLine) -> None:
    """Findings that do not fit are dropped from the end, and their number is kept."""
    findings = tuple(Finding("x", "m" * 50, path=f"/f{n}") for n in range(100))
    record = check_line(encode_as_line(make_failed_record(context, findings)))
    assert record["findings"][0]["path"] == "/f0"
    assert len(record["findings"]) + record["dropped"]["findings"] == 100


def test_a_record_that_fits_is_not_touched(applied: AuditRecord, check_line: CheckLine) -> None:
    """`truncated` appears only on a record that was shortened."""
    record = check_line(encode_as_line(applied))
    assert "truncated" not in record
    assert record["devices"][0]["uuid"] == "GPU-8932f937-d72c"


# Long ones are repeated, not drawn one character at a time: that took most of the time.
long_texts = st.builds(lambda part, times: part * times, st.text("\U0001f600\x00é", min_size=1), st.integers(100, 999))
texts = st.one_of(st.text(max_size=40), long_texts)
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=9), st.dictionaries(texts, inner, max_size=9)),
)
findings_ = st.builds(
    Finding,
    texts,
    texts,
    st.just("error"),
    texts,
    st.integers(1, 10**9),
    st.integers(1, 10**9),
    texts,
    asked=texts,
    given=texts,
)
devices_ = st.builds(
    DeviceOutcome,
    st.integers(0, 99),
    texts,
    texts,
    texts,
    st.integers(0, 10**15),
    logical_devices=st.builds(lambda size, parts: (size,) * parts, st.integers(0, 10**15), st.integers(0, 99)),
    asked=st.integers(0, 10**15),
    asked_fraction=st.floats(0, 1),
)


# An example takes 80 ms.
@settings(suppress_health_check=list(HealthCheck), max_examples=min(settings().max_examples, 500))
@given(
    texts,
    st.builds(lambda tokens, times: tokens * times, st.lists(texts, max_size=9), st.integers(1, 22)),
    st.lists(findings_, max_size=12),
    st.lists(devices_, max_size=12),
    st.dictionaries(texts, plain, max_size=5),
)
def test_a_record_of_anything_is_one_valid_line_of_at_most_4_kib(
    check_line: CheckLine,
    text: str,
    tokens: list[str],
    findings: list[Finding],
    devices: list[DeviceOutcome],
    asked: Any,
) -> None:
    """Whatever the names, findings and wishes are: one line, valid JSON, valid against the schema, at most 4 KiB."""
    grant = Grant(tuple(tokens), job=dict.fromkeys(JOB_FIELDS, text))
    process = ProcessFacts(1, 2, text, text, text, text, text)
    origin = Origin("machine", text, ("user", text))
    context = RecordContext(
        process,
        Subject(text, 3, tuple(tokens), project=text),
        grant,
        (Source("user", text),) * 9,
        revision=text,
        exceptions=(DatedTable("user", text, origin, "2027-01-31", text),) * len(findings),
    )
    lost = tuple(WouldClamp(text, text, text, text, device.asked, device.limit, (origin,)) for device in devices)
    outcome = Outcome(
        "clamped", text, tuple(devices), asked=asked, given=asked, findings=tuple(findings), would_clamp=lost
    )
    full = make_outcome_record(context, outcome)
    assert len(encode_as_line(full)) <= MAX_RECORD_BYTES
    check_line(encode_as_line(full))


def test_nothing_of_the_environment_or_arguments_reaches_a_record(
    context: RecordContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A secret in a variable or an argument is not in the record."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setattr(sys, "argv", ["x", "hunter2"])
    record = make_disabled_record(replace(context, process=ProcessFacts.collect()))
    assert b"hunter2" not in encode_as_line(record)


def test_rail_and_wall_stand_beside_each_other(context: RecordContext, check_line: CheckLine) -> None:
    """A GPU in a limited cgroup has `wall_bytes` in the plan's record and in the outcome's. Another one has not."""
    wall = Wall(8 << 30, 1 << 30, "/sys/fs/cgroup/user.slice/user-1001.slice")
    limited = PlannedDevice("0", Device(0, "GPU-1", "H100", 80 << 30, wall=wall), MemoryLimit(bytes=4 << 30))
    free = PlannedDevice("1", Device(1, "GPU-2", "H100", 80 << 30), MemoryLimit(bytes=4 << 30))
    outcomes = tuple(
        planned.describe(index, 80 << 30, limit=4 << 30, fraction=None) for index, planned in enumerate((limited, free))
    )
    made = make_outcome_record(context, Outcome("applied", "TFE_ContextOptionsSetConfig", outcomes))
    loaded = make_loaded_record(context, EffectivePolicy(), Plan(devices=(limited, free)), (), 1.0)
    for record in (made, loaded):
        devices = check_line(encode_as_line(record))["devices"]
        assert [(device["limit_bytes"], device.get("wall_bytes")) for device in devices] == [
            (4 << 30, 8 << 30),
            (4 << 30, None),
        ]
