"""`tfgpu explain`: each value, who set it, what it overrides, what lowers it, and its effect."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence

from tfenv.cli.output import (
    USAGE,
    Style,
    add_description,
    add_format_option,
    format_toml,
    get_exit_code,
    paint,
    print_findings,
    print_json,
    print_message,
    shorten_path,
)
from tfenv.cli.tables import print_table
from tfenv.cli.walls import describe_wall
from tfenv.errors import Finding, escape_for_terminal
from tfenv.explanation import (
    UNKNOWN_OCCUPANCY,
    ExaminedFile,
    ExplainedCeiling,
    ExplainedChoice,
    ExplainedException,
    ExplainedObserved,
    ExplainedSetting,
    ExplainedValue,
    Explanation,
    explain,
)
from tfenv.policy.model import Grant, Plan, PlannedDevice
from tfenv.policy.units import format_bytes, format_limit
from tfenv.values import replace

_STATES: dict[str, tuple[str, Style]] = {
    "read": ("read", "ok"),
    "dropped": ("ignored", "problem"),
    "hidden": ("hidden", "note"),
    "replaced": ("replaced", "note"),
    "none": ("-", "quiet"),
}
#: Characters of a value behind which the others' origins are lined up.
_WIDEST_VALUE = 60
#: Entries of a list that are shown.
_MOST_ENTRIES = 4
#: Characters of a UUID that tell one card from another: "GPU-8932f937".
_SHORT_UUID = 12
_RAIL_AND_WALL = "A rail is kept by the framework's own allocator, a wall by the driver, whatever program it is."
_COLUMNS = ("GPU", "nvidia-smi", "name", "memory", "at most", "UUID")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(
        parser,
        "For each value you see the file that sets it, what it overrides, and which ceiling lowers it. "
        "You need neither a framework nor a GPU. Root can ask about other users. "
        "Exit codes: 0 no findings, or only notes, 1 errors or warnings, 2 wrong usage.",
    )
    parser.add_argument(
        "--user", metavar="NAME", help="Explain this user's programs: a login name, or uid:1234 (default: you)."
    )
    parser.add_argument(
        "--project", metavar="DIR", help="Explain a program that starts in this directory (default: here)."
    )
    add_format_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    return print_explanation(arguments.project, arguments.user, arguments.format)


def print_explanation(project: str | None, user: str | None, output_format: str) -> int:
    """Print what holds for a program.

    Args:
        project: The directory where it starts. None: this one.
        user: Whose program it is. None: one's own.
        output_format: "text" or "json".

    Returns:
        The exit code: 1 if there is an error or a warning, 2 if the directory is none, or the user is unknown or
        none of one's business.
    """
    try:
        explanation = explain(project, user)
    except (NotADirectoryError, LookupError, PermissionError) as error:
        print_message("explain", str(error))
        return USAGE
    if output_format == "json":
        print_json(explanation.as_dict())
    else:
        _print_text(explanation)
    return get_exit_code(explanation.findings)


def _print_text(explanation: Explanation) -> None:
    project = shorten_path(explanation.project or "a deleted directory")
    print(f"{paint('Policy', 'strong')} of {escape_for_terminal(explanation.user)} in {project}")
    print(paint(f"Groups: {escape_for_terminal(', '.join(explanation.groups) or 'none')}", "quiet"))
    if explanation.new_login:
        print(
            paint(
                "As for a new login of this user. Your own CUDA_VISIBLE_DEVICES and TFGPU_* variables are ignored.",
                "quiet",
            )
        )
    _print_files(explanation.files)
    _print_settings(explanation.settings, explanation.plan)
    _print_ceilings(explanation.ceilings, explanation.plan)
    _print_observed(explanation.observed)
    _print_exceptions(explanation.exceptions)
    _print_grant(explanation.grant)
    _print_outcome(explanation)
    # What a key asked for stands beside it.
    findings = [finding for finding in explanation.findings if not _is_told_above(finding)]
    if findings:
        _print_heading("Findings")
        print_findings(findings, indent="  ")
    observed = () if explanation.observed is None else explanation.observed.findings
    if later := [finding for finding in observed if not _is_told_above(finding)]:
        _print_heading("Findings if the observed tables were in force")
        print_findings(later, indent="  ")


def _is_told_above(finding: Finding) -> bool:
    return finding.code == "expired" or (finding.code == "clamped" and finding.path is not None)


def _print_heading(text: str) -> None:
    print(f"\n{paint(text, 'strong')}")


# ---- where things come from


def _print_files(files: Sequence[ExaminedFile]) -> None:
    _print_heading("Files (nearest last)")
    width = max(len(shorten_path(file.path)) for file in files)
    for file in files:
        state, style = _STATES[file.state]
        why = f"  {escape_for_terminal(file.why)}" if file.why else ""
        print(f"  {file.layer:<8} {shorten_path(file.path):<{width}}  {paint(state, style)}{paint(why, 'quiet')}")


def _print_settings(settings: Iterable[ExplainedSetting], plan: Plan) -> None:
    _print_rows("Settings", _list_setting_rows(settings, plan))


def _list_setting_rows(settings: Iterable[ExplainedSetting], plan: Plan) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for setting in settings:
        rows.append((f"{setting.name} = {_format_value(setting.chosen)}", _format_origin(setting.chosen)))
        rows += [(f"  overrides {_format_value(lost)}", _format_origin(lost)) for lost in setting.overrides]
        rows += _describe_share(setting.chosen, plan)
        rows += [(f"  clamped: {escape_for_terminal(finding.message)}", "") for finding in setting.clamps]
    return rows


def _print_ceilings(ceilings: Iterable[ExplainedCeiling], plan: Plan) -> None:
    _print_rows("Ceilings", _list_ceiling_rows(ceilings, plan))


def _list_ceiling_rows(ceilings: Iterable[ExplainedCeiling], plan: Plan) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for ceiling in ceilings:
        rows.append((f"{ceiling.key.rpartition('.')[2]} = {_format_value(ceiling)}", _format_origin(ceiling)))
        rows += [(f"  replaces {_format_value(lost)}", _format_origin(lost)) for lost in ceiling.replaces]
        rows += _describe_share(ceiling, plan)
    return rows


def _print_observed(observed: ExplainedObserved | None) -> None:
    """Print what the tables under `[observe]` would set. What is in force stands above."""
    if observed is None:
        return
    rows = [
        *_list_setting_rows(observed.settings, observed.plan),
        *_list_ceiling_rows(observed.ceilings, observed.plan),
    ]
    _print_rows("Observed, not in force", rows or [("nothing for this user in this directory", "")])


def _print_exceptions(exceptions: Iterable[ExplainedException]) -> None:
    rows = [(f"[{escape_for_terminal(one.table)}] {one.text}", _format_place(one.path, one.line)) for one in exceptions]
    _print_rows("Exceptions", rows)


def _describe_share(value: ExplainedValue, plan: Plan) -> list[tuple[str, str]]:
    """Return the line about what "granted" means here. []: it is not written, or a finding says what is missing."""
    if plan.share is None or '"granted"' not in format_toml(value.value):
        return []
    share = f"{plan.share.giver} gave {plan.share.fraction:g} of each GPU ({plan.share.text})"
    return [(f"  granted: {escape_for_terminal(share)}", "")]


def _print_grant(grant: Grant) -> None:
    """Say which launcher spoke, and what it gave. A plain shell gave nothing."""
    rows = [("launcher", grant.launcher)] if grant.launcher else []
    named = {"job" if name == "id" else name.replace("_", " "): value for name, value in grant.job.items()}
    rows += [(name, value) for name, value in named.items() if name != "scheduler"]
    if grant.launcher:
        rows.append(("gave", _format_given(grant)))
    if grant.share is not None and not grant.share.is_whole:
        rows.append(("share", f"{grant.share.text} ({grant.share.giver})"))
    if grant.rank is not None:
        rows.append(("local rank", f"{grant.rank}{', with GPUs of its own' if grant.own_gpus else ''}"))
    if rows:
        _print_heading("Grant")
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"  {name:<{width}}  {escape_for_terminal(value)}")


def _format_given(grant: Grant) -> str:
    if grant.unlisted or grant.listed == ():
        return "no GPU"
    if grant.listed is not None:
        return f"GPU {','.join(grant.listed)}"
    if grant.tokens is None:
        return "all GPUs (CUDA_VISIBLE_DEVICES is not set)"
    return f"GPU {','.join(grant.tokens)}" if grant.tokens else "no GPU"


def _print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    if not rows:
        return
    _print_heading(title)
    lengths = [len(left) for left, right in rows if right]
    width = max((length for length in lengths if length <= _WIDEST_VALUE), default=0)
    for left, right in rows:
        print(f"  {left:<{width}}  {paint(right, 'quiet')}" if right else f"  {left}")


def _format_value(value: ExplainedValue) -> str:
    """Return a value as its file has it. Long lists and UUIDs are cut: eight of them would fill three lines."""
    if not isinstance(value.value, list):
        return format_toml(value.value)
    entries = value.value if len(value.value) <= _MOST_ENTRIES else value.value[: _MOST_ENTRIES - 1]
    texts = [format_toml(_shorten_uuid(entry)) for entry in entries]
    more = [] if len(entries) == len(value.value) else [f"… {len(value.value)} in all"]
    return f"[{', '.join(texts + more)}]"


def _shorten_uuid(entry: object) -> object:
    if isinstance(entry, str) and entry.startswith(("GPU-", "MIG-")) and len(entry) > _SHORT_UUID:
        return f"{entry[:_SHORT_UUID]}…"
    return entry


def _format_origin(value: ExplainedValue) -> str:
    """Return `file:line`, and the table if the key alone does not tell it: [user.alice.gpu]."""
    table = value.key.rpartition(".")[0]
    scope = "" if table in ("gpu", "ceiling", "") else f" [{escape_for_terminal(table)}]"
    terms = "" if value.expires is None else f", until {value.expires}"
    terms += f" ({escape_for_terminal(value.reason)})" if value.reason else ""
    return f"{_format_place(value.path, value.line)}{scope}{terms}"


def _format_place(path: str, line: int | None) -> str:
    return shorten_path(path) + ("" if line is None else f":{line}")


# ---- what follows


def _print_outcome(explanation: Explanation) -> None:
    _print_heading("Effect")
    if explanation.disabled:
        print("  Nothing: TFGPU_DISABLE=1 switches the policy off.")
    elif explanation.refused:
        print(f'  {paint("The import of a framework raises PolicyError", "problem")}: on_error is "fail", see below.')
    elif explanation.silent and any(finding.severity == "error" for finding in explanation.findings):
        print("  Nothing is in force: see the findings below. Programs have all GPUs without a limit.")
    elif explanation.silent:
        advice = "" if explanation.observed is not None else f" {_advise_on_files(explanation.files)}"
        effect = "each process is kept below its wall" if _has_rails(explanation) else "programs run unchanged"
        print(f"  No GPU settings apply: {effect}.{advice}")
        if explanation.observed is not None:
            _print_plan(explanation)
    else:
        _print_plan(explanation)
    _print_limits(explanation)


def _print_limits(explanation: Explanation) -> None:
    """Name each limit: a rail, which a framework keeps, or a wall, which the driver keeps."""
    labels_by_limits: dict[tuple[str, str], list[str]] = {}
    for label, *limits in _list_limits(explanation):
        labels_by_limits.setdefault((limits[0], limits[1]), []).append(label)
    rows = [(", ".join(labels), *limits) for limits, labels in labels_by_limits.items()]
    if rows:
        _print_heading("Limits")
        width = max(len(labels) for labels, _, _ in rows)
        for labels, rail, wall in rows:
            first, *others = [f"{kind}  {text}" for kind, text in (("rail", rail), ("wall", wall)) if text]
            print(f"  GPU {labels:<{width}}  {first}")
            for text in others:
                print(f"      {'':<{width}}  {text}")
        print(paint(f"  {_RAIL_AND_WALL}", "quiet"))
    if explanation.wall_problem:
        text = f"memory_total is kept by leases and allocators only: {explanation.wall_problem}"
        print(f"  {escape_for_terminal(text)}")


def _list_limits(explanation: Explanation) -> Iterator[tuple[str, str, str]]:
    """Yield each GPU that is limited, with its rail and its wall in words. "": it has none."""
    plan = explanation.plan if _is_read(explanation) else Plan()
    planned = {device.device.uuid: device for device in plan.devices or () if device.device is not None}
    for device in explanation.inventory.devices or ():
        rail = _describe_rail(planned[device.uuid]) if device.uuid in planned else ""
        wall = "" if device.wall is None else describe_wall(device.wall)
        if rail or wall:
            yield device.label, rail, wall
    for unknown in plan.devices or ():
        if unknown.device is None and (rail := _describe_rail(unknown)):
            yield escape_for_terminal(unknown.token), rail, ""


def _is_read(explanation: Explanation) -> bool:
    """Return whether tfenv is loaded for a program. Without any file it is not, and sets no limit below a wall."""
    return not explanation.disabled and any(file.state == "read" for file in explanation.files)


def _has_rails(explanation: Explanation) -> bool:
    return any(rail for _, rail, _ in _list_limits(explanation))


def _describe_rail(planned: PlannedDevice) -> str:
    """Return the limit of a process on a GPU. "": there is none."""
    if planned.limit is None or planned.limit.unlimited:
        return ""
    return f"{_format_limit_on(planned)} for each process"


def _advise_on_files(files: Iterable[ExaminedFile]) -> str:
    """Say what to do where nothing is declared. `tfgpu init` refuses where the project has a file."""
    own = {file.state: file for file in files if file.layer == "project"}
    if "read" in own:
        return f"Add settings to {shorten_path(own['read'].path)}."
    if "dropped" in own:
        return f"{shorten_path(own['dropped'].path)} is ignored, see the findings below."
    return "Run `tfgpu init` to write a tfgpu.toml."


def _print_plan(explanation: Explanation) -> None:
    plan, tried = explanation.plan, _get_observed_plan(explanation)
    _print_visible_devices(explanation)
    _print_effect("memory growth", _format_growth, plan, tried)
    _print_effect("allocator", _format_allocator, plan, tried)
    print(f"  on error              {explanation.on_error}")
    if not plan.devices:
        _print_effect("GPUs", _format_all_devices, plan, tried)
    else:
        print()
        columns, rows = _make_device_rows(plan.devices, tried)
        if explanation.choosing is None:
            print_table(columns, rows, indent=2)
        else:  # which of them TensorFlow will call GPU:0 is not decided yet
            print_table(("candidate", *columns[2:]), [row[1:] for row in rows], indent=2)
    if explanation.inventory.devices is None:
        problem = escape_for_terminal(explanation.inventory.problem or "")
        print(paint(f"  tfenv does not know their names and sizes ({problem}).", "quiet"))


def _make_device_rows(
    devices: Sequence[PlannedDevice], tried: Plan | None
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns and rows of the GPUs, with what each would have under the observed policy before the UUID."""
    rows = [_format_device(position, planned) for position, planned in enumerate(devices)]
    if tried is None:
        return _COLUMNS, rows
    observed = [_format_observed_limit(planned, tried) for planned in devices]
    wider = [(*row[:-1], text, row[-1]) for row, text in zip(rows, observed, strict=True)]
    return (*_COLUMNS[:-1], "observed", _COLUMNS[-1]), wider


