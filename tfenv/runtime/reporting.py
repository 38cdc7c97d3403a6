"""What one process says of its policy: records in the audit log, and one line on stderr."""

from __future__ import annotations

import os
from collections.abc import Callable

from tfenv.audit import record, summary
from tfenv.audit.sinks import AuditLog
from tfenv.errors import PROGRAM, Finding, escape_for_terminal
from tfenv.frameworks.tensorflow import entry_points
from tfenv.pipeline import LoadedPolicy
from tfenv.policy.model import Grant, Outcome, Plan
from tfenv.values import replace

__all__ = ["Reporter"]

#: Distinct outcomes that are written down per process: a program that opens sessions in a loop fills no disk.
_MOST_OUTCOMES = 64


class Reporter:
    """Writes down what happens to one process. No method raises.

    Attributes:
        outcomes: What happened at the entry points so far.
        pending: Notes that belong to the next outcome.
        log: The audit log.
    """

    def __init__(self, framework: str, loaded: LoadedPolicy, grant: Grant) -> None:
        self.framework = framework
        self.loaded = loaded
        self.grant = grant
        self.outcomes: list[Outcome] = []
        self.pending: tuple[Finding, ...] = ()
        policy, subject = loaded.policy, loaded.subject
        self.log = AuditLog(policy.audit, loaded.start.home, subject.uid, subject.project)
        self._written: set[tuple[int, str]] = set()

    # -- events

    def loaded_policy(self, plan: Plan, elapsed_ms: float) -> None:
        """At import: kept, and written with the next event or at the process's end."""
        loaded = self.loaded
        self._write(
            lambda: record.policy_loaded(self._context(), loaded.policy, plan, loaded.findings, elapsed_ms), later=True
        )

    def switched_off(self) -> None:
        self._write(lambda: record.policy_disabled(self._context()), later=True)

    def refused(self, findings: tuple[Finding, ...]) -> None:
        """PolicyError is about to be raised."""
        self._write(lambda: record.policy_failed(self._context(), findings, self.loaded.policy))

    def failed(self, finding: Finding, entry_point: str) -> None:
        """The policy is not in force as it should be, and the program goes on."""
        outcome = Outcome("failed", entry_point, findings=(finding,))
        self.outcomes.append(outcome)
        self._write(lambda: record.policy_failed(self._context(), policy=self.loaded.policy, outcome=outcome))
        if self.loaded.policy.audit.stderr == "summary":
            on_error = self.loaded.policy.on_error
            summary.show_summary(escape_for_terminal(f'tfgpu: {finding.message} (on_error = "{on_error}")'))

    def passed(self, outcome: Outcome, plan: Plan) -> None:
        """Devices are about to be created at an entry point."""
        pending, self.pending = self.pending, ()
        outcome = _with_notes(outcome, pending)
        seen = (os.getpid(), repr(outcome))
        if seen in self._written or len(self._written) >= _MOST_OUTCOMES:
            return
        self._written.add(seen)
        self.outcomes.append(outcome)
        self._write(lambda: record.policy_outcome(self._context(), outcome))
        self._tell(outcome, plan)

    # -- how

    def _tell(self, outcome: Outcome, plan: Plan) -> None:
        """Say on stderr what holds, unless the program wants no GPU anyway."""
        loaded = self.loaded
        wrong = any(finding.severity != "note" for finding in (*loaded.findings, *outcome.findings))
        if loaded.policy.audit.stderr != "summary" or (outcome.asked.get("device_count") == 0 and not wrong):
            return
        summary.show_summary(summary.summary(loaded.subject, loaded.policy, plan, outcome, loaded.findings))

    def _write(self, make: Callable[[], record.AuditRecord], *, later: bool = False) -> None:
        """Write a record now, or at the next event. A fault in making it costs the record, not the program."""
        try:
            (self.log.keep if later else self.log.emit)(make())
        except Exception as error:  # noqa: BLE001 - as above
            summary.say(escape_for_terminal(f"tfgpu: an audit record was not written: {type(error).__name__}: {error}"))

    def script(self) -> str | None:
        """The program that runs, as records name it."""
        return record.Process.current(self.framework).script

    def _context(self) -> record.Context:
        process = record.Process.current(self.framework, entry_points.version())
        return record.Context(process, self.loaded.subject, self.grant, self.loaded.sources, self.loaded.hashes)


def _with_notes(outcome: Outcome, pending: tuple[Finding, ...]) -> Outcome:
    """Add what was noted since the last entry point. A request of the program that was cut makes it a clamp."""
    cut = any(finding.asked_by == PROGRAM for finding in pending)
    status = "clamped" if cut and outcome.status == "applied" else outcome.status
    return replace(outcome, status=status, findings=(*pending, *outcome.findings))
