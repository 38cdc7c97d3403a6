"""What a program pays for its policy being read in tfenv's own interpreter (`tfgpu install --system`).

    python benchmarks/resolver.py [--rounds N]

Reads one project file in this process and in a child, in turn; and asks for one where there is no file at all.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter

import tfenv
from tfenv import pipeline
from tfenv.config import presence
from tfenv.config.presence import may_find_policy
from tfenv.runtime.resolver import RemoteResolver, Resolver

POLICY = '[gpu]\nvisible_devices = [0]\nmemory_growth = true\nmemory_limit = "8GiB"\n'


def load(folder: Path, resolver: Resolver) -> None:
    """Do what the import of a framework does: look whether there may be a file, then load."""
    if may_find_policy({"cwd": str(folder)}):
        assert resolver.load(pipeline.current_start(str(folder))).found


def cpu_seconds() -> float:
    """What this process and its children took of the processor so far."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def rounds_of(actions: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of each action, by the clock and by the processor, in turn so that all see the same load."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            began, used = perf_counter(), cpu_seconds()
            action()
            times[name].append(((perf_counter() - began) * 1000, (cpu_seconds() - used) * 1000))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    rounds: int = parser.parse_args().rounds
    # This file lies in a checkout whose pyproject.toml mentions us, and counts as the importer.
    presence._list_importer_folders = lambda _: []  # type: ignore[assignment]  # noqa: SLF001
    with tempfile.TemporaryDirectory() as name:
        project, nothing = Path(name, "project"), Path(name, "nothing")
        project.mkdir()
        nothing.mkdir()
        (project / "tfgpu.toml").write_text(POLICY)
        remote = RemoteResolver(sys.executable, str(Path(tfenv.__file__).parent.parent))
        actions: dict[str, Callable[[], None]] = {
            "in this process": lambda: load(project, Resolver()),
            "in a child": lambda: load(project, remote),
            "no file, so no child": lambda: load(nothing, Resolver()),
        }
        rounds_of(actions, 1)
        for what, times in rounds_of(actions, rounds).items():
            clock, processor = (median(column) for column in zip(*times, strict=True))
            print(f"{what:<22} median {clock:6.1f} ms by the clock, {processor:6.1f} ms of the processor")
    print(f"bytecode is {'not ' if sys.dont_write_bytecode else ''}written; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
