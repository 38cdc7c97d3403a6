"""`tfgpu audit`: what was applied, to whom, when."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tfenv.audit.query import Query, Record, Tail, Tally, UserGpu, last, parse_since, read, select, summarize
from tfenv.audit.query import with_rotated as rotated_siblings
from tfenv.audit.sinks import RefusedLogError, expand_path, log_names
from tfenv.cli.output import FINDINGS, INTERRUPTED, OK, USAGE, print_table, say
from tfenv.errors import printable
from tfenv.policy.model import Start
from tfenv.policy.units import format_bytes

EVENTS = ("loaded", "applied", "clamped", "failed", "disabled", "changed")
STATUSES = ("applied", "clamped", "too_late", "degraded", "cpu", "failed")
_DEFAULT_COUNT = 20
_POLL_SECONDS = 0.2
_COLUMNS = ("time (UTC)", "user", "pid", "event", "GPUs", "limit", "growth", "script", "findings")
_SUMMARY_COLUMNS = ("user", "GPU", "processes", "clamped", "failed", "largest limit", "last (UTC)")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `tfgpu`."""
    parser = subparsers.add_parser(
        "audit",
        help="show what was applied, from the audit log",
        description="Show records of the audit log. Exit codes: 0 ok, 1 some lines are not records, 2 wrong usage.",
    )
    _add_filters(parser)
    parser.add_argument("--file", type=Path, nargs="+", action="extend", metavar="PATH", help="logs to read")
    parser.add_argument("--rotated", action="store_true", help="also what logrotate made of them (.1, .2.gz, …)")
    parser.add_argument("-n", "--lines", type=_count, metavar="N", help="only the newest N (text: 20, json: all)")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--follow", "-f", action="store_true", help="go on with records as they are written")
    shape.add_argument("--summary", action="store_true", help="per user and GPU")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="table, or one JSON value a line")
    parser.set_defaults(run=run)


def _add_filters(parser: argparse.ArgumentParser) -> None:
    wanted = parser.add_argument_group("which records")
    wanted.add_argument("--event", action="append", type=_event, metavar="EVENT", help=", ".join(EVENTS))
    wanted.add_argument("--status", action="append", choices=STATUSES, help="outcome at a door")
    wanted.add_argument("--user", action="append", metavar="NAME", help="of this user")
    wanted.add_argument("--uid", action="append", type=int, help="of this user id")
    wanted.add_argument("--project", metavar="DIR", help="of a project or script in this directory or below it")
    wanted.add_argument("--script", metavar="GLOB", help="of this program: path, file name or glob")
    wanted.add_argument("--since", type=_since, metavar="WHEN", help='"2h", "7d", or a time in ISO 8601')


def _event(text: str) -> str:
    name = text.removeprefix("policy_")
    if name not in EVENTS:
        raise argparse.ArgumentTypeError(f'"{text}" is not an event; there are {", ".join(EVENTS)}')
    return f"policy_{name}"


