"""`tfgpu doctor`: is the hook live in this interpreter, is there a GPU, what does TensorFlow see, who uses what."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tfenv.cli.diagnosis import NoAnswerError, Row, Verdict, ask
from tfenv.cli.doctor_gpus import gpu_rows, tensorflow_rows
from tfenv.cli.doctor_hook import bytecode_rows, hook_rows
from tfenv.cli.output import FINDINGS, OK, USAGE, Style, add_format, paint, print_json, print_table, say, shown_path
from tfenv.devices.usage import GpuProcess, GpuUsage, read_usage
from tfenv.errors import escape_for_terminal
from tfenv.explanation import Explanation, explain
from tfenv.lint.check import check_here
from tfenv.policy.model import Plan
from tfenv.policy.units import format_bytes

if TYPE_CHECKING:
    from tfenv.cli.output import SubParsers

__all__ = ["add_parser", "run"]

_STYLES: Mapping[Verdict, Style] = {"ok": "ok", "note": "note", "problem": "problem"}
_HOOK_SECONDS, _TENSORFLOW_SECONDS = 60, 300


def add_parser(subparsers: SubParsers) -> None:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "doctor",
        help="find out why a GPU or a policy does not work here",
        description="Look at the hook, the policy, the driver, TensorFlow and Keras as a program started here would "
        "find them. Lists devices, creates none. Exit codes: 0 no problem, 1 problems.",
    )
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="the interpreter (default: tfgpu's)")
    parser.add_argument("--no-tensorflow", action="store_true", help="do not import TensorFlow, which takes seconds")
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Look at everything; 1 when there is a problem, 2 when there is no such interpreter."""
    try:
        hook = ask(args.python, "hook", _HOOK_SECONDS)
    except (NoAnswerError, OSError) as error:
        say("doctor", f"{args.python} is no Python that can be asked: {error}")
        return USAGE
    explanation = explain()
    usage = read_usage()
    rows = [
        *hook_rows(hook),
        *_policy_rows(explanation),
        *gpu_rows(usage),
        *_tensorflow_rows(args, hook, explanation, usage),
        *bytecode_rows(hook),
        *_log_rows(explanation),
    ]
    if args.format == "json":
        print_json({"rows": [vars(row) for row in rows], "processes": [vars(process) for process in usage.processes]})
    else:
        _print_text(rows, usage.processes)
    return FINDINGS if any(row.verdict == "problem" for row in rows) else OK


# ---- policy


def _policy_rows(explanation: Explanation) -> Iterator[Row]:
    checked = check_here()
    wrong = [finding for finding in checked.findings if finding.severity != "note"]
    if wrong:
        first = min(wrong, key=lambda finding: finding.severity != "error")
        count = "1 finding" if len(wrong) == 1 else f"{len(wrong)} findings, first"
        verdict: Verdict = "problem" if first.severity == "error" else "note"
        yield Row("policy", verdict, f"{count}: {first}", "see `tfgpu check`")
    elif explanation.disabled:
        yield Row("policy", "note", "switched off by TFGPU_DISABLE", "unset TFGPU_DISABLE")
    elif explanation.silent:
        yield Row("policy", "note", "no file declares anything about GPUs here", "`tfgpu init` writes a first one")
    else:
        yield Row("policy", "ok", ", ".join(shown_path(path) for path in checked.files))
    for finding in explanation.plan.findings:
        if finding.severity == "error":
            yield Row("policy", "problem", str(finding), "see `tfgpu explain`")


# ---- TensorFlow


def _tensorflow_rows(
    args: argparse.Namespace, hook: Mapping[str, Any], explanation: Explanation, usage: GpuUsage
) -> Iterator[Row]:
    """Asked in a child: importing TensorFlow here would take this process's GPUs and its time."""
    if hook["tensorflow"] is None:
        yield Row("TensorFlow", "note", "not installed there", "pip install 'tensorflow[and-cuda]'")
        return
    if args.no_tensorflow:
        yield Row("TensorFlow", "note", "installed, not imported (--no-tensorflow)")
        return
    try:
        seen = ask(args.python, "tensorflow", _TENSORFLOW_SECONDS, _without_waiting(explanation.plan))
    except NoAnswerError as error:
        advice = "see what `python -c 'import tensorflow'` says"
        advice = 'see `tfgpu explain`: on_error is "fail"' if "PolicyError" in str(error) else advice
        yield Row("TensorFlow", "problem", f"cannot be imported: {error}", advice)
        return
    yield from tensorflow_rows(seen, explanation, usage)


def _without_waiting(plan: Plan) -> dict[str, str]:
    """Variables of a child that takes busy GPUs, too: who asks what is wrong must not stand in line."""
    if not plan.takes_leases:
        return {}
    count = len(plan.devices or ()) if plan.choosing is None else plan.choosing.count
    return {"TFGPU_RUN": f'[gpu]\nvisible_devices = {{count = {count}, when_busy = "share"}}\n'}


# ---- the log


def _log_rows(explanation: Explanation) -> Iterator[Row]:
    """Each log of this user, by writing nothing to it the way a record is written."""
    from tfenv.audit.sinks import FileSink
    from tfenv.identity import find_home

    uid = os.geteuid()
    for path in explanation.logs:
        try:
            FileSink(path, find_home(uid), uid, explanation.project).write(b"", "info")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            yield Row("audit log", "problem", f"{shown_path(path)}: {reason}", "make it writable, or name another one")
        else:
            yield Row("audit log", "ok", shown_path(path))


# ---- output


def _print_text(rows: Sequence[Row], processes: Sequence[GpuProcess]) -> None:
    width = max(len(row.topic) for row in rows)
    indent = " " * (len("problem") + 2 + width + 2)
    for row in rows:
        first, *others = _lines(escape_for_terminal(row.found), len(indent))
        print(f"{paint(f'{row.verdict:<7}', _STYLES[row.verdict])}  {row.topic:<{width}}  {first}")
        for line in others:
            print(f"{indent}{line}")
        if row.advice:  # often a command to be copied: in one line
            print(f"{indent}{paint('-> ' + escape_for_terminal(row.advice), 'quiet')}")
    if processes:
        print(f"\n{paint('Who uses which GPU', 'strong')}")
        print_table(("GPU", "user", "pid", "memory", "program"), [_process_row(process) for process in processes])


def _lines(text: str, indent: int) -> list[str]:
    """Broken where a terminal would break it, for a hanging indent; in a pipe one line."""
    if not sys.stdout.isatty():
        return [text]
    room = shutil.get_terminal_size().columns - indent
    return textwrap.wrap(text, max(room, 20), break_long_words=False, break_on_hyphens=False) or [""]


def _process_row(process: GpuProcess) -> tuple[str, ...]:
    memory = "?" if process.memory is None else format_bytes(process.memory)
    return (process.label, process.user or "?", str(process.pid), memory, process.program or "?")