def _get_observed_plan(explanation: Explanation) -> Plan | None:
    return None if explanation.observed is None else explanation.observed.plan


def _print_effect(name: str, describe: Callable[[Plan], str], plan: Plan, tried: Plan | None) -> None:
    """Print a line of the effect, and what it would be under the observed policy if that differs."""
    now, later = describe(plan), "" if tried is None else describe(tried)
    print(f"  {name:<20}  {now}{_format_observed(later) if later not in ('', now) else ''}")


def _format_observed(text: str) -> str:
    return f"  {paint(f'(observed: {text})', 'note')}"


def _format_growth(plan: Plan) -> str:
    return "on" if plan.growth else "set by the program"


def _format_allocator(plan: Plan) -> str:
    return plan.allocator or "set by the program"


def _format_all_devices(plan: Plan) -> str:
    """Return which GPUs a plan gives, without their names."""
    if plan.devices is not None:
        return f"{len(plan.devices)} of them" if plan.devices else paint("none", "problem")
    limit = "no memory limit" if plan.limit is None else f"at most {format_limit(plan.limit)} each"
    return f"all that CUDA shows, {limit}"


def _format_observed_limit(planned: PlannedDevice, tried: Plan) -> str:
    """Return what the process might take of a GPU under the observed policy."""
    if tried.devices is None:
        return _format_limit_on(replace(planned, limit=tried.limit, logical_devices=()))
    same = (device for device in tried.devices if planned.identity == device.identity)
    found = next(same, None)
    return "no GPU" if found is None else _format_limit_on(found)


