"""Memory limits of cgroups in the simulated driver: real cgroups, and real processes of several users in them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cgroups import ROOT, needs_cgroups
from tests.cli.conftest import REPOSITORY, TFGPU
from tests.simulate.cgroup_lab import (
    ALICE,
    ALICE_UID,
    BOB,
    CGROUPS,
    DEEP,
    FIRST,
    GIB,
    NO_LIMIT,
    SECOND,
    WORKER,
    Lab,
    Workers,
    path_of,
)

pytestmark = needs_cgroups

OUT_OF_MEMORY, NOT_INITIALIZED = 2, 3
INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, FUNCTION_NOT_FOUND = 2, 3, 4, 6, 13


# ---- who keeps limits


def test_an_older_driver_keeps_none(lab: Lab) -> None:
    """Without the setting both functions are missing, as in older drivers, and no process says where it is."""
    env = lab.simulate("none")
    root = lab.start(env, ALICE)
    assert root.ask("r", "limit", path_of(ALICE), 0, GIB) == FUNCTION_NOT_FOUND
    assert root.ask("r", "limits", path_of(ALICE)) == [FUNCTION_NOT_FOUND]
    assert root.ask("r", "describe") == ["580.00.00", "13.580.00.00", 13000, "Function Not Found"]
    assert root.ask("r", "look", f"{path_of(ALICE)}/dmem.max") == [False, False, False, None]
    root.open()
    assert root.take(8 * GIB) == 0
    assert "cgroup" not in Path(env["TFGPU_SIMULATE_LOG"]).read_text()


@pytest.mark.parametrize("backend", ["dmem", "misc"])
def test_the_release_that_brought_limits(lab: Lab, backend: str) -> None:
    """With limits the driver's release is 615 and CUDA is 13.4, unless they are set."""
    env = lab.simulate(backend)
    assert lab.start(env).ask("r", "describe")[:3] == ["615.00.00", "13.615.00.00", 13040]
    env["TFGPU_SIMULATE"] += ",driver=13050,release=620.10"
    assert lab.start(env).ask("r", "describe")[:3] == ["620.10", "13.620.10", 13050]


@pytest.mark.parametrize("backend", ["dmem", "misc"])
def test_only_root_sets_limits(lab: Lab, backend: str) -> None:
    """Everybody can read limits. Another user than root has no permission to set them, not even of their own cgroup."""
    env = lab.simulate(backend)
    root, alice = lab.start(env), lab.start(env, FIRST, uid=ALICE_UID)
    assert alice.ask("a", "limit", path_of(FIRST), 0, GIB) == NO_PERMISSION
    assert root.ask("r", "limit", path_of(FIRST), 0, GIB) == 0
    assert alice.ask("a", "limits", path_of(FIRST)) == [0, 0, GIB, 0]


@pytest.mark.parametrize("backend", ["dmem", "misc"])
@pytest.mark.parametrize(
    ("path", "soft", "hard", "answer"),
    [
        (None, 0, 1, INVALID_ARGUMENT),
        ("user.slice", 0, 1, INVALID_ARGUMENT),
        ("/sys/fs/cgroupuser.slice", 0, 1, INVALID_ARGUMENT),
        ("/tmp", 0, 1, INVALID_ARGUMENT),
        (f"{ROOT}/absent.slice", 0, 1, NOT_FOUND),
        (f"{ROOT}/user.slice/cgroup.procs", 0, 1, NOT_FOUND),
        (f"{ROOT}/../../../tmp", 0, 1, NOT_FOUND),
        (ROOT, 0, 1, NOT_FOUND),
        (f"{ROOT}/user.slice", 2, 1, INVALID_ARGUMENT),
        (f"{ROOT}/user.slice/", 1, 1, 0),
        (f"{ROOT}/system.slice/../user.slice", 1, 1, 0),
    ],
)
def test_what_can_have_limits(lab: Lab, backend: str, path: str | None, soft: int, hard: int, answer: int) -> None:
    """A limit needs the path of a cgroup below the root, and the soft one is not above the hard one."""
    root = lab.start(lab.simulate(backend))
    assert root.ask("r", "limit", path, soft, hard) == answer
    if not answer:
        assert root.ask("r", "limits", path_of("user.slice")) == [0, soft, hard, 0]


