"""`tfgpu install --system`: apply it in every environment of an interpreter."""

from __future__ import annotations

import argparse
import os

from tfenv.cli.output import OK, USAGE, add_description, print_message
from tfenv.config.presence import MACHINE_ROOT
from tfenv.deploy.install import (
    BlockChange,
    NotAnInterpreterError,
    format_difference,
    plan_install,
    write_change,
)
from tfenv.lint.check import check_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(
        parser,
        "For administrators: it applies to all users. It writes a marked block into the interpreter's sitecustomize. "
        "Virtual environments then need no tfenv of their own. If you install tfenv with pip, you do not need this. "
        "Exit codes: 0 ok, 1 it cannot be written, 2 wrong usage.",
    )
    add_system_options(parser)


def add_system_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `install` and `uninstall` share."""
    parser.add_argument(
        "--system", action="store_true", required=True, help="Apply it to all users. This option is required."
    )
    parser.add_argument("--python", metavar="PATH", help="Use this interpreter (default: the one that runs tfgpu).")
    parser.add_argument("--dry-run", action="store_true", help="Show the difference and change nothing.")


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


def finish_change(command: str, change: BlockChange, *, done: str, nothing: str, dry_run: bool) -> int:
    """Carry out a change, or only show it, and print what is the case now. Return the exit code."""
    if change.changes_nothing:
        print_message(command, f"{nothing} {change.path}")
    elif dry_run:
        print(format_difference(change), end="")
    else:
        write_change(change)
        if change.after is None:
            print_message(command, f"removed {change.path}, which contained only tfenv's block")
        else:
            print_message(command, f"{done} {change.path}")
    return OK
