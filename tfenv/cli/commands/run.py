"""`tfgpu run`: start a command under the policy, or under options given here, without any file."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence

from tfenv.cli.output import FINDINGS, NOT_EXECUTABLE, NOT_FOUND, USAGE, add_description, format_toml, print_message
from tfenv.config.document import DocumentError, Trust, read
from tfenv.config.schema import validate
from tfenv.config.values import read_process_limit, read_selector
from tfenv.deploy import launch
from tfenv.deploy.frozen import is_frozen_without_tfenv
from tfenv.errors import PolicyError
from tfenv.policy.model import Source
from tfenv.runtime.opaque_program import apply_to_environment

VARIABLE = "TFGPU_RUN"
#: Python ignores these from its start on, and what is ignored stays so in the command.
_IGNORED_BY_PYTHON = ("SIGPIPE", "SIGXFZ", "SIGXFSZ")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(
        parser,
        "The policy applies to every Python process that the command starts, even if its interpreter has no tfenv. "
        "Options replace the settings of every file. Ceilings still hold.",
    )
    parser.usage = (
        "tfgpu run [--gpus 0,1|all|none] [--memory-limit 4GiB] [--growth|--no-growth] [--config PATH] -- CMD ..."
    )
    parser.epilog = (
        "Exit codes: the command's own, 1 the policy refuses it, 2 wrong usage, 126 the command cannot be run, "
        "127 there is no such command."
    )
    parser.allow_abbrev = False
    parser.add_argument(
        "--gpus",
        type=_parse_gpus,
        metavar="GPUS",
        help='Show these GPUs: positions or UUIDs ("0,1"), "name:*A100*", "all" or "none".',
    )
    parser.add_argument(
        "--memory-limit",
        type=_parse_limit,
        metavar="SIZE",
        help='Limit the memory of each GPU for each process: "4GiB", "40%%", "granted" or "none".',
    )
    parser.add_argument(
        "--growth",
        action=argparse.BooleanOptionalAction,
        help="Allocate memory when it is needed, or nearly all of it at the start.",
    )
    parser.add_argument(
        "--config",
        type=_parse_file,
        metavar="PATH",
        help="Use this file as the project's policy instead of the nearest one.",
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="CMD", help="Run this command with these arguments."
    )


# ---- options


def _parse_gpus(text: str) -> str | list[int | str]:
    if text.strip() in ("all", "none"):
        return text.strip()
    names: list[int | str] = []
    for part in text.split(","):
        try:
            selector = read_selector(part.strip())
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        names.append(selector.position if selector.kind == "position" else str(selector))
    return names


def _parse_limit(text: str) -> str:
    try:
        read_process_limit(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _parse_file(text: str) -> str:
    path = os.path.abspath(text)
    if not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"{text} does not exist; name a tfgpu.toml or a pyproject.toml")
    return path


def _format_policy(settings: Mapping[str, object], inherited: str | None) -> str | None:
    """Return settings, with those of a `tfgpu run` around this one, as the text of a policy. None if there are none."""
    return f"gpu = {format_toml({**_read_settings(inherited), **settings})}" if settings else inherited


def _read_settings(text: str | None) -> Mapping[str, object]:
    if text is None:
        return {}
    import tomli

    try:
        settings = tomli.loads(text).get("gpu", {})
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _find_mistake(policy: str) -> str | None:
    """Return the first mistake in the text of a policy. None if there is none."""
    try:
        _, findings = validate(read(Source("run", "<tfgpu run>", text=policy), Trust(os.geteuid())))
    except DocumentError as error:
        findings = (error.finding,)
    return str(findings[0]) if findings else None


# ---- the command


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    given = vars(arguments)
    keys = {"visible_devices": "gpus", "memory_limit": "memory_limit", "memory_growth": "growth"}
    settings = {key: given[option] for key, option in keys.items() if given[option] is not None}
    return run_command(command, settings, arguments.config)


def run_command(command: Sequence[str], settings: Mapping[str, object], config: str | None) -> int:
    """Replace this process by a command. Returns only if that fails.

    Args:
        command: What to run, with its arguments.
        settings: Keys of the table `gpu` and their values, nearer than any file.
        config: The project's policy. None: the nearest file.

    Returns:
        The exit code: 2 if there is no command or a mistake in the settings, 127 if there is no such command, 126 if
        it cannot be run, 1 if the policy refuses it.
    """
    if not command:
        print_message("run", "no command given; write tfgpu run --memory-limit 4GiB -- python train.py")
        return USAGE
    variables = launch.build_environment(os.environ)
    policy = _format_policy(settings, variables.get(VARIABLE))
    if policy is not None:
        if (mistake := _find_mistake(policy)) is not None:
            print_message("run", mistake)
            return USAGE
        variables[VARIABLE] = policy
    if config is not None:
        variables["TFGPU_CONFIG"] = config
    program = shutil.which(command[0], path=variables.get("PATH"))
    if program is not None and is_frozen_without_tfenv(program):
        os.environ.update(variables)
        try:
            apply_to_environment(program, f"{command[0]} (frozen without tfenv)")
        except PolicyError as error:
            print_message("run", str(error))
            return FINDINGS
        variables = dict(os.environ)
    return _replace_process(command, variables)


def _replace_process(command: Sequence[str], variables: Mapping[str, str]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    ignored = [getattr(signal, name) for name in _IGNORED_BY_PYTHON if hasattr(signal, name)]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(command[0], list(command), variables)  # noqa: S606 - the command takes our place
    except (OSError, ValueError) as error:
        for number in ignored:  # a message that nobody reads must not end us
            signal.signal(number, signal.SIG_IGN)
        return _report_failure(command[0], error)


def _report_failure(name: str, error: OSError | ValueError) -> int:
    """Print why a command could not be started, and return the exit code."""
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        if shutil.which(name) is None:
            print_message("run", f'command not found: "{name}"')
            return NOT_FOUND
        reason = "the interpreter in its first line does not exist"
    print_message("run", f'cannot run "{name}": {reason}')
    return NOT_EXECUTABLE
