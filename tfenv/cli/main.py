"""`tfgpu`: one module a command, and only the chosen one is imported.

Exit codes: 0 ok, 1 findings, 2 wrong usage, 3 a bug of ours, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from tfenv import __version__
from tfenv.cli.output import FINDINGS, INTERNAL, INTERRUPTED, OK, USAGE, print_message
from tfenv.errors import TfenvError, escape_for_terminal

#: Each command and what it is for. The module `tfenv.cli.commands.NAME` has its arguments and carries it out.
COMMANDS = {
    "init": "Write a first tfgpu.toml for a project or a machine.",
    "check": "Find mistakes in policy files.",
    "explain": "Show which values apply here, who set them, and what they do.",
    "test": "Check that a policy gives what you expect of it, without a GPU.",
    "run": "Run a command under the policy, or under options that you give.",
    "doctor": "Find out why a GPU or a policy does not work here.",
    "verify": "Prove on this machine that each framework keeps to the policy.",
    "gpus": "List the GPUs, their load, and which of them the policy allows here.",
    "ps": "Show who uses which GPU, and under which policy.",
    "audit": "Show the records of what was applied.",
    "watch": "Follow the policy files and show the effect of each change.",
    "wall": "Set memory limits that the driver keeps for a user, job or service, whatever runs there.",
    "slurm": "Run as Slurm's TaskProlog and TaskEpilog.",
    "simulate": "Run a command on simulated GPUs.",
    "install": "Apply the policy in every environment of an interpreter.",
    "uninstall": "Remove what `tfgpu install` wrote.",
    "completion": "Print a script that completes tfgpu's commands in your shell.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Never raises.

    Args:
        argv: The arguments without the program's name. None: those of this process.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        _make_printing_safe()
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `tfgpu explain | head`: nobody reads on
        code = OK
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:  # noqa: BLE001 - whatever it is, people get one line
        code = _report_error(error)
    _discard_unwritten()
    return code


def _run(arguments: Sequence[str]) -> int:
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    if name and name not in COMMANDS:
        from tfenv.identity import suggest_name

        meant = suggest_name(name, COMMANDS)
        right = f'did you mean "{meant}"?' if meant else f"the commands are {', '.join(COMMANDS)}"
        print_message(None, f'there is no command "{name}"; {right}')
        return USAGE
    parser = make_parser([name])
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as end:  # argparse has said why
        return end.code if isinstance(end.code, int) else USAGE
    if "run" not in parsed:
        parser.print_help(sys.stderr)
        return USAGE
    code: int = parsed.run(parsed)
    return code


class _ProgramParser(argparse.ArgumentParser):
    """The parser of the program and of each command. An argument that it quotes cannot steer the terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(add_help=False, **options)
        self.add_argument("-h", "--help", action="help", help="Show this help.")

    def error(self, message: str) -> NoReturn:
        super().error(escape_for_terminal(message))


def make_parser(commands: Collection[str]) -> argparse.ArgumentParser:
    """Return the program's parser. It knows all commands by name, and the arguments of the given ones."""
    parser = _ProgramParser(
        prog="tfgpu",
        description="Declare in tfgpu.toml which GPUs programs can see and how much memory they can take.",
        epilog="Run `tfgpu COMMAND --help` for details. Exit codes: 0 ok, 1 findings, 2 wrong usage, 3 a bug in tfgpu.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tfgpu {__version__}", help="Show the version.")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command_name")
    for name, purpose in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=purpose, description=purpose)
        if name in commands:
            command = import_module(f"tfenv.cli.commands.{name}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    return parser


# ---- what can go wrong in every command


def _make_printing_safe() -> None:
    """Make printing safe, wherever it goes.

    What a locale cannot show, in a GPU's name or a path, is escaped. A stream that was closed (`tfgpu check >&-`)
    swallows what is printed: to Python it is None, and what is printed to a stderr of None goes to stdout.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the end
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _discard_unwritten() -> None:
    """Discard what cannot be written: at its end the interpreter would try again, complain, and exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _report_error(error: Exception) -> int:
    """Print what went wrong and return the exit code."""
    if os.environ.get("TFGPU_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    if isinstance(error, TfenvError):
        print_message(None, str(error))
        return FINDINGS
    if isinstance(error, FileNotFoundError) and not error.filename and not _has_working_directory():
        text = "the working directory was deleted; change to a directory that exists, or name an absolute path"
        print_message(None, text)
        return USAGE
    if isinstance(error, OSError) and error.strerror:  # a full disk, a folder that may not be written
        print_message(None, f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
        return FINDINGS
    text = f"internal error: {type(error).__name__}: {error}; please report it (TFGPU_DEBUG=1 shows where)"
    print_message(None, text)
    return INTERNAL


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
