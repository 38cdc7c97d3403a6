"""What `tfgpu explain`, `doctor`, `gpus` and `ps` say of limits that the driver keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import pytest

from tests.shared_machine import ALICE, BOB, ROOT, SharedMachine, User
from tests.wall.conftest import CONTEXT, GIB, SESSIONS, WallMachine, open_wall_machine
from tests.wall.test_frameworks import PROGRAMS, frameworks
from tfenv.policy.units import MIB

LOG = '[audit]\nfile = "/var/log/tfgpu/<uid>.jsonl"\n'
POLICY = f'{LOG}[ceiling]\nmemory_total = "8GiB"\nmemory_limit = "2GiB"\n'
SLICE = f"/sys/fs/cgroup/user.slice/user-{ALICE.uid}.slice"
UUID = "GPU-a0fa4e00-0000-4000-8000-000000000000"
#: Takes so many MiB of the first GPU, without any framework or policy.
HOLD = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
context, memory = ctypes.c_void_p(), ctypes.c_void_p()
cuda.cuInit(0)
cuda.cuCtxCreate_v2(ctypes.byref(context), 0, 0)
assert cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(int(sys.argv[1]) << 20)) == 0
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def hold(machine: WallMachine, user: User, size: int) -> Iterator[subprocess.Popen[str]]:
    """Have a program of a user hold so many MiB of the first GPU."""
    command = [sys.executable, "-S", "-c", HOLD, str(size)]
    with machine.start(user, *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.fixture
def limited(machine: WallMachine) -> WallMachine:
    """Give alice a wall of 8 GiB on each GPU, and nobody else."""
    machine.shared.policy({"tfgpu.toml": POLICY})
    done = machine.tfgpu("wall", "apply", "--user", "alice")
    assert done.returncode == 0, done.stderr
    return machine


@pytest.fixture
def limited_by_kernel(shared_machine: SharedMachine) -> Iterator[WallMachine]:
    """The same on one backend, for what takes long and has nothing to do with who counts."""
    with open_wall_machine(shared_machine, "dmem") as machine:
        machine.shared.policy({"tfgpu.toml": POLICY})
        done = machine.tfgpu("wall", "apply", "--user", "alice")
        assert done.returncode == 0, done.stderr
        yield machine


def read_doctor_row(machine: WallMachine, user: User = ALICE) -> dict[str, Any]:
    """Return the row "wall" of a user's doctor."""
    done = machine.tfgpu("doctor", "--no-frameworks", "--format", "json", user=user)
    rows = [row for row in json.loads(done.stdout)["rows"] if row["topic"] == "wall"]
    assert len(rows) == 1, done.stdout
    return dict(rows[0])


# ---- explain


def test_explain_names_walls_and_rails(limited: WallMachine) -> None:
    """Each limit of a GPU is one or the other. The wall comes with its cgroup and with what is used of it."""
    with hold(limited, ALICE, 1024):
        lines = limited.tfgpu("explain", user=ALICE).stdout.splitlines()
        plan = limited.read_json("explain", user=ALICE)["plan"]
    start = lines.index("Limits")
    assert [" ".join(line.split()) for line in lines[start + 1 :]] == [
        "GPU 0 rail 2.0 GiB for each process",
        f"wall 8.0 GiB for all programs in {SLICE} together, 1.5 GiB of it used",
        "GPU 1 rail 2.0 GiB for each process",
        f"wall 8.0 GiB for all programs in {SLICE} together, nothing of it used",
        "A rail is kept by the framework's own allocator, a wall by the driver, whatever program it is.",
    ]
    wall = {"limit_bytes": 8 * GIB, "used_bytes": 1024 * MIB + CONTEXT, "cgroup": SLICE}
    assert (plan["devices"][0]["limit_bytes"], plan["devices"][0]["wall"]) == (2 * GIB, wall)


def test_explain_for_somebody_else_has_their_wall(limited: WallMachine) -> None:
    """Root, who is in no limited cgroup, sees alice's wall, and none for bob."""
    asked = {name: limited.read_json("explain", "--user", name) for name in ("alice", "bob")}
    walls = {name: [device["wall"] for device in found["plan"]["devices"]] for name, found in asked.items()}
    assert [wall["cgroup"] for wall in walls["alice"]] == [SLICE, SLICE]
    assert walls["bob"] == [None, None]


def test_explain_says_why_there_is_no_wall(limited: WallMachine, shared_machine: SharedMachine) -> None:
    """The machine has a memory_total that no wall keeps: it says what root can do. Without one nothing is said."""
    text = limited.tfgpu("explain", user=BOB).stdout
    kept = "  memory_total is kept by leases and allocators only: "
    assert text.count(f"{kept}the driver could keep it, but no cgroup here has a limit; root can run `tfgpu wall") == 1
    assert kept not in limited.tfgpu("explain", user=ALICE).stdout
    shared_machine.policy({"tfgpu.toml": '[ceiling]\nmemory_limit = "2GiB"\n'})
    assert kept not in limited.tfgpu("explain", user=BOB).stdout


