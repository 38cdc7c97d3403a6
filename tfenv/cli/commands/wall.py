"""`tfgpu wall`: have the driver keep memory limits for users, jobs and services, whatever programs they run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tfenv.cli.output import (
    FINDINGS,
    OK,
    USAGE,
    add_description,
    add_format_option,
    get_exit_code,
    print_findings,
    print_json,
    print_message,
)
from tfenv.cli.tables import StyledText, TableColumn, build_table, print_renderable
from tfenv.cli.wall_login import install_login, uninstall_login
from tfenv.config.presence import MACHINE_ROOT
from tfenv.devices.cgroups import CGROUP_ROOT, find_uncounted, get_user_slice
from tfenv.errors import escape_for_terminal
from tfenv.lint.check import check_path
from tfenv.policy.model import MemoryLimit
from tfenv.policy.units import format_bytes, parse_limit
from tfenv.values import frozen
from tfenv.wall.changes import CgroupChange, WallSetter, open_wall
from tfenv.wall.record import WallRecorder
from tfenv.wall.targets import (
    Target,
    WallError,
    find_mistakes,
    find_named_subject,
    give_to_all,
    list_logged_in,
    load_machine_policy,
    make_target,
    resolve_cgroup,
)

_APPLY = "Set the limits that /etc/tfgpu says, or a limit of your own for one cgroup."
_SHOW = "Show who keeps limits here, which are set, what is used of them, and whether the policy says so."
_CLEAR = "Remove limits."
_INSTALL = "Have the limits set whenever a user logs in."
_UNINSTALL = "Remove exactly what tfgpu wall install wrote. Limits that are set stay."
_EXIT_CODES = "Exit codes: 0 ok, 1 limits cannot be set here or the policy has mistakes, 2 wrong usage."
_COLUMNS = (
    TableColumn("cgroup"), TableColumn("user"), TableColumn("GPU", is_number=True),
    TableColumn("limit", is_number=True), TableColumn("used", is_number=True), TableColumn("policy"),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(
        parser,
        "It needs driver 615 or newer and cgroup v2. A limit is for each GPU, and for all processes of a cgroup "
        f"together. {_EXIT_CODES}",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    apply = _add_action(actions, "apply", _APPLY, apply_limits)
    _add_targets(apply)
    apply.add_argument(
        "--limit", type=_parse_limit, metavar="SIZE", help='Limit the cgroup to this: "8GiB", or "50%%" of each card.'
    )
    _add_action(actions, "show", _SHOW, show_limits)
    _add_targets(_add_action(actions, "clear", _CLEAR, clear_limits))
    for name, purpose, change_login in (
        ("install", _INSTALL, install_login),
        ("uninstall", _UNINSTALL, uninstall_login),
    ):
        action = _add_action(actions, name, purpose, change_login, has_format=False)
        action.add_argument("--dry-run", action="store_true", help="Show the difference and change nothing.")


def _add_action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    purpose: str,
    run_action: Callable[[argparse.Namespace], int],
    *,
    has_format: bool = True,
) -> argparse.ArgumentParser:
    action = actions.add_parser(name, help=purpose, description=f"{purpose} {_EXIT_CODES}")
    action.set_defaults(run_action=run_action)
    if has_format:
        add_format_option(action)
    return action


def _add_targets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--user", metavar="NAME", help="Do it for this user, by name or number.")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--all", action="store_true", help="Do it for all users who are logged in.")
    place.add_argument("--cgroup", metavar="PATH", help="Do it for this cgroup, as of a job of Slurm or a service.")
    parser.add_argument("--dry-run", action="store_true", help="Show what would change, and change nothing.")


def _parse_limit(text: str) -> MemoryLimit:
    try:
        limit = parse_limit(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if limit.bytes is None and limit.fraction is None:
        raise argparse.ArgumentTypeError('write "8GiB" or "50%"; to take a limit away run tfgpu wall clear')
    return limit


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    code: int = arguments.run_action(arguments)
    return code


# ---- apply and clear


def apply_limits(arguments: argparse.Namespace) -> int:
    """Set limits. Return the exit code.

    Raises:
        WallError: They cannot be set.
    """
    problem = _find_wrong_usage(arguments)
    if problem is None and arguments.limit is not None and arguments.cgroup is None:
        problem = "--limit is for one cgroup; name it with --cgroup, or write memory_total into /etc/tfgpu"
    if problem is None and arguments.cgroup is not None and (arguments.user is None) == (arguments.limit is None):
        problem = "say how much the cgroup may take: either --user NAME, whose policy counts, or --limit SIZE"
    if problem is not None:
        print_message("wall apply", problem)
        return USAGE
    _require_root(arguments)
    with open_wall() as wall:
        wall.require()
        targets = list(_list_targets(arguments, wall))
        policies = [target.loaded for target in targets if target.loaded is not None]
        findings = dict.fromkeys(finding for loaded in policies for finding in loaded.findings)
        wrong = [finding for finding in findings if finding.severity != "note"]
        print_findings(wrong)
        if any(map(find_mistakes, policies)):
            print_message("wall apply", "the policy has mistakes, so all limits stay as they are")
            return FINDINGS
        if not arguments.dry_run and os.path.isdir(MACHINE_ROOT):
            check_path(MACHINE_ROOT)  # keeps the last good copies
        return _bring_about(targets, wall, arguments) or get_exit_code(wrong)


def clear_limits(arguments: argparse.Namespace) -> int:
    """Take limits away. Return the exit code.

    Raises:
        WallError: They cannot be taken away.
    """
    problem = _find_wrong_usage(arguments)
    if problem is None and arguments.cgroup is not None and arguments.user is not None:
        problem = "name either a user or a cgroup"
    if problem is not None:
        print_message("wall clear", problem)
        return USAGE
    _require_root(arguments)
    with open_wall() as wall:
        wall.require()
        if arguments.cgroup is not None:
            targets = [Target(resolve_cgroup(arguments.cgroup))]
        else:
            targets = [Target(get_user_slice(subject.uid)) for subject in _list_subjects(arguments)]
        return _bring_about(targets, wall, arguments)


def _find_wrong_usage(arguments: argparse.Namespace) -> str | None:
    if arguments.user is None and not arguments.all and arguments.cgroup is None:
        return "say for whom: --user NAME, --all or --cgroup PATH"
    return "--all is for all users; leave out --user" if arguments.all and arguments.user is not None else None


def _require_root(arguments: argparse.Namespace) -> None:
    if os.geteuid() != 0 and not arguments.dry_run:
        raise WallError("only root may set limits; run the command with sudo, or with --dry-run")


def _list_targets(arguments: argparse.Namespace, wall: WallSetter) -> Iterator[Target]:
    if arguments.limit is not None:
        yield Target(resolve_cgroup(arguments.cgroup), give_to_all(arguments.limit, wall.machine.gpus))
        return
    for subject in _list_subjects(arguments):
        cgroup = get_user_slice(subject.uid) if arguments.cgroup is None else resolve_cgroup(arguments.cgroup)
        yield make_target(cgroup, load_machine_policy(subject), wall.machine.gpus)


def _list_subjects(arguments: argparse.Namespace) -> list[Any]:
    return list_logged_in() if arguments.all else [find_named_subject(arguments.user)]


@frozen
class _Done:
    """What came of the targets.

    Attributes:
        changes: What changed, or would.
        unchanged: Cgroups that had their limits already.
        missing: Cgroups that are not there.
        problems: Why limits were not set that should be.
    """

    changes: tuple[CgroupChange, ...]
    unchanged: tuple[Target, ...]
    missing: tuple[Target, ...]
    problems: tuple[str, ...]


def _bring_about(targets: Sequence[Target], wall: WallSetter, arguments: argparse.Namespace) -> int:
    """Change what is not as it is to be, write it down, and print it. Return the exit code.

    What cannot be changed for one cgroup or GPU keeps no other from its limits.
    """
    compared = []
    silent = wall.machine.silent.items()
    problems = [f"GPU {index} does not answer, so its limits stay as they are: {why}" for index, why in silent]
    for target in targets:
        if target.exists:
            try:
                compared.append(wall.compare(target))
            except WallError as error:
                problems.append(str(error))
    changes = [change for change in compared if change.limits]
    if not arguments.dry_run:
        changes, refused = _apply_all(changes, wall)
        problems += refused
    done = _Done(
        tuple(changes),
        tuple(change.target for change in compared if not change.limits),
        tuple(target for target in targets if not target.exists),
        tuple(problems),
    )
    if arguments.format == "json":
        print_json(_describe(done, wall, dry_run=arguments.dry_run))
    else:
        _print_done(done, wall, dry_run=arguments.dry_run)
    for problem in problems:
        print_message(f"wall {arguments.action}", problem)
    return FINDINGS if problems else OK


def _apply_all(changes: Iterable[CgroupChange], wall: WallSetter) -> tuple[list[CgroupChange], list[str]]:
    """Make changes and record each. Return what was changed, and why the rest was not."""
    recorder = WallRecorder(wall.support.backend)
    made, problems = [], []
    for wanted in changes:
        change, refused = wall.apply(wanted)
        problems += refused
        if change.limits:
            recorder.write(change)
            made.append(change)
    return made, problems


def _describe(done: _Done, wall: WallSetter, *, dry_run: bool) -> dict[str, Any]:
    return {
        "backend": wall.support.backend,
        "dry_run": dry_run,
        "changes": [
            {
                "cgroup": change.target.cgroup,
                "user": change.target.user,
                "enable_dmem_in": list(change.enable),
                "limits": [
                    {
                        "gpu": limit.gpu.index,
                        "uuid": limit.gpu.uuid,
                        "before_bytes": limit.before.hard,
                        "after_bytes": limit.after,
                    }
                    for limit in change.limits
                ],
            }
            for change in done.changes
        ],
        "unchanged": [target.cgroup for target in done.unchanged],
        "missing": [target.cgroup for target in done.missing],
        "problems": list(done.problems),
        "split_gpus": list(wall.machine.split),
    }


def _print_done(done: _Done, wall: WallSetter, *, dry_run: bool) -> None:
    for change in done.changes:
        for cgroup in change.enable:
            print(f"{'would switch' if dry_run else 'switched'} on the controller dmem in {_shorten(cgroup)}")
        for limit in change.limits:
            before, after = _format_limit(limit.before.hard), _format_limit(limit.after)
            if limit.before.soft:
                before += f", of which {format_bytes(limit.before.soft)} reserved"
            print(f"{_name(change.target)}, GPU {limit.gpu.index}: {before} -> {after}")
    for target in done.missing:
        print(f"{_name(target)} is not there: {target.user or 'the user'} is not logged in")
    if not done.changes and not done.problems:
        count = len(done.unchanged)
        print(f"nothing to change: {count} {'cgroup has its' if count == 1 else 'cgroups have their'} limits")
    elif dry_run:
        print("nothing is changed, because of --dry-run")
    _print_split(wall.machine.split)


def _print_split(split: Iterable[int]) -> None:
    for index in split:
        print_message("wall", f"GPU {index} is split by MIG, so the driver keeps no limits for it")


def _name(target: Target) -> str:
    user = f" ({escape_for_terminal(target.user)})" if target.user else ""
    return f"{_shorten(target.cgroup)}{user}"


def _shorten(cgroup: str) -> str:
    return escape_for_terminal(cgroup.removeprefix(f"{CGROUP_ROOT}/"))


def _format_limit(size: int | None) -> str:
    return "no limit" if size is None else format_bytes(size)


# ---- show


@frozen
class _ShownLimit:
    """A row of `show`.

    Attributes:
        cgroup: Its full path.
        user: Whose slice it is. None: nobody's.
        gpu: As `nvidia-smi` counts.
        uuid: The GPU.
        limit: Bytes. None: no limit.
        used: Bytes that its processes hold. None: nothing is counted.
        wanted: What the policy says, for a user's slice.
        problem: Why the policy cannot be told. "": it can, or there is none for this cgroup.
    """

    cgroup: str
    user: str | None
    gpu: int
    uuid: str
    limit: int | None
    used: int | None
    wanted: int | None = None
    problem: str = ""


def show_limits(arguments: argparse.Namespace) -> int:
    """Show all limits. Return the exit code.

    Raises:
        WallError: NVML cannot be asked.
    """
    with open_wall() as wall:
        rows = [] if wall.support.backend == "none" else list(_list_shown(wall))
        if arguments.format == "json":
            print_json(_describe_shown(rows, wall))
            return OK
        text = wall.support.describe()
        print(f"{text[0].upper()}{text[1:]}.")
        if rows:
            print_renderable(build_table(_COLUMNS, [_format_row(row) for row in rows]))
        elif wall.support.backend != "none":
            print("No cgroup has a limit.")
        for cgroup in _list_uncounted(rows, wall):
            print(f"{_shorten(cgroup)} lacks the files of the controller dmem; tfgpu wall apply switches it on")
        _print_split(wall.machine.split)
        for index, why in wall.machine.silent.items():
            print_message("wall show", f"GPU {index} does not answer: {why}")
    return OK


def _list_shown(wall: WallSetter) -> Iterator[_ShownLimit]:
    subjects = {get_user_slice(subject.uid): subject for subject in list_logged_in()}
    for cgroup in _walk(CGROUP_ROOT):
        subject = subjects.get(cgroup)
        target, problem = None, ""
        if subject is not None:
            loaded = load_machine_policy(subject)
            target = make_target(cgroup, loaded, wall.machine.gpus)
            problem = next((finding.message for finding in find_mistakes(loaded)), "")
        for gpu in wall.machine.gpus:
            limits = wall.read(cgroup, gpu)
            wanted = None if target is None else target.limits[gpu.uuid]
            if (limits is None or limits.hard is None) and wanted is None:
                continue
            yield _ShownLimit(
                cgroup,
                None if subject is None else subject.user,
                gpu.index,
                gpu.uuid,
                None if limits is None else limits.hard,
                None if limits is None else limits.used,
                wanted,
                problem,
            )


def _walk(root: str) -> Iterator[str]:
    """Yield all cgroups below one, each before those in it. Users may nest theirs as deeply as they like."""
    waiting = [root]
    while waiting:
        cgroup = waiting.pop()
        if cgroup != root:
            yield cgroup
        try:
            children = [entry.path for entry in os.scandir(cgroup) if entry.is_dir(follow_symlinks=False)]
        except OSError:  # it is gone by now
            continue
        waiting += sorted(children, reverse=True)


def _list_uncounted(rows: Iterable[_ShownLimit], wall: WallSetter) -> list[str]:
    if wall.support.backend != "dmem":
        return []
    lacking = (find_uncounted(row.cgroup) for row in rows)
    return list(dict.fromkeys(cgroup for cgroup in lacking if cgroup is not None))


def _describe_shown(rows: Iterable[_ShownLimit], wall: WallSetter) -> dict[str, Any]:
    rows = list(rows)
    return {
        "backend": wall.support.backend,
        "problem": wall.support.problem or None,
        "limits": [
            {
                "cgroup": row.cgroup,
                "user": row.user,
                "gpu": row.gpu,
                "uuid": row.uuid,
                "limit_bytes": row.limit,
                "used_bytes": row.used,
                "policy_bytes": row.wanted,
                "policy_problem": row.problem or None,
            }
            for row in rows
        ],
        "without_dmem_files": _list_uncounted(rows, wall),
        "split_gpus": list(wall.machine.split),
        "silent_gpus": [{"gpu": index, "problem": why} for index, why in wall.machine.silent.items()],
    }


def _format_row(row: _ShownLimit) -> tuple[StyledText | str, ...]:
    if row.problem:
        policy = StyledText("has mistakes; run tfgpu check", "yellow")
    elif row.user is None:
        policy = StyledText("")
    elif row.limit == row.wanted:
        policy = StyledText("as it says")
    else:
        policy = StyledText(f"says {_format_limit(row.wanted)}; run tfgpu wall apply --user {row.user}", "yellow")
    return (
        row.cgroup.removeprefix(f"{CGROUP_ROOT}/"),
        row.user or "",
        str(row.gpu),
        _format_limit(row.limit),
        "" if row.used is None else format_bytes(row.used),
        policy,
    )
