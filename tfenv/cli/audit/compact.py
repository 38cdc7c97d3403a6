"""`tfgpu audit compact`: keep the records of many logs in a store that is small and quick to sum up."""

from __future__ import annotations

import argparse
from pathlib import Path

from tfenv.audit.query import RecordQuery
from tfenv.audit.store import compact_logs
from tfenv.cli.audit.options import add_files, parse_time, report_unreadable
from tfenv.cli.output import USAGE, print_message
from tfenv.cli.own_logs import find_logs

PURPOSE = "Keep the records of logs in a store of Parquet files, which the other reports read as they read logs."
_MISSING = 'the store needs DuckDB, which is not installed; run: pip install "tfenv[fleet]"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--into",
        type=Path,
        required=True,
        metavar="DIR",
        help="Write them into the store in this directory. A record that it has already is not added again.",
    )
    parser.add_argument(
        "--since", type=parse_time, metavar="WHEN", help='Read records since this time: "30d" or an ISO 8601 time.'
    )
    add_files(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        The exit code: 1 if some lines are not records or some files are left out, 2 if DuckDB is missing.

    Raises:
        StoreError: The store is in use, or damaged.
        OSError: A log cannot be read, or the store not be written.
    """
    given = vars(arguments)
    logs, tally = find_logs(given.get("file"))
    try:
        done = compact_logs(logs, given["into"], RecordQuery(since=given.get("since", "")), tally)
    except ImportError:
        print_message("audit compact", _MISSING)
        return USAGE
    print(f"{done.added:,} records added, {done.known:,} were there already, {done.skipped:,} logs unchanged.")
    return report_unreadable(tally)