def _print_visible_devices(explanation: Explanation) -> None:
    plan, choosing, tokens = explanation.plan, explanation.choosing, explanation.grant.tokens
    at_start = escape_for_terminal("unset" if tokens is None else ",".join(tokens) or '""')
    start = paint(f"(at the start: {at_start})", "quiet")
    visible = escape_for_terminal("unchanged" if plan.visible is None else plan.visible)
    if choosing is None:
        tried = _get_observed_plan(explanation)
        later = "" if tried is None else escape_for_terminal(_format_observed_visible(tried))
        print(
            f"  CUDA_VISIBLE_DEVICES  {visible}  {start}{_format_observed(later) if later not in ('', visible) else ''}"
        )
        return
    candidates = "of the candidates below" if plan.devices else "of the GPUs that CUDA shows"
    print(f"  CUDA_VISIBLE_DEVICES  {choosing.count} {candidates}  {start}")
    print(f"  chosen                when your program first lists its devices; {_format_choice(choosing)}")
    if plan.visible is not None:
        print(f"  until then            {visible}")


def _format_observed_visible(tried: Plan) -> str:
    if tried.choosing is not None:
        return f"{tried.choosing.count} free of {len(tried.devices or ()) or 'all'}"
    return "unchanged" if tried.visible is None else tried.visible


