"""What one process reports of its policy: records in the audit log, and one line on stderr."""

from __future__ import annotations

import os

from tfenv.errors import PROGRAM, Finding, escape_for_terminal
from tfenv.values import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tfenv.audit.record import AuditRecord, RecordContext
    from tfenv.audit.sinks import AuditLog
    from tfenv.frameworks.base import CreatedDevices, Framework
    from tfenv.pipeline import LoadedPolicy
    from tfenv.policy.model import Grant, Outcome, Plan
    from tfenv.runtime.ending import EndReporter

#: Of outcomes that differ only in details so many are written down one by one. Then they are counted together.
_MOST_DETAILS = 1000
#: Kinds and details that are counted in a process, about.
_MOST_KINDS = 8192


class RepeatCounter:
    """Says what of all that happens in a process is to be written down: a program's loop fills no disk.

    What happens again is written the tenth, the hundredth, the thousandth time, with the count.
    """

    def __init__(self) -> None:
        self._pid = 0
        self._counts: dict[tuple[str, ...], int] = {}

    def count(self, kind: tuple[str, ...], details: str) -> int:
        """Count once more what happened.

        Args:
            kind: What it was, roughly: the entry point, the status, the codes of the findings.
            details: All of it.

        Returns:
            How many times it happened since it was last to be written down, this one included. 0: do not write it.
        """
        if self._pid != os.getpid():  # a forked worker has a record of its own
            self._pid, self._counts = os.getpid(), {}
        each, different = ("each", *kind, str(hash(details))), ("different", *kind)
        if different not in self._counts and len(self._counts) >= _MOST_KINDS:
            each = ("all others",)
        elif each not in self._counts:
            self._counts[different] = self._counts.get(different, 0) + 1
            if self._counts[different] > _MOST_DETAILS:
                each = ("others", *kind)
        times = self._counts[each] = self._counts.get(each, 0) + 1
        if times == 1:
            return 1
        is_power = str(times).rstrip("0") == "1"
        return times - max(1, times // 10) if is_power else 0


class Reporter:
    """Writes down what happens to one process. No method raises.

    The modules of audit/ are loaded when there is something to write.

    Attributes:
        pending: Findings that belong to the next outcome.
    """

    def __init__(self, loaded: LoadedPolicy, grant: Grant) -> None:
        self.loaded = loaded
        self.grant = grant
        self.pending: tuple[Finding, ...] = ()
        self._outcomes: list[tuple[str, Outcome]] = []
        self._repeats = RepeatCounter()
        self._end: EndReporter | None = None
        self._log: AuditLog | None = None

    # -- events

    def report_loaded(self, plan: Plan, framework: Framework, elapsed_ms: float) -> None:
        """Record the policy at the import. It is written with the next event, or at the process's end."""
        from tfenv.audit.record import make_loaded_record

        loaded = self.loaded
        self._write(
            lambda: make_loaded_record(self._make_context(framework), loaded.policy, plan, loaded.findings, elapsed_ms),
            later=True,
        )

    def report_switched_off(self, framework: Framework) -> None:
        """Record that TFGPU_DISABLE=1 switched the policy off."""
        from tfenv.audit.record import make_disabled_record

        self._write(lambda: make_disabled_record(self._make_context(framework)), later=True)

    def report_refused(self, findings: tuple[Finding, ...], framework: Framework | None = None) -> None:
        """Record that PolicyError is about to be raised."""
        from tfenv.audit.record import make_failed_record

        codes = ",".join(sorted({finding.code for finding in findings}))
        name = "" if framework is None else framework.name
        times = self._repeats.count((name, "", "refused", codes), repr(findings))
        if times:
            self._write(
                lambda: make_failed_record(self._make_context(framework), findings, self.loaded.policy, repeats=times)
            )

    def report_failed(self, finding: Finding, entry_point: str = "", framework: Framework | None = None) -> None:
        """Record that the policy is not in force as it should be, and say so on stderr. The program goes on."""
        from tfenv.audit.record import make_failed_record
        from tfenv.audit.stderr_line import show_policy_line
        from tfenv.policy.model import Outcome

        outcome = Outcome("failed", entry_point, findings=(finding,))
        name = "" if framework is None else framework.name
        times = self._repeats.count((name, entry_point, "failed", finding.code), finding.message)
        if not times:
            return
        self._outcomes.append((name, outcome))
        policy = self.loaded.policy
        self._write(
            lambda: make_failed_record(self._make_context(framework), policy=policy, outcome=outcome, repeats=times)
        )
        if policy.audit.stderr == "summary":
            text = f'tfgpu: {finding.message} (on_error = "{policy.on_error}") [{finding.code}]'
            show_policy_line(escape_for_terminal(text))

    def report_outcome(
        self, outcome: Outcome, plan: Plan, framework: Framework, pending: tuple[Finding, ...] = ()
    ) -> None:
        """Record that devices are about to be created at an entry point, and say on stderr what holds.

        Args:
            outcome: What happens there.
            plan: What the framework may use.
            framework: Whose entry point it is.
            pending: What was found in this framework since its last outcome.
        """
        from tfenv.audit.record import make_outcome_record

        # A required log that cannot be written is then why the program gets no GPU.
        reasons = self.log_findings if self.loaded.policy.on_error == "cpu" else ()
        outcome = _add_errors(outcome, (*self.loaded.findings, *reasons))
        outcome = _add_findings(outcome, (*self.pending, *pending), plan)
        self.pending = ()
        self._note_devices(framework, outcome)
        codes = ",".join(sorted({finding.code for finding in outcome.findings}))
        kind = (framework.name, outcome.entry_point, outcome.status, codes)
        times = self._repeats.count(kind, repr(outcome))
        if not times:
            return
        self._outcomes.append((framework.name, outcome))
        self._write(lambda: make_outcome_record(self._make_context(framework), outcome, repeats=times))
        self._show(outcome, plan, framework)

    def _note_devices(self, framework: Framework, outcome: Outcome) -> None:
        from tfenv.runtime.ending import EndReporter  # not at the import of a framework

        if self._end is None:
            self._end = EndReporter(self._report_ended)
        self._end.note(framework, outcome)

    def _report_ended(self, framework: Framework, created: CreatedDevices) -> None:
        """Record the end of the process, with what it created in this framework."""
        self._write(lambda: self._make_ended_record(framework, created))

    def _make_ended_record(self, framework: Framework, created: CreatedDevices) -> AuditRecord:
        from tfenv.audit.record import make_ended_record
        from tfenv.runtime.ending import measure_process_ms, merge_devices

        context = self._make_context(framework)
        devices = merge_devices(created, framework.read_peaks(created))
        return make_ended_record(context, devices, measure_process_ms(context.process.start_ticks))

    # -- what was reported

    def list_outcomes(self, framework: str | None = None) -> tuple[Outcome, ...]:
        """Return what happened so far, oldest first.

        Args:
            framework: In this framework, and what concerns all of them. None: in any.
        """
        return tuple(outcome for name, outcome in self._outcomes if framework is None or name in ("", framework))

    @property
    def log_findings(self) -> tuple[Finding, ...]:
        """What is wrong with the logs, as far as they were used."""
        return () if self._log is None else self._log.findings

    def open_log(self) -> None:
        """Open the logs that the administrator requires, so that `log_findings` tells whether they can be written."""
        self._get_log().open_now()

    def find_script(self) -> str | None:
        """Return the program that runs, as records name it."""
        from tfenv.audit.record import ProcessFacts

        return ProcessFacts.collect().script

    # -- how

    def _show(self, outcome: Outcome, plan: Plan, framework: Framework) -> None:
        """Say on stderr what holds, unless the program wants no GPU anyway."""
        from tfenv.audit.stderr_line import add_losses, format_policy_line, show_policy_line

        loaded = self.loaded
        wrong = any(finding.severity != "note" for finding in (*loaded.findings, *outcome.findings))
        if loaded.policy.audit.stderr != "summary" or (outcome.asked.get("device_count") == 0 and not wrong):
            return
        line = format_policy_line(loaded.subject, loaded.policy, plan, outcome, loaded.findings, framework.title)
        if loaded.observed is not None and loaded.observed.tell:
            line = add_losses(line, outcome)
        show_policy_line(line)

    def _write(self, make: Callable[[], AuditRecord], *, later: bool = False) -> None:
        """Write a record now, or at the next event. A fault in making it costs the record, not the program."""
        try:
            log = self._get_log()
            (log.keep if later else log.emit)(make())
        except Exception as error:  # noqa: BLE001 - as above
            from tfenv.audit.stderr_line import print_to_stderr

            text = f"tfgpu: an audit record was not written: {type(error).__name__}: {error} [internal-error]"
            print_to_stderr(escape_for_terminal(text))

    def _get_log(self) -> AuditLog:
        if self._log is None:
            from tfenv.audit.sinks import AuditLog

            loaded = self.loaded
            subject = loaded.subject
            self._log = AuditLog(loaded.policy.audit, loaded.start.home, subject.uid, subject.project)
        return self._log

    def _make_context(self, framework: Framework | None) -> RecordContext:
        from tfenv.audit.record import ProcessFacts, RecordContext

        name, version = (None, None) if framework is None else (framework.name, framework.version())
        process = ProcessFacts.collect(name, version)
        loaded = self.loaded
        return RecordContext(
            process,
            loaded.subject,
            self.grant,
            loaded.sources,
            loaded.hashes,
            loaded.revision,
            loaded.exceptions,
        )


def _add_findings(outcome: Outcome, pending: tuple[Finding, ...], plan: Plan) -> Outcome:
    """Add what was noted since the last entry point, and what files asked for and did not get.

    What the program asked for is told once, at the next entry point. What files asked for is cut wherever GPUs are
    created. A program that uses none has lost nothing.
    """
    # TFGPU_DISABLE is no wish for more of a GPU.
    cut = tuple(f for f in pending if f.asked_by == PROGRAM and f.code != "disable-refused")
    if outcome.devices and outcome.status in ("applied", "clamped"):
        cut += tuple(finding for finding in plan.findings if finding.is_lost_wish and finding.asked_by != PROGRAM)
    status = "clamped" if cut and outcome.status == "applied" else outcome.status
    return replace(outcome, status=status, findings=tuple(dict.fromkeys((*pending, *cut, *outcome.findings))))


def _add_errors(outcome: Outcome, findings: Iterable[Finding]) -> Outcome:
    """Add what is broken in the files. The rest of them may be in force, but the policy as it was written is not."""
    errors = tuple(finding for finding in findings if finding.severity == "error")
    if not errors or outcome.status not in ("applied", "clamped", "cpu"):
        return outcome
    status = "cpu" if outcome.status == "cpu" else "failed"
    return replace(outcome, status=status, findings=(*errors, *outcome.findings))
