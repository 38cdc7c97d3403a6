"""The administrator's ceilings under real TensorFlow, for two real users: nothing a program does passes one."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.frameworks.harness import (
    ZYGOTE,
    Case,
    Report,
    World,
    child_environment,
    orders,
    read_records,
    read_report,
)
from tests.shared_machine import ALICE, BOB, SharedMachine, User, shared_machine

__all__ = ["shared_machine"]

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("needs_tensorflow")]

ETC = "/etc/tfgpu/tfgpu.toml"
POLICY = {
    "tfgpu.toml": """
[ceiling]
allowed_devices = [1, 2]
memory_limit = "1000MiB"
require_memory_growth = true
[audit]
file = "/var/log/tfgpu/<uid>.jsonl"
""",
    "users/bob.toml": '[ceiling]\nallowed_devices = [3]\nmemory_limit = "500MiB"\n',
}
#: Alice's project asks for everything.
PROJECT = '[gpu]\nvisible_devices = "all"\nmemory_limit = "none"\nmemory_growth = false\n'

LIMIT, GROWTH, DEVICES = "ceiling.memory_limit", "ceiling.require_memory_growth", "ceiling.allowed_devices"


def run_cases(machine: SharedMachine, user: User, world: World, steps: Sequence[tuple[str, ...]]) -> list[Report]:
    """Run each in a child of one process of this user's, whose import of TensorFlow all share."""
    folder = machine.folder(f"/srv/{user.uid}-{len(world.before)}", user)
    machine.write(f"{folder}/tfgpu.toml", PROJECT, user)
    cases = [Case(world, each) for each in steps]
    env = child_environment(world) | {"HOME": "/nonexistent", "TMPDIR": "/tmp"}
    text = orders(world, cases, folder)
    done = machine.run(user, sys.executable, str(ZYGOTE), cwd=folder, env=env, text=text)
    assert done.returncode == 0, done.stderr
    records = read_records(machine.path(f"/var/log/tfgpu/{user.uid}.jsonl"))
    return [read_report(machine.path(folder), number, records) for number in range(len(cases))]


def check(report: Report, gpus: set[int], held: str | None) -> None:
    """Memory of these GPUs alone, at most 1000 MiB, growing; the record says who asked and which ceiling held."""
    assert (report.status, report.error) == (0, None), report.stderr
    assert report.gpus
    assert set(report.gpus) <= gpus
    for gpu in report.gpus:
        assert report.first_mib(gpu) == 2
        assert report.peak_mib(gpu) <= 1000
    if held is not None:
        found = clamps(report)
        assert [finding["held_by"] for finding in found if finding["key"] == held] == [f"{ETC} ({held})"], found
        assert {finding["path"] for finding in found} == {ETC}


def clamps(report: Report) -> list[Mapping[str, Any]]:
    """What the program was not given, by the records of events `policy_clamped`."""
    records = [record for record in report.records if record["event"] == "policy_clamped"]
    findings = [finding for record in records for finding in record["findings"]]
    return [finding for finding in findings if finding.get("asked_by") == "the program"]


#: What the program does after its import -> the GPUs it can get, and the ceiling that holds.
AFTER = {
    ("set_environment:CUDA_VISIBLE_DEVICES=3", "eager"): ({1, 2}, DEVICES),
    ("set_environment:CUDA_VISIBLE_DEVICES=0,1", "session"): ({1}, DEVICES),
    ("set_logical_devices:9000", "take_all"): ({1, 2}, LIMIT),
    ("session:per_process_gpu_memory_fraction=1.5",): ({1, 2}, LIMIT),
    ("session:use_unified_memory=1",): ({1, 2}, LIMIT),
    ("small_session:use_cuda_malloc_async=1", "eager"): ({1, 2}, LIMIT),
    ("set_environment:TF_GPU_ALLOCATOR=cuda_malloc_async", "eager", "too_big"): ({1, 2}, LIMIT),
    ("set_environment:TF_FORCE_GPU_ALLOW_GROWTH=false", "eager"): ({1, 2}, GROWTH),
    ("set_environment:TF_FORCE_UNIFIED_MEMORY=1", "session"): ({1, 2}, LIMIT),
    ("set_environment:TF_DEVICE_MIN_SYS_MEMORY_IN_MB=1", "session"): ({1, 2}, LIMIT),
    ("set_environment:TF_XLA_FLAGS=--tf_xla_enable_xla_devices", "eager"): ({1, 2}, LIMIT),
    ("list_local_devices", "eager"): ({1, 2}, None),
    ("executed",): ({1, 2}, None),
}


def test_no_program_passes_the_ceilings_after_its_import(shared_machine: SharedMachine) -> None:
    """Variables, logical devices and ConfigProtos are clamped, each on record with the administrator's key."""
    shared_machine.policy(POLICY)
    reports = run_cases(shared_machine, ALICE, World(None), tuple(AFTER))
    for (steps, (gpus, held)), report in zip(AFTER.items(), reports, strict=True):
        assert report.status == 0, (steps, report.stderr)
        check(report, gpus, held)


