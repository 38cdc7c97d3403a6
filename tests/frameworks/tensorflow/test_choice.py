"""`{count = …}` and memory_total under real TensorFlow: settled at the first listing, by the driver's account."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonschema import Draft7Validator

from tests.conftest import REPOSITORY
from tests.frameworks.harness import Case, Report, World, run_program
from tests.sharing.holders import Holder
from tfenv.sharing.request import Candidate, GpuRequest

Reports = Callable[[Case], Report]

GIB = 1 << 30
TOTAL = 24 * GIB
UUIDS = [f"GPU-a{number}fa4e00-0000-4000-8000-00000000000{number}" for number in range(4)]
#: Of other users, without a lease: 20000 MiB of GPU 0 and 1000 of GPU 1.
STRANGERS = ("TFGPU_SIMULATE_PROCESSES", str(Path(__file__).with_name("strangers.txt")))
PAIR = World(
    '[gpu]\nvisible_devices = {count = 2}\nmemory_growth = true\nmemory_limit = "1000MiB"\n', inherited=(STRANGERS,)
)


def held(uid: int, folder: Path, monkeypatch: pytest.MonkeyPatch, **limits: int | None) -> Holder:
    """A process that holds GPUs of the machine `run_program` makes in the folder: g0=None is all of GPU 0."""
    monkeypatch.setenv("TFGPU_SIMULATE", "count=4")
    monkeypatch.setenv("TFGPU_SIMULATE_LOG", str(folder / "requests"))
    candidates = tuple(Candidate(UUIDS[int(name[1:])], TOTAL, limit) for name, limit in limits.items())
    holder = Holder(GpuRequest(uid, candidates, len(candidates)), script="/srv/other.py")
    holder.wait_for_gpus()
    return holder


@pytest.mark.parametrize(
    ("case", "first"),
    [
        pytest.param(Case(PAIR, ("mirrored",)), 2, marks=pytest.mark.exhaustive),
        (Case(PAIR, ("list_local_devices",)), [1000, 1000]),
        (Case(PAIR, ("session",)), None),
    ],
    ids=str,
)
@pytest.mark.matrix
def test_free_gpus_are_chosen_whatever_lists_them(case: Case, first: object, reports: Reports) -> None:
    """MirroredStrategy and count = 2 get the two GPUs that nobody uses, both, at whatever entry point."""
    report = reports(case)
    assert report.error is None, report.stderr
    assert report.visible == {2}
    if first is not None:
        assert report.results[0] == first
    assert set(report.gpus) <= {2, 3}
    assert first != 2 or set(report.gpus) == {2, 3}


@pytest.mark.parametrize("case", [Case(PAIR, ("nothing",))], ids=str)
def test_importing_takes_no_gpu(case: Case, reports: Reports) -> None:
    """A linter that imports Keras holds no card: nothing is chosen before devices are listed."""
    report = reports(case)
    assert not report.cuda_opened
    assert [record for record in report.records if "choice" in record] == []


@pytest.mark.parametrize("case", [Case(PAIR, ("forked_pool",))], ids=str)
def test_children_of_a_preloading_server_choose_for_themselves(case: Case, reports: Reports) -> None:
    """A parent that has listed nothing forks two: each takes a lease of its own, for what it needs."""
    report = reports(case)
    assert report.error is None, report.stderr
    leases = [record["choice"]["lease"] for record in report.records if "choice" in record]
    assert len(set(leases)) == len(leases) == 2


@pytest.mark.parametrize("case", [Case(PAIR, ("set_environment:CUDA_VISIBLE_DEVICES=3,2,1", "mirrored"))], ids=str)
def test_the_programs_own_list_narrows_the_candidates(case: Case, reports: Reports) -> None:
    """CUDA_VISIBLE_DEVICES set by the program leaves those GPUs to choose from, in its order."""
    report = reports(case)
    assert report.results[-1] == 2
    assert set(report.gpus) == {2, 3}


@pytest.mark.parametrize("case", [Case(PAIR, ("mirrored",))], ids=str)
def test_the_record_says_what_was_chosen(case: Case, reports: Reports) -> None:
    """By UUID, with the lease and the time waited, as the schema of records has it."""
    report = reports(case)
    record = report.passed("TFE_ContextOptionsSetConfig")
    schema = json.loads((REPOSITORY / "schemas" / "audit.schema.json").read_text())
    Draft7Validator(schema).validate(record)
    choice = record["choice"]
    assert [allocation["uuid"] for allocation in choice["allocations"]] == UUIDS[2:]
    assert choice["waited_ms"] >= 0
    assert choice["lease"].startswith("lease-")


WAIT = """
import os, subprocess, sys
import tensorflow as tf
print(os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if sys.argv[1:] == ["child"]:
    print("child", len(tf.config.list_physical_devices("GPU")), os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    sys.exit()
print("parent", len(tf.config.list_physical_devices("GPU")), os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
subprocess.run([sys.executable, __file__, "child"], check=True)
"""


def test_a_program_waits_and_its_child_shares_its_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_tensorflow: None
) -> None:
    """Every GPU is held: the program waits and says so, gets the first that is given back; its child does not wait."""

    holder = held(0, tmp_path, monkeypatch, g0=None, g1=None, g2=None, g3=None)

    def give_back() -> None:
        while not list((tmp_path / "requests.leases").glob("ticket-*")):  # it waits in the queue
            time.sleep(0.05)
        time.sleep(2)
        holder.close()

    giver = threading.Thread(target=give_back)
    giver.start()
    ended = run_program(World("[gpu]\nvisible_devices = {count = 1}\n"), WAIT, tmp_path)
    giver.join()
    assert ended.status == 0, ended.stderr
    assert ended.stdout.splitlines() == ["None", "parent 1 0", "0", "child 1 0"]
    assert ended.ours[0].startswith("tfgpu: waiting for a free GPU (0:0")
    assert f"pid {holder.pid} other.py) all of it" in ended.ours[0]


TOTAL_POLICY = '[gpu]\nvisible_devices = [1]\n[ceiling]\nmemory_total = "5GiB"\n'
TAKE = """
import tensorflow as tf
print(len(tf.config.list_physical_devices("GPU")))
tf.zeros([8])
"""


def test_memory_total_leaves_what_the_users_others_have_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_tensorflow: None
) -> None:
    """5 GiB for all of a user's processes, 4 of them held by another: TensorFlow asks the driver for 1."""

    holder = held(os.geteuid(), tmp_path, monkeypatch, g1=4 * GIB)
    try:
        ended = run_program(World(TOTAL_POLICY), TAKE, tmp_path)
    finally:
        holder.close()
    assert ended.stdout == "1\n", ended.stderr
    taken = [request.bytes for request in ended.requests if request.op == "alloc"]
    assert taken
    assert sum(taken) <= GIB
    clamps = [f for record in ended.records for f in record["findings"] if f["code"] == "clamped"]
    assert any("ceiling.memory_total" in finding.get("held_by", "") for finding in clamps)


NESTED = """
import subprocess, sys
import tensorflow as tf
print(len(tf.config.list_physical_devices("GPU")), flush=True)
if sys.argv[1:] != ["child"]:
    tf.zeros([8])
    subprocess.run([sys.executable, __file__, "child"], check=True)
"""


@pytest.mark.parametrize(
    ("limit", "printed"),
    [
        pytest.param("", ["4", "0"], id="all", marks=pytest.mark.exhaustive),
        pytest.param('[gpu]\nmemory_limit = "2GiB"\n', ["4", "4"], id="part"),
    ],
)
def test_a_child_knows_its_parents_leases_where_nothing_is_said_of_visibility(
    limit: str, printed: list[str], tmp_path: Path, needs_tensorflow: None
) -> None:
    """memory_total alone: a child never waits for what its own parent holds. It shares, or goes without a GPU."""
    ended = run_program(World(f'{limit}[ceiling]\nmemory_total = "5GiB"\n'), NESTED, tmp_path)
    assert ended.status == 0, ended.stderr
    assert ended.stdout.splitlines() == printed, ended.stderr


FAULTY_CHOICE = """
import os
import tensorflow as tf
from tfenv.sharing import allocate
allocate.acquire = None
print(len(tf.config.list_physical_devices("GPU")), os.environ.get("CUDA_VISIBLE_DEVICES"))
tf.zeros([1])
"""


@pytest.mark.parametrize(("on_error", "shown"), [("warn", "1 0"), ("cpu", "0 -1")])
def test_a_fault_while_choosing_gives_no_more_than_was_asked_for(on_error: str, shown: str, tmp_path: Path) -> None:
    """The first GPU that is allowed, or none as `on_error` says: never all, and never without a line and a record."""
    policy = f'on_error = "{on_error}"\n[gpu]\nvisible_devices = {{count = 1}}\nmemory_limit = "1GiB"\n'
    ended = run_program(World(policy), FAULTY_CHOICE, tmp_path)
    assert ended.status == 0, ended.stderr
    assert ended.stdout.strip() == shown
    assert {request.gpu for request in ended.requests if request.op == "alloc"} <= {0}
    assert any("TypeError" in line for line in ended.ours)
    failed = [record for record in ended.records if record["event"] == "policy_failed"]
    assert failed[0]["findings"][0]["code"] == "internal-error"


DAEMON = """
import os
import tensorflow as tf
tf.zeros([1])
from tfenv.sharing.lease import read_leases
os.closerange(3, 256)  # as python-daemon and launchers do
print(len(read_leases()), flush=True)
tf.compat.v1.Session()
print([lease.pid == os.getpid() for lease in read_leases()], flush=True)
"""


def test_a_program_that_closes_all_descriptors_gets_its_lease_again(tmp_path: Path, needs_tensorflow: None) -> None:
    """At its next entry point the lease is taken again, and the record says so."""
    ended = run_program(World('[gpu]\nvisible_devices = {count = 1}\nmemory_limit = "4GiB"\n'), DAEMON, tmp_path)
    assert ended.status == 0, ended.stderr
    assert ended.stdout.split("\n")[:2] == ["0", "[True]"]
    assert "lease-renewed" in {finding["code"] for record in ended.records for finding in record["findings"]}


LOST = """
import os, subprocess, sys
import tensorflow as tf
tf.zeros([1])
from tfenv.sharing.lease import read_leases
(lease,) = read_leases()
os.closerange(3, 256)
take = "import sys; from tfenv.sharing.queue import acquire; from tfenv.sharing.request import Candidate, GpuRequest;"
take += f"acquire(GpuRequest(0, (Candidate('{lease.allocation.uuid}', 24 << 30, 20 << 30),), 1), dict);"
command = [sys.executable, "-c", take + "print(flush=True); sys.stdin.read()"]
other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
other.stdout.readline()
try:
    session = tf.compat.v1.Session()
    print(sum(device.device_type == "GPU" for device in session.list_devices()), flush=True)
except Exception as error:
    print(type(error).__name__, flush=True)
other.kill()
"""


@pytest.mark.parametrize(
    ("on_error", "printed"),
    [pytest.param("warn", "1", marks=pytest.mark.exhaustive), ("cpu", "0"), ("fail", "PolicyError")],
)
def test_on_error_decides_where_others_took_the_gpu(
    on_error: str, printed: str, tmp_path: Path, needs_tensorflow: None
) -> None:
    """A lease that was lost, and cannot be had again without sharing the GPU beyond its memory, is an error."""
    policy = f'on_error = "{on_error}"\n[gpu]\nvisible_devices = {{count = 1}}\nmemory_limit = "10GiB"\n'
    ended = run_program(World(policy), LOST, tmp_path)
    assert ended.stdout.strip() == printed, ended.stderr
    failed = [record for record in ended.records if record["event"] == "policy_failed"]
    assert [finding["code"] for finding in failed[0]["findings"]] == ["lease-lost"]
    assert any("Other processes took the GPU meanwhile" in line for line in ended.ours)


FORK = """
import os, signal, sys, threading, time
import tensorflow as tf
threading.Thread(target=lambda: tf.zeros([1]), daemon=True).start()
while not any(name.startswith("ticket-") for name in os.listdir(sys.argv[0] + "/../requests.leases")):
    time.sleep(0.05)
signal.alarm(30)
child = os.fork()
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
print("forked", flush=True)
os._exit(0)
"""


def test_a_thread_that_waits_for_a_gpu_keeps_nobody_from_forking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_tensorflow: None
) -> None:
    """Another thread's fork, as of a data loader, does not wait with it."""
    holder = held(0, tmp_path, monkeypatch, g0=None, g1=None, g2=None, g3=None)
    text = FORK.replace('sys.argv[0] + "/../requests.leases"', repr(str(tmp_path / "requests.leases")))
    ended = run_program(World("[gpu]\nvisible_devices = {count = 1}\n"), text, tmp_path)
    holder.close()
    assert (ended.status, ended.stdout) == (0, "forked\n"), ended.stderr
