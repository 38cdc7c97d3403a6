"""What is written to the audit log: one AuditRecord per event, one line of JSON of at most 4 KiB.

Pure, apart from `ProcessFacts.collect` and the clock. Neither argv nor the environment is ever recorded, because they
hold secrets. Only what `JOB_FIELDS` names is taken from it.
"""

from __future__ import annotations

import json  # here, not where it is used: a program may have changed its user or its root by then
import os
import sys
import time
from collections.abc import Mapping

from tfenv.policy.model import Grant, format_key, format_origins
from tfenv.values import as_dict, field, frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime
    from typing import Any, Literal

    from tfenv.errors import Finding
    from tfenv.policy.model import (
        Choice,
        DatedTable,
        DeviceOutcome,
        EffectivePolicy,
        MemoryLimit,
        Outcome,
        Plan,
        PlannedDevice,
        Share,
        Source,
        Subject,
        WouldClamp,
    )

    EventName = Literal[
        "policy_loaded",
        "policy_applied",
        "policy_clamped",
        "policy_failed",
        "policy_disabled",
        "policy_changed",
        "policy_ended",
        "wall_changed",
    ]
    Level = Literal["info", "warning", "error"]

#: One record, its newline included: no write of this size is split on a local file system.
MAX_RECORD_BYTES = 4096
_FEWEST_CHARACTERS = 4
_LONGEST_JOB_BYTES = 128

#: What a record says of its job: an allowlist of the names in `Grant.job`.
JOB_FIELDS = (
    "scheduler", "id", "array_id", "array_task", "step", "rank", "partition", "user", "name", "ray_job", "actor",
    "task", "notebook", "hub_user", "pod", "namespace",
)  # fmt: skip

# "timestamp" comes first: a reader finds the beginning of a record inside a damaged line by it.
_ORDER = (
    "timestamp", "event", "level", "host", "user", "uid", "groups", "pid", "ppid", "start_ticks", "script",
    "python", "framework", "framework_version", "project", "status", "entry_point", "on_error", "visible",
    "launcher", "grant", "devices", "limit_bytes", "limit_fraction", "share", "growth", "repeats", "choice", "cut",
    "asked", "given", "would_clamp", "cgroup", "limited_user", "backend", "cgroup_limits", "changes",
    "policy_revision", "exceptions", "sources", "findings", "job", "duration_ms", "lost", "truncated", "dropped",
)  # fmt: skip
_SECONDS_FORMAT = "%Y-%m-%dT%H:%M:%S"


def format_timestamp(moment: datetime) -> str:
    """Write a moment as records have it: "2026-11-05T09:31:07.123456Z", in UTC. Of fixed width, so it sorts as text."""
    from datetime import timezone

    return moment.astimezone(timezone.utc).strftime(f"{_SECONDS_FORMAT}.%fZ")


def make_timestamp() -> str:
    """Return the current time as records have it. Without `datetime`, which takes longer to load."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return f"{time.strftime(_SECONDS_FORMAT, time.gmtime(seconds))}.{nanoseconds // 1000:06}Z"


@frozen
class ProcessFacts:
    """What a record says of the process it is about.

    Attributes:
        pid: Process id.
        ppid: The parent's.
        start_ticks: When it started, in clock ticks since the machine did. None: the kernel does not say.
        host: As the kernel names it. In Kubernetes this is the pod.
        script: Absolute path of the program that runs. None for `-c`, notebooks, interactive.
        python: Version of the interpreter: "3.11.7".
        framework: Top-level package the policy is for: "tensorflow".
        framework_version: None when it is not known yet.
    """

    pid: int
    ppid: int
    host: str
    script: str | None
    python: str
    framework: str | None = None
    framework_version: str | None = None
    start_ticks: int | None = None

    @classmethod
    def collect(cls, framework: str | None = None, framework_version: str | None = None) -> ProcessFacts:
        """Return the facts of the calling process."""
        return cls(
            pid=os.getpid(),
            ppid=os.getppid(),
            host=os.uname().nodename,
            script=_find_script(),
            python=".".join(str(part) for part in sys.version_info[:3]),
            framework=framework,
            framework_version=framework_version,
            start_ticks=_read_start_ticks(),
        )


def _read_start_ticks() -> int | None:
    try:
        with open("/proc/self/stat", "rb") as file:
            # The name, in parentheses, may hold blanks and parentheses. Of what follows it, the twentieth field.
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _find_script() -> str | None:
    """Return the running program's file. Not sys.argv[0]: programs rewrite it, secrets included."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    if not isinstance(path, str):
        return None
    try:
        return os.path.abspath(path)
    except OSError:  # the working directory was deleted
        return path


