"""`tfgpu doctor`: is the hook live in this interpreter, is there a GPU, what does TensorFlow see, who uses what."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tfenv.checking import check_here
from tfenv.cli.output import FINDINGS, OK, USAGE, Style, add_format, paint, print_json, print_table, say, shown_path
from tfenv.errors import printable
from tfenv.explanation import Explanation, explain
from tfenv.gpus.usage import GpuProcess, read_processes
from tfenv.policy.model import Inventory
from tfenv.policy.units import format_bytes
from tfenv.startup.launch import PYTHONPATH_FOLDER

if TYPE_CHECKING:
    from tfenv.cli.output import SubParsers

__all__ = ["Row", "add_parser", "run"]

Verdict = Literal["ok", "note", "problem"]
_STYLES: Mapping[Verdict, Style] = {"ok": "ok", "note": "note", "problem": "problem"}
_PROBE = Path(__file__).with_name("probe.py")
_HOOK_SECONDS, _TENSORFLOW_SECONDS = 60, 300


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        topic: What: "hook", "GPUs".
        verdict: "problem" is what keeps a policy or a GPU from working.
        found: What is the case.
        advice: What to do; "" where there is nothing to do.
    """

    topic: str
    verdict: Verdict
    found: str
    advice: str = ""


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
        hook = _ask(args.python, "hook", _HOOK_SECONDS)
    except (_NoAnswerError, OSError) as error:
        say("doctor", f"{args.python} is no Python that can be asked: {error}")
        return USAGE
    explanation = explain()
    processes = read_processes()
    rows = [
        *_hook_rows(hook),
        *_policy_rows(explanation),
        _gpu_row(explanation.inventory),
        *_tensorflow_rows(args, hook, explanation),
        *_bytecode_rows(hook),
        *_log_rows(explanation),
    ]
    if args.format == "json":
        print_json({"rows": [vars(row) for row in rows], "processes": [vars(process) for process in processes]})
    else:
        _print_text(rows, processes)
    return FINDINGS if any(row.verdict == "problem" for row in rows) else OK


# ---- asking the interpreter


class _NoAnswerError(Exception):
    """The child said nothing that can be read; the text is the last thing it said to people."""


def _ask(python: str, question: str, seconds: float) -> dict[str, Any]:
    """Run the probe in a child, in this directory and environment: as a program started here would find things.

    Raises:
        OSError: There is no such interpreter.
        _NoAnswerError: It did not answer.
    """
    command = [python, "-c", _PROBE.read_text(encoding="utf-8"), question]
    try:
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise _NoAnswerError(f"no answer within {seconds:g} s") from None
    answer = child.stdout.strip().rpartition("\n")[2]
    try:
        parsed = json.loads(answer)
    except ValueError:
        said = child.stderr.strip().rpartition("\n")[2] or f"it ended with status {child.returncode}"
        raise _NoAnswerError(said) from None
    if not isinstance(parsed, dict):
        raise _NoAnswerError("it printed something else")
    return parsed


# ---- the hook


def _hook_rows(hook: Mapping[str, Any]) -> Iterator[Row]:
    where = f"{shown_path(hook['executable'])} (Python {hook['version']})"
    if not hook["armed"]:
        found, advice = _why_not_armed(hook)
        yield Row("hook", "problem", f"not live in {where}: {found}", advice)
    elif hook["activation_error"] is not None:
        found = f"armed in {where}, but tfenv is incomplete: {hook['activation_error']}"
        yield Row("hook", "problem", found, "install tfenv again in that environment")
    else:
        yield Row("hook", "ok", f"live in {where}{_by_what(hook)}")
        # What covers a whole interpreter reads files in tfenv's own.
        if hook["missing"] and hook["system"] is None:
            found = f"not installed: {', '.join(hook['missing'])}"
            yield Row("dependencies", "problem", found, "install tfenv again in that environment")


