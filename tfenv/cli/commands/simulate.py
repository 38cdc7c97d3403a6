"""`tfgpu simulate`: run a command on simulated GPUs, and print what it asked the driver for."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tfenv.cli.output import FINDINGS, NOT_EXECUTABLE, NOT_FOUND, USAGE, add_description, print_error, print_message
from tfenv.cli.tables import TableColumn, build_table, print_renderable
from tfenv.errors import TfenvError, escape_for_terminal
from tfenv.policy.units import format_bytes
from tfenv.simulate.driver_requests import (
    DriverRequest,
    GpuRequestTotals,
    find_cuda_processes,
    read_requests,
    summarise_requests,
)
from tfenv.simulate.environment import SimulatedGpu, build_environment, parse_gpus, parse_size
from tfenv.simulate.shared import SharedMachineError, create_machine, open_machine
from tfenv.values import as_dict, replace

_MEANINGLESS = "Kernels do not compute on simulated GPUs: the numbers the command printed are meaningless."
_UNSUPPORTED = "The command failed. Convolutions, FFT and linear algebra fail on simulated GPUs."
_DEFAULT_GPUS = "4x24GiB"
_COLUMNS = (
    TableColumn("GPU", is_number=True), TableColumn("name"), TableColumn("memory", is_number=True),
    *(TableColumn(title, is_number=True) for title in ("peak", "one process", "first", "requests", "refused")),
)  # fmt: skip
#: What a terminal, a scheduler or a service manager sends to end a command.
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_WATCHED = (*_FORWARDED, signal.SIGCHLD)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(
        parser,
        "Real TensorFlow, JAX and PyTorch list them and allocate on them, and every request to the driver is logged. "
        "Nothing is computed on them, so the numbers that the command prints have no meaning. The exit code is the "
        "command's own. Exit codes: 1 the GPUs cannot be simulated here, 2 wrong usage, 126 the command cannot be run, "
        "127 it does not exist.",
    )
    parser.usage = (
        "tfgpu simulate [--gpus 4x24GiB] [--reserved SIZE] [--context SIZE] [--cgroup-limits dmem|misc] "
        "[--shared FOLDER | --log FILE] [--processes FILE] [--format text|json] -- CMD ..."
    )
    parser.add_argument(
        "--gpus", type=_parse_gpus, metavar="GPUS",
        help='Set the number, size and name of the GPUs: "4x24GiB" (the default), "2x24GiB:NVIDIA A100,1x80GiB". '
        'Split one into MIG instances with "1x80GiB/mig=1x40GiB+2x20GiB".',
    )  # fmt: skip
    parser.add_argument(
        "--reserved", type=_parse_size, default=0, metavar="SIZE",
        help="Keep this much of each GPU for the driver. An H100 keeps 480MiB. The default is nothing.",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=_parse_size, default=0, metavar="SIZE",
        help="Charge each process this much for opening a GPU. On an H100 it is 520MiB. The default is nothing.",
    )  # fmt: skip
    parser.add_argument(
        "--cgroup-limits", default="none", metavar="dmem|misc",
        help='Keep memory limits for cgroups, as drivers from release 615 on do. The kernel counts with "dmem", and '
        'the driver with "misc". With "dmem/2" only cgroups down to that depth can have a limit. The default is none.',
    )  # fmt: skip
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--shared", type=Path, metavar="FOLDER",
        help="Share the GPUs with the other users of this folder. Make the folder as root, with --gpus. "
        "Then everybody joins without --gpus.",
    )  # fmt: skip
    place.add_argument("--log", type=Path, metavar="FILE", help="Write each request to this file, as a line of JSON.")
    parser.add_argument(
        "--processes", type=_parse_readable_file, metavar="FILE",
        help='Read from this file what other processes hold. Write "GPU PID MIB" on each line, or '
        '"GPU:INSTANCE PID MIB" for a MIG instance.',
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="Set the format of the summary on stderr."
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD", help="Run this command with its arguments.")


def _parse_gpus(text: str) -> tuple[SimulatedGpu, ...]:
    try:
        return parse_gpus(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _parse_size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _parse_readable_file(text: str) -> Path:
    try:
        with open(text, "rb"):
            return Path(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text}: {error.strerror}") from error


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    changes = {"reserved": arguments.reserved, "context": arguments.context, "cgroup_limits": arguments.cgroup_limits}
    is_described = arguments.gpus is not None or arguments.reserved or arguments.context
    is_described = is_described or arguments.cgroup_limits != SimulatedGpu.cgroup_limits
    try:
        gpus = [replace(gpu, **changes) for gpu in arguments.gpus or parse_gpus(_DEFAULT_GPUS)]
    except ValueError as error:
        print_message("simulate", str(error))
        return USAGE
    if not command:
        print_message("simulate", "no command given; write: tfgpu simulate --gpus 4x24GiB -- python train.py")
        return USAGE
    if arguments.shared is not None:
        described = gpus if is_described else None
        return simulate_shared_gpus(command, arguments.shared, described, arguments.processes, arguments.format)
    return simulate_gpus(command, gpus, arguments.log, arguments.processes, arguments.format)


def simulate_gpus(
    command: Sequence[str],
    gpus: Sequence[SimulatedGpu],
    log: Path | None,
    processes: Path | None,
    output_format: str,
) -> int:
    """Run a command on simulated GPUs, and print on stderr what the driver was asked for.

    Args:
        command: What to run, with its arguments.
        gpus: The GPUs that it finds.
        log: Where each request is written as a line of JSON. None: nowhere.
        processes: A file with the memory that other processes hold. None: they hold none.
        output_format: "text" or "json", of what is printed.

    Returns:
        The command's own exit code, 128+n if signal n ended it. 1 if there is no simulation, 2 if the log cannot be
        written, 127 if there is no such command, 126 if it cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="tfgpu-simulate-") as folder:
        log = log or Path(folder) / "requests.jsonl"
        try:
            log.write_bytes(b"")  # an older log would be summed up as well
        except OSError as error:
            print_message("simulate", f"cannot write {log}: {error.strerror}")
            return USAGE
        try:
            variables = build_environment(gpus, log=log, processes=processes)
        except (OSError, TfenvError) as error:
            return _print_failure(error)
        code = _run_command(command, variables)
        if code not in (NOT_EXECUTABLE, NOT_FOUND):
            _print_report(gpus, read_requests(log), output_format, code)
    return code


