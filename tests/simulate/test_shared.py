"""A simulated machine that several users share: who can join it, and who is kept from changing it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.cli.conftest import REPOSITORY, TFGPU
from tests.shared_machine import ALICE, BOB, ROOT, SharedMachine, User, shared_machine
from tfenv.simulate.environment import parse_gpus
from tfenv.simulate.shared import SharedMachineError, create_machine, open_machine
from tfenv.values import replace

__all__ = ["shared_machine"]

MIB = 1 << 20
#: Takes 100 MiB of GPU 0.
TAKE = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
context, pointer = ctypes.c_void_p(), ctypes.c_ulonglong()
assert cuda.cuInit(0) == 0
assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
assert cuda.cuCtxSetCurrent(context) == 0
assert cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(100 << 20)) == 0
"""


def simulate(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})}
    command = [*TFGPU, "simulate", *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a machine with a GPU of 2 GiB and one of 1 GiB."""
    create_machine(tmp_path / "lab", parse_gpus("1x2GiB,1x1GiB"))
    return tmp_path / "lab"


def get_mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_whoever_joins_gets_the_same_gpus(tmp_path: Path) -> None:
    """The machine that is opened has the GPUs it was made with, their instances, and who keeps limits for cgroups."""
    changes = {"context": 500 * MIB, "cgroup_limits": "dmem/2"}
    gpus = [replace(gpu, **changes) for gpu in parse_gpus("1x2GiB:NVIDIA A10,1x1GiB/mig=2x512MiB")]
    create_machine(tmp_path / "lab", gpus)
    assert open_machine(tmp_path / "lab").gpus == tuple(gpus)


def test_a_machine_from_before_limits_for_cgroups(folder: Path) -> None:
    """A machine that an older version made can be joined. Nobody keeps limits on it."""
    described = json.loads((folder / "machine.json").read_text())
    for gpu in described:
        del gpu["cgroup_limits"]
    (folder / "machine.json").write_text(json.dumps(described))
    assert [gpu.cgroup_limits for gpu in open_machine(folder).gpus] == ["none", "none"]
    assert simulate("--shared", str(folder), "--", sys.executable, "-c", TAKE).returncode == 0


def test_all_users_can_write_requests_and_leases_and_nothing_else(tmp_path: Path) -> None:
    """The modes are right under root's umask 077, too."""
    before = os.umask(0o077)
    try:
        create_machine(tmp_path / "lab", parse_gpus("1x1GiB"))
    finally:
        os.umask(before)
    folder = tmp_path / "lab"
    modes = {entry.name: get_mode(entry) for entry in folder.iterdir()}
    assert (modes.pop("requests.jsonl"), modes.pop("requests.jsonl.leases")) == (0o666, 0o1777)
    assert modes == {"lib": 0o755, "machine.json": 0o644, "processes": 0o644}
    assert get_mode(folder) == 0o755
    assert {get_mode(entry) for entry in (folder / "lib").iterdir()} == {0o644}
    assert list(tmp_path.iterdir()) == [folder]


def test_users_of_a_machine_see_the_memory_of_each_other(folder: Path) -> None:
    """A program that holds memory is seen by another command on the machine, and its summary counts both."""
    program = f"{TAKE}\nprint('ready', flush=True); input()"
    command = [*TFGPU, "simulate", "--shared", str(folder), "--format", "json", "--", sys.executable, "-c", program]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=env, stdin=-1, stdout=-1, stderr=-1, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "ready\n"
        second = simulate("--shared", str(folder), "--format", "json", "--", sys.executable, "-c", TAKE)
        _, summary = first.communicate("\n", timeout=60)
    assert [json.loads(text)["gpus"][0]["peak"] for text in (summary, second.stderr)] == [200 * MIB] * 2
    assert len(json.loads(summary)["processes_with_cuda"]) == 2
    third = simulate("--shared", str(folder), "--format", "json", "--", "true")
    assert json.loads(third.stderr)["processes_with_cuda"] == []


def test_memory_of_other_programs_is_on_the_machine(folder: Path) -> None:
    """What its owner writes into `processes` is taken for everybody. `--processes` replaces it."""
    (folder / "processes").write_text("0 4242 2000\n")
    command = ("--", sys.executable, "-c", TAKE)
    assert simulate("--shared", str(folder), *command).returncode == 1
    assert simulate("--shared", str(folder), "--processes", "/dev/null", *command).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "2x1GiB"), "has its GPUs already; leave out --gpus, --reserved, --context and --cgroup-limits"),
        (("--context", "5MiB"), "has its GPUs already; leave out --gpus, --reserved, --context and --cgroup-limits"),
        (
            ("--cgroup-limits", "dmem"),
            "has its GPUs already; leave out --gpus, --reserved, --context and --cgroup-limits",
        ),
        (("--log", "/tmp/log"), "--log: not allowed with argument --shared"),
    ],
)
def test_options_that_do_not_fit_a_machine(arguments: tuple[str, ...], message: str, folder: Path) -> None:
    """A machine keeps its GPUs and its log. Another request is wrong usage, and the message says what to leave out."""
    done = simulate("--shared", str(folder), *arguments, "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_a_machine_that_is_not_there(tmp_path: Path) -> None:
    """A folder that was mistyped makes no machine. The message shows how to make one."""
    done = simulate("--shared", str(tmp_path / "lba"), "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"make one with --gpus, as root: sudo tfgpu simulate --shared {tmp_path}/lba --gpus 4x24GiB" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [(), ("--gpus", "1x1GiB")])
def test_a_folder_with_something_else(options: tuple[str, ...], tmp_path: Path) -> None:
    """It stays as it is."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").touch()
    done = simulate("--shared", str(tmp_path / "thesis"), *options, "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not a shared machine; name a folder that does not exist" in done.stderr
    assert os.listdir(tmp_path / "thesis") == ["chapter1"]


@pytest.mark.parametrize("text", ["", "[{}]", '[{"memory": 1, "instances": []}]', '[{"speed": 1, "instances": []}]'])
def test_a_machine_of_another_version(text: str, folder: Path) -> None:
    """A description that cannot be read is said, with what to do."""
    (folder / "machine.json").write_text(text)
    with pytest.raises(SharedMachineError, match=f"remove {folder} and make it again"):
        open_machine(folder)


def test_nothing_is_left_of_a_machine_without_libraries(tmp_path: Path) -> None:
    """Without a compiler there is no folder, and the message says what to install."""
    env = {"PATH": "/nonexistent", "XDG_CACHE_HOME": str(tmp_path)}
    done = simulate("--shared", str(tmp_path / "lab"), "--gpus", "1x1GiB", "--", "/bin/echo", "ran", env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no C compiler" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_log_with_something_else(folder: Path) -> None:
    """Everybody can write there. Who cannot have a summary is told why, and keeps the exit code of the command."""
    program = f"echo nonsense >> {folder}/requests.jsonl; exit 42"
    done = simulate("--shared", str(folder), "--", "sh", "-c", program)
    assert done.returncode == 42
    assert f"there is no summary: {folder}/requests.jsonl:1: not a request" in done.stderr
    assert "Traceback" not in done.stderr


# ---- several users


@pytest.fixture
def server(shared_machine: SharedMachine) -> SharedMachine:
    """Return a machine with the machine /srv/lab of root's."""
    shared_machine.clear()
    done = share(shared_machine, ROOT, "/srv/lab", "--gpus", "1x1GiB")
    assert done.returncode == 0, done.stderr
    return shared_machine


def share(machine: SharedMachine, user: User, folder: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = (*options, "--format", "json", "--", sys.executable, "-c", TAKE)
    return machine.tfgpu("simulate", "--shared", folder, *command, user=user)


def test_users_join_the_machine_of_root(server: SharedMachine) -> None:
    """They need no compiler, no home and nothing else."""
    for user in (ALICE, BOB, User(4711)):
        done = share(server, user, "/srv/lab")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stderr)["gpus"][0]["peak"] == 100 * MIB


def test_the_folder_of_another_user_is_refused(server: SharedMachine) -> None:
    """Its owner could exchange the libraries that are loaded. The owner can use it, and nobody else, not even root."""
    server.folder("/srv/public", mode=0o1777)
    for folder in ("/home/alice/lab", "/srv/public/lab"):
        assert share(server, ALICE, folder, "--gpus", "1x1GiB").returncode == 0
        assert share(server, ALICE, folder).returncode == 0
        for user in (BOB, ROOT):
            done = share(server, user, folder)
            assert done.returncode == 2
            assert "belongs to alice, who could run code as you; use a folder of root's" in done.stderr


def test_a_folder_of_root_in_the_home_of_another_user_is_refused(server: SharedMachine) -> None:
    """Who owns a directory above it can exchange all of it."""
    done = share(server, ROOT, "/home/alice/lab", "--gpus", "1x1GiB")
    assert done.returncode == 2
    assert "/home/alice belongs to alice" in done.stderr
    assert not server.path("/home/alice/lab").exists()


@pytest.mark.parametrize("target", ["/srv/lab", "/srv/absent"])
@pytest.mark.parametrize("options", [(), ("--gpus", "1x1GiB")])
def test_a_link_in_a_sticky_folder_is_refused(target: str, options: tuple[str, ...], server: SharedMachine) -> None:
    """A stranger's link leads nobody to a machine, and makes root create nothing."""
    server.folder("/srv/public", mode=0o1777)
    server.path("/srv/public/lab").symlink_to(target)
    os.chown(server.path("/srv/public/lab"), ALICE.uid, ALICE.uid, follow_symlinks=False)
    done = share(server, ROOT, "/srv/public/lab", *options)
    assert done.returncode == 2
    assert "/srv/public/lab is not a directory" in done.stderr
    assert not server.path("/srv/absent").exists()


@pytest.mark.parametrize("mode", [0o775, 0o777, 0o1777])
def test_a_folder_that_others_can_write_is_refused(mode: int, server: SharedMachine) -> None:
    """The message says how to mend it."""
    server.path("/srv/lab").chmod(mode)
    done = share(server, ALICE, "/srv/lab")
    assert done.returncode == 2
    assert "others can write in /srv/lab; run: chmod go-w /srv/lab" in done.stderr


def test_a_user_without_rights_to_make_a_machine(server: SharedMachine) -> None:
    """The message names the folder."""
    done = share(server, BOB, "/srv/mine", "--gpus", "1x1GiB")
    assert done.returncode == 2
    assert "cannot write in /srv: Permission denied; run the command as root, with sudo" in done.stderr
