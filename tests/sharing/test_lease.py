"""The directory of leases, what may be planted there, and the end of a lease's process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.sharing.holders import AS_ROOT, NOBODY, TOTAL, Holder, hold, make_request, take
from tfenv.policy.model import Allocation, MemoryUse
from tfenv.sharing import lease as module
from tfenv.sharing.lease import LeaseError, list_lease_directories, lock_directories, read_leases
from tfenv.sharing.queue import Acquired, Unavailable, acquire, look
from tfenv.sharing.request import Candidate, GpuRequest


def list_names(machine: Path) -> set[str]:
    return set(os.listdir(machine))


def wait_for_no_lease(seconds: float = 10) -> bool:
    """Wait until all leases are gone, but end long before any child does. It may not have run since its fork."""
    until = time.monotonic() + seconds
    while read_leases():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def assert_nobody_keeps_the_lock() -> None:
    """Lock the directories, which must not take as long as the wait for somebody who keeps them locked."""
    began = time.monotonic()
    with lock_directories():
        assert time.monotonic() - began < 10


# ---- what others see


def test_a_lease_tells_who_holds_what(machine: Path) -> None:
    """User, pid, script and limit of every live process, by GPU."""
    with hold(make_request(2, need=8), script="/srv/train.py") as holder:
        first, second = read_leases()
        assert first.allocation == Allocation("a", 8)
        assert second.allocation == Allocation("b", 8)
        assert (first.pid, first.uid, first.script) == (holder.pid, os.geteuid(), "/srv/train.py")
        assert first.id == second.id
        assert first.user
        assert abs(time.time() - first.since) < 60
    assert read_leases() == ()


def test_reading_leases_needs_no_directory_and_makes_none(machine: Path) -> None:
    """On a machine where nobody chose yet there are none."""
    assert read_leases() == ()
    assert not machine.exists()


def test_reading_does_not_wait_for_a_choice(machine: Path) -> None:
    """`tfgpu ps` shows leases while somebody has the directory locked."""
    with hold(make_request()), lock_directories():
        assert len(read_leases()) == 1


# ---- the end of a process


@pytest.mark.parametrize("how", ["exit", "SIGKILL", "SIGTERM", "exec"])
def test_a_lease_ends_with_its_process(machine: Path, how: str) -> None:
    """It makes no difference how the process ends, even when it executes another program."""
    with hold(make_request()) as holder:
        assert take("a") is None
        holder.end(how)
        assert read_leases() == ()
        assert take("a") is not None
        if how == "exec":
            assert holder.is_running()


def test_files_of_dead_processes_are_cleaned_up_by_the_next(machine: Path) -> None:
    """The next process of that user that chooses removes every file that nobody has locked, temporary ones too."""
    with hold(make_request()) as holder:
        holder.end("SIGKILL")
    (machine / ".new-lease-1-x").write_text("{}")
    assert len(list_names(machine)) == 2
    with hold(make_request()):
        assert len(list_names(machine)) == 1


# ---- fork


def test_a_forked_child_neither_keeps_nor_frees_the_lease(machine: Path) -> None:
    """A child can end or outlive the parent. The lease is the parent's alone."""
    text = """
pid = os.fork()
if pid == 0:
    time.sleep(0.2)
    os._exit(0)
os.waitpid(pid, 0)
if os.fork() == 0:
    time.sleep(30)
    os._exit(0)
print("forked", flush=True)
"""
    with hold(make_request(), then=text) as holder:
        holder.read_line()
        assert len(read_leases()) == 1, "a child that ends does not free it"
        holder.end("SIGKILL")
        assert wait_for_no_lease(), "a child that lives on does not keep it"