def _by_what(hook: Mapping[str, Any]) -> str:
    if hook["system"] is not None:
        return f", by `tfgpu install --system` from {shown_path(hook['system'][0])}"
    return ", lent by `tfgpu run`" if hook["lent"] else ""


def _why_not_armed(hook: Mapping[str, Any]) -> tuple[str, str]:
    """What keeps the hook from being live, and what to do, the most certain reason first."""
    if hook["site_disabled"]:
        return "it runs without site (-S)", "start it without -S: no .pth file and no sitecustomize is read"
    if _is_shadowed(hook):
        advice = f"take its folder from PYTHONPATH, or put {PYTHONPATH_FOLDER} in front of it"
        return f"{shown_path(hook['sitecustomize'])} shadows the sitecustomize of `tfgpu run`", advice
    if hook["pth"]:
        return f"{shown_path(hook['pth'][0])} is there, _tfenv_boot.py beside it is gone", "install tfenv again there"
    if hook["pth_unread"]:
        found = f"{shown_path(hook['pth_unread'][0])} is not read, its folder is only on PYTHONPATH"
        return found, "install tfenv into that environment, or start programs by `tfgpu run -- CMD`"
    if hook["boot"] is not None:
        return "tfenv.pth is missing from its site-packages", "install tfenv again there"
    return "tfenv is not installed there", "run `pip install tfenv` there, or start programs by `tfgpu run -- CMD`"


def _is_shadowed(hook: Mapping[str, Any]) -> bool:
    asked = PYTHONPATH_FOLDER in os.environ.get("PYTHONPATH", "").split(os.pathsep)
    loaded = hook["sitecustomize"]
    return asked and loaded is not None and os.path.dirname(loaded) != PYTHONPATH_FOLDER


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


# ---- GPUs


def _gpu_row(inventory: Inventory) -> Row:
    if inventory.devices:
        names = [f"{device.name} {format_bytes(device.total)}" for device in inventory.devices]
        counted = ", ".join(f"{names.count(name)} x {printable(name)}" for name in dict.fromkeys(names))
        return Row("GPUs", "ok", counted)
    if inventory.devices is not None:
        return Row("GPUs", "note", "the driver shows none", "see what `nvidia-smi -L` says")
    reason = inventory.problem or "NVML says nothing"
    if os.path.exists("/dev/nvidiactl"):
        advice = "a driver is there: compare it with `nvidia-smi`, and restart after a driver update"
        return Row("GPUs", "problem", reason, advice)
    return Row("GPUs", "note", f"no NVIDIA driver here ({reason})", "try policies with `tfgpu simulate`")


# ---- TensorFlow and Keras


def _tensorflow_rows(args: argparse.Namespace, hook: Mapping[str, Any], explanation: Explanation) -> Iterator[Row]:
    if hook["tensorflow"] is None:
        yield Row("TensorFlow", "note", "not installed there", "pip install 'tensorflow[and-cuda]'")
        return
    if args.no_tensorflow:
        yield Row("TensorFlow", "note", "installed, not imported (--no-tensorflow)")
        return
    try:
        seen = _ask(args.python, "tensorflow", _TENSORFLOW_SECONDS)
    except _NoAnswerError as error:
        advice = "see what `python -c 'import tensorflow'` says"
        advice = 'see `tfgpu explain`: on_error is "fail"' if "PolicyError" in str(error) else advice
        yield Row("TensorFlow", "problem", f"cannot be imported: {error}", advice)
        return
    yield _listed_row(seen, explanation)
    yield _default_row(seen)
    yield _keras_row(seen)


