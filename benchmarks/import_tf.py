"""What a policy adds to `import tensorflow`: interleaved runs of the bare import, the armed hook, and hook and policy.

    python benchmarks/import_tf.py [--rounds N] [--modules]

The Python that runs this has TensorFlow and tfenv, as `.venv` has after `make venv`. Nothing in it is changed: two
temporary virtual environments of the same interpreter borrow its site-packages, and only one of them is armed.
(Python reads the `.pth` files of an environment's own site-packages, not those of a folder that a `.pth` names.)
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
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tfenv

BAR = 0.03
POLICY = """\
on_error = "warn"

[gpu]
visible_devices = [0]
memory_growth = true
memory_limit = "8GiB"

[audit]
file = "audit.jsonl"
"""
#: Run in every process: how long the import took, and whether a policy holds, which must be as the side says.
PROBE = """\
import json, sys, time
wall, cpu = time.perf_counter(), time.process_time()
import tensorflow
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
activate = sys.modules.get("tfenv.startup.activate")
governed = activate is not None and activate.current() is not None
print(json.dumps({"wall": wall, "cpu": cpu, "governed": governed, "armed": "_tfenv_boot" in sys.modules}))
"""
_IMPORT_TIME = re.compile(r"import time:\s+(?P<own>\d+) \|\s+(?P<total>\d+) \|\s+(?P<name>\S+)")


@dataclass(frozen=True)
class Side:
    """One of the things compared: an interpreter, and the directory its program starts in."""

    name: str
    python: Path
    folder: Path
    armed: bool
    governed: bool


@dataclass(frozen=True)
class Sample:
    """Seconds that one `import tensorflow` took: by the clock, and of all processors together."""

    wall: float
    cpu: float


Seconds = Callable[[Sample], float]


# ---- environments


def make_sides(folder: Path) -> tuple[Side, Side, Side]:
    plain, project = folder / "plain", folder / "project"
    plain.mkdir()
    project.mkdir()
    (project / "tfgpu.toml").write_text(POLICY)
    bare, armed = make_environment(folder / "bare", armed=False), make_environment(folder / "armed", armed=True)
    return (
        Side("bare", bare, plain, armed=False, governed=False),
        Side("hook, no file", armed, plain, armed=True, governed=False),
        Side("hook and policy", armed, project, armed=True, governed=True),
    )


def make_environment(folder: Path, *, armed: bool) -> Path:
    """An environment that borrows our site-packages. Both kinds have as many `.pth` files to read.

    Returns:
        Its interpreter.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site_packages = next(folder.glob("lib/python3*/site-packages"))
    (site_packages / "borrowed.pth").write_text("".join(f"{path}\n" for path in library_folders()))
    startup = Path(tfenv.__file__).parent / "startup"
    if armed:
        shutil.copy(startup / "tfenv.pth", site_packages)
        shutil.copy(startup / "boot.py", site_packages / "_tfenv_boot.py")
    else:
        (site_packages / "tfenv.pth").write_text("import sys\n")
    compileall.compile_dir(site_packages, quiet=2)
    return folder / "bin" / "python"


def library_folders() -> list[str]:
    """Where this interpreter gets tensorflow and tfenv from."""
    found = importlib.util.find_spec("tensorflow")
    if found is None or found.origin is None:
        raise SystemExit(
            "this Python has no TensorFlow: run `make venv`, then .venv/bin/python benchmarks/import_tf.py"
        )
    return [os.path.dirname(os.path.dirname(path)) for path in (found.origin, tfenv.__file__)]


def environment(folder: Path) -> dict[str, str]:
    """Without what would change the import, with an empty user layer."""
    ours = ("TFGPU_", "PYTHON", "TF_", "COVERAGE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "XDG_CONFIG_HOME": str(folder), "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}


# ---- measuring


def measure(side: Side) -> Sample:
    done = run(side, "-c", PROBE)
    result = json.loads(done.stdout)
    if (result["armed"], result["governed"]) != (side.armed, side.governed):
        raise SystemExit(f'"{side.name}" is not what it should be: {result}; is there a policy in /etc/tfgpu?')
    return Sample(result["wall"], result["cpu"])


