"""Runs `tfgpu` as a user does: a process of its own, in a project of its own."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import pytest

from tests.shared_machine import SharedMachine, shared_machine

__all__ = ["shared_machine"]

REPOSITORY = Path(__file__).parents[2]
TFGPU = [sys.executable, "-m", "tfenv"]
_DISTURBING = (
    "TFGPU_", "TF_", "CUDA_", "SLURM_", "RAY_", "KERAS_", "LD_LIBRARY_PATH", "NO_COLOR", "XDG_CONFIG_HOME",
    "XDG_STATE_HOME", "PYTHONUNBUFFERED",
)  # fmt: skip


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """Return an environment that names no file outside of the test, with Python's usual buffers."""
    base = {key: value for key, value in os.environ.items() if not key.startswith(_DISTURBING)}
    return base | {"PYTHONPATH": str(REPOSITORY), "XDG_CONFIG_HOME": str(tmp_path / "config")}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return an empty project."""
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


class Tfgpu(Protocol):
    """`tfgpu("check", "a.toml", env={"NO_COLOR": "1"})`, where `env` is added to the variables."""

    def __call__(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture
def tfgpu(project: Path, variables: dict[str, str]) -> Tfgpu:
    """Return what runs `tfgpu` in the project's directory, or in another one."""

    def run(
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        command = [*TFGPU, *map(str, arguments)]
        env = variables | dict(env or {})
        return subprocess.run(
            command, cwd=cwd or project, env=env, input=stdin, capture_output=True, text=True, timeout=200, check=False
        )

    return run


@pytest.fixture
def server(shared_machine: SharedMachine) -> SharedMachine:
    """Return a machine with alice, who is a student, bob and carol. Nobody has a policy yet."""
    shared_machine.clear()
    return shared_machine


def run_on_terminal(
    arguments: list[str], env: dict[str, str], cwd: Path, until: str = "never written"
) -> tuple[str, int]:
    """Return what `tfgpu` writes on a terminal, and its exit code. Press Ctrl-C once it wrote a text twice."""
    terminal, side = pty.openpty()
    env = {"TERM": "xterm-256color", "COLUMNS": "100"} | env
    process = subprocess.Popen([*TFGPU, *arguments], env=env, cwd=cwd, stdin=side, stdout=side, stderr=side)
    os.close(side)
    output, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                output += os.read(terminal, 1 << 16)
            except OSError:  # the other side is closed: it has ended
                break
        if output.count(until.encode()) >= 2 and process.poll() is None:
            process.send_signal(signal.SIGINT)
            until = "never written"
    code = process.wait(60)
    os.close(terminal)
    return output.decode(), code
