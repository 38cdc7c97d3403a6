"""The policy of one process, and under it the policy of each framework that the process imports."""

from __future__ import annotations

import _thread  # built in; gevent wants to be the first to import threading
import os

from tfenv import pipeline
from tfenv.errors import PROGRAM, Finding, PolicyError
from tfenv.launchers.grant import read_assignment, read_grant
from tfenv.launchers.parent import GRANT_VARIABLE, encode_grant, read_boot_id, split_tokens
from tfenv.policy.model import Grant, Inventory, Plan
from tfenv.policy.resolve import NO_GPU
from tfenv.policy.supports import drop_unsupported
from tfenv.runtime.own_imports import Inside
from tfenv.runtime.reporting import Reporter
from tfenv.values import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tfenv.devices.cuda import CudaDevice
    from tfenv.frameworks.base import Framework
    from tfenv.policy.budget import Budget, BudgetBook, Claimant
    from tfenv.policy.model import Choice, DeviceOutcome, MemoryLimit, Outcome, PlannedDevice
    from tfenv.runtime.resolver import Resolver
    from tfenv.sharing.allocate import AllocationResult, Requester

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_ORDER = "CUDA_DEVICE_ORDER"


class ProcessPolicy:
    """What holds for all frameworks of one process.

    Attributes:
        loaded: The files and what they say.
        resolver: Reads files and asks NVML.
        grant: What the scheduler or the parent process gave.
        reporter: What was written down so far.
        frameworks: The policy of each framework that was imported, by its name.
        findings: What went wrong since the files were read.
        inventory: The machine's GPUs, since the first listing of devices.
        leases: Ids of this process's leases and of its ancestors': children share their GPUs.
        no_gpu: Something is wrong, and `on_error = "cpu"` says that no GPU may be used.
        stale: Why the GPUs that were opened are not those that the launcher assigned since. None: they are.
        book: How much of the GPUs the frameworks were promised. None: nothing yet.
    """

    def __init__(self, start: Mapping[str, str | None], loaded: pipeline.LoadedPolicy, resolver: Resolver) -> None:
        """
        Args:
            start: What the process was when it started, as `finder.START`.
            loaded: The files and what they say.
            resolver: Reads files and asks NVML.
        """
        self.loaded = loaded
        self.resolver = resolver
        self.boot_id = read_boot_id()
        self._start = {name: value for name, value in start.items() if value is not None}
        self.grant, self.inherited = read_grant(self._start, os.environ, self.boot_id)
        self._assigned = read_assignment(os.environ)  # None: all that this process gets it had from the start
        self.stale: Finding | None = None
        self.program_request = split_tokens(self.inherited.request)
        self.last_written = self.inherited.wrote
        self.inventory = Inventory()
        self.visible_when_listed: str | None = None
        self.findings: tuple[Finding, ...] = ()
        self.no_gpu = False
        self.reporter = Reporter(loaded, self.grant)
        self.frameworks: dict[str, FrameworkPolicy] = {}
        self.leases = self.inherited.leases
        self.plan = Plan()
        self.book: BudgetBook | None = None
        self._renew_lock()
        os.register_at_fork(after_in_child=self._renew_lock)
        self._faulted = False
        self._listed_by = 0  # pid: a forked child lists and chooses anew
        self._choice: tuple[int, Choice | None] | None = None
        self._order_before: tuple[str | None] | None = None  # None: CUDA's order is not ours
        if self._assigned is not None:
            from tfenv.runtime.assignments import watch_assignments

            watch_assignments(self._check_assignment)

    def _renew_lock(self) -> None:
        """Make the lock that frameworks settle under, each in its own thread. In a forked child nobody holds it."""
        self.lock = _thread.RLock()

    def continue_from(self, previous: ProcessPolicy) -> None:
        """Go on where an import that failed left the environment: what it wrote is no request of the program."""
        self.last_written, self.program_request = previous.last_written, previous.program_request

    def add_framework(self, framework: Framework) -> FrameworkPolicy:
        """Plan for a framework that is about to be imported, and write the environment.

        Raises:
            PolicyError: The policy cannot be applied and `on_error = "fail"`.
        """
        policy = FrameworkPolicy(self, framework)
        if self._listed_by != os.getpid():  # otherwise another framework has opened CUDA, and the plan stands
            self._renew_grant()
            self.decide()
        self.frameworks[framework.name] = policy
        policy.adopt(self.plan)
        return policy

    # -- deciding

    @property
    def choice(self) -> Choice | None:
        """The GPUs this process has a share of. None: nothing was chosen, or not yet."""
        return self._choice[1] if self._choice is not None and self._choice[0] == os.getpid() else None

    def decide(self, inventory: Inventory | None = None) -> None:
        """Plan anew, with what the program has requested by now, and write the plan into the environment.

        Args:
            inventory: The machine's GPUs. None: NVML is asked only if visibility cannot be decided without.

        Raises:
            PolicyError: Something is wrong and `on_error = "fail"`.
        """
        self._read_program_request()
        decision = pipeline.decide(
            self.loaded,
            self.grant,
            inventory,
            self.program_request,
            self.reporter.log_findings,
            self.resolver.read_inventory,
            None if self.choice is None else self.choice.allocations,
        )
        if decision.refused:
            self.reporter.report_refused(decision.errors)
            raise PolicyError(decision.errors)
        self.no_gpu = decision.no_gpu or self._faulted
        self.plan = decision.plan
        if self._faulted:
            self.plan = Plan(visible=NO_GPU, devices=(), findings=self.plan.findings)
        for policy in self.frameworks.values():
            policy.adopt(self.plan)
        self.write_visibility()

    def _read_program_request(self) -> None:
        """Take a value that the program wrote since the last look for its request. Removing the variable is none."""
        value = os.environ.get(_VISIBLE)
        if value != self.last_written and value is not None:
            self.program_request = split_tokens(value)

    def write_visibility(self) -> None:
        """Write the visible GPUs into the environment, and for the children the grant and the leases."""
        self._write_order()
        if self.plan.visible is not None:
            os.environ[_VISIBLE] = self.last_written = self.plan.visible
        elif not self.leases and self.inherited.share is None:
            return
        request = None if self.program_request is None else ",".join(self.program_request)
        inherited = replace(self.inherited, request=request, wrote=os.environ.get(_VISIBLE), leases=self.leases)
        os.environ[GRANT_VARIABLE] = encode_grant(inherited, self.boot_id)

    def _write_order(self) -> None:
        """Let CUDA count as the plan does. Give its order back where the program wrote a list of its own since."""
        if self.plan.pci_order:
            if self._order_before is None:
                self._order_before = (os.environ.get(_ORDER),)
            os.environ[_ORDER] = "PCI_BUS_ID"
        elif self._order_before is not None:
            (before,), self._order_before = self._order_before, None
            os.environ.pop(_ORDER, None)
            if before is not None:
                os.environ[_ORDER] = before

    def handle_fault(self, finding: Finding, entry_point: str = "", framework: Framework | None = None) -> None:
        """Do what `on_error` says where the policy cannot be kept.

        Args:
            finding: What is wrong.
            entry_point: Where it happened.
            framework: In which framework. None: in all of them.

        Raises:
            PolicyError: `on_error = "fail"`.
        """
        self.findings += (finding,)
        self.reporter.report_failed(finding, entry_point, framework)
        if self.loaded.policy.on_error == "fail":
            raise PolicyError((finding,))
        if self.loaded.policy.on_error == "cpu":
            self._hide_gpus()

    def _hide_gpus(self) -> None:
        self._faulted = self.no_gpu = True
        self.plan = Plan(visible=NO_GPU, devices=(), findings=self.plan.findings)
        for policy in self.frameworks.values():
            policy.adopt(self.plan)
        self.write_visibility()
        self.visible_when_listed = NO_GPU

    # -- sharing the limit among frameworks

    def find_earlier_frameworks(self, framework: Framework) -> tuple[str, ...]:
        """Return the frameworks whose import began before that of this one."""
        names = tuple(self.frameworks)
        return names[: names.index(framework.name)] if framework.name in names else names

    def release_memory(self, names: Iterable[str]) -> bool:
        """Have frameworks that hold no memory of a GPU give back what they were promised. Return whether one did."""
        released = [name for name in names if self.frameworks[name].release_memory()]
        return bool(released)

    # -- what a launcher assigns while the process runs

    def _renew_grant(self) -> None:
        """Take the GPUs of the task that runs now for the grant. Nothing has opened those of an earlier one."""
        assigned = None if self._assigned is None else read_assignment(os.environ)
        if assigned is None:
            return
        grant, inherited = read_grant(self._start, os.environ, self.boot_id)
        if assigned == self._assigned:  # of the same GPU it may have another share
            grant, inherited = replace(self.grant, share=grant.share), replace(self.inherited, share=inherited.share)
        else:
            self.program_request, self.last_written = split_tokens(inherited.request), inherited.wrote
        self._assigned, self.grant, self.inherited, self.reporter.grant = assigned, grant, inherited, grant

    def _check_assignment(self, value: str) -> None:
        """Report that the launcher assigns other GPUs than those that are open. Their framework keeps them.

        Args:
            value: What CUDA_VISIBLE_DEVICES is about to become. The program and tfenv write it, too.
        """
        if self._listed_by != os.getpid() or value != read_assignment(os.environ):
            return
        with Inside():
            self._compare_assignment(value)

    def _compare_assignment(self, value: str) -> None:
        self.stale = None
        if value == self._assigned:
            return
        policies = list(self.frameworks.values())
        titles = " and ".join(policy.framework.title for policy in policies)
        text = (
            f"{self.grant.launcher} assigned {_name_gpus(value)} to this task, but {titles} keeps "
            f"{_name_gpus(self._assigned)} of an earlier task; give each task its own process, in Ray with max_calls=1"
        )
        self.stale = Finding("stale-devices", text)
        if self.loaded.policy.on_error == "fail":
            for policy in policies:
                policy.framework.watch_use(policy)
        self.reporter.report_failed(self.stale, framework=policies[0].framework)

    def check_use(self) -> None:
        """Refuse GPUs that the launcher has assigned to somebody else by now.

        Raises:
            PolicyError: `on_error = "fail"`.
        """
        if self.stale is not None and self._listed_by == os.getpid() and self.loaded.policy.on_error == "fail":
            raise PolicyError((self.stale,))

    # -- listing

    def settle(self, framework: Framework, sleep: Callable[[float], object] | None = None) -> None:
        """Settle which GPUs this process uses, just before a framework opens CUDA. Choose free ones where asked to.

        Args:
            framework: Which one.
            sleep: Waits for so many seconds, or less, while none is free. None: time.sleep.

        Raises:
            PolicyError: The policy cannot be applied and `on_error = "fail"`.
        """
        with self.lock:
            if self._listed_by != os.getpid():
                self._settle(framework, sleep)

    def _settle(self, framework: Framework, sleep: Callable[[float], object] | None) -> None:
        self.inventory = self.resolver.read_inventory()
        self.reporter.open_log()  # a required log that cannot be written is an error, for `on_error` to decide
        before = self.plan.findings
        self._renew_grant()
        self.decide(self.inventory)
        if self.plan.takes_leases and not self.no_gpu:
            self._allocate(framework, sleep)
        # What the program requested before the import was noted with the plan. What came of it belongs here, too.
        new = (finding for finding in self.plan.findings if finding not in before or finding.asked_by == PROGRAM)
        self.reporter.pending += tuple(new)
        self.visible_when_listed = os.environ.get(_VISIBLE)
        self._listed_by = os.getpid()

    def _allocate(self, framework: Framework, sleep: Callable[[float], object] | None) -> None:
        """Agree with other processes on who takes which GPU, and plan anew with what came of it."""
        from tfenv.sharing.allocate import allocate_gpus  # most processes choose nothing

        if self.choice is None:
            requester = self._make_requester()
            if sleep is not None:
                requester = replace(requester, sleep=sleep)
            result = allocate_gpus(self.plan, self.inventory, requester)
            self._handle_choice_findings(result, framework)
            self._choice = (os.getpid(), result.choice)
            if result.choice is not None and result.choice.lease is not None:
                self.leases += (result.choice.lease,)
        if self.choice is not None and not self.no_gpu:
            self.decide(self.inventory)

    def _make_requester(self) -> Requester:
        from tfenv.sharing.allocate import Requester

        policy = self.loaded.policy
        return Requester(
            uid=self.loaded.start.uid,
            measure=self.resolver.read_memory,
            script=self.reporter.find_script(),
            ancestor_leases=self.leases,
            on_error=policy.on_error,
            speaks=policy.audit.stderr == "summary",
            overhead=policy.process_overhead,
        )

    def renew_lease(self, framework: Framework) -> None:
        """Take a lease again that the program closed, or that somebody removed. Say so.

        Raises:
            PolicyError: Others have taken the GPU meanwhile, and `on_error = "fail"`.
        """
        choice = self.choice
        if choice is None or choice.lease is None:
            return
        from tfenv.sharing.allocate import renew_lease

        requester = replace(self._make_requester(), ancestor_leases=self.inherited.leases)
        result = renew_lease(choice, self.plan, requester)
        if result is None:
            return
        self._choice = (os.getpid(), result.choice)
        self._handle_choice_findings(result, framework)

    def narrow_unchosen(self) -> None:
        """Take the first allowed GPUs if a fault prevented the choice of free ones. All of them were never meant."""
        if self.plan.choosing is None or self.choice is not None or self.no_gpu:
            return
        try:
            from tfenv.sharing.allocate import take_first_gpus

            self._choice = (os.getpid(), take_first_gpus(self.plan, self.plan.choosing))
            self.decide(self.inventory)
        except PolicyError:
            raise
        except Exception:  # noqa: BLE001 (whoever calls reports the fault that came first)
            self._hide_gpus()

    def _handle_choice_findings(self, result: AllocationResult, framework: Framework) -> None:
        findings = tuple(self._locate_choice(finding) for finding in result.findings)
        if result.refused:
            self.reporter.report_refused(findings, framework)
            raise PolicyError(findings)
        for finding in findings:
            if finding.severity == "error":
                self.handle_fault(finding, framework.first_listing, framework)
            else:
                self.reporter.pending += (finding,)

    def _locate_choice(self, finding: Finding) -> Finding:
        """Add the place of the key that asks for free GPUs."""
        if self.plan.choosing is None:
            return finding
        from tfenv.policy.model import format_key

        origin = self.loaded.policy.settings["visible_devices"].origin
        return self.loaded.locate(replace(finding, path=origin.path, key=format_key(origin.key)))

    def find_late_visibility(self) -> tuple[Finding, ...]:
        """Return a note where the program set CUDA_VISIBLE_DEVICES after CUDA had read it: it has no effect.

        Where the launcher did, return what is wrong with the GPUs that were opened.
        """
        if self.stale is not None:
            return (replace(self.stale, severity="warning"),)
        value = os.environ.get(_VISIBLE)
        if value in (self.visible_when_listed, self._assigned) or self.visible_when_listed is None:
            return ()
        text = f"the program set {_VISIBLE}={value} after the devices were listed, which has no effect"
        return (Finding("too-late", text, "note"),)


def _name_gpus(value: str | None) -> str:
    return f"GPU {value}" if value else "no GPU"


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
        outcome = replace(outcome, status=status, findings=findings, choice=process.choice)
        pending, self.pending = self.pending, ()
        with Inside():
            with process.lock:
                self._note_promises(outcome.devices)
            process.reporter.report_outcome(outcome, self.get_plan(), self.framework, pending)
        errors = pipeline.select_errors(wanted)
        if errors and process.loaded.policy.on_error == "fail":
            raise PolicyError(errors)

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
