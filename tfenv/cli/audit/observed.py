"""`tfgpu audit summary --observed`: whom the tables under `[observe]` would hit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tfenv.audit.observed_totals import ObservedTotals, count_programs, sum_up_observed
from tfenv.audit.query import RecordQuery
from tfenv.cli.audit.options import format_programs, report_unreadable
from tfenv.cli.output import print_json_line
from tfenv.cli.own_logs import find_logs
from tfenv.cli.tables import is_wide, print_table

_COLUMNS = ("user", "key", "GPU", "programs", "have", "would have", "held by", "last (UTC)")
#: What fits on a line of a terminal of 80 characters.
_NARROW_COLUMNS = ("user", "key", "GPU", "programs", "have", "would have")
_SHORT_UUID = 12


def print_observed(query: RecordQuery, files: Sequence[Path] | None, *, is_json: bool) -> int:
    """Print what programs would lose under the tables that are observed.

    Args:
        query: Which records are wanted.
        files: The logs. None: those that the policy here names.
        is_json: Whether to print one JSON value a line, or else a sentence and a table.

    Returns:
        The exit code: 1 if some lines are not records or some files are left out.

    Raises:
        OSError: A log cannot be read.
    """
    logs, tally = find_logs(files)
    rows = sum_up_observed(logs, query, tally)
    if is_json:
        for row in rows:
            print_json_line(row.as_dict())
    elif rows:
        print(f"{format_programs(*count_programs(rows))} would have got less.\n")
        wide = is_wide()
        print_table(_COLUMNS if wide else _NARROW_COLUMNS, [_format_row(row, is_wide=wide) for row in rows])
    else:
        print("No program would have got less: no record says that a table under [observe] would take anything.")
    return report_unreadable(tally)


def _format_row(row: ObservedTotals, *, is_wide: bool) -> tuple[str, ...]:
    gpu = row.gpu if is_wide else row.gpu[:_SHORT_UUID]
    cells = (row.user, row.key, gpu or "-", str(len(row.processes)), row.asked, row.given)
    return (*cells, ", ".join(sorted(row.held_by)), row.last[:19].replace("T", " ")) if is_wide else cells
