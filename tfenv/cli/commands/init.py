"""`tfgpu init`: write a first tfgpu.toml, for a project or for a machine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from tfenv.cli.first_policy import (
    explain_no_gpu,
    format_machine_policy,
    format_machine_tests,
    format_project_policy,
    survey,
)
from tfenv.cli.output import (
    FINDINGS,
    OK,
    USAGE,
    add_description,
    get_exit_code,
    print_findings,
    print_message,
    shorten_path,
)
from tfenv.config.presence import FILE_NAME, MACHINE_ROOT
from tfenv.config.schema_copy import COPY_NAME, SCHEMA_LINE, TEST_COPY_NAME, write_copy
from tfenv.devices.inventory import read_inventory
from tfenv.files import replace_file
from tfenv.lint.check import TEST_SUFFIX, check_path
from tfenv.policy.model import DEFAULT_OVERHEAD

_Steps = Sequence[tuple[str, str]]
_PROJECT_STEPS: _Steps = (
    (f"edit {FILE_NAME}", "uncomment what you need"),
    ("tfgpu check", "find mistakes"),
    ("tfgpu explain", "see the effect"),
    ("tfgpu doctor", "check that the hook and the GPUs work"),
    ("python train.py", "start your program as usual"),
)

#: The first tests of a machine's policy.
_TESTS_NAME = f"tfgpu{TEST_SUFFIX}"
_WORLD_READABLE, _PUBLIC_FOLDER = 0o644, 0o755


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(
        parser,
        "The file fits the GPUs of this machine. A copy of the schema for editors is written beside it. "
        f"With --machine, the file is the administrator's policy, {MACHINE_ROOT}/{FILE_NAME}, and {_TESTS_NAME} beside "
        "it has first tests. "
        "Exit codes: 0 written, 1 there is a policy already, 2 wrong usage.",
    )
    parser.add_argument("--machine", action="store_true", help="Write the policy of this machine. You must be root.")
    parser.add_argument(
        "--path",
        metavar="DIR",
        help=f"Write into this directory (default: here). With --machine, write a draft of {MACHINE_ROOT}.",
    )
    parser.add_argument("--force", action="store_true", help="Replace an existing policy.")
    parser.add_argument(
        "--schema", action="store_true", help=f"Write only {COPY_NAME}. Use it after you upgrade tfenv."
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    if arguments.schema:
        return refresh_schema(arguments.path or (MACHINE_ROOT if arguments.machine else "."))
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
        print_message("init", f"{obstacle}; use --force to replace it")
        return FINDINGS
    text = format_project_policy(survey(str(folder)))
    return _write_policy(folder / FILE_NAME, text, _PROJECT_STEPS, overwrite=force)


def _find_obstacle(folder: Path) -> str | None:
    """Return the policy that is there: a tfgpu.toml, be it a dangling link, or a pyproject.toml's. None if none is."""
    path = folder / FILE_NAME
    if os.path.lexists(path):
        return f"{shorten_path(str(path))} already exists"
    pyproject = folder / "pyproject.toml"
    missing = check_path(str(pyproject)).findings[:1]
    if pyproject.is_file() and not (missing and missing[0].code == "not-found"):
        return f"{shorten_path(str(pyproject))} has a policy in [tool.tfgpu], which {FILE_NAME} would replace"
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
        print_message("init", f"only root can write to {MACHINE_ROOT}; use sudo, or write a draft with --path DIR")
        return USAGE
    file = folder / FILE_NAME
    if not force and os.path.lexists(file):
        print_message("init", f"{shorten_path(str(file))} already exists; use --force to replace it")
        return FINDINGS
    if (missing := _make_folders(folder)) is not None:
        print_message("init", f"{missing} is not a directory; create it first")
        return USAGE
    inventory = read_inventory()
    text = format_machine_policy(inventory, DEFAULT_OVERHEAD)
    steps = _list_machine_steps(shorten_path(str(folder)), is_draft=is_draft)
    if not _write_tests(folder / _TESTS_NAME, format_machine_tests(inventory)):
        return FINDINGS
    code = _write_policy(file, text, steps, overwrite=force, mode=_WORLD_READABLE)
    if not inventory.devices:
        print_message("init", f"the file names no GPU: {explain_no_gpu(inventory)}")
    return code


def _list_machine_steps(folder: str, *, is_draft: bool) -> _Steps:
    install = [(f"sudo cp -r {folder}/. {MACHINE_ROOT}", "install it")] if is_draft else []
    return (
        (f"edit {folder}/{FILE_NAME}", "uncomment what you need; put exceptions into groups/ and users/"),
        (f"tfgpu check {folder}", "find mistakes"),
        (f"tfgpu test {folder}", f"compare it with what you expect in {_TESTS_NAME}"),
        *install,
        ("tfgpu explain --user NAME", "see the effect for a user"),
        ("tfgpu install --system", "apply it in every environment of an interpreter"),
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


# ---- writing


def _write_policy(path: Path, text: str, steps: _Steps, *, overwrite: bool, mode: int | None = None) -> int:
    """Write a policy and the schema beside it, check it, and print what to do next. Return the exit code."""
    if _write_schema(path.parent, mode) is None:
        return FINDINGS
    try:
        replace_file(path, text, mode, overwrite=overwrite)
    except FileExistsError:
        print_message("init", f"{shorten_path(str(path))} was created in the meantime; check it first")
        return FINDINGS
    print(f"Wrote {shorten_path(str(path))}, and {COPY_NAME} beside it for editors\n")
    findings = check_path(str(path)).findings
    print_findings(findings)
    print("Next:")
    width = max(len(step) for step, _ in steps)
    print("\n".join(f"  {step:<{width}}  {why}" for step, why in steps))
    return get_exit_code(findings)


def _write_tests(path: Path, text: str) -> bool:
    """Write first tests of a machine's policy, and their schema. Tests that are there stay.

    Returns:
        Whether they are there. False: another file is in the way of the schema.
    """
    if _write_schema(path.parent, _WORLD_READABLE, TEST_COPY_NAME) is None:
        return False
    if not os.path.lexists(path):
        replace_file(path, text, _WORLD_READABLE, overwrite=False)
    return True


def _write_schema(folder: Path, mode: int | None, name: str = COPY_NAME) -> bool | None:
    """Write the copy of a schema. Return whether it had to be written. None: another file is in the way."""
    try:
        return write_copy(str(folder), mode, name)
    except FileExistsError:
        place = shorten_path(str(folder / name))
        print_message("init", f"{place} is not a schema that tfenv wrote; rename it and try again")
        return None


def refresh_schema(path: str) -> int:
    """Write the copy of the schema into a directory that has a policy, and return the exit code."""
    folder = Path(path).absolute()
    if not folder.is_dir():
        print_message("init", f"{path} is not a directory; create it first")
        return USAGE
    mode = _WORLD_READABLE if str(folder) == MACHINE_ROOT else None
    written = _write_schema(folder, mode)
    if written is None or (_has_tests(folder) and _write_schema(folder, mode, TEST_COPY_NAME) is None):
        return FINDINGS
    place = shorten_path(str(folder / COPY_NAME))
    done = f"Wrote {place}" if written else f"{place} is up to date"
    print(f"{done}. Begin {FILE_NAME} with this line:\n{SCHEMA_LINE}")
    return OK


def _has_tests(folder: Path) -> bool:
    return any(path.name.endswith(TEST_SUFFIX) for path in folder.iterdir())