def _listed_row(seen: Mapping[str, Any], explanation: Explanation) -> Row:
    """Compare what TensorFlow lists with what the driver has and the policy leaves."""
    expected, listed = _expected(explanation), len(seen["gpus"])
    found = f"{seen['version']} lists {listed} GPU{'' if listed == 1 else 's'}"
    if not seen["cuda"]:
        verdict: Verdict = "problem" if expected else "note"
        return Row("TensorFlow", verdict, f"{found}; it is not built for CUDA", "pip install 'tensorflow[and-cuda]'")
    found += ", built for CUDA"
    if listed < (expected or 0):
        missing = seen["missing_libraries"]
        libraries = f"; not found: {', '.join(missing)}" if missing else ""
        advice = "pip install 'tensorflow[and-cuda]'" if missing else "see what TensorFlow says on stderr"
        return Row("TensorFlow", "problem", f"{found}; {expected} should be visible{libraries}", advice)
    if expected is not None and listed > expected:
        return Row("TensorFlow", "problem", f"{found}; the policy leaves {expected}", "see the row of the hook")
    return Row("TensorFlow", "ok", found)


def _expected(explanation: Explanation) -> int | None:
    """How many GPUs should be visible; None where that is not known."""
    if explanation.inventory.devices is None:
        return None
    devices = None if explanation.disabled else explanation.plan.devices
    return len(explanation.inventory.devices if devices is None else devices)


def _default_row(seen: Mapping[str, Any]) -> Row:
    if not seen["gpus"]:
        return Row("default device", "note", "CPU:0")
    first = seen["gpus"][0]
    return Row("default device", "ok", f"{first['device']} {printable(first['name'])}".strip())


def _keras_row(seen: Mapping[str, Any]) -> Row:
    if seen["keras"] is None:
        return Row("Keras", "problem", f"cannot be imported: {seen['keras_error']}", "pip install keras")
    backend = seen["keras_backend"]
    if backend != "tensorflow":
        advice = "set KERAS_BACKEND=tensorflow; this policy does not govern other backends"
        return Row("Keras", "note", f"{seen['keras']} runs on {backend}", advice)
    sees = "sees TensorFlow's GPUs" if seen["gpus"] else "sees no GPU, as TensorFlow"
    return Row("Keras", "ok" if seen["gpus"] else "note", f"{seen['keras']} {sees}")


# ---- the rest


def _bytecode_rows(hook: Mapping[str, Any]) -> Iterator[Row]:
    if hook["bytecode"] is not False:
        return
    folder = shown_path(os.path.dirname(hook["tensorflow"]))
    why = "" if hook["writes_bytecode"] else " and PYTHONDONTWRITEBYTECODE keeps it so"
    advice = f"{shown_path(hook['executable'])} -m compileall -q {folder}"
    yield Row("bytecode", "note", f"TensorFlow is not compiled{why}: importing it takes three times as long", advice)


def _log_rows(explanation: Explanation) -> Iterator[Row]:
    """Each log of this user, by writing nothing to it the way a record is written."""
    from tfenv.audit.sinks import FileSink
    from tfenv.identity import home_of

    uid = os.geteuid()
    for path in explanation.logs:
        try:
            FileSink(path, home_of(uid), uid, explanation.project).write(b"", "info")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            yield Row("audit log", "problem", f"{shown_path(path)}: {reason}", "make it writable, or name another one")
        else:
            yield Row("audit log", "ok", shown_path(path))


# ---- output


def _print_text(rows: Sequence[Row], processes: Sequence[GpuProcess]) -> None:
    width = max(len(row.topic) for row in rows)
    for row in rows:
        verdict = paint(f"{row.verdict:<7}", _STYLES[row.verdict])
        print(f"{verdict}  {row.topic:<{width}}  {printable(row.found)}")
        if row.advice:
            print(f"{'':<7}  {'':<{width}}  {paint('-> ' + printable(row.advice), 'quiet')}")
    if processes:
        print(f"\n{paint('Who uses which GPU', 'strong')}")
        print_table(("GPU", "user", "pid", "memory", "program"), [_process_row(process) for process in processes])


def _process_row(process: GpuProcess) -> tuple[str, ...]:
    memory = "?" if process.memory is None else format_bytes(process.memory)
    return (str(process.gpu), process.user or "?", str(process.pid), memory, process.program or "?")
