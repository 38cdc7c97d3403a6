"""`tfgpu init`: write a first tfgpu.toml."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tfenv.checking import check_path
from tfenv.cli.output import FINDINGS, USAGE, exit_code, print_findings, say, shown_path
from tfenv.config.discover import FILE_NAME
from tfenv.config.schema import schema_path

if TYPE_CHECKING:
    from tfenv.cli.output import SubParsers

__all__ = ["TEMPLATE", "add_parser", "run"]

TEMPLATE = """\
#:schema {schema}

# Which GPUs TensorFlow may see, and how much of their memory it may take. Every Python process that starts in this
# directory or below it finds this file by itself. `tfgpu check` finds mistakes, `tfgpu explain` shows what follows.

version = 1

# What follows when something below cannot be put in force:
# "warn" says so and goes on, "cpu" shows no GPU, "fail" stops the program at `import tensorflow`.
on_error = "warn"

[gpu]
# Take memory as it is needed, not all of the card at once.
memory_growth = true

# The most that one process may take of one GPU: "8GiB", or "40%" of the card. Other processes may take as much again.
# memory_limit = "8GiB"

# The GPUs a process sees: positions as TensorFlow counts them, UUIDs (`nvidia-smi -L`), "name:*A100*", "all" or "none".
# visible_devices = [0]

# Settings yield to a file that is nearer; ceilings hold whatever a program or another file asks for.
# [ceiling]
# memory_limit = "50%"
# max_devices = 1
"""

_NEXT = """\
Next:
  edit it           uncomment what you need
  tfgpu check       is it right?
  tfgpu explain     what follows from it here?
  tfgpu doctor      does the hook work, is there a GPU?
Then start your program as always: python train.py"""


def add_parser(subparsers: SubParsers) -> None:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "init",
        help="write a first tfgpu.toml for this project",
        description="Write a first tfgpu.toml, with comments: memory growth on, everything else to be uncommented.",
    )
    parser.add_argument("--path", default=".", metavar="DIR", help="the project's root (default: here)")
    parser.add_argument("--force", action="store_true", help="replace a policy that is there")


def run(args: argparse.Namespace) -> int:
    """Write the file, check it, say what to do next. 1: a policy is there already; 2: there is no such directory."""
    folder = Path(args.path).absolute()
    if not folder.is_dir():
        say("init", f"{args.path} is no directory; create it first")
        return USAGE
    path = folder / FILE_NAME
    if not args.force and (obstacle := _obstacle(folder)) is not None:
        say("init", f"{obstacle}; --force replaces it")
        return FINDINGS
    if not _write(path, TEMPLATE.format(schema=schema_path()), replace=args.force):
        say("init", f"{shown_path(str(path))} came to be just now; look at it first")
        return FINDINGS
    print(f"Wrote {shown_path(str(path))}\n")
    findings = check_path(str(path)).findings
    print_findings(findings)
    print(_NEXT)
    return exit_code(findings)


def _obstacle(folder: Path) -> str | None:
    """What is there already: a tfgpu.toml, be it a dangling link, or a pyproject.toml with a table of ours."""
    path = folder / FILE_NAME
    if os.path.lexists(path):
        return f"{shown_path(str(path))} is there already"
    pyproject = folder / "pyproject.toml"
    missing = check_path(str(pyproject)).findings[:1]
    if pyproject.is_file() and not (missing and missing[0].code == "not-found"):
        return f"{shown_path(str(pyproject))} holds a policy, [tool.tfgpu], that {FILE_NAME} would replace"
    return None


def _write(path: Path, text: str, *, replace: bool) -> bool:
    """Whether the file was written; without `replace` never over another one, not even one made meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True
