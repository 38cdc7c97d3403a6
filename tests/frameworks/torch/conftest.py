"""Cases of PyTorch on simulated GPUs: `run(world, *steps)` says what became of one. Those of a World share a process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.frameworks.harness import Report, World, child_environment, project_folder, read_records, read_report

ZYGOTE = Path(__file__).with_name("zygote.py")


class Zygote:
    """A process that has imported PyTorch in a World, and forks one child a case."""

    def __init__(self, world: World, parent: Path) -> None:
        self.folder = project_folder(world, parent)
        self.count = 0
        self.process = subprocess.Popen(
            [sys.executable, str(ZYGOTE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "stderr").open("w"),
            env=child_environment(world) | dict(world.before),
            cwd=self.folder,
            text=True,
        )

    def run(self, steps: tuple[str, ...]) -> Report:
        """Run steps in a child. Return what became of it."""
        number, self.count = self.count, self.count + 1
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"number": number, "steps": steps}), file=self.process.stdin, flush=True)
        said = self.process.stdout.readline()
        assert said == f"{number}\n", (self.folder / "stderr").read_text(encoding="utf-8")
        return read_report(self.folder, number, read_records(self.folder / "audit.jsonl"))

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


class Run(Protocol):
    """`run(world, *steps)`."""

    def __call__(self, world: World, *steps: str) -> Report: ...


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, needs_torch: None) -> Iterator[Run]:
    """What became of a case: functions of `ways`, `name` or `name:argument`, one after another."""
    zygotes: dict[World, Zygote] = {}
    parent = tmp_path_factory.mktemp("torch")

    def run_steps(world: World, *steps: str) -> Report:
        if world not in zygotes:
            zygotes[world] = Zygote(world, parent)
        return zygotes[world].run(steps)

    yield run_steps
    for zygote in zygotes.values():
        zygote.close()
