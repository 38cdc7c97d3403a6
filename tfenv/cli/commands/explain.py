"""`tfgpu explain`: each value, who set it, what it overrode, what clamped it, and what follows."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

from tfenv.cli.output import (
    USAGE,
    Style,
    add_format,
    exit_code,
    paint,
    print_findings,
    print_json,
    print_table,
    say,
    shown_path,
    toml_text,
)
from tfenv.errors import escape_for_terminal
from tfenv.explanation import Choosing, ExaminedFile, ExplainedCeiling, ExplainedSetting, Explanation, Value, explain
from tfenv.policy.model import Device, Plan, PlannedDevice
from tfenv.policy.units import format_bytes, format_limit

if TYPE_CHECKING:
    from tfenv.cli.output import SubParsers

__all__ = ["add_parser", "run"]

_STATES: dict[str, tuple[str, Style]] = {
    "read": ("read", "ok"),
    "dropped": ("dropped", "problem"),
    "none": ("-", "quiet"),
}
#: Characters of a row that others are lined up with.
_WIDEST_VALUE = 60
#: Entries of a list that are shown.
_MOST_ENTRIES = 4
#: "GPU-8932f937": tells one card from another.
_SHORT_UUID = 12
_COLUMNS = ("GPU", "nvidia-smi", "name", "memory", "at most", "UUID")


def add_parser(subparsers: SubParsers) -> None:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "explain",
        help="show which values hold here, who set them, and what follows",
        description="Show which values hold for a program that starts here, who set each of them, what they overrode, "
        "what clamped them, and what follows. Needs neither TensorFlow nor a GPU. Root may ask for somebody else.",
    )
    parser.add_argument("--user", metavar="NAME", help="whose program: a login name, or uid:1234 (default: yours)")
    parser.add_argument("--project", metavar="DIR", help="the directory where the program starts (default: here)")
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Explain; 1: there is an error or a warning; 2: DIR is no directory, NAME no user or none of one's business."""
    try:
        explanation = explain(args.project, args.user)
    except (NotADirectoryError, LookupError, PermissionError) as error:
        say("explain", str(error))
        return USAGE
    if args.format == "json":
        print_json(explanation.as_dict())
    else:
        _print_text(explanation)
    return exit_code(explanation.findings)


def _print_text(explanation: Explanation) -> None:
    project = shown_path(explanation.project or "a deleted directory")
    print(f"{paint('Policy', 'strong')} of {escape_for_terminal(explanation.user)} in {project}")
    print(paint(f"Groups: {escape_for_terminal(', '.join(explanation.groups) or 'none')}", "quiet"))
    if explanation.new_login:
        print(paint("As in a new login: variables (CUDA_VISIBLE_DEVICES, TFGPU_*) of yours do not count.", "quiet"))
    _print_files(explanation.files)
    _print_settings(explanation.settings)
    _print_ceilings(explanation.ceilings)
    _print_outcome(explanation)
    findings = [finding for finding in explanation.findings if finding.code != "clamped"]
    if findings:
        _heading("Findings")
        print_findings(findings, indent="  ")


def _heading(text: str) -> None:
    print(f"\n{paint(text, 'strong')}")


# ---- where things come from


def _print_files(files: Sequence[ExaminedFile]) -> None:
    _heading("Files, the nearest last")
    width = max(len(shown_path(file.path)) for file in files)
    for file in files:
        word, style = _STATES[file.state]
        why = f"  {escape_for_terminal(file.why)}" if file.why else ""
        print(f"  {file.layer:<8} {shown_path(file.path):<{width}}  {paint(word, style)}{paint(why, 'quiet')}")


def _print_settings(settings: Iterable[ExplainedSetting]) -> None:
    rows: list[tuple[str, str]] = []
    for setting in settings:
        rows.append((f"{setting.name} = {_text(setting.chosen)}", _origin(setting.chosen)))
        rows += [(f"  overrides {_text(lost)}", _origin(lost)) for lost in setting.overrides]
        rows += [(f"  clamped: {escape_for_terminal(finding.message)}", "") for finding in setting.clamps]
    _print_rows("Settings", rows)


def _print_ceilings(ceilings: Iterable[ExplainedCeiling]) -> None:
    rows: list[tuple[str, str]] = []
    for ceiling in ceilings:
        rows.append((f"{ceiling.key.rpartition('.')[2]} = {_text(ceiling)}", _origin(ceiling)))
        rows += [(f"  replaces {_text(lost)}", _origin(lost)) for lost in ceiling.replaces]
    _print_rows("Ceilings", rows)


