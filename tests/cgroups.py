"""Real cgroups for tests: a mount and a cgroup namespace, in which cgroup v2 is at /sys/fs/cgroup. It needs root.

A process in it sees only cgroups of its own test, from the root down, so that tests can have the names that systemd
gives (`user.slice/user-1001.slice`) and run beside each other.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = "/sys/fs/cgroup"
_NAMESPACES = ("cgroup", "mnt")
_libc = ctypes.CDLL(None, use_errno=True)

needs_cgroups = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare to make cgroups"
)

#: Makes one cgroup for the test, and shows it as the root of all. It waits until its stdin is closed.
_KEEP = """
set -e
mount -t cgroup2 none /sys/fs/cgroup
mkdir /sys/fs/cgroup/"$1"
echo $$ > /sys/fs/cgroup/"$1"/cgroup.procs
exec unshare --cgroup -- sh -ec '
    umount /sys/fs/cgroup
    mount -t cgroup2 none /sys/fs/cgroup
    echo ready
    read -r _ || :
'
"""
_REMOVE = """
mount -t cgroup2 none /sys/fs/cgroup
cd /sys/fs/cgroup
echo 1 > "$1"/cgroup.kill
for _ in 1 2 3 4 5 6 7 8 9 10; do
    find "$1" -depth -type d -exec rmdir {} + 2> /dev/null
    test -d "$1" || exit 0
    sleep 0.1
done
exit 1
"""


class CgroupMachine:
    """The namespaces of one test. Use it through `open_cgroups`."""

    def __init__(self, keeper: int) -> None:
        """
        Args:
            keeper: Pid of a process in the namespaces.
        """
        self.root = Path(f"/proc/{keeper}/root{ROOT}")
        self._namespaces = {name: os.open(f"/proc/{keeper}/ns/{name}", os.O_RDONLY) for name in _NAMESPACES}

    def close(self) -> None:
        for descriptor in self._namespaces.values():
            os.close(descriptor)

    def make(self, path: str) -> str:
        """Make a cgroup, with those above it, and return its full path as processes in there see it."""
        (self.root / path).mkdir(parents=True, exist_ok=True)
        return f"{ROOT}/{path}"

    def remove(self, path: str) -> None:
        """Remove a cgroup in which no process is."""
        (self.root / path).rmdir()

    def start(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        cgroup: str = "",
        uid: int = 0,
        cwd: str | os.PathLike[str] = "/",
        env: Mapping[str, str] | None = None,
        **more: Any,
    ) -> subprocess.Popen[str]:
        """Start a process there.

        Args:
            command: What to run.
            cgroup: Where: "user.slice/user-1001.slice". "": in the root.
            uid: As whom. The group has the same number.
            cwd: Its working directory.
            env: Its environment. None: that of the test.
            more: As for Popen.
        """
        enter = self._make_entrance(cgroup, uid, os.fspath(cwd))
        return subprocess.Popen([os.fspath(word) for word in command], text=True, env=env, preexec_fn=enter, **more)  # noqa: PLW1509

    def run(self, command: Sequence[str | os.PathLike[str]], **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a process there to its end. The arguments are those of `start`."""
        with self.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more) as process:
            stdout, stderr = process.communicate(timeout=200)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def _make_entrance(self, cgroup: str, uid: int, cwd: str) -> Callable[[], None]:
        procs, namespaces = f"{ROOT}/{cgroup}/cgroup.procs", tuple(self._namespaces.values())

        def enter() -> None:
            for descriptor in namespaces:
                if _libc.setns(descriptor, 0):
                    raise OSError(ctypes.get_errno(), "setns")
            os.chdir(cwd)
            with open(procs, "w", encoding="ascii") as file:
                file.write(str(os.getpid()))
            if uid:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)

        return enter


@contextmanager
def open_cgroups(inside: int | None = None) -> Iterator[CgroupMachine]:
    """Yield namespaces with cgroup v2 at /sys/fs/cgroup. Kill what still runs in them at the end.

    Args:
        inside: Pid of a process whose mount namespace has the other files. None: those of the machine.
    """
    name = f"tfgpu-test-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    enter = [] if inside is None else ["nsenter", f"--mount=/proc/{inside}/ns/mnt"]
    command = [*enter, "unshare", "--mount", "--propagation", "private", "--", "sh"]
    with subprocess.Popen(
        [*command, "-c", _KEEP, "sh", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as keeper:
        assert keeper.stdout is not None
        assert keeper.stdin is not None
        try:
            assert keeper.stdout.readline() == "ready\n"
            machine = CgroupMachine(keeper.pid)
            try:
                yield machine
            finally:
                machine.close()
        finally:
            keeper.stdin.close()
            keeper.wait()
            subprocess.run([*command, "-c", _REMOVE, "sh", name], check=True)
