"""What is written down: one AuditRecord per event, one line of JSON of at most 4 KiB.

Pure, but for `Process.current` and the clock. Neither argv nor the environment is ever recorded, they hold
secrets; only the scheduler's ids named in `_SCHEDULER_IDS` are.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from typing import Any, Literal

from tfenv.errors import Finding
from tfenv.policy.model import (
    Choice,
    DeviceOutcome,
    EffectivePolicy,
    Grant,
    MemoryLimit,
    Outcome,
    Plan,
    PlannedDevice,
    Source,
    Subject,
)
from tfenv.values import field, frozen

__all__ = [
    "MAX_RECORD_BYTES",
    "AuditRecord",
    "Context",
    "EventName",
    "Level",
    "Process",
    "encode",
    "policy_applied",
    "policy_changed",
    "policy_clamped",
    "policy_disabled",
    "policy_failed",
    "policy_loaded",
    "policy_outcome",
    "stamp",
    "utc_now",
]

EventName = Literal[
    "policy_loaded", "policy_applied", "policy_clamped", "policy_failed", "policy_disabled", "policy_changed"
]
Level = Literal["info", "warning", "error"]

#: One record, its newline included: no write of this size is split on a local file system.
MAX_RECORD_BYTES = 4096
_FEWEST_CHARACTERS = 4

# An allowlist: a variable that is not here is never written down. JOB_ID is too common a name to mean
# Grid Engine by itself, and HOSTNAME is a pod only inside Kubernetes: see `_scheduler_ids`.
_SCHEDULER_IDS = (
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_PROCID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "LSB_JOBID",
    "LSB_JOBINDEX",
    "PBS_JOBID",
    "PBS_ARRAY_INDEX",
    "FLUX_JOB_ID",
    "RAY_JOB_ID",
)

# "timestamp" comes first: a reader finds the beginning of a record inside a damaged line by it.
_ORDER = (
    "timestamp",
    "event",
    "level",
    "host",
    "user",
    "uid",
    "pid",
    "ppid",
    "script",
    "python",
    "framework",
    "framework_version",
    "project",
    "status",
    "entry_point",
    "on_error",
    "visible",
    "grant",
    "devices",
    "limit_bytes",
    "limit_fraction",
    "growth",
    "choice",
    "asked",
    "given",
    "changes",
    "sources",
    "findings",
    "scheduler",
    "duration_ms",
    "lost",
    "truncated",
    "dropped",
)
_POSITION = {name: place for place, name in enumerate(_ORDER)}


def stamp(moment: datetime) -> str:
    """A moment in UTC, as records have it: "2026-11-05T09:31:07.123456Z". Of fixed width, so that it sorts as text."""
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def utc_now() -> str:
    """Now, as records have it."""
    return stamp(datetime.now(timezone.utc))


@frozen
class Process:
    """What a record says of the process it is about.

    Attributes:
        pid: Process id.
        ppid: The parent's.
        host: As the kernel names it; in Kubernetes this is the pod.
        script: Absolute path of the program that runs; None for `-c`, notebooks, interactive.
        python: Version of the interpreter: "3.11.7".
        framework: Top-level module the policy is for: "tensorflow".
        framework_version: None when it is not known yet.
        scheduler: Ids of the scheduler's job, by the name of the variable they came in.
    """

    pid: int
    ppid: int
    host: str
    script: str | None
    python: str
    framework: str | None = None
    framework_version: str | None = None
    scheduler: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def current(cls, framework: str | None = None, framework_version: str | None = None) -> Process:
        """The facts of the calling process."""
        return cls(
            pid=os.getpid(),
            ppid=os.getppid(),
            host=os.uname().nodename,
            script=_script(),
            python=".".join(str(part) for part in sys.version_info[:3]),
            framework=framework,
            framework_version=framework_version,
            scheduler=_scheduler_ids(os.environ),
        )


def _script() -> str | None:
    """The running program's file. Not sys.argv[0]: programs rewrite it, secrets included."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    if not isinstance(path, str):
        return None
    try:
        return os.path.abspath(path)
    except OSError:  # the working directory was deleted
        return path