#: At the top of a script.
BEFORE = {
    "CUDA_VISIBLE_DEVICES": ("3", DEVICES),
    "TF_GPU_ALLOCATOR": ("cuda_malloc", LIMIT),
    "TF_FORCE_GPU_ALLOW_GROWTH": ("false", GROWTH),
    "TF_FORCE_UNIFIED_MEMORY": ("1", LIMIT),
}


@pytest.mark.exhaustive
def test_no_program_passes_the_ceilings_from_the_top_of_its_script(shared_machine: SharedMachine) -> None:
    """All variables at once, before the import: GPUs 1 and 2, and one finding for each with the key that held."""
    shared_machine.policy(POLICY)
    world = World(None, before=tuple((name, value) for name, (value, _) in BEFORE.items()))
    (report,) = run_cases(shared_machine, ALICE, world, [("eager", "too_big")])
    check(report, {1, 2}, None)
    said = {(finding["key"], name) for finding in clamps(report) for name in BEFORE if name in finding["message"]}
    assert said == {(held, name) for name, (_, held) in BEFORE.items()}


@pytest.mark.exhaustive
def test_each_user_has_ceilings_of_their_own(shared_machine: SharedMachine) -> None:
    """Bob's file replaces what the machine's says for everybody; his log and alice's are two, each its owner's."""
    shared_machine.policy(POLICY)
    (report,) = run_cases(shared_machine, BOB, World(None), [("eager", "too_big")])
    assert (set(report.gpus), report.peak_mib(3) <= 500) == ({3}, True)
    assert {record["user"] for record in report.records} == {"bob"}
    assert shared_machine.path("/var/log/tfgpu/5002.jsonl").stat().st_uid == BOB.uid


WISHES = {
    "tfgpu.toml": """
[gpu]
memory_limit = "2000MiB"
[ceiling]
allowed_devices = [1]
memory_limit = "1000MiB"
[audit]
file = "/var/log/tfgpu/<uid>.jsonl"
"""
}
CREATE = "import tensorflow as tf\ntf.zeros([8])\n"


def test_root_sees_whose_files_asked_for_more_than_was_given(shared_machine: SharedMachine) -> None:
    """Alice's own file asks for 70 GiB, bob has none: only alice is clamped. The administrator's setting is no wish."""
    shared_machine.clear()
    shared_machine.policy(WISHES)
    shared_machine.write("/home/alice/.config/tfgpu/tfgpu.toml", '[gpu]\nmemory_limit = "70GiB"\n', ALICE)
    for user in (ALICE, BOB):
        log = shared_machine.path(f"/var/log/tfgpu/{user.uid}.jsonl")
        log.unlink(missing_ok=True)
        done = shared_machine.run(user, sys.executable, "-c", CREATE, env=child_environment(World(None)))
        assert done.returncode == 0, done.stderr
    shown = shared_machine.tfgpu("audit", "--outcome", "clamped", "--format", "json")
    (record,) = map(json.loads, shown.stdout.splitlines())
    assert (record["user"], record["devices"][0]["asked_bytes"]) == ("alice", 70 << 30)
    (finding,) = record["findings"]
    assert (finding["asked"], finding["given"]) == ("memory_limit = 70.0 GiB", "1000.0 MiB")
    assert finding["asked_by"] == "/home/alice/.config/tfgpu/tfgpu.toml (gpu.memory_limit)"
    assert finding["held_by"] == f"{ETC} ({LIMIT})"
    shown = shared_machine.tfgpu("audit", "summary", "--format", "json")
    rows = {
        row["user"]: (row["asked_bytes"], row["given_bytes"], row["clamped"], row["cut"])
        for row in map(json.loads, shown.stdout.splitlines())
    }
    limit = 1000 << 20
    assert rows == {"alice": (70 << 30, limit, 1, {"memory_limit": 1}), "bob": (None, limit, 0, {})}


def test_a_required_log_that_cannot_be_written_is_why_there_is_no_gpu(shared_machine: SharedMachine) -> None:
    """With `on_error = "cpu"` the line names the log, not CUDA_VISIBLE_DEVICES, and so does the record."""
    shared_machine.clear()
    shared_machine.policy(
        {"tfgpu.toml": 'on_error = "cpu"\n[gpu]\nmemory_growth = true\n[audit]\nfile = "/proc/tfgpu/audit.jsonl"\n'}
    )
    project = shared_machine.folder("/srv/log", ALICE)
    shared_machine.write(f"{project}/tfgpu.toml", '[audit]\nfile = "log.jsonl"\n', ALICE)
    done = shared_machine.run(ALICE, sys.executable, "-c", CREATE, cwd=project, env=child_environment(World(None)))
    reason = "/proc/tfgpu/audit.jsonl: the audit log was not written: No such file or directory [log-not-written]"
    assert f"tfgpu: NO GPU for TensorFlow: {reason}\n" in done.stderr
    records = read_records(shared_machine.path(f"{project}/log.jsonl"))
    found = [(record["event"], [finding["code"] for finding in record["findings"]]) for record in records]
    assert ("policy_failed", ["log-not-written"]) in found