def test_explain_on_an_older_driver(shared_machine: SharedMachine) -> None:
    """It names the driver's release, and each limit is a rail."""
    with open_wall_machine(shared_machine, "none") as machine:
        shared_machine.policy({"tfgpu.toml": POLICY})
        text = machine.tfgpu("explain", user=ALICE).stdout
        found = machine.read_json("explain", user=ALICE)
    why = "driver 580.00.00 does not keep limits for cgroups; they came with release 615"
    assert text.endswith(f"memory_total is kept by leases and allocators only: {why}\n")
    assert "  GPU 0, 1  rail  2.0 GiB for each process\n" in text
    assert "wall  " not in text
    assert found["wall_problem"] == why


def test_explain_where_only_the_driver_limits(limited: WallMachine) -> None:
    """Without any file programs run unchanged, and the wall is shown all the same. With one they have a rail."""
    limited.shared.clear()
    text = limited.tfgpu("explain", user=ALICE).stdout
    assert "No GPU settings apply: programs run unchanged." in text
    assert f"  GPU 0, 1  wall  8.0 GiB for all programs in {SLICE} together" in text
    limited.shared.policy({"tfgpu.toml": LOG})
    text = limited.tfgpu("explain", user=ALICE).stdout
    assert "No GPU settings apply: each process is kept below its wall." in text
    assert "  GPU 0, 1  rail  7.4 GiB for each process\n            wall  8.0 GiB for all programs" in text


# ---- doctor


def test_doctor_has_a_row_on_the_wall(limited: WallMachine) -> None:
    """It names the backend and the limits of this process's cgroup, or says that none holds."""
    mine, bobs = read_doctor_row(limited), read_doctor_row(limited, BOB)
    assert mine["verdict"] == "ok"
    assert mine["found"].startswith("the driver keeps limits for cgroups, and the ")
    assert f"; GPU 0, 1: 8.0 GiB for all programs in {SLICE} together" in mine["found"]
    assert (bobs["verdict"], bobs["found"].endswith("; none holds for this process")) == ("ok", True)


@pytest.mark.parametrize(
    ("backend", "instances", "found"),
    [
        ("none", (), "driver 580.00.00 does not keep limits for cgroups; they came with release 615"),
        (
            "misc",
            (8 * GIB,),
            "the driver keeps limits for cgroups, and the driver itself counts (misc), but not for MIG",
        ),
    ],
)
def test_doctor_says_why_there_can_be_no_wall(
    shared_machine: SharedMachine, backend: str, instances: tuple[int, ...], found: str
) -> None:
    """An older driver and MIG are notes, and no problem."""
    with open_wall_machine(shared_machine, backend, gpus=1, instances=instances) as machine:
        row = read_doctor_row(machine)
    assert (row["verdict"], row["found"].startswith(found)) == ("note", True), row


def test_doctor_without_cgroup_v2(shared_machine: SharedMachine) -> None:
    """Where it is not mounted, that is the reason."""
    with open_wall_machine(shared_machine, "dmem") as machine:
        done = shared_machine.tfgpu("doctor", "--no-frameworks", env=machine.environment)
    assert "cgroup v2 is not mounted on /sys/fs/cgroup, where the driver needs it" in done.stdout


# ---- gpus and ps


def test_gpus_shows_what_is_used_below_the_wall(limited: WallMachine) -> None:
    """The user sees the cgroup's memory against its limit, and the card's total below. Root sees the card."""
    with hold(limited, ALICE, 1024), hold(limited, BOB, 3072):
        text = limited.tfgpu("gpus", user=ALICE).stdout
        mine, roots = limited.read_json("gpus", user=ALICE), limited.read_json("gpus", user=ROOT)
    assert "1.5 / 8.0 GiB of 24.0 GiB" in text
    assert f"GPU 0  wall: 8.0 GiB for all programs in {SLICE} together, 1.5 GiB of it used\n" in text
    assert "GPU 0  5.0 GiB of the card's 24.0 GiB used\n" in text
    for gpu, wall in ((mine["gpus"][0], 8 * GIB), (roots["gpus"][0], None)):
        assert (gpu["total_bytes"], gpu["used_bytes"]) == (24 * GIB, 4096 * MIB + 2 * CONTEXT)
        assert (gpu["wall"] and gpu["wall"]["limit_bytes"]) == wall


def test_gpus_in_a_cgroup_with_a_limit_of_its_own(machine: WallMachine) -> None:
    """There NVML reports the limit as the card's memory. The card's own total is shown all the same."""
    machine.shared.policy({"tfgpu.toml": LOG})
    machine.tfgpu("wall", "apply", "--cgroup", SESSIONS[ALICE.uid], "--limit", "4GiB")
    with hold(machine, BOB, 3072):
        gpu = machine.read_json("gpus", user=ALICE)["gpus"][0]
    assert (gpu["total_bytes"], gpu["used_bytes"]) == (24 * GIB, 3072 * MIB + CONTEXT)
    assert gpu["wall"] == {"limit_bytes": 4 * GIB, "used_bytes": 0, "cgroup": f"/sys/fs/cgroup/{SESSIONS[ALICE.uid]}"}