@pytest.mark.parametrize("backend", ["dmem", "misc"])
def test_limits_need_a_log(lab: Lab, backend: str) -> None:
    """Processes share limits through the log. Without one they are not supported."""
    root = lab.start(lab.simulate(backend, log=False))
    assert root.ask("r", "limit", path_of(ALICE), 0, GIB) == NOT_SUPPORTED
    assert root.ask("r", "limits", path_of(ALICE)) == [NOT_SUPPORTED]


@pytest.mark.parametrize("backend", ["dmem", "misc"])
def test_mig_has_no_limits(lab: Lab, backend: str) -> None:
    """MIG instances and GPUs that are split have no limits, and tell their memory as it is. Another GPU has limits."""
    env = lab.simulate(backend, gpus="1x8GiB/mig=2x4GiB,1x8GiB")
    workers = lab.start(env, ALICE)
    for gpu, instance in ((0, None), (0, 1)):
        assert workers.ask("r", "limit", path_of(ALICE), 0, GIB, gpu, instance) == NOT_SUPPORTED
        assert workers.ask("r", "limits", path_of(ALICE), gpu, instance) == [NOT_SUPPORTED]
    assert workers.ask("r", "limit", path_of(ALICE), 0, GIB, 1) == 0
    assert workers.ask("r", "memory", 2, 0, 1)["total"] == 4 * GIB
    assert workers.ask("r", "memory", 2, 1)["total"] == GIB
    workers.open()
    assert workers.take(4 * GIB) == 0


def test_a_limit_is_for_one_gpu(lab: Lab) -> None:
    """What is taken of one GPU does not count on another."""
    workers = lab.start(lab.simulate("dmem", gpus="2x8GiB"), ALICE)
    assert workers.ask("r", "limit", path_of(ALICE), 0, GIB, 1) == 0
    workers.open()
    assert workers.take(2 * GIB) == 0
    assert workers.ask("r", "limits", path_of(ALICE), 0) == [0, 0, NO_LIMIT, 2 * GIB]
    assert workers.ask("r", "limits", path_of(ALICE), 1) == [0, 0, GIB, 0]
    assert workers.ask("other", "open", 1) == 0
    assert workers.take(GIB + 2, name="other") == OUT_OF_MEMORY


@pytest.mark.parametrize("backend", ["dmem", "misc"])
def test_the_option_of_simulate(lab: Lab, backend: str) -> None:
    """`tfgpu simulate --cgroup-limits` keeps limits, and its summary counts what was refused."""
    options = ("--gpus", "1x8GiB", "--cgroup-limits", backend, "--format", "json")
    command = (*TFGPU, "simulate", *options, "--", sys.executable, "-S", str(WORKER), "0")
    requests = [["r", "limit", path_of(ALICE), 0, GIB], ["r", "open"], ["r", "take", "cuMemAlloc", GIB + 2]]
    done = lab.machine.run(
        ("sh", "-c", f"printf '%s\\n' \"$REQUESTS\" | {shlex.join(command)}"), cgroup=ALICE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "REQUESTS": "\n".join(map(json.dumps, requests))},
    )  # fmt: skip
    assert done.stdout.split() == ["0", "0", str(OUT_OF_MEMORY)], done.stderr
    summary = json.loads(done.stderr.splitlines()[-1])["gpus"][0]
    assert (summary["allocations"], summary["out_of_memory"], summary["peak"]) == (1, 1, 0)


# ---- the kernel's backend


def test_dmem_keeps_the_limits_of_all_cgroups_above(lab: Lab) -> None:
    """An allocation must fit below each limit on the way up, and all processes below a cgroup count."""
    env = lab.simulate("dmem")
    root, first, second, bob = (lab.start(env, cgroup) for cgroup in ("", DEEP, SECOND, BOB))
    for cgroup, hard in ((ALICE, 3 * GIB), (FIRST, 2 * GIB), (DEEP, 5 * GIB)):
        assert root.ask("r", "limit", path_of(cgroup), 0, hard) == 0
    for workers in (first, second, bob):
        workers.open()
    assert first.take(2 * GIB + 2) == OUT_OF_MEMORY
    assert first.take(2 * GIB) == 0
    assert second.take(GIB + 2) == OUT_OF_MEMORY
    assert second.take(GIB) == 0
    assert second.take(2) == OUT_OF_MEMORY
    assert bob.take(5 * GIB) == 0
    used = {cgroup: root.ask("r", "limits", path_of(cgroup)) for cgroup in CGROUPS}
    assert used == {
        "user.slice": [0, 0, NO_LIMIT, 8 * GIB],
        ALICE: [0, 0, 3 * GIB, 3 * GIB],
        FIRST: [0, 0, 2 * GIB, 2 * GIB],
        DEEP: [0, 0, 5 * GIB, 2 * GIB],
        SECOND: [0, 0, NO_LIMIT, GIB],
        BOB: [0, 0, NO_LIMIT, 5 * GIB],
        "system.slice": [0, 0, NO_LIMIT, 0],
    }


