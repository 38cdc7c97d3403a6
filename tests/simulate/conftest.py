"""Runs Python programs on simulated GPUs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Mapping
from typing import Protocol

import pytest


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
