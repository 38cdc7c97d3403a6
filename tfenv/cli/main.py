"""`tfgpu`: one module a command; only the chosen one is imported.

Exit codes: 0 ok, 1 findings, 2 wrong usage, 3 a bug of ours, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from tfenv import __version__
from tfenv.cli.output import FINDINGS, INTERNAL, INTERRUPTED, OK, USAGE, say
from tfenv.errors import TfenvError, escape_for_terminal

__all__ = ["COMMANDS", "main", "make_parser"]

#: Each command and what it is for; the module `tfenv.cli.commands.NAME` does it.
COMMANDS = {
    "init": "write a first tfgpu.toml for this project, or for this machine",
    "check": "find the mistakes in policy files",
    "explain": "show which values hold here, who set them, and what follows",
    "run": "run a command under the policy, or under options given here",
    "doctor": "find out why a GPU or a policy does not work here",
    "gpus": "list the GPUs, how full they are, and which of them the policy shows",
    "ps": "show who uses which GPU, under which policy",
    "audit": "show what was applied, from the audit log",
    "watch": "follow the policy files, and tell what each change means",
    "simulate": "run a command on simulated GPUs",
    "install": "cover every environment of an interpreter, for all users",
    "uninstall": "take back what install wrote",
    "completion": "print what lets a shell complete tfgpu's commands and options",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Without the program's name; None: those of this process.

    Returns:
        The exit code. Never raises.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        _never_fail_to_print()
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `tfgpu explain | head`: nobody reads on
        _silence_stdout()
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - whatever it is, people get one line
        return _failed(error)
    return code


def _run(arguments: Sequence[str]) -> int:
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    module = import_module(f"tfenv.cli.commands.{name}") if name in COMMANDS else None
    parser = make_parser({} if name is None or module is None else {name: module})
    if not arguments:
        parser.print_help(sys.stderr)
        return USAGE
    try:
        args = parser.parse_args(arguments)
    except SystemExit as end:  # argparse has said why
        return end.code if isinstance(end.code, int) else USAGE
    if module is None:
        parser.print_help(sys.stderr)
        return USAGE
    code: int = module.run(args)
    return code


class _Parser(argparse.ArgumentParser):
    """Of the program and of each command: an argument that is quoted in a complaint must not steer the terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(escape_for_terminal(message))


def make_parser(modules: Mapping[str, ModuleType]) -> argparse.ArgumentParser:
    """The program's parser: it knows the names of all commands, and the options of these."""
    parser = _Parser(
        prog="tfgpu",
        description="Declare once, in tfgpu.toml, which GPUs TensorFlow may see and how much memory it may take.",
        epilog="`tfgpu COMMAND --help` tells more. Exit codes: 0 ok, 1 findings, 2 wrong usage, 3 a bug of tfgpu.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tfgpu {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command_name")
    for command, purpose in COMMANDS.items():
        if command in modules:
            modules[command].add_parser(subparsers)
        else:
            subparsers.add_parser(command, help=purpose)
    return parser


# ---- what can go wrong in every command


def _never_fail_to_print() -> None:
    """Make printing safe, wherever it goes.

    What a locale cannot show, in a GPU's name or a path, is escaped. A stream that was closed (`tfgpu check >&-`)
    swallows what is said: to Python it is None, and what is printed to a stderr of None goes to stdout.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the end
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _silence_stdout() -> None:
    """The interpreter flushes stdout once more at its end, and would complain again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return


def _failed(error: Exception) -> int:
    if os.environ.get("TFGPU_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    if isinstance(error, TfenvError):
        say(None, str(error))
        return FINDINGS
    if isinstance(error, FileNotFoundError) and not error.filename and _is_homeless():
        say(None, "the working directory was deleted; change to a directory that exists, or name an absolute path")
        return USAGE
    if isinstance(error, OSError) and error.strerror:  # a full disk, a folder that may not be written
        _silence_stdout()
        say(None, f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
        return FINDINGS
    say(None, f"internal error: {type(error).__name__}: {error}; please report it (TFGPU_DEBUG=1 shows where)")
    return INTERNAL


def _is_homeless() -> bool:
    """Whether somebody deleted the working directory: then relative paths, "." too, mean nothing."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
