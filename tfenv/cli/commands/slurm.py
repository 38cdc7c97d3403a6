"""`tfgpu slurm`: what Slurm runs before and after each task."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from tfenv.cli.output import OK, add_description, print_message
from tfenv.deploy.slurm_step import BATCH, SlurmStep, find_step
from tfenv.deploy.task_prolog import FOLDER, format_task_prolog

_PROLOG = "Print what gives each task the policy file of its partition."
_EPILOG = "Print a line on what the job or the step did with its GPUs."
#: Between the nodes of a job that share a log.
_CLOCK_DIFFERENCE_S = 60
_EXIT_CODES = "Exit codes: 0 always, as Slurm lets a task fail otherwise, 2 wrong usage."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(parser, f"Call it from the scripts that you name in slurm.conf. {_EXIT_CODES}")
    actions = parser.add_subparsers(title="for slurm.conf", metavar="ACTION", dest="action", required=True)
    prolog = actions.add_parser("task-prolog", help=_PROLOG, description=f"{_PROLOG} {_EXIT_CODES}")
    prolog.add_argument(
        "--folder", metavar="DIR", default=FOLDER, help="Read the files PARTITION.toml in this directory (%(default)s)."
    )
    actions.add_parser(
        "task-epilog",
        help=_EPILOG,
        description=f"{_EPILOG} It goes to stderr, which Slurm shows to the user. {_EXIT_CODES}",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line. Whatever happens, no task fails because of it."""
    try:
        if arguments.action == "task-prolog":
            print_task_prolog(arguments.folder)
        else:
            print_task_epilog()
    except Exception as error:  # noqa: BLE001 - a task is worth more than its policy file, or a line about it
        print_message(f"slurm {arguments.action}", str(error) or type(error).__name__)
    return OK


def print_task_prolog(folder: str = FOLDER) -> None:
    """Print the lines for Slurm, all or none of them.

    Args:
        folder: Where the files of the partitions are.

    Raises:
        ValueError: This is not a task of Slurm's.
    """
    lines = format_task_prolog(os.environ, folder)
    print("\n".join(lines), end="\n" if lines else "")


def print_task_epilog() -> None:
    """Print what the job did if its batch script ends, or what a step did if its last task on this node ends.

    Nothing is printed where Slurm gave no GPUs, or where no process used one under a policy.

    Raises:
        ValueError: This is not a task of Slurm's.
        OSError: A log cannot be read.
    """
    if not os.environ.get("SLURM_JOB_ID"):
        raise ValueError("SLURM_JOB_ID is not set; name this command in Slurm's TaskEpilog")
    if _read_gpu_count(os.environ) == 0:
        return
    step = find_step(os.environ)
    if step.is_last_task:
        for line in _format_report(os.environ, step):
            print_message(None, line)


def _read_gpu_count(environ: Mapping[str, str]) -> int:
    from tfenv.launchers.slurm import LAUNCHER

    return len(LAUNCHER.read_devices(environ) or ()) if LAUNCHER.read_devices is not None else 0


def _format_report(environ: Mapping[str, str], step: SlurmStep) -> tuple[str, ...]:
    """Return the lines on a job, or on one of its steps. (): no process of it used a GPU under a policy."""
    from tfenv.audit.job_names import format_step, read_job
    from tfenv.audit.job_report import format_job_lines, make_job_report
    from tfenv.audit.query import RecordQuery, parse_moment, read_records
    from tfenv.cli.own_logs import find_logs
    from tfenv.launchers.slurm import LAUNCHER
    from tfenv.pipeline import current_start
    from tfenv.values import replace

    described = LAUNCHER.read_job(environ) if LAUNCHER.read_job is not None else {}
    described.pop("step", None)
    wanted = {"id": described["id"]}
    if step.name != BATCH:
        described["step"] = wanted["step"] = step.name
    # A number comes again after a while, and in another cluster that has the same home directories.
    since = "" if step.seconds is None else parse_moment(f"{step.seconds + _CLOCK_DIFFERENCE_S:.0f}s")
    # The job's programs ran without Python's -I, which this command may have.
    logs, tally = find_logs(None, replace(current_start(), isolated=False))
    records = read_records(logs, RecordQuery(jobs=frozenset({wanted["id"]}), since=since), tally)
    own = (record for record in records if wanted.items() <= read_job(record).items())
    report = make_job_report(format_step(described), own)
    return format_job_lines(report) if report.processes else ()
