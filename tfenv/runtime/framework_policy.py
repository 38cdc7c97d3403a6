"""The policy of one framework in a process: what of the process's plan it can keep, and what others leave of it."""

from __future__ import annotations

import os

from tfenv import pipeline
from tfenv.errors import Finding, PolicyError
from tfenv.policy.model import Grant, Plan
from tfenv.policy.supports import drop_unsupported
from tfenv.runtime.own_imports import Inside
from tfenv.values import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tfenv.devices.cuda import CudaDevice
    from tfenv.frameworks.base import Framework
    from tfenv.policy.budget import Budget, Claimant
    from tfenv.policy.model import DeviceOutcome, EffectivePolicy, MemoryLimit, Outcome, PlannedDevice, WouldClamp
    from tfenv.runtime.process_policy import ProcessPolicy


class FrameworkPolicy:
    """What holds for one framework of the process. Its entry points ask it, as `base.PolicyCallbacks`.

    Attributes:
        process: The policy of the process.
        framework: The framework.
        plan: What of the process's plan the framework can keep.
        pending: Findings of this framework that belong to its next outcome.
    """

    def __init__(self, process: ProcessPolicy, framework: Framework) -> None:
        self.process = process
        self.framework = framework
        self.plan = Plan()
        self.pending: tuple[Finding, ...] = ()
        self._reported: tuple[Finding, ...] = ()
        self._budget: Budget | None = None  # what is left beside other frameworks. None: all of the plan
        self._promised: Mapping[str, MemoryLimit] = {}
        self._tried: tuple[Plan, Plan] | None = None  # the process's plan, and beside it that of the observed policy
        self._shown: tuple[CudaDevice, ...] | None = None  # by CUDA ordinal. None: CUDA did not say
        self._identified: tuple[int, Mapping[int, PlannedDevice] | None] | None = None  # by pid: a child lists anew

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """What happened at the entry points, oldest first."""
        return self.process.reporter.list_outcomes(self.framework.name)

    def adopt(self, plan: Plan) -> None:
        """Take over the process's plan as far as the framework can keep it, and write its variables.

        Raises:
            PolicyError: It cannot keep a limit or growth, and `on_error = "fail"`.
        """
        process, framework = self.process, self.framework
        self._budget = None
        self.plan = self._adapt(plan)
        self.pending += tuple(framework.prepare(self.get_plan(), os.environ))
        unsupported = tuple(f for f in self.plan.findings if f.code == "unsupported" and f not in self._reported)
        self._reported += unsupported
        self.pending += tuple(finding for finding in unsupported if finding.severity != "error")
        for finding in unsupported:
            if finding.severity == "error":
                process.handle_fault(finding, framework=framework)

    def _adapt(self, plan: Plan) -> Plan:
        """Return a plan of the process as far as this framework can keep it."""
        return drop_unsupported(plan, self.process.loaded.policy, self.framework.supports, self.framework.title)

    # -- what entry points ask

    def before_listing(self, sleep: Callable[[float], object] | None = None) -> None:
        """Settle which GPUs are visible."""
        with Inside():
            self.process.settle(self.framework, sleep)

    def identify_devices(self, ordinals: Sequence[int] | None = None) -> Mapping[int, PlannedDevice] | None:
        """Find the plan's GPUs among those that the framework lists."""
        with Inside(), self.process.lock:
            return self._fit_to_budget(self._identify_devices(ordinals))

    def _identify_devices(self, ordinals: Sequence[int] | None) -> Mapping[int, PlannedDevice] | None:
        from tfenv.devices.cuda import open_driver, read_devices
        from tfenv.policy.placement import place, report_unknown_memory

        if self._identified is None or self._identified[0] != os.getpid():
            if ordinals is None:
                open_driver()
            self._shown = read_devices()
            if ordinals is None:
                ordinals = range(len(self._shown or ()))
            uuids = None if self._shown is None else [device.uuid for device in self._shown]
            if any(device.total is None for device in self.plan.devices or ()):
                self._replan({})  # CUDA knows sizes that NVML does not
            placement = place(self.plan, ordinals, uuids, self._replan, self.framework.title)
            remark = placement.remark
            if remark is not None and remark.severity == "error":
                # With on_error = "fail" the next try is refused, too: nothing is remembered yet.
                self.process.handle_fault(remark, self.framework.first_listing, self.framework)
            elif remark is not None:
                self.pending += (remark,)
            unsized = report_unknown_memory(self.plan, placement)
            if unsized is not None:
                self.process.handle_fault(unsized, self.framework.first_listing, self.framework)
            self._identified = (os.getpid(), placement.devices)
        self.process.renew_lease(self.framework)
        return self._identified[1]

    def _fit_to_budget(self, devices: Mapping[int, PlannedDevice] | None) -> Mapping[int, PlannedDevice] | None:
        """Leave to this framework what other frameworks of the process leave of the limit, and reserve it."""
        process, policy = self.process, self.process.loaded.policy
        if not self.plan.limits and "frameworks" not in policy.settings:
            return devices
        from tfenv.policy.budget import BudgetBook

        claimant = self._make_claimant()
        book = process.book or BudgetBook()
        budget = book.fit(self.plan, devices, policy, claimant)
        if budget.findings and process.release_memory(book.find_holders(claimant)):
            book = process.book or BudgetBook()
            budget = book.fit(self.plan, devices, policy, claimant)
        # All of it is reserved until the report tells which cards were created.
        process.book = book.record(claimant, {**self._promised, **budget.list_limits()})
        self._budget = replace(budget, findings=tuple(map(process.loaded.locate, budget.findings)))
        return budget.devices

    def _make_claimant(self) -> Claimant:
        from tfenv.policy.budget import Claimant

        framework, process = self.framework, self.process
        master = framework.find_master(process.find_earlier_frameworks(framework))
        is_used = master in process.frameworks and process.frameworks[master].framework.can_use_gpus()
        return Claimant(framework.name, framework.title, master if is_used else None)

    def release_memory(self) -> bool:
        """Give back what this framework was promised, if it holds no memory of a GPU. Return whether it did."""
        process = self.process
        if process.book is None or not self.framework.release_memory():
            return False
        self._promised = {}
        process.book = process.book.record(self._make_claimant(), {})
        return True

    def _note_promises(self, devices: Sequence[DeviceOutcome]) -> None:
        """Note in the book which of the cards were created, and with which limits."""
        if self.process.book is None:
            return
        from tfenv.policy.budget import list_promises

        self._promised = {**self._promised, **list_promises(devices)}
        self.process.book = self.process.book.record(self._make_claimant(), self._promised)

    def _replan(self, named: Mapping[str, str]) -> Plan:
        """Return the plan with the UUIDs that CUDA tells of tokens, and keep it. Without tokens, that for these."""
        if self.plan.devices is None:
            return self._make_plan(Grant(tokens=tuple(named)), named)
        made = self._make_plan(self.process.grant, named, self.process.program_request)
        # What was written, and said of it, stays: only which card is which, and how large, is known now.
        new = tuple(f for f in made.findings if f.code == "clamped" and f not in self.plan.findings)
        self.pending += new
        self.plan = replace(made, visible=self.plan.visible, findings=(*self.plan.findings, *new))
        return self.plan

    def _make_plan(self, grant: Grant, named: Mapping[str, str], request: Sequence[str] | None = None) -> Plan:
        process = self.process
        totals = {device.uuid: device.total for device in self._shown or () if device.total is not None}
        inventory, choice = replace(process.inventory, named=named, totals=totals), process.choice
        allocations = None if choice is None or self.plan.devices is None else choice.allocations
        plan = pipeline.make_plan(process.loaded, grant, inventory, request, allocations=allocations)
        return self._adapt(plan)

    def measure_devices(self) -> tuple[PlannedDevice, ...] | None:
        """Return the GPUs with their sizes and what is left of their limits, before this framework opens CUDA."""
        from tfenv.policy.budget import BudgetBook

        process, policy = self.process, self.process.loaded.policy
        if not self.plan.limits and policy.settings.keys().isdisjoint(("device", "frameworks")):
            return self.plan.devices
        with Inside(), process.lock:
            plan, devices = self._find_sizes()
            budget = (process.book or BudgetBook()).fit(plan, devices, policy, self._make_claimant())
        if budget.spent:
            return ()
        return budget.plan.devices if budget.devices is None else tuple(budget.devices.values())

    def _find_sizes(self) -> tuple[Plan, Mapping[int, PlannedDevice] | None]:
        """Return the plan with the sizes of its GPUs, and if CUDA is open the GPUs that it shows, by ordinal."""
        from tfenv.devices.cuda import read_devices

        process, plan = self.process, self.plan
        # Only another framework can have opened CUDA. To look for it in vain would load the driver.
        shown = read_devices() if len(process.frameworks) > 1 else None
        if shown is not None:
            devices = self._identify_devices(range(len(shown)))
            return self.plan, devices
        if plan.devices is not None and all(d.limit is None or d.limit.on(d.total) is None for d in plan.devices):
            return plan, None  # shares of cards
        inventory, grant, request = process.resolver.read_inventory(), process.grant, process.program_request
        if plan.devices is None:
            grant, request = Grant(tokens=tuple(device.uuid for device in inventory.devices or ())), None
            if inventory.devices is None:
                return plan, None
        made = pipeline.make_plan(process.loaded, grant, inventory, request)
        return self._adapt(made), None

    def check_use(self) -> None:
        """Refuse GPUs that were opened before and are another task's by now."""
        self.process.check_use()

    def count_shown_devices(self) -> int | None:
        """Return how many GPUs CUDA shows."""
        return None if self._shown is None else len(self._shown)

    def get_plan(self) -> Plan:
        """Return what this framework may use."""
        if self._budget is not None:
            return self._budget.plan
        policy = self.process.loaded.policy
        if "frameworks" not in policy.settings:
            return self.plan
        from tfenv.policy.budget import apply_framework_share

        return apply_framework_share(self.plan, policy, self.framework.name)

    def is_cpu_only(self) -> bool:
        """Return whether no GPU may be created."""
        return self.process.no_gpu or (self._budget is not None and self._budget.spent)

    def report(self, outcome: Outcome) -> None:
        """Write down what happened at an entry point."""
        process = self.process
        wanted = () if self.plan.devices == () else tuple(self._explain(finding) for finding in outcome.findings)
        shared = () if self._budget is None else self._budget.findings
        findings = (*wanted, *shared, *process.find_late_visibility())
        # Without a GPU because others have the budget: nothing failed.
        status = "clamped" if outcome.status == "cpu" and not process.no_gpu else outcome.status
        with Inside():
            lost, faults = self._find_losses(outcome)
        outcome = replace(
            outcome, status=status, findings=(*findings, *faults), choice=process.choice, would_clamp=lost
        )
        pending, self.pending = self.pending, ()
        with Inside():
            with process.lock:
                self._note_promises(outcome.devices)
            process.reporter.report_outcome(outcome, self.get_plan(), self.framework, pending)
        errors = pipeline.select_errors(wanted)
        if errors and process.loaded.policy.on_error == "fail":
            raise PolicyError(errors)

    def _find_losses(self, outcome: Outcome) -> tuple[tuple[WouldClamp, ...], tuple[Finding, ...]]:
        """Return what the process would lose under the observed policy. A fault in this is a note, and no more."""
        process = self.process
        observed = process.loaded.observed
        if observed is None or not outcome.devices:
            return (), ()
        try:
            from tfenv.policy.observe import find_losses

            if self._tried is None or self._tried[0] is not process.plan:  # a program's loop passes here each time
                self._tried = process.plan, self._plan_observed(observed.policy)
            return find_losses(outcome, self._tried[1], observed.policy, process.loaded.policy), ()
        except Exception as error:  # noqa: BLE001 - nothing under [observe] may touch the program
            text = f"tfenv could not tell what [observe] would take: {type(error).__name__}: {error}"
            return (), (Finding("not-observed", text, "note"),)

    def _plan_observed(self, policy: EffectivePolicy) -> Plan:
        """Return what this framework might use under the observed policy, beside the plan of the process."""
        from tfenv.policy.budget import apply_framework_share

        process, framework = self.process, self.framework
        loaded = replace(process.loaded, policy=policy)
        decision = pipeline.decide(loaded, process.grant, process.inventory, process.program_request)
        plan = Plan(devices=()) if decision.refused else decision.plan  # PolicyError in place of a GPU
        plan = drop_unsupported(plan, policy, framework.supports, framework.title)
        return apply_framework_share(plan, policy, framework.name)

    def report_unkept(self, finding: Finding, entry_point: str) -> None:
        """Write down that an entry point passes what the policy does not allow, and do what `on_error` says of it."""
        with Inside():
            self.process.handle_fault(finding, entry_point, self.framework)

    def report_fault(self, error: Exception, entry_point: str) -> None:
        """Write down a fault of tfenv's own at an entry point."""
        text = f"tfenv failed at {entry_point}: {type(error).__name__}: {error}"
        with Inside():
            self.process.narrow_unchosen()
            self.process.handle_fault(Finding("internal-error", text), entry_point, self.framework)

    def _explain(self, finding: Finding) -> Finding:
        """Add to a missing GPU the reason, as far as it can be told without CUDA."""
        if finding.code != "no-gpu":
            return finding
        inventory = self.process.inventory
        reason = inventory.problem or f"NVML shows {len(inventory.devices or ())}; `tfgpu doctor` says more"
        severity = "error" if self.plan.visible is not None else "warning"
        return replace(finding, message=f"{finding.message} ({reason})", severity=severity)
