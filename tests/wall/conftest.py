"""A machine of several people whose simulated GPUs keep limits for real cgroups."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cgroups import CgroupMachine, open_cgroups
from tests.shared_machine import ALICE, BOB, REPOSITORY, ROOT, SharedMachine, User, shared_machine
from tfenv.policy.units import MIB
from tfenv.simulate.driver_requests import DriverRequest, read_requests
from tfenv.simulate.environment import SimulatedGpu
from tfenv.simulate.shared import create_machine, open_machine

__all__ = ["shared_machine"]

GIB = 1 << 30
#: The sessions of alice and bob, as systemd makes them.
SESSIONS = {user.uid: f"user.slice/user-{user.uid}.slice/session-1.scope" for user in (ALICE, BOB)}
CONTEXT = 500 * MIB


class WallMachine:
    """The machine: files of several people, cgroups, and two GPUs of 24 GiB.

    Attributes:
        simulation: The variables that show a process the simulated GPUs.
        environment: All variables of its programs.
    """

    def __init__(
        self, shared: SharedMachine, cgroups: CgroupMachine, folder: Path, gpus: tuple[SimulatedGpu, ...]
    ) -> None:
        self.shared, self.cgroups = shared, cgroups
        create_machine(folder, gpus)
        self.log = open_machine(folder).log
        whole = open_machine(folder).build_environment()
        self.simulation = {name: value for name, value in whole.items() if name.startswith(("TFGPU_", "LD_"))}
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **self.simulation,
        }
        for session in SESSIONS.values():
            cgroups.make(session)

    def start(
        self, user: User, *command: str, cgroup: str | None = None, cwd: str = "/", **more: Any
    ) -> subprocess.Popen[str]:
        """Start a program of a user, in their session or in another cgroup."""
        place = SESSIONS.get(user.uid, "") if cgroup is None else cgroup
        more.setdefault("env", self.environment)
        return self.cgroups.start(command, cgroup=place, uid=user.uid, cwd=cwd, **more)

    def run(self, user: User, *command: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a program of a user to its end."""
        with self.start(user, *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more) as process:
            stdout, stderr = process.communicate(timeout=250)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def tfgpu(self, *arguments: str, user: User = ROOT, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run `tfgpu`."""
        return self.run(user, sys.executable, "-m", "tfenv", *arguments, **more)

    def read_json(self, *arguments: str, **more: Any) -> dict[str, Any]:
        """Run `tfgpu` with `--format json`, and return what it prints."""
        done = self.tfgpu(*arguments, "--format", "json", **more)
        assert done.returncode == 0, done.stderr + done.stdout
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def read_limits(self) -> Mapping[str, list[int | None]]:
        """Return the limits that are set: those of each GPU in MiB, by the name of the cgroup."""
        found: dict[str, list[int | None]] = {}
        for row in self.read_json("wall", "show")["limits"]:
            size = row["limit_bytes"]
            found.setdefault(row["cgroup"].rpartition("/")[2], []).append(None if size is None else size // MIB)
        return found

    def read_requests(self) -> tuple[DriverRequest, ...]:
        """Return what the driver was asked for."""
        return read_requests(self.log)

    def read_records(self, event: str) -> list[dict[str, Any]]:
        """Return the records of this event in the machine's log."""
        lines = self.shared.path("/var/log/tfgpu/0.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["event"] == event]


@contextmanager
def open_wall_machine(shared: SharedMachine, backend: str, gpus: int = 2, **more: Any) -> Iterator[WallMachine]:
    """Yield a machine whose driver keeps limits by this backend. Its policies are removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="tfgpu-wall-"))
    folder.chmod(0o755)
    card = SimulatedGpu(24 * GIB, cgroup_limits=backend, context=CONTEXT, **more)
    try:
        with open_cgroups(shared.process.pid) as cgroups:
            yield WallMachine(shared, cgroups, folder / "machine", (card,) * gpus)
    finally:
        shutil.rmtree(folder)
        shared.clear()
        for log in shared.path("/var/log/tfgpu").glob("*"):
            log.unlink()


@pytest.fixture(params=["dmem", "misc"])
def machine(request: pytest.FixtureRequest, shared_machine: SharedMachine) -> Iterator[WallMachine]:
    """Yield a machine for each backend."""
    with open_wall_machine(shared_machine, request.param) as made:
        yield made
