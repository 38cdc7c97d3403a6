"""Governs one process: reads the policy when a framework is imported, keeps it when devices are created.

Called by the start-up hook. Nothing here raises but PolicyError, and that only if `on_error = "fail"`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from types import ModuleType

from tfenv import pipeline
from tfenv.audit import summary
from tfenv.errors import PROGRAM, Finding, PolicyError, printable
from tfenv.frameworks import tensorflow
from tfenv.gpus.cuda import read_uuids
from tfenv.gpus.grant import VARIABLE, Carried, carry, read_boot_id, read_grant, tokens_of
from tfenv.policy import placement
from tfenv.policy.model import Grant, Inventory, Outcome, Plan, PlannedDevice
from tfenv.policy.resolve import NO_GPU
from tfenv.startup import remote
from tfenv.startup.reporting import Reporter

__all__ = ["Governed", "after_import", "before_import", "catch_up", "current", "refused", "too_late"]

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_ORDER = "CUDA_DEVICE_ORDER"

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
        framework: The framework's top-level module.
        loaded: The files and what they say.
        reporter: What was written down so far.
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
        self.inventory = Inventory()
        self.visible_when_listed: str | None = None
        self.identified: tuple[int, Mapping[int, PlannedDevice] | None] | None = None  # by pid: a child lists anew
        self.uuids: tuple[str, ...] | None = None
        self.findings: tuple[Finding, ...] = ()
        self.no_gpu = False
        self.reporter = Reporter(framework, loaded, self.grant)
        self._plan = Plan()

    def follow(self, previous: Governed) -> None:
        """Go on where an import that failed left the environment."""
        self.asserted, self.request = previous.asserted, previous.request

    # -- deciding

    def decide(self, inventory: Inventory | None = None) -> Plan:
        """Plan anew, with what the program has asked for by now, and write the plan into the environment.

        Raises:
            PolicyError: Something is wrong and `on_error = "fail"`.
        """
        self._hear_the_program()
        elsewhere = self.reporter.log.findings
        decision = pipeline.decide(self.loaded, self.grant, inventory, self.request, elsewhere, remote.inventory)
        if decision.refused:
            self.reporter.refused(decision.errors)
            raise PolicyError(decision.errors)
        self.no_gpu = decision.no_gpu
        self._plan = decision.plan
        self._write_environment(decision.plan)
        return decision.plan

    def _hear_the_program(self) -> None:
        """A value the program wrote since the last look is its own wish; removing the variable is none."""
        value = os.environ.get(_VISIBLE)
        if value != self.asserted and value is not None:
            self.request = tokens_of(value)

    def _write_environment(self, plan: Plan) -> None:
        self.reporter.pending += tuple(tensorflow.apply_environment(plan, os.environ))
        if plan.visible is None:
            return
        if plan.pci_order:
            os.environ[_ORDER] = "PCI_BUS_ID"
        os.environ[_VISIBLE] = self.asserted = plan.visible
        request = None if self.request is None else ",".join(self.request)
        os.environ[VARIABLE] = carry(Carried(self.carried.grant, request, plan.visible), self.boot_id)

    def fault(self, finding: Finding, door: str = "") -> None:
        """The policy cannot be kept: what follows is `on_error`'s to say.

        Raises:
            PolicyError: With `on_error = "fail"`.
        """
        self.findings += (finding,)
        self.reporter.failed(finding, door)
        if self.loaded.policy.on_error == "fail":
            raise PolicyError((finding,))
        if self.loaded.policy.on_error == "cpu":
            self.no_gpu = True
            os.environ[_VISIBLE] = self.asserted = NO_GPU
            self.visible_when_listed = NO_GPU

    # -- what the doors ask

    def before_listing(self) -> None:
        """The last moment for visibility, and the first at which asking NVML is no waste."""
        self.inventory = remote.inventory()
        self.reporter.log.open_now()  # a log the administrator requires has its say in what follows
        before = self._plan.findings
        plan = self.decide(self.inventory)
        # What the program asked for before the import was noted with the plan; what came of it belongs here, too.
        new = (finding for finding in plan.findings if finding not in before or finding.asked_by == PROGRAM)
        self.reporter.pending += tuple(new)
        self.visible_when_listed = os.environ.get(_VISIBLE)

    def identify(self, ordinals: Sequence[int]) -> Mapping[int, PlannedDevice] | None:
        if self.identified is None or self.identified[0] != os.getpid():
            self.uuids = read_uuids()
            planned = placement.place(self._plan, ordinals, self.uuids, self._replan)
            self.identified = (os.getpid(), planned.devices)
            if planned.remark is not None and planned.remark.severity == "error":
                self.identified = None  # with on_error = "fail" the next try is refused, too
                self.fault(planned.remark, "TF_ListPhysicalDevices")
                self.identified = (os.getpid(), planned.devices)
            elif planned.remark is not None:
                self.reporter.pending += (planned.remark,)
        return self.identified[1]

    def _replan(self, tokens: tuple[str, ...]) -> Plan:
        """The plan for exactly these cards, in CUDA's order."""
        return pipeline.make_plan(self.loaded, Grant(tokens=tokens), self.inventory)

    def shown(self) -> int | None:
        return None if self.uuids is None else len(self.uuids)

    def plan(self) -> Plan:
        return self._plan

    def cpu_only(self) -> bool:
        return self.no_gpu

    def report(self, outcome: Outcome) -> None:
        wanted = () if self._plan.devices == () else tuple(self._explained(finding) for finding in outcome.findings)
        self.reporter.passed(replace(outcome, findings=(*wanted, *self._late_visibility())), self._plan)
        errors = pipeline.errors_of(wanted)
        if errors and self.loaded.policy.on_error == "fail":
            raise PolicyError(errors)

    def failed(self, error: Exception, door: str) -> None:
        """A fault of ours at a door."""
        self.fault(Finding("internal-error", f"tfenv failed at {door}: {type(error).__name__}: {error}"), door)

    def _late_visibility(self) -> tuple[Finding, ...]:
        """CUDA reads its variable once: a later value is not refused, it has no effect, and we say so."""
        value = os.environ.get(_VISIBLE)
        if value == self.visible_when_listed or self.visible_when_listed is None:
            return ()
        text = f"the program set {_VISIBLE}={value} after the devices were listed: no effect"
        return (Finding("too-late", text, "note"),)

    def _explained(self, finding: Finding) -> Finding:
        """Of a missing GPU the reason, as far as it can be told without CUDA."""
        if finding.code != "no-gpu":
            return finding
        shown = len(self.inventory.devices or ())
        reason = self.inventory.problem or f"NVML shows {shown}; `tfgpu doctor` says more"
        named = self._plan.visible is not None
        return replace(finding, message=f"{finding.message} ({reason})", severity="error" if named else "warning")


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
        loaded = remote.load(pipeline.make_start(start))
        _current = _govern(name, start, loaded, began) if loaded.found else None
    except PolicyError as error:
        _refused = error.findings
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the program goes on unless the policy forbids that
        text = f"tfenv failed at import {name}: {type(error).__name__}: {error}"
        _fault_at_import(Finding("internal-error", text), name, start, loaded)


