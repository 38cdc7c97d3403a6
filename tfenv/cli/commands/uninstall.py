"""`tfgpu uninstall --system`: remove exactly the block that `install --system` wrote."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tfenv.cli.commands.install import add_arguments, finish
from tfenv.deploy.install import plan_uninstall

if TYPE_CHECKING:
    from tfenv.cli.output import SubParsers

__all__ = ["add_parser", "run"]


def add_parser(subparsers: SubParsers) -> None:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "uninstall",
        help="take back what `tfgpu install --system` wrote",
        description="Remove our block from the sitecustomize that wins for an interpreter, and nothing else.",
    )
    add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Remove the block; raises InstallError, which `tfgpu` prints."""
    change = plan_uninstall(args.python)
    return finish("uninstall", change, done="removed", nothing="nothing of ours in", dry_run=args.dry_run)
