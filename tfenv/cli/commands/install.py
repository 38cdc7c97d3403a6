"""`tfgpu install --system`: cover every environment of an interpreter."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tfenv.cli.output import OK, say
from tfenv.deploy.install import Change, carry_out, difference, plan_install

if TYPE_CHECKING:
    from tfenv.cli.output import SubParsers

__all__ = ["add_arguments", "add_parser", "finish", "run"]


def add_parser(subparsers: SubParsers) -> None:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "install",
        help="cover every environment of an interpreter, for all users",
        description="Write a marked block into the sitecustomize that wins for an interpreter, so that every virtual "
        "environment made from it is governed, without tfenv in it. Idempotent; `pip install` needs none of this.",
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments `install` and `uninstall` share."""
    parser.add_argument("--system", action="store_true", required=True, help="for all users (the only way there is)")
    parser.add_argument("--python", metavar="PATH", help="the interpreter (default: tfgpu's own)")
    parser.add_argument("--dry-run", action="store_true", help="only show the difference")


def run(args: argparse.Namespace) -> int:
    """Write the block; raises InstallError, which `tfgpu` prints."""
    return finish("install", plan_install(args.python), done="covered", nothing="covered already", dry_run=args.dry_run)


def finish(command: str, change: Change, *, done: str, nothing: str, dry_run: bool) -> int:
    """Show or carry out a change, and say what is the case now."""
    if change.nothing:
        say(command, f"{nothing}: {change.path}")
    elif dry_run:
        print(difference(change), end="")
    else:
        carry_out(change)
        say(command, f"{done}: {change.path}")
    return OK