def run(side: Side, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(side.python), *arguments]
    variables = environment(side.folder.parent / "no-user-files")
    done = subprocess.run(command, cwd=side.folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done


def measure_all(sides: Sequence[Side], rounds: int) -> dict[str, list[Sample]]:
    """Each round runs every side once, beginning with another one: what slows the machine down slows all of them."""
    for side in sides:
        measure(side)  # warms the disk's cache, and writes bytecode where it is missing
    samples: dict[str, list[Sample]] = {side.name: [] for side in sides}
    for number in range(rounds):
        start = number % len(sides)
        for side in (*sides[start:], *sides[:start]):
            samples[side.name].append(measure(side))
        print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return samples


# ---- reporting


def report(samples: Mapping[str, Sequence[Sample]]) -> None:
    bare = samples["bare"]
    print(f"{'':16}{'wall ms':>10}{'ratio':>8}{'paired':>8}{'CPU ms':>10}{'ratio':>8}{'paired':>8}")
    for name, taken in samples.items():
        cells = (cell for seconds in (wall, cpu) for cell in cells_of(seconds, taken, bare))
        print(f"{name:16}{''.join(cells)}")
    print("\nMedians. ratio: of the medians; paired: the median of the ratios within each round.")
    added = paired(cpu, samples["hook and policy"], bare) - 1
    print(f"A policy adds {added:+.1%} of processor time to the import; the bar is {BAR:.0%}.")


def wall(sample: Sample) -> float:
    return sample.wall


def cpu(sample: Sample) -> float:
    return sample.cpu


def cells_of(seconds: Seconds, taken: Sequence[Sample], bare: Sequence[Sample]) -> tuple[str, str, str]:
    own, theirs = (median(map(seconds, side)) for side in (taken, bare))
    return f"{own * 1000:10.0f}", f"{own / theirs:8.3f}", f"{paired(seconds, taken, bare):8.3f}"


def paired(seconds: Seconds, taken: Sequence[Sample], bare: Sequence[Sample]) -> float:
    return median(seconds(own) / seconds(theirs) for own, theirs in zip(taken, bare, strict=True))


def report_bytecode() -> None:
    """Without bytecode an import takes more than three times as long, and ratios mean something else."""
    present = {name: has_bytecode(name) for name in ("tensorflow", "keras", "tfenv")}
    print("Bytecode: " + ", ".join(f"{name} {'present' if there else 'MISSING'}" for name, there in present.items()))


def has_bytecode(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.cached is not None and os.path.exists(spec.cached)


def report_modules(bare: Side, governed: Side) -> None:
    """What the policy's side imports and the bare side does not, with each module's own time, largest first."""
    known = import_times(bare)
    added = {name: time for name, time in import_times(governed).items() if name not in known}
    print(f"{len(added)} modules are imported because of the policy, {sum(added.values()) / 1000:.1f} ms:")
    for name, time in sorted(added.items(), key=lambda item: -item[1]):
        print(f"{time / 1000:8.2f} ms  {name}")


def import_times(side: Side) -> dict[str, int]:
    """Microseconds of each module's own code, in one process."""
    matches = map(_IMPORT_TIME.match, run(side, "-X", "importtime", "-c", PROBE).stderr.splitlines())
    return {match["name"]: int(match["own"]) for match in matches if match}


def main() -> None:
    parser = argparse.ArgumentParser(description="What a policy adds to `import tensorflow`.")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="processes of each kind (20)")
    parser.add_argument(
        "--modules", action="store_true", help="instead: which modules a policy imports, and their time"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tfgpu-bench-") as folder:
        sides = make_sides(Path(folder))
        if args.modules:
            measure_all(sides, 0)
            report_modules(sides[0], sides[2])
        else:
            report(measure_all(sides, args.rounds))
    report_bytecode()


if __name__ == "__main__":
    main()
