"""Run train.py twice, without and with the policy beside it, and show what TensorFlow took of each GPU.

Use the machine's GPUs if they are idle, and simulated ones otherwise. Exit codes: 0 the policy was kept, 1 it was
not, or there is nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli
from rich import box
from rich.console import Console
from rich.table import Table

from tfenv.devices.inventory import read_inventory
from tfenv.errors import TfenvError
from tfenv.policy.units import MIB, format_bytes, parse_limit
from tfenv.simulate.driver_requests import read_requests, summarise_requests
from tfenv.simulate.environment import build_environment, parse_gpus

FOLDER = Path(__file__).resolve().parent
SIMULATED_GPUS = "4x24GiB"
#: NVML counts the CUDA context and the libraries' handles too, which are no part of the allocator's limit.
CONTEXT_ALLOWANCE = 1024 * MIB
#: A card of which others use more than this share is left alone: without a policy TensorFlow takes all that is free.
IDLE_SHARE = 0.05
SAMPLE_SECONDS = 0.05
#: What would change the policy or TensorFlow's own behaviour behind the comparison's back.
DISTURBING = (
    "TFGPU_CONFIG",
    "TFGPU_SITE_CONFIG",
    "TFGPU_DISABLE",
    "TFGPU_RUN",
    "TFGPU_GRANT",
    "TFGPU_SUMMARY_SHOWN",
    "TFGPU_AUDIT_COMPLAINED",
)
DISTURBING_PREFIXES = ("TF_",)
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}


@dataclass(frozen=True)
class Run:
    """One run of train.py: how it ended, what it printed, and the bytes it took of each GPU, by the GPU's number."""

    status: int
    output: str
    taken: Mapping[int, int]


@dataclass(frozen=True)
class Machine:
    """The GPUs of the comparison, real or simulated.

    Attributes:
        title: Names them to the reader.
        gpus: Name and memory in bytes of each, by its number.
        allowance: Bytes beyond the limit that are not TensorFlow's allocator's.
        train: Runs train.py with more environment variables.
    """

    title: str
    gpus: Mapping[int, tuple[str, int]]
    allowance: int
    train: Callable[[Mapping[str, str]], Run]


def inherited() -> dict[str, str]:
    """This process's environment without what would disturb the comparison."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in DISTURBING and not name.startswith(DISTURBING_PREFIXES)
    }
    return {**kept, **QUIET}


def start(variables: Mapping[str, str], output: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "train.py"]
    return subprocess.Popen(command, cwd=FOLDER, env=variables, stdout=output, stderr=output)


# ---- simulated GPUs


def simulated_machine() -> Machine:
    gpus = {number: (gpu.name, gpu.memory) for number, gpu in enumerate(parse_gpus(SIMULATED_GPUS))}
    return Machine(f"{SIMULATED_GPUS}, simulated", gpus, 0, train_simulated)


def train_simulated(variables: Mapping[str, str]) -> Run:
    """The simulated driver writes down each request: what it gave away is what TensorFlow took."""
    base = {name: value for name, value in inherited().items() if not name.startswith("CUDA_")}
    with tempfile.TemporaryDirectory(prefix="tfgpu-demo-") as folder:
        log = Path(folder) / "requests.jsonl"
        with (Path(folder) / "output").open("w+b") as output:
            child = start(
                {**build_environment(parse_gpus(SIMULATED_GPUS), log=log, base=base), **variables}, output.fileno()
            )
            status = child.wait()
            said = read_back(Path(output.name))
        taken = {gpu: requests.peak_process for gpu, requests in summarise_requests(read_requests(log)).items()}
    return Run(status, said, taken)


def read_back(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


# ---- real GPUs


def real_machine() -> Machine | str:
    """The machine's GPUs; a sentence that says why not, if there are none or they are in use."""
    inventory = read_inventory()
    if not inventory.devices:
        return f"This machine shows no GPU ({inventory.problem or 'NVML lists none'})."
    gpus = {device.index: (device.name, device.total) for device in inventory.devices}
    busy = [number for number, used in memory_in_use().items() if used > IDLE_SHARE * gpus[number][1]]
    if busy:
        numbers = ", ".join(map(str, busy))
        return f"GPU {numbers} is in use, and without a policy TensorFlow would take all that is left of it."
    return Machine(f"{len(gpus)} GPU(s) of this machine", gpus, CONTEXT_ALLOWANCE, train_real)


def memory_in_use() -> dict[int, int]:
    """Bytes in use on each GPU, by whomever."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return {number: pynvml.nvmlDeviceGetMemoryInfo(handle).used for number, handle in enumerate(handles)}
    finally:
        pynvml.nvmlShutdown()


def memory_of(pid: int) -> dict[int, int]:
    """Bytes NVML says the process uses on each GPU where it lists it. Containers often hide process ids."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return {
            number: process.usedGpuMemory
            for number, handle in enumerate(handles)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            if process.pid == pid and process.usedGpuMemory
        }
    finally:
        pynvml.nvmlShutdown()


def train_real(variables: Mapping[str, str]) -> Run:
    """Samples NVML while train.py runs: by its process id; where ids are hidden, by what came on top of before."""
    before = memory_in_use()
    by_process: dict[int, int] = {}
    on_top: dict[int, int] = {}
    with tempfile.NamedTemporaryFile(prefix="tfgpu-demo-") as output:
        child = start({**inherited(), **variables}, output.fileno())
        while child.poll() is None:
            raise_to(by_process, memory_of(child.pid))
            raise_to(on_top, {gpu: used - before[gpu] for gpu, used in memory_in_use().items() if used > before[gpu]})
            time.sleep(SAMPLE_SECONDS)
        said = read_back(Path(output.name))
    return Run(child.returncode, said, by_process or on_top)