def test_dmem_down_to_a_depth(lab: Lab) -> None:
    """A deeper cgroup has no files and no limit of its own. It is told that of the nearest above, which holds."""
    env = lab.simulate("dmem/2")
    root, alice = lab.start(env), lab.start(env, FIRST, uid=ALICE_UID)
    assert root.ask("r", "limit", path_of(FIRST), 0, GIB) == NOT_FOUND
    assert root.ask("r", "limit", path_of(ALICE), 0, GIB) == 0
    assert root.ask("r", "limits", path_of(DEEP)) == [0, 0, GIB, 0]
    assert [root.ask("r", "look", f"{path_of(cgroup)}/dmem.max")[0] for cgroup in ("user.slice", ALICE, FIRST)] == [
        True, True, False,
    ]  # fmt: skip
    alice.open()
    assert alice.take(GIB + 2) == OUT_OF_MEMORY
    assert alice.take(GIB) == 0


def test_the_kernels_files(lab: Lab) -> None:
    """All cgroups but the root have dmem.max, and dmem.capacity names the GPUs. Root can write, and others read."""
    env = lab.simulate("dmem", gpus="1x8GiB,1x1GiB")
    root, alice = lab.start(env), lab.start(env, FIRST, uid=ALICE_UID)
    capacity = f"nvidia/0000:01:00.0/vidmem {8 << 30}\nnvidia/0000:02:00.0/vidmem {1 << 30}\n"
    assert root.ask("r", "look", f"{ROOT}/dmem.capacity") == [True, True, True, capacity]
    assert alice.ask("a", "look", f"{ROOT}/dmem.capacity") == [True, True, False, capacity]
    assert alice.ask("a", "look", f"{path_of(FIRST)}/dmem.max")[:3] == [True, True, False]
    for path in (f"{ROOT}/dmem.max", f"{ROOT}/absent.slice/dmem.max", f"{path_of(ALICE)}/dmem.min"):
        assert root.ask("r", "look", path) == [False, False, False, None]


def test_the_driver_itself_needs_no_files(lab: Lab) -> None:
    """With "misc" the kernel has no files for GPU memory."""
    root = lab.start(lab.simulate("misc"))
    for path in (f"{ROOT}/dmem.capacity", f"{path_of(ALICE)}/dmem.max"):
        assert root.ask("r", "look", path) == [False, False, False, None]


@pytest.mark.skipif(Path(ROOT, "cgroup.controllers").exists(), reason="cgroup v2 is at /sys/fs/cgroup here")
def test_without_cgroup_v2_nothing_holds(lab: Lab) -> None:
    """Where cgroup v2 is mounted elsewhere there are no files, a limit finds no cgroup, and programs run as before."""
    env = lab.simulate("dmem") | {"LC_ALL": "C"}
    command = [sys.executable, "-S", str(WORKER), "0"]
    with subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        workers = Workers(process)
        assert workers.ask("r", "look", f"{ROOT}/dmem.capacity") == [False, False, False, None]
        assert workers.ask("r", "limit", f"{ROOT}/memory", 0, 1) == NOT_FOUND
        workers.open()
        assert workers.take(8 * GIB) == 0
        workers.close()


# ---- what is reserved


