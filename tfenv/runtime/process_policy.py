"""The policy of one process: what holds for all frameworks that the process imports."""

from __future__ import annotations

import _thread  # built in; gevent wants to be the first to import threading
import os

from tfenv import pipeline
from tfenv.errors import PROGRAM, Finding, PolicyError
from tfenv.launchers.grant import read_assignment, read_grant
from tfenv.launchers.parent import GRANT_VARIABLE, encode_grant, read_boot_id, split_tokens
from tfenv.policy.model import Inventory, Plan
from tfenv.policy.resolve import NO_GPU
from tfenv.runtime.framework_policy import FrameworkPolicy
from tfenv.runtime.own_imports import Inside
from tfenv.runtime.reporting import Reporter
from tfenv.values import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tfenv.frameworks.base import Framework
    from tfenv.policy.budget import BudgetBook
    from tfenv.policy.model import Choice
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
        imported = self.frameworks.values()
        policies = [policy for policy in imported if any(o.devices for o in policy.outcomes)] or list(imported)
        titles = " and ".join(policy.framework.title for policy in policies)
        keeps = "keeps" if len(policies) == 1 else "keep"
        text = (
            f"{self.grant.launcher} assigned {_name_gpus(value)} to this task, but {titles} {keeps} "
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
