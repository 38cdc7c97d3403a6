"""`tfgpu audit`: what was applied, to whom, when; per user and GPU; as figures for Prometheus."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tfenv.audit.gpu_totals import UserGpuTotals, summarize_logs
from tfenv.audit.query import (
    LineTally,
    LoggedRecord,
    RecordQuery,
    get_gpu_id,
    list_logged_devices,
    parse_moment,
    read_newest,
    read_records,
    select_records,
)
from tfenv.audit.rotation import LogTail, can_open, find_all_log_files
from tfenv.audit.sinks import RefusedLogError, expand_path, list_log_names
from tfenv.cli.output import FINDINGS, INTERRUPTED, OK, USAGE, print_table, say
from tfenv.errors import escape_for_terminal
from tfenv.policy.model import Start
from tfenv.policy.units import format_bytes

EVENTS = ("loaded", "applied", "clamped", "failed", "disabled", "changed")
OUTCOMES = ("applied", "clamped", "too_late", "degraded", "cpu", "failed")
_DEFAULT_COUNT = 20
_POLL_SECONDS = 0.2
_COLUMNS = ("time (UTC)", "user", "pid", "event", "GPUs", "limit", "growth", "script", "findings")
_USAGE = """%(prog)s [options]
       %(prog)s summary [options]
       %(prog)s export --prometheus FILE [options]"""
_SUMMARY_COLUMNS = ("user", "GPU", "processes", "asked", "given", "clamped", "failed", "last (UTC)")


# ---- options


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `tfgpu`."""
    exit_codes = "Exit codes: 0 ok, 1 some lines are not records, 2 wrong usage."
    parser = subparsers.add_parser(
        "audit",
        help="show what was applied, from the audit log",
        description=f"Show records of the audit log. {exit_codes}",
        usage=_USAGE,
        argument_default=argparse.SUPPRESS,
    )
    _add_filters(parser)
    _add_files(parser)
    parser.add_argument("-n", "--lines", type=_count, metavar="N", help="only the newest N (table: 20, json: all)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with records as they are written")
    _add_format(parser)
    parser.set_defaults(run=run, act=_show)
    # What is not given is not set, so that `tfgpu audit --user alice summary` keeps alice.
    actions = parser.add_subparsers(title="instead of records", metavar="ACTION", prog=parser.prog)
    _add_summary(actions, f"Processes, limits, clamps and failures per user and GPU. {exit_codes}")
    _add_export(actions, exit_codes)


def _add_summary(actions: argparse._SubParsersAction[argparse.ArgumentParser], description: str) -> None:
    parser = actions.add_parser(
        "summary",
        help="processes, limits, clamps and failures per user and GPU",
        description=description,
        argument_default=argparse.SUPPRESS,
    )
    _add_filters(parser)
    _add_files(parser)
    _add_format(parser)
    parser.set_defaults(act=_summarize)


def _add_export(actions: argparse._SubParsersAction[argparse.ArgumentParser], exit_codes: str) -> None:
    parser = actions.add_parser(
        "export",
        help="figures for the node exporter of Prometheus",
        description="Count what was added to the logs since the last time, and write the totals into a file for the "
        f"textfile collector of the node exporter. {exit_codes}",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--prometheus", type=Path, required=True, metavar="FILE", help="a .prom file in the collector's directory"
    )
    _add_files(parser)
    parser.set_defaults(act=_export)


def _add_filters(parser: argparse.ArgumentParser) -> None:
    wanted = parser.add_argument_group("which records")
    wanted.add_argument("--event", action="append", type=_event, metavar="EVENT", help=", ".join(EVENTS))
    wanted.add_argument("--outcome", action="append", choices=OUTCOMES, help="what became of it at an entry point")
    wanted.add_argument("--user", action="append", metavar="NAME", help="of this user")
    wanted.add_argument("--uid", action="append", type=int, help="of this user id")
    wanted.add_argument("--gpu", action="append", metavar="GPU", help='a UUID or its beginning, or "name:*A100*"')
    wanted.add_argument("--project", metavar="DIR", help="of a project or script in this directory or below it")
    wanted.add_argument("--script", metavar="GLOB", help="of this program: path, file name or glob")
    wanted.add_argument("--since", type=_moment, metavar="WHEN", help='"2h", "7d", or a time in ISO 8601')
    wanted.add_argument("--until", type=_moment, metavar="WHEN", help="before that time")


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--file",
        type=Path,
        nargs="+",
        action="extend",
        metavar="PATH",
        help="logs to read, with what was rotated away (.1, .2.gz, …); without it the log that the policy here names",
    )


