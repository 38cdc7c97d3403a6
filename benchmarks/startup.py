"""What the armed hook costs in a process that never imports a framework, beside what its peers cost.

    python benchmarks/startup.py [--runs 200] [--python /usr/bin/python3] [--without-peers]

Makes virtual environments of its own, one a contender, installs into them from the package index (the peers for
the benchmark only), then starts their interpreters in turn, in an order that is shuffled anew in each round, so that
a slow moment of the machine hits all of them. Prints medians and ratios to the bare interpreter, and, where valgrind
is present, instructions, which repeat to ±0.05 million. Everything is measured with bytecode present, and the hook a
second time without.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 5
BAR = 1.1  # million instructions over the bare interpreter


@dataclass
class Contender:
    """One way to start `python -c pass`.

    Attributes:
        name: As it is printed.
        command: What is run.
        env: Variables it needs.
        against: The contender it is compared with.
        times: Measured so far, in milliseconds.
    """

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    against: str = "bare"
    times: list[float] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        # PYTHONHASHSEED: the order of sets would change the number of instructions from run to run.
        clean = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TFGPU_", "COVERAGE"))
        }
        return {**clean, "PYTHONHASHSEED": "0", **self.env}

    def start(self, *prefix: str) -> subprocess.CompletedProcess[str]:
        command = [*prefix, *self.command]
        return subprocess.run(command, env=self.environment, cwd="/", capture_output=True, text=True, check=True)

    def measure(self) -> None:
        began = perf_counter_ns()
        self.start()
        self.times.append((perf_counter_ns() - began) / 1e6)

    def instructions(self) -> float | None:
        """In millions; None without valgrind, or where the command starts further processes by itself."""
        if shutil.which("valgrind") is None or not self.command[0].endswith("python"):
            return None
        done = self.start("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null")
        found = re.search(r"Collected : (\d+)", done.stderr)
        return None if found is None else int(found[1]) / 1e6


def make_environment(python: str, folder: Path, *packages: str) -> Path:
    """A virtual environment; returns its folder of programs."""
    subprocess.run([python, "-m", "venv", "--without-pip", str(folder)], check=True)
    programs = folder / "bin"
    if packages:
        pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(programs / "python"), "install", *packages]
        subprocess.run(pip, check=True)
    return programs


def contenders(python: str, folder: Path) -> list[Contender]:
    bare = make_environment(python, folder / "bare")
    wheel = build(folder)
    armed = make_environment(python, folder / "armed", "--no-deps", str(wheel))
    three = make_environment(python, folder / "three", "--no-deps", str(wheel))
    watch_three_names(folder / "three")
    launched = launched_environment(armed / "python")
    # Nothing has bytecode there, the standard library neither: so it has its own baseline.
    no_bytecode = {"PYTHONPYCACHEPREFIX": "/nowhere", "PYTHONDONTWRITEBYTECODE": "1"}
    return [
        Contender("bare", [str(bare / "python"), "-c", "pass"]),
        Contender("tfenv.pth", [str(armed / "python"), "-c", "pass"]),
        Contender("tfenv.pth, three names", [str(three / "python"), "-c", "pass"]),
        Contender("tfgpu run, another environment", [str(bare / "python"), "-c", "pass"], launched),
        Contender("tfgpu run, same environment", [str(armed / "python"), "-c", "pass"], launched),
        Contender("bare, no bytecode", [str(bare / "python"), "-c", "pass"], no_bytecode, "bare, no bytecode"),
        Contender("tfenv.pth, no bytecode", [str(armed / "python"), "-c", "pass"], no_bytecode, "bare, no bytecode"),
    ]


def watch_three_names(environment: Path) -> None:
    """Have the hook watch the names of three frameworks."""
    (finder,) = environment.glob("lib/python*/site-packages/_tfenv_boot.py")
    text = finder.read_text()
    finder.write_text(text.replace('WATCHED = ("tensorflow",)', 'WATCHED = ("tensorflow", "jax", "torch")'))
    assert finder.read_text() != text
    python = environment / "bin" / "python"
    subprocess.run([python, "-c", "import _tfenv_boot"], check=True, cwd="/")  # compiles it


def build(folder: Path) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def launched_environment(python: Path) -> dict[str, str]:
    """What `tfgpu run` adds to a command's environment."""
    program = "from tfenv.deploy.launch import build_environment as e; [print(f'{k}={v}') for k, v in e({}).items()]"
    done = subprocess.run([str(python), "-c", program], capture_output=True, text=True, check=True, cwd="/")
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def peers(python: str, folder: Path) -> list[Contender]:
    coverage = make_environment(python, folder / "coverage", "coverage")
    ddtrace = make_environment(python, folder / "ddtrace", "ddtrace")
    opentelemetry = make_environment(python, folder / "opentelemetry", "opentelemetry-distro")
    return [
        Contender("coverage's .pth, idle", [str(coverage / "python"), "-c", "pass"]),
        Contender(
            "ddtrace-run",
            [str(ddtrace / "ddtrace-run"), str(ddtrace / "python"), "-c", "pass"],
            {"DD_TRACE_ENABLED": "false", "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false"},
        ),
        Contender(
            "opentelemetry-instrument",
            [str(opentelemetry / "opentelemetry-instrument"), str(opentelemetry / "python"), "-c", "pass"],
            {f"OTEL_{signal}_EXPORTER": "none" for signal in ("TRACES", "METRICS", "LOGS")},
        ),
    ]


def run(everybody: Sequence[Contender], runs: int) -> None:
    """Interleaved; the slow ones a tenth as often."""
    for contender in everybody:
        for _ in range(WARM_UP):
            contender.start()  # writes bytecode, fills caches
    for number in range(runs):
        for contender in random.sample(everybody, len(everybody)):
            slow = contender.command[0].endswith(("ddtrace-run", "opentelemetry-instrument"))
            if not slow or number % 10 == 0:
                contender.measure()


def report(everybody: Sequence[Contender]) -> None:
    times = {contender.name: statistics.median(contender.times) for contender in everybody}
    counts = {contender.name: contender.instructions() for contender in everybody}
    print(f"{'':32}{'median':>10}{'over bare':>12}{'ratio':>8}{'million instructions':>24}{'over bare':>12}")
    for contender in everybody:
        time, base_time = times[contender.name], times[contender.against]
        count, base_count = counts[contender.name], counts[contender.against]
        line = f"{contender.name:32}{time:>7.2f} ms{time - base_time:>+9.2f} ms{time / base_time:>8.2f}"
        if count is not None and base_count is not None:
            line += f"{count:>24.2f}{count - base_count:>+12.2f}"
        print(line)
    print(f"\nBytecode was present unless a line says otherwise. The bar for tfenv.pth is +{BAR} million instructions.")
    if counts["bare"] is None:
        print("Instructions are counted by valgrind, which is not installed here.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=200, help="starts of each interpreter (default 200)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter to measure (default: this one)")
    parser.add_argument("--without-peers", action="store_true", help="do not install coverage, ddtrace, opentelemetry")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        everybody = contenders(arguments.python, folder)
        if not arguments.without_peers:
            everybody += peers(arguments.python, folder)
        run(everybody, arguments.runs)
        version = subprocess.run([arguments.python, "-V"], capture_output=True, text=True, check=True)
        print(f"{version.stdout.strip()}, {arguments.runs} runs\n")
        report(everybody)


if __name__ == "__main__":
    main()
