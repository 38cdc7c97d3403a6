"""`tfgpu audit revisions`: which machine runs which version of the policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tfenv.audit.query import RecordQuery, read_records
from tfenv.audit.revisions import HostRevision, find_prevalent, list_revisions
from tfenv.cli.audit.options import report_unreadable
from tfenv.cli.output import format_time, print_json_line, print_message
from tfenv.cli.own_logs import find_logs
from tfenv.cli.tables import print_table

PURPOSE = "Show which machine runs which version of the policy, and since when."
_COLUMNS = ("host", "revision", "since (UTC)", "last (UTC)", "users", "")


def print_revisions(query: RecordQuery, files: Sequence[Path] | None, *, is_json: bool) -> int:
    """Print the versions of the policy on each machine.

    Args:
        query: Which records are wanted.
        files: The logs. None: those that the policy here names.
        is_json: Whether to print one JSON value a line, or else a table.

    Returns:
        The exit code: 1 if some lines are not records or some files are left out.

    Raises:
        OSError: A log cannot be read.
    """
    logs, tally = find_logs(files)
    rows = list_revisions(read_records(logs, query, tally))
    if is_json:
        for row in rows:
            print_json_line(row.as_dict())
    elif rows:
        prevalent = find_prevalent(rows)
        print_table(_COLUMNS, [_format_row(row, prevalent) for row in rows])
    else:
        print_message("audit revisions", "no records that match these options name a version of the policy")
    return report_unreadable(tally)


def _format_row(row: HostRevision, prevalent: str | None) -> tuple[str, ...]:
    first, last = format_time(row.first), format_time(row.last)
    remark = "" if row.is_current else "before"
    if row.is_current and row.revision != prevalent:
        remark = "differs from most machines"
    return row.host, row.revision or "no machine-wide file", first, last, str(len(row.users)), remark
