"""Runs `tfgpu` as a user does: a process of its own, in a project of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import pytest

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