def clip_job_text(text: str) -> str:
    """Return a value of the job as a record has it: the middle of a long one is left out."""
    return _clip(_replace_surrogates(text), _LONGEST_JOB_BYTES)


def _describe_job(job: Mapping[str, str]) -> dict[str, str]:
    return {name: clip_job_text(job[name]) for name in JOB_FIELDS if job.get(name)}


@frozen
class RecordContext:
    """What all records of one process have in common.

    Attributes:
        process: The process itself.
        subject: Whose it is. The user comes from the euid, never from $USER.
        grant: What the scheduler or the parent gave, and in which job.
        sources: The files that were read.
        sha256: For each path in `sources` the hash of the bytes that were read, in hex.
        revision: The name of this version of the machine's policy. None: there is no machine-wide file.
        exceptions: The tables with an end or a reason that count for this subject.
    """

    process: ProcessFacts
    subject: Subject
    grant: Grant = field(default_factory=Grant)
    sources: tuple[Source, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    exceptions: tuple[DatedTable, ...] = ()


@frozen
class AuditRecord:
    """One event, as it will be written.

    Attributes:
        timestamp: When it happened (not when it was written), as `make_timestamp` gives it.
        event: What happened.
        level: "error": the policy is not in force. "warning": worth a look.
        fields: All other fields of schemas/audit.schema.json, as plain JSON values.
    """

    timestamp: str
    event: EventName
    level: Level
    fields: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the record with all its fields, in no particular order."""
        return {**self.fields, "timestamp": self.timestamp, "event": self.event, "level": self.level}


# ---- the events


def make_loaded_record(
    context: RecordContext,
    policy: EffectivePolicy,
    plan: Plan,
    findings: Iterable[Finding] = (),
    duration_ms: float | None = None,
) -> AuditRecord:
    """Make the record `policy_loaded`: a policy was found, merged and planned, at the import of the framework."""
    all_findings = (*findings, *plan.findings)
    return _make_record("policy_loaded", context, _describe_plan(policy, plan), all_findings, duration_ms)


def make_outcome_record(
    context: RecordContext, outcome: Outcome, duration_ms: float | None = None, *, repeats: int = 1
) -> AuditRecord:
    """Make the record of an entry point that was passed: `policy_applied`, `policy_clamped` or `policy_failed`.

    Args:
        context: Of the process.
        outcome: What happened. Its status decides the event.
        duration_ms: How long tfenv took for it, in milliseconds.
        repeats: How many times it happened since the last record of it.
    """
    if outcome.status in ("too_late", "failed", "cpu"):
        return make_failed_record(context, outcome=outcome, duration_ms=duration_ms, repeats=repeats)
    event: EventName = "policy_clamped" if outcome.status == "clamped" else "policy_applied"
    fields = {**_describe_outcome(outcome), **_describe_repeats(repeats), **_describe_cut(outcome)}
    return _make_record(event, context, fields, outcome.findings, duration_ms)


def _describe_cut(outcome: Outcome) -> dict[str, Any]:
    names = {finding.asked.partition(" = ")[0] for finding in outcome.findings if finding.asked is not None}
    return {"cut": sorted(names)} if names and outcome.status == "clamped" else {}


def _describe_repeats(repeats: int) -> dict[str, Any]:
    return {} if repeats == 1 else {"repeats": repeats}


def make_failed_record(
    context: RecordContext,
    findings: Iterable[Finding] = (),
    policy: EffectivePolicy | None = None,
    outcome: Outcome | None = None,
    duration_ms: float | None = None,
    *,
    repeats: int = 1,
) -> AuditRecord:
    """Make the record `policy_failed`: the policy is not in force.

    Args:
        context: Of the process.
        findings: Why. Those of the outcome are added.
        policy: Its `on_error` says what followed. None: it is not known.
        outcome: What happened at an entry point. None: none was passed.
        duration_ms: How long tfenv took for it, in milliseconds.
        repeats: How many times it happened since the last record of it.
    """
    fields = {**({} if outcome is None else _describe_outcome(outcome)), **_describe_repeats(repeats)}
    if policy is not None:
        fields["on_error"] = policy.on_error
    all_findings = (*findings, *(outcome.findings if outcome else ()))
    return _make_record("policy_failed", context, fields, all_findings, duration_ms)


def make_disabled_record(context: RecordContext, findings: Iterable[Finding] = ()) -> AuditRecord:
    """Make the record `policy_disabled`: TFGPU_DISABLE=1 switched the policy off."""
    return _make_record("policy_disabled", context, {}, findings)


def make_changed_record(
    context: RecordContext,
    policy: EffectivePolicy,
    plan: Plan,
    changes: Iterable[Mapping[str, Any]],
    findings: Iterable[Finding] = (),
) -> AuditRecord:
    """Make the record `policy_changed`: files changed, and a process that starts from then on gets this policy.

    Args:
        context: Of the process that watches.
        policy: As it is now.
        plan: What follows from it for a process that starts where the watching one did.
        changes: What is another value now: `key`, `old`, `new`, `old_origin`, `new_origin`.
        findings: All that is wrong, those of the plan, too.
    """
    return _make_record("policy_changed", context, {**_describe_plan(policy, plan), "changes": list(changes)}, findings)


def make_ended_record(
    context: RecordContext, devices: Iterable[tuple[DeviceOutcome, int | None]], duration_ms: float | None
) -> AuditRecord:
    """Make the record `policy_ended`: a process that created devices ends.

    Args:
        context: Of the process.
        devices: All that it created, each with the most bytes that it held of it. None: the framework does not tell.
        duration_ms: How long the process ran. None: it is not known.
    """
    described = [
        {**_describe_device_outcome(device), **({} if peak is None else {"peak_bytes": peak})}
        for device, peak in devices
    ]
    return _make_record("policy_ended", context, {"devices": described}, (), duration_ms)


def make_wall_record(
    context: RecordContext,
    cgroup: str,
    user: str | None,
    backend: str,
    limits: Iterable[tuple[str, int | None, int | None]],
) -> AuditRecord:
    """Make the record `wall_changed`: the driver keeps other limits for a cgroup from now on.

    Args:
        context: Of the process that set them.
        cgroup: Its full path.
        user: Whose policy says so. None: they were given by hand.
        backend: Who counts, "dmem" or "misc".
        limits: UUID of each GPU that changed, and its limit in bytes before and after. None: no limit.
    """
    fields = {
        "cgroup": cgroup,
        **({} if user is None else {"limited_user": user}),
        "backend": backend,
        "cgroup_limits": [{"uuid": uuid, "before_bytes": old, "after_bytes": new} for uuid, old, new in limits],
    }
    return _make_record("wall_changed", context, fields, ())


def _make_record(
    event: EventName,
    context: RecordContext,
    fields: Mapping[str, Any],
    findings: Iterable[Finding],
    duration_ms: float | None = None,
) -> AuditRecord:
    findings = tuple(findings)
    everything = {
        **_describe_context(context),
        **fields,
        "findings": [_describe_finding(finding) for finding in findings],
        **({} if duration_ms is None else {"duration_ms": round(duration_ms, 3)}),
    }
    level = _choose_level(event, findings, degraded=fields.get("status") == "degraded")
    return AuditRecord(make_timestamp(), event, level, _simplify_mapping(everything))


def _choose_level(event: EventName, findings: Iterable[Finding], *, degraded: bool) -> Level:
    severities = {finding.severity for finding in findings}
    if event == "policy_failed" or "error" in severities:
        return "error"
    return "warning" if degraded or event == "policy_disabled" or "warning" in severities else "info"


# ---- the fields


def _describe_context(context: RecordContext) -> dict[str, Any]:
    process, subject, grant = context.process, context.subject, context.grant
    given = grant.tokens if grant.listed is None else grant.listed
    job = _describe_job(grant.job)
    return {
        "host": process.host,
        "user": subject.user,
        "uid": subject.uid,
        "groups": list(subject.groups),
        "pid": process.pid,
        "ppid": process.ppid,
        **({} if process.start_ticks is None else {"start_ticks": process.start_ticks}),
        "script": process.script,
        "python": process.python,
        "framework": process.framework,
        "framework_version": process.framework_version,
        "project": subject.project,
        **({"launcher": grant.launcher} if grant.launcher else {}),
        "grant": None if given is None else list(given),
        "sources": [
            {"layer": source.layer, "path": source.path, "sha256": context.sha256.get(source.path)}
            for source in context.sources
        ],
        **({} if context.revision is None else {"policy_revision": context.revision}),
        **({"exceptions": list(map(_describe_exception, context.exceptions))} if context.exceptions else {}),
        **({"job": job} if job else {}),
    }


def _describe_exception(dated: DatedTable) -> dict[str, Any]:
    return {
        "table": format_key(dated.origin.key),
        "path": dated.origin.path,
        **({} if dated.expires is None else {"expires": dated.expires}),
        **({"reason": dated.reason} if dated.reason else {}),
    }


def _describe_plan(policy: EffectivePolicy, plan: Plan) -> dict[str, Any]:
    return {
        "on_error": policy.on_error,
        "visible": plan.visible,
        "devices": None if plan.devices is None else _describe_planned_devices(plan.devices),
        "growth": plan.growth,
        **_describe_limit(plan.limit),
        **({} if plan.share is None else {"share": _describe_share(plan.share)}),
    }


def _describe_share(share: Share) -> dict[str, Any]:
    return {"launcher": share.giver, "given": share.text, "fraction": share.fraction}


def _describe_outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "status": outcome.status,
        "entry_point": outcome.entry_point,
        "devices": [_describe_device_outcome(device) for device in outcome.devices],
        "growth": outcome.growth,
        **({} if outcome.choice is None else {"choice": _describe_choice(outcome.choice)}),
        "asked": outcome.asked,
        "given": outcome.given,
        **({"would_clamp": list(map(_describe_would_clamp, outcome.would_clamp))} if outcome.would_clamp else {}),
    }


def _describe_would_clamp(lost: WouldClamp) -> dict[str, Any]:
    return {
        "key": lost.key,
        "gpu": lost.gpu,
        "asked": lost.asked,
        "given": lost.given,
        **({} if lost.asked_bytes is None else {"asked_bytes": lost.asked_bytes}),
        **({} if lost.given_bytes is None else {"given_bytes": lost.given_bytes}),
        "held_by": format_origins(lost.held_by),
    }


def _describe_choice(choice: Choice) -> dict[str, Any]:
    allocations = [
        {"uuid": allocation.uuid, "limit_bytes": allocation.limit, "shared": allocation.shared}
        for allocation in choice.allocations
    ]
    return {"allocations": allocations, "lease": choice.lease, "waited_ms": round(choice.waited_s * 1000, 3)}


def _describe_device_outcome(device: DeviceOutcome) -> dict[str, Any]:
    return {
        "index": device.index,
        "token": device.token,
        "uuid": device.uuid,
        "name": device.name,
        "limit_bytes": device.limit,
        "limit_fraction": device.fraction,
        **({} if device.total is None else {"total_bytes": device.total}),
        **({} if device.wall is None else {"wall_bytes": device.wall}),
        "logical_bytes": list(device.logical_devices),
        **({} if device.asked is None else {"asked_bytes": device.asked}),
        **({} if device.asked_fraction is None else {"asked_fraction": device.asked_fraction}),
    }


def _describe_planned_devices(devices: Iterable[PlannedDevice]) -> list[dict[str, Any]]:
    """Describe the devices as the framework will number them, so that a plan and its outcome can be compared."""
    return [
        {
            "index": index,
            "token": planned.token,
            "uuid": planned.device.uuid if planned.device else None,
            "name": planned.device.name if planned.device else None,
            **({} if planned.total is None else {"total_bytes": planned.total}),
            **_describe_wall(planned),
            **_describe_limit(planned.limit),
        }
        for index, planned in enumerate(devices)
    ]


def _describe_wall(planned: PlannedDevice) -> dict[str, Any]:
    wall = None if planned.device is None else planned.device.wall
    return {} if wall is None else {"wall_bytes": wall.limit}


def _describe_limit(limit: MemoryLimit | None) -> dict[str, Any]:
    return {"limit_bytes": limit.bytes if limit else None, "limit_fraction": limit.fraction if limit else None}


def _describe_finding(finding: Finding) -> dict[str, Any]:
    fields = as_dict(finding)
    fields["message"] = fields.pop("message")  # the longest comes last, for whoever reads the line itself
    return {name: value for name, value in fields.items() if value is not None}


def _simplify_mapping(mapping: Mapping[Any, Any]) -> dict[str, Any]:
    return {_replace_surrogates(str(key)): _simplify(value) for key, value in mapping.items()}


def _simplify(value: object) -> Any:
    """Return the value as JSON can hold it: what a program asked for may be anything."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)  # JSON knows neither NaN nor infinity
    if isinstance(value, Mapping):
        return _simplify_mapping(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_simplify(item) for item in value]
    return _replace_surrogates(str(value))


def _replace_surrogates(text: str) -> str:
    # A file name that is not UTF-8 arrives with lone surrogates, which strict JSON readers refuse.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# ---- the line


def encode_record(fields: Mapping[str, Any]) -> bytes:
    """Write the record as one line: ASCII only, so that no name in it can break the line or colour a terminal.

    Args:
        fields: All fields of the record, as `AuditRecord.as_dict` gives them.

    Returns:
        At most MAX_RECORD_BYTES bytes, the newline included. What did not fit is shortened in the order
        of `_SHRINKING`. Then `truncated` is true and `dropped` counts what is gone.
    """
    line = _encode_line(fields)
    if len(line) <= MAX_RECORD_BYTES:
        return line
    smaller: dict[str, Any] = {**json.loads(line), "truncated": True, "dropped": {}}
    for shrink, *arguments in _SHRINKING:
        shrink(smaller, *arguments)
        line = _encode_line(smaller)
        if len(line) <= MAX_RECORD_BYTES:
            break
    return line


def _encode_line(fields: Mapping[str, Any]) -> bytes:
    ordered = {name: fields[name] for name in _ORDER if name in fields}
    return _dump({**ordered, **fields}).encode("ascii") + b"\n"


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), default=str)


