"""What all commands share: exit codes, text or JSON, colour only where it helps, one way to complain."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Literal, TextIO

from tfenv.errors import Finding, escape_for_terminal

OK, FINDINGS, USAGE, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 130
#: Of a command that `run` or `simulate` could not start, as in a shell.
NOT_EXECUTABLE, NOT_FOUND = 126, 127

Style = Literal["ok", "note", "problem", "strong", "quiet"]
_ANSI_CODES: Mapping[Style, str] = {"ok": "32", "note": "33", "problem": "31", "strong": "1", "quiet": "2"}
_SEVERITY_STYLES: Mapping[str, Style] = {"error": "problem", "warning": "note", "note": "quiet"}
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


def add_format_option(parser: argparse.ArgumentParser) -> None:
    """Add `--format text|json` to a command that reports something."""
    parser.add_argument("--format", choices=("text", "json"), default="text", help="Print text, or JSON for programs.")


def add_description(parser: argparse.ArgumentParser, text: str) -> None:
    """Add sentences to a command's description, which begins with the command's purpose."""
    parser.description = f"{parser.description} {text}"


# ---- text


def print_message(command: str | None, text: str) -> None:
    """Print one line on stderr. It begins with the command's name, or the program's alone if that is None."""
    print_error(escape_for_terminal(f"tfgpu {command}: {text}" if command else f"tfgpu: {text}"))


def print_error(text: str) -> None:
    """Print text on stderr. Where nobody can read it, the exit code alone tells what went wrong."""
    with suppress(OSError):
        print(text, file=sys.stderr)


def supports_colour(stream: TextIO) -> bool:
    """Return whether colour is welcome: a terminal that has it, and no NO_COLOR (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def paint(text: str, style: Style) -> str:
    """Return the text in a style if stdout supports colour, else as it is."""
    return f"\x1b[{_ANSI_CODES[style]}m{text}\x1b[0m" if supports_colour(sys.stdout) else text


def shorten_path(path: str) -> str:
    """Return a path relative to the working directory or to the home (`~`) if it is below. Safe to print."""
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


def format_time(timestamp: str) -> str:
    """Return the time of a record for people, to the second: "2026-11-05 09:31:07"."""
    return timestamp[:19].replace("T", " ")


def format_toml(value: object) -> str:
    """Return a value as a TOML file has it, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=not value.isprintable())
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_format_key(str(key))} = {format_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(format_toml(inner) for inner in value) + "]"
    return str(value)


def _format_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else format_toml(key)


# ---- findings


def print_findings(findings: Iterable[Finding], indent: str = "") -> None:
    """Print one line for each finding: `file:line:column: key: message [severity code]`."""
    for finding in findings:
        path = None if finding.path is None else shorten_path(finding.path)
        where = ":".join(str(part) for part in (path, finding.line, finding.column) if part is not None)
        what = ": ".join(escape_for_terminal(part) for part in (finding.key, finding.message) if part)
        kind = paint(f"[{finding.severity} {finding.code}]", _SEVERITY_STYLES[finding.severity])
        print(f"{indent}{paint(where, 'strong') + ': ' if where else ''}{what} {kind}")


def get_exit_code(findings: Iterable[Finding]) -> int:
    """Return FINDINGS if one of them is an error or a warning, else OK."""
    return FINDINGS if any(finding.severity != "note" for finding in findings) else OK


# ---- JSON, in ASCII only: what others wrote into a file must not steer the terminal


def print_json(value: object) -> None:
    """Print a value as JSON that people can read as well."""
    print(json.dumps(value, indent=2, ensure_ascii=True))


def print_json_line(value: object) -> None:
    """Print a value as one line of JSON."""
    print(json.dumps(value, ensure_ascii=True, separators=(",", ":")))