def _print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    if not rows:
        return
    _heading(title)
    lengths = [len(left) for left, right in rows if right]
    width = max((length for length in lengths if length <= _WIDEST_VALUE), default=0)
    for left, right in rows:
        print(f"  {left:<{width}}  {paint(right, 'quiet')}" if right else f"  {left}")


def _text(value: Value) -> str:
    """A value as it stands in its file, but for the rest of long lists and of UUIDs: eight of them fill three lines."""
    if not isinstance(value.value, list):
        return toml_text(value.value)
    entries = value.value if len(value.value) <= _MOST_ENTRIES else value.value[: _MOST_ENTRIES - 1]
    shown = [toml_text(_shortened(entry)) for entry in entries]
    more = [] if len(entries) == len(value.value) else [f"… {len(value.value)} in all"]
    return f"[{', '.join(shown + more)}]"


def _shortened(entry: object) -> object:
    is_uuid = isinstance(entry, str) and entry.startswith(("GPU-", "MIG-")) and len(entry) > _SHORT_UUID
    return f"{cast('str', entry)[:_SHORT_UUID]}…" if is_uuid else entry


def _origin(value: Value) -> str:
    """`file:line`, and the table where the key alone does not tell it: [user.alice.gpu]."""
    line = "" if value.line is None else f":{value.line}"
    table = value.key.rpartition(".")[0]
    scope = "" if table in ("gpu", "ceiling", "") else f" [{escape_for_terminal(table)}]"
    return f"{shown_path(value.path)}{line}{scope}"


# ---- what follows


def _print_outcome(explanation: Explanation) -> None:
    _heading("What follows")
    if explanation.disabled:
        print("  Nothing: TFGPU_DISABLE switches the policy off.")
    elif explanation.refused:
        print(f'  {paint("`import tensorflow` raises PolicyError", "problem")}: on_error is "fail", see the findings.')
    elif explanation.silent:
        print("  Nothing is declared about GPUs: TensorFlow is left as it is. `tfgpu init` writes a first tfgpu.toml.")
    else:
        _print_plan(explanation)


def _print_plan(explanation: Explanation) -> None:
    plan = explanation.plan
    granted = "unset" if explanation.grant.tokens is None else ",".join(explanation.grant.tokens) or '""'
    visible = "left as it is" if plan.visible is None else plan.visible
    beside = paint(f"(granted: {escape_for_terminal(granted)})", "quiet")
    print(f"  CUDA_VISIBLE_DEVICES  {escape_for_terminal(visible)}  {beside}")
    if explanation.choosing is not None:
        print(f"  chosen                {escape_for_terminal(_choosing(explanation.choosing))}")
    print(f"  memory growth         {_growth(plan)}")
    print(f"  allocator             {plan.allocator or 'as the program has it'}")
    print(f"  on error              {explanation.on_error}")
    if plan.devices is None:
        limit = "no memory limit" if plan.limit is None else f"at most {format_limit(plan.limit)} each"
        print(f"  GPUs                  all that CUDA shows, {limit}")
    elif not plan.devices:
        print(f"  GPUs                  {paint('none', 'problem')}")
    else:
        print()
        print_table(_COLUMNS, [_row(position, device) for position, device in enumerate(plan.devices)], indent=2)
    if explanation.inventory.devices is None:
        print(
            paint(
                f"  What cards these are is unknown ({escape_for_terminal(explanation.inventory.problem or '')}).",
                "quiet",
            )
        )


def _choosing(choosing: Choosing) -> str:
    text = f"{choosing.count} of them, when devices are first listed"
    if choosing.now is not None:
        return f"{text}; now it would be {', '.join(choosing.now)}"
    busy = {"wait": "the program would wait", "cpu": "none would be visible", "fail": "PolicyError"}
    return f"{text}; now {busy.get(choosing.when_busy, 'the least used would be shared')} ({choosing.scene})"


def _growth(plan: Plan) -> str:
    return "on" if plan.growth else "as the program has it"


def _row(position: int, planned: PlannedDevice) -> tuple[str, ...]:
    limit = format_limit(planned.limit)
    if planned.limit is not None and planned.limit.fraction is not None and planned.device is not None:
        limit = f"{format_bytes(planned.limit.on(planned.device.total) or 0)} ({limit})"
    if planned.logical_devices:
        limit += f" as {' + '.join(format_limit(size) for size in planned.logical_devices)}"
    return (f"GPU:{position}", *_card(planned.token, planned.device), limit, _uuid(planned))


def _card(token: str, device: Device | None) -> tuple[str, str, str]:
    if device is None:
        return (token, "?", "?")
    return (device.label, device.name, "?" if device.total is None else format_bytes(device.total))


def _uuid(planned: PlannedDevice) -> str:
    return planned.device.uuid if planned.device is not None else "?"
