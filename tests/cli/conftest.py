"""Runs `tfgpu` as a user does: a process of its own, in a project of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from tests.cli.server import Server

REPOSITORY = Path(__file__).parents[2]
_DISTURBING = ("TFGPU_", "TF_", "CUDA_", "SLURM_", "RAY_", "KERAS_", "LD_LIBRARY_PATH", "NO_COLOR", "XDG_CONFIG_HOME")


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """An environment in which no file outside of the test speaks."""
    base = {key: value for key, value in os.environ.items() if not key.startswith(_DISTURBING)}
    return base | {"PYTHONPATH": str(REPOSITORY), "XDG_CONFIG_HOME": str(tmp_path / "config")}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """An empty project."""
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


class Tfgpu(Protocol):
    def __call__(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture
def tfgpu(project: Path, variables: dict[str, str]) -> Tfgpu:
    """`tfgpu("check", "a.toml", env={"NO_COLOR": "1"})` in the project's directory; `env` is added to the variables."""

    def run(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tfenv", *arguments]
        return subprocess.run(
            command,
            cwd=project,
            env=variables | dict(env or {}),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Server]:
    """The server of all tests; `server` is the one to use."""
    if os.geteuid() != 0:
        pytest.skip("only root can make files of other users, and become them")
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        pytest.skip("unshare and setpriv, of util-linux, are not here")
    # Not below pytest's own folder, into which nobody else may look.
    root = Path(tempfile.mkdtemp(prefix="tfgpu-server-"))
    try:
        server = Server(root)
        tried = server.run(["id", "alice"], env=dict(os.environ))
        if tried.returncode != 0:
            pytest.skip(f"no mount namespace can be made here: {tried.stderr.strip()}")
        yield server
    finally:
        shutil.rmtree(root)


@pytest.fixture
def server(shared_server: Server) -> Server:
    """A machine with alice and bob, who are students, and carol; nobody has a policy yet."""
    shared_server.clear()
    for home in shared_server.home.iterdir():
        for left in home.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return shared_server
