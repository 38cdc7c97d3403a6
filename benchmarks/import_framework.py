"""What a policy adds to the import of a framework: interleaved runs of the bare import, the hook, and hook and policy.

    python benchmarks/import_framework.py [--framework NAME] [--rounds N] [--peers | --modules]

The Python that runs this has the framework and tfenv: `.venv` has TensorFlow and JAX after `make venv`, and
`.venv-torch` has all three after `make test-torch`. Nothing in it is changed: two temporary virtual environments of the
same interpreter borrow its site-packages, and only one of them is armed. (Python reads the `.pth` files of an
environment's own site-packages, not those of a folder that a `.pth` names.) `--peers` compares with tools that come
into a process the same way: each gets an environment of its own, into which it is installed from the package index for
the benchmark only.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from time import perf_counter

import tfenv

#: What a policy may add to the import, as a part of it.
BARS = {"tensorflow": 0.01, "jax": 0.03, "torch": 0.03}
POLICY = """\
on_error = "warn"

[gpu]
visible_devices = [0]
memory_growth = true
memory_limit = "8GiB"

[audit]
file = "audit.jsonl"
"""
#: Run in every process: how long the import took, and whether a policy and a peer are there, as the side says.
PROBE = """\
import json, sys, time
wall, cpu = time.perf_counter(), time.process_time()
__import__(sys.argv[2])
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
enforce = sys.modules.get("tfenv.runtime.enforce")
governed = enforce is not None and enforce.get_current() is not None
there = {"governed": governed, "armed": "_tfenv_boot" in sys.modules, "peer": sys.argv[1] in sys.modules}
print(json.dumps({"wall": wall, "cpu": cpu, "there": there}))
"""
_IMPORT_TIME = re.compile(r"import time:\s+(?P<own>\d+) \|\s+(?P<total>\d+) \|\s+(?P<name>\S+)")


@dataclass(frozen=True)
class Side:
    """One of the things compared.

    Attributes:
        name: As it is printed.
        python: The interpreter.
        folder: The directory its program starts in.
        armed: Our hook is there.
        governed: A policy holds.
        launcher: A program of the same environment that starts the interpreter; "" for none.
        peer: A module that is loaded where the peer works; "" for none: coverage's .pth, idle, loads none.
        variables: What the peer needs.
    """

    name: str
    python: Path
    folder: Path
    armed: bool = False
    governed: bool = False
    launcher: str = ""
    peer: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        return [str(self.python.parent / self.launcher)] * bool(self.launcher) + [str(self.python)]

    @property
    def expected(self) -> dict[str, bool]:
        return {"governed": self.governed, "armed": self.armed, "peer": bool(self.peer)}


@dataclass(frozen=True)
class Sample:
    """Seconds of one process.

    Attributes:
        wall: Of the import, by the clock.
        cpu: Of the import, of all processors together.
        process: Of the whole process from its start to its end, by the clock: peers do much before the import.
    """

    wall: float
    cpu: float
    process: float


Seconds = Callable[[Sample], float]


# ---- environments


def make_sides(folder: Path) -> list[Side]:
    plain, project = folder / "plain", folder / "project"
    plain.mkdir()
    project.mkdir()
    (project / "tfgpu.toml").write_text(POLICY)
    bare, armed = make_environment(folder / "bare", armed=False), make_environment(folder / "armed", armed=True)
    return [
        Side("bare", bare, plain),
        Side("hook, no file", armed, plain, armed=True),
        Side("hook and policy", armed, project, armed=True, governed=True),
    ]


def make_peers(folder: Path) -> list[Side]:
    """Idle where they can be: no tracing, no exporters, coverage not measuring; what is left is their way in."""
    plain = folder / "plain"
    constraints = folder / "constraints.txt"  # else a peer's own copies would stand before TensorFlow's dependencies
    constraints.write_text("".join(f"{found.metadata['Name']}=={found.version}\n" for found in distributions()))

    def environment_with(package: str) -> Path:
        python = make_environment(folder / package, armed=False)
        pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(python), "install", "-c", str(constraints)]
        subprocess.run([*pip, package], check=True, env=without("PYTHON"))
        return python

    quiet = {"DD_TRACE_ENABLED": "false", "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false"}
    no_exporters = {f"OTEL_{signal}_EXPORTER": "none" for signal in ("TRACES", "METRICS", "LOGS")}
    return [
        Side("coverage's .pth", environment_with("coverage"), plain),
        Side(
            "ddtrace-run", environment_with("ddtrace"), plain,
            launcher="ddtrace-run", peer="ddtrace", variables=quiet,
        ),
        Side(
            "opentelemetry", environment_with("opentelemetry-distro"), plain,
            launcher="opentelemetry-instrument", peer="opentelemetry", variables=no_exporters,
        ),
    ]  # fmt: skip


def make_environment(folder: Path, *, armed: bool) -> Path:
    """An environment that borrows our site-packages. Both kinds have as many `.pth` files to read.

    Returns:
        Its interpreter.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site_packages = next(folder.glob("lib/python3*/site-packages"))
    package = Path(tfenv.__file__).parent
    # As an editable install has it: the hook looks there for the package, and nowhere else.
    (site_packages / "_tfenv.pth").write_text(f"{package.parent}\n")
    (site_packages / "borrowed.pth").write_text("".join(f"{path}\n" for path in library_folders()))
    if armed:
        shutil.copy(package / "deploy" / "tfenv.pth", site_packages)
        shutil.copy(package / "runtime" / "finder.py", site_packages / "_tfenv_boot.py")
    else:
        (site_packages / "tfenv.pth").write_text("import sys\n")
    compileall.compile_dir(site_packages, quiet=2)
    return folder / "bin" / "python"


