"""A real systemd sets a user's limits of GPU memory before their first session, by what `tfgpu wall install` wrote.

It runs in namespaces of its own, with logind, D-Bus and journald, on the machine of tests/shared_machine.py.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cgroups import needs_cgroups
from tests.deploy.test_login import PYTHON, install_tfenv, tfgpu
from tests.shared_machine import ALICE, BOB, ROOT, SharedMachine, shared_machine
from tests.wall.conftest import WallMachine, open_wall_machine

__all__ = ["shared_machine"]

_SYSTEMD = "/lib/systemd/systemd"
_FOUND = "/usr/lib/systemd/system"
_NEEDED = (_SYSTEMD, f"{_FOUND}/systemd-logind.service", f"{_FOUND}/dbus.service")

pytestmark = [
    pytest.mark.exhaustive,
    needs_cgroups,
    pytest.mark.skipif(
        not all(Path(path).exists() for path in _NEEDED)
        or not list(Path("/usr/lib").glob("*/security/pam_systemd.so")),
        reason="there is no systemd with logind here",
    ),
]

POLICY = f"""
[ceiling]
memory_total = "12GiB"
[user."uid:{ALICE.uid}".ceiling]
memory_total = "8GiB"
[audit]
file = "/var/log/tfgpu/<uid>.jsonl"
"""

#: Takes a GPU's memory in pieces of 512 MiB until the driver refuses. tfenv is not in this process.
TAKE = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
device, context, piece, taken = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64(), 0
assert cuda.cuInit(0) == cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
assert cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device) == 0
while cuda.cuMemAlloc_v2(ctypes.byref(piece), ctypes.c_size_t(512 << 20)) == 0: taken += 512
print(open("/proc/self/cgroup").read().splitlines()[-1].removeprefix("0::"), taken)
"""

#: All that there is for systemd to start. What else is installed here would work on the files of this machine.
_UNITS = (
    "dbus.service",
    "dbus.socket",
    "dbus-org.freedesktop.login1.service",
    "systemd-journald.service",
    "systemd-journald.socket",
    "systemd-logind.service",
    "user.slice",
    "user-runtime-dir@.service",
)
_MANAGER = "user@.service"
_FOLDER = "/srv/units"
_TARGETS = ("sysinit", "basic", "sockets", "shutdown")
_LOGIN = "[Unit]\nWants=systemd-journald.service dbus.socket systemd-logind.service\n"
#: Not what the kernel says of other tests.
_OF_PROGRAMS = ("_TRANSPORT=journal", "+", "_TRANSPORT=stdout", "+", "_TRANSPORT=syslog")
_BOOT = f"""
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
exec env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH=/etc/systemd/system:{_FOLDER} \\
    {_SYSTEMD} --unit=login.target --log-target=journal
"""


