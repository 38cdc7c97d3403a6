"""The administrator's ceilings, on the literal /etc/tfgpu, for real users, whatever files and variables say.

The same under real TensorFlow is in tests/frameworks/test_shared_machine.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from tests.shared_machine import ALICE, BOB, NOBODY_KNOWS, ROOT, SharedMachine, User, shared_machine

__all__ = ["shared_machine"]

pytestmark = pytest.mark.timeout(300)

#: Plans for a process that starts here, on a machine with four GPUs of 40 GiB.
PROBE = """
import json, os, sys
from tests.machine import INVENTORY
from tfenv import pipeline
from tfenv.launchers.grant import read_grant
start = pipeline.current_start()
loaded = pipeline.load(start)
grant, _ = read_grant(dict(os.environ), os.environ, "")
request = json.load(sys.stdin)
decision = pipeline.decide(loaded, grant, INVENTORY, request)
plan, audit = decision.plan, loaded.policy.audit
json.dump({
    "user": loaded.subject.user,
    "visible": plan.visible,
    "limits": [device.limit.on(40 << 30) >> 20 if device.limit else None for device in plan.devices or ()],
    "growth": plan.growth,
    "allocator": plan.allocator,
    "on_error": loaded.policy.on_error,
    "disabled": pipeline.check_disable_switch(loaded)[0],
    "logs": audit.files,
    "layers": [source.layer for source in loaded.sources],
    "findings": [[f.code, f.asked_by, f.held_by] for f in (*loaded.findings, *plan.findings)],
}, sys.stdout)
"""

ETC = "/etc/tfgpu/tfgpu.toml"
GIB = 1024  # in MiB


def plan_for(
    machine: SharedMachine,
    user: User,
    cwd: str = "/srv/vision",
    variables: Mapping[str, str] | None = None,
    request: list[str] | None = None,
) -> dict[str, Any]:
    """Return what holds for this user's process that starts there, and which requests were cut."""
    done = machine.python(user, PROBE, cwd=machine.folder(cwd, ALICE), text=json.dumps(request), **variables or {})
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def list_codes(plan: Mapping[str, Any]) -> list[str]:
    return [code for code, _, _ in plan["findings"]]


# ---- whom a ceiling is for

FOR_WHOM = {
    "everybody": ({"tfgpu.toml": "[ceiling]\nmax_devices = 1\n"}, {"alice", "bob", "uid:4711"}),
    "a group": ({"tfgpu.toml": "[group.students.ceiling]\nmax_devices = 1\n"}, {"alice"}),
    "a group's file": ({"groups/students.toml": "[ceiling]\nmax_devices = 1\n"}, {"alice"}),
    "a user": ({"tfgpu.toml": "[user.bob.ceiling]\nmax_devices = 1\n"}, {"bob"}),
    "a user's file": ({"users/bob.toml": "[ceiling]\nmax_devices = 1\n"}, {"bob"}),
    "a uid without an entry": ({"tfgpu.toml": '[user."uid:4711".ceiling]\nmax_devices = 1\n'}, {"uid:4711"}),
    "its file": ({"users/uid:4711.toml": "[ceiling]\nmax_devices = 1\n"}, {"uid:4711"}),
    "an exception": (
        {"tfgpu.toml": "[ceiling]\nmax_devices = 1\n", "users/bob.toml": "[ceiling]\nmax_devices = 4\n"},
        {"alice", "uid:4711"},
    ),
    "a project": ({"tfgpu.toml": '[project."/srv/vision".ceiling]\nmax_devices = 1\n'}, {"alice", "bob", "uid:4711"}),
    "another project": ({"tfgpu.toml": '[project."/srv/visio".ceiling]\nmax_devices = 1\n'}, set()),
}