def test_what_is_reserved_must_fit(lab: Lab) -> None:
    """A soft limit counts in all cgroups above. It fits below their hard limits and on the GPU, or it is refused."""
    root = lab.start(lab.simulate("dmem", reserved=GIB))
    assert root.ask("r", "limit", path_of(ALICE), 0, 4 * GIB) == 0
    assert root.ask("r", "limit", path_of(FIRST), 3 * GIB, 3 * GIB) == 0
    assert root.ask("r", "limits", path_of(ALICE)) == [0, 3 * GIB, 4 * GIB, 0]
    assert root.ask("r", "limit", path_of(SECOND), 2 * GIB, 2 * GIB) == INVALID_ARGUMENT
    assert root.ask("r", "limits", path_of(SECOND)) == [0, 0, NO_LIMIT, 0]
    assert root.ask("r", "limit", path_of(BOB), 4 * GIB + 1, NO_LIMIT) == INVALID_ARGUMENT
    assert root.ask("r", "limit", path_of(BOB), 4 * GIB, NO_LIMIT) == 0


def test_cgroups_above_keep_what_was_reserved_for_one_that_is_gone(lab: Lab) -> None:
    """Setting soft to 0 before a cgroup is removed leaves nothing. Otherwise those above keep the reservation."""
    root = lab.start(lab.simulate("dmem"))
    for clear_first, left in ((True, 0), (False, 2 * GIB)):
        job = lab.machine.make(f"{ALICE}/job")
        assert root.ask("r", "limit", job, 2 * GIB, 2 * GIB) == 0
        if clear_first:
            assert root.ask("r", "limit", job, 0, NO_LIMIT) == 0
        lab.machine.remove(f"{ALICE}/job")
        for cgroup in (ALICE, "user.slice"):
            assert root.ask("r", "limits", path_of(cgroup)) == [0, left, NO_LIMIT, 0]


# ---- the driver's own backend


def test_misc_keeps_the_nearest_limit_alone(lab: Lab) -> None:
    """The nearest limit counts and is told. One above bounds only what is in no limited cgroup below it."""
    env = lab.simulate("misc")
    root, deep, second = (lab.start(env, cgroup) for cgroup in ("", DEEP, SECOND))
    assert root.ask("r", "limits", path_of(DEEP)) == [NOT_SUPPORTED]
    assert root.ask("r", "limit", path_of(ALICE), 0, GIB) == 0
    assert root.ask("r", "limits", path_of(DEEP)) == [0, 0, GIB, 0]
    deep.open()
    second.open()
    assert deep.take(GIB + 2) == OUT_OF_MEMORY
    assert root.ask("r", "limit", path_of(FIRST), 0, 3 * GIB) == 0
    assert deep.take(3 * GIB) == 0
    assert deep.take(2) == OUT_OF_MEMORY
    assert second.take(GIB) == 0
    assert second.take(2) == OUT_OF_MEMORY
    assert root.ask("r", "limits", path_of(ALICE)) == [0, 0, GIB, GIB]
    assert root.ask("r", "limits", path_of(DEEP)) == [0, 0, 3 * GIB, 3 * GIB]
    for cgroup in (ALICE, FIRST):
        assert root.ask("r", "limit", path_of(cgroup), 0, NO_LIMIT) == 0
    assert root.ask("r", "limits", path_of(DEEP)) == [NOT_SUPPORTED]


# ---- what is counted, and what is told


@pytest.mark.parametrize("backend", ["dmem", "misc"])
@pytest.mark.parametrize("kind", ["cuMemAlloc", "cuMemCreate", "cuMemAllocAsync", "cuMemAllocFromPoolAsync"])
def test_each_way_to_allocate_is_bounded(lab: Lab, backend: str, kind: str) -> None:
    """What does not fit is out of memory, and what is freed can be taken again."""
    env = lab.simulate(backend)
    root, alice = lab.start(env), lab.start(env, ALICE, uid=ALICE_UID)
    assert root.ask("r", "limit", path_of(ALICE), 0, GIB) == 0
    alice.open()
    assert alice.take(GIB + 2, kind) == OUT_OF_MEMORY
    assert alice.take(GIB, kind) == 0
    assert alice.take(2, kind) == OUT_OF_MEMORY
    assert root.ask("r", "limits", path_of(ALICE)) == [0, 0, GIB, GIB]
    assert alice.ask("worker", "free", 0) == 0
    assert root.ask("r", "limits", path_of(ALICE)) == [0, 0, GIB, 0]
    assert alice.take(GIB, kind) == 0