def _add_format(parser: argparse.ArgumentParser) -> None:
    # "text", as other commands have it, is the table.
    parser.add_argument(
        "--format",
        choices=("table", "json", "text"),
        metavar="{table,json}",
        help="for people (table), or one JSON value a line",
    )


def _event(text: str) -> str:
    name = text.removeprefix("policy_")
    if name not in EVENTS:
        raise argparse.ArgumentTypeError(f'"{text}" is not an event; there are {", ".join(EVENTS)}')
    return f"policy_{name}"


def _moment(text: str) -> str:
    try:
        return parse_moment(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f'"{text}" is not a number of records')
    return int(text)


# ---- what is done


def run(args: argparse.Namespace) -> int:
    """Run the command: 0 ok, 1 some lines are not records, 2 a log that was named cannot be read."""
    try:
        code: int = args.act(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `tfgpu audit | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        say("audit", f"{error.filename or 'the audit log'}: {error.strerror or error}")
        return USAGE
    return code


def _show(args: argparse.Namespace) -> int:
    query, tally = _query(args), LineTally()
    if "follow" in args:
        return _follow(query, args)
    logs, code = _readable(_logs(args))
    _print_records(_records(logs, query, tally, args), _is_json(args))
    return max(code, _report(tally))


def _summarize(args: argparse.Namespace) -> int:
    tally = LineTally()
    logs, code = _readable(_logs(args))
    _print_summary(summarize_logs(logs, _query(args), tally), _is_json(args))
    return max(code, _report(tally))


def _export(args: argparse.Namespace) -> int:
    from tfenv.audit.prometheus import ForeignFileError, export_totals

    tally = LineTally()
    try:
        unread = export_totals(args.prometheus, _named_logs(args), tally)
    except ForeignFileError as error:
        say("audit", f"{args.prometheus}: {error}")
        return USAGE
    for log in unread:
        _say_unreadable(log)
    return max(FINDINGS if unread else OK, _report(tally))


def _follow(query: RecordQuery, args: argparse.Namespace) -> int:
    """Show the newest records, then all that come, until Ctrl-C."""
    tally = LineTally()
    tails = [LogTail(path) for path in _named_logs(args)]
    ends = {tail.path: tail.position for tail in tails}
    existing, _ = _readable([log for log in find_all_log_files(_named_logs(args)) if log.exists()])
    count = getattr(args, "lines", _DEFAULT_COUNT)
    _print_stream(read_newest(existing, query, tally, count, ends), _is_json(args))
    while True:
        for tail in tails:
            _print_stream(select_records(tail.poll(), query, tally), _is_json(args))
        time.sleep(_POLL_SECONDS)


def _query(args: argparse.Namespace) -> RecordQuery:
    given = vars(args)
    return RecordQuery(
        events=frozenset(given.get("event", ())),
        users=frozenset(given.get("user", ())),
        uids=frozenset(given.get("uid", ())),
        outcomes=frozenset(given.get("outcome", ())),
        gpus=frozenset(given.get("gpu", ())),
        project=os.path.abspath(args.project) if "project" in args else None,
        script=given.get("script"),
        since=given.get("since", ""),
        until=given.get("until", ""),
    )


def _is_json(args: argparse.Namespace) -> bool:
    return getattr(args, "format", "table") == "json"


def _records(
    logs: Sequence[Path], query: RecordQuery, tally: LineTally, args: argparse.Namespace
) -> Iterable[LoggedRecord]:
    if "lines" not in args and _is_json(args):
        return read_records(logs, query, tally)
    return read_newest(logs, query, tally, getattr(args, "lines", _DEFAULT_COUNT))


# ---- which logs


def _logs(args: argparse.Namespace) -> list[Path]:
    """What is to be read: the logs with what was rotated away from them."""
    logs = find_all_log_files(_named_logs(args))
    if "file" in args or any(log.exists() for log in logs):
        return logs
    say("audit", "no audit log yet; a record is written when TensorFlow is imported under a policy")
    return []


def _named_logs(args: argparse.Namespace) -> list[Path]:
    return args.file if "file" in args else _own_logs()


def _own_logs() -> list[Path]:
    """The log that the policy in force here names, or the caller's own.

    Every record is in every log of a policy: the first one that exists is enough.
    """
    from tfenv.pipeline import current_start, load

    loaded = load(current_start())
    candidates = [_expanded(name, loaded.start) for name in list_log_names(loaded.policy.audit)]
    existing = [logs for logs in candidates if any(log.exists() for log in find_all_log_files(logs))]
    return [*existing, *candidates, []][0]


def _expanded(name: str, start: Start) -> list[Path]:
    """The log's path; for root those of all users where each has one of their own."""
    if start.uid == 0 and "<uid>" in name:
        folder, _, pattern = name.rpartition("/")
        logs = [log for log in sorted(Path(folder).glob(pattern.replace("<uid>", "*"))) if _is_of_user(log, pattern)]
        if logs:
            return logs
    try:
        return [Path(expand_path(name, start.home, start.uid))]
    except RefusedLogError:
        return []


def _is_of_user(log: Path, pattern: str) -> bool:
    before, _, after = pattern.partition("<uid>")
    return log.name.removeprefix(before).removesuffix(after).isdecimal()


def _readable(logs: Sequence[Path]) -> tuple[list[Path], int]:
    """Those that can be decompressed here; the others are named, and make the exit code 1."""
    unread = [log for log in logs if not can_open(log)]
    for log in unread:
        _say_unreadable(log)
    return [log for log in logs if log not in unread], FINDINGS if unread else OK


def _say_unreadable(log: Path) -> None:
    say("audit", f"{log} is left out: nothing here can decompress it; `pip install 'tfenv[audit]'` can")


def _report(tally: LineTally) -> int:
    if not tally.unreadable:
        return OK
    one = tally.unreadable == 1
    say("audit", "1 line is not an audit record" if one else f"{tally.unreadable} lines are not audit records")
    return FINDINGS


# ---- output


def _print_records(records: Iterable[LoggedRecord], is_json: bool) -> None:
    if is_json:
        _print_json(records)
    else:
        print_table(_COLUMNS, [_row(record) for record in records])


def _print_stream(records: Iterable[LoggedRecord], is_json: bool) -> None:
    if is_json:
        _print_json(records)
    else:
        for record in records:
            print("  ".join(cell or "-" for cell in _row(record)))
    sys.stdout.flush()


def _print_json(records: Iterable[Mapping[str, Any]]) -> None:
    """ASCII only: what others wrote into the log must not steer the terminal."""
    for record in records:
        sys.stdout.write(json.dumps(record, ensure_ascii=True, separators=(",", ":")) + "\n")


def _print_summary(rows: Sequence[UserGpuTotals], is_json: bool) -> None:
    if is_json:
        _print_json([row.as_dict() for row in rows])
    else:
        print_table(_SUMMARY_COLUMNS, [_summary_row(row) for row in rows])


def _row(record: LoggedRecord) -> tuple[str, ...]:
    cells = (
        _clock(record["timestamp"]),
        record.get("user"),
        record.get("pid"),
        _event_text(record),
        _gpus_text(record),
        _limit_text(record),
        _growth_text(record.get("growth")),
        str(record.get("script") or "").rpartition("/")[2],
        _findings_text(record),
    )
    return tuple(escape_for_terminal("" if cell is None else str(cell)) for cell in cells)


def _growth_text(growth: object) -> str:
    return ("on" if growth else "off") if isinstance(growth, bool) else ""


def _clock(timestamp: str) -> str:
    return timestamp[:19].replace("T", " ")


def _event_text(record: LoggedRecord) -> str:
    name = str(record["event"]).removeprefix("policy_")
    status = record.get("status")
    return f"{name} ({status})" if status not in (None, name) else name


def _gpus_text(record: LoggedRecord) -> str:
    if record.get("devices", ()) is None:
        return "all"
    return ",".join(get_gpu_id(device)[:12] for device in list_logged_devices(record))


def _limit_text(record: LoggedRecord) -> str:
    limits = [_one_limit(holder) for holder in (list_logged_devices(record) or [record])]
    return limits[0] if len(set(limits)) == 1 else ",".join(limit or "-" for limit in limits)


def _one_limit(holder: Mapping[str, Any]) -> str:
    size, fraction = holder.get("limit_bytes"), holder.get("limit_fraction")
    if isinstance(size, int):
        return format_bytes(size)
    return _percent(fraction) if isinstance(fraction, float) else ""


def _percent(fraction: float) -> str:
    return f"{fraction * 100:g}%"


def _findings_text(record: LoggedRecord) -> str:
    findings = record.get("findings")
    if not isinstance(findings, list):
        return ""
    return ",".join(str(finding.get("code")) for finding in findings if isinstance(finding, dict))


def _summary_row(row: UserGpuTotals) -> tuple[str, ...]:
    asked = _largest_text(row.asked_bytes, row.asked_fraction)
    given = _largest_text(row.given_bytes, row.given_fraction)
    cells = (row.user, row.gpu, len(row.processes), asked, given, row.clamped, row.failed, _clock(row.last))
    return tuple(escape_for_terminal(str(cell)) or "-" for cell in cells)


def _largest_text(size: int | None, fraction: float | None) -> str:
    """A size, a percentage, or both: nobody can compare them who does not know the card."""
    texts = ("" if size is None else format_bytes(size), "" if fraction is None else _percent(fraction))
    return ", ".join(filter(None, texts))
