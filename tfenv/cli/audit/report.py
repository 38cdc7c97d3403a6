"""`tfgpu audit report`: a page for people who would rather look than read."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tfenv.audit.query import LineTally, RecordQuery
from tfenv.cli.audit.options import add_files, parse_time, report_unreadable
from tfenv.cli.output import USAGE, print_message
from tfenv.cli.own_logs import find_logs
from tfenv.files import replace_file

PURPOSE = "Write a page that shows who used which GPU when, limits and peaks, clamps, waiting times and idle GPUs."
_MISSING = 'the report needs packages that are not installed; run: pip install "tfenv[report]"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--html",
        required=True,
        metavar="FILE",
        help="Write the page to this file, or to standard output if it is -. It needs no network and no other file.",
    )
    filters = parser.add_argument_group("filters")
    filters.add_argument("--user", action="append", metavar="NAME", help="Show only what this user did.")
    filters.add_argument(
        "--since", type=parse_time, metavar="WHEN", help='Read records since this time: "30d" or an ISO 8601 time.'
    )
    filters.add_argument("--until", type=parse_time, metavar="WHEN", help="Read records before this time.")
    add_files(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the page.

    Returns:
        The exit code: 1 if some lines are not records or some files are left out, 2 if a package is missing.

    Raises:
        OSError: A log cannot be read, or the page not be written.
    """
    given = vars(arguments)
    query = RecordQuery(
        users=frozenset(given.get("user", ())), since=given.get("since", ""), until=given.get("until", "")
    )
    logs, tally = find_logs(given.get("file"))
    try:
        page = _make_page(query, logs, tally, _name_wishes(given))
    except ImportError as error:
        if error.name not in ("msgspec", "vl_convert"):
            raise
        print_message("audit report", _MISSING)
        return USAGE
    try:
        _write(given["html"], page)
    except BrokenPipeError:
        raise
    except OSError as error:
        print_message("audit report", f"cannot write {given['html']}: {error.strerror or error}")
        return USAGE
    return report_unreadable(tally)


def _name_wishes(given: Mapping[str, Any]) -> list[str]:
    users = [f"user {name}" for name in given.get("user", ())]
    return [*users, *(f"{name} {given[name][:19]}Z" for name in ("since", "until") if name in given)]


def _make_page(query: RecordQuery, logs: Sequence[Path], tally: LineTally, wishes: Sequence[str]) -> str:
    from tfenv.audit.report.collect import collect_logs
    from tfenv.audit.report.page import check_drawing, make_page
    from tfenv.audit.report.times import LocalClock
    from tfenv.audit.report.view import make_view

    check_drawing()
    now = time.time_ns() // 1_000_000
    view = make_view(collect_logs(logs, query, tally, now), LocalClock())
    return make_page(view, tally, list(map(str, logs)), wishes, now)


def _write(target: str, page: str) -> None:
    if target == "-":
        sys.stdout.write(page)
        sys.stdout.flush()
        return
    # A report names users and their programs: who may read it is for the user's umask, as with any new file.
    mask = os.umask(0)
    os.umask(mask)
    replace_file(target, page, 0o666 & ~mask)
