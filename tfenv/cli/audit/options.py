"""What the reports of `tfgpu audit` are asked by: which logs, and of what time."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tfenv.audit.query import LineTally, parse_moment
from tfenv.cli.output import FINDINGS, OK, print_message


def add_files(parser: argparse.ArgumentParser) -> None:
    """Add `--file`."""
    parser.add_argument(
        "--file",
        type=Path,
        nargs="+",
        action="extend",
        metavar="PATH",
        help="Read these logs and their rotated files (.1, .2.gz, …). Default: the log that the policy here names.",
    )


def parse_time(text: str) -> str:
    """Return a moment, spelled as in the records.

    Raises:
        ArgumentTypeError: Its text says what would be right.
    """
    try:
        # "5m" is what everybody types. In a policy it would be ambiguous.
        return parse_moment(re.sub(r"^(\d+)m$", r"\1min", text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def format_programs(programs: int, people: int) -> str:
    """Return how many programs of how many people: "1 program of 1 person"."""
    one, other = ("program" if programs == 1 else "programs"), ("person" if people == 1 else "people")
    return f"{programs:,} {one} of {people:,} {other}"


def report_unreadable(tally: LineTally) -> int:
    """Say what could not be read, and return the exit code."""
    for log, why in tally.left_out.items():
        report_unreadable_log(log, why)
    count = tally.unreadable
    if count:
        text = "1 line is not an audit record" if count == 1 else f"{count} lines are not audit records"
        print_message("audit", text)
    return FINDINGS if count or tally.left_out else OK


def report_unreadable_log(log: Path, why: str) -> None:
    """Say why a log was not read, or not to its end."""
    print_message("audit", f"skipped {log}: {why}")
