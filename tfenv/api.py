"""What a program may ask and do: `status`, `explain`, `check` and `apply`. All of them are names of `tfenv` itself.

Nothing here imports a framework or opens CUDA.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from html import escape
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING

from tfenv.errors import Finding, PolicyError, escape_for_terminal
from tfenv.explanation import Explanation, explain_applied, explain_start, plan_as_dict
from tfenv.explanation import explain as explain_elsewhere
from tfenv.lint.check import check_here, check_path
from tfenv.policy.model import Grant, Inventory, MemoryLimit, Outcome, Plan, Start
from tfenv.policy.units import format_limit
from tfenv.runtime import arming
from tfenv.values import as_dict, frozen

if TYPE_CHECKING:
    from tfenv.runtime.process_policy import ProcessPolicy

__all__ = ["Explanation", "Finding", "PolicyError", "Status", "apply", "check", "explain", "status"]


@frozen
class Status:
    """What applies to this process.

    Attributes:
        armed: The hook watches imports here.
        governed: A policy was read for a framework of this process.
        framework: The name of the first framework. None if none was imported under a policy yet.
        version: The version of the first framework. None if unknown.
        frameworks: The names of all frameworks that were imported under the policy.
        sources: The files that apply.
        plan: What is applied to the first framework, or will be once one is imported. None if the policy sets nothing.
        outcomes: What happened at the entry points so far, oldest first. () before devices are created.
        findings: What is wrong. Clamps are notes.
        summary: The line that you see on stderr. "" if there is nothing to say.
    """

    armed: bool
    governed: bool = False
    framework: str | None = None
    version: str | None = None
    frameworks: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    plan: Plan | None = None
    outcomes: tuple[Outcome, ...] = ()
    findings: tuple[Finding, ...] = ()
    summary: str = ""

    def __str__(self) -> str:
        if self.summary:
            return self.summary
        if self.governed:
            return "tfgpu: the policy sets nothing about GPUs"
        return "tfgpu: no policy applies here (no tfgpu.toml was found)"

    def as_dict(self) -> dict[str, object]:
        """Return all of it as values that JSON knows."""
        return {**as_dict(self), "plan": None if self.plan is None else plan_as_dict(self.plan)}

    def _repr_html_(self) -> str:
        """Return a table, for notebooks. What others wrote into files is escaped in it."""
        rows = "".join(
            f'<tr><th style="text-align:left;vertical-align:top">{escape(name)}</th>'
            f'<td style="text-align:left">{"<br>".join(escape(escape_for_terminal(line)) for line in lines)}</td></tr>'
            for name, lines in self._make_rows()
            if lines
        )
        return (
            f'<table><caption style="text-align:left">{escape(escape_for_terminal(str(self)))}</caption>{rows}</table>'
        )

    def _make_rows(self) -> Iterator[tuple[str, list[str]]]:
        yield "hook", ["active" if self.armed else "not active"]
        yield "framework", [f"{self.framework} {self.version or ''}"] if self.framework else []
        yield "files", list(self.sources)
        in_force = self.armed and not any(outcome.status == "too_late" for outcome in self.outcomes)
        yield "GPUs" if in_force else "GPUs that it would allow", _format_gpus(self.plan)
        yield "memory growth", [] if self.plan is None else ["on" if self.plan.growth else "set by the program"]
        yield (
            "at the entry points",
            [" at ".join(filter(None, (done.status, done.entry_point))) for done in self.outcomes],
        )
        yield "findings", [f"{finding} [{finding.severity} {finding.code}]" for finding in self.findings]


def _format_gpus(plan: Plan | None) -> list[str]:
    """Return one line for each GPU: what it is, and how much of it the process may take."""
    if plan is None:
        return []
    if plan.devices is None:
        return [f"all that CUDA shows: {_format_limit(plan.limit)}"]
    return [
        f"GPU:{index} {planned.device.name if planned.device else ''} ({planned.token}): {_format_limit(planned.limit)}"
        for index, planned in enumerate(plan.devices)
    ] or ["none"]


def _format_limit(limit: MemoryLimit | None) -> str:
    return "no limit" if limit is None or limit.unlimited else f"at most {format_limit(limit)}"


def status() -> Status:
    """Return what applies to this process, as far as it is known by now. Changes nothing and never raises.

    Before a framework is imported, it tells what will apply.
    """
    from tfenv.runtime.enforce import get_current, get_refusal

    process = get_current()
    if process is not None:
        return _make_status(process)
    if get_refusal():
        return Status(armed=arming.is_armed(), findings=get_refusal(), summary=f"tfgpu: {PolicyError(get_refusal())}")
    try:
        return _preview_status()
    except Exception as error:  # noqa: BLE001 - whoever only asks is not stopped
        text = f"cannot tell what will apply: {type(error).__name__}: {error}"
        finding = Finding("internal-error", text)
        return Status(arming.is_armed(), findings=(finding,), summary=f"tfgpu: {text} [{finding.code}]")


def _preview_status() -> Status:
    """Return what will apply when a framework is imported."""
    from tfenv import pipeline
    from tfenv.audit.stderr_line import format_policy_line
    from tfenv.devices.inventory import read_inventory

    armed = arming.is_armed()
    start, grant, request = _read_own_start()
    loaded = pipeline.load(start)
    if not loaded.found:
        return Status(armed=armed)
    is_off, remarks = pipeline.check_disable_switch(loaded)
    if is_off:
        return Status(armed, sources=loaded.policy.paths, summary="tfgpu: switched off by TFGPU_DISABLE=1")
    plan = pipeline.decide(loaded, grant, read_inventory(), request).plan
    found = (*loaded.findings, *remarks)
    line = format_policy_line(loaded.subject, loaded.policy, plan, findings=found).removeprefix("tfgpu: ")
    when = _describe_force(armed=armed)
    return Status(
        armed=armed,
        sources=loaded.policy.paths,
        plan=plan,
        findings=(*found, *plan.findings),
        summary=f"tfgpu: {when}: {line}" if line else "",
    )


def _describe_force(*, armed: bool) -> str:
    """Return what a preview's line begins with: whether what is declared will be in force."""
    from tfenv.frameworks.registry import get_framework, list_frameworks

    imported = [name for name in list_frameworks() if _is_imported(name)]
    if imported:
        titles = " and ".join(get_framework(name).title for name in imported)
        were = "was" if len(imported) == 1 else "were"
        return (
            f"NOT IN FORCE: {titles} {were} imported before the policy could be applied; run `tfenv.apply()` before "
            "devices are created, or restart the process (in a notebook, the kernel). Declared"
        )
    if not armed:
        return "NOT IN FORCE: tfenv is not active in this process; run `tfenv.apply()` now. Declared"
    return "when a framework is imported"