def record_limit(machine: WallMachine, user: User, pid: int, limit: int) -> None:
    """Write an audit record of a process with this limit on the first GPU."""
    record = {
        "timestamp": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "event": "policy_applied",
        "host": os.uname().nodename,
        "uid": user.uid,
        "pid": pid,
        "script": "/srv/train.py",
        "devices": [{"index": 0, "uuid": UUID, "limit_bytes": limit, "limit_fraction": None}],
        "sources": [{"layer": "machine", "path": "/etc/tfgpu/tfgpu.toml"}],
    }
    machine.shared.write(f"/var/log/tfgpu/{user.uid}.jsonl", json.dumps(record) + "\n", owner=user)


def test_ps_shows_the_wall_beside_the_rail(limited: WallMachine) -> None:
    """A process beyond its rail and within the wall is shown so. One in no limited cgroup has no wall."""
    with hold(limited, ALICE, 4096) as mine, hold(limited, BOB, 4096) as bobs:
        record_limit(limited, ALICE, mine.pid, 2 * GIB)
        record_limit(limited, BOB, bobs.pid, 2 * GIB)
        text = limited.tfgpu("ps").stdout
        found = {row["pid"]: row for row in limited.read_json("ps")["processes"]}
    assert {pid: (row["state"], row["wall"] and row["wall"]["limit_bytes"]) for pid, row in found.items()} == {
        mine.pid: ("over", 8 * GIB),
        bobs.pid: ("over", None),
    }
    lines = {line.split()[2]: " ".join(line.split()) for line in text.splitlines() if line.startswith("0 ")}
    assert "4.5 GiB 2.0 GiB 8.0 GiB /srv/train.py /etc/tfgpu/tfgpu.toml (over, within the wall)" in lines[str(mine.pid)]
    assert "4.5 GiB 2.0 GiB /srv/train.py /etc/tfgpu/tfgpu.toml (over)" in lines[str(bobs.pid)]
    kept = f"all programs in {SLICE} together hold 4.5 GiB, within the 8.0 GiB that the driver lets them have"
    assert f"pid {mine.pid}  holds 4.5 GiB of GPU 0, its policy allows 2.0 GiB; {kept}\n" in text


def test_ps_without_walls_has_no_column_for_them(shared_machine: SharedMachine) -> None:
    """On an older driver the table is as before."""
    with open_wall_machine(shared_machine, "none") as machine, hold(machine, ALICE, 1024):
        head = machine.tfgpu("ps").stdout.splitlines()[0]
    assert "at most" in head
    assert "wall" not in head


# ---- with real frameworks


def read_outcomes(machine: WallMachine, user: User) -> list[dict[str, Any]]:
    """Return the devices in the records of what was applied to a user's programs."""
    lines = machine.shared.path(f"/var/log/tfgpu/{user.uid}.jsonl").read_text().splitlines()
    applied = [record for record in map(json.loads, lines) if record["event"] in ("policy_applied", "policy_clamped")]
    return [device for record in applied for device in record["devices"]]


@frameworks
def test_a_record_has_rail_and_wall(limited_by_kernel: WallMachine, framework: str) -> None:
    """The record of a program in a limited cgroup says what the framework may take, and what its cgroup may."""
    done = limited_by_kernel.run(ALICE, sys.executable, "-c", f"{PROGRAMS[framework]}\ntake()")
    assert done.returncode == 0, done.stderr
    devices = read_outcomes(limited_by_kernel, ALICE)
    assert devices
    assert {(device["limit_bytes"], device["wall_bytes"]) for device in devices} == {(2 * GIB, 8 * GIB)}
    limited_by_kernel.run(BOB, sys.executable, "-c", f"{PROGRAMS[framework]}\ntake()")
    assert {device.get("wall_bytes") for device in read_outcomes(limited_by_kernel, BOB)} == {None}


@pytest.mark.exhaustive
@frameworks
def test_verify_below_a_wall(limited_by_kernel: WallMachine, framework: str) -> None:
    """The framework's own allocator refuses at the rail, also at the lower one that other programs leave."""
    command = ("verify", "--framework", framework, "--format", "json")
    with hold(limited_by_kernel, ALICE, 6144):
        done = limited_by_kernel.tfgpu(*command, user=ALICE)
    gpu = json.loads(done.stdout)["frameworks"][0]["gpus"][0]
    assert (done.returncode, gpu["refused_by"], gpu["verdict"]) == (0, "allocator", "kept"), gpu
    left = 8 * GIB - 6144 * MIB - CONTEXT - 600 * MIB
    assert gpu["limit_bytes"] == left
    assert left - 64 * MIB < gpu["allocated_bytes"] <= left
    assert gpu["wall_free_bytes"] < 200 * MIB
