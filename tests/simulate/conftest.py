"""Runs Python programs on simulated GPUs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from tests.cgroups import CgroupMachine
from tests.simulate.cgroup_lab import Lab, open_place


class RunPython(Protocol):
    def __call__(self, program: str, env: Mapping[str, str], *arguments: str) -> str: ...


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """`run_python(program, env, *arguments)`: what the program prints. It must end with status 0."""

    def run(program: str, env: Mapping[str, str], *arguments: str) -> str:
        command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="module")
def _cgroup_place() -> Iterator[tuple[Path, CgroupMachine]]:
    with open_place() as place:
        yield place


@pytest.fixture
def lab(_cgroup_place: tuple[Path, CgroupMachine]) -> Iterator[Lab]:
    """Real cgroups, and simulated GPUs whose limits nobody has set."""
    with ExitStack() as stack:
        yield Lab(*_cgroup_place, stack)