def _is_imported(name: str) -> bool:
    """Return whether a framework is there, and no mock of it."""
    return isinstance(getattr(sys.modules.get(name), "__spec__", None), ModuleSpec)


def _read_own_start() -> tuple[Start, Grant, tuple[str, ...] | None]:
    """Return what this process was when it started, what it was given, and what an ancestor's program asked for."""
    from tfenv import pipeline
    from tfenv.launchers.grant import read_grant
    from tfenv.launchers.parent import read_boot_id, split_tokens

    remembered = arming.get_start()
    start = pipeline.make_start(remembered, at_import=True) if remembered else pipeline.current_start()
    known = {name: value for name, value in (remembered or os.environ).items() if value is not None}
    grant, inherited = read_grant(known, os.environ, read_boot_id())
    return start, grant, split_tokens(inherited.request)


def _find_plan(process: ProcessPolicy) -> tuple[Plan, Inventory]:
    """Return what is applied to the first framework and the GPUs, or before devices are listed what will be."""
    from tfenv import pipeline
    from tfenv.devices.inventory import read_inventory
    from tfenv.policy.supports import drop_unsupported

    first = next(iter(process.frameworks.values()))
    if process.no_gpu or process.inventory.devices is not None or process.inventory.problem is not None:
        return first.plan, process.inventory
    inventory = read_inventory()
    plan = pipeline.decide(process.loaded, process.grant, inventory, process.program_request).plan
    return drop_unsupported(plan, process.loaded.policy, first.framework.supports, first.framework.title), inventory