def raise_to(peaks: dict[int, int], sample: Mapping[int, int]) -> None:
    for gpu, size in sample.items():
        peaks[gpu] = max(peaks.get(gpu, 0), size)


# ---- the comparison


def compare(machine: Machine, without: Run, governed: Run) -> list[str]:
    """What is wrong with the two runs; [] when the policy was kept and there was something to keep."""
    if without.status or governed.status:
        return [f"train.py failed:\n{(without if without.status else governed).output}"]
    if not any(without.taken.values()) or not any(governed.taken.values()):
        return ["TensorFlow took no memory of any GPU: there is nothing to compare."]
    count, limit = declared()
    touched = sorted(gpu for gpu, size in governed.taken.items() if size)
    problems = [
        f"GPU {gpu}: {format_bytes(governed.taken[gpu])} taken, {format_bytes(limit)} allowed."
        for gpu in touched
        if governed.taken[gpu] > limit + machine.allowance
    ]
    if len(touched) > count:
        problems.append(f"{len(touched)} GPUs used, {count} allowed.")
    return problems


def declared() -> tuple[int, int]:
    """How many GPUs the policy beside us allows, and how many bytes of each."""
    gpu = tomli.loads((FOLDER / "tfgpu.toml").read_text(encoding="utf-8"))["gpu"]
    limit = parse_limit(gpu["memory_limit"]).bytes
    assert limit is not None, "the demonstration's limit is a size"
    return len(gpu["visible_devices"]), limit


def show(console: Console, machine: Machine, without: Run, governed: Run) -> None:
    console.print(f"What TensorFlow took ({machine.title})", style="bold")
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("GPU", "name", "memory", "without a policy", "with tfgpu.toml"):
        table.add_column(column, justify="left" if column == "name" else "right")
    for number, (name, memory) in machine.gpus.items():
        sizes = (run.taken.get(number, 0) for run in (without, governed))
        table.add_row(str(number), name, format_bytes(memory), *(format_bytes(size) if size else "-" for size in sizes))
    console.print(table)
    if machine.allowance:
        console.print("NVML counts the CUDA context and the libraries' handles as well, a few hundred MiB a process.")


def line_of(run: Run) -> str:
    """The one line that tfenv says."""
    return next((line for line in run.output.splitlines() if line.startswith("tfgpu: ")), "")


def choose(args: argparse.Namespace, console: Console) -> Machine:
    machine = "You asked for simulated GPUs." if args.simulated else real_machine()
    if isinstance(machine, Machine):
        return machine
    if args.real:
        raise TfenvError(machine)
    console.print(f"{machine}\nTensorFlow runs on simulated GPUs.")
    return simulated_machine()


def run_both(machine: Machine, console: Console, *, real: bool) -> tuple[Machine, Run, Run]:
    console.print("Training without a policy (TFGPU_DISABLE=1) ...")
    without = machine.train({"TFGPU_DISABLE": "1"})
    if machine.allowance and not without.taken and not without.status and not real:
        console.print("TensorFlow sees no GPU, because CUDA is missing. Trying simulated GPUs ...")
        machine = simulated_machine()
        without = machine.train({"TFGPU_DISABLE": "1"})
    console.print("Training again, with tfgpu.toml ...")
    return machine, without, machine.train({})


def demonstrate(args: argparse.Namespace, console: Console) -> int:
    machine, without, governed = run_both(choose(args, console), console, real=args.real)
    console.print(f"\n{line_of(governed)}\n", highlight=False, markup=False)
    show(console, machine, without, governed)
    problems = compare(machine, without, governed)
    for problem in problems:
        console.print(problem, highlight=False, markup=False)
    if problems:
        console.print("The policy was not kept. To find out why, run:")
        console.print(f"  {name_command('doctor')}", soft_wrap=True)
    else:
        console.print("The policy was kept. To see what was applied, run:")
        console.print(f"  {name_command('audit', '--project', shorten(FOLDER))}", soft_wrap=True)
    if args.figures:
        write_figures(args.figures, machine, without, governed)
    return 1 if problems else 0


def name_command(*arguments: str) -> str:
    """Return a `tfgpu` command that works as typed in the working directory, whatever PATH is."""
    # The link of a virtual environment is not resolved: `tfgpu` is beside it.
    script = Path(sys.executable).with_name("tfgpu")
    command = [shorten(script)] if script.exists() else [shorten(Path(sys.executable)), "-m", "tfenv"]
    return shlex.join([*command, *arguments])


def shorten(path: Path) -> str:
    """Return the path as it is typed in the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def write_figures(path: Path, machine: Machine, without: Run, governed: Run) -> None:
    """Write the table as JSON, with sizes in bytes."""
    figures = [
        {"gpu": gpu, "memory": memory, "without": without.taken.get(gpu, 0), "governed": governed.taken.get(gpu, 0)}
        for gpu, (_, memory) in machine.gpus.items()
    ]
    path.write_text(json.dumps(figures), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Show what TensorFlow takes of each GPU without and with tfgpu.toml.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--simulated", action="store_true", help="Use simulated GPUs.")
    which.add_argument("--real", action="store_true", help="Use the machine's GPUs, or fail.")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="Write the table to FILE as JSON, too.")
    args = parser.parse_args(argv)
    console = Console(highlight=False)
    try:
        return demonstrate(args, console)
    except TfenvError as error:
        console.print(str(error), markup=False)
        return 1


if __name__ == "__main__":
    sys.exit(main())