def test_a_fork_while_another_thread_chooses_keeps_no_lock(machine: Path) -> None:
    """The directory's lock ends with the choice, and with the parent, however long the child lives."""
    with hold(make_request(1, gpus="d")), lock_directories():
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
    try:
        assert_nobody_keeps_the_lock()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_fork_before_a_parent_dies_in_its_choice_keeps_no_lock(machine: Path) -> None:
    """A parent that is killed while it has the directory locked takes the lock with it."""
    text = """
import os, signal, sys
from tfenv.sharing.lease import lock_directories
with lock_directories():
    if os.fork() == 0:
        os.setsid()
        print(os.getpid(), flush=True)
        signal.pause()
    signal.pause()
"""
    parent = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    try:
        assert_nobody_keeps_the_lock()
    finally:
        os.kill(child, signal.SIGKILL)


def read_links(pid: int) -> list[str]:
    """What a process has open."""
    links = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(path))
    return links


def test_a_fork_at_the_moment_of_opening_keeps_no_lease(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows the descriptor's number yet, and the child closes it all the same."""
    children: list[int] = []
    fstat = os.fstat

    def fork_first(descriptor: int) -> os.stat_result:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{machine}/.new-") and not children:
            children.append(os.fork())
            if children == [0]:
                signal.pause()
                os._exit(0)
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", fork_first)
    acquired = take("a")
    monkeypatch.undo()
    assert acquired is not None
    try:
        ours, until = True, time.monotonic() + 10
        while ours and time.monotonic() < until:  # the child closes it before anything else that it does
            ours = any(link.startswith(str(machine)) for link in read_links(children[0]))
        assert not ours
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


def test_a_child_that_is_spawned_does_not_keep_the_lease(machine: Path) -> None:
    """subprocess with close_fds=False hands no descriptor on: it is closed on exec."""
    text = 'subprocess.Popen(["sleep", "30"], close_fds=False); print("spawned", flush=True)'
    with hold(make_request(), then=text) as holder:
        holder.read_line()
        holder.end("SIGKILL")
        assert wait_for_no_lease()


def test_a_child_closes_no_file_of_the_programs(machine: Path) -> None:
    """A program that closed all descriptors and opened its own finds them open in its children."""
    text = """
os.closerange(3, 64)
mine = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
if os.fork() == 0:
    print(all(os.fstat(fd) for fd in mine), flush=True)
    os._exit(0)
"""
    with hold(make_request(), then=text) as holder:
        assert holder.read_line() == "True"


# ---- what is planted


@pytest.fixture
def planted(machine: Path) -> Path:
    """A directory as another user may have made it."""
    machine.mkdir()
    machine.chmod(0o1777)
    return machine


def test_planted_files_harm_nobody(planted: Path, tmp_path: Path) -> None:
    """Links, FIFOs, directories, huge and broken files: nothing is followed, waited for, or believed."""
    victim = tmp_path / "victim"
    victim.write_text("{}")
    (planted / "lease-1-a").symlink_to(victim)
    (planted / "lease-2-b").symlink_to("/nonexistent")
    os.mkfifo(planted / "lease-3-c")
    (planted / "lease-4-d").mkdir()
    (planted / "ticket-x-y").write_text("[" * 100_000)
    os.link(victim, planted / "lease-5-e")
    with (planted / "lease-6-f").open("wb") as sparse:
        sparse.truncate(1 << 40)
        fcntl.flock(sparse, fcntl.LOCK_EX)
        assert take("a") is not None
        assert {lease.pid for lease in read_leases()} == {os.getpid()}
    assert victim.read_text() == "{}"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        '{"pid": "x", "since": 0, "allocations": []}',
        '{"pid": 1, "since": 0, "allocations": [{"uuid": "a"}]}',
        '{"pid": 1, "since": 0, "allocations": 7}',
        '{"pid": 1, "since": 0, "allocations": [{"uuid": "a", "limit": "many", "shared": false}]}',
        '{"pid": 1e999, "since": 0, "allocations": []}',
        '{"pid": 1, "since": 1e400, "allocations": [{"uuid": "a", "limit": null, "shared": false}]}',
        '{"pid": 1, "since": NaN, "allocations": [{"uuid": "a", "limit": null, "shared": false}]}',
        '{"pid": 1, "since": 0, "allocations": [{"uuid": "a", "limit": 1e400, "shared": false}]}',
        f'{{"pid": 1, "since": 0, "allocations": [{{"uuid": "a", "limit": 1{400 * "0"}, "shared": false}}]}}',
        f'{{"pid": 1{30 * "0"}, "since": 0, "allocations": [{{"uuid": "a", "limit": null, "shared": false}}]}}',
        '{"pid": 1, "since": 0, "cgroups": 7, "allocations": [{"uuid": "a", "limit": null, "shared": false}]}',
        '{"pid": 1, "since": 0, "cgroups": ["x"], "allocations": [{"uuid": "a", "limit": null, "shared": false}]}',
        '{"pid": 1, "since": 0, "cgroups": [-1], "allocations": [{"uuid": "a", "limit": null, "shared": false}]}',
        '{"request": {"candidates": [{"uuid": "a"}], "count": 1, "fixed": false}}',
        '{"request": {"candidates": 7, "count": 1, "fixed": false}}',
        '{"request": 3}',
        "\udcff",
    ],
)
def test_what_is_in_a_file_is_not_believed(planted: Path, content: str) -> None:
    """Whatever a live process writes under a name of ours, choosing goes on."""
    kept = []
    for name in ("lease-1-a", "ticket-1-b", "ticket-99999999999999999999-c"):
        path = planted / name
        path.write_bytes(content.encode(errors="surrogateescape"))
        kept.append(path.open("rb"))
        fcntl.flock(kept[-1], fcntl.LOCK_EX)
    assert read_leases() == ()
    assert take("a") is not None
    for file in kept:
        file.close()


