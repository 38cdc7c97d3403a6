"""`tfgpu watch`: follow the policy files, and tell what each change means for a process that starts from then on."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import TextIO

from tfenv.cli.output import (
    OK,
    USAGE,
    add_description,
    add_format_option,
    format_time,
    format_toml,
    paint,
    print_findings,
    print_json_line,
    print_message,
    shorten_path,
)
from tfenv.errors import escape_for_terminal
from tfenv.explanation import plan_as_dict
from tfenv.lint.check import keep_valid
from tfenv.pipeline import current_start
from tfenv.policy.model import format_key
from tfenv.values import as_dict
from tfenv.watch.change import ChangeRecorder, PolicyChange, WrittenValue
from tfenv.watch.follow import PolicyWatcher

#: For the command of --exec, which also gets the change as one line of JSON on its stdin.
FILES_VARIABLE = "TFGPU_CHANGED_FILES"
_ONCE = "Running processes keep their limits. A change applies to those that start later."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(
        parser,
        "It follows the files of all layers, and notices new files. It checks each change, shows the difference and "
        "writes a policy_changed record into the audit log. Press Ctrl-C to stop it. "
        "Exit codes: 0 after SIGTERM, 2 wrong usage, 130 after Ctrl-C.",
    )
    parser.add_argument(
        "--project", metavar="DIR", help="Watch the policy of a program that starts in this directory (default: here)."
    )
    parser.add_argument(
        "--all-users", action="store_true",
        help="Watch all files in /etc/tfgpu, also those for other users and groups, and run the command of --exec "
        "after each change of one, and once a day.",
    )  # fmt: skip
    parser.add_argument(
        "--exec", type=_parse_command, metavar="CMD", dest="command",
        help="Run this after each change of the policy, if its files are correct. It gets the change as a line "
        f"of JSON on stdin, and the files in {FILES_VARIABLE}, separated by colons.",
    )  # fmt: skip
    add_format_option(parser)


def _parse_command(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; quote it as for a shell") from None
    if not words:
        raise argparse.ArgumentTypeError("no command given")
    return words


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    return follow_policy(arguments.project, arguments.command, arguments.format, all_users=arguments.all_users)


def follow_policy(
    project: str | None, command: Sequence[str] | None, output_format: str, *, all_users: bool = False
) -> int:
    """Print each change of the policy until Ctrl-C or SIGTERM.

    Args:
        project: The directory where a program starts. None: this one.
        command: What to run after each change. None: nothing.
        output_format: "text" or "json".
        all_users: Follow the files for other users and groups, too.

    Returns:
        The exit code: 0 after SIGTERM, 2 if there is no such directory.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    if project is not None and not os.path.isdir(project):
        print_message("watch", f"{project} is not a directory")
        return USAGE
    start = current_start(None if project is None else os.path.abspath(project))
    is_json = output_format == "json"
    log, hook = ChangeRecorder(), ChangeCommand(command, stdout=sys.stderr if is_json else None)
    with PolicyWatcher(start, lambda text: print_message("watch", text), all_users=all_users) as watch:

        def end(*_: object) -> None:
            watch.stop()
            hook.stop()

        signal.signal(signal.SIGTERM, end)
        _print_start(watch, is_json=is_json)
        keep_valid(watch.state.loaded.documents, watch.state.findings)
        for change in watch.follow_changes():
            keep_valid(change.after.loaded.documents, change.after.findings)
            if change.alters_policy:
                log.write(change)
            if is_json:
                print_json_line(_describe_change(change))
            else:
                _print_change(change)
            sys.stdout.flush()
            if change.alters_policy or all_users:
                hook.run(change)
    return OK


# ---- printing


def _print_start(watch: PolicyWatcher, *, is_json: bool) -> None:
    if is_json:
        print_message("watch", f"watching {len(watch.places)} places. {_ONCE}")
        return
    loaded = watch.state.loaded
    folder = shorten_path(loaded.start.cwd or "a deleted directory")
    print(f"{paint('Watching', 'strong')} the policy of {escape_for_terminal(loaded.subject.user)} in {folder}")
    existing = {*loaded.hashes, *(finding.path for finding in loaded.findings if finding.code != "not-found")}
    files = [path for path in watch.places if path in existing]
    for path in files:
        print(f"  {shorten_path(path)}")
    print(paint(f"  and {len(watch.places) - len(files)} places without a file now", "quiet"))
    print_findings((finding for finding in watch.state.findings if finding.severity != "note"), indent="  ")
    print(f"  now: {watch.state.in_force}\n{_ONCE}", flush=True)


