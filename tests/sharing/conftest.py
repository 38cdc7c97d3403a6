"""A machine of simulated GPUs whose leases are in a folder of their own, and crowds of processes on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SimulatedGpus

CROWD = Path(__file__).with_name("crowd.py")
SILENT = '\n[audit]\nfile = "none"\nstderr = "none"\n'


class Crowd:
    """Processes that ask for the GPUs of one machine at once, and an observer who is none of them."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder = folder
        self.env = dict(env)
        self.log = folder / "events"
        self.log.touch()
        self.log.chmod(0o666)
        self.pids: list[int] = []
        self.statuses: list[int] = []
        self._process: subprocess.Popen[str] | None = None

    def write_policy(self, name: str, text: str) -> str:
        """Write a policy file of that name, and return its path."""
        path = self.folder / f"{name}.toml"
        path.write_text(text + SILENT)
        path.chmod(0o644)
        return str(path)

    def start(self, members: Sequence[Mapping[str, Any]]) -> None:
        """All of them begin to ask at the same moment."""
        self._process = subprocess.Popen(
            [sys.executable, str(CROWD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.env,
            cwd=self.folder,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"log": str(self.log), "members": list(members)}))
        self._process.stdin.close()
        self.pids = json.loads(self._process.stdout.readline())

    def finish(self) -> list[dict[str, Any]]:
        """Wait for all of them, and return what happened, in order."""
        assert self._process is not None
        assert self._process.stdout is not None
        self.statuses = json.loads(self._process.stdout.read())
        self._process.wait()
        self._process.stdout.close()
        return self.read_events()

    def read_events(self) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        return sorted((json.loads(line) for line in lines), key=lambda event: event["at"])

    def wait_for(self, condition: Callable[[list[dict[str, Any]]], object], seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not condition(self.read_events()):
            assert time.monotonic() < until, self.read_events()[-10:]
            time.sleep(0.02)

    def note(self, event: str, **more: Any) -> None:
        """The observer's own line."""
        with self.log.open("a") as log:
            log.write(json.dumps({"at": time.monotonic(), "event": event, **more}) + "\n")

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            for pid in self.pids:
                _kill(pid)
            self._process.kill()
            self._process.wait()


def _kill(pid: int) -> None:
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        return


@pytest.fixture
def lease_folder() -> Iterator[Path]:
    """A folder all users can reach."""
    folder = Path(tempfile.mkdtemp(prefix="tfgpu-crowd-"))
    folder.chmod(0o755)
    (folder / "run").mkdir()
    (folder / "run").chmod(0o1777)  # as /run/lock and /tmp are
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def machine(lease_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the directory of leases, which does not exist yet. This process is on a simulated machine."""
    monkeypatch.setenv("TFGPU_SIMULATE", "count=4")
    monkeypatch.setenv("TFGPU_SIMULATE_LOG", str(lease_folder / "run" / "log"))
    return lease_folder / "run" / "log.leases"


@pytest.fixture
def crowd(machine: Path, simulated_gpus: SimulatedGpus) -> Iterator[Crowd]:
    """A crowd on four simulated GPUs of 24 GiB. The test's own process is on the same machine."""
    log = machine.parent / "log"
    log.touch()
    log.chmod(0o666)
    made = Crowd(machine.parent.parent, simulated_gpus("4x24GiB", log=log))
    yield made
    made.end()
