"""Governs one process: reads the policy when a framework is imported, keeps it when devices are created.

Called by the start-up hook. Nothing here raises but PolicyError, and that only if `on_error = "fail"`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from time import perf_counter
from types import ModuleType
from typing import TYPE_CHECKING

from tfenv import pipeline
from tfenv.audit import summary
from tfenv.devices.cuda import read_uuids
from tfenv.errors import PROGRAM, Finding, PolicyError, escape_for_terminal
from tfenv.frameworks.tensorflow import entry_points
from tfenv.launchers.grant import read_grant
from tfenv.launchers.parent import VARIABLE, InheritedGrant, encode_grant, read_boot_id, split_tokens
from tfenv.policy import placement
from tfenv.policy.model import Choice, Grant, Inventory, Outcome, Plan, PlannedDevice, format_key
from tfenv.policy.resolve import NO_GPU
from tfenv.runtime import resolver
from tfenv.runtime.reporting import Reporter
from tfenv.values import replace

if TYPE_CHECKING:
    from tfenv.sharing.allocate import AllocationResult, Requester

__all__ = ["ProcessPolicy", "after_import", "before_import", "catch_up", "current", "refused", "too_late"]

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_ORDER = "CUDA_DEVICE_ORDER"

Remembered = Mapping[str, "str | None"]

_current: ProcessPolicy | None = None
_refused: tuple[Finding, ...] = ()
#: The one before, of an import that failed: what it wrote into the environment is no wish of the program's.
_previous: ProcessPolicy | None = None


def refused() -> tuple[Finding, ...]:
    """Why the last import was refused; () when it was not."""
    return _refused


def current() -> ProcessPolicy | None:
    """The policy this process is under; None: no file was found, or no framework was imported yet."""
    return _current


class ProcessPolicy:
    """The policy of this process, from the import of the framework to its devices. A `tensorflow.PolicyCallbacks`.

    Attributes:
        framework: The framework's top-level module.
        loaded: The files and what they say.
        reporter: What was written down so far.
        findings: What was wrong since the files were read.
        leases: Ids of this process's leases and of its ancestors': children share their GPUs.
    """

    def __init__(self, framework: str, start: Remembered, loaded: pipeline.LoadedPolicy) -> None:
        self.framework = framework
        self.loaded = loaded
        self.boot_id = read_boot_id()
        known = {name: value for name, value in start.items() if value is not None}
        self.grant, self.carried = read_grant(known, os.environ, self.boot_id)
        self.request = split_tokens(self.carried.request)
        self.last_written = start.get(_VISIBLE)
        self.inventory = Inventory()
        self.visible_when_listed: str | None = None
        self.identified: tuple[int, Mapping[int, PlannedDevice] | None] | None = None  # by pid: a child lists anew
        self.uuids: tuple[str, ...] | None = None
        self.findings: tuple[Finding, ...] = ()
        self.no_gpu = False
        self.reporter = Reporter(framework, loaded, self.grant)
        self.choice: tuple[int, Choice | None] | None = None  # by pid: a child chooses anew
        self.leases = self.carried.leases
        self._plan = Plan()

    def follow(self, previous: ProcessPolicy) -> None:
        """Go on where an import that failed left the environment."""
        self.last_written, self.request = previous.last_written, previous.request

    # -- deciding

    def decide(self, inventory: Inventory | None = None) -> Plan:
        """Plan anew, with what the program has asked for by now, and write the plan into the environment.

        Raises:
            PolicyError: Something is wrong and `on_error = "fail"`.
        """
        self._read_program_request()
        elsewhere = self.reporter.log.findings
        allocations = self.chosen.allocations if self.chosen is not None else None
        decision = pipeline.decide(
            self.loaded, self.grant, inventory, self.request, elsewhere, resolver.inventory, allocations
        )
        if decision.refused:
            self.reporter.refused(decision.errors)
            raise PolicyError(decision.errors)
        self.no_gpu = decision.no_gpu
        self._plan = decision.plan
        self._write_environment(decision.plan)
        return decision.plan

    def _read_program_request(self) -> None:
        """A value the program wrote since the last look is its own wish; removing the variable is none."""
        value = os.environ.get(_VISIBLE)
        if value != self.last_written and value is not None:
            self.request = split_tokens(value)

    def _write_environment(self, plan: Plan) -> None:
        self.reporter.pending += tuple(entry_points.apply_environment(plan, os.environ))
        if plan.visible is None:
            return
        if plan.pci_order:
            os.environ[_ORDER] = "PCI_BUS_ID"
        os.environ[_VISIBLE] = self.last_written = plan.visible
        request = None if self.request is None else ",".join(self.request)
        carried = InheritedGrant(self.carried.grant, request, plan.visible, self.leases)
        os.environ[VARIABLE] = encode_grant(carried, self.boot_id)

    def fault(self, finding: Finding, entry_point: str = "") -> None:
        """The policy cannot be kept: what follows is `on_error`'s to say.

        Raises:
            PolicyError: With `on_error = "fail"`.
        """
        self.findings += (finding,)
        self.reporter.failed(finding, entry_point)
        if self.loaded.policy.on_error == "fail":
            raise PolicyError((finding,))
        if self.loaded.policy.on_error == "cpu":
            self.no_gpu = True
            os.environ[_VISIBLE] = self.last_written = NO_GPU
            self.visible_when_listed = NO_GPU

    # -- what the entry points ask

    def before_listing(self) -> None:
        """The last moment for visibility, and the first at which asking NVML is no waste."""
        self.inventory = resolver.inventory()
        self.reporter.log.open_now()  # a log the administrator requires has its say in what follows
        before = self._plan.findings
        plan = self.decide(self.inventory)
        if plan.takes_leases and not self.no_gpu:
            plan = self._choose(plan)
        # What the program asked for before the import was noted with the plan; what came of it belongs here, too.
        new = (finding for finding in plan.findings if finding not in before or finding.asked_by == PROGRAM)
        self.reporter.pending += tuple(new)
        self.visible_when_listed = os.environ.get(_VISIBLE)

    @property
    def chosen(self) -> Choice | None:
        """The places this process has on GPUs it shares; None: nothing was chosen, or not yet."""
        return self.choice[1] if self.choice is not None and self.choice[0] == os.getpid() else None

    def _choose(self, plan: Plan) -> Plan:
        """Agree with other processes on who takes which GPU, and plan anew with what came of it."""
        from tfenv.sharing.allocate import allocate_gpus  # most processes choose nothing

        if self.chosen is None:
            made = allocate_gpus(plan, self.inventory, self._asking())
            findings = tuple(self._located(finding, plan) for finding in made.findings)
            self._handle_choice_findings(replace(made, findings=findings))
            self.choice = (os.getpid(), made.choice)
            if made.choice is not None and made.choice.lease is not None:
                self.leases += (made.choice.lease,)
        return plan if self.chosen is None or self.no_gpu else self.decide(self.inventory)

    def _asking(self) -> Requester:
        from tfenv.sharing.allocate import Requester

        policy = self.loaded.policy
        return Requester(
            uid=self.loaded.start.uid,
            measure=resolver.memory,
            script=self.reporter.script(),
            ancestor_leases=self.leases,
            on_error=policy.on_error,
            speaks=policy.audit.stderr == "summary",
        )

    def _located(self, finding: Finding, plan: Plan) -> Finding:
        """With the key that lets tfenv choose."""
        if plan.choosing is None:
            return finding
        origin = self.loaded.policy.settings["visible_devices"].origin
        return self.loaded.locate(replace(finding, path=origin.path, key=format_key(origin.key)))

    def _handle_choice_findings(self, made: AllocationResult) -> None:
        """What the findings of a choice mean.

        Raises:
            PolicyError: The policy says that the program must not go on.
        """
        if made.refused:
            self.reporter.refused(made.findings)
            raise PolicyError(made.findings)
        for finding in made.findings:
            if finding.severity == "error":
                self.fault(finding, "TF_ListPhysicalDevices")
            else:
                self.reporter.pending += (finding,)

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
        findings = (*wanted, *self._late_visibility())
        self.reporter.passed(replace(outcome, findings=findings, choice=self.chosen), self._plan)
        errors = pipeline.select_errors(wanted)
        if errors and self.loaded.policy.on_error == "fail":
            raise PolicyError(errors)

    def failed(self, error: Exception, entry_point: str) -> None:
        """A fault of ours at an entry point."""
        self.fault(
            Finding("internal-error", f"tfenv failed at {entry_point}: {type(error).__name__}: {error}"), entry_point
        )

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
    loaded: pipeline.LoadedPolicy | None = None
    try:
        loaded = resolver.load(pipeline.make_start(start))
        _current = _govern(name, start, loaded, began) if loaded.found else None
    except PolicyError as error:
        _refused = error.findings
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the program goes on unless the policy forbids that
        text = f"tfenv failed at import {name}: {type(error).__name__}: {error}"
        _fault_at_import(Finding("internal-error", text), name, start, loaded)


def _govern(name: str, start: Remembered, loaded: pipeline.LoadedPolicy, began: float) -> ProcessPolicy | None:
    """Decide, write the environment and the first record. None: switched off."""
    governed = ProcessPolicy(name, start, loaded)
    if _previous is not None:
        governed.follow(_previous)
    off, remarks = pipeline.check_disable_switch(loaded)
    if off:
        governed.reporter.switched_off()
        return None
    governed.reporter.pending += remarks
    plan = governed.decide()
    governed.reporter.loaded_policy(plan, (perf_counter() - began) * 1000)
    return governed


def _fault_at_import(finding: Finding, name: str, start: Remembered, loaded: pipeline.LoadedPolicy | None) -> None:
    """A fault of ours before there is a plan. What was loaded so far says what follows."""
    on_error = loaded.policy.on_error if loaded is not None else "warn"
    if on_error == "cpu":
        os.environ[_VISIBLE] = NO_GPU
    try:
        loaded = loaded or pipeline.LoadedPolicy(pipeline.make_start(start), pipeline.identify(os.geteuid()))
        Reporter(name, loaded, Grant()).failed(finding, "")
    except Exception:  # noqa: BLE001 - the record is lost, not the word
        summary.show_summary(escape_for_terminal(f"tfgpu: {finding.message}"))
    if on_error == "fail":
        raise PolicyError((finding,))


def after_import(name: str, module: ModuleType) -> None:
    """Right after the framework's own code ran, before the importer gets the module: stand at the entry points.

    Raises:
        PolicyError: An entry point is missing and `on_error = "fail"`.
    """
    del name, module
    if _current is not None:
        _wrap_entry_points(_current)


def _wrap_entry_points(governed: ProcessPolicy) -> None:
    missing = entry_points.install(governed)
    if not missing:
        return
    text = f"this TensorFlow has no {', '.join(missing)}: limits are set by tf.config where that is possible"
    finding = Finding("degraded", text)
    governed.reporter.passed(Outcome("degraded", findings=(finding,)), governed.plan())
    governed.fault(finding)
    entry_points.fall_back(governed)


def too_late(name: str, start: Remembered) -> None:
    """The framework was there before the hook: apply what still can be, never raise."""
    try:
        catch_up(name, start)
    except PolicyError as error:
        summary.say(escape_for_terminal(f"tfgpu: {error}"))


def catch_up(name: str, start: Remembered) -> None:
    """Govern a framework that is loaded already.

    Raises:
        PolicyError: The policy cannot be applied and `on_error = "fail"`.
    """
    before_import(name, start)
    if _current is None:
        return
    if entry_points.initialised():
        text = (
            "TensorFlow had created its devices before tfenv was there, and keeps them; restart the process, "
            "in a notebook the kernel, to have the policy applied"
        )
        _current.reporter.passed(Outcome("too_late", findings=(Finding("too-late", text),)), _current.plan())
        return
    after_import(name, ModuleType(name))
