"""The one line people see: `tfgpu: GPU 0 of 4 (GPU-8932f937), growth on, at most 8.0 GiB each (tfgpu.toml)`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, MutableMapping

from tfenv.errors import Finding, escape_for_terminal
from tfenv.policy.model import EffectivePolicy, Outcome, Plan, Setting, Subject
from tfenv.policy.units import format_limit

__all__ = ["SHOWN_VARIABLE", "say", "say_once", "show_summary", "summary"]

#: Set by the process that showed the line, for the children it starts from then on: a training program and
#: its 64 data loaders speak once. Children of a parent that never showed it, as those of a spawn pool whose
#: parent imports no TensorFlow, do not know of each other, and each shows it.
SHOWN_VARIABLE = "TFGPU_SUMMARY_SHOWN"
_LONGEST_MESSAGE = 200


def summary(
    subject: Subject,
    policy: EffectivePolicy,
    plan: Plan,
    outcome: Outcome | None = None,
    findings: Iterable[Finding] = (),
) -> str:
    """What holds for this process, in one line that is safe on a terminal.

    Args:
        subject: For whom; files inside its project are named relative to it.
        policy: Names the files.
        plan: Names the GPUs and limits.
        outcome: What happened at the first entry point, when it was passed already.
        findings: What was found while reading; those of plan and outcome are added.

    Returns:
        "" when nothing is declared and nothing is wrong.
    """
    all_findings = (*findings, *plan.findings, *(outcome.findings if outcome else ()))
    wrong = tuple(finding for finding in all_findings if finding.severity != "note")
    if policy.silent and not wrong:
        return ""
    if outcome is not None and outcome.status == "too_late":
        reason = "; ".join(finding.message for finding in outcome.findings)
        rest = tuple(finding for finding in wrong if finding not in outcome.findings)
        return escape_for_terminal(f"tfgpu: NOT IN FORCE: {reason}{_files_text(subject, policy)}{_findings_text(rest)}")
    if _no_gpu(plan, outcome):
        reason, rest = _no_gpu_reason(subject, policy, wrong)
        return escape_for_terminal(f"tfgpu: NO GPU: {reason}{_findings_text(rest)}")
    parts = (_gpus_text(plan), _growth_text(plan, outcome), _limits_text(plan))
    return escape_for_terminal(
        f"tfgpu: {', '.join(filter(None, parts))}{_files_text(subject, policy)}{_findings_text(wrong)}"
    )


def _no_gpu(plan: Plan, outcome: Outcome | None) -> bool:
    listed_none = outcome is not None and any(finding.code == "no-gpu" for finding in outcome.findings)
    refused = outcome is not None and outcome.status == "cpu"
    return plan.visible in ("", "-1") or plan.devices == () or refused or listed_none


def _no_gpu_reason(
    subject: Subject, policy: EffectivePolicy, wrong: tuple[Finding, ...]
) -> tuple[str, tuple[Finding, ...]]:
    """Why there is none, and the findings that are not said by that."""
    chosen = policy.settings.get("visible_devices")
    if isinstance(chosen, Setting) and chosen.value == ():
        return f'visible_devices = "none" ({_shown_path(subject, chosen.origin.path)})', wrong
    if wrong:
        first = min(wrong, key=lambda finding: finding.severity != "error")
        return _shorten(str(first)), tuple(finding for finding in wrong if finding is not first)
    return "none was given to this process (CUDA_VISIBLE_DEVICES)", ()


def _gpus_text(plan: Plan) -> str:
    if plan.devices is None:
        return "all GPUs" if plan.visible is None else f"GPU {plan.visible}"
    known = [planned.device for planned in plan.devices if planned.device is not None]
    if len(known) < len(plan.devices):
        return "GPU " + ",".join(_short_uuid(planned.token) for planned in plan.devices)
    numbers = ",".join(str(device.index) for device in known)
    total = "" if plan.machine_count is None else f" of {plan.machine_count}"
    return f"GPU {numbers}{total} ({', '.join(_short_uuid(device.uuid) for device in known)})"


def _short_uuid(token: str) -> str:
    """`GPU-8932f937` of `GPU-8932f937-d72c-…`: enough to tell the cards of one machine apart."""
    return "-".join(token.split("-")[:2]) if token.startswith(("GPU-", "MIG-")) else token


def _growth_text(plan: Plan, outcome: Outcome | None) -> str:
    """What the policy says of growth; False is only a default, the program may still ask for it."""
    if plan.growth is None:
        return ""
    on = plan.growth or (outcome is not None and outcome.growth is True)
    return f"growth {'on' if on else 'off'}"


def _limits_text(plan: Plan) -> str:
    bounds = [plan.limit] if plan.devices is None else [planned.limit for planned in plan.devices]
    limits = [format_limit(bound) for bound in bounds]
    if set(limits) <= {"unlimited"}:
        return ""
    return f"at most {limits[0]} each" if len(set(limits)) == 1 else f"at most {', '.join(limits)}"


def _files_text(subject: Subject, policy: EffectivePolicy) -> str:
    return f" ({', '.join(_shown_path(subject, path) for path in policy.paths)})" if policy.paths else ""


def _shown_path(subject: Subject, path: str) -> str:
    inside = f"{subject.project.rstrip('/')}/" if subject.project else ""
    return path[len(inside) :] if inside and path.startswith(inside) else path


def _findings_text(findings: tuple[Finding, ...]) -> str:
    if not findings:
        return ""
    first = min(findings, key=lambda finding: finding.severity != "error")
    count = "1 finding" if len(findings) == 1 else f"{len(findings)} findings, first"
    return f"; {count}: {_shorten(str(first))}; see `tfgpu check`"


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."


def show_summary(text: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Print the line to stderr, unless this process or one above it did. Never raises; nothing for ""."""
    if text:
        say_once(text, SHOWN_VARIABLE, environ)


def say_once(text: str, variable: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Print the line to stderr, unless this process or one above it did, and tell the children by `variable`."""
    if variable not in environ:
        environ[variable] = "1"
        say(text)


def say(text: str) -> None:
    """One line to stderr, if there is one: a daemon closed it, `pythonw` and some notebooks have None."""
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - what the program put in the place of stderr, sys.exit() even, is not worth its life
        return
