"""`tfgpu init`: write a first tfgpu.toml, for a project or for a machine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tfenv.cli.output import FINDINGS, USAGE, exit_code, print_findings, say, shown_path
from tfenv.config.discover import FILE_NAME, MACHINE_ROOT
from tfenv.config.schema import schema_path
from tfenv.devices.inventory import read_inventory
from tfenv.errors import escape_for_terminal
from tfenv.files import replace_file
from tfenv.lint.check import check_path
from tfenv.policy.model import Device, Inventory
from tfenv.policy.units import format_bytes

if TYPE_CHECKING:
    from tfenv.cli.output import SubParsers

__all__ = ["MACHINE_TEMPLATE", "TEMPLATE", "add_parser", "run"]

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

MACHINE_TEMPLATE = """\
#:schema {schema}

# The policy of this machine: it counts in every Python process of everybody. `tfgpu check /etc/tfgpu` finds mistakes,
# `tfgpu explain --user NAME` shows root what follows for somebody.
#
# Exceptions have files of their own beside this one, groups/NAME.toml and users/NAME.toml: what is in them counts
# as if it stood here under [group.NAME] and [user.NAME]. More specific replaces less specific, key by key.

version = 1

# What follows when something below cannot be put in force:
# "warn" says so and goes on, "cpu" shows no GPU, "fail" stops the program at `import tensorflow`.
on_error = "warn"

# ---- settings: a file of the user's or of a project's may set something else

[gpu]
# Take memory as it is needed, not all of the card at once.
memory_growth = true

# How many GPUs a process gets that asks for nothing.
# visible_devices = {{count = 1}}

# The most that one process may take of one GPU, unless its user sets something else.
# memory_limit = "50%"

# ---- ceilings: they hold whatever a file or a program asks for

[ceiling]
{devices}

# The most GPUs of one process; goes with visible_devices = {{count = 1}}, alone it gives everybody the first card.
# max_devices = 1

# The most that one process may take of one GPU: "20GiB", or "50%" of the card. Several processes may share it.
# memory_limit = "50%"

# Memory grows on demand, also in programs that say otherwise.
# require_memory_growth = true

# Inside a job, a scheduler that granted no GPU means none, not all.
# require_grant = true

# The same keys for some only: [group.NAME.ceiling], [user.NAME.gpu], [project."/srv/PATH".gpu].
# [group.students.ceiling]
# memory_limit = "25%"

# ---- the record of what was applied

[audit]
# Also to journald or syslog, beside each user's own log.
# syslog = true

# ---- what users may do

[machine]
# May TFGPU_DISABLE=1 switch the policy off? The log says so if it does.
# allow_disable = false

# Do the files of projects count?
# allow_project_files = false

