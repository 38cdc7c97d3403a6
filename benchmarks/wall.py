"""What looking for limits of cgroups costs at the first listing of devices. The bar is 0.1 ms outside limited cgroups.

    sudo python benchmarks/wall.py [--rounds N] [--looks N] [--gpus N]

Lists simulated GPUs by NVML as a program does before its first listing, in turn with the limits looked for and without.
It does so on a driver that keeps no limits, where the kernel could count and nobody has switched that on, and by each
backend in a cgroup without a limit and in a limited one. The cgroups are as deep as systemd's:
user.slice/user-1001.slice/session-1.scope. Ratios and differences are within a round.

The limits are those of the simulated driver, which reads a file to answer. So the number of questions to the driver
stands beside the times, and what they take together. The cgroups are real, so it needs root and Linux with cgroup v2.
They are removed at the end.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from tfenv.devices.cgroups import CGROUP_ROOT
from tfenv.simulate.environment import SimulatedGpu, build_environment

REPOSITORY = Path(__file__).parents[1]
BAR_MS = 0.1
GIB = 1 << 30
#: Where the process is, the driver's backend, and whether its cgroup is limited.
SCENES = {
    "driver without limits": ("none", False),
    "dmem, switched off": ("dmem/0", False),
    "dmem, no limit": ("dmem", False),
    "misc, no limit": ("misc", False),
    "dmem, limited": ("dmem", True),
    "misc, limited": ("misc", True),
}
_NEW_MOUNTS = 0x20000  # CLONE_NEWNS
LOOK = """
import json, sys
from time import perf_counter_ns
import pynvml
from tfenv.devices import cgroups, inventory

class NoWalls:
    def __init__(self, *_):
        pass
    def read(self, handle):
        return None

def ask_and_time(*arguments):
    began = perf_counter_ns()
    try:
        return ask(*arguments)
    finally:
        questions.append((perf_counter_ns() - began) / 1e6)

looks, gpus, limited = map(int, sys.argv[1:])
readers, times, questions = {"with": cgroups.WallReader, "without": NoWalls}, [], []
ask = pynvml.nvmlDeviceGetMemoryLimits_v1
for number in range(looks):
    took = {}
    for name in sorted(readers, reverse=bool(number % 2)):
        cgroups.WallReader = readers[name]
        began = perf_counter_ns()
        devices = inventory.read_inventory().devices
        took[name] = (perf_counter_ns() - began) / 1e6
        assert len(devices) == gpus
        found = all(device.wall is not None for device in devices)
        assert found == (name == "with" and bool(limited)), "a benchmark of nothing"
    times.append((took["with"], took["without"]))
cgroups.WallReader, pynvml.nvmlDeviceGetMemoryLimits_v1 = readers["with"], ask_and_time
inventory.read_inventory()
print(json.dumps({"times": times[1:], "questions": questions}))  # the first look is not warm
"""
LIMIT = """
import sys
from tfenv.devices import cgroups, nvml
with nvml.open_nvml() as pynvml:
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        cgroups.set_limits(pynvml, handle, sys.argv[1], cgroups.CgroupLimits(hard=8 << 30))
"""


@contextmanager
def open_cgroups() -> Iterator[Path]:
    """Yield a cgroup below which cgroups can be made. Only this process sees it at /sys/fs/cgroup."""
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_MOUNTS):
        raise SystemExit("this needs root: it makes cgroups")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "cgroup2", "none", CGROUP_ROOT], check=True)
    folder = Path(CGROUP_ROOT, f"tfgpu-benchmark-{os.getpid()}")
    try:
        yield folder
    finally:
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir():
                path.rmdir()
        folder.rmdir()


def run_in(cgroup: Path, environment: Mapping[str, str], program: str, *arguments: str) -> str:
    """Run a program in a cgroup, and return what it prints."""

    def enter() -> None:
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=enter)
    return done.stdout


class Figures:
    """What was measured of a scene.

    Attributes:
        times: Milliseconds with the limits looked for and without, in pairs.
        questions: For each process the milliseconds of each question for limits, in one look.
    """

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        self.questions: list[list[float]] = []

    def format(self, *, has_bar: bool) -> str:
        """Return the figures as a line."""
        plain = median(without for _, without in self.times)
        ratio = median(used / without for used, without in self.times)
        more = median(used - without for used, without in self.times)
        driver = median(map(sum, self.questions))
        verdict = f"   {'within' if more <= BAR_MS else 'ABOVE'} the bar" if has_bar else ""
        parts = f"{len(self.questions[0])} questions take {driver:.3f}"
        return f"without {plain:6.3f}   with {plain + more:6.3f}   {more:+.3f}   ratio {ratio:.2f}   {parts}{verdict}"


def measure(rounds: int, looks: int, gpus: int) -> dict[str, Figures]:
    """Return what was measured of each scene. The scenes take turns."""
    figures = {name: Figures() for name in SCENES}
    with tempfile.TemporaryDirectory(prefix="tfgpu-wall-") as folder, open_cgroups() as root:
        environments: dict[str, dict[str, str]] = {}
        cgroups: dict[str, Path] = {}
        for number, (name, (backend, is_limited)) in enumerate(SCENES.items()):
            cgroups[name] = root / "user.slice" / f"user-{number}.slice" / "session-1.scope"
            cgroups[name].mkdir(parents=True)
            base = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)}
            cards = [SimulatedGpu(24 * GIB, cgroup_limits=backend)] * gpus
            environments[name] = build_environment(cards, log=Path(folder, str(number)), base=base)
            if is_limited:
                run_in(root, environments[name], LIMIT, str(cgroups[name].parent))
        for number in range(rounds):
            for name in sorted(SCENES, reverse=bool(number % 2)):
                is_limited = SCENES[name][1]
                said = run_in(cgroups[name], environments[name], LOOK, *map(str, (looks, gpus, int(is_limited))))
                answer = json.loads(said)
                figures[name].times += answer["times"]
                figures[name].questions.append(answer["questions"])
    return figures


def main() -> None:
    """Read the options, measure, and print a line for each scene."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--looks", type=int, default=200, help="looks in each process of a round")
    parser.add_argument("--gpus", type=int, default=1)
    arguments = parser.parse_args()
    found = measure(arguments.rounds, arguments.looks, arguments.gpus)
    print(
        f"{arguments.gpus} GPUs, {arguments.rounds} rounds of {arguments.looks} looks in turn, "
        f"milliseconds; bar: {BAR_MS} ms more outside limited cgroups"
    )
    for name, figures in found.items():
        print(f"{name:<22} {figures.format(has_bar=not SCENES[name][1])}")


if __name__ == "__main__":
    main()
