"""`tfgpu audit summary --observed`: whom the tables under `[observe]` would hit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tfenv.audit.observed_totals import ObservedTotals, summarize_observed
from tfenv.audit.query import RecordQuery
from tfenv.cli.audit.options import format_programs, report_unreadable
from tfenv.cli.output import format_time, print_json_line
from tfenv.cli.own_logs import find_logs
from tfenv.cli.tables import clip_cell, hide_empty_column, is_wide, print_table
from tfenv.errors import escape_for_terminal

_COLUMNS = ("user", "job", "key", "GPU", "programs", "has", "would have", "held by", "last (UTC)")
#: What fits on a line of a terminal of 80 characters, each column with its widest cell.
_NARROW_COLUMNS = {"user": 10, "job": 8, "key": 15, "GPU": 12, "programs": 8, "has": 9, "would have": 10}


def print_observed(query: RecordQuery, files: Sequence[Path] | None, *, by_job: bool, is_json: bool) -> int:
    """Print how many programs of how many people would have got less, and what of.

    Args:
        query: Which records are wanted.
        files: The logs. None: those that the policy here names.
        by_job: Whether each job has rows of its own.
        is_json: Whether to print one JSON value a line, or else a sentence and a table.

    Returns:
        The exit code: 1 if some lines are not records or some files are left out.

    Raises:
        OSError: A log cannot be read.
    """
    logs, tally = find_logs(files)
    rows = summarize_observed(logs, query, tally, by_job=by_job)
    if is_json:
        for row in rows:
            print_json_line(row.as_dict())
    elif rows:
        programs = set().union(*(row.processes for row in rows))
        print(f"{format_programs(len(programs), len({row.user for row in rows}))} would have got less.\n")
        _print_rows(rows)
    else:
        print("No program would have got less: no record says that a table under [observe] would take anything.")
    return report_unreadable(tally)


def _print_rows(rows: Sequence[ObservedTotals]) -> None:
    if is_wide():
        print_table(*hide_empty_column("job", _COLUMNS, [_format_row(row) for row in rows]))
    else:
        cells = [_clip(_format_row(row)[: len(_NARROW_COLUMNS)]) for row in rows]
        print_table(*hide_empty_column("job", tuple(_NARROW_COLUMNS), cells))


def _clip(cells: Iterable[str]) -> tuple[str, ...]:
    pairs = zip(cells, _NARROW_COLUMNS.values(), strict=True)
    return tuple(clip_cell(cell, widest) for cell, widest in pairs)


def _format_row(row: ObservedTotals) -> tuple[str, ...]:
    cells = (
        row.user, row.job or "", row.key, row.gpu or "-", str(len(row.processes)), row.has, row.would_have,
        ", ".join(sorted(row.held_by)) or "-", format_time(row.last),
    )  # fmt: skip
    return tuple(escape_for_terminal(cell) for cell in cells)