# Whose files count besides one's own and root's.
# trusted_owners = ["deploy"]
"""

_Steps = Sequence[tuple[str, str]]
_NEXT: _Steps = (
    ("edit it", "uncomment what you need"),
    ("tfgpu check", "is it right?"),
    ("tfgpu explain", "what follows from it here?"),
    ("tfgpu doctor", "does the hook work, is there a GPU?"),
    ("python train.py", "start your program as always"),
)

_WORLD_READABLE, _PUBLIC_FOLDER = 0o644, 0o755


def add_parser(subparsers: SubParsers) -> None:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "init",
        help="write a first tfgpu.toml for this project, or for this machine",
        description="Write a first tfgpu.toml, with comments: memory growth on, everything else to be uncommented. "
        f"With --machine it is the administrator's, {MACHINE_ROOT}/{FILE_NAME}, and names this machine's GPUs.",
    )
    parser.add_argument("--machine", action="store_true", help="a policy for everybody on this machine; needs root")
    parser.add_argument(
        "--path", metavar="DIR", help=f"the project's root (default: here); with --machine: a draft of {MACHINE_ROOT}"
    )
    parser.add_argument("--force", action="store_true", help="replace a policy that is there")


def run(args: argparse.Namespace) -> int:
    """Write the file, check it, say what to do next. 1: a policy is there already; 2: it cannot be written there."""
    return _init_machine(args) if args.machine else _init_project(args)


# ---- a project's


def _init_project(args: argparse.Namespace) -> int:
    folder = Path(args.path or ".").absolute()
    if not folder.is_dir():
        say("init", f"{args.path} is no directory; create it first")
        return USAGE
    if not args.force and (obstacle := _obstacle(folder)) is not None:
        say("init", f"{obstacle}; --force replaces it")
        return FINDINGS
    return _written(folder / FILE_NAME, TEMPLATE.format(schema=schema_path()), _NEXT, replace=args.force)


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


# ---- the machine's


def _init_machine(args: argparse.Namespace) -> int:
    folder = Path(args.path or MACHINE_ROOT).absolute()
    draft = str(folder) != MACHINE_ROOT
    if not draft and os.geteuid() != 0:
        say("init", f"only root writes to {MACHINE_ROOT}; use sudo, or write a draft with --path DIR")
        return USAGE
    path = folder / FILE_NAME
    if not args.force and os.path.lexists(path):
        say("init", f"{shown_path(str(path))} is there already; --force replaces it")
        return FINDINGS
    if (missing := _make_folders(folder)) is not None:
        say("init", f"{missing} is no directory; create it first")
        return USAGE
    inventory = read_inventory()
    text = MACHINE_TEMPLATE.format(schema=schema_path(), devices=_allowed_devices(inventory))
    steps = _steps_on_a_machine(shown_path(str(folder)), draft=draft)
    code = _written(path, text, steps, replace=args.force, mode=_WORLD_READABLE)
    if not inventory.devices:
        say("init", f"no GPU is named in the file: {_why_none(inventory)}")
    return code


def _steps_on_a_machine(folder: str, *, draft: bool) -> _Steps:
    install = [(f"sudo cp -r {folder}/. {MACHINE_ROOT}", "puts it in force")] if draft else []
    return (
        ("edit it", "uncomment what you need; exceptions go into groups/NAME.toml and users/NAME.toml"),
        (f"tfgpu check {folder}", "is it right?"),
        *install,
        ("tfgpu explain --user NAME", "what follows for somebody?"),
        ("tfgpu install --system", "covers every environment of an interpreter"),
    )


def _make_folders(folder: Path) -> str | None:
    """Make the machine layer's folders, readable by all whatever the umask is; what is there stays as it is.

    Returns:
        What is no directory and should be; None when all are.
    """
    if not folder.parent.is_dir():
        return shown_path(str(folder.parent))
    for place in (folder, folder / "groups", folder / "users"):
        if not os.path.lexists(place):
            place.mkdir()
            place.chmod(_PUBLIC_FOLDER)
        elif not place.is_dir():
            return shown_path(str(place))
    return None


def _allowed_devices(inventory: Inventory) -> str:
    """The lines about `allowed_devices`, with the UUIDs of all GPUs that are here."""
    lines = ["# The GPUs that may be used at all, by UUID: numbers shift inside containers and jobs."]
    if inventory.devices:
        lines += ["# allowed_devices = [", *(_uuid_line(device) for device in inventory.devices), "# ]"]
    else:
        lines += [f"# Which are here is not known: {_why_none(inventory)}.", '# allowed_devices = ["GPU-8932f937"]']
    return "\n".join(lines)


def _uuid_line(device: Device) -> str:
    size = "" if device.total is None else f", {format_bytes(device.total)}"
    return f'#     "{device.uuid}",  # {device.label}: {escape_for_terminal(device.name)}{size}'


def _why_none(inventory: Inventory) -> str:
    why = (
        "NVML shows none"
        if inventory.devices is not None
        else escape_for_terminal(inventory.problem or "NVML did not answer")
    )
    return f"{why}; `nvidia-smi -L` shows UUIDs"


# ---- writing


def _written(path: Path, text: str, steps: _Steps, *, replace: bool, mode: int | None = None) -> int:
    """Write, check, and say what to do next; the exit code."""
    try:
        replace_file(path, text, mode, overwrite=replace)
    except FileExistsError:
        say("init", f"{shown_path(str(path))} came to be just now; look at it first")
        return FINDINGS
    print(f"Wrote {shown_path(str(path))}\n")
    findings = check_path(str(path)).findings
    print_findings(findings)
    print("Next:")
    width = max(len(step) for step, _ in steps)
    print("\n".join(f"  {step:<{width}}  {why}" for step, why in steps))
    return exit_code(findings)
