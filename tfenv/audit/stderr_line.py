"""The line people see: `tfgpu: TensorFlow on GPU 0 of 4 (GPU-8932f937), growth on, at most 8.0 GiB (tfgpu.toml)`."""

from __future__ import annotations

import os
import sys
from binascii import crc32

from tfenv.errors import PROGRAM, Finding, escape_for_terminal
from tfenv.jobs import identify_job
from tfenv.policy.model import Setting
from tfenv.policy.units import format_limit
from tfenv.values import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, MutableMapping

    from tfenv.policy.model import EffectivePolicy, Outcome, Plan, Subject

#: Set by the process that showed the line, for the children it starts from then on: a training program and
#: its 64 data loaders speak once. It tells the lines apart, and to which stderr they went: another one is said.
#: Children of a parent that never showed it do not know of each other, and each
#: shows it. So do those of a spawn Pool whose parent imports no framework.
SHOWN_VARIABLE = "TFGPU_SUMMARY_SHOWN"
_LONGEST_MESSAGE = 200
#: Findings that the line names one by one.
_MOST_FINDINGS = 3
#: Lines that are remembered for the children, at most.
_MOST_MARKS = 16


def format_policy_line(
    subject: Subject,
    policy: EffectivePolicy,
    plan: Plan,
    outcome: Outcome | None = None,
    findings: Iterable[Finding] = (),
    title: str = "",
) -> str:
    """Say what holds for this process, in one line that is safe on a terminal.

    Args:
        subject: For whom. Files inside its project are named relative to it.
        policy: Names the files.
        plan: Names the GPUs and limits.
        outcome: What happened at the first entry point. None: none was passed yet.
        findings: What was found while reading. Those of plan and outcome are added.
        title: The framework that has the GPUs. "": it holds for all of them.

    Returns:
        "" when nothing is declared and nothing is wrong.
    """
    findings = (*findings, *plan.findings)
    all_findings = _shorten_paths(subject, (*findings, *(outcome.findings if outcome else ())))
    wrong = tuple(finding for finding in all_findings if finding.severity != "note")
    shown = _shorten_paths(subject, findings)
    if policy.silent and not wrong:
        return ""
    files = _format_files(subject, policy)
    if outcome is not None and outcome.status == "too_late":
        late = _shorten_paths(subject, outcome.findings)
        reason = "; ".join(f"{finding.message} [{finding.code}]" for finding in late)
        rest = tuple(finding for finding in wrong if finding not in late)
        text = f"NOT IN FORCE: {reason}{files}{_format_findings(rest)}{_point_to_more(rest, shown)}"
    elif _has_no_gpu(plan, outcome):
        # A job without GPUs is as it should be. The line says all the same why there is none.
        wrong = tuple(finding for finding in all_findings if finding.severity != "note" or finding.code == "no-grant")
        reason, rest = _explain_no_gpu(subject, policy, wrong)
        whom = f" for {title}" if title else ""
        text = f"NO GPU{whom}: {reason}{_format_findings(rest)}{_point_to_more(wrong, shown)}"
    else:
        text = f"{_format_effect(plan, outcome, policy, wrong, files, title)}{_point_to_more(wrong, shown)}"
    return escape_for_terminal(f"tfgpu: {text}")


def add_losses(line: str, outcome: Outcome) -> str:
    """Say at the end of a line what the process would lose under the observed policy.

    Args:
        line: As `format_policy_line` gives it. "": nothing is declared.
        outcome: What happened at the entry point.
    """
    names = {"memory_growth": "growth "}
    texts = dict.fromkeys(
        f"{names.get(lost.key, '')}{lost.given} instead of {_shorten_uuid(lost.asked)}" for lost in outcome.would_clamp
    )
    if not texts:
        return line
    return f"{line or 'tfgpu: no limits yet'}; under [observe] it would be {escape_for_terminal(', '.join(texts))}"