@pytest.mark.parametrize("backend", ["dmem", "misc"])
def test_managed_memory_is_not_counted(lab: Lab, backend: str) -> None:
    """It is neither refused nor part of what is used, before and after it is freed."""
    env = lab.simulate(backend)
    root, alice = lab.start(env), lab.start(env, ALICE)
    assert root.ask("r", "limit", path_of(ALICE), 0, GIB) == 0
    alice.open()
    assert alice.take(2 * GIB, "cuMemAllocManaged") == 0
    assert alice.take(GIB) == 0
    assert root.ask("r", "limits", path_of(ALICE)) == [0, 0, GIB, GIB]
    assert alice.ask("worker", "free", 0) == 0
    assert root.ask("r", "limits", path_of(ALICE)) == [0, 0, GIB, GIB]


@pytest.mark.parametrize("backend", ["dmem", "misc"])
def test_a_context_is_counted(lab: Lab, backend: str) -> None:
    """Each process takes its context below the limit. One that does not fit opens no GPU."""
    env = lab.simulate(backend, context=500)
    root, alice = lab.start(env), lab.start(env, ALICE, uid=ALICE_UID)
    assert root.ask("r", "limit", path_of(ALICE), 0, GIB) == 0
    assert [alice.ask(name, "open") for name in ("one", "two", "three")] == [0, 0, OUT_OF_MEMORY]
    assert alice.take(24, name="one") == 0
    assert alice.take(2, name="two") == OUT_OF_MEMORY
    assert alice.ask("one", "exit") == 0
    assert root.ask("r", "limits", path_of(ALICE)) == [0, 0, GIB, 500]


@pytest.mark.parametrize("backend", ["dmem", "misc"])
def test_a_process_is_told_the_limit_of_its_own_cgroup(lab: Lab, backend: str) -> None:
    """Then it is the total of cuMemGetInfo and of NVML's second version. All else tells of the whole card."""
    env = lab.simulate(backend, reserved=512)
    root, alice, bob = lab.start(env), lab.start(env, ALICE), lab.start(env, BOB)
    assert root.ask("r", "limit", path_of(ALICE), 0, 2 * GIB) == 0
    alice.open()
    bob.open()
    assert alice.take(GIB) == 0
    usable = 8 * GIB - 512
    assert alice.ask("worker", "info") == [GIB, 2 * GIB, usable]
    assert alice.ask("worker", "memory", 2) == {"total": 2 * GIB, "free": GIB, "used": 512}
    assert bob.ask("worker", "info") == [usable - GIB, usable, usable]
    assert bob.ask("worker", "memory", 2) == {"total": 8 * GIB, "free": usable - GIB, "used": GIB}
    card = {"total": 8 * GIB, "free": usable - GIB, "used": GIB + 512}
    assert alice.ask("worker", "memory", 1) == bob.ask("worker", "memory", 1) == card
    assert bob.take(usable - GIB - 100) == 0  # the card has less left than the limit
    assert alice.ask("worker", "info") == [100, 2 * GIB, usable]
    assert alice.ask("worker", "memory", 2) == {"total": 2 * GIB, "free": 100, "used": 2 * GIB - 100 - 512}


@pytest.mark.parametrize("backend", ["dmem", "misc"])
def test_a_limit_above_holds_and_is_not_told(lab: Lab, backend: str) -> None:
    """A process in a cgroup without a limit of its own is told of the whole card."""
    env = lab.simulate(backend)
    root, alice = lab.start(env), lab.start(env, FIRST)
    assert root.ask("r", "limit", path_of(ALICE), 0, 2 * GIB) == 0
    alice.open()
    assert alice.ask("worker", "info") == [8 * GIB, 8 * GIB, 8 * GIB]
    assert alice.ask("worker", "memory", 2) == {"total": 8 * GIB, "free": 8 * GIB, "used": 0}
    assert alice.take(2 * GIB + 2) == OUT_OF_MEMORY


# ---- which cgroup it is


@pytest.mark.parametrize("backend", ["dmem", "misc"])
def test_a_process_counts_where_it_opened_cuda(lab: Lab, backend: str) -> None:
    """A process that forks or moves before it opens CUDA counts where it went. Later it stays where it is counted."""
    env = lab.simulate(backend)
    root = lab.start(env)
    assert root.ask("r", "limit", path_of(ALICE), 0, GIB) == 0
    assert root.ask("one", "move", path_of(FIRST)) == 0
    assert root.ask("one", "open") == root.ask("two", "open") == 0
    assert root.ask("one", "move", path_of(BOB)) == root.ask("two", "move", path_of(FIRST)) == 0
    assert root.take(GIB + 2, name="one") == OUT_OF_MEMORY
    assert root.take(GIB + 2, name="two") == 0
    assert root.ask("two", "fork") == NOT_INITIALIZED


