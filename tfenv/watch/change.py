"""What a change of policy files means: what a process that starts now would get, compared with what it got before.

A file that was only touched is no change, and a change that a process would not notice is none of the policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from tfenv.audit import record
from tfenv.audit.sinks import AuditLog
from tfenv.audit.stderr_line import format_policy_line
from tfenv.config.document import Trust
from tfenv.config.presence import MACHINE_ROOT
from tfenv.errors import Finding
from tfenv.launchers.grant import read_current_grant
from tfenv.pipeline import Decision, LoadedPolicy, check_disable_switch, decide, load, select_errors
from tfenv.policy.merge import combine
from tfenv.policy.model import AuditSinks, DatedTable, Grant, Setting, Start, Subject, format_key
from tfenv.values import field, frozen, replace

# ---- what a process would get


@frozen
class PolicyState:
    """What a process that starts now would get.

    Attributes:
        loaded: The files and what they say.
        decision: What follows from them.
        findings: All that is wrong, with positions. Clamps are notes.
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
            return "nothing: TFGPU_DISABLE=1 switches the policy off"
        if self.decision.refused:
            return 'the import of a framework raises PolicyError: on_error is "fail"'
        if not self.decision.no_gpu:
            plan = replace(plan, findings=())  # they are told in full beside this line
        findings = self.loaded.findings if self.decision.no_gpu else ()
        text = format_policy_line(self.loaded.subject, policy, plan, None, findings).removeprefix("tfgpu: ")
        return text or "no GPU settings apply: programs run unchanged"


def read_state(
    start: Start,
    subject: Subject | None = None,
    machine_root: str = MACHINE_ROOT,
    machine_trust: Trust | None = None,
) -> PolicyState:
    """Return what a process that starts now would get. The arguments are those of `pipeline.load`. Never raises."""
    loaded = load(start, subject, machine_root, machine_trust)
    grant, request = read_current_grant()
    decision = decide(loaded, grant, request=request)
    disabled, remarks = check_disable_switch(loaded)
    planned = tuple(loaded.locate(finding) for finding in decision.plan.findings)
    return PolicyState(loaded, decision, (*loaded.findings, *remarks, *planned), grant, disabled)


def find_ends(state: PolicyState) -> tuple[str, ...]:
    """Return the days on which tables for this subject will end, the first one first."""
    dated = (table for table in state.loaded.dated if not table.expired)
    return tuple(sorted({table.expires for table in dated if table.expires is not None}))


# ---- what changed


@frozen
class FileChange:
    """What happened to one file.

    Attributes:
        path: The file.
        what: "left out": it is there, and counts for nothing as a whole.
    """

    path: str
    what: Literal["new", "changed", "gone", "left out"]


@frozen
class WrittenValue:
    """A value as its author wrote it.

    Attributes:
        value: As TOML has it.
        path: The file.
        line: 1-based. None when unknown.
    """

    value: object
    path: str
    line: int | None = None

    @property
    def origin(self) -> str:
        """The file, with the line where it is known: `path:line`."""
        return self.path if self.line is None else f"{self.path}:{self.line}"


@frozen
class PolicyDifference:
    """One value of the effective policy that is another one now, or stands elsewhere.

    Attributes:
        key: Dotted, inside its file: "gpu.memory_limit", "group.students.ceiling.max_devices".
        old: Before. None: it was not set.
        new: Now. None: it is not set any more.
    """

    key: str
    old: WrittenValue | None
    new: WrittenValue | None

    def as_dict(self) -> dict[str, object]:
        """Return the difference as `changes` of the audit record has it."""
        return {
            "key": self.key,
            "old": self.old and self.old.value,
            "new": self.new and self.new.value,
            "old_origin": self.old and self.old.origin,
            "new_origin": self.new and self.new.origin,
        }