def _print_change(change: PolicyChange) -> None:
    files = ", ".join(f"{shorten_path(file.path)} {file.what}" for file in change.files)
    ended = ", ".join(
        escape_for_terminal(f"[{format_key(table.origin.key)}] {table.describe_end()}") for table in change.expired
    )
    title = " and ".join(filter(None, (files, ended))) or (
        "the policy changed" if change.alters_policy else "a new day"
    )
    print(f"\n{paint(_format_time(change.timestamp), 'quiet')}  {paint(title, 'strong')}")
    old_findings = set(change.before.findings)
    findings = [finding for finding in change.after.findings if finding.severity != "note"]
    print_findings([finding for finding in findings if finding not in old_findings], indent="  ")
    for format_difference in change.differences:
        old, new = _format_value(format_difference.old), _format_value(format_difference.new)
        print(f"  {escape_for_terminal(format_difference.key)}: {old} -> {new}")
    if not change.alters_policy:
        print(f"  the policy of {escape_for_terminal(change.after.loaded.subject.user)} did not change")
    else:
        print(f"  {_describe_effect(change)}: {change.after.in_force}")


def _describe_effect(change: PolicyChange) -> str:
    """Return what a change does. Each process reads the files anew: of an invalid one it gets the rest, not the old."""
    if change.valid or change.after.decision.refused or change.after.disabled:
        return paint("now", "ok" if change.valid else "problem")
    left_out = [shorten_path(file.path) for file in change.files if file.what == "left out"]
    return paint(f"now, without {', '.join(left_out) or 'the wrong values'}", "problem")


def _format_time(timestamp: str) -> str:
    return f"{format_time(timestamp)} UTC"


def _format_value(written: WrittenValue | None) -> str:
    if written is None:
        return "not set"
    origin = shorten_path(written.path) + ("" if written.line is None else f":{written.line}")
    return f"{escape_for_terminal(format_toml(written.value))} {paint(f'({origin})', 'quiet')}"


def _describe_change(change: PolicyChange) -> dict[str, object]:
    """Return the change for JSON, as the command of --exec reads it, too."""
    state = change.after
    return {
        "timestamp": change.timestamp,
        "files": as_dict(change.files),
        "valid": change.valid,
        "expired": [
            {
                "table": format_key(table.origin.key),
                "path": table.origin.path,
                "expires": table.expires,
                "reason": table.reason,
            }
            for table in change.expired
        ],
        "changes": [format_difference.as_dict() for format_difference in change.differences],
        "findings": as_dict(state.findings),
        "in_force": state.in_force,
        "disabled": state.disabled,
        "refused": state.decision.refused,
        "plan": plan_as_dict(state.decision.plan),
    }


# ---- --exec


class ChangeCommand:
    """The command of --exec. It runs to its end before the next one starts. What goes wrong with it is reported."""

    def __init__(self, command: Sequence[str] | None, stdout: TextIO | None) -> None:
        """Prepare a command.

        Args:
            command: What to run. None: nothing.
            stdout: Where it prints. None: the stdout of this process.
        """
        self._command, self._stdout = command, stdout
        self._child: subprocess.Popen[str] | None = None
        self._stopped = False

    def run(self, change: PolicyChange) -> None:
        """Run it to its end, unless there is none, or it was stopped, or the changed files have a mistake."""
        if self._command is None or self._stopped or not change.valid:
            return
        variables = {**os.environ, FILES_VARIABLE: os.pathsep.join(file.path for file in change.files)}
        try:
            with subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=self._stdout, env=variables, text=True
            ) as self._child:
                if self._stopped:  # by a signal, before the child had a name here
                    self._child.terminate()  # type: ignore[unreachable]
                self._child.communicate(json.dumps(_describe_change(change)) + "\n")
                code = self._child.returncode
            if code:
                how = f"exited with {code}" if code > 0 else f"was stopped by signal {-code}"
                print_message("watch", f"{shlex.join(self._command)} {how}")
        except (OSError, ValueError) as error:
            print_message("watch", f'cannot run "{self._command[0]}": {getattr(error, "strerror", None) or error}')
        finally:
            self._child = None

    def stop(self) -> None:
        """End the command that runs, and start none any more. May be called from a signal handler."""
        self._stopped = True
        if self._child is not None:
            self._child.terminate()
