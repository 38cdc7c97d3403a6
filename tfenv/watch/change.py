"""What a change of policy files means: what a process that starts now would get, compared with what it got before.

A file that was only touched is no change, and a change that a process would not notice is none of the policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from tfenv.audit import record
from tfenv.audit.sinks import AuditLog
from tfenv.audit.stderr_line import format_policy_line
from tfenv.config.document import Trust
from tfenv.errors import Finding
from tfenv.launchers.grant import read_current_grant
from tfenv.pipeline import MACHINE_ROOT, Decision, LoadedPolicy, check_disable_switch, decide, load, select_errors
from tfenv.policy.merge import combine
from tfenv.policy.model import AuditSinks, Grant, Setting, Start, Subject, format_key
from tfenv.values import field, frozen, replace

__all__ = ["Change", "ChangeLog", "Difference", "FileChange", "State", "Written", "compare", "look"]


# ---- what a process would get


@frozen
class State:
    """What a process that starts now would get.

    Attributes:
        loaded: The files and what they say.
        decision: What follows from them.
        findings: All that is wrong, with positions; clamps are notes.
        grant: What the watching process was granted.
        disabled: TFGPU_DISABLE switches all of it off.
    """

    loaded: LoadedPolicy
    decision: Decision
    findings: tuple[Finding, ...] = ()
    grant: Grant = field(default_factory=Grant)
    disabled: bool = False

    @property
    def in_force(self) -> str:
        """What holds for such a process, in one line that is safe on a terminal."""
        policy, plan = self.loaded.policy, self.decision.plan
        if self.disabled:
            return "nothing: TFGPU_DISABLE switches the policy off"
        if self.decision.refused:
            return '`import tensorflow` raises PolicyError: on_error is "fail"'
        if not self.decision.no_gpu:
            plan = replace(plan, findings=())  # they are told in full beside this line
        findings = self.loaded.findings if self.decision.no_gpu else ()
        text = format_policy_line(self.loaded.subject, policy, plan, None, findings).removeprefix("tfgpu: ")
        return text or "nothing is declared about GPUs: TensorFlow is left as it is"


def look(
    start: Start,
    subject: Subject | None = None,
    machine_root: str = MACHINE_ROOT,
    machine_trust: Trust | None = None,
) -> State:
    """What a process that starts now would get; the arguments are those of `pipeline.load`. Never raises."""
    loaded = load(start, subject, machine_root, machine_trust)
    grant, request = read_current_grant()
    decision = decide(loaded, grant, request=request)
    disabled, remarks = check_disable_switch(loaded)
    planned = tuple(loaded.locate(finding) for finding in decision.plan.findings)
    return State(loaded, decision, (*loaded.findings, *remarks, *planned), grant, disabled)


# ---- what changed


@frozen
class FileChange:
    """What became of one file.

    Attributes:
        path: The file.
        what: "left out": it is there, and does not count as a whole.
    """

    path: str
    what: Literal["new", "changed", "gone", "left out"]


@frozen
class Written:
    """A value as its author wrote it.

    Attributes:
        value: As TOML has it.
        path: The file.
        line: 1-based; None when unknown.
    """

    value: object
    path: str
    line: int | None = None

    @property
    def origin(self) -> str:
        return self.path if self.line is None else f"{self.path}:{self.line}"


@frozen
class Difference:
    """One value of the effective policy that is another one now, or stands elsewhere.

    Attributes:
        key: Dotted, inside its file: "gpu.memory_limit", "group.students.ceiling.max_devices".
        old: Before; None: it was not set.
        new: Now; None: it is not set any more.
    """

    key: str
    old: Written | None
    new: Written | None

    def as_dict(self) -> dict[str, object]:
        """For JSON, as in `changes` of the audit record."""
        return {
            "key": self.key,
            "old": self.old and self.old.value,
            "new": self.new and self.new.value,
            "old_origin": self.old and self.old.origin,
            "new_origin": self.new and self.new.origin,
        }


@frozen
class Change:
    """What a change of files means.

    Attributes:
        timestamp: When it was seen, as in the audit log.
        before: What a process got until then.
        after: What it gets from then on.
        files: Which files changed.
        differences: Of the effective policy; () when it is the same.
    """

    timestamp: str
    before: State
    after: State
    files: tuple[FileChange, ...]
    differences: tuple[Difference, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The mistakes in the files that changed. That this machine has no such GPU is none."""
        changed = {file.path for file in self.files}
        return tuple(finding for finding in select_errors(self.after.loaded.findings) if finding.path in changed)

    @property
    def valid(self) -> bool:
        """The changed files are without a mistake."""
        return not self.errors

    @property
    def alters_policy(self) -> bool:
        """Whether a process gets something else than before; another comment is no such change."""
        return bool(self.differences) or set(map(_told, self.before.findings)) != set(map(_told, self.after.findings))


