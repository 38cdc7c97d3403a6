"""`tfgpu completion`: what lets bash, zsh and fish complete the commands, their options and their files.

The script is static: a shell that completes starts no Python, and `tfgpu` itself does nothing for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from tfenv.cli.output import OK

SHELLS = ("bash", "zsh", "fish")
_EPILOG = """\
Options and file names are completed, too. Run the line for your shell:

bash:  tfgpu completion bash > ~/.local/share/bash-completion/completions/tfgpu
zsh:   tfgpu completion zsh > DIR/_tfgpu        (DIR: one of $fpath)
fish:  tfgpu completion fish > ~/.config/fish/completions/tfgpu.fish

Or write this into a start-up file of bash or zsh:  eval "$(tfgpu completion bash)"
"""
#: What stands for a path in the usage of a command.
_FILES, _DIRECTORIES = ("PATH", "FILE", "CMD"), ("DIR",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shell", choices=SHELLS, help="Print the script for this shell.")


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    return print_completion(arguments.shell)


def print_completion(shell: str) -> int:
    """Print the script of a shell, one of `SHELLS`, and return the exit code."""
    import shtab

    from tfenv.cli.main import COMMANDS, make_parser

    parser = make_parser(COMMANDS)
    for action in _walk_actions(parser):
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - argparse has no public name for it
            for choice in action._choices_actions:  # noqa: SLF001 - as above
                action.choices[choice.dest].description = choice.help  # one line: it stands beside the name in a list
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks for it
        elif action.metavar in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell))
    return OK


def _walk_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield every option and argument of the parser and of its commands."""
    for action in parser._actions:  # noqa: SLF001 - argparse has no public list of them
        yield action
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - nor a name for these
            for command in action.choices.values():
                yield from _walk_actions(command)
