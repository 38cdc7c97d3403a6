"""What the reports of `tfgpu audit` are asked by: which logs, and of what time."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tfenv.audit.query import parse_moment


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
