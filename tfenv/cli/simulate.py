"""`tfgpu simulate`: run a command on GPUs that are not there, and say what it asked the driver for."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tfenv.cli.output import FINDINGS, NOT_EXECUTABLE, NOT_FOUND, USAGE, say
from tfenv.errors import TfenvError, escape_for_terminal
from tfenv.policy.units import format_bytes
from tfenv.simulate.driver_requests import (
    DriverRequest,
    GpuRequestTotals,
    find_cuda_processes,
    read_requests,
    summarise_requests,
)
from tfenv.simulate.environment import SimulatedGpu, build_environment, parse_gpus
from tfenv.values import as_dict

if TYPE_CHECKING:
    from tfenv.cli.output import SubParsers

__all__ = ["add_parser", "run"]

_MEANINGLESS = "Kernels do not compute on simulated GPUs: the numbers the command printed are meaningless."
#: In a file or a pipe nothing is cut off or wrapped: people search it.
_FILE_WIDTH = 200
#: What a terminal, a scheduler or a service manager sends to end a command.
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_WATCHED = (*_FORWARDED, signal.SIGCHLD)


def add_parser(subparsers: SubParsers) -> None:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "simulate",
        help="run a command on simulated GPUs",
        description="Run a command on GPUs that are not there: real TensorFlow lists them, allocates on them, "
        "and every request to the driver is written down. " + _MEANINGLESS,
        usage="tfgpu simulate [--gpus 4x24GiB] [--log FILE] [--processes FILE] [--format text|json] -- CMD ...",
    )
    parser.add_argument(
        "--gpus", type=_gpus, default="4x24GiB", metavar="GPUS",
        help='which GPUs: "4x24GiB" (the default), "2x24GiB:NVIDIA A100,1x80GiB"; split into MIG instances: '
        '"1x80GiB/mig=1x40GiB+2x20GiB"',
    )  # fmt: skip
    parser.add_argument("--log", type=Path, metavar="FILE", help="write each request as a JSON line")
    parser.add_argument(
        "--processes", type=_readable, metavar="FILE",
        help='memory that other processes hold, one "<gpu> <pid> <MiB>" a line; of an instance "<gpu>:<instance> …"',
    )  # fmt: skip
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of the summary, on stderr")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD", help="what to run, with its arguments")


def _gpus(text: str) -> tuple[SimulatedGpu, ...]:
    try:
        return parse_gpus(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _readable(text: str) -> Path:
    try:
        with open(text, "rb"):
            return Path(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text}: {error.strerror}") from error


def run(args: argparse.Namespace) -> int:
    """Run the command; its own exit code, 128+n if signal n ended it, 127 if there is no such command."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        say("simulate", "no command given; write: tfgpu simulate --gpus 4x24GiB -- python train.py")
        return USAGE
    with tempfile.TemporaryDirectory(prefix="tfgpu-simulate-") as folder:
        log = args.log or Path(folder) / "requests.jsonl"
        try:
            log.write_bytes(b"")  # an older log would be summed up as well
            variables = build_environment(args.gpus, log=log, processes=args.processes)
        except (OSError, TfenvError) as error:
            _complain(str(error))
            return FINDINGS
        code = _run_command(command, variables)
        if code not in (NOT_EXECUTABLE, NOT_FOUND):
            _report(args.gpus, read_requests(log), args.format)
    return code


def _complain(text: str) -> None:
    """A compiler's output, which has lines of its own, follows in the lines below."""
    first, _, others = text.partition("\n")
    say("simulate", first)
    for line in others.splitlines():
        print(escape_for_terminal(line), file=sys.stderr)


# ---- the command


def _run_command(command: Sequence[str], variables: dict[str, str]) -> int:
    """Start it, hand signals on, wait for its end."""
    # Blocked before there is a child: a signal that comes meanwhile would end us, and leave it behind.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        code = _wait(subprocess.Popen(command, env=variables, preexec_fn=unblock))  # noqa: PLW1509 - no threads here
    except FileNotFoundError:
        say("simulate", f'command not found: "{command[0]}"')
        return NOT_FOUND
    except OSError as error:
        say("simulate", f'cannot run "{command[0]}": {error.strerror}')
        return NOT_EXECUTABLE
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return code if code >= 0 else 128 - code


def _wait(child: subprocess.Popen[bytes]) -> int:
    while (code := child.poll()) is None:
        received = signal.sigwaitinfo(_WATCHED)
        # A key on the terminal reaches the command by itself (the kernel sends it, si_code > 0): passing
        # it on would interrupt the command twice.
        if received.si_signo in _FORWARDED and received.si_code <= 0:
            child.send_signal(received.si_signo)
    return code


# ---- the summary


def _report(gpus: Sequence[SimulatedGpu], requests: Sequence[DriverRequest], form: str) -> None:
    summary = summarise_requests(requests)
    rows = [summary.get(number, GpuRequestTotals(number)) for number in range(len(gpus))]
    opened = find_cuda_processes(requests)
    if form == "json":
        print(json.dumps(_as_json(gpus, rows, opened)), file=sys.stderr)
    else:
        _print_table(gpus, rows, opened)


def _as_json(
    gpus: Sequence[SimulatedGpu], rows: Sequence[GpuRequestTotals], opened: frozenset[int]
) -> dict[str, object]:
    described = [
        {**as_dict(row), "name": gpu.name, "memory": gpu.memory} for gpu, row in zip(gpus, rows, strict=True)
    ]  # fmt: skip
    return {"gpus": described, "processes_with_cuda": sorted(opened), "note": _MEANINGLESS}


def _print_table(gpus: Sequence[SimulatedGpu], rows: Sequence[GpuRequestTotals], opened: frozenset[int]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="What the simulated driver was asked for", title_justify="left", box=None)
    table.add_column("GPU", justify="right", no_wrap=True, min_width=3)
    table.add_column("name")
    for title in ("memory", "peak", "one process", "first", "requests", "refused"):
        table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
    for gpu, row in zip(gpus, rows, strict=True):
        table.add_row(str(row.gpu), Text(escape_for_terminal(gpu.name)), format_bytes(gpu.memory), *_cells(row))
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(table)
    if not opened:
        console.print("No process opened CUDA.")
    console.print(_MEANINGLESS)


def _cells(row: GpuRequestTotals) -> tuple[str, ...]:
    sizes = (row.peak, row.peak_process, row.first)
    counts = (row.allocations, row.out_of_memory)
    return (*("-" if not size else format_bytes(size) for size in sizes), *map(str, counts))
