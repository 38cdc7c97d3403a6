"""`tfgpu doctor`: is the hook live in this interpreter, is there a GPU, what do frameworks see, who uses what."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tfenv.cli.diagnosis.framework_rows import diagnose_framework, diagnose_keras, diagnose_no_frameworks
from tfenv.cli.diagnosis.gpu_rows import diagnose_gpus
from tfenv.cli.diagnosis.hook_rows import diagnose_bytecode, diagnose_hook
from tfenv.cli.diagnosis.interpreter import NoAnswerError, ask_about_hook, ask_framework, find_default_python
from tfenv.cli.diagnosis.row import DoctorRow, Verdict
from tfenv.cli.output import (
    FINDINGS,
    OK,
    USAGE,
    Style,
    add_description,
    add_format_option,
    paint,
    print_json,
    print_message,
    shorten_path,
)
from tfenv.cli.tables import print_table
from tfenv.devices.usage import GpuProcess, GpuUsage, read_usage
from tfenv.errors import escape_for_terminal
from tfenv.explanation import Explanation, explain
from tfenv.frameworks.registry import get_framework
from tfenv.lint.check import check_here
from tfenv.policy.model import Plan
from tfenv.policy.units import format_bytes
from tfenv.sharing.lease import SHARE, find_foreign_directory, find_private_directory
from tfenv.values import as_dict

_STYLES: Mapping[Verdict, Style] = {"ok": "ok", "note": "note", "problem": "problem"}
_FRAMEWORK_TIMEOUT_S = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(
        parser,
        "It checks the hook, the policy, the driver, the frameworks and Keras as a program would find them. "
        "It lists devices and allocates nothing. Exit codes: 0 no problem, 1 problems, 2 wrong usage.",
    )
    parser.add_argument(
        "--python",
        metavar="PATH",
        help="Examine this interpreter (default: the active environment's, or else the first on PATH).",
    )
    parser.add_argument(
        "--no-frameworks",
        "--no-tensorflow",
        action="store_true",
        help="Do not import TensorFlow, JAX and PyTorch, which takes seconds.",
    )
    add_format_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    return diagnose(
        arguments.python or find_default_python(), arguments.format, import_frameworks=not arguments.no_frameworks
    )


def diagnose(python: str, output_format: str, *, import_frameworks: bool = True) -> int:
    """Look at everything, and print what is found.

    Args:
        python: The interpreter.
        output_format: "text" or "json".
        import_frameworks: Whether to import the frameworks there, which takes seconds.

    Returns:
        The exit code: 1 if there is a problem, 2 if there is no such interpreter.
    """
    try:
        hook = ask_about_hook(python)
    except (NoAnswerError, OSError) as error:
        print_message("doctor", f"cannot run {python} as a Python interpreter: {error}")
        return USAGE
    explanation = explain()
    usage = read_usage()
    rows = [
        *diagnose_hook(hook),
        *_diagnose_policy(explanation),
        *diagnose_gpus(usage),
        *_diagnose_frameworks(hook, explanation, usage, python if import_frameworks else None),
        *diagnose_bytecode(hook),
        *_diagnose_logs(explanation),
        *_diagnose_leases(explanation.plan),
    ]
    if output_format == "json":
        print_json(as_dict({"rows": rows, "processes": usage.processes}))
    else:
        _print_text(rows, usage.processes)
    return FINDINGS if any(row.verdict == "problem" for row in rows) else OK


# ---- policy


def _diagnose_policy(explanation: Explanation) -> Iterator[DoctorRow]:
    result = check_here()
    found = [(finding, "see `tfgpu check`") for finding in result.findings]
    found += [(f, "see `tfgpu explain`") for f in explanation.findings if f not in result.findings]
    wrong = [(finding, where) for finding, where in found if finding.severity != "note"]
    for finding, where in sorted(wrong, key=lambda entry: entry[0].severity != "error"):
        verdict: Verdict = "problem" if finding.severity == "error" else "note"
        yield DoctorRow("policy", verdict, f"{finding} [{finding.code}]", where)
    if wrong:
        return
    files = ", ".join(shorten_path(path) for path in result.files)
    if explanation.disabled:
        yield DoctorRow("policy", "note", "switched off by TFGPU_DISABLE=1", "unset TFGPU_DISABLE")
    elif explanation.silent and explanation.observed is not None:
        yield DoctorRow("policy", "ok", f"{files}: nothing in force, only tables to observe")
    elif explanation.silent and files:
        yield DoctorRow("policy", "note", f"no settings for GPUs in {files}", "add settings, see `tfgpu explain`")
    elif explanation.silent:
        yield DoctorRow("policy", "note", "there is no policy file here", "run `tfgpu init` to write one")
    else:
        yield DoctorRow("policy", "ok", files)


# ---- frameworks


def _diagnose_frameworks(
    hook: Mapping[str, Any], explanation: Explanation, usage: GpuUsage, python: str | None
) -> Iterator[DoctorRow]:
    """Yield rows on what each framework finds, asked in children of an interpreter. Without one none is imported."""
    installed: list[str] = hook["frameworks"]
    if not installed:
        yield diagnose_no_frameworks()
    if python is None:
        for name in installed:
            found = "installed; not imported because of --no-frameworks"
            yield DoctorRow(get_framework(name).title, "note", found)
        return
    backend, variables = hook["keras_backend"], _share_busy_gpus(explanation.plan)
    answers: dict[str, dict[str, Any]] = {}
    for name in installed:
        options = ("keras",) if name == backend else ()
        try:
            answers[name] = ask_framework(python, name, options, _FRAMEWORK_TIMEOUT_S, variables)
        except NoAnswerError as error:
            advice = f"run `python -c 'import {name}'` to see the error"
            advice = 'see `tfgpu explain`: on_error is "fail"' if "PolicyError" in str(error) else advice
            yield DoctorRow(get_framework(name).title, "problem", f"cannot be asked: {error}", advice)
    only_build = not any(seen["cuda"] for seen in answers.values())
    for name, seen in answers.items():
        yield from diagnose_framework(name, seen, explanation, usage, only_build=only_build)
    if backend is not None and installed:
        yield from diagnose_keras(backend, answers)


def _share_busy_gpus(plan: Plan) -> dict[str, str]:
    """Return variables with which a child takes busy GPUs, too: who asks what is wrong must not wait for one."""
    if not plan.takes_leases:
        return {}
    count = len(plan.devices or ()) if plan.choosing is None else plan.choosing.count
    return {"TFGPU_RUN": f'[gpu]\nvisible_devices = {{count = {count}, when_busy = "share"}}\n'}


# ---- the log


def _diagnose_logs(explanation: Explanation) -> Iterator[DoctorRow]:
    """Yield a row for each log of this user, after writing nothing to it in the way a record is written."""
    from tfenv.audit.sinks import FileSink, find_open_folder, find_syslog_problem
    from tfenv.identity import find_home
    from tfenv.pipeline import current_start, load

    uid, loaded = os.geteuid(), load(current_start())
    for path in explanation.logs:
        try:
            is_default = path == loaded.policy.audit.default_log
            FileSink(path, find_home(uid), uid, explanation.project, is_default=is_default).write(b"", "info")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            yield DoctorRow(
                "audit log", "problem", f"{shorten_path(path)}: {reason}", "make it writable, or name another log"
            )
        else:
            yield DoctorRow("audit log", "ok", shorten_path(path))
        folder = find_open_folder(path) if "<uid>" in path and uid == 0 else None
        if folder is not None:
            text = f"everybody can write to {folder}, so anybody can create the log of a user who has none yet"
            yield DoctorRow("audit log", "note", text, "create the users' logs, see docs/administrators.md")
    problem = find_syslog_problem() if loaded.policy.audit.syslog else None
    if problem is not None:
        advice = "start journald or rsyslog, or remove `syslog = true`"
        yield DoctorRow("audit log", "problem", f"no syslog listens here ({problem})", advice)


def _diagnose_leases(plan: Plan) -> Iterator[DoctorRow]:
    """Yield a row if an ordinary user can remove everybody's leases, or if other containers do not see them."""
    path = find_private_directory() if plan.takes_leases else None
    if path is not None:
        text = f"only this container sees the leases in {path}; other containers may take the same GPU"
        yield DoctorRow("leases", "problem", text, f"{SHARE}, see docs/recipes/docker.md")
    found = find_foreign_directory()
    if found is not None:
        path, owner = found
        text = f"{path} belongs to {owner}, who can remove everybody's leases"
        yield DoctorRow("leases", "note", text, "create /run/lock/tfgpu as root at every boot, see docs/sharing.md")