def _told(finding: Finding) -> tuple[object, ...]:
    """What a finding says, wherever its line went."""
    return finding.code, finding.path, finding.key, finding.message


def compare(before: State, after: State) -> Change | None:
    """The change from one state to the other; None when no file that has a say is another one."""
    files = tuple(_file_changes(_files(before.loaded), _files(after.loaded)))
    change = Change(record.make_timestamp(), before, after, files, tuple(_differences(before.loaded, after.loaded)))
    return change if files or change.alters_policy else None


def _files(loaded: LoadedPolicy) -> dict[str, str | Finding]:
    """What of each file was seen: its hash, or why it is left out."""
    seen: dict[str, str | Finding] = {**loaded.hashes}
    for finding in loaded.findings:
        if finding.path is not None and finding.code != "not-found":
            seen.setdefault(finding.path, finding)
    return seen


def _file_changes(before: Mapping[str, str | Finding], after: Mapping[str, str | Finding]) -> Iterator[FileChange]:
    for path in dict.fromkeys((*before, *after)):
        old, new = before.get(path), after.get(path)
        if old == new:
            continue
        if new is None:
            yield FileChange(path, "gone")
        elif isinstance(new, Finding):
            yield FileChange(path, "left out")
        else:
            yield FileChange(path, "new" if old is None else "changed")


def _differences(before: LoadedPolicy, after: LoadedPolicy) -> Iterator[Difference]:
    old, new = _in_force(before), _in_force(after)
    for name in dict.fromkeys((*old, *new)):
        was, now = old.get(name), new.get(name)
        if was != now:
            origins = [setting.origin for setting in (now, was) if setting is not None]
            yield Difference(format_key(origins[0].key), _written(before, was), _written(after, now))


def _written(loaded: LoadedPolicy, setting: Setting | None) -> Written | None:
    if setting is None:
        return None
    value, position = loaded.written(setting.origin)
    return Written(value, setting.origin.path, position and position[0])


def _in_force(loaded: LoadedPolicy) -> dict[tuple[str, ...], Setting]:
    """Every value that has a say, by its name; what adds up (ceilings, logs) once for each author."""
    policy, layers = loaded.policy, combine(loaded.layers)
    found: dict[tuple[str, ...], Setting] = {("gpu", name): value for name, value in policy.settings.items()}
    for ceiling in policy.ceilings:
        found["ceiling", ceiling.key, ceiling.origin.layer] = Setting(ceiling.value, ceiling.origin)
    for layer in layers:
        found |= {("machine", name): value for name, value in layer.machine.items()}
        strictest = layer.top.get("on_error")
        if strictest is not None and strictest.value == policy.on_error:
            found.setdefault(("on_error",), strictest)
        for table in layer.audit:
            found |= {("audit", name, value.origin.path): value for name, value in table.items() if name != "stderr"}
        said = [table["stderr"] for table in layer.audit if "stderr" in table]
        if said:
            found.setdefault(("audit", "stderr"), said[-1])  # the farthest layer that speaks of it
    return found


# ---- what is written down


class ChangeLog:
    """Writes `policy_changed` into the logs of the policy before and of the one after. No method raises."""

    def __init__(self) -> None:
        self._log: AuditLog | None = None
        self._key: tuple[AuditSinks, str | None] | None = None

    def write(self, change: Change) -> None:
        """One record; a log that the change takes away is told of it, too."""
        loaded = change.after.loaded
        sinks = _both(change.before.loaded.policy.audit, loaded.policy.audit)
        key = sinks, loaded.subject.project
        if self._log is None or key != self._key:  # kept, for it counts what it could not write
            self._log, self._key = AuditLog(sinks, loaded.start.home, loaded.subject.uid, key[1]), key
        self._log.emit(_record(change))


def _both(old: AuditSinks, new: AuditSinks) -> AuditSinks:
    return AuditSinks(
        stderr="none",  # the command tells it there in its own way
        files=tuple(dict.fromkeys((*old.files, *new.files))),
        required_files=tuple(dict.fromkeys((*old.required_files, *new.required_files))),
        syslog=old.syslog or new.syslog,
        default_file=old.default_file or new.default_file,
    )


def _record(change: Change) -> record.AuditRecord:
    state, loaded = change.after, change.after.loaded
    context = record.RecordContext(
        record.ProcessFacts.collect(), loaded.subject, state.grant, loaded.sources, dict(loaded.hashes)
    )
    differences = [difference.as_dict() for difference in change.differences]
    return record.make_changed_record(context, loaded.policy, state.decision.plan, differences, state.findings)
