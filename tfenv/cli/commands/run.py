"""`tfgpu run`: start a command under the policy, or under options given here, without any file."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tfenv.cli.output import NOT_EXECUTABLE, NOT_FOUND, USAGE, say, toml_text
from tfenv.config.document import DocumentError, Trust, read
from tfenv.config.schema import validate
from tfenv.config.values import read_selector
from tfenv.deploy import launch
from tfenv.policy.model import Source
from tfenv.policy.units import parse_limit

if TYPE_CHECKING:
    from tfenv.cli.output import SubParsers

__all__ = ["add_parser", "run"]

VARIABLE = "TFGPU_RUN"
#: Python ignores these from its start on, and what is ignored stays so in the command.
_IGNORED_BY_PYTHON = ("SIGPIPE", "SIGXFZ", "SIGXFSZ")


def add_parser(subparsers: SubParsers) -> None:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "run",
        help="run a command under the policy, or under options given here",
        description="Run a command, and every Python process it starts, under the policy that is in force here. "
        "Options are settings nearer than any file; ceilings hold. The interpreter needs no tfenv of its own.",
        usage="tfgpu run [--gpus 0,1|all|none] [--memory-limit 4GiB] [--growth|--no-growth] [--config PATH] -- CMD ...",
        epilog="The exit code is the command's own; 127 when there is no such command, 126 when it cannot be run.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpus", type=_gpus, metavar="GPUS", help='positions or UUIDs ("0,1"), "name:*A100*", "all" or "none"'
    )
    parser.add_argument(
        "--memory-limit", type=_limit, metavar="SIZE", help='per GPU and process: "4GiB", "40%%" or "none"'
    )
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, help="take memory as it is needed, or not")
    parser.add_argument("--config", type=_file, metavar="PATH", help="the project's policy, not the nearest file")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD", help="what to run, with its arguments")


# ---- options


def _gpus(text: str) -> str | list[int | str]:
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


def _limit(text: str) -> str:
    try:
        parse_limit(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _file(text: str) -> str:
    path = os.path.abspath(text)
    if not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"there is no file {text}; name a tfgpu.toml or a pyproject.toml")
    return path


def _policy(args: argparse.Namespace, inherited: str | None) -> str | None:
    """The options as the text of a policy; those of a `tfgpu run` around this one hold where ours say nothing."""
    options = {"visible_devices": args.gpus, "memory_limit": args.memory_limit, "memory_growth": args.growth}
    given = {key: value for key, value in options.items() if value is not None}
    if not given:
        return inherited
    return f"gpu = {toml_text({**_settings_of(inherited), **given})}"


def _settings_of(text: str | None) -> Mapping[str, object]:
    if text is None:
        return {}
    import tomli

    try:
        settings = tomli.loads(text).get("gpu", {})
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _mistake(policy: str) -> str | None:
    """What is wrong with the text of a policy, first of all; None when all is well."""
    try:
        _, findings = validate(read(Source("run", "<tfgpu run>", text=policy), Trust(os.geteuid())))
    except DocumentError as error:
        findings = (error.finding,)
    return str(findings[0]) if findings else None


# ---- the command


def run(args: argparse.Namespace) -> int:
    """Become the command. Returns only when it could not be started: 2, 126 or 127."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        say("run", "no command given; write: tfgpu run --memory-limit 4GiB -- python train.py")
        return USAGE
    variables = launch.environment(os.environ)
    policy = _policy(args, variables.get(VARIABLE))
    if policy is not None:
        if (mistake := _mistake(policy)) is not None:
            say("run", mistake)
            return USAGE
        variables[VARIABLE] = policy
    if args.config is not None:
        variables["TFGPU_CONFIG"] = args.config
    return _become(command, variables)


def _become(command: Sequence[str], variables: Mapping[str, str]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    for name in _IGNORED_BY_PYTHON:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvpe(command[0], list(command), variables)  # noqa: S606 - the command takes our place
    except (FileNotFoundError, NotADirectoryError):
        if shutil.which(command[0]) is None:
            say("run", f'command not found: "{command[0]}"')
            return NOT_FOUND
        say("run", f'cannot run "{command[0]}": the interpreter that its first line names is not there')
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        say("run", f'cannot run "{command[0]}": {reason}')
    return NOT_EXECUTABLE