def _list_findings(process: ProcessPolicy, plan: Plan) -> tuple[Finding, ...]:
    reporter, first = process.reporter, next(iter(process.frameworks.values()))
    findings = [*process.loaded.findings, *plan.findings, *process.findings, *reporter.pending, *first.pending]
    findings += reporter.log_findings
    findings += [finding for outcome in reporter.list_outcomes() for finding in outcome.findings]
    return tuple(dict.fromkeys(findings))


def _make_status(process: ProcessPolicy) -> Status:
    from tfenv.audit.stderr_line import format_policy_line

    loaded = process.loaded
    first = next(iter(process.frameworks.values()))
    outcomes = process.reporter.list_outcomes()
    last = outcomes[-1] if outcomes else None
    plan, _ = _find_plan(process)
    return Status(
        armed=arming.is_armed(),
        governed=True,
        framework=first.framework.name,
        version=first.framework.version(),
        frameworks=tuple(process.frameworks),
        sources=loaded.policy.paths,
        plan=plan,
        outcomes=outcomes,
        findings=_list_findings(process, plan),
        summary=format_policy_line(loaded.subject, loaded.policy, plan, last, loaded.findings),
    )


def explain(project: str | os.PathLike[str] | None = None, user: str | None = None) -> Explanation:
    """Explain the policy of this process, or of one that would start elsewhere or as another user.

    Without arguments it agrees with `status()`: before a framework is imported it tells what will apply, and
    afterwards what is applied.

    Args:
        project: The directory where another process would start. None: explain this process.
        user: Whose process: a login name, or "uid:1234". None: your own. Only root may ask about somebody else. It is
            explained as for a new login, since nobody else's variables are known.

    Raises:
        NotADirectoryError: `project` is not a directory.
        LookupError: There is no such user.
        PermissionError: Only root may ask about somebody else.
    """
    from tfenv.runtime.enforce import get_current

    if project is not None or user is not None:
        return explain_elsewhere(project, user)
    process = get_current()
    if process is None:
        return explain_start(*_read_own_start())
    plan, inventory = _find_plan(process)
    findings = _list_findings(process, plan)
    return explain_applied(process.loaded, process.grant, inventory, plan, findings, process.program_request)


def check(path: str | os.PathLike[str] | None = None) -> tuple[Finding, ...]:
    """Look for mistakes in policy files.

    Args:
        path: A tfgpu.toml, a pyproject.toml, or a directory with one. None: all files that apply here.

    Returns:
        What is wrong, with file, line and column. () if nothing is wrong. A path that does not exist is a finding, too.
        Nothing that is written in a file raises an exception.
    """
    return (check_here() if path is None else check_path(os.fspath(path))).findings


def apply() -> Status:
    """Apply the policy in this process if the hook did not: in a notebook, or in an interpreter without tfenv.pth.

    Before a framework is imported, this activates the hook. Afterwards it applies the whole policy if the framework has
    created no devices yet. Otherwise the last of `outcomes` has the status "too_late". A second call changes nothing.

    Returns:
        The new status. `governed` stays False until a framework is imported, and if there is no policy.

    Raises:
        PolicyError: A framework is imported already, the policy cannot be applied, and `on_error = "fail"`.
    """
    from tfenv.frameworks.registry import list_frameworks
    from tfenv.runtime import enforce

    armed_before = arming.is_armed()
    try:
        arming.arm()  # it catches up by itself, but only when it was not armed before
    except ImportError as error:  # a freezer left a part of tfenv out
        return Status(armed=False, findings=(_report_incomplete(error),))
    for name in list_frameworks():
        process = enforce.get_current()
        is_governed = process is not None and name in process.frameworks
        if not is_governed and _is_imported(name):
            if armed_before:
                enforce.catch_up(name, arming.get_start())
            elif enforce.get_refusal():
                raise PolicyError(enforce.get_refusal())
    return status()


def _report_incomplete(error: ImportError) -> Finding:
    """Say and record that tfenv cannot be loaded, and do what the machine's `on_error` says."""
    from tfenv.runtime import emergency

    emergency.handle(error, "tfenv")
    return Finding("internal-error", f"tfenv failed at import tfenv: {type(error).__name__}: {error}")
