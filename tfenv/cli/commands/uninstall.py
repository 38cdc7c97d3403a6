"""`tfgpu uninstall --system`: remove exactly the block that `install --system` wrote."""

from __future__ import annotations

import argparse

from tfenv.cli.commands.install import add_system_options, finish_change
from tfenv.cli.output import USAGE, add_description, print_message
from tfenv.deploy.install import NotAnInterpreterError, plan_uninstall


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(
        parser,
        "It removes the marked block from the interpreter's sitecustomize and changes nothing else. "
        "Exit codes: 0 ok, 1 it cannot be removed, 2 wrong usage.",
    )
    add_system_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    return uninstall_hook(arguments.python, dry_run=arguments.dry_run)


def uninstall_hook(python: str | None = None, *, dry_run: bool = False) -> int:
    """Remove the block for an interpreter, or for tfgpu's own.

    Returns:
        The exit code: 2 if it is not a Python interpreter.

    Raises:
        InstallError: Its sitecustomize cannot be changed.
    """
    try:
        change = plan_uninstall(python)
    except NotAnInterpreterError as error:
        print_message("uninstall", str(error))
        return USAGE
    return finish_change(
        "uninstall", change, done="removed tfenv's block from", nothing="found no tfenv block in", dry_run=dry_run
    )