def library_folders() -> list[str]:
    """Where this interpreter gets its packages from."""
    return [sysconfig.get_path("purelib")]


def require(framework: str) -> None:
    """End the benchmark if this interpreter has no such framework."""
    if importlib.util.find_spec(framework) is None:
        target = "test-torch" if framework == "torch" else "venv"
        raise SystemExit(f"this Python has no {framework}; run `make {target}`, and this file with what that made")


def environment(folder: Path) -> dict[str, str]:
    """Without what would change the import, with an empty user layer."""
    kept = without("TFGPU_", "PYTHON", "TF_", "COVERAGE", "DD_", "OTEL_")
    return {**kept, "XDG_CONFIG_HOME": str(folder), "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}


def without(*prefixes: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


# ---- measuring


def measure(side: Side, framework: str) -> Sample:
    began = perf_counter()
    done = run(side, "-c", PROBE, side.peer, framework)
    process = perf_counter() - began
    result = json.loads(done.stdout)
    if result["there"] != side.expected:
        raise SystemExit(f'"{side.name}" is not what it should be: {result["there"]}; is there a policy in /etc/tfgpu?')
    return Sample(result["wall"], result["cpu"], process)


def run(side: Side, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*side.command, *arguments]
    variables = {**environment(side.folder.parent / "no-user-files"), **side.variables}
    done = subprocess.run(command, cwd=side.folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done


def measure_all(sides: Sequence[Side], framework: str, rounds: int) -> dict[str, list[Sample]]:
    """Each round runs every side once, beginning with another one: what slows the machine down slows all of them."""
    for side in sides:
        measure(side, framework)  # warms the disk's cache, and writes bytecode where it is missing
    samples: dict[str, list[Sample]] = {side.name: [] for side in sides}
    for number in range(rounds):
        start = number % len(sides)
        for side in (*sides[start:], *sides[:start]):
            samples[side.name].append(measure(side, framework))
        print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return samples


# ---- reporting


def report(samples: Mapping[str, Sequence[Sample]], framework: str) -> None:
    bare = samples["bare"]
    print("".join([f"{'':16}", *(f"{title:>12}{'ratio':>8}{'paired':>8}" for title in COLUMNS)]))
    for name, taken in samples.items():
        cells = (cell for seconds in COLUMNS.values() for cell in cells_of(seconds, taken, bare))
        print(f"{name:16}{''.join(cells)}")
    print("\nMedians. ratio: of the medians; paired: the median of the ratios within each round.")
    print("wall and CPU are of the import; process is all from start to end, by the clock.")
    added = paired(cpu, samples["hook and policy"], bare) - 1
    print(f"A policy adds {added:+.1%} of processor time to `import {framework}`; the bar is {BARS[framework]:.0%}.")


def cpu(sample: Sample) -> float:
    return sample.cpu


COLUMNS: Mapping[str, Seconds] = {
    "wall ms": lambda sample: sample.wall,
    "CPU ms": cpu,
    "process ms": lambda sample: sample.process,
}


def cells_of(seconds: Seconds, taken: Sequence[Sample], bare: Sequence[Sample]) -> tuple[str, str, str]:
    own, theirs = (median(map(seconds, side)) for side in (taken, bare))
    return f"{own * 1000:12.0f}", f"{own / theirs:8.3f}", f"{paired(seconds, taken, bare):8.3f}"


def paired(seconds: Seconds, taken: Sequence[Sample], bare: Sequence[Sample]) -> float:
    return median(seconds(own) / seconds(theirs) for own, theirs in zip(taken, bare, strict=True))


def report_bytecode(framework: str) -> None:
    """Without bytecode an import takes more than three times as long, and ratios mean something else."""
    present = {name: has_bytecode(name) for name in (framework, "tfenv")}
    print("Bytecode: " + ", ".join(f"{name} {'present' if there else 'MISSING'}" for name, there in present.items()))


def has_bytecode(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.cached is not None and os.path.exists(spec.cached)


def report_modules(bare: Side, governed: Side, framework: str) -> None:
    """What the policy's side imports and the bare side does not, with each module's own time, largest first."""
    known = import_times(bare, framework)
    added = {name: time for name, time in import_times(governed, framework).items() if name not in known}
    print(f"{len(added)} modules are imported because of the policy, {sum(added.values()) / 1000:.1f} ms:")
    for name, time in sorted(added.items(), key=lambda item: -item[1]):
        print(f"{time / 1000:8.2f} ms  {name}")


def import_times(side: Side, framework: str) -> dict[str, int]:
    """Microseconds of each module's own code, in one process."""
    matches = map(_IMPORT_TIME.match, run(side, "-X", "importtime", "-c", PROBE, "", framework).stderr.splitlines())
    return {match["name"]: int(match["own"]) for match in matches if match}


def main() -> None:
    parser = argparse.ArgumentParser(description="What a policy adds to the import of a framework.")
    parser.add_argument("--framework", choices=BARS, default="tensorflow", help="the one to import (tensorflow)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="processes of each kind (20)")
    also = parser.add_mutually_exclusive_group()
    also.add_argument("--peers", action="store_true", help="compare with coverage, ddtrace and opentelemetry, too")
    also.add_argument("--modules", action="store_true", help="instead: which modules a policy imports, and their time")
    args = parser.parse_args()
    require(args.framework)
    with tempfile.TemporaryDirectory(prefix="tfgpu-bench-") as folder:
        sides = make_sides(Path(folder))
        if args.modules:
            measure_all(sides, args.framework, 0)
            report_modules(sides[0], sides[2], args.framework)
        else:
            sides += make_peers(Path(folder)) if args.peers else []
            report(measure_all(sides, args.framework, args.rounds), args.framework)
    report_bytecode(args.framework)


if __name__ == "__main__":
    main()
