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
from typing import TYPE_CHECKING

from tfenv.cli.output import (
    OK,
    USAGE,
    add_format,
    finding_as_dict,
    paint,
    print_findings,
    say,
    shown_path,
    toml_text,
)
from tfenv.errors import escape_for_terminal
from tfenv.explanation import plan_as_dict
from tfenv.pipeline import current_start
from tfenv.watch.change import ChangeRecorder, PolicyChange, PolicyState, WrittenValue
from tfenv.watch.follow import PolicyWatcher

if TYPE_CHECKING:
    from tfenv.cli.output import SubParsers

__all__ = ["add_parser", "run"]

#: For the command of --exec, which also gets the change as one line of JSON on its stdin.
FILES_VARIABLE = "TFGPU_CHANGED_FILES"
_ONCE = "Running processes keep what they have; a change holds for those that start after it."


def add_parser(subparsers: SubParsers) -> None:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "watch",
        help="follow the policy files, and tell what each change means",
        description="Follow the files of all layers, also those that are not there yet. Each change is checked, told "
        "as a difference of the policy, and written into the audit log as policy_changed. Ctrl-C ends it.",
    )
    parser.add_argument("--project", metavar="DIR", help="the directory where a program starts (default: here)")
    parser.add_argument(
        "--exec", type=_command, metavar="CMD", dest="command",
        help="run this after each change of the policy whose files are without a mistake; it gets the change as a line "
        f"of JSON on stdin and the files in {FILES_VARIABLE}, separated by colons",
    )  # fmt: skip
    add_format(parser)


def _command(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; quote it as for a shell") from None
    if not words:
        raise argparse.ArgumentTypeError("no command given")
    return words


def run(args: argparse.Namespace) -> int:
    """Watch until Ctrl-C (130) or SIGTERM (0); 2 when DIR is no directory."""
    if args.project is not None and not os.path.isdir(args.project):
        say("watch", f"{args.project} is no directory")
        return USAGE
    start = current_start(None if args.project is None else os.path.abspath(args.project))
    log, hook = ChangeRecorder(), _Hook(args.command, quiet_stdout=args.format == "json")
    with PolicyWatcher(start, lambda text: say("watch", text)) as watch:

        def end(*_: object) -> None:
            watch.stop()
            hook.stop()

        signal.signal(signal.SIGTERM, end)
        (_say_start if args.format == "json" else _print_start)(watch)
        for change in watch.follow_changes():
            if change.alters_policy:
                log.write(change)
            _tell(change, args.format)
            if change.alters_policy:
                hook.run(change)
    return OK


# ---- telling


def _tell(change: PolicyChange, shape: str) -> None:
    if shape == "json":
        print(json.dumps(_as_dict(change), ensure_ascii=True, separators=(",", ":")))
    else:
        _print_change(change)
    sys.stdout.flush()


def _say_start(watch: PolicyWatcher) -> None:
    say("watch", f"watching {len(watch.places)} places. {_ONCE}")


def _print_start(watch: PolicyWatcher) -> None:
    loaded = watch.state.loaded
    folder = shown_path(loaded.start.cwd or "a deleted directory")
    print(f"{paint('Watching', 'strong')} the policy of {escape_for_terminal(loaded.subject.user)} in {folder}")
    there = {*loaded.hashes, *(finding.path for finding in loaded.findings if finding.code != "not-found")}
    speaking = [path for path in watch.places if path in there]
    for path in speaking:
        print(f"  {shown_path(path)}")
    print(paint(f"  and {len(watch.places) - len(speaking)} places that have no say now", "quiet"))
    print_findings((finding for finding in watch.state.findings if finding.severity != "note"), indent="  ")
    print(f"  now: {watch.state.in_force}\n{_ONCE}", flush=True)


def _print_change(change: PolicyChange) -> None:
    files = ", ".join(f"{shown_path(file.path)} {file.what}" for file in change.files)
    print(f"\n{paint(_clock(change.timestamp), 'quiet')}  {paint(files or 'another policy', 'strong')}")
    known = set(change.before.findings)
    print_findings(
        (finding for finding in change.after.findings if finding.severity != "note" and finding not in known),
        indent="  ",
    )
    for difference in change.differences:
        print(f"  {escape_for_terminal(difference.key)}: {_value(difference.old)} -> {_value(difference.new)}")
    if not change.alters_policy:
        print("  the policy is the same")
    else:
        print(f"  {_lead(change)}: {change.after.in_force}")


def _lead(change: PolicyChange) -> str:
    """Each process reads the files anew: of an invalid one it gets the rest, never what was there before."""
    if change.valid or change.after.decision.refused or change.after.disabled:
        return paint("now", "ok" if change.valid else "problem")
    left_out = [shown_path(file.path) for file in change.files if file.what == "left out"]
    return paint(f"stays in force, without {', '.join(left_out) or 'what is wrong'}", "problem")


def _clock(timestamp: str) -> str:
    return f"{timestamp[:19].replace('T', ' ')} UTC"


def _value(written: WrittenValue | None) -> str:
    if written is None:
        return "not set"
    origin = shown_path(written.path) + ("" if written.line is None else f":{written.line}")
    return f"{escape_for_terminal(toml_text(written.value))} {paint(f'({origin})', 'quiet')}"


def _as_dict(change: PolicyChange) -> dict[str, object]:
    """The change for JSON; the same that the command of --exec reads."""
    return {
        "timestamp": change.timestamp,
        "files": [vars(file) for file in change.files],
        "valid": change.valid,
        "changes": [difference.as_dict() for difference in change.differences],
        "findings": [finding_as_dict(finding) for finding in change.after.findings],
        **_force_as_dict(change.after),
    }


def _force_as_dict(state: PolicyState) -> dict[str, object]:
    return {
        "in_force": state.in_force,
        "disabled": state.disabled,
        "refused": state.decision.refused,
        "plan": plan_as_dict(state.decision.plan),
    }


# ---- --exec


class _Hook:
    """Runs the command of --exec, one after the other; what goes wrong with it is said, and watching goes on."""

    def __init__(self, command: Sequence[str] | None, *, quiet_stdout: bool) -> None:
        self._command = command
        self._stdout = sys.stderr if quiet_stdout else None  # a reader of JSON lines gets nothing else
        self._child: subprocess.Popen[str] | None = None
        self._stopped = False

    def run(self, change: PolicyChange) -> None:
        """Run it to its end, unless there is none or the change has a mistake."""
        if self._command is None or self._stopped or not change.valid:
            return
        variables = {**os.environ, FILES_VARIABLE: os.pathsep.join(file.path for file in change.files)}
        try:
            with subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=self._stdout, env=variables, text=True
            ) as self._child:
                if self._stopped:  # by a signal, before the child had a name here
                    self._child.terminate()  # type: ignore[unreachable]
                self._child.communicate(json.dumps(_as_dict(change)) + "\n")
                self._report(self._child.returncode)
        except (OSError, ValueError) as error:
            say("watch", f'cannot run "{self._command[0]}": {getattr(error, "strerror", None) or error}')
        finally:
            self._child = None

    def stop(self) -> None:
        """End the command that runs, and start none any more. May be called from a signal handler."""
        self._stopped = True
        if self._child is not None:
            self._child.terminate()

    def _report(self, code: int) -> None:
        if code and self._command is not None:
            how = f"ended with {code}" if code > 0 else f"was ended by signal {-code}"
            say("watch", f"{shlex.join(self._command)} {how}")
