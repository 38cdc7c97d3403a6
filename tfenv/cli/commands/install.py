"""`tfgpu install --system`: cover every environment of an interpreter."""

from __future__ import annotations

import argparse
import os

from tfenv.cli.output import OK, USAGE, print_message
from tfenv.config.presence import MACHINE_ROOT
from tfenv.deploy.install import (
    NotAnInterpreterError,
    SitecustomizeChange,
    format_difference,
    plan_install,
    write_change,
)
from tfenv.lint.check import check_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Write a marked block into the sitecustomize of an interpreter. The policy then applies in every virtual "
        "environment made from it, without tfenv in it. If you install tfenv with pip, you do not need this."
    )
    add_system_options(parser)


def add_system_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `install` and `uninstall` share."""
    parser.add_argument(
        "--system", action="store_true", required=True, help="Do it for all users. There is no other way."
    )
    parser.add_argument("--python", metavar="PATH", help="The interpreter. Without it, the one that runs tfgpu.")
    parser.add_argument("--dry-run", action="store_true", help="Only show the difference.")


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    return install_hook(arguments.python, dry_run=arguments.dry_run)


def install_hook(python: str | None = None, *, dry_run: bool = False) -> int:
    """Write the block for an interpreter, or for tfgpu's own.

    Returns:
        The exit code: 2 if it is not a Python interpreter.

    Raises:
        InstallError: The interpreter cannot be covered.
    """
    try:
        change = plan_install(python)
    except NotAnInterpreterError as error:
        print_message("install", str(error))
        return USAGE
    if not dry_run and os.path.isdir(MACHINE_ROOT):
        check_path(MACHINE_ROOT)  # keeps the last good copies
    return finish_change(
        "install", change, done="wrote tfenv's block into", nothing="tfenv's block is already in", dry_run=dry_run
    )


def finish_change(command: str, change: SitecustomizeChange, *, done: str, nothing: str, dry_run: bool) -> int:
    """Carry out a change, or only show it, and print what is the case now. Return the exit code."""
    if change.changes_nothing:
        print_message(command, f"{nothing} {change.path}")
    elif dry_run:
        print(format_difference(change), end="")
    else:
        write_change(change)
        if change.after is None:
            print_message(command, f"removed {change.path}, which had nothing in it but tfenv's block")
        else:
            print_message(command, f"{done} {change.path}")
    return OK