class Systemd:
    """A running systemd.

    Attributes:
        wall: The machine on which it runs.
    """

    def __init__(self, wall: WallMachine, pid: int) -> None:
        """
        Args:
            wall: The machine.
            pid: Of systemd, as the tests see it.
        """
        self.wall = wall
        self._enter = (
            "nsenter",
            f"--target={pid}",
            *(f"--{name}" for name in ("mount", "pid", "uts", "ipc", "cgroup")),
        )

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of root beside it."""
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        return subprocess.run(
            [*self._enter, *command], env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    def log_in(self, user: str, *command: str) -> str:
        """Open a session of a user, run a command in it, and return what it prints."""
        # `su -l` hands on no environment, and in it are the simulated GPUs.
        words = shlex.join(["/usr/bin/env", *list_settings(self.wall), *command])
        done = self.run("systemd-run", "--quiet", "--wait", "--pipe", "su", "-l", user, "-c", words)
        assert done.returncode == 0, f"{done.stderr}\n{self.read_journal()}"
        return done.stdout.strip()

    def read_journal(self) -> str:
        """Return what systemd and the programs have said."""
        return self.run("journalctl", "--no-pager", "--output=cat", *_OF_PROGRAMS).stdout


@contextmanager
def boot(wall: WallMachine, units: Iterable[str]) -> Iterator[Systemd]:
    """Start systemd, wait until users can log in, and end it with all that it has started."""
    simulation = " ".join(f'"{setting}"' for setting in list_settings(wall))
    for name in units:
        wall.shared.write(f"{_FOLDER}/{name}", Path(_FOUND, name).read_text())
    for name in _TARGETS:
        wall.shared.write(f"{_FOLDER}/{name}.target", "[Unit]\n")
    wall.shared.write(f"{_FOLDER}/login.target", _LOGIN)
    with wall.shared.path("/etc/shadow").open("a") as shadow:
        shadow.writelines(f"{name}:*:::::::\n" for name in ("alice", "bob"))
    wall.shared.write("/etc/systemd/system.conf.d/simulation.conf", f"[Manager]\nDefaultEnvironment={simulation}\n")
    wall.shared.write("/etc/systemd/system/service.d/tests.conf", "[Service]\nPrivateTmp=no\n")
    namespaces = ("--mount", "--propagation=private", "--pid", "--uts", "--ipc", "--fork", "--kill-child")
    with wall.start(
        ROOT, "unshare", *namespaces, "sh", "-ec", _BOOT, cgroup="", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as outer:
        try:
            systemd = Systemd(wall, _find_child(outer.pid))
            _wait_for_logins(systemd)
            yield systemd
        finally:
            outer.kill()


def list_settings(wall: WallMachine) -> list[str]:
    """Return what shows a process the simulated GPUs, as NAME=value."""
    return [f"{name}={value}" for name, value in wall.simulation.items()]


def _find_child(pid: int) -> int:
    """Return the pid of the only child of a process. It may not have forked yet."""
    deadline = time.monotonic() + 60
    while not (children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        assert time.monotonic() < deadline, "unshare starts nothing"
        time.sleep(0.01)
    return int(children[0])


def _wait_for_logins(systemd: Systemd) -> None:
    deadline = time.monotonic() + 120
    while systemd.run("systemctl", "is-active", "systemd-logind.service").stdout.strip() != "active":
        assert time.monotonic() < deadline, systemd.read_journal()
        time.sleep(0.1)


@pytest.fixture(params=["with a manager for each user", "without"])
def systemd(request: pytest.FixtureRequest, shared_machine: SharedMachine) -> Iterator[Systemd]:
    """Yield a systemd where `tfgpu wall install` was run. Newer ones start no manager for a session of cron."""
    install_tfenv(shared_machine)
    with open_wall_machine(shared_machine, "misc") as wall:
        shared_machine.policy({"tfgpu.toml": POLICY})
        assert tfgpu(wall, "wall", "install").returncode == 0
        with boot(wall, (*_UNITS, _MANAGER) if request.param != "without" else _UNITS) as systemd:
            yield systemd
        assert tfgpu(wall, "wall", "uninstall").returncode == 0


def take(systemd: Systemd, user: str) -> tuple[str, int]:
    """Have a user log in and take what they get. Return their cgroup, and how many MiB they got."""
    cgroup, taken = systemd.log_in(user, sys.executable, "-S", "-I", "-c", TAKE).rsplit(maxsplit=1)
    return cgroup, int(taken)


def test_a_user_has_their_limit_from_the_first_program_of_a_login_on(systemd: Systemd) -> None:
    """It holds for a program without tfenv, for each user by their own tables, and the audit log has it."""
    for name, user, total in (("alice", ALICE, 8), ("bob", BOB, 12)):
        cgroup, taken = take(systemd, name)
        assert cgroup.startswith(f"/user.slice/user-{user.uid}.slice/session-")
        assert (total - 1) << 10 < taken <= total << 10
    assert [record["cgroup"] for record in systemd.wall.read_records("wall_changed")] == [
        f"/sys/fs/cgroup/user.slice/user-{user.uid}.slice" for user in (ALICE, BOB)
    ]


@pytest.mark.parametrize("systemd", ["without"], indirect=True)
def test_a_driver_that_hangs_keeps_nobody_out(systemd: Systemd) -> None:
    """The user logs in ten seconds later, without a limit. The journal says what took so long."""
    library = Path(systemd.wall.simulation["LD_LIBRARY_PATH"]) / "libnvidia-ml.so.1"
    library.unlink()
    source = library.with_suffix(".c")
    source.write_text("#include <unistd.h>\nint nvmlInitWithFlags(unsigned flags) { for (;;) pause(); (void)flags; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    _, taken = take(systemd, "alice")
    assert taken > 20 << 10
    journal = systemd.read_journal()
    assert re.search(f"sending signal TERM to command .{re.escape(PYTHON)}", journal), journal