@pytest.mark.parametrize(("files", "held"), FOR_WHOM.values(), ids=FOR_WHOM)
def test_a_ceiling_is_for_whom_it_speaks_of(
    files: dict[str, str], held: set[str], shared_machine: SharedMachine
) -> None:
    """Everybody, a group (a supplementary one, too), a user, a uid without an entry, a project by whole components."""
    shared_machine.policy(files)
    plans = [plan_for(shared_machine, user) for user in (ALICE, BOB, NOBODY_KNOWS)]
    assert {plan["user"] for plan in plans if plan["visible"] == "0"} == held
    assert {plan["visible"] for plan in plans if plan["user"] not in held} <= {None, "0,1,2,3"}


@pytest.mark.parametrize("forged", ["USER", "LOGNAME", "HOME", "XDG_CONFIG_HOME"])
def test_who_one_is_cannot_be_forged(forged: str, shared_machine: SharedMachine) -> None:
    """The ceilings are those of the uid, whatever the environment says of name and home."""
    shared_machine.policy({"users/alice.toml": "[ceiling]\nmax_devices = 1\n"})
    plan = plan_for(
        shared_machine, ALICE, variables={forged: "/home/bob" if forged in ("HOME", "XDG_CONFIG_HOME") else "bob"}
    )
    assert (plan["user"], plan["visible"]) == ("alice", "0")


# ---- who cannot pass it

CEILINGS = """
on_error = "fail"
[ceiling]
allowed_devices = [1, 2, 3]
max_devices = 2
memory_limit = "25%"
require_memory_growth = true
require_grant = true
[machine]
allow_disable = false
[audit]
file = "/var/log/tfgpu/<uid>.jsonl"
"""

#: As much as a file can ask for.
GREED = """
on_error = "warn"
[gpu]
visible_devices = "all"
memory_limit = "none"
memory_growth = false
allocator = "cuda_malloc_async"
[ceiling]
allowed_devices = [0, 1, 2, 3]
max_devices = 4
memory_limit = "100%"
require_memory_growth = false
require_grant = false
[user.alice.ceiling]
max_devices = 4
memory_limit = "100%"
[machine]
allow_disable = true
allow_project_files = true
trusted_owners = ["bob"]
[audit]
file = "none"
stderr = "none"
"""


def write_greedy(machine: SharedMachine, where: str) -> dict[str, str]:
    """Write the greedy file in its place. Return the variables that point to it."""
    for path in ("/home/alice/.config/tfgpu/tfgpu.toml", "/srv/vision/tfgpu.toml"):
        machine.folder("/srv/vision", ALICE)
        machine.path(path).unlink(missing_ok=True)
    if where == "user":
        machine.write("/home/alice/.config/tfgpu/tfgpu.toml", GREED, ALICE)
    if where == "project":
        machine.write("/srv/vision/tfgpu.toml", GREED, ALICE)
    if where in ("TFGPU_CONFIG", "TFGPU_SITE_CONFIG"):
        return {where: machine.write("/home/alice/greedy.toml", GREED, ALICE)}
    if where == "TFGPU_RUN":
        return {"TFGPU_RUN": '[gpu]\nvisible_devices = "all"\nmemory_limit = "none"\nmemory_growth = false\n'}
    return {"TFGPU_DISABLE": "1"} if where == "TFGPU_DISABLE" else {}


@pytest.mark.parametrize(
    "where", ["user", "project", "TFGPU_CONFIG", "TFGPU_SITE_CONFIG", "TFGPU_RUN", "TFGPU_DISABLE"]
)
def test_no_file_and_no_variable_passes_the_machines_ceilings(where: str, shared_machine: SharedMachine) -> None:
    """Devices, their number, memory, growth, allocator, on_error, the log and the switch stay the administrator's."""
    shared_machine.policy({"tfgpu.toml": CEILINGS})
    plan = plan_for(shared_machine, ALICE, variables=write_greedy(shared_machine, where))
    assert plan["visible"] == "1,2"
    assert plan["limits"] == [10 * GIB, 10 * GIB]
    assert (plan["growth"], plan["allocator"]) == (True, "bfc")
    assert plan["on_error"] == "fail"
    assert not plan["disabled"]
    assert "/var/log/tfgpu/<uid>.jsonl" in plan["logs"]


