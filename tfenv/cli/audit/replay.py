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
from tfenv.cli.tables import clip_cell, is_wide, print_table
from tfenv.config.values import read_date
from tfenv.errors import escape_for_terminal
from tfenv.replay.draft import DraftPolicy, read_draft
from tfenv.replay.run import ReplayResult, ReplayRow, replay_logs
from tfenv.replay.verdict import Gap

PURPOSE = "Run the programs in the log through another policy, and show who would have got less, more or nothing."
EXIT_CODES = (
    "Exit codes: 0 nobody would have got less, 1 somebody would, or some lines or files cannot be read, "
    "2 wrong usage, or the policy has errors."
)

_COLUMNS = ("user", "GPU", "programs", "outcome", "had", "would have", "held by")
#: What fits on a line of a terminal of 80 characters.
_NARROW_COLUMNS = _COLUMNS[:-1]
_SHORT_UUID = 12
_SHORT_USER = 16
#: Examples that are shown, and rows that have one.
_MOST_EXAMPLES = 5
#: What is said of programs about which the log does not hold all.
_GAPS: Mapping[Gap, str] = {
    "groups-as-now": "their records have no groups, so the groups that the users have on this machine now were taken",
    "no-user": "their records have no groups, and there is no such user here",
    "cut-short": "their records were cut short",
    "no-size": "the memory of their GPUs is not in the log, and sizes and percentages cannot be compared without it",
    "no-number": "the number of their GPUs is not in the log, and the policy names GPUs by number; write UUIDs",
    "no-card": "their GPUs are not in the log by UUID and name, or are MIG instances of GPUs that are not",
    "no-rank": "the policy gives each rank a GPU, and local ranks are not in the log",
    "no-share": 'the policy says "granted", and the share that the launcher gave is not in these records',
    "no-grant": "the policy asks for a grant, and whether the job had one is not in the log",
    "other-gpus": "the policy names other GPUs than those that they had",
    "own-settings": "they had, or may have had, a file of their user, site or project that sets what [gpu] sets",
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
        "--observed", action="store_true", help="Apply the policy's tables under [observe], as if they were in force."
    )
    parser.add_argument(
        "--today",
        type=_parse_day,
        metavar="DATE",
        help="Check tables that expire against this day, as in 2027-01-31 (default: today).",
    )


def _parse_day(text: str) -> str:
    try:
        return read_date(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
    is_json = given.get("format") == "json"
    wrong = [finding for finding in policy.findings if finding.severity != "note"]
    is_broken = any(finding.severity == "error" for finding in wrong)
    if is_broken or not is_json:
        print_findings(wrong)
    if is_broken or not policy.documents:
        reason = "the policy has errors; correct them first" if is_broken else f"{path}: there is no policy here"
        print_message("audit replay", reason)
        return USAGE
    logs, tally = find_logs(given.get("file"))
    result = replay_logs(logs, query, tally, policy, observed="observed" in given)
    if is_json:
        print_json(_describe_result(result, policy))
    else:
        _print_result(result, policy, path)
    unreadable = report_unreadable(tally)
    return FINDINGS if result.count("less") or result.count("nothing") else unreadable or OK


def _print_result(result: ReplayResult, policy: DraftPolicy, path: str) -> None:
    if not result.programs:
        print_message("audit replay", "no records of programs that used a GPU match these options")
        return
    counted = format_programs(len(result.programs), len(result.users))
    print(f"{counted} through {shorten_path(os.path.abspath(path))}:")
    less, more, nothing = (result.count(kind) for kind in ("less", "more", "nothing"))
    unknown = result.count_unknown()
    print(f"{less:,} would have got less, {more:,} more, {nothing:,} no GPU. {unknown:,} unknown.")
    rows = result.list_rows()
    if rows:
        print()
        wide = is_wide()
        print_table(_COLUMNS if wide else _NARROW_COLUMNS, [_format_row(row, policy, is_wide=wide) for row in rows])
        print("\nThe newest of them:")
        for row in rows[:_MOST_EXAMPLES]:
            print(f"  {escape_for_terminal(_format_example(row, policy))}")
    if result.gaps:
        print("\nWhat the log does not hold:")
        for gap, programs in sorted(result.gaps.items()):
            print(f"  {len(programs):,} {'program' if len(programs) == 1 else 'programs'}: {_GAPS[gap]}.")


def _format_row(row: ReplayRow, policy: DraftPolicy, *, is_wide: bool) -> tuple[str, ...]:
    change = row.change
    gpu = row.gpu if is_wide else row.gpu[:_SHORT_UUID]
    user = row.user if is_wide else clip_cell(row.user, _SHORT_USER)
    outcome = "no GPU" if row.kind == "nothing" else row.kind
    had = change.had if is_wide else change.had[:_SHORT_UUID]
    cells = (user, gpu or "-", f"{len(row.programs):,}", outcome, had, change.would_have)
    return (*cells, ", ".join(_list_places(row, policy))) if is_wide else cells


def _list_places(row: ReplayRow, policy: DraftPolicy) -> list[str]:
    return sorted(shorten_path(policy.find_place(origin)) for origin in row.held_by)


def _format_example(row: ReplayRow, policy: DraftPolicy) -> str:
    change, example = row.change, row.example
    script = os.path.basename(example.script or "") or "a program"
    time = example.timestamp[:16].replace("T", " ")
    who = f"{row.user}, {script} (pid {example.pid} on {example.host}), {time} UTC"
    places = ", ".join(_list_places(row, policy))
    return f"{who}: {change.would_have} instead of {change.had}{f' ({places})' if places else ''}"


def _describe_result(result: ReplayResult, policy: DraftPolicy) -> Mapping[str, Any]:
    return {
        "programs": len(result.programs),
        "users": len(result.users),
        "less": result.count("less"),
        "more": result.count("more"),
        "nothing": result.count("nothing"),
        "unknown": result.count_unknown(),
        "gaps": {gap: len(programs) for gap, programs in sorted(result.gaps.items())},
        "rows": [_describe_row(row, policy) for row in result.list_rows()],
    }


def _describe_row(row: ReplayRow, policy: DraftPolicy) -> Mapping[str, Any]:
    change = row.change
    return {
        "user": row.user,
        "gpu": row.gpu,
        "outcome": row.kind,
        "key": row.key,
        "programs": len(row.programs),
        "had": change.had,
        "would_have": change.would_have,
        "had_bytes": change.had_bytes,
        "would_have_bytes": change.would_have_bytes,
        "held_by": sorted(policy.find_place(origin) for origin in row.held_by),
        "example": row.example._asdict(),
    }
