"""What a job did with its GPUs: its processes, their limits and peaks, and what they did not get. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, TypeVar

from tfenv.audit.gpu_totals import read_use
from tfenv.audit.job_names import read_job
from tfenv.audit.query import LoggedRecord, list_logged_devices
from tfenv.audit.record import format_timestamp
from tfenv.policy.units import format_bytes
from tfenv.values import as_dict, frozen, replace

#: Events that tell of a process that used a GPU, or was to be kept from it. A mere import is none.
_EVENTS = frozenset({"policy_applied", "policy_clamped", "policy_failed", "policy_disabled", "policy_ended"})
_MINUTE, _HOUR = 60, 3600
_Number = TypeVar("_Number", int, float)
_SWITCHED_OFF = "TFGPU_DISABLE switched the policy off"


@frozen
class JobGpu:
    """One GPU, as one process of the job used it.

    Attributes:
        gpu: Its UUID, or else its entry in CUDA_VISIBLE_DEVICES.
        name: Product name. None: it is not known.
        limit_bytes: What the process might take of it. None: unlimited, or known as a fraction only.
        limit_fraction: The limit as a fraction of the card's memory, where it is not known in bytes.
        peak_bytes: The most that the process held. None: it goes on, was killed, or the framework does not tell.
    """

    gpu: str
    name: str | None = None
    limit_bytes: int | None = None
    limit_fraction: float | None = None
    peak_bytes: int | None = None

    @property
    def part(self) -> float | None:
        """The peak as a part of the limit. None: one of them is not known."""
        return self.peak_bytes / self.limit_bytes if self.peak_bytes is not None and self.limit_bytes else None


@frozen
class JobProcess:
    """One process of the job.

    Attributes:
        job: Its job, by the names of the record's `job`.
        host: The machine's name.
        pid: Process id.
        user: Whose it is.
        script: Its program. None: `-c`, a notebook.
        began: When it started. Where it has not ended: when its first record was made.
        ended: When it ended. None: it goes on, or was killed.
        gpus: What it used, as the framework counts.
        cut: What it, or a file, asked for and did not get.
        failed: Why the policy was not in force.
    """

    job: Mapping[str, str]
    host: str
    pid: int
    user: str
    script: str | None
    began: str
    ended: str | None = None
    gpus: tuple[JobGpu, ...] = ()
    cut: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    @property
    def seconds(self) -> float | None:
        """How long it ran. None: it has not ended, or was killed."""
        return None if self.ended is None else _count_seconds(self.began, self.ended)

    @property
    def role(self) -> str:
        """What it is inside of its step: a rank, an actor or a task. "" where nothing tells."""
        rank = self.job.get("rank")
        return self.job.get("actor") or self.job.get("task") or (f"rank {rank}" if rank else "")


@frozen
class JobReport:
    """What a job did.

    Attributes:
        job: Its name, as it was asked for.
        processes: Those that used GPUs or were to be kept from them, by their start.
    """

    job: str
    processes: tuple[JobProcess, ...] = ()

    @property
    def gpus(self) -> tuple[str, ...]:
        """The cards that the job used, each once."""
        return tuple(dict.fromkeys(gpu.gpu for process in self.processes for gpu in process.gpus))

    @property
    def seconds(self) -> float | None:
        """From the first process's start to the last one's end. None: one has not ended, or was killed."""
        ends = [process.ended for process in self.processes if process.ended is not None]
        if not ends or len(ends) < len(self.processes):
            return None
        return _count_seconds(min(process.began for process in self.processes), max(ends))

    @property
    def fullest(self) -> JobGpu | None:
        """The GPU whose peak came nearest to its limit. Without limits, the one with the highest peak."""
        gpus = [gpu for process in self.processes for gpu in process.gpus if gpu.peak_bytes is not None]
        return max(gpus, key=lambda gpu: (gpu.part or 0, gpu.peak_bytes or 0), default=None)

    @property
    def cut(self) -> tuple[str, ...]:
        """What processes or files asked for and did not get, each once."""
        return tuple(dict.fromkeys(text for process in self.processes for text in process.cut))

    @property
    def failed(self) -> tuple[str, ...]:
        """Why the policy was not in force in some process, each reason once."""
        return tuple(dict.fromkeys(text for process in self.processes for text in process.failed))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        processes = [{**as_dict(process), "seconds": process.seconds} for process in self.processes]
        return {"job": self.job, "seconds": self.seconds, "gpus": list(self.gpus), "processes": processes}


# ---- making it


def make_job_report(job: str, records: Iterable[LoggedRecord]) -> JobReport:
    """Make the report of a job.

    Args:
        job: Its name, as it was asked for.
        records: Its records, in any order. Those of other jobs count as well.
    """
    by_process: dict[tuple[object, ...], list[LoggedRecord]] = {}
    for record in records:
        if record["event"] in _EVENTS:
            key = tuple(str(record.get(name)) for name in ("host", "pid", "start_ticks"))
            by_process.setdefault(key, []).append(record)
    processes = [_make_process(sorted(several, key=_get_timestamp)) for several in by_process.values()]
    return JobReport(job, tuple(sorted(processes, key=lambda process: (process.began, process.pid))))


def _get_timestamp(record: LoggedRecord) -> str:
    return str(record["timestamp"])


def _make_process(records: list[LoggedRecord]) -> JobProcess:
    first = records[0]
    end = next((record for record in reversed(records) if record["event"] == "policy_ended"), None)
    pid, script = first.get("pid"), first.get("script")
    gpus = {(record.get("framework"), gpu.gpu): gpu for record in records for gpu in _list_gpus(record)}
    return JobProcess(
        job=read_job(first),
        host=str(first.get("host")),
        pid=pid if isinstance(pid, int) else 0,
        user=str(first.get("user")),
        script=script if isinstance(script, str) else None,
        began=_get_timestamp(first) if end is None else _find_start(end),
        ended=None if end is None else _get_timestamp(end),
        gpus=_add_up_frameworks(gpus.values()),
        cut=tuple(dict.fromkeys(text for record in records for text in _list_cut(record))),
        failed=tuple(dict.fromkeys(text for record in records for text in _list_failures(record))),
    )


def _find_start(end: LoggedRecord) -> str:
    duration, ended = end.get("duration_ms"), _parse_seconds(_get_timestamp(end))
    if not isinstance(duration, int | float) or not 0 <= duration / 1000 < ended:
        return _get_timestamp(end)
    return format_timestamp(datetime.fromtimestamp(ended - duration / 1000).astimezone())


def _list_gpus(record: LoggedRecord) -> Iterator[JobGpu]:
    for place, device in enumerate(list_logged_devices(record)):
        use, name, peak = read_use(record, place, device), device.get("name"), device.get("peak_bytes")
        yield JobGpu(
            use.gpu,
            name if isinstance(name, str) else None,
            use.given_bytes,
            use.given_fraction,
            peak if type(peak) is int else None,
        )


def _add_up_frameworks(gpus: Iterable[JobGpu]) -> tuple[JobGpu, ...]:
    """Return each GPU once, with what all frameworks of a process were given of it, and their peaks together.

    Peaks at different times count as if they were at one. So the sum is the most that the process can have held.
    """
    cards: dict[str, JobGpu] = {}
    for gpu in gpus:
        other = cards.get(gpu.gpu)
        cards[gpu.gpu] = (
            gpu
            if other is None
            else replace(
                other,
                limit_bytes=_add(other.limit_bytes, gpu.limit_bytes),
                limit_fraction=_add(other.limit_fraction, gpu.limit_fraction),
                peak_bytes=_add(other.peak_bytes, gpu.peak_bytes),
            )
        )
    return tuple(cards.values())


def _add(one: _Number | None, other: _Number | None) -> _Number | None:
    return None if one is None or other is None else one + other


def _list_cut(record: LoggedRecord) -> Iterator[str]:
    if record["event"] != "policy_clamped":
        return
    for finding in _list_findings(record):
        asked, given = finding.get("asked"), finding.get("given")
        if isinstance(asked, str):
            yield f"{asked} (got {given})" if isinstance(given, str) else asked


def _list_failures(record: LoggedRecord) -> Iterator[str]:
    if record["event"] == "policy_disabled":
        yield _SWITCHED_OFF
    if record["event"] == "policy_failed":
        errors = [finding for finding in _list_findings(record) if finding.get("severity") == "error"]
        yield from (str(finding.get("message")) for finding in errors)


def _list_findings(record: LoggedRecord) -> list[Mapping[str, Any]]:
    findings = record.get("findings")
    return [finding for finding in findings if isinstance(finding, dict)] if isinstance(findings, list) else []


def _count_seconds(began: str, ended: str) -> float:
    return round(_parse_seconds(ended) - _parse_seconds(began), 3)


def _parse_seconds(timestamp: str) -> float:
    try:
        return datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp()
    except ValueError:  # of another program
        return 0.0


# ---- saying it


def format_job_lines(report: JobReport) -> tuple[str, ...]:
    """Return one line on what the job used, and one on what it did not get, if there is such a thing.

    They hold what others wrote into a log: escape them for a terminal.
    """
    if not report.processes:
        return (f"job {report.job}: no process used a GPU under a policy",)
    parts = [
        _count(len(report.gpus), "GPU") if report.gpus else "no GPU",
        _format_highest(report.fullest),
        _count(len(report.processes), "process", "processes"),
        "" if report.seconds is None else format_duration(report.seconds),
    ]
    lines = [f"job {report.job}: {', '.join(filter(None, parts))}"]
    for title, texts in (("not in force", report.failed), ("asked for more", report.cut)):
        if texts:
            first, *others = texts
            more = f" and {len(others)} more" if others else ""
            lines.append(f"job {report.job}: {title}: {first}{more}")
    return tuple(lines[:2])


def _count(number: int, one: str, several: str = "") -> str:
    return f"1 {one}" if number == 1 else f"{number} {several or f'{one}s'}"


def _format_highest(gpu: JobGpu | None) -> str:
    return "" if gpu is None else f"peak {format_peak(gpu)}"


def format_peak(gpu: JobGpu) -> str:
    """Return the peak, and how much of the limit that is: "7.1 GiB of 8.0 GiB (89%)". "" where it is not known."""
    if gpu.peak_bytes is None:
        return ""
    peak = format_bytes(gpu.peak_bytes)
    if gpu.limit_bytes is None or gpu.part is None:
        return peak
    return f"{peak} of {format_bytes(gpu.limit_bytes)} ({gpu.part:.0%})"


def format_duration(seconds: float) -> str:
    """Return a time for people, of two units at most: "1h 12min", "12min 3s", "3.2s"."""
    if seconds < _MINUTE:
        return f"{max(0.0, seconds):.1f}s"
    whole = round(seconds)
    if whole < _HOUR:
        return f"{whole // _MINUTE}min {whole % _MINUTE}s"
    return f"{whole // _HOUR}h {whole % _HOUR // _MINUTE}min"