def _since(text: str) -> str:
    try:
        return parse_since(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f'"{text}" is not a number of records')
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Run the command: 0 ok, 1 some lines are not records, 2 a log that was named cannot be read."""
    try:
        return _run(args)
    except BrokenPipeError:  # `tfgpu audit | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        say("audit", f"{error.filename or 'the audit log'}: {error.strerror or error}")
        return USAGE


def _run(args: argparse.Namespace) -> int:
    query, tally = _query(args), Tally()
    paths = args.file or _own_logs()
    logs = [log for path in paths for log in rotated_siblings(path)] if args.rotated else paths
    if args.follow:
        return _follow(paths, logs, query, args)
    if args.file is None and not any(log.exists() for log in logs):
        say("audit", "no audit log yet; a record is written when TensorFlow is imported under a policy")
        logs = []
    if args.summary:
        _print_summary(summarize(read(logs, query, tally)), args.format)
    else:
        _print_records(_records(logs, query, tally, args), args.format)
    sys.stdout.flush()
    return _report(tally)


def _query(args: argparse.Namespace) -> Query:
    return Query(
        events=frozenset(args.event or ()),
        users=frozenset(args.user or ()),
        uids=frozenset(args.uid or ()),
        statuses=frozenset(args.status or ()),
        project=os.path.abspath(args.project) if args.project else None,
        script=args.script,
        since=args.since or "",
    )


def _own_logs() -> list[Path]:
    """The log that the policy in force here names, or the caller's own.

    Every record is in every log of a policy: the first one that exists is enough.
    """
    from tfenv.pipeline import current_start, load

    loaded = load(current_start())
    names = log_names(loaded.policy.audit)
    logs = [log for name in names if (log := _expanded(name, loaded.start)) is not None]
    return [log for log in logs if log.exists()][:1] or logs[:1]


def _expanded(name: str, start: Start) -> Path | None:
    try:
        return Path(expand_path(name, start.home, start.uid))
    except RefusedLogError:
        return None


def _records(logs: Sequence[Path], query: Query, tally: Tally, args: argparse.Namespace) -> Iterable[Record]:
    if args.lines is None and args.format == "json":
        return read(logs, query, tally)
    return last(logs, query, tally, _DEFAULT_COUNT if args.lines is None else args.lines)


def _report(tally: Tally) -> int:
    if not tally.unreadable:
        return OK
    one = tally.unreadable == 1
    say("audit", "1 line is not an audit record" if one else f"{tally.unreadable} lines are not audit records")
    return FINDINGS


def _follow(paths: Sequence[Path], logs: Sequence[Path], query: Query, args: argparse.Namespace) -> int:
    """Show the newest records, then all that come, until Ctrl-C."""
    tally = Tally()
    tails = [Tail(path) for path in paths]
    ends = {tail.path: tail.position for tail in tails}
    existing = [log for log in logs if log.exists()]
    count = _DEFAULT_COUNT if args.lines is None else args.lines
    _print_stream(last(existing, query, tally, count, ends), args.format)
    while True:
        for tail in tails:
            _print_stream(select(tail.poll(), query, tally), args.format)
        time.sleep(_POLL_SECONDS)


# ---- output


def _print_records(records: Iterable[Record], shape: str) -> None:
    if shape == "json":
        _print_json(records)
    else:
        print_table(_COLUMNS, [_row(record) for record in records])


def _print_stream(records: Iterable[Record], shape: str) -> None:
    if shape == "json":
        _print_json(records)
    else:
        for record in records:
            print("  ".join(cell or "-" for cell in _row(record)))
    sys.stdout.flush()


def _print_json(records: Iterable[Mapping[str, Any]]) -> None:
    """ASCII only: what others wrote into the log must not steer the terminal."""
    for record in records:
        sys.stdout.write(json.dumps(record, ensure_ascii=True, separators=(",", ":")) + "\n")


def _print_summary(rows: Sequence[UserGpu], shape: str) -> None:
    if shape == "json":
        _print_json([{**vars(row), "processes": len(row.processes)} for row in rows])
    else:
        print_table(_SUMMARY_COLUMNS, [_summary_row(row) for row in rows])


def _row(record: Record) -> tuple[str, ...]:
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
    return tuple(printable("" if cell is None else str(cell)) for cell in cells)


def _growth_text(growth: object) -> str:
    return ("on" if growth else "off") if isinstance(growth, bool) else ""


def _clock(timestamp: str) -> str:
    return timestamp[:19].replace("T", " ")


def _event_text(record: Record) -> str:
    name = str(record["event"]).removeprefix("policy_")
    status = record.get("status")
    return f"{name} ({status})" if status not in (None, name) else name


def _devices(record: Record) -> list[Mapping[str, Any]]:
    devices = record.get("devices")
    return [device for device in devices if isinstance(device, dict)] if isinstance(devices, list) else []


def _gpus_text(record: Record) -> str:
    if record.get("devices", ()) is None:
        return "all"
    return ",".join(
        str(device.get("uuid") or device.get("token") or device.get("index"))[:12] for device in _devices(record)
    )


def _limit_text(record: Record) -> str:
    limits = [_one_limit(holder) for holder in (_devices(record) or [record])]
    return limits[0] if len(set(limits)) == 1 else ",".join(limit or "-" for limit in limits)


def _one_limit(holder: Mapping[str, Any]) -> str:
    size, fraction = holder.get("limit_bytes"), holder.get("limit_fraction")
    if isinstance(size, int):
        return format_bytes(size)
    return f"{fraction * 100:g}%" if isinstance(fraction, float) else ""


def _findings_text(record: Record) -> str:
    findings = record.get("findings")
    if not isinstance(findings, list):
        return ""
    return ",".join(str(finding.get("code")) for finding in findings if isinstance(finding, dict))


def _summary_row(row: UserGpu) -> tuple[str, ...]:
    limit = "" if row.limit_bytes is None else format_bytes(row.limit_bytes)
    counts = (str(len(row.processes)), str(row.clamped), str(row.failed))
    return tuple(printable(cell) for cell in (row.user, row.gpu or "-", *counts, limit, _clock(row.last)))