def _clip(text: str, size: int) -> str:
    """Leave out the middle of a text, so that it takes at most about `size` bytes of JSON."""
    keep, clipped = len(text), text
    while keep > _FEWEST_CHARACTERS and len(_dump(clipped)) > size + 2:
        keep = min(keep * 3 // 4, size)
        clipped = f"{text[: keep // 2]}...{text[-(keep // 2) :]}"
    return clipped


def _keep_first(fields: dict[str, Any], name: str, count: int) -> None:
    """Leave only the first `count` entries of the list or mapping `name`, and count the others."""
    entries = fields.get(name)
    if isinstance(entries, (list, dict)) and len(entries) > count:
        fields["dropped"][name] = fields["dropped"].get(name, 0) + len(entries) - count
        fields[name] = entries[:count] if isinstance(entries, list) else dict(list(entries.items())[:count])


def _clip_entries(fields: dict[str, Any], name: str, size: int, *keys: str) -> None:
    """Clip the texts of every entry of the list `name`: those of the given keys, or all of them."""
    for entry in fields.get(name) or ():
        for key in keys or tuple(entry):
            if isinstance(entry.get(key), str):
                entry[key] = _clip(entry[key], size)


def _clip_texts(fields: dict[str, Any], size: int) -> None:
    """Clip every text at the top of the record, and those of the job."""
    for holder in (fields, fields.get("job") or {}):
        holder.update({key: _clip(value, size) for key, value in holder.items() if isinstance(value, str)})


# What is dearest to a reader goes last: who, what, which GPUs and limits stay to the end.
_SHRINKING: tuple[tuple[Any, ...], ...] = (
    (_clip_entries, "findings", 120, "message"),
    (_keep_first, "findings", 8),
    (_keep_first, "findings", 2),
    (_keep_first, "sources", 2),
    (_keep_first, "asked", 0),
    (_keep_first, "given", 0),
    (_keep_first, "changes", 8),
    (_clip_entries, "changes", 256),
    (_keep_first, "changes", 4),
    (_clip_texts, 256),
    (_clip_entries, "sources", 128),
    (_clip_entries, "findings", 128),
    (_keep_first, "groups", 16),
    (_keep_first, "grant", 16),
    (_keep_first, "devices", 8),
    (_keep_first, "cgroup_limits", 32),
    (_clip_entries, "devices", 64),
    (_keep_first, "would_clamp", 8),
    (_clip_entries, "would_clamp", 128),
    (_keep_first, "exceptions", 4),
    (_clip_entries, "exceptions", 128),
    (_keep_first, "sources", 0),
    (_keep_first, "findings", 1),
    (_keep_first, "grant", 0),
    (_keep_first, "groups", 0),
    (_keep_first, "exceptions", 0),
    (_keep_first, "changes", 0),
    (_clip_texts, 80),
    (_keep_first, "cut", 0),
    (_keep_first, "would_clamp", 0),
    (_keep_first, "devices", 0),
    (_keep_first, "findings", 0),
)
