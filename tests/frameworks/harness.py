"""Runs cases: a policy, a machine, and what the program does, in a process of its own, on simulated GPUs.

Importing a framework takes seconds, so that cases which share a World share a process that imports it
(`zygote.py`) and forks one child a case. What was asked of the simulated driver is what counts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import DISTURBING
from tfenv.deploy import launch
from tfenv.simulate.driver_requests import (
    DriverRequest,
    GpuRequestTotals,
    find_cuda_processes,
    read_requests,
    summarise_requests,
)
from tfenv.simulate.environment import build_environment, parse_gpus

REPOSITORY = Path(__file__).parents[2]
#: Its folder is on the path of the programs, so nothing in it has the name of a framework.
ZYGOTE = Path(__file__).parent / "programs" / "zygote.py"
#: In it are modules in the place of JAX, pandas and IPython, which cannot be imported.
LEFT_OUT = ZYGOTE.parent / "left_out"
MIB = 1 << 20
#: What lets a program without a policy take memory as it needs it.
GROWING = ("TF_FORCE_GPU_ALLOW_GROWTH", "true")

#: A World sets the variables it is about.
#: Read once, while there is one thread: pytest sets and removes PYTEST_CURRENT_TEST while batches start in others.
_ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(DISTURBING)}
#: Cases of one zygote that run at once. Many of them only wait, ten seconds for each tensor that is refused.
_PARALLEL = 10
#: The same where each takes all it sees. For a card of 24 GiB TensorFlow's own bookkeeping takes 740 MiB.
_PARALLEL_GREEDY = 3
#: Cases of one zygote, so that the first test of a batch does not wait too long.
_BATCH = 100
#: Zygotes that run at once, while others only wait.
_ZYGOTES = 3

_AUDIT = '\n[audit]\nfile = "audit.jsonl"\n'


@dataclass(frozen=True)
class World:
    """What a program finds when it starts.

    Attributes:
        policy: The text of its tfgpu.toml; None: no file.
        gpus: The simulated machine, as `tfgpu simulate` reads it.
        inherited: Variables the process starts with: the grant.
        before: Variables the program sets before it imports the framework.
        armed: Whether the start-up hook is there.
        framework: Whose `ways_in` the cases are functions of.
        alone: Whether TensorFlow finds no JAX, pandas and IPython. It imports what it finds of them, which takes as
            long as half of its own import.
    """

    policy: str | None
    gpus: str = "4x24GiB"
    inherited: tuple[tuple[str, str], ...] = ()
    before: tuple[tuple[str, str], ...] = ()
    armed: bool = True
    framework: str = "tensorflow"
    alone: bool = True

    @property
    def parallel(self) -> int:
        """How many of its cases run at once."""
        return _PARALLEL if self.armed or GROWING in self.inherited else _PARALLEL_GREEDY


@dataclass(frozen=True)
class Case:
    """What a program does in a World: functions of `ways_in`, `name` or `name:argument`, one after another."""

    world: World
    steps: tuple[str, ...]

    def __str__(self) -> str:
        return "-".join(self.steps)


@dataclass
class Report:
    """What became of a case.

    Attributes:
        pid: Of the process that ran it.
        status: How it ended; 0, or minus the signal's number.
        results: What each step returned.
        error: {"kinds": names of the exception's classes, "text": ..., "step": ...}; None: no step raised.
        requests: What the driver was asked for, by this process and its children.
        records: What they wrote into the audit log.
        stdout, stderr: What they said.
    """

    pid: int = 0
    status: int = 0
    results: list[Any] = field(default_factory=list)
    error: dict[str, Any] | None = None
    requests: tuple[DriverRequest, ...] = ()
    records: tuple[dict[str, Any], ...] = ()
    stdout: str = ""
    stderr: str = ""

    @property
    def cuda_opened(self) -> bool:
        return bool(find_cuda_processes(self.requests))

    @property
    def visible(self) -> set[int]:
        """How many GPUs the processes saw when they opened CUDA."""
        return {request.bytes for request in self.requests if request.op == "cuInit"}

    @property
    def gpus(self) -> dict[int, GpuRequestTotals]:
        """What was asked of each GPU memory was asked of, by its number in the machine."""
        return summarise_requests(self.requests)

    def peak_mib(self, gpu: int) -> float:
        """The most that one process held on the GPU, in MiB; 0 where it asked for nothing."""
        return self.gpus[gpu].peak_process / MIB if gpu in self.gpus else 0

    def first_mib(self, gpu: int) -> float:
        """The first request for memory of the GPU, in MiB; 0 without any."""
        return (self.gpus[gpu].first or 0) / MIB if gpu in self.gpus else 0

    def passed(self, entry_point: str) -> dict[str, Any]:
        """The first record of what happened at an entry point."""
        return next(record for record in self.records if record.get("entry_point") == entry_point)

    @property
    def ours(self) -> tuple[str, ...]:
        """The lines of stderr that tfenv wrote."""
        return tuple(line for line in self.stderr.splitlines() if line.startswith("tfgpu:"))

    @property
    def codes(self) -> set[str]:
        """The codes of all findings on record."""
        return {finding["code"] for record in self.records for finding in record["findings"]}


def child_environment(world: World) -> dict[str, str]:
    """The environment a program of that World starts with."""
    base = _ENVIRONMENT | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONDONTWRITEBYTECODE": "1"}
    env = build_environment(parse_gpus(world.gpus), base=base)
    is_alone = world.alone and world.framework == "tensorflow"
    path = [*([str(REPOSITORY)] if world.armed else []), *([str(LEFT_OUT)] if is_alone else [])]
    if path:
        env["PYTHONPATH"] = os.pathsep.join(path)
    if world.armed:
        env = launch.build_environment(env)
    return env | dict(world.inherited)


def project_folder(world: World, parent: Path) -> Path:
    """A new project folder with the World's tfgpu.toml; its audit log is `audit.jsonl` beside it."""
    folder = Path(tempfile.mkdtemp(prefix="project-", dir=parent))
    if world.policy is not None:
        _write_policy(world, folder)
    return folder


def _write_policy(world: World, folder: Path) -> None:
    (folder / "tfgpu.toml").write_text(f"{world.policy}{_AUDIT}", encoding="utf-8")


def run_batch(world: World, cases: Sequence[Case], parent: Path) -> dict[Case, Report]:
    """Run cases of one World in the children of one process."""
    folder = project_folder(world, parent)
    zygote = subprocess.run(
        [sys.executable, str(ZYGOTE)],
        input=orders(world, cases, str(folder)),
        env=child_environment(world),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if zygote.returncode != 0:
        raise RuntimeError(f"the zygote of {world} ended with {zygote.returncode}:\n{zygote.stderr}")
    records = read_records(folder / "audit.jsonl")
    return {case: read_report(folder, number, records) for number, case in enumerate(cases)}


def orders(world: World, cases: Sequence[Case], folder: str) -> str:
    """What the zygote is told on stdin."""
    ways_in = "ways_in" if world.framework == "tensorflow" else f"ways_in_{world.framework}"
    told = {"before": dict(world.before), "parallel": world.parallel, "folder": folder, "ways_in": ways_in}
    return json.dumps({**told, "cases": [list(case.steps) for case in cases]})


def read_records(log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def read_report(folder: Path, number: int, records: Iterable[dict[str, Any]]) -> Report:
    """What became of one case, by the files its child left in the folder."""

    def text(kind: str) -> str:
        path = folder / f"{number}.{kind}"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    found = json.loads(text("report") or '{"pid": 0, "results": [], "error": null}')
    requests = read_requests(folder / f"{number}.driver")
    pids = {found["pid"], *(request.pid for request in requests)}
    return Report(
        status=int(text("status")),
        requests=requests,
        records=tuple(record for record in records if record["pid"] in pids),
        stdout=text("stdout"),
        stderr=text("stderr"),
        **found,
    )


class Runner:
    """Runs the cases of some tests, those that share a World together, in the order of the tests."""

    def __init__(self, parent: Path, cases: Iterable[Case]) -> None:
        self.parent = parent
        self.pool = ThreadPoolExecutor(_ZYGOTES)
        self.batches: dict[Case, Future[dict[Case, Report]]] = {}
        for world, members in _by_world(cases).items():
            for start in range(0, len(members), _BATCH):
                self._submit(world, members[start : start + _BATCH])

    def _submit(self, world: World, cases: Sequence[Case]) -> None:
        future = self.pool.submit(run_batch, world, cases, self.parent)
        self.batches |= dict.fromkeys(cases, future)

    def report(self, case: Case) -> Report:
        """Return what became of the case. Wait for it. A case that nobody announced runs now."""
        if case not in self.batches:
            self._submit(case.world, [case])
        report = self.batches[case].result()[case]
        assert report.status == 0, f"{case} ended with {report.status}:\n{report.stdout}{report.stderr}"
        return report

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def _by_world(cases: Iterable[Case]) -> dict[World, list[Case]]:
    worlds: dict[World, list[Case]] = {}
    for case in dict.fromkeys(cases):
        worlds.setdefault(case.world, []).append(case)
    return worlds


def cases_in(value: object) -> list[Case]:
    """The cases in a test's parameter: one, or several in a tuple."""
    if isinstance(value, Case):
        return [value]
    if isinstance(value, tuple | list):
        return [case for item in value for case in cases_in(item)]
    return []


@dataclass(frozen=True)
class Ended:
    """What became of a whole program.

    Attributes:
        status: Its exit status.
        stdout: What it printed.
        stderr: What it said, without TensorFlow's own time-stamped log lines and without ours.
        ours: The lines that begin with `tfgpu:`.
        requests: What the driver was asked for.
        records: What was written into the audit log.
    """

    status: int
    stdout: str
    stderr: str
    ours: tuple[str, ...]
    requests: tuple[DriverRequest, ...]
    records: tuple[dict[str, Any], ...]


#: `I0000 00:00:1763894400.123456   4711 file.cc:1] ...` and `2026-11-23 10:40:39.123456: I file.cc:1] ...`
_LOG_LINE = re.compile(
    r"^([IWEF]\d{4} \d\d:\d\d:[\d.]+|\d{4}-\d\d-\d\d \d\d:\d\d:[\d.]+:|WARNING: All log messages before)"
)


def run_program(world: World, text: str, folder: Path, **variables: str) -> Ended:
    """Run a program of its own in a folder that is a project of that World, unless it has its own tfgpu.toml."""
    if world.policy is not None and not (folder / "tfgpu.toml").exists():
        _write_policy(world, folder)
    program = folder / "program.py"
    program.write_text(text, encoding="utf-8")
    log = folder / "requests"
    result = subprocess.run(
        [sys.executable, str(program)],
        env=child_environment(world) | {"TFGPU_SIMULATE_LOG": str(log)} | variables,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = [line for line in result.stderr.splitlines() if not _LOG_LINE.match(line)]
    return Ended(
        result.returncode,
        result.stdout,
        "\n".join(line for line in lines if not line.startswith("tfgpu:")),
        tuple(line for line in lines if line.startswith("tfgpu:")),
        read_requests(log),
        tuple(read_records(folder / "audit.jsonl")),
    )