def _format_effect(
    plan: Plan,
    outcome: Outcome | None,
    policy: EffectivePolicy,
    wrong: tuple[Finding, ...],
    files: str,
    title: str,
) -> str:
    """Return what holds, and what is wrong. An error comes first: a line that begins well is read as good news."""
    parts = (
        f"{title} on {_format_gpus(plan)}" if title else _format_gpus(plan),
        _format_growth(plan, outcome),
        _format_limits(plan),
    )
    text = f"{', '.join(filter(None, parts))}{files}"
    # What the program wants and cannot have leaves the policy in force.
    errors = tuple(f for f in wrong if f.severity == "error" and f.asked_by != PROGRAM)
    if errors and policy.silent:
        gpus = _format_gpus(replace(plan, devices=None) if plan.visible is None else plan)
        text = f"NOT IN FORCE: {_join(errors)}; {title or 'the program'} has {gpus} without a limit"
    elif errors:
        text = f"NOT IN FORCE: {_join(errors)}; in force: {text}"
    return text + _format_findings(tuple(finding for finding in wrong if finding not in errors))


def _shorten_paths(subject: Subject, findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Name files as in the rest of the line. What was found twice, as at a later look, is said once."""
    short = (f if f.path is None else replace(f, path=_shorten_path(subject, f.path)) for f in findings)
    return tuple({(finding.code, str(finding)): finding for finding in short}.values())


def _has_no_gpu(plan: Plan, outcome: Outcome | None) -> bool:
    if plan.visible in ("", "-1") or plan.devices == ():
        return True
    return outcome is not None and (
        outcome.status == "cpu"
        or any(finding.code == "no-gpu" for finding in outcome.findings)
        or (not outcome.devices and any(finding.code == "budget-spent" for finding in outcome.findings))
    )


def _explain_no_gpu(
    subject: Subject, policy: EffectivePolicy, wrong: tuple[Finding, ...]
) -> tuple[str, tuple[Finding, ...]]:
    """Return why there is none, and the findings that this does not tell."""
    setting = policy.settings.get("visible_devices")
    if isinstance(setting, Setting) and setting.value == ():
        return f'visible_devices = "none" ({_shorten_path(subject, setting.origin.path)})', wrong
    if wrong:
        worst = next((finding for finding in wrong if finding.code == "no-grant"), None) or _find_worst(wrong)
        return _format_finding(worst), tuple(finding for finding in wrong if finding is not worst)
    return "none was given to this process (CUDA_VISIBLE_DEVICES) [no-gpu]", ()


def _format_gpus(plan: Plan) -> str:
    if plan.devices is None:
        if plan.choosing is not None:
            return _format_count(plan.choosing.count)
        if plan.visible is not None:
            return _format_tokens(plan.visible.split(","))
        if plan.machine_count == 1:
            return "the GPU"
        return "all GPUs" if plan.machine_count is None else f"all {plan.machine_count} GPUs"
    if plan.choosing is not None and plan.choosing.count < len(plan.devices):
        return f"{_format_count(plan.choosing.count)} of {len(plan.devices)}"
    known = [planned.device for planned in plan.devices if planned.device is not None]
    if len(known) < len(plan.devices):
        return _format_tokens(planned.token for planned in plan.devices)
    numbers = ",".join(str(device.index) for device in known)
    total = "" if plan.machine_count is None else f" of {plan.machine_count}"
    return f"GPU {numbers}{total} ({', '.join(_shorten_uuid(device.uuid) for device in known)})"


def _format_count(count: int) -> str:
    return "1 free GPU" if count == 1 else f"{count} free GPUs"


def _format_tokens(tokens: Iterable[str]) -> str:
    """Return the entries of CUDA_VISIBLE_DEVICES. UUIDs say by themselves that they are GPUs."""
    names = ",".join(map(_shorten_uuid, tokens))
    return names if names.startswith(("GPU-", "MIG-")) else f"GPU {names}"


def _shorten_uuid(token: str) -> str:
    """Return `GPU-8932f937` for `GPU-8932f937-d72c-…`: enough to tell the cards of one machine apart."""
    return "-".join(token.split("-")[:2]) if token.startswith(("GPU-", "MIG-")) else token


def _format_growth(plan: Plan, outcome: Outcome | None) -> str:
    """Say what the policy does about growth. False is only a default, the program may still ask for it."""
    if plan.growth is None:
        return ""
    is_on = plan.growth or (outcome is not None and outcome.growth is True)
    return f"growth {'on' if is_on else 'off'}"


def _format_limits(plan: Plan) -> str:
    bounds = [plan.limit] if plan.devices is None else [planned.limit for planned in plan.devices]
    limits = [format_limit(bound) for bound in bounds]
    if set(limits) <= {"unlimited"}:
        return ""
    counts = (
        None if plan.devices is None else len(plan.devices),
        None if plan.choosing is None else plan.choosing.count,
        plan.machine_count,
    )
    each = "" if 1 in counts else " each"
    text = f"{limits[0]}{each}" if len(set(limits)) == 1 else ", ".join(limits)
    share = plan.share
    by_share = share is not None and any(bound is not None and bound.fraction == share.fraction for bound in bounds)
    return f"at most {text} by {share.giver}'s {share.text}" if share and by_share else f"at most {text}"


def _format_files(subject: Subject, policy: EffectivePolicy) -> str:
    return f" ({', '.join(_shorten_path(subject, path) for path in policy.paths)})" if policy.paths else ""


def _shorten_path(subject: Subject, path: str) -> str:
    return path.removeprefix(f"{subject.project.rstrip('/')}/") if subject.project else path


def _format_findings(findings: tuple[Finding, ...]) -> str:
    """Return all of them, each with its severity. "" without any."""
    return "".join(f"; {finding.severity}: {_format_finding(finding)}" for finding in findings[:_MOST_FINDINGS]) + (
        f"; and {len(findings) - _MOST_FINDINGS} more" if len(findings) > _MOST_FINDINGS else ""
    )


def _join(errors: tuple[Finding, ...]) -> str:
    shown = [_format_finding(finding) for finding in errors[:_MOST_FINDINGS]]
    return "; ".join([*shown, *([f"and {len(errors) - len(shown)} more"] if len(errors) > len(shown) else [])])


def _format_finding(finding: Finding) -> str:
    return f"{_shorten(str(finding))} [{finding.code}]"


def _point_to_more(findings: tuple[Finding, ...], shown: tuple[Finding, ...]) -> str:
    """Name the command that shows these findings. What only happens in a running program no command can show."""
    told = any(f.asked_by != PROGRAM and (f in shown or f.code == "disable-refused") for f in findings)
    return "; see `tfgpu explain`" if told else ""


def _find_worst(findings: tuple[Finding, ...]) -> Finding:
    return min(findings, key=lambda finding: finding.severity != "error")


def _shorten(text: str) -> str:
    """Return a text of one line that is not too long, cut between words. One long word is cut inside."""
    if len(text) <= _LONGEST_MESSAGE:
        return text
    words = text[: _LONGEST_MESSAGE + 1].rpartition(" ")[0]
    return f"{words.rstrip(' ,;:') or text[:_LONGEST_MESSAGE]} …"


def show_policy_line(text: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Print the line to stderr, unless it is empty, or this process or one above it did. Never raises."""
    if text:
        print_once(text, SHOWN_VARIABLE, environ)


def print_once(
    text: str, variable: str, environ: MutableMapping[str, str] = os.environ, *, subject: str | None = None
) -> None:
    """Print the line to stderr, unless this process or one above it in the same job printed the same one there.

    Args:
        text: The line.
        variable: Tells the children what was printed, and to which stderr.
        environ: The environment that they get.
        subject: Lines with the same subject count as the same. None: only equal lines do.
    """
    mark = _mark(f"{identify_job(environ)} {text if subject is None else subject}")
    shown = environ.get(variable, "").split(",")
    if mark not in shown:
        environ[variable] = ",".join([*filter(None, shown[-_MOST_MARKS:]), mark])
        print_to_stderr(text)


def _mark(text: str) -> str:
    """Return what stands for a line and the stderr it goes to: a terminal, a file or a pipe is told by its inode."""
    try:
        status = os.fstat(2)
        to = f"{status.st_dev}:{status.st_ino}"
    except OSError:
        to = ""
    return f"{crc32(f'{to} {text}'.encode(errors='replace')):08x}"


def print_to_stderr(text: str) -> None:
    """Print one line to stderr, if there is one: a daemon closed it, `pythonw` and some notebooks have None."""
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - what the program put in the place of stderr, sys.exit() even, is not worth its life
        return