def _scheduler_ids(environ: Mapping[str, str]) -> dict[str, str]:
    ids = {name: environ[name] for name in _SCHEDULER_IDS if environ.get(name)}
    if "SGE_ROOT" in environ and environ.get("JOB_ID"):
        ids["JOB_ID"] = environ["JOB_ID"]
    if "KUBERNETES_SERVICE_HOST" in environ and environ.get("HOSTNAME"):
        ids["KUBERNETES_POD"] = environ["HOSTNAME"]
    return {name: _clip(value, 64) for name, value in ids.items()}


@frozen
class Context:
    """What all records of one process have in common.

    Attributes:
        process: The process itself.
        subject: Whose it is; the user comes from the euid, never from $USER.
        grant: What the scheduler or the parent gave.
        sources: The files that were read.
        sha256: For each path in `sources` the hash of the bytes that were read, in hex.
    """

    process: Process
    subject: Subject
    grant: Grant = field(default_factory=Grant)
    sources: tuple[Source, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)


@frozen
class AuditRecord:
    """One event, as it will be written.

    Attributes:
        timestamp: When it happened (not when it was written), as `utc_now` gives it.
        event: What happened.
        level: "error": the policy is not in force. "warning": worth a look.
        fields: All other fields of schemas/audit.schema.json, as plain JSON values.
    """

    timestamp: str
    event: EventName
    level: Level
    fields: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The record with all its fields, in no particular order."""
        return {**self.fields, "timestamp": self.timestamp, "event": self.event, "level": self.level}


# ---- the events


def policy_loaded(
    context: Context,
    policy: EffectivePolicy,
    plan: Plan,
    findings: Iterable[Finding] = (),
    duration_ms: float | None = None,
) -> AuditRecord:
    """A policy was found, merged and planned, at the import of the framework."""
    wrong = (*findings, *plan.findings)
    return _record("policy_loaded", context, _plan_fields(policy, plan), wrong, duration_ms)


def policy_applied(context: Context, outcome: Outcome, duration_ms: float | None = None) -> AuditRecord:
    """Devices were created at an entry point as the policy and the program wanted."""
    return _passed("policy_applied", context, outcome, duration_ms)


def policy_clamped(context: Context, outcome: Outcome, duration_ms: float | None = None) -> AuditRecord:
    """The program asked for more than the policy allows and was given less."""
    return _passed("policy_clamped", context, outcome, duration_ms)


def policy_failed(
    context: Context,
    findings: Iterable[Finding] = (),
    policy: EffectivePolicy | None = None,
    outcome: Outcome | None = None,
    duration_ms: float | None = None,
) -> AuditRecord:
    """The policy is not in force; the findings say why, and `on_error` what followed."""
    passed = {} if outcome is None else _outcome_fields(outcome)
    stated = {} if policy is None else {"on_error": policy.on_error}
    wrong = (*findings, *(outcome.findings if outcome else ()))
    return _record("policy_failed", context, {**passed, **stated}, wrong, duration_ms)


def policy_disabled(context: Context, findings: Iterable[Finding] = ()) -> AuditRecord:
    """TFGPU_DISABLE=1 switched the policy off."""
    return _record("policy_disabled", context, {}, findings, None)


def policy_changed(
    context: Context,
    policy: EffectivePolicy,
    plan: Plan,
    changes: Iterable[Mapping[str, Any]],
    findings: Iterable[Finding] = (),
) -> AuditRecord:
    """Files changed; a process that starts from then on gets this policy.

    Args:
        context: Of the process that watches.
        policy: As it is now.
        plan: What follows from it for a process that starts where the watching one did.
        changes: What is another value now: `key`, `old`, `new`, `old_origin`, `new_origin`.
        findings: All that is wrong, those of the plan, too.
    """
    fields = {**_plan_fields(policy, plan), "changes": list(changes)}
    return _record("policy_changed", context, fields, findings, None)


def policy_outcome(context: Context, outcome: Outcome, duration_ms: float | None = None) -> AuditRecord:
    """The event that fits the outcome of an entry point."""
    if outcome.status in ("too_late", "failed", "cpu"):
        return policy_failed(context, outcome=outcome, duration_ms=duration_ms)
    make = policy_clamped if outcome.status == "clamped" else policy_applied
    return make(context, outcome, duration_ms)


def _passed(event: EventName, context: Context, outcome: Outcome, duration_ms: float | None) -> AuditRecord:
    return _record(event, context, _outcome_fields(outcome), outcome.findings, duration_ms)


def _record(
    event: EventName,
    context: Context,
    fields: Mapping[str, Any],
    findings: Iterable[Finding],
    duration_ms: float | None,
) -> AuditRecord:
    findings = tuple(findings)
    everything = {
        **_context_fields(context),
        **fields,
        "findings": [_finding_fields(finding) for finding in findings],
        **({} if duration_ms is None else {"duration_ms": round(duration_ms, 3)}),
    }
    degraded = fields.get("status") == "degraded"
    return AuditRecord(utc_now(), event, _level(event, findings, degraded), _plain_mapping(everything))


def _level(event: EventName, findings: Iterable[Finding], degraded: bool) -> Level:
    severities = {finding.severity for finding in findings}
    if event == "policy_failed" or "error" in severities:
        return "error"
    return "warning" if degraded or event == "policy_disabled" or "warning" in severities else "info"


# ---- the fields


def _context_fields(context: Context) -> dict[str, Any]:
    process, subject, tokens = context.process, context.subject, context.grant.tokens
    return {
        "host": process.host,
        "user": subject.user,
        "uid": subject.uid,
        "pid": process.pid,
        "ppid": process.ppid,
        "script": process.script,
        "python": process.python,
        "framework": process.framework,
        "framework_version": process.framework_version,
        "project": subject.project,
        "grant": None if tokens is None else list(tokens),
        "sources": [
            {"layer": source.layer, "path": source.path, "sha256": context.sha256.get(source.path)}
            for source in context.sources
        ],
        "scheduler": process.scheduler,
    }


def _plan_fields(policy: EffectivePolicy, plan: Plan) -> dict[str, Any]:
    return {
        "on_error": policy.on_error,
        "visible": plan.visible,
        "devices": None if plan.devices is None else _planned_devices(plan.devices),
        "growth": plan.growth,
        **_limit_fields(plan.limit),
    }


def _outcome_fields(outcome: Outcome) -> dict[str, Any]:
    return {
        "status": outcome.status,
        "entry_point": outcome.entry_point,
        "devices": [_outcome_device(device) for device in outcome.devices],
        "growth": outcome.growth,
        **({} if outcome.choice is None else {"choice": _choice_fields(outcome.choice)}),
        "asked": outcome.asked,
        "given": outcome.given,
    }


def _choice_fields(choice: Choice) -> dict[str, Any]:
    allocations = [
        {"uuid": allocation.uuid, "limit_bytes": allocation.limit, "shared": allocation.shared}
        for allocation in choice.allocations
    ]
    return {"allocations": allocations, "lease": choice.lease, "waited_ms": round(choice.waited_s * 1000, 3)}


def _outcome_device(device: DeviceOutcome) -> dict[str, Any]:
    return {
        "index": device.index,
        "token": device.token,
        "uuid": device.uuid,
        "name": device.name,
        "limit_bytes": device.limit,
        "limit_fraction": device.fraction,
        "logical_bytes": list(device.logical_devices),
    }


def _planned_devices(devices: Iterable[PlannedDevice]) -> list[dict[str, Any]]:
    """Numbered as TensorFlow will number them, so that a plan and its outcome can be compared."""
    return [
        {
            "index": index,
            "token": planned.token,
            "uuid": planned.device.uuid if planned.device else None,
            "name": planned.device.name if planned.device else None,
            **_limit_fields(planned.limit),
        }
        for index, planned in enumerate(devices)
    ]


def _limit_fields(limit: MemoryLimit | None) -> dict[str, Any]:
    return {
        "limit_bytes": limit.bytes if limit else None,
        "limit_fraction": limit.fraction if limit else None,
    }


def _finding_fields(finding: Finding) -> dict[str, Any]:
    fields = {
        "code": finding.code,
        "severity": finding.severity,
        "path": finding.path,
        "line": finding.line,
        "column": finding.column,
        "key": finding.key,
        "asked_by": finding.asked_by,
        "held_by": finding.held_by,
        "message": finding.message,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _plain_mapping(mapping: Mapping[Any, Any]) -> dict[str, Any]:
    return {_plain_text(str(key)): _plain(value) for key, value in mapping.items()}


def _plain(value: object) -> Any:
    """The value as JSON can hold it: what a program asked for may be anything."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)  # JSON knows neither NaN nor infinity
    if isinstance(value, Mapping):
        return _plain_mapping(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return _plain_text(str(value))


def _plain_text(text: str) -> str:
    # A file name that is not UTF-8 arrives with lone surrogates, which strict JSON readers refuse.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# ---- the line


def encode(fields: Mapping[str, Any]) -> bytes:
    """The record as one line: ASCII only, so that no name in it can break the line or colour a terminal.

    Args:
        fields: All fields of the record, as `AuditRecord.as_dict` gives them.

    Returns:
        At most MAX_RECORD_BYTES bytes, the newline included. What did not fit is shortened in the order
        of `_SHRINKING`; then `truncated` is true and `dropped` counts what is gone.
    """
    line = _dump(fields)
    if len(line) <= MAX_RECORD_BYTES:
        return line
    smaller: dict[str, Any] = {**json.loads(line), "truncated": True, "dropped": {}}
    for shrink in _SHRINKING:
        shrink(smaller)
        line = _dump(smaller)
        if len(line) <= MAX_RECORD_BYTES:
            break
    return line


def _dump(fields: Mapping[str, Any]) -> bytes:
    ordered = {name: fields[name] for name in sorted(fields, key=lambda name: _POSITION.get(name, len(_ORDER)))}
    return json.dumps(ordered, ensure_ascii=True, separators=(",", ":"), default=str).encode("ascii") + b"\n"


def _clip(text: str, size: int) -> str:
    """The text with its middle left out, so that it takes at most about `size` bytes of JSON."""
    keep, clipped = len(text), text
    while keep > _FEWEST_CHARACTERS and len(json.dumps(clipped)) > size + 2:
        keep = min(keep * 3 // 4, size)
        clipped = f"{text[: keep // 2]}...{text[-(keep // 2) :]}"
    return clipped


def _keep(name: str, count: int) -> Callable[[dict[str, Any]], None]:
    """Leave only the first `count` entries of the list or mapping `name`, and count the others."""

    def shrink(fields: dict[str, Any]) -> None:
        entries = fields.get(name)
        if not isinstance(entries, (list, dict)) or len(entries) <= count:
            return
        fields["dropped"][name] = fields["dropped"].get(name, 0) + len(entries) - count
        fields[name] = entries[:count] if isinstance(entries, list) else dict(list(entries.items())[:count])

    return shrink


def _clip_entries(name: str, size: int, *keys: str) -> Callable[[dict[str, Any]], None]:
    """Clip the texts (of these keys; all without keys) of every entry of the list `name`."""

    def shrink(fields: dict[str, Any]) -> None:
        for entry in fields.get(name) or ():
            for key in keys or tuple(entry):
                if isinstance(entry.get(key), str):
                    entry[key] = _clip(entry[key], size)

    return shrink


def _clip_texts(size: int) -> Callable[[dict[str, Any]], None]:
    """Clip every text at the top of the record, and the scheduler's ids."""

    def shrink(fields: dict[str, Any]) -> None:
        for holder in (fields, fields.get("scheduler") or {}):
            holder.update({key: _clip(value, size) for key, value in holder.items() if isinstance(value, str)})

    return shrink


# What is dearest to a reader goes last: who, what, which GPUs and limits stay to the end.
_SHRINKING: tuple[Callable[[dict[str, Any]], None], ...] = (
    _clip_entries("findings", 120, "message"),
    _keep("findings", 8),
    _keep("findings", 2),
    _keep("sources", 2),
    _keep("asked", 0),
    _keep("given", 0),
    _keep("changes", 8),
    _clip_entries("changes", 256),
    _keep("changes", 4),
    _clip_texts(256),
    _clip_entries("sources", 128),
    _clip_entries("findings", 128),
    _keep("grant", 16),
    _keep("devices", 8),
    _clip_entries("devices", 64),
    _keep("sources", 0),
    _keep("findings", 1),
    _keep("grant", 0),
    _keep("changes", 0),
    _clip_texts(80),
    _keep("devices", 0),
    _keep("findings", 0),
)
