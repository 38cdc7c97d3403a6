"""`tfgpu init`: write a first tfgpu.toml, for a project or for a machine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from tfenv.cli.output import FINDINGS, USAGE, get_exit_code, print_findings, print_message, shorten_path
from tfenv.config.presence import FILE_NAME, MACHINE_ROOT
from tfenv.config.schema import schema_path
from tfenv.devices.inventory import read_inventory
from tfenv.errors import escape_for_terminal
from tfenv.files import replace_file
from tfenv.lint.check import check_path
from tfenv.policy.model import Device, Inventory
from tfenv.policy.units import format_bytes

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
_PROJECT_STEPS: _Steps = (
    ("edit it", "uncomment what you need"),
    ("tfgpu check", "is it right?"),
    ("tfgpu explain", "what follows from it here?"),
    ("tfgpu doctor", "does the hook work, is there a GPU?"),
    ("python train.py", "start your program as always"),
)

_WORLD_READABLE, _PUBLIC_FOLDER = 0o644, 0o755


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.description = (
        "Write a first tfgpu.toml, with comments: memory growth on, everything else to be uncommented. "
        f"With --machine it is the administrator's, {MACHINE_ROOT}/{FILE_NAME}, and names this machine's GPUs."
    )
    parser.add_argument("--machine", action="store_true", help="a policy for everybody on this machine; needs root")
    parser.add_argument(
        "--path", metavar="DIR", help=f"the project's root (default: here); with --machine: a draft of {MACHINE_ROOT}"
    )
    parser.add_argument("--force", action="store_true", help="replace a policy that is there")


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    init = init_machine if arguments.machine else init_project
    return init(arguments.path, force=arguments.force)


# ---- a project's


def init_project(path: str | None, *, force: bool = False) -> int:
    """Write a project's policy, check it, and print what to do next.

    Args:
        path: The project's root. None: this directory.
        force: Whether to replace a policy that is there.

    Returns:
        The exit code: 1 if there is a policy already, 2 if the root is not a directory.
    """
    folder = Path(path or ".").absolute()
    if not folder.is_dir():
        print_message("init", f"{path} is not a directory; create it first")
        return USAGE
    if not force and (obstacle := _find_obstacle(folder)) is not None:
        print_message("init", f"{obstacle}; --force replaces it")
        return FINDINGS
    return _write_policy(folder / FILE_NAME, TEMPLATE.format(schema=schema_path()), _PROJECT_STEPS, overwrite=force)


def _find_obstacle(folder: Path) -> str | None:
    """Return the policy that is there: a tfgpu.toml, be it a dangling link, or a pyproject.toml's. None if none is."""
    path = folder / FILE_NAME
    if os.path.lexists(path):
        return f"{shorten_path(str(path))} is there already"
    pyproject = folder / "pyproject.toml"
    missing = check_path(str(pyproject)).findings[:1]
    if pyproject.is_file() and not (missing and missing[0].code == "not-found"):
        return f"{shorten_path(str(pyproject))} holds a policy, [tool.tfgpu], that {FILE_NAME} would replace"
    return None


# ---- the machine's


def init_machine(path: str | None, *, force: bool = False) -> int:
    """Write the machine's policy, check it, and print what to do next.

    Args:
        path: The directory of a draft. None: the policy itself, in `MACHINE_ROOT`.
        force: Whether to replace a policy that is there.

    Returns:
        The exit code: 1 if there is a policy already, 2 if it cannot be written there.
    """
    folder = Path(path or MACHINE_ROOT).absolute()
    is_draft = str(folder) != MACHINE_ROOT
    if not is_draft and os.geteuid() != 0:
        print_message("init", f"only root writes to {MACHINE_ROOT}; use sudo, or write a draft with --path DIR")
        return USAGE
    file = folder / FILE_NAME
    if not force and os.path.lexists(file):
        print_message("init", f"{shorten_path(str(file))} is there already; --force replaces it")
        return FINDINGS
    if (missing := _make_folders(folder)) is not None:
        print_message("init", f"{missing} is not a directory; create it first")
        return USAGE
    inventory = read_inventory()
    text = MACHINE_TEMPLATE.format(schema=schema_path(), devices=_format_allowed_devices(inventory))
    steps = _list_machine_steps(shorten_path(str(folder)), is_draft=is_draft)
    code = _write_policy(file, text, steps, overwrite=force, mode=_WORLD_READABLE)
    if not inventory.devices:
        print_message("init", f"no GPU is named in the file: {_explain_no_gpu(inventory)}")
    return code


def _list_machine_steps(folder: str, *, is_draft: bool) -> _Steps:
    install = [(f"sudo cp -r {folder}/. {MACHINE_ROOT}", "puts it in force")] if is_draft else []
    return (
        ("edit it", "uncomment what you need; exceptions go into groups/NAME.toml and users/NAME.toml"),
        (f"tfgpu check {folder}", "is it right?"),
        *install,
        ("tfgpu explain --user NAME", "what follows for somebody?"),
        ("tfgpu install --system", "covers every environment of an interpreter"),
    )


def _make_folders(folder: Path) -> str | None:
    """Make the machine layer's folders, readable by all whatever the umask is. What is there stays as it is.

    Returns:
        The path that should be a directory and is none. None if all are.
    """
    if not folder.parent.is_dir():
        return shorten_path(str(folder.parent))
    for place in (folder, folder / "groups", folder / "users"):
        if not os.path.lexists(place):
            place.mkdir()
            place.chmod(_PUBLIC_FOLDER)
        elif not place.is_dir():
            return shorten_path(str(place))
    return None


def _format_allowed_devices(inventory: Inventory) -> str:
    """Return the lines about `allowed_devices`, with the UUIDs of all GPUs that are here."""
    lines = ["# The GPUs that may be used at all, by UUID: numbers shift inside containers and jobs."]
    if inventory.devices:
        lines += ["# allowed_devices = [", *(_format_device(device) for device in inventory.devices), "# ]"]
    else:
        lines += [
            f"# Which are here is not known: {_explain_no_gpu(inventory)}.",
            '# allowed_devices = ["GPU-8932f937"]',
        ]
    return "\n".join(lines)


def _format_device(device: Device) -> str:
    size = "" if device.total is None else f", {format_bytes(device.total)}"
    return f'#     "{device.uuid}",  # {device.label}: {escape_for_terminal(device.name)}{size}'


def _explain_no_gpu(inventory: Inventory) -> str:
    problem = "NVML shows none" if inventory.devices is not None else inventory.problem or "NVML did not answer"
    return f"{escape_for_terminal(problem)}; `nvidia-smi -L` shows UUIDs"


# ---- writing


def _write_policy(path: Path, text: str, steps: _Steps, *, overwrite: bool, mode: int | None = None) -> int:
    """Write a policy, check it, and print what to do next. Return the exit code."""
    try:
        replace_file(path, text, mode, overwrite=overwrite)
    except FileExistsError:
        print_message("init", f"{shorten_path(str(path))} was created meanwhile; look at it first")
        return FINDINGS
    print(f"Wrote {shorten_path(str(path))}\n")
    findings = check_path(str(path)).findings
    print_findings(findings)
    print("Next:")
    width = max(len(step) for step, _ in steps)
    print("\n".join(f"  {step:<{width}}  {why}" for step, why in steps))
    return get_exit_code(findings)
