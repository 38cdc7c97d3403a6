"""Enforces the policy in this process: before a framework's own code runs, right after it, or too late.

The import hook calls it. Nothing here raises but PolicyError, and that only if `on_error = "fail"`.
"""

from __future__ import annotations

import os
from time import perf_counter

from tfenv import pipeline
from tfenv.errors import Finding, PolicyError, escape_for_terminal
from tfenv.frameworks.registry import get_framework
from tfenv.identity import identify
from tfenv.policy.resolve import NO_GPU
from tfenv.runtime.emergency import read_machine_on_error
from tfenv.runtime.process_policy import ProcessPolicy
from tfenv.runtime.resolver import make_resolver

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from tfenv.frameworks.base import Framework
    from tfenv.runtime.framework_policy import FrameworkPolicy

    Start = Mapping[str, str | None]

_current: ProcessPolicy | None = None
#: The one before, of an import that failed: what it wrote into the environment is no request of the program.
_previous: ProcessPolicy | None = None
_refusal: tuple[Finding, ...] = ()
#: TFGPU_DISABLE=1 switched the policy off, and that is on record.
_is_off = False


def get_current() -> ProcessPolicy | None:
    """Return the policy this process is under. None: no file was found, or no framework was imported yet."""
    return _current


def get_refusal() -> tuple[Finding, ...]:
    """Return why the last import was refused. () means that it was not."""
    return _refusal


def before_import(name: str, start: Start) -> None:
    """Find the policy and write the environment, just before a framework's own code runs. Opens no CUDA.

    Args:
        name: The framework's top-level package.
        start: What the process was when it started, as `finder.START`.

    Raises:
        PolicyError: The policy cannot be applied and `on_error = "fail"`. It is raised again on every retry.
    """
    global _current, _previous, _refusal  # noqa: PLW0603 - one policy a process
    if _is_off:
        return
    others = _current is not None and _current.frameworks.keys() - {name}
    if not others:
        _previous, _current = _current or _previous, None
    _refusal = ()
    began = perf_counter()
    loaded: pipeline.LoadedPolicy | None = None
    try:
        process = _current
        if process is None:
            resolver = make_resolver(start)
            loaded = resolver.load(pipeline.make_start(start, at_import=True))
            process = ProcessPolicy(start, loaded, resolver) if loaded.found else None
        else:
            loaded = process.loaded
        _current = None if process is None else _apply(process, get_framework(name), began)
    except PolicyError as error:
        _refusal = error.findings
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the program goes on unless the policy forbids that
        text = f"tfenv failed at import {name}: {type(error).__name__}: {error}"
        if loaded is None:
            text += "; no policy is applied"
        _handle_fault(Finding("internal-error", text), start, loaded)


def _apply(process: ProcessPolicy, framework: Framework, began: float) -> ProcessPolicy | None:
    """Decide, write the environment and the first record.

    Returns:
        The policy. None: TFGPU_DISABLE=1 switches it off.
    """
    global _is_off  # noqa: PLW0603 - as above
    if not process.frameworks and _previous is not None:
        process.continue_from(_previous)
    is_off, remarks = pipeline.check_disable_switch(process.loaded)
    if is_off:
        process.reporter.report_switched_off(framework)
        _is_off = True
        return None
    process.reporter.pending += remarks
    is_first = not process.frameworks
    policy = process.add_framework(framework)
    if is_first:  # TensorFlow imports JAX, and that tells nothing new
        process.reporter.report_loaded(policy.plan, framework, (perf_counter() - began) * 1000)
    return process


def _handle_fault(finding: Finding, start: Start, loaded: pipeline.LoadedPolicy | None) -> None:
    """Do what `on_error` says of a fault of ours before there is a plan. What was loaded so far says what follows."""
    from tfenv.audit.stderr_line import show_policy_line
    from tfenv.launchers.grant import read_current_grant
    from tfenv.policy.model import Grant
    from tfenv.runtime.reporting import Reporter

    on_error = loaded.policy.on_error if loaded is not None else read_machine_on_error()
    if on_error == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = NO_GPU
    try:
        loaded = loaded or pipeline.LoadedPolicy(pipeline.make_start(start), identify(os.geteuid()))
        job = read_current_grant()[0].job  # its GPUs are not asked for: the variable may be rewritten by now
        Reporter(loaded, Grant(job=job)).report_failed(finding)
    except Exception:  # noqa: BLE001 - the record is lost, not the line
        show_policy_line(escape_for_terminal(f"tfgpu: {finding.message} [{finding.code}]"))
    if on_error == "fail":
        raise PolicyError((finding,))


def after_import(name: str, module: ModuleType | None = None) -> None:  # noqa: ARG001 - the hook hands it on
    """Wrap the framework's entry points, right after its own code ran and before the program gets the module.

    Raises:
        PolicyError: An entry point is missing or cannot be wrapped, and `on_error = "fail"`.
    """
    policy = _current.frameworks.get(name) if _current is not None else None
    if policy is None:
        return
    try:
        _intercept(policy)
    except PolicyError:
        raise
    except Exception as error:  # noqa: BLE001 - `on_error` decides
        policy.report_fault(error, f"import {name}")


def _intercept(policy: FrameworkPolicy) -> None:
    framework, process = policy.framework, policy.process
    missing = framework.intercept(policy)
    if not missing:
        return
    from tfenv.policy.model import Outcome

    where = f"limits are set by {framework.public_api} where that is possible"
    text = f"this {framework.title} has no {', '.join(missing)}: {where}"
    finding = Finding("degraded", text)
    goes_on = process.loaded.policy.on_error == "warn"
    if not goes_on:
        process.handle_fault(finding, framework=framework)
    process.reporter.report_outcome(Outcome("degraded", findings=(finding,)), policy.plan, framework)
    if goes_on:  # the line on stderr says first what holds, and then what is wrong
        process.handle_fault(finding, framework=framework)
    framework.apply_publicly(policy)


def too_late(name: str, start: Start) -> None:
    """Apply what still can be to a framework that was there before the hook. Never raises."""
    try:
        catch_up(name, start)
    except PolicyError as error:
        from tfenv.audit.stderr_line import print_to_stderr

        print_to_stderr(escape_for_terminal(f"tfgpu: {error}"))


def catch_up(name: str, start: Start) -> None:
    """Apply the policy to a framework that is loaded already.

    Raises:
        PolicyError: The policy cannot be applied and `on_error = "fail"`.
    """
    from tfenv.devices.cuda import has_active_context

    others = [p.framework for p in (_current.frameworks.values() if _current else ()) if p.framework.name != name]
    before_import(name, start)
    policy = _current.frameworks.get(name) if _current is not None else None
    if policy is None:
        return
    gpu_is_open = has_active_context()
    belongs_to_another = any(framework.devices_exist(gpu_is_open=gpu_is_open) for framework in others)
    if not policy.framework.devices_exist(gpu_is_open=gpu_is_open and not belongs_to_another):
        after_import(name)
        return
    from tfenv.policy.model import Outcome

    text = (
        f"{policy.framework.title} created its devices before tfenv was loaded, and keeps them; restart the "
        "process (in a notebook, the kernel) to apply the policy"
    )
    finding = Finding("too-late", text)
    policy.process.reporter.report_outcome(Outcome("too_late", findings=(finding,)), policy.plan, policy.framework)