@pytest.mark.parametrize("where", ["user", "project", "TFGPU_CONFIG", "TFGPU_SITE_CONFIG"])
def test_each_attempt_says_who_asked_and_which_ceiling_held(where: str, shared_machine: SharedMachine) -> None:
    """Of limit, growth, allocator, count and list: the file and key that asked, and the administrator's key."""
    shared_machine.policy({"tfgpu.toml": CEILINGS})
    variables = write_greedy(shared_machine, where)
    path = {
        "user": "/home/alice/.config/tfgpu/tfgpu.toml",
        "project": "/srv/vision/tfgpu.toml",
        "TFGPU_CONFIG": variables.get("TFGPU_CONFIG"),
        "TFGPU_SITE_CONFIG": variables.get("TFGPU_SITE_CONFIG"),
    }[where]
    cut = [
        (asked, held) for code, asked, held in plan_for(shared_machine, ALICE, variables=variables)["findings"] if held
    ]
    assert {
        (f"{path} (gpu.memory_limit)", f"{ETC} (ceiling.memory_limit)"),
        (f"{path} (gpu.memory_growth)", f"{ETC} (ceiling.require_memory_growth)"),
        (f"{path} (gpu.allocator)", f"{ETC} (ceiling.memory_limit)"),
        (f"{path} (gpu.visible_devices)", f"{ETC} (ceiling.max_devices)"),
        (f"{path} (ceiling.allowed_devices)", f"{ETC} (ceiling.allowed_devices)"),
    } == set(cut)


def test_what_only_the_administrator_may_say_is_refused_elsewhere(shared_machine: SharedMachine) -> None:
    """`[machine]` in a site's, a user's or a project's file is a finding and has no effect."""
    shared_machine.policy({})
    for where in ("user", "project", "TFGPU_CONFIG", "TFGPU_SITE_CONFIG"):
        plan = plan_for(shared_machine, ALICE, variables=write_greedy(shared_machine, where))
        assert "machine-layer-only" in list_codes(plan)
    shared_machine.policy({"tfgpu.toml": "[machine]\nallow_project_files = false\n"})
    assert plan_for(shared_machine, ALICE, variables=write_greedy(shared_machine, "project"))["layers"] == ["machine"]


# ---- what the program asks for

WISHES = {
    "3": ("3", []),
    "0,1": ("1", ["clamped"]),
    "1,2,3": ("1,2", ["clamped"]),
    "0": ("1,2", ["no-overlap", "clamped"]),
    "-1": ("-1", []),
    "": ("-1", []),
    "GPU-00000003": ("3", []),
    "GPU-00000000": ("1,2", ["no-overlap", "clamped"]),
}


@pytest.mark.parametrize(("wish", "visible", "said"), [(wish, *held) for wish, held in WISHES.items()])
def test_the_programs_own_list_is_cut_to_the_ceilings(
    wish: str, visible: str, said: list[str], shared_machine: SharedMachine
) -> None:
    """What leaves nothing keeps the allowed list and says so. An explicit none is honoured."""
    shared_machine.policy({"tfgpu.toml": "[ceiling]\nallowed_devices = [1, 2, 3]\nmax_devices = 2\n"})
    write_greedy(shared_machine, "nowhere")
    plan = plan_for(shared_machine, ALICE, request=wish.split(",") if wish else [])
    assert (plan["visible"], list_codes(plan)) == (visible, said)
    assert all(asked == "the program" for code, asked, _ in plan["findings"])
    for code, _, held in plan["findings"]:
        cut_to_count = code == "clamped" and wish != "0,1"
        assert held == f"{ETC} (ceiling.{'max_devices' if cut_to_count else 'allowed_devices'})"


# ---- the grant

