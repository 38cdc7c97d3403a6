"""`tfgpu slurm`: what Slurm runs before and after each task."""

from __future__ import annotations

import argparse
import os

from tfenv.cli.output import OK, add_description, print_message
from tfenv.deploy.task_prolog import FOLDER, format_task_prolog

_PROLOG = "Print what gives each task the policy file of its partition."
_EXIT_CODES = "Exit codes: 0 always, as Slurm lets a task fail otherwise, 2 wrong usage."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(parser, f"Call it from the script that you name in slurm.conf. {_EXIT_CODES}")
    actions = parser.add_subparsers(title="for slurm.conf", metavar="ACTION", dest="action", required=True)
    prolog = actions.add_parser("task-prolog", help=_PROLOG, description=f"{_PROLOG} {_EXIT_CODES}")
    prolog.add_argument(
        "--folder", metavar="DIR", default=FOLDER, help="Read the files PARTITION.toml in this directory (%(default)s)."
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line. Whatever happens, no task fails because of it."""
    try:
        print_task_prolog(arguments.folder)
    except Exception as error:  # noqa: BLE001 - a task is worth more than its policy file
        print_message(f"slurm {arguments.action}", str(error) or type(error).__name__)
    return OK


def print_task_prolog(folder: str = FOLDER) -> None:
    """Print the lines for Slurm, all or none of them.

    Args:
        folder: Where the files of the partitions are.

    Raises:
        ValueError: This is no task of Slurm's.
    """
    lines = format_task_prolog(os.environ, folder)
    print("\n".join(lines), end="\n" if lines else "")