def _govern(name: str, start: Remembered, loaded: pipeline.Loaded, began: float) -> Governed | None:
    """Decide, write the environment and the first record. None: switched off."""
    governed = Governed(name, start, loaded)
    if _previous is not None:
        governed.follow(_previous)
    off, remarks = pipeline.switched_off(loaded)
    if off:
        governed.reporter.switched_off()
        return None
    governed.reporter.pending += remarks
    plan = governed.decide()
    governed.reporter.loaded_policy(plan, (perf_counter() - began) * 1000)
    return governed


def _fault_at_import(finding: Finding, name: str, start: Remembered, loaded: pipeline.Loaded | None) -> None:
    """A fault of ours before there is a plan. What was loaded so far says what follows."""
    on_error = loaded.policy.on_error if loaded is not None else "warn"
    if on_error == "cpu":
        os.environ[_VISIBLE] = NO_GPU
    try:
        loaded = loaded or pipeline.Loaded(pipeline.make_start(start), pipeline.identify(os.geteuid()))
        Reporter(name, loaded, Grant()).failed(finding, "")
    except Exception:  # noqa: BLE001 - the record is lost, not the word
        summary.show_summary(printable(f"tfgpu: {finding.message}"))
    if on_error == "fail":
        raise PolicyError((finding,))


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
    governed.reporter.passed(Outcome("degraded", findings=(finding,)), governed.plan())
    governed.fault(finding)
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
        text = (
            "TensorFlow had created its devices before tfenv was there, and keeps them; restart the process, "
            "in a notebook the kernel, to have the policy applied"
        )
        _current.reporter.passed(Outcome("too_late", findings=(Finding("too-late", text),)), _current.plan())
        return
    after_import(name, ModuleType(name))