JOB = {"SLURM_JOB_ID": "17"}
#: As Slurm 22.05 sets them.
JOBS = {
    "no job": ({}, "0,1,2,3"),
    "a Slurm job without gres": (JOB, "-1"),
    "one whose script names a GPU": (JOB | {"CUDA_VISIBLE_DEVICES": "2"}, "-1"),
    "one that a step of another job submitted": (JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_GPUS": "0,1"}, "-1"),
    "a step without gres": (JOB | {"SLURM_STEP_ID": "1", "SLURM_JOB_GPUS": "0,1,2"}, "-1"),
    "a batch job": (
        JOB | {"SLURM_JOB_GPUS": "2", "SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "2"},
        "2",
    ),
    "one that a step of another job submitted with gres": (
        JOB | {"SLURM_JOB_GPUS": "2", "SLURM_STEP_GPUS": "0,1", "SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "2"},
        "2",
    ),
    "one whose script names all GPUs": (
        JOB | {"SLURM_JOB_GPUS": "2", "SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
        "2",
    ),
    "a step": (JOB | {"SLURM_STEP_GPUS": "1,2", "SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "1,2"}, "1,2"),
    "a task with a GPU of its own": (
        JOB
        | {"SLURM_STEP_GPUS": "1", "SLURM_GPUS_ON_NODE": "2", "SLURMD_TRES_BIND": "gpu:per_task:1"}
        | {"CUDA_VISIBLE_DEVICES": "1"},
        "1",
    ),
    "a job of another scheduler with none": ({"PBS_JOBID": "7", "CUDA_VISIBLE_DEVICES": ""}, "-1"),
    "a Ray worker without GPUs": ({"RAY_JOB_ID": "01000000"}, "-1"),
    "a Ray worker": ({"RAY_JOB_ID": "01000000", "CUDA_VISIBLE_DEVICES": "3"}, "3"),
}


@pytest.mark.parametrize(("variables", "visible"), JOBS.values(), ids=JOBS)
def test_inside_a_job_no_grant_means_no_gpu(
    variables: dict[str, str], visible: str, shared_machine: SharedMachine
) -> None:
    """`require_grant`: what a script writes into CUDA_VISIBLE_DEVICES is no grant where Slurm lists what it gives."""
    shared_machine.policy({"tfgpu.toml": "[ceiling]\nrequire_grant = true\n"})
    write_greedy(shared_machine, "project")
    plan = plan_for(shared_machine, ALICE, variables=variables)
    assert plan["visible"] == visible
    assert ("no-grant" in list_codes(plan)) == (visible == "-1" and variables.get("CUDA_VISIBLE_DEVICES") != "")


# ---- processes that are not quite their user's own


def test_under_sudo_the_machine_layer_alone_counts(shared_machine: SharedMachine) -> None:
    """Root by sudo does not run by the file of whose folder it is in. Plain root, as in a container, is a user."""
    shared_machine.policy({"tfgpu.toml": "[ceiling]\nmax_devices = 2\n"})
    write_greedy(shared_machine, "project")
    shared_machine.path("/srv/vision").chmod(0o755)
    assert plan_for(shared_machine, ROOT, variables={"SUDO_UID": "5001"})["layers"] == ["machine"]
    assert plan_for(shared_machine, ROOT)["layers"] == ["machine", "project"]
    assert plan_for(shared_machine, ALICE, variables={"SUDO_UID": "5001"})["layers"] == ["machine"]


def test_a_process_with_another_effective_uid_knows_the_machine_layer_alone(shared_machine: SharedMachine) -> None:
    """uid 5001 under euid 5002, as a setuid program has it: bob's ceilings, and no file of anybody's but root's."""
    shared_machine.policy({"users/bob.toml": "[ceiling]\nmax_devices = 1\n"})
    write_greedy(shared_machine, "project")
    program = f"import os; os.setgroups([]); os.setresuid(5001, 5002, 0)\n{PROBE}"
    done = shared_machine.python(ROOT, program, cwd="/srv/vision", text="null")
    plan = json.loads(done.stdout)
    assert (plan["user"], plan["visible"], plan["layers"]) == ("bob", "0", ["machine"])