def simulate_shared_gpus(
    command: Sequence[str],
    folder: Path,
    gpus: Sequence[SimulatedGpu] | None,
    processes: Path | None,
    output_format: str,
) -> int:
    """Run a command on a simulated machine that several users share.

    Args:
        command: What to run, with its arguments.
        folder: The folder of the machine.
        gpus: Make the machine with these GPUs first. None: it exists.
        processes: A file that replaces the machine's own list of memory that other processes hold.
        output_format: "text" or "json", of what is printed.

    Returns:
        As for `simulate_gpus`. 2 if the folder is not fit for it.
    """
    try:
        if gpus is not None:
            create_machine(folder, gpus)
        machine = open_machine(folder)
        before = machine.log.read_bytes().count(b"\n")
    except SharedMachineError as error:
        print_message("simulate", str(error))
        return USAGE
    except (OSError, TfenvError) as error:
        return _print_failure(error)
    code = _run_command(command, machine.build_environment(processes))
    if code not in (NOT_EXECUTABLE, NOT_FOUND):
        try:
            requests = read_requests(machine.log)[before:]
        except (OSError, ValueError) as error:  # everybody can write there
            print_message("simulate", f"there is no summary: {error}")
        else:
            _print_report(machine.gpus, requests, output_format, code, " by everybody since the command started")
    return code


def _print_failure(error: Exception) -> int:
    first, *others = str(error).splitlines()  # a compiler's output has lines of its own
    print_message("simulate", first)
    for line in others:
        print_error(escape_for_terminal(line))
    return FINDINGS


# ---- the command


def _run_command(command: Sequence[str], variables: dict[str, str]) -> int:
    """Start a command, hand signals on to it, and wait for its end. Return its exit code."""
    # Blocked before there is a child: a signal that comes meanwhile would end us, and leave it behind.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        code = _wait_for_child(subprocess.Popen(command, env=variables, preexec_fn=unblock))  # noqa: PLW1509 - no threads here
    except FileNotFoundError:
        print_message("simulate", f'command not found: "{command[0]}"')
        return NOT_FOUND
    except OSError as error:
        print_message("simulate", f'cannot run "{command[0]}": {error.strerror}')
        return NOT_EXECUTABLE
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return code if code >= 0 else 128 - code


def _wait_for_child(child: subprocess.Popen[bytes]) -> int:
    while (code := child.poll()) is None:
        received = signal.sigwaitinfo(_WATCHED)
        # A key on the terminal reaches the command by itself (the kernel sends it, si_code > 0): passing
        # it on would interrupt the command twice.
        if received.si_signo in _FORWARDED and received.si_code <= 0:
            child.send_signal(received.si_signo)
    return code


# ---- the summary


def _print_report(
    gpus: Sequence[SimulatedGpu], requests: Sequence[DriverRequest], output_format: str, code: int, asked_by: str = ""
) -> None:
    from rich.console import Group

    summary, opened = summarise_requests(requests), find_cuda_processes(requests)
    rows = [(gpu, summary.get(number, GpuRequestTotals(number))) for number, gpu in enumerate(gpus)]
    if output_format == "json":
        described = [{**as_dict(row), "name": gpu.name, "memory": gpu.memory} for gpu, row in rows]
        print_error(json.dumps({"gpus": described, "processes_with_cuda": sorted(opened), "note": _MEANINGLESS}))
        return
    table = build_table(_COLUMNS, (_format_row(gpu, row) for gpu, row in rows))
    notes = [_MEANINGLESS] if opened else ["No process opened CUDA.", _MEANINGLESS]
    if code:
        notes.append(_UNSUPPORTED)
    print_renderable(Group(f"[italic]What the simulated driver was asked for{asked_by}[/]", table, *notes), sys.stderr)


def _format_row(gpu: SimulatedGpu, row: GpuRequestTotals) -> tuple[str, ...]:
    sizes = ("-" if not size else format_bytes(size) for size in (row.peak, row.peak_process, row.first))
    return (str(row.gpu), gpu.name, format_bytes(gpu.memory), *sizes, str(row.allocations), str(row.out_of_memory))
