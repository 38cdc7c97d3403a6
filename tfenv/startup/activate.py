"""Governs one process: reads the policy when a framework is imported, keeps it when devices are created.

Called by the start-up hook. Nothing here raises but PolicyError, and that only if `on_error = "fail"`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import perf_counter
from types import ModuleType

from tfenv import pipeline
from tfenv.audit import record, summary
from tfenv.audit.sinks import AuditLog
from tfenv.errors import Finding, PolicyError, printable
from tfenv.frameworks import tensorflow
from tfenv.gpus.grant import VARIABLE, Carried, carry, read_boot_id, read_grant, tokens_of
from tfenv.gpus.inventory import read_inventory
from tfenv.policy.model import Inventory, Outcome, Plan

__all__ = ["Governed", "after_import", "before_import", "catch_up", "current", "refused", "too_late"]

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_ORDER = "CUDA_DEVICE_ORDER"
#: Distinct outcomes that are written down per process: a program that opens sessions in a loop fills no disk.
_MOST_OUTCOMES = 64

Remembered = Mapping[str, "str | None"]

_current: Governed | None = None
_refused: tuple[Finding, ...] = ()
#: The one before, of an import that failed: what it wrote into the environment is no wish of the program's.
_previous: Governed | None = None


def refused() -> tuple[Finding, ...]:
    """Why the last import was refused; () when it was not."""
    return _refused


def current() -> Governed | None:
    """The policy this process is under; None: no file was found, or no framework was imported yet."""
    return _current


class Governed:
    """The policy of this process, from the import of the framework to its devices. A `tensorflow.Governor`.

    Attributes:
        loaded: The files and what they say.
        outcomes: What happened at the doors so far.
        findings: What was wrong since the files were read.
    """

    def __init__(self, framework: str, start: Remembered, loaded: pipeline.Loaded) -> None:
        self.framework = framework
        self.loaded = loaded
        self.boot_id = read_boot_id()
        known = {name: value for name, value in start.items() if value is not None}
        self.grant, self.carried = read_grant(known, os.environ, self.boot_id)
        self.request = tokens_of(self.carried.request)
        self.asserted = start.get(_VISIBLE)
        self.visible_when_listed: str | None = None
        self.checked_by = 0  # pid; a forked child lists anew
        self.current_plan = Plan()
        self.inventory = Inventory()
        self.outcomes: list[Outcome] = []
        self.findings: tuple[Finding, ...] = ()
        self.pending: tuple[Finding, ...] = ()
        self.no_gpu = False
        policy, subject = loaded.policy, loaded.subject
        self.log = AuditLog(policy.audit, loaded.start.home, subject.uid, subject.project)
        self._reported: set[tuple[int, str]] = set()

    def follow(self, previous: Governed) -> None:
        """Go on where an import that failed left the environment."""
        self.asserted, self.request = previous.asserted, previous.request

    # -- planning

    def decide(self, inventory: Inventory | None = None) -> Plan:
        """Plan anew, with what the program has asked for by now, and write the plan into the environment.

        Raises:
            PolicyError: Something is wrong and `on_error = "fail"`.
        """
        self._hear_the_program()
        plan = pipeline.make_plan(self.loaded, self.grant, inventory, self.request)
        wrong = pipeline.errors_of((*self.loaded.findings, *plan.findings))
        if wrong:
            plan = self._after_errors(plan, wrong)
        self.current_plan = plan
        self._write_environment(plan)
        return plan

    def _hear_the_program(self) -> None:
        """A value the program wrote since the last look is its own wish; removing the variable is none."""
        value = os.environ.get(_VISIBLE)
        if value != self.asserted and value is not None:
            self.request = tokens_of(value)

    def _after_errors(self, plan: Plan, wrong: tuple[Finding, ...]) -> Plan:
        on_error = self.loaded.policy.on_error
        if on_error == "fail":
            self.write(lambda: record.policy_failed(self.context(), wrong, self.loaded.policy))
            raise PolicyError(wrong)
        self.no_gpu = on_error == "cpu"
        return pipeline.no_gpu_plan(plan.findings) if self.no_gpu else plan

    def _write_environment(self, plan: Plan) -> None:
        self.pending += tuple(tensorflow.apply_environment(plan, os.environ))
        if plan.visible is None:
            return
        if plan.pci_order:
            os.environ[_ORDER] = "PCI_BUS_ID"
        os.environ[_VISIBLE] = self.asserted = plan.visible
        request = None if self.request is None else ",".join(self.request)
        os.environ[VARIABLE] = carry(Carried(self.carried.grant, request, plan.visible), self.boot_id)

    # -- what the doors ask

    def before_listing(self) -> None:
        """The last moment for visibility, and the first at which asking NVML is no waste."""
        self.inventory = read_inventory()
        self.decide(self.inventory)
        self.visible_when_listed = os.environ.get(_VISIBLE)

    def listed(self, count: int) -> None:
        planned = self.current_plan.devices
        if planned is None or count == len(planned) or self.checked_by == os.getpid():
            return
        text = f"TensorFlow lists {count} GPUs, the policy allows {len(planned)}"
        if count < len(planned):
            # It ignores cards that are too old or too small, and a driver may lack some of those NVML shows.
            self.pending += (Finding("fewer-gpus", text, "warning"),) if count else ()
            self.checked_by = os.getpid()
            return
        finding = Finding("too-late", f"{text}: something opened CUDA before tfenv could narrow it")
        self.fault(finding, "TF_ListPhysicalDevices")
        self.checked_by = os.getpid()

    def plan(self) -> Plan:
        return self.current_plan

    def cpu_only(self) -> bool:
        return self.no_gpu

    def report(self, outcome: Outcome) -> None:
        pending, self.pending = self.pending, ()
        found = (*pending, *outcome.findings, *self._late_visibility(), *self._missing_gpu(outcome))
        outcome = replace(outcome, findings=found)
        seen = (os.getpid(), repr((outcome.door, outcome.status, outcome.asked, outcome.given, outcome.devices)))
        if seen in self._reported or len(self._reported) >= _MOST_OUTCOMES:
            return
        self._reported.add(seen)
        self.outcomes.append(outcome)
        self.write(lambda: record.policy_outcome(self.context(), outcome))
        self._tell(outcome)

    def _late_visibility(self) -> tuple[Finding, ...]:
        """CUDA reads its variable once: a later value is not refused, it has no effect, and we say so."""
        value = os.environ.get(_VISIBLE)
        if value == self.visible_when_listed or self.visible_when_listed is None:
            return ()
        text = f"the program set {_VISIBLE}={value} after the devices were listed: no effect"
        return (Finding("too-late", text, "note"),)

    def _missing_gpu(self, outcome: Outcome) -> tuple[Finding, ...]:
        """No GPU where nobody asked for that: the reason, as far as it can be told without CUDA."""
        if outcome.devices or outcome.status != "applied" or outcome.asked.get("device_count") == 0:
            return ()
        if self.current_plan.devices == ():
            return ()
        shown = len(self.inventory.devices or ())
        reason = self.inventory.problem or f"NVML shows {shown}; `tfgpu doctor` says more"
        return (Finding("no-gpu", f"TensorFlow lists no GPU ({reason})", "warning"),)

    def _tell(self, outcome: Outcome) -> None:
        """Say on stderr what holds, unless the program wants no GPU anyway."""
        wrong = any(finding.severity != "note" for finding in (*self.loaded.findings, *outcome.findings))
        if self.loaded.policy.audit.stderr != "summary" or (outcome.asked.get("device_count") == 0 and not wrong):
            return
        policy, subject = self.loaded.policy, self.loaded.subject
        line = summary.summary(subject, policy, self.current_plan, outcome, self.loaded.findings)
        summary.show_summary(line)

    def failed(self, error: Exception, door: str) -> None:
        """A fault of ours at a door: what follows is the policy's decision.

        Raises:
            PolicyError: With `on_error = "fail"`.
        """
        text = f"tfenv failed at {door or 'import'}: {type(error).__name__}: {error}"
        self.fault(Finding("internal-error", text), door)

    def fault(self, finding: Finding, door: str = "") -> None:
        """The policy is not in force. Raises PolicyError with `on_error = "fail"`."""
        self.findings += (finding,)
        outcome = Outcome("failed", door, findings=(finding,))
        self.outcomes.append(outcome)
        self.write(lambda: record.policy_failed(self.context(), policy=self.loaded.policy, outcome=outcome))
        on_error = self.loaded.policy.on_error
        if on_error == "fail":
            raise PolicyError((finding,))
        self.no_gpu = on_error == "cpu"
        if self.loaded.policy.audit.stderr == "summary":
            summary.show_summary(printable(f"tfgpu: {finding.message} ({on_error})"))

    # -- records

    def write(self, make: Callable[[], record.AuditRecord], *, later: bool = False) -> None:
        """Write a record now, or at the next event. A fault in making it costs the record, not the program."""
        try:
            (self.log.keep if later else self.log.emit)(make())
        except Exception as error:  # noqa: BLE001 - as above
            summary.say(printable(f"tfgpu: an audit record was not written: {type(error).__name__}: {error}"))

    def context(self) -> record.Context:
        process = record.Process.current(self.framework, tensorflow.version())
        return record.Context(process, self.loaded.subject, self.grant, self.loaded.sources, self.loaded.hashes)


# ---- what the hook calls


def before_import(name: str, start: Remembered) -> None:
    """Just before the framework's own code runs: find the policy and write the environment. Opens no CUDA.

    Raises:
        PolicyError: The policy cannot be applied and `on_error = "fail"`; again on every retry.
    """
    global _current, _previous, _refused  # noqa: PLW0603 - one policy a process
    _previous, _current, _refused = _current or _previous, None, ()
    began = perf_counter()
    loaded: pipeline.Loaded | None = None
    try:
        loaded = pipeline.load(pipeline.make_start(start))
        _current = _govern(name, start, loaded, began) if loaded.found else None
    except PolicyError as error:
        _refused = error.findings
        raise
    except Exception as error:
        finding = Finding("internal-error", f"tfenv failed at import {name}: {type(error).__name__}: {error}")
        if loaded is not None and loaded.policy.on_error == "fail":
            raise PolicyError((finding,)) from error
        summary.show_summary(printable(f"tfgpu: {finding.message}"))


def _govern(name: str, start: Remembered, loaded: pipeline.Loaded, began: float) -> Governed | None:
    """Decide, write the environment and the first record. None: switched off."""
    governed = Governed(name, start, loaded)
    if _previous is not None:
        governed.follow(_previous)
    if _disabled(governed, start):
        return None
    plan = governed.decide()
    elapsed_ms = (perf_counter() - began) * 1000
    governed.write(
        lambda: record.policy_loaded(governed.context(), loaded.policy, plan, loaded.findings, elapsed_ms), later=True
    )
    return governed


def _disabled(governed: Governed, start: Remembered) -> bool:
    """Whether TFGPU_DISABLE switches the policy off; the machine layer may forbid that."""
    if start.get("TFGPU_DISABLE") in (None, "", "0"):
        return False
    if governed.loaded.policy.allow_disable:
        governed.write(lambda: record.policy_disabled(governed.context()), later=True)
        return True
    text = "TFGPU_DISABLE has no effect: the machine layer says allow_disable = false"
    governed.pending += (Finding("disable-refused", text, "warning"),)
    return False


def after_import(name: str, module: ModuleType) -> None:
    """Right after the framework's own code ran, before the importer gets the module: stand at the doors.

    Raises:
        PolicyError: A door is missing and `on_error = "fail"`.
    """
    del name, module
    if _current is not None:
        _stand_at_doors(_current)


def _stand_at_doors(governed: Governed) -> None:
    missing = tensorflow.install(governed)
    if not missing:
        return
    text = f"this TensorFlow has no {', '.join(missing)}: limits are set by tf.config where that is possible"
    finding = Finding("degraded", text)
    governed.findings += (finding,)
    outcome = Outcome("degraded", findings=(finding,))
    governed.outcomes.append(outcome)
    governed.write(lambda: record.policy_outcome(governed.context(), outcome))
    if governed.loaded.policy.on_error == "fail":
        raise PolicyError((finding,))
    tensorflow.fall_back(governed)


def too_late(name: str, start: Remembered) -> None:
    """The framework was there before the hook: apply what still can be, never raise."""
    try:
        catch_up(name, start)
    except PolicyError as error:
        summary.say(printable(f"tfgpu: {error}"))


def catch_up(name: str, start: Remembered) -> None:
    """Govern a framework that is loaded already.

    Raises:
        PolicyError: The policy cannot be applied and `on_error = "fail"`.
    """
    before_import(name, start)
    if _current is None:
        return
    if tensorflow.initialised():
        text = "TensorFlow had created its devices before tfenv was there: restart the process to apply the policy"
        _current.report(Outcome("too_late", findings=(Finding("too-late", text),)))
        return
    after_import(name, ModuleType(name))