# ---- output


def _print_text(rows: Sequence[DoctorRow], processes: Sequence[GpuProcess]) -> None:
    width = max(len(row.topic) for row in rows)
    indent = " " * (len("problem") + 2 + width + 2)
    for row in rows:
        first, *others = _wrap_text(escape_for_terminal(row.found), len(indent))
        print(f"{paint(f'{row.verdict:<7}', _STYLES[row.verdict])}  {row.topic:<{width}}  {first}")
        for line in others:
            print(f"{indent}{line}")
        if row.advice:  # often a command to be copied: in one line
            print(f"{indent}{paint('-> ' + escape_for_terminal(row.advice), 'quiet')}")
    if processes:
        print(f"\n{paint('Who uses which GPU', 'strong')}")
        print_table(("GPU", "user", "pid", "memory", "program"), [_format_process(process) for process in processes])


def _wrap_text(text: str, indent: int) -> list[str]:
    """Break a text where a terminal would break it, for a hanging indent. In a pipe it stays one line."""
    if not sys.stdout.isatty():
        return [text]
    width = max(shutil.get_terminal_size().columns - indent, 20)
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def _format_process(process: GpuProcess) -> tuple[str, ...]:
    memory = "?" if process.memory is None else format_bytes(process.memory)
    return (process.label, process.user or "?", str(process.pid), memory, process.program or "?")