#: Opens CUDA, takes as many MiB as it is told, goes to another cgroup, and is replaced by the same program once more.
MOVE_AND_EXEC = """
import ctypes, os, sys
cuda, context, pointer = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_ulonglong()
assert not cuda.cuInit(0) and not cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
assert not cuda.cuCtxSetCurrent(context)
program, mib, *others = sys.argv[1:]
print(cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(int(mib) << 20)), flush=True)
if others:
    open(others.pop(0), "w").write(str(os.getpid()))
    os.execv(sys.executable, [sys.executable, "-S", "-c", program, program, *others])
sys.stdin.read()
"""


def test_a_program_that_replaces_another_is_counted_anew(lab: Lab) -> None:
    """After exec the same process holds nothing of before, and counts in the cgroup where it is then."""
    env = lab.simulate("dmem")
    root = lab.start(env)
    for cgroup, hard in ((ALICE, GIB), (BOB, 2 * GIB)):
        assert root.ask("r", "limit", path_of(cgroup), 0, hard) == 0
    command = [sys.executable, "-S", "-c", MOVE_AND_EXEC, MOVE_AND_EXEC]
    command += [str(GIB), f"{path_of(BOB)}/cgroup.procs", str(2 * GIB)]
    with lab.machine.start(command, cgroup=FIRST, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["0\n", "0\n"]
        assert root.ask("r", "limits", path_of(ALICE)) == [0, 0, GIB, 0]
        assert root.ask("r", "limits", path_of(BOB)) == [0, 0, 2 * GIB, 2 * GIB]
        process.communicate()


@pytest.mark.parametrize("backend", ["dmem", "misc"])
def test_a_cgroup_that_is_removed_takes_its_limit_along(lab: Lab, backend: str) -> None:
    """A new one of the same name has none, and a process that was in it is bounded no more."""
    root = lab.start(lab.simulate(backend))
    job = lab.machine.make("system.slice/job")
    assert root.ask("r", "limit", job, 0, GIB) == 0
    assert root.ask("one", "move", job) == root.ask("one", "open") == 0
    assert root.take(GIB + 2, name="one") == OUT_OF_MEMORY
    assert root.ask("one", "move", path_of("system.slice")) == 0
    lab.machine.remove("system.slice/job")
    assert root.ask("r", "limits", job) == [NOT_FOUND]
    lab.machine.make("system.slice/job")
    assert root.ask("r", "limits", job) == ([0, 0, NO_LIMIT, 0] if backend == "dmem" else [NOT_SUPPORTED])
    assert root.take(GIB + 2, name="one") == 0
    lab.machine.remove("system.slice/job")


@pytest.mark.parametrize("backend", ["dmem", "misc"])
def test_a_limit_holds_in_a_container(lab: Lab, backend: str) -> None:
    """A cgroup is known by its number in the kernel, under whatever name a container sees it."""
    env = lab.simulate(backend)
    mounts = 'umount /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec "$@"'
    enter = ("unshare", "--cgroup", "--mount", "--propagation", "private", "sh", "-c", mounts, "sh")
    root, inside = lab.start(env), lab.start(env, ALICE, enter=enter)
    assert root.ask("r", "limit", path_of(ALICE), 0, GIB) == 0
    inside.open()
    assert inside.take(GIB + 2) == OUT_OF_MEMORY
    assert inside.take(GIB) == 0
    assert inside.ask("worker", "limits", ROOT) == root.ask("r", "limits", path_of(ALICE)) == [0, 0, GIB, GIB]


def test_an_emptied_log_forgets_limits(lab: Lab) -> None:
    """Whoever empties the log begins anew, also for processes that have read it."""
    env = lab.simulate("dmem")
    root = lab.start(env)
    assert root.ask("r", "limit", path_of(ALICE), 0, GIB) == 0
    assert root.ask("r", "limits", path_of(ALICE)) == [0, 0, GIB, 0]
    Path(env["TFGPU_SIMULATE_LOG"]).write_text("")
    assert root.ask("r", "limits", path_of(ALICE)) == [0, 0, NO_LIMIT, 0]
