"""What all commands share: text or JSON, colour only where it helps, one way to complain."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TextIO

from tfenv.errors import Finding, escape_for_terminal

if TYPE_CHECKING:
    import argparse

    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - it has no public name

__all__ = [
    "FINDINGS",
    "INTERNAL",
    "INTERRUPTED",
    "NOT_EXECUTABLE",
    "NOT_FOUND",
    "OK",
    "USAGE",
    "add_format",
    "exit_code",
    "finding_as_dict",
    "paint",
    "print_findings",
    "print_json",
    "print_table",
    "say",
    "shown_path",
    "toml_text",
]

OK, FINDINGS, USAGE, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 130
#: Of a command that `run` or `simulate` could not start; a shell says the same.
NOT_EXECUTABLE, NOT_FOUND = 126, 127

Style = Literal["ok", "note", "problem", "strong", "quiet"]
_CODES: Mapping[Style, str] = {"ok": "32", "note": "33", "problem": "31", "strong": "1", "quiet": "2"}
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
#: Characters of a row that goes into a pipe, where grep wants it in one line.
_WIDEST_PIPE = 10_000


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add `--format text|json` to a command that reports something."""
    parser.add_argument("--format", choices=("text", "json"), default="text", help="for people (text) or programs")


def say(command: str | None, text: str) -> None:
    """One line to stderr, from a command or, without its name, from the program."""
    print(escape_for_terminal(f"tfgpu {command}: {text}" if command else f"tfgpu: {text}"), file=sys.stderr)


# ---- text


def wants_colour(stream: TextIO) -> bool:
    """Whether colour is welcome there: a terminal that can, and no NO_COLOR (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def paint(text: str, style: Style) -> str:
    """The text in a style, as far as stdout takes any."""
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if wants_colour(sys.stdout) else text


def shown_path(path: str) -> str:
    """A path as short as it stays clear: relative below the working directory, `~` below the home; safe to print."""
    try:
        here = os.getcwd().rstrip("/")
    except OSError:
        here = ""
    home = os.path.expanduser("~").rstrip("/")
    if here and path.startswith(f"{here}/"):
        path = path[len(here) + 1 :]
    elif home and path.startswith(f"{home}/"):
        path = f"~/{path[len(home) + 1 :]}"
    return escape_for_terminal(path)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], indent: int = 0) -> None:
    """A table without lines: as wide as the terminal; into a pipe as wide as its rows."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False, header_style="bold" if wants_colour(sys.stdout) else "")
    for row in rows:
        table.add_row(*(Text(escape_for_terminal(cell)) for cell in row))
    colours: Literal["auto"] | None = "auto" if wants_colour(sys.stdout) else None
    console = Console(highlight=False, color_system=colours, width=None if sys.stdout.isatty() else _WIDEST_PIPE)
    if not sys.stdout.isatty():
        console.width = max(1, console.measure(table).maximum + indent)
    with console.capture() as captured:
        console.print(Padding(table, (0, 0, 0, indent)))
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def toml_text(value: object) -> str:
    """A value as it would stand in a TOML file, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=not value.isprintable())
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(str(key))} = {toml_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_text(inner) for inner in value) + "]"
    return str(value)


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else toml_text(key)


# ---- findings

_FINDING_STYLES: Mapping[str, Style] = {"error": "problem", "warning": "note", "note": "quiet"}


def print_findings(findings: Iterable[Finding], indent: str = "") -> None:
    """One line each: `file:line:column: key: message [severity code]`."""
    for finding in findings:
        where = ":".join(str(part) for part in (_short(finding), finding.line, finding.column) if part is not None)
        said = ": ".join(escape_for_terminal(part) for part in (finding.key, finding.message) if part)
        kind = paint(f"[{finding.severity} {finding.code}]", _FINDING_STYLES[finding.severity])
        print(f"{indent}{paint(where, 'strong') + ': ' if where else ''}{said} {kind}")


def _short(finding: Finding) -> str | None:
    return None if finding.path is None else shown_path(finding.path)


def exit_code(findings: Iterable[Finding]) -> int:
    """FINDINGS when there is an error or a warning among them; a note is none."""
    return FINDINGS if any(finding.severity != "note" for finding in findings) else OK


# ---- JSON


def print_json(value: object) -> None:
    """ASCII only: what others wrote into a file must not steer the terminal."""
    print(json.dumps(value, indent=2, ensure_ascii=True))


def finding_as_dict(finding: Finding) -> dict[str, object]:
    """All its attributes, for JSON."""
    return dict(vars(finding))
