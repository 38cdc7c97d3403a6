"""Applies the policy to a program that takes this process's place and cannot be governed from inside."""

from __future__ import annotations

import os

from tfenv import pipeline
from tfenv.frameworks.opaque import OpaqueProgram
from tfenv.runtime.process_policy import ProcessPolicy
from tfenv.runtime.resolver import Resolver
from tfenv.values import replace


def apply_to_environment(path: str, title: str) -> None:
    """Write into the environment what of the policy a variable can hold, and say and record what none can.

    Args:
        path: The program. The policy beside it counts where there is none above the working directory.
        title: What messages call it.

    Raises:
        PolicyError: Something is wrong, or cannot be kept, and `on_error = "fail"`.
    """
    from tfenv.policy.model import Outcome

    start: dict[str, str | None] = {**os.environ, "cwd": pipeline.current_start().cwd, "script": os.path.abspath(path)}
    loaded = pipeline.load(pipeline.make_start(start))
    if not loaded.found:
        return
    process, framework = ProcessPolicy(start, loaded, Resolver()), OpaqueProgram(title)
    is_off, remarks = pipeline.check_disable_switch(loaded)
    if is_off:
        return
    process.reporter.pending += remarks
    policy = process.add_framework(framework)
    process.narrow_unchosen()
    # Which GPUs is all that a variable can hold, so that no other wish was cut.
    findings = policy.plan.findings
    lost = tuple(f for f in findings if f.asked is not None and f.asked.startswith("visible_devices"))
    outcome = Outcome("cpu" if process.no_gpu else "clamped" if lost else "applied", "tfgpu run", findings=lost)
    said = process.findings
    plan = replace(policy.plan, findings=tuple(finding for finding in findings if finding not in said))
    process.reporter.report_outcome(outcome, plan, framework, policy.pending)
