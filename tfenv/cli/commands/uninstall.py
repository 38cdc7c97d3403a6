"""`tfgpu uninstall --system`: remove exactly the block that `install --system` wrote."""

from __future__ import annotations

import argparse

from tfenv.cli.commands.install import add_system_options, finish_change
from tfenv.deploy.install import plan_uninstall


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = "Remove our block from the sitecustomize that wins for an interpreter, and nothing else."
    add_system_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    return uninstall_hook(arguments.python, dry_run=arguments.dry_run)


def uninstall_hook(python: str | None = None, *, dry_run: bool = False) -> int:
    """Remove the block for an interpreter, or for tfgpu's own, and return the exit code.

    Raises:
        InstallError: The interpreter cannot be asked, or its sitecustomize not be changed.
    """
    change = plan_uninstall(python)
    return finish_change(
        "uninstall", change, done="removed tfenv's block from", nothing="there is no block of tfenv in", dry_run=dry_run
    )
