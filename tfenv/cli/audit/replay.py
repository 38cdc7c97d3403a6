"""`tfgpu audit replay`: who would have got less under another policy."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from tfenv.audit.query import RecordQuery
from tfenv.cli.audit.options import format_programs, report_unreadable
from tfenv.cli.output import FINDINGS, OK, USAGE, print_findings, print_json, print_message, shorten_path
from tfenv.cli.own_logs import find_logs
from tfenv.cli.tables import is_wide, print_table
from tfenv.errors import escape_for_terminal
from tfenv.replay.draft import DraftPolicy, read_draft
from tfenv.replay.run import ReplayResult, ReplayRow, replay_logs

PURPOSE = "Run the programs in the log through another policy, and show who would have got less, more or nothing."
EXIT_CODES = (
    "Exit codes: 0 nobody would have got less, 1 somebody would, or some lines or files cannot be read, "
    "2 wrong usage, or the policy has errors."
)

_COLUMNS = ("user", "GPU", "programs", "outcome", "had", "would have", "held by")
#: What fits on a line of a terminal of 80 characters.
_NARROW_COLUMNS = _COLUMNS[:-1]
_SHORT_UUID = 12
#: Examples that are shown, and rows that have one.
_MOST_EXAMPLES = 5
#: What is said of programs about which the log does not hold all.
_GAPS = {
    "groups-as-now": "have records without groups; the groups of today were taken",
    "no-groups": "have records without groups, and there is no such user here; they are left out",
    "no-size": "used GPUs whose size the log does not hold; percentages of those were not compared",
    "no-number": "used GPUs whose number on the machine the log does not hold, and the policy names GPUs by number; "
    "they are left out. Write UUIDs into the policy",
    "own-settings": "had a file of their user, site or project; the policy's [gpu] tables were left out for them, as "
    "theirs are nearer",
    "cut-short": "have records that were cut short; they are left out",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    parser.add_argument(
        "--policy",
        required=True,
        metavar="PATH",
        help="Run them through this policy: a directory like /etc/tfgpu, or a tfgpu.toml that is to stand there.",
    )
    parser.add_argument(
        "--observed", action="store_true", help="Act as if the policy's tables under [observe] were in force."
    )
    parser.add_argument(
        "--today",
        type=_parse_day,
        metavar="DATE",
        help="Compare tables that expire with this day, as in 2027-01-31 (default: today).",
    )


def _parse_day(text: str) -> str:
    from datetime import date

    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" is not a day; write it as in 2027-01-31') from None


def run(arguments: argparse.Namespace, query: RecordQuery) -> int:
    """Run the command.

    Args:
        arguments: Of the command line.
        query: Which records are wanted.

    Returns:
        The exit code.

    Raises:
        OSError: A log cannot be read.
    """
    given = vars(arguments)
    path = given["policy"]
    if not os.path.lexists(path):
        print_message("audit replay", f"{path}: there is no such file or directory")
        return USAGE
    policy = read_draft(path, given.get("today"))
    errors = [finding for finding in policy.findings if finding.severity == "error"]
    if errors:
        print_findings(errors)
        print_message("audit replay", "the policy has errors; correct them first")
        return USAGE
    logs, tally = find_logs(given.get("file"))
    result = replay_logs(logs, query, tally, policy, observed="observed" in given)
    if given.get("format") == "json":
        print_json(_describe_result(result, policy))
    else:
        _print_result(result, policy, path)
    unreadable = report_unreadable(tally)
    return FINDINGS if result.count("less") or result.count("nothing") else unreadable or OK


def _print_result(result: ReplayResult, policy: DraftPolicy, path: str) -> None:
    if not result.programs and not result.unknown:
        print_message("audit replay", "no records of programs that used a GPU match these options")
        return
    counted = format_programs(len(result.programs), len(result.users))
    print(f"{counted} through {shorten_path(os.path.abspath(path))}:")
    less, more, nothing = (result.count(kind) for kind in ("less", "more", "nothing"))
    print(f"{less:,} would have got less, {more:,} more, {nothing:,} no GPU.")
    rows = result.list_rows()
    if rows:
        print()
        wide = is_wide()
        print_table(_COLUMNS if wide else _NARROW_COLUMNS, [_format_row(row, policy, is_wide=wide) for row in rows])
        print("\nFor example:")
        for row in rows[:_MOST_EXAMPLES]:
            print(f"  {escape_for_terminal(_format_example(row, policy))}")
    if result.gaps:
        print("\nWhat the log does not hold:")
        for gap, programs in sorted(result.gaps.items()):
            print(f"  {len(programs):,} {'program' if len(programs) == 1 else 'programs'}: {_GAPS[gap]}.")


def _format_row(row: ReplayRow, policy: DraftPolicy, *, is_wide: bool) -> tuple[str, ...]:
    change = row.example
    had, would_have = ("", "") if change is None else (change.had, change.would_have)
    gpu = row.gpu if is_wide else row.gpu[:_SHORT_UUID]
    outcome = "no GPU" if row.kind == "nothing" else row.kind
    cells = (row.user, gpu or "-", f"{len(row.programs):,}", outcome, had[:40], would_have)
    return (*cells, ", ".join(_list_places(row, policy))) if is_wide else cells


def _list_places(row: ReplayRow, policy: DraftPolicy) -> list[str]:
    return sorted(shorten_path(policy.find_place(origin)) for origin in row.held_by)


def _format_example(row: ReplayRow, policy: DraftPolicy) -> str:
    record, change = row.example_record, row.example
    script = os.path.basename(str(record.get("script") or "")) or "a program"
    who = f"{row.user}, {script} (pid {record.get('pid')}) on {str(record['timestamp'])[:16].replace('T', ' ')} UTC"
    what = "" if change is None else f": {change.would_have} instead of {change.had}"
    places = ", ".join(_list_places(row, policy))
    return f"{who}{what}{f' ({places})' if places else ''}"


def _describe_result(result: ReplayResult, policy: DraftPolicy) -> Mapping[str, Any]:
    return {
        "programs": len(result.programs),
        "users": len(result.users),
        "less": result.count("less"),
        "more": result.count("more"),
        "nothing": result.count("nothing"),
        "unknown": len(result.unknown),
        "gaps": {gap: len(programs) for gap, programs in sorted(result.gaps.items())},
        "rows": [_describe_row(row, policy) for row in result.list_rows()],
    }


def _describe_row(row: ReplayRow, policy: DraftPolicy) -> Mapping[str, Any]:
    change = row.example
    example = {name: row.example_record.get(name) for name in ("timestamp", "host", "pid", "script")}
    return {
        "user": row.user,
        "gpu": row.gpu,
        "outcome": row.kind,
        "key": row.key,
        "programs": len(row.programs),
        "had": change and change.had,
        "would_have": change and change.would_have,
        "had_bytes": change and change.had_bytes,
        "would_have_bytes": change and change.would_have_bytes,
        "held_by": sorted(policy.find_place(origin) for origin in row.held_by),
        "example": example,
    }