@frozen
class PolicyChange:
    """What a change of files means.

    Attributes:
        timestamp: When it was seen, as in the audit log.
        before: What a process got until then.
        after: What it gets from then on.
        files: Which files changed.
        differences: Of the effective policy. () when it is the same.
    """

    timestamp: str
    before: PolicyState
    after: PolicyState
    files: tuple[FileChange, ...]
    differences: tuple[PolicyDifference, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The mistakes in the files that changed. That this machine has no such GPU is none."""
        changed = {file.path for file in self.files}
        return tuple(finding for finding in select_errors(self.after.loaded.findings) if finding.path in changed)

    @property
    def expired(self) -> tuple[DatedTable, ...]:
        """The tables that have come to their end since."""
        ended = {(table.origin, table.expires) for table in self.before.loaded.dated if table.expired}
        after = self.after.loaded.dated
        return tuple(table for table in after if table.expired and (table.origin, table.expires) not in ended)

    @property
    def valid(self) -> bool:
        """Whether the changed files are without a mistake."""
        return not self.errors

    @property
    def alters_policy(self) -> bool:
        """Whether a process gets something else than before. Another comment is no such change."""
        before, after = ({_drop_position(finding) for finding in state.findings} for state in (self.before, self.after))
        return bool(self.differences) or before != after


def _drop_position(finding: Finding) -> tuple[object, ...]:
    """Return what a finding says, wherever its line went."""
    return finding.code, finding.path, finding.key, finding.message


def compare_states(before: PolicyState, after: PolicyState, others: Iterable[FileChange] = ()) -> PolicyChange | None:
    """Return the change from one state to the other. None when every file that counts is the same.

    Args:
        before: What a process got until now.
        after: What it gets from now on.
        others: What happened to files that are for others.
    """
    files = (*compare_files(_identify_files(before.loaded), _identify_files(after.loaded)), *others)
    differences = tuple(_compare_values(before.loaded, after.loaded))
    change = PolicyChange(record.make_timestamp(), before, after, files, differences)
    return change if files or change.alters_policy else None


def make_empty_change(before: PolicyState, after: PolicyState) -> PolicyChange:
    """Return a change of no file: another day."""
    return PolicyChange(record.make_timestamp(), before, after, ())


def _identify_files(loaded: LoadedPolicy) -> dict[str, str | Finding]:
    """Return what of each file was seen: its hash, or why it is left out."""
    seen: dict[str, str | Finding] = {**loaded.hashes}
    for finding in loaded.findings:
        if finding.path is not None and finding.code != "not-found":
            seen.setdefault(finding.path, finding)
    return seen


def compare_files(before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[FileChange]:
    """Yield what happened to each file, by what was seen of it. A finding says why it is left out."""
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


def _compare_values(before: LoadedPolicy, after: LoadedPolicy) -> Iterator[PolicyDifference]:
    old, new = _list_values_in_force(before), _list_values_in_force(after)
    for name in dict.fromkeys((*old, *new)):
        was, now = old.get(name), new.get(name)
        if was != now:
            origins = [setting.origin for setting in (now, was) if setting is not None]
            key = format_key(origins[0].key)
            yield PolicyDifference(key, _find_written_value(before, was), _find_written_value(after, now))


def _find_written_value(loaded: LoadedPolicy, setting: Setting | None) -> WrittenValue | None:
    if setting is None:
        return None
    value, position = loaded.find_value(setting.origin)
    return WrittenValue(value, setting.origin.path, position and position[0])


def _list_values_in_force(loaded: LoadedPolicy) -> dict[tuple[str, ...], Setting]:
    """Return every value that counts, by its name. What adds up (ceilings, logs) is there once for each author."""
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
        stderr_settings = [table["stderr"] for table in layer.audit if "stderr" in table]
        if stderr_settings:
            found.setdefault(("audit", "stderr"), stderr_settings[-1])  # the farthest layer that sets it
    return found


# ---- what is written down


class ChangeRecorder:
    """Writes `policy_changed` into the logs of the policy before and of the one after. No method raises."""

    def __init__(self) -> None:
        self._log: AuditLog | None = None
        self._key: tuple[AuditSinks, str | None] | None = None

    def write(self, change: PolicyChange) -> None:
        """Write one record. A log that the change takes away gets it, too."""
        loaded = change.after.loaded
        sinks = _join_sinks(change.before.loaded.policy.audit, loaded.policy.audit)
        key = sinks, loaded.subject.project
        if self._log is None or key != self._key:  # kept, for it counts what it could not write
            self._log, self._key = AuditLog(sinks, loaded.start.home, loaded.subject.uid, key[1]), key
        self._log.emit(_make_change_record(change))


def _join_sinks(old: AuditSinks, new: AuditSinks) -> AuditSinks:
    return AuditSinks(
        stderr="none",  # the command tells it there in its own way
        files=tuple(dict.fromkeys((*old.files, *new.files))),
        required_files=tuple(dict.fromkeys((*old.required_files, *new.required_files))),
        syslog=old.syslog or new.syslog,
        required_syslog=old.required_syslog or new.required_syslog,
        default_file=old.default_file or new.default_file,
        default_log=new.default_log,
    )


def _make_change_record(change: PolicyChange) -> record.AuditRecord:
    state, loaded = change.after, change.after.loaded
    process = record.ProcessFacts.collect()
    context = record.RecordContext(
        process,
        loaded.subject,
        state.grant,
        loaded.sources,
        dict(loaded.hashes),
        loaded.revision,
        loaded.exceptions,
    )
    differences = [difference.as_dict() for difference in change.differences]
    return record.make_changed_record(context, loaded.policy, state.decision.plan, differences, state.findings)