@AS_ROOT
def test_files_of_other_users_are_left_alone(planted: Path) -> None:
    """A dead lease of another user takes no memory and is not removed, nor is a file of another name."""
    for name in ("lease-1-a", "notes.txt"):
        (planted / name).write_text(
            '{"pid": 1, "since": 0, "allocations": [{"uuid": "a", "limit": null, "shared": false}]}'
        )
        os.chown(planted / name, NOBODY, NOBODY)
    assert take("a") is not None
    assert {"lease-1-a", "notes.txt"} <= list_names(planted)


# ---- the directory


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o1755, 0o700])
@AS_ROOT
def test_a_directory_that_is_not_shared_is_not_used(planted: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sticky bit others could remove a lease. A directory that is closed to others cannot be shared."""
    os.chown(planted, NOBODY, NOBODY)
    planted.chmod(mode)
    monkeypatch.setattr(module, "_CREATION_SECONDS", 0.1)
    with pytest.raises(LeaseError, match="directory for leases"):
        take("a")


def test_a_directory_of_ours_that_was_left_half_made_is_finished(planted: Path) -> None:
    """Its maker was killed before it opened it to the others."""
    planted.chmod(0o755)
    assert take("a") is not None
    assert planted.stat().st_mode & 0o7777 == 0o1777


def test_a_link_in_the_place_of_the_directory_is_not_followed(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written where it leads."""
    tmp_path.chmod(0o1777)
    machine.symlink_to(tmp_path)
    monkeypatch.setattr(module, "_CREATION_SECONDS", 0.1)
    with pytest.raises(LeaseError):
        take("a")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_removed_is_made_anew(machine: Path) -> None:
    """An administrator may clean up. The next process that asks makes it again."""
    with hold(make_request()) as holder:
        holder.end("SIGKILL")
    for path in machine.iterdir():
        path.unlink()
    machine.rmdir()
    assert take("a") is not None


def test_leases_of_two_directories_count_together(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One may come after the other is in use: leases of both count."""
    other = machine.with_name("other.leases")
    monkeypatch.setattr(module, "list_lease_directories", lambda: (str(other), str(machine)))
    machine.mkdir()
    machine.chmod(0o1777)
    held = take("a")
    assert held is not None
    assert held.id in list_names(machine), "what is there already is where everybody goes"
    other.mkdir()
    other.chmod(0o1777)
    assert take("a") is None
    second = take("b")
    assert second is not None
    assert second.id in list_names(other)
    assert {lease.allocation.uuid for lease in read_leases()} == {"a", "b"}


def test_the_machines_directories_are_literal(monkeypatch: pytest.MonkeyPatch) -> None:
    """$TMPDIR differs from user to user, and so would the directory."""
    monkeypatch.delenv("TFGPU_SIMULATE", raising=False)
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    assert list_lease_directories() == ("/run/lock/tfgpu", "/tmp/tfgpu")


def test_simulated_gpus_without_a_log_are_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their leases are where those of real GPUs are. With a log they are a machine of its own, with its own leases."""
    monkeypatch.setenv("TFGPU_SIMULATE", "count=4")
    monkeypatch.delenv("TFGPU_SIMULATE_LOG", raising=False)
    assert list_lease_directories() == ("/run/lock/tfgpu", "/tmp/tfgpu")
    monkeypatch.setenv("TFGPU_SIMULATE_LOG", "/srv/lab/requests.jsonl")
    assert list_lease_directories() == ("/srv/lab/requests.jsonl.leases",)


def test_a_directory_that_somebody_keeps_locked_is_given_up(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped with SIGSTOP while it chose must not stop all others."""
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.2)
    descriptor = os.open(planted, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(LeaseError, match="has been locked for"):
        take("a")
    os.close(descriptor)


def test_a_process_that_waits_for_the_directory_sleeps_as_it_is_told(planted: Path) -> None:
    """Whoever waits lets other threads fork, also while somebody else keeps the directory locked."""
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        os.close(descriptor)

    descriptor = os.open(planted, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    assert isinstance(acquire(make_request(1, gpus="a"), dict, sleep=sleep), Acquired)
    assert len(naps) == 1


def test_a_full_directory_is_a_lease_error(planted: Path) -> None:
    """No space, no inode, over quota: the error names it, and nothing half written is left."""
    program = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "from tests.sharing.holders import take\n"
        "try: take('a')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("LeaseError a lease cannot be written:"), done.stderr
    assert list_names(planted) == set()


def test_threads_of_one_process_do_not_take_each_others_gpus(machine: Path) -> None:
    """Locks are per open file: two threads exclude each other as two processes do."""
    taken: list[object] = []
    threads = [threading.Thread(target=lambda: taken.append(acquire(make_request(), dict))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(one, Acquired) for one in taken) == 4
    assert len({lease.allocation.uuid for lease in read_leases()}) == 4


# ---- a lease that is lost


@pytest.mark.parametrize("how", ["closed", "removed", "another file"])
def test_a_lost_lease_is_noticed(how: str, machine: Path) -> None:
    """The program closed its descriptor, or whoever owns the directory removed the file."""
    acquired = take("a")
    assert acquired is not None
    assert module.is_intact(acquired.id)
    descriptor = next(fd for fd, kept in module._locked.items() if kept.st_ino == (machine / acquired.id).stat().st_ino)
    if how == "removed":
        (machine / acquired.id).unlink()
    else:
        os.close(descriptor)
    if how == "another file":
        os.dup2(os.open("/dev/null", os.O_RDONLY), descriptor)
    assert not module.is_intact(acquired.id)
    module.release_entry(descriptor)
    if how == "another file":
        os.fstat(descriptor)  # whatever has the number now is the program's


@AS_ROOT
def test_who_keeps_the_lease_of_a_dead_process_locked_takes_nothing_from_its_user(machine: Path) -> None:
    """A stranger makes others wait for the GPU. It counts as the stranger's, and not for the user's total."""
    holder = Holder(make_request(1, 20, "a"))
    holder.wait_for_gpus()
    (lease,) = read_leases()
    assert lease.uid == os.geteuid()
    ready, opened = os.pipe()
    child = os.fork()
    if child == 0:
        os.setuid(NOBODY)
        descriptor = os.open(machine / lease.id, os.O_RDONLY)
        os.write(opened, b"-")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(opened, b"-")
        signal.pause()
        os._exit(0)
    try:
        os.read(ready, 1)
        holder.end("SIGKILL")
        os.read(ready, 1)
        assert [(lease.uid, lease.pid) for lease in read_leases()] == [(NOBODY, child)]
        mine = GpuRequest(os.geteuid(), (Candidate("a", TOTAL, 4, user_total=20),), 1)
        assert look(mine, dict) == (Allocation("a", 4),)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        holder.close()
        os.close(ready)
        os.close(opened)


# ---- containers


IN_A_CONTAINER = """
import os
from tfenv.sharing.lease import read_leases
print(os.getpid(), [lease.pid for lease in read_leases()], flush=True)
"""


@AS_ROOT
def test_a_holder_is_known_by_its_lock_and_not_by_the_number_it_wrote(machine: Path) -> None:
    """In a container the process has another pid. Each reader sees the holder's as its own kernel counts, or none."""
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c"]
    probe = subprocess.run([*unshare, "print(1)"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no PID namespace here: {probe.stderr.strip()}")
    program = (
        "import os, sys\nfrom tfenv.sharing.queue import acquire\n"
        "from tfenv.sharing.request import Candidate, GpuRequest\n"
        "acquire(GpuRequest(0, (Candidate('a', 24 << 30, 8 << 30),), 1), dict)\nprint(os.getpid(), flush=True)\n"
        "sys.stdin.readline()\n"
    )
    inside = subprocess.Popen(
        [*unshare, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert inside.stdin is not None
    assert inside.stdout is not None
    try:
        assert inside.stdout.readline().strip() == "1"
        (lease,) = read_leases()
        children = Path(f"/proc/{inside.pid}/task/{inside.pid}/children").read_text().split()
        assert lease.pid == int(children[0])
        other = subprocess.run([*unshare, IN_A_CONTAINER], capture_output=True, text=True, cwd=REPOSITORY, check=True)
        assert other.stdout == "1 [0]\n", "what has the number 1 there is not the holder"
        wanted = GpuRequest(0, (Candidate("a", 24 << 30, 16 << 30),), 1)
        memory = {"a": MemoryUse(8 << 30, {lease.pid: 8 << 30})}
        assert look(wanted, lambda: memory) == (Allocation("a", 16 << 30),), "what it uses counts once"
        memory = {"a": MemoryUse(8 << 30, {1: 8 << 30})}
        assert isinstance(look(wanted, lambda: memory), Unavailable), "what number 1 of the machine uses is not its own"
    finally:
        inside.communicate("\n", timeout=20)


ON_OVERLAY = """
mount -t tmpfs none {folder} && mkdir {folder}/lower {folder}/upper {folder}/work {folder}/merged &&
mount -t overlay overlay -o lowerdir=/mnt,upperdir={folder}/upper,workdir={folder}/work {folder}/merged &&
TFGPU_SIMULATE_LOG={folder}/merged/log exec {python} -c '
import os
from tfenv.sharing.lease import read_leases
from tfenv.sharing.queue import acquire
from tfenv.sharing.request import Candidate, GpuRequest
acquire(GpuRequest(0, (Candidate("a", 24, 8),), 1), dict)
files = os.listdir(os.environ["TFGPU_SIMULATE_LOG"] + ".leases")
assert len(files) == 1, files
print([lease.pid == os.getpid() for lease in read_leases()])
'
"""


@AS_ROOT
def test_a_holder_is_known_where_a_file_system_tells_another_device(machine: Path, tmp_path: Path) -> None:
    """On overlayfs, a container's own, stat and the kernel's list of locks name different devices."""
    script = ON_OVERLAY.format(folder=tmp_path, python=sys.executable)
    command = ["unshare", "-m", "sh", "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    if "mount:" in ended.stderr or "unshare:" in ended.stderr:
        pytest.skip(f"no overlay here: {ended.stderr.strip()}")
    assert ended.stdout == "[True]\n", ended.stderr
