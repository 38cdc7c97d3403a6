"""Simulated GPUs with memory limits for cgroups, real cgroups, and processes of several users in them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.cgroups import ROOT, CgroupMachine, open_cgroups
from tfenv.simulate.build import build_libraries
from tfenv.simulate.environment import build_environment, parse_gpus
from tfenv.values import replace

MIB = 1 << 20
GIB = 1024  #: In MiB, as all sizes here.
NO_LIMIT = -1
WORKER = Path(__file__).with_name("cgroup_worker.py")
#: Far from those that useradd gives: userdel refuses to remove a user whose processes run.
ALICE_UID, BOB_UID = 61001, 61002
ALICE, BOB = f"user.slice/user-{ALICE_UID}.slice", f"user.slice/user-{BOB_UID}.slice"
FIRST, SECOND, DEEP = f"{ALICE}/session-1.scope", f"{ALICE}/session-2.scope", f"{ALICE}/session-1.scope/job"
#: Each comes after those above it.
CGROUPS = ("user.slice", ALICE, FIRST, DEEP, SECOND, BOB, "system.slice")


def path_of(cgroup: str) -> str:
    """Return the full path of a cgroup. "" is the root."""
    return f"{ROOT}/{cgroup}".rstrip("/")


class Workers:
    """Processes in one cgroup: `workers.ask("name", "verb", ...)` as cgroup_worker.py describes it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, name: str, verb: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([name, verb, *arguments]), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def open(self, name: str = "worker") -> None:
        assert self.ask(name, "open") == 0

    def take(self, mib: int, kind: str = "cuMemAlloc", name: str = "worker") -> int:
        return int(self.ask(name, "take", kind, mib))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


class Lab:
    """Cgroups, and a folder that users other than root can read."""

    def __init__(self, folder: Path, machine: CgroupMachine, stack: ExitStack) -> None:
        self.folder, self.machine, self._stack = folder, machine, stack
        for cgroup in CGROUPS:
            machine.make(cgroup)

    def make_log(self) -> Path:
        """Return a new log that all users can write."""
        descriptor, name = tempfile.mkstemp(prefix="log-", dir=self.folder)
        os.fchmod(descriptor, 0o666)
        os.close(descriptor)
        return Path(name)

    def simulate(
        self, backend: str, *, gpus: str = "1x8GiB", log: bool = True, context: int = 0, reserved: int = 0
    ) -> dict[str, str]:
        """Return the environment of processes on GPUs whose limits this backend keeps."""
        sizes = {"context": context * MIB, "reserved": reserved * MIB}
        described = [replace(gpu, cgroup_limits=backend, **sizes) for gpu in parse_gpus(gpus)]
        base = {"PATH": "/usr/bin:/bin"}
        path = self.make_log() if log else None
        return build_environment(described, log=path, libraries=self.folder / "lib", base=base)

    def start(self, env: dict[str, str], cgroup: str = "", uid: int = 0, enter: tuple[str, ...] = ()) -> Workers:
        """Start workers in a cgroup. `enter` is a command that runs them."""
        command = (*enter, sys.executable, "-S", str(WORKER), str(uid))
        process = self.machine.start(command, cgroup=cgroup, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        workers = Workers(process)
        self._stack.callback(workers.close)
        return workers


@contextmanager
def open_place() -> Iterator[tuple[Path, CgroupMachine]]:
    """Yield a folder with the stub libraries that all users can read, and namespaces for cgroups."""
    folder = Path(tempfile.mkdtemp(prefix="tfgpu-cgroup-limits-"))
    try:
        shutil.copytree(build_libraries(), folder / "lib")
        for entry in (folder, *folder.rglob("*")):
            entry.chmod(0o755)
        with open_cgroups() as machine:
            yield folder, machine
    finally:
        shutil.rmtree(folder)