def _format_choice(choosing: ExplainedChoice) -> str:
    """Return what a program would get that lists its devices now."""
    scene = escape_for_terminal(choosing.scene)
    if choosing.now is not None:
        return f"now it would be {escape_for_terminal(','.join(choosing.now))}"
    if choosing.scene == UNKNOWN_OCCUPANCY:
        return scene
    busy = {"wait": "wait", "cpu": "get no GPU", "fail": "fail with PolicyError"}
    return f"now it would {busy.get(choosing.when_busy, 'share the least used')} ({scene})"


def _format_device(position: int, planned: PlannedDevice) -> tuple[str, ...]:
    device, limit = planned.device, _format_limit_on(planned)
    if device is None:
        return (f"GPU:{position}", planned.token, "?", "?", limit, "?")
    memory = "?" if device.total is None else format_bytes(device.total)
    return (f"GPU:{position}", device.label, device.name, memory, limit, device.uuid)


def _format_limit_on(planned: PlannedDevice) -> str:
    device, limit = planned.device, format_limit(planned.limit)
    if planned.limit is not None and planned.limit.fraction is not None and device is not None:
        limit = f"{format_bytes(planned.limit.on(device.total) or 0)} ({limit})"
    if planned.logical_devices:
        limit += f" as {' + '.join(format_limit(size) for size in planned.logical_devices)}"
    return limit
