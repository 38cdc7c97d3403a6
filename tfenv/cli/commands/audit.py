"""`tfgpu audit`: what was applied, to whom and when, per user and GPU, and as figures for Prometheus."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tfenv.audit.gpu_totals import UserGpuTotals, read_use, summarize_logs
from tfenv.audit.job_names import format_step, read_job
from tfenv.audit.job_report import make_job_report
from tfenv.audit.query import (
    LineTally,
    LoggedRecord,
    RecordQuery,
    get_gpu_id,
    list_asked,
    list_logged_devices,
    read_newest,
    read_records,
    select_records,
)
from tfenv.audit.rotation import LogTail, find_all_log_files
from tfenv.audit.store import summarize_store
from tfenv.cli.audit import compact, observed, replay, report, revisions
from tfenv.cli.audit.options import add_files, parse_time, report_unreadable, report_unreadable_log
from tfenv.cli.job_table import build_job_report
from tfenv.cli.output import USAGE, add_description, format_time, print_json_line, print_message
from tfenv.cli.own_logs import find_logs, find_named_logs, find_store
from tfenv.cli.tables import clip_cell, hide_empty_column, is_wide, print_renderable, print_table
from tfenv.errors import escape_for_terminal
from tfenv.policy.units import MIB, format_bytes

EVENTS = ("loaded", "applied", "clamped", "failed", "disabled", "changed", "ended", "wall_changed")
OUTCOMES = ("applied", "clamped", "too_late", "degraded", "cpu", "failed")
_DEFAULT_COUNT = 20
_POLL_SECONDS = 0.2
_MIB_NUMBER = re.compile(r"\b\d{1,12}(?:\.\d+)?(?=[],])")
_RECORD_COLUMNS = (
    "time (UTC)", "user", "pid", "job", "event", "GPUs", "asked", "limit", "growth", "script", "findings"
)  # fmt: skip
#: What fits on a line of a terminal of 80 characters, each column with its widest cell. Without and with a job.
_NARROW_COLUMNS = {"time": 14, "user": 12, "GPUs": 18, "asked": 9, "limit": 9, "outcome": 8}
_NARROW_JOB_COLUMNS = {"time": 14, "user": 8, "job": 10, "GPUs": 12, "asked": 8, "limit": 8, "outcome": 8}
_SUMMARY_COLUMNS = ("user", "job", "GPU", "processes", "asked", "given", "clamped", "cut", "failed", "last (UTC)")
_USAGE = """%(prog)s [options]
       %(prog)s job ID [options]
       %(prog)s summary [options]
       %(prog)s export --prometheus FILE [options]
       %(prog)s replay --policy DIR [options]
       %(prog)s report --html FILE [options]
       %(prog)s compact --into DIR [options]
       %(prog)s revisions [options]"""
_JOB = "Show what a job did with its GPUs: each process with its limits, its peaks and its time."
_JOB_ID = (
    "It is named by the number of the job or array (14), by a task of the array (14_0) or a step (14.0), by a job, "
    "actor or task of Ray, by a pod, a notebook's file, a JupyterHub user, or the job's name."
)
_SUMMARY = "Count processes, limits, clamps and failures per user and GPU."
_EXPORT = "Write totals for the textfile collector of Prometheus' node exporter."
_EXIT_CODES = "Exit codes: 0 ok, 1 some lines or files cannot be read, 2 wrong usage."


# ---- options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(parser, f"Use filters to find out who was limited, when, and by which file. {_EXIT_CODES}")
    parser.usage = _USAGE
    # What is not given is not set, so that `tfgpu audit --user alice summary` keeps alice.
    parser.argument_default = argparse.SUPPRESS
    _add_filters(parser)
    add_files(parser)
    parser.add_argument(
        "-n", "--lines", type=_parse_lines, metavar="N", help="Show only the newest N (table: 20, json: all)."
    )
    parser.add_argument("-f", "--follow", action="store_true", help="Wait for new records and show them.")
    _add_format(parser)
    actions = parser.add_subparsers(title="other reports", metavar="ACTION", dest="action", prog=parser.prog)
    _add_job_report(actions)
    _add_summary(actions)
    _add_export(actions)
    again = _add_action(actions, "replay", replay.PURPOSE, exit_codes=replay.EXIT_CODES)
    replay.add_arguments(again)
    versions = _add_action(actions, "revisions", revisions.PURPOSE)
    for each in (again, versions):
        _add_filters(each)
        add_files(each)
        _add_format(each)
    report.add_arguments(_add_action(actions, "report", report.PURPOSE))
    compact.add_arguments(_add_action(actions, "compact", compact.PURPOSE))


def _add_summary(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    summary = _add_action(actions, "summary", _SUMMARY)
    _add_filters(summary)
    summary.add_argument("--by-job", action="store_true", help="Count each job by itself.")
    summary.add_argument(
        "--observed",
        action="store_true",
        help="Show instead what programs would lose if the tables under [observe] were in force.",
    )
    add_files(summary)
    _add_format(summary)


def _add_export(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    more = "It counts what was added to the logs since the last time."
    export_totals = _add_action(actions, "export", _EXPORT, more)
    export_totals.add_argument(
        "--prometheus",
        type=Path,
        required=True,
        metavar="FILE",
        help="Write this .prom file in the collector's directory.",
    )
    export_totals.add_argument(
        "--by-job",
        action="store_true",
        help="Count each job by itself, in a label. There are as many series as jobs, so the file must be a new one.",
    )
    add_files(export_totals)


def _add_action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    purpose: str,
    more: str = "",
    *,
    exit_codes: str = _EXIT_CODES,
) -> argparse.ArgumentParser:
    description = " ".join(filter(None, (purpose, more, exit_codes)))
    return actions.add_parser(name, help=purpose, description=description, argument_default=argparse.SUPPRESS)


def _add_job_report(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    job = _add_action(actions, "job", _JOB, "A process that was killed has no peak.")
    job.add_argument("job", action="append", metavar="ID", help=f"Show this job. {_JOB_ID}")
    _add_filters(job, has_job=False)
    add_files(job)
    _add_format(job)


def _add_filters(parser: argparse.ArgumentParser, *, has_job: bool = True) -> None:
    filters = parser.add_argument_group("filters")
    if has_job:
        filters.add_argument("--job", action="append", metavar="ID", help=f"Show only records of this job. {_JOB_ID}")
    filters.add_argument(
        "--event",
        action="append",
        type=_parse_event,
        metavar="EVENT",
        help=f"Show only records of this event: {', '.join(EVENTS)}.",
    )
    filters.add_argument("--outcome", action="append", choices=OUTCOMES, help="Show only records with this outcome.")
    filters.add_argument("--user", action="append", metavar="NAME", help="Show only records of this user.")
    filters.add_argument("--host", action="append", metavar="NAME", help="Show only records of this machine.")
    filters.add_argument("--uid", action="append", type=int, help="Show only records of this user ID.")
    filters.add_argument(
        "--gpu",
        action="append",
        metavar="GPU",
        help='Show only records of this GPU: the start of a UUID, or "name:*A100*".',
    )
    filters.add_argument(
        "--project", metavar="DIR", help="Show only records of projects and scripts in or below this directory."
    )
    filters.add_argument(
        "--script", metavar="GLOB", help="Show only records of this program: a path, file name or glob."
    )
    filters.add_argument(
        "--since",
        type=parse_time,
        metavar="WHEN",
        help='Show only records since this time: "2h", "7d" or an ISO 8601 time.',
    )
    filters.add_argument("--until", type=parse_time, metavar="WHEN", help="Show only records before this time.")


def _add_format(parser: argparse.ArgumentParser) -> None:
    # "text", as other commands have it, is the table.
    parser.add_argument(
        "--format",
        choices=("table", "json", "text"),
        metavar="{table,json}",
        help="Print a table, or one JSON value per line.",
    )


def _parse_event(text: str) -> str:
    name = text.removeprefix("policy_")
    if name not in EVENTS:
        raise argparse.ArgumentTypeError(f'"{text}" is not an event; the events are {", ".join(EVENTS)}')
    return name if name == "wall_changed" else f"policy_{name}"


def _parse_lines(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f'"{text}" is not a number of records')
    return int(text)


# ---- what is done


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    try:
        return _run_action(arguments.action, arguments)
    except BrokenPipeError:  # `tfgpu audit | head`
        raise
    except OSError as error:
        print_message("audit", f"{error.filename or 'the audit log'}: {error.strerror or error}")
        return USAGE


def _run_action(action: str | None, arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    files, query, is_json, by_job = (
        given.get("file"),
        _build_query(given),
        given.get("format") == "json",
        "by_job" in given,
    )
    summarize = observed.print_observed if "observed" in given else print_summary
    actions: Mapping[str | None, Callable[[], int]] = {
        "export": lambda: export_figures(arguments.prometheus, files, by_job=by_job),
        "summary": lambda: summarize(query, files, by_job=by_job, is_json=is_json),
        "report": lambda: report.run(arguments),
        "replay": lambda: replay.run(arguments, query),
        "compact": lambda: compact.run(arguments),
        "revisions": lambda: revisions.print_revisions(query, files, is_json=is_json),
        "job": lambda: print_job(given["job"][-1], query, files, is_json=is_json),
    }
    show = follow_records if "follow" in given else print_records
    return actions.get(action, lambda: show(query, files, given.get("lines"), is_json=is_json))()


def _build_query(given: Mapping[str, Any]) -> RecordQuery:
    return RecordQuery(
        events=frozenset(given.get("event", ())),
        users=frozenset(given.get("user", ())),
        hosts=frozenset(given.get("host", ())),
        uids=frozenset(given.get("uid", ())),
        outcomes=frozenset(given.get("outcome", ())),
        gpus=frozenset(given.get("gpu", ())),
        jobs=frozenset(given.get("job", ())),
        project=os.path.abspath(given["project"]) if "project" in given else None,
        script=given.get("script"),
        since=given.get("since", ""),
        until=given.get("until", ""),
    )


def print_records(query: RecordQuery, files: Sequence[Path] | None, count: int | None, *, is_json: bool) -> int:
    """Print the records that are wanted.

    Args:
        query: Which ones.
        files: The logs. None: those that the policy here names.
        count: How many, the newest. None: all of them as JSON, a screenful in a table.
        is_json: Whether to print one JSON value a line, or else a table.

    Returns:
        The exit code: 1 if some lines are not records or some files are left out.

    Raises:
        OSError: A log cannot be read.
    """
    logs, tally = find_logs(files)
    if is_json:
        records = read_records(logs, query, tally) if count is None else read_newest(logs, query, tally, count)
        for record in records:
            print_json_line(record)
    else:
        newest = read_newest(logs, query, tally, _DEFAULT_COUNT if count is None else count)
        if newest:
            _print_records(newest)
        else:
            _print_nothing(query)
    return report_unreadable(tally)


def follow_records(query: RecordQuery, files: Sequence[Path] | None, count: int | None, *, is_json: bool) -> NoReturn:
    """Print the newest records, then all that come, until Ctrl-C. The arguments are those of `print_records`.

    Raises:
        OSError: A log cannot be read.
    """
    logs, origin = find_named_logs(files)
    tally = LineTally(origin=origin)
    existing = [log for log in find_all_log_files(logs) if log.exists()]
    tails = [LogTail(path, origin) for path in logs]
    ends = {tail.path: tail.position for tail in tails}
    _print_stream(
        read_newest(existing, query, tally, _DEFAULT_COUNT if count is None else count, ends), is_json=is_json
    )
    reported: set[tuple[Path, str]] = set()
    while True:
        for tail in tails:
            _print_stream(select_records(tail.poll(), query, tally), is_json=is_json)
        refused = {(tail.path, tail.refusal) for tail in tails if tail.refusal}
        for log, why in sorted((refused | set(tally.left_out.items())) - reported):
            report_unreadable_log(log, why)
            reported.add((log, why))
        time.sleep(_POLL_SECONDS)


def print_job(job: str, query: RecordQuery, files: Sequence[Path] | None, *, is_json: bool) -> int:
    """Print what a job did with its GPUs.

    The other arguments and the exit code are those of `print_records`.

    Args:
        job: Its name, as it was asked for.

    Raises:
        OSError: A log cannot be read.
    """
    logs, tally = find_logs(files)
    report = make_job_report(job, read_records(logs, query, tally))
    if is_json:
        print_json_line(report.as_dict())
    elif report.processes:
        print_renderable(build_job_report(report))
    else:
        print_message("audit", f"no process of job {job} used a GPU under a policy, or this log does not have it")
    return report_unreadable(tally)


def print_summary(query: RecordQuery, files: Sequence[Path] | None, *, by_job: bool, is_json: bool) -> int:
    """Print processes, limits, clamps and failures per user and GPU.

    The other arguments and the exit code are those of `print_records`.

    Args:
        by_job: Whether each job has rows of its own.

    Raises:
        OSError: A log cannot be read.
    """
    store = None if by_job else find_store(files, query)
    logs, tally = find_logs(files) if store is None else ([], LineTally())
    rows = list(summarize_logs(logs, query, tally, by_job=by_job) if store is None else _summarize_store(store, query))
    if is_json:
        for row in rows:
            print_json_line(row.as_dict())
    elif rows:
        print_table(*hide_empty_column("job", _SUMMARY_COLUMNS, [_format_summary_row(row) for row in rows]))
    else:
        _print_nothing(query)
    return report_unreadable(tally)


def _summarize_store(folder: Path, query: RecordQuery) -> Iterator[UserGpuTotals]:
    summary = summarize_store(folder, query)
    if not summary.is_exact:
        print_message("audit", "so many processes are counted to about 2 %; all other figures are exact")
    yield from summary.rows


def export_figures(target: Path, files: Sequence[Path] | None, *, by_job: bool = False) -> int:
    """Add what is new in the logs to the figures in a file for Prometheus.

    Args:
        target: The file.
        files: The logs. None: those that the policy here names.
        by_job: Whether each job has series of its own.

    Returns:
        The exit code: 1 if some lines are not records or some files are left out, 2 if the file was written
        by something else.

    Raises:
        OSError: A log cannot be read, or the file not be written.
    """
    from tfenv.audit.prometheus import ForeignFileError, export_totals

    logs, origin = find_named_logs(files)
    tally = LineTally(origin=origin)
    try:
        export_totals(target, logs, tally, by_job=by_job)
    except ForeignFileError as error:
        print_message("audit", f"{target}: {error}")
        return USAGE
    return report_unreadable(tally)


# ---- output


def _print_stream(records: Iterable[LoggedRecord], *, is_json: bool) -> None:
    """Print records as they come: nobody knows how wide the columns of a table would be."""
    for record in records:
        if is_json:
            print_json_line(record)
        else:
            print("  ".join(cell or "-" for cell in _format_record(record)))
    sys.stdout.flush()


def _print_nothing(query: RecordQuery) -> None:
    """Say that there are no records, or none that were asked for."""
    if query == RecordQuery():
        print_message("audit", "no records; tfenv writes one when a program imports a framework under a policy")
    else:
        print_message("audit", "no records match these options")


def _print_records(records: Sequence[LoggedRecord]) -> None:
    """Print a table, a line for each record, however narrow the terminal is."""
    if is_wide():
        print_table(*hide_empty_column("job", _RECORD_COLUMNS, [_format_record(record) for record in records]))
        return
    columns = _NARROW_JOB_COLUMNS if any(map(read_job, records)) else _NARROW_COLUMNS
    print_table(tuple(columns), [_format_narrow_record(record, columns) for record in records])


def _format_narrow_record(record: LoggedRecord, columns: Mapping[str, int]) -> tuple[str, ...]:
    cells = {
        # A year that everybody knows, and an offset that the manual tells, take a quarter of the line.
        "time": record["timestamp"][5:19].replace("T", " "),
        "user": str(record.get("user")),
        "job": format_step(read_job(record)),
        "GPUs": _format_gpus(record),
        "asked": _format_asked_memory(record),
        "limit": _format_peaks(record) or _format_limits(record),
        "outcome": str(record.get("status") or _format_event(record)),
    }
    pairs = ((cells[name], widest) for name, widest in columns.items())
    return tuple(clip_cell(text, widest) for text, widest in pairs)


def _format_record(record: LoggedRecord) -> tuple[str, ...]:
    cells = (
        format_time(record["timestamp"]),
        record.get("user"),
        record.get("pid"),
        format_step(read_job(record)),
        _format_event(record),
        _format_gpus(record),
        "; ".join(_list_cut(record)),
        "; ".join(filter(None, (_format_limits(record), _format_peaks(record)))),
        _format_growth(record.get("growth")),
        str(record.get("cgroup") or record.get("script") or "").rpartition("/")[2],
        _format_findings(record),
    )
    return tuple(escape_for_terminal("" if cell is None else str(cell)) for cell in cells)


def _format_growth(growth: object) -> str:
    return ("on" if growth else "off") if isinstance(growth, bool) else ""


def _format_event(record: LoggedRecord) -> str:
    name = str(record["event"]).removeprefix("policy_")
    status = record.get("status")
    return f"{name} ({status})" if status not in (None, name) else name


def _format_gpus(record: LoggedRecord) -> str:
    if record.get("devices", ()) is None:
        return "all"
    if record["event"] == "wall_changed":
        return ",".join(get_gpu_id(limit)[:12] for limit in record.get("cgroup_limits", ()))
    return ",".join(get_gpu_id(device)[:12] for device in list_logged_devices(record))


def _format_asked_memory(record: LoggedRecord) -> str:
    """Return how much memory was asked for and not given. Where it was something else, what that was."""
    if record["event"] != "policy_clamped":
        return ""
    uses = [read_use(record, place, device) for place, device in enumerate(list_logged_devices(record))]
    sizes = [_format_largest(use.asked_bytes, use.asked_fraction) for use in uses]
    return _join_limits(sizes) or "; ".join(text.partition(" = ")[2] for text in _list_cut(record))


def _list_cut(record: LoggedRecord) -> list[str]:
    """Return what was asked for and not given. What a plan says of it may turn out otherwise."""
    return [_format_split(text) for text in list_asked(record)] if record["event"] == "policy_clamped" else []


def _format_split(asked: str) -> str:
    """Return what was asked for, with sizes in place of the MiB in which TensorFlow counts virtual devices."""
    if not asked.startswith("virtual_devices = "):
        return asked
    return _MIB_NUMBER.sub(lambda found: format_bytes(int(float(found[0]) * MIB)), asked)


def _format_limits(record: LoggedRecord) -> str:
    if record["event"] == "wall_changed":
        after = [limit["after_bytes"] for limit in record.get("cgroup_limits", ())]
        return _join_limits(["no limit" if size is None else format_bytes(size) for size in after])
    return _join_limits([_format_limit(entry) for entry in (list_logged_devices(record) or [record])])


def _format_peaks(record: LoggedRecord) -> str:
    """Return the highest peak of a process that ended, as a part of the limit where there is one."""
    peak = make_job_report("", [record]).fullest if record["event"] == "policy_ended" else None
    if peak is None or peak.peak_bytes is None:
        return ""
    return f"peak {format_bytes(peak.peak_bytes) if peak.part is None else f'{peak.part:.0%}'}"


def _join_limits(limits: Sequence[str]) -> str:
    if not any(limits):
        return ""
    return limits[0] if len(set(limits)) == 1 else ",".join(limit or "-" for limit in limits)


def _format_limit(entry: Mapping[str, Any]) -> str:
    size, fraction = entry.get("limit_bytes"), entry.get("limit_fraction")
    if isinstance(size, int):
        return format_bytes(size)
    return _format_percentage(fraction) if isinstance(fraction, float) else ""


def _format_percentage(fraction: float) -> str:
    return f"{fraction * 100:g}%"


def _format_findings(record: LoggedRecord) -> str:
    findings = record.get("findings")
    if not isinstance(findings, list):
        return ""
    return ",".join(str(finding.get("code")) for finding in findings if isinstance(finding, dict))


def _format_summary_row(row: UserGpuTotals) -> tuple[str, ...]:
    asked = _format_largest(row.asked_bytes, row.asked_fraction)
    given = _format_largest(row.given_bytes, row.given_fraction)
    cut = ", ".join(sorted(row.cut))
    cells = (
        row.user,
        row.job,
        row.gpu,
        row.process_count,
        asked,
        given,
        row.clamped,
        cut,
        row.failed,
        format_time(row.last),
    )
    shown = [escape_for_terminal("" if cell is None else str(cell)) for cell in cells]
    return tuple(cell or ("" if title == "job" else "-") for title, cell in zip(_SUMMARY_COLUMNS, shown, strict=True))


def _format_largest(size: int | None, fraction: float | None) -> str:
    """Return a size, a percentage, or both: nobody can compare them who does not know the card."""
    texts = ("" if size is None else format_bytes(size), "" if fraction is None else _format_percentage(fraction))
    return ", ".join(filter(None, texts))
