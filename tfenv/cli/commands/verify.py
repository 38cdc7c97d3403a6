"""`tfgpu verify`: each framework takes memory until it is refused, and the driver tells whether the policy held."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tfenv.cli.diagnosis.gpu_rows import diagnose_gpus
from tfenv.cli.diagnosis.hook_rows import diagnose_hook
from tfenv.cli.diagnosis.interpreter import NoAnswerError, ask_about_hook, find_default_python
from tfenv.cli.framework_plan import make_framework_plan
from tfenv.cli.output import (
    FINDINGS,
    OK,
    USAGE,
    add_description,
    add_format_option,
    print_json,
    print_message,
    shorten_path,
)
from tfenv.cli.tables import StyledText, TableColumn, build_report, build_table, print_renderable
from tfenv.cli.verification.measure import MODEST_BYTES, is_unlimited, measure_framework
from tfenv.cli.verification.measurement import FrameworkMeasurement, GpuMeasurement, Promise, Verdict, judge_gpu
from tfenv.devices.usage import read_usage
from tfenv.explanation import Explanation, explain
from tfenv.frameworks.registry import get_framework, list_frameworks
from tfenv.policy.model import Plan, PlannedDevice
from tfenv.policy.units import MIB, format_bytes, format_limit
from tfenv.values import field, frozen

_COLUMNS = (
    TableColumn("framework"), TableColumn("GPU"), TableColumn("at most", is_number=True),
    *(TableColumn(title, is_number=True) for title in ("allocated", "NVML", "beyond")), TableColumn("refused by"),
    TableColumn("promise"),
)  # fmt: skip
_WORDS: Mapping[Verdict, str] = {"kept": "kept", "broken": "not kept", "unproven": "not proven", "none": "no limit"}
_STYLES: Mapping[Verdict, str] = {"kept": "green", "broken": "red", "unproven": "yellow", "none": "dim"}
_TIMEOUT_S = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(
        parser,
        "A child process of each installed framework allocates memory under your policy until it is refused. You see "
        "how much it got and what the driver counts for it. It uses your GPUs for some seconds, as any program does. "
        "Exit codes: 0 every promise was kept, 1 a promise was not kept or not proven, 2 wrong usage.",
    )
    parser.add_argument(
        "--python",
        metavar="PATH",
        help="Use this interpreter (default: the active environment's, or else the first on PATH).",
    )
    parser.add_argument(
        "--framework",
        action="append",
        choices=list_frameworks(),
        help="Verify only this framework. Give it several times for several.",
    )
    parser.add_argument(
        "--timeout",
        type=_parse_seconds,
        default=_TIMEOUT_S,
        metavar="SECONDS",
        help=f"End each child after so many seconds (default {_TIMEOUT_S:g}). It may wait for a free GPU.",
    )
    add_format_option(parser)


def _parse_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f'"{text}" is not a number of seconds; write a number such as 300')
    return seconds


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    python = arguments.python or find_default_python()
    try:
        hook = ask_about_hook(python)
    except (NoAnswerError, OSError) as error:
        print_message("verify", f"cannot run {python} as a Python interpreter: {error}")
        return USAGE
    report = verify(python, hook, arguments.framework or hook["frameworks"], arguments.timeout)
    if arguments.format == "json":
        print_json(report.as_dict())
    else:
        print_renderable(build_report(build_table(_COLUMNS, report.list_rows()), report.find_notes()))
    return OK if report.succeeded else FINDINGS


# ---- measuring


@frozen
class VerificationReport:
    """What was measured.

    Attributes:
        python: The interpreter.
        frameworks: One entry for each framework that was asked for, or is installed.
        problem: Why nothing could be measured. "" if something was.
        is_problem: Whether the exit code says so, as that of `tfgpu doctor` does.
        notes: What concerns all of it: what it is about, and the text.
    """

    python: str
    frameworks: tuple[FrameworkMeasurement, ...] = ()
    problem: str = ""
    is_problem: bool = False
    notes: tuple[tuple[str, str], ...] = field(default_factory=tuple)

    @property
    def succeeded(self) -> bool:
        """Whether no promise was broken, and none could not be proven."""
        return not self.is_problem and all(made.verdict in ("kept", "none") for made in self.frameworks)

    def as_dict(self) -> dict[str, object]:
        """Return it for JSON."""
        return {
            "python": self.python,
            "kept": self.succeeded,
            "problem": self.problem or None,
            "frameworks": [made.as_dict() for made in self.frameworks],
            "notes": [": ".join(note) for note in self.find_notes()],
        }

    def list_rows(self) -> Iterator[Sequence[StyledText | str]]:
        """Yield a row for each GPU of each framework. A framework without GPUs has one."""
        for made in self.frameworks:
            for gpu in made.gpus:
                yield _build_row(made, gpu)
            if not made.gpus:
                yield (_name_framework(made), "-", "", "", "", "", "", _style_verdict(made.verdict))

    def find_notes(self) -> Iterator[tuple[str, str]]:
        """Yield what has to be said of promises that were not simply kept."""
        if self.problem:
            yield "GPUs", self.problem
        for made in self.frameworks:
            for what, promise in (("", made.problem), ("GPUs", made.visible), ("growth", made.growth)):
                if promise.why:
                    yield f"{made.title} {what}".strip(), promise.why
            for gpu in made.gpus:
                promise = gpu.judge_limit()
                if promise.why:
                    yield f"{made.title} GPU {_name_gpu(gpu)}", promise.why
        yield from self.notes


def verify(python: str, hook: Mapping[str, Any], frameworks: Sequence[str], timeout_s: float) -> VerificationReport:
    """Measure each framework in turn.

    Args:
        python: The interpreter.
        hook: What it says of the hook and of the frameworks in it.
        frameworks: Which of them.
        timeout_s: Seconds until the child of each must be done.
    """
    explanation, usage = explain(), read_usage()
    missing = next((row for row in diagnose_gpus(usage) if row.topic == "driver"), None)
    if usage.problem is not None or not usage.gpus:
        is_problem = missing is not None and missing.verdict == "problem"
        return VerificationReport(python, problem=usage.problem or "the driver lists none", is_problem=is_problem)
    if not frameworks:
        names = ", ".join(get_framework(name).title for name in list_frameworks())
        return VerificationReport(python, problem=f"none of {names} is installed in {shorten_path(python)}")
    unhooked = _explain_unhooked(hook)
    made: list[FrameworkMeasurement] = []
    for name in dict.fromkeys(frameworks):
        title, plan = get_framework(name).title, make_framework_plan(name, explanation)
        if name not in hook["frameworks"]:
            problem = Promise("unproven", f"it is not installed in {shorten_path(python)}")
            made.append(FrameworkMeasurement(name, title, problem=problem))
        elif unhooked is not None and _has_promises(plan):
            made.append(FrameworkMeasurement(name, title, problem=unhooked))
        else:
            print_message("verify", f"{title} {describe_demand(plan)}")
            made.append(measure_framework(name, python, plan, timeout_s))
    return VerificationReport(python, tuple(made), notes=tuple(_find_policy_notes(explanation)))


def _has_promises(plan: Plan) -> bool:
    limits = [plan.limit] if plan.devices is None else [device.limit for device in plan.devices]
    return plan.visible is not None or plan.growth is True or any(limit is not None for limit in limits)


def _explain_unhooked(hook: Mapping[str, Any]) -> Promise | None:
    """Return what is promised and cannot hold, because the interpreter does not read the policy. None: it does."""
    problem = next((row for row in diagnose_hook(hook) if row.verdict == "problem"), None)
    return None if problem is None else Promise("broken", f"the hook is {problem.found}; {problem.advice}")


def _find_policy_notes(explanation: Explanation) -> Iterator[tuple[str, str]]:
    if explanation.disabled:
        yield "policy", "switched off by TFGPU_DISABLE=1"
    elif explanation.silent:
        yield "policy", "no file declares anything here, see `tfgpu init`"


def describe_demand(plan: Plan) -> str:
    """Return what a child does, in words: "takes up to 8.0 GiB of GPU 0 for some seconds"."""
    if plan.devices == ():
        return "lists its GPUs, which the policy hides"
    if plan.devices is None:
        modest = format_bytes(MODEST_BYTES) if plan.limit is None else f"up to {format_limit(plan.limit)}"
        return f"takes {modest} of each GPU for some seconds"
    sizes: dict[str, list[str]] = {}
    for device in plan.devices:
        sizes.setdefault(_describe_size(device), []).append(_name_planned(device))
    chosen = "" if plan.choosing is None else f"{plan.choosing.count} of "
    demands = [f"{size} of {chosen}GPU {', '.join(names)}" for size, names in sizes.items()]
    return f"takes {' and '.join(demands)} for some seconds"


def _describe_size(device: PlannedDevice) -> str:
    if device.limit is None or is_unlimited(device.limit, device.total):
        return format_bytes(MODEST_BYTES)
    size = device.limit.on(device.total)
    return f"up to {format_limit(device.limit) if size is None else format_bytes(size)}"


def _name_planned(device: PlannedDevice) -> str:
    return device.token if device.device is None else str(device.device.index)


# ---- showing


def _build_row(made: FrameworkMeasurement, gpu: GpuMeasurement) -> Sequence[StyledText | str]:
    own = "" if gpu.is_process else " (card)"
    return (
        _name_framework(made),
        _name_gpu(gpu),
        "-" if gpu.limit is None else format_bytes(gpu.limit),
        _format_mib(gpu.allocated),
        _format_mib(gpu.memory) + own,
        _format_mib(gpu.overhead),
        gpu.refused_by or "-",
        _style_verdict(judge_gpu(made, gpu)),
    )


def _format_mib(size: int | None) -> str:
    """Return a size that is compared with others: in MiB, however large it is."""
    return "?" if size is None else f"{size / MIB:.0f} MiB"


def _name_framework(made: FrameworkMeasurement) -> str:
    return f"{made.title} {made.version or ''}".strip()


def _name_gpu(gpu: GpuMeasurement) -> str:
    return gpu.label or gpu.uuid


def _style_verdict(verdict: Verdict) -> StyledText:
    return StyledText(_WORDS[verdict], _STYLES[verdict])
