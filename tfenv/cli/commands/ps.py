"""`tfgpu ps`: who uses which GPU, how much of it, and under which policy."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from tfenv.audit.job_names import format_step, read_job
from tfenv.audit.query import LoggedRecord
from tfenv.cli.display import add_display_options, show_snapshots
from tfenv.cli.output import FINDINGS, OK, add_description, shorten_path
from tfenv.cli.process_records import UserRecords, read_user_records
from tfenv.cli.tables import StyledText, TableColumn, build_report, build_table, hide_empty_column, is_wide
from tfenv.cli.trends import TrendColumn, Trends, add_trend_columns
from tfenv.devices import nvml
from tfenv.devices.usage import GpuProcess, GpuUsage, describe_process, read_usage
from tfenv.pipeline import current_start, load
from tfenv.policy.model import Lease, Wall
from tfenv.policy.units import MIB, format_bytes
from tfenv.sharing.lease import read_leases
from tfenv.values import frozen

if TYPE_CHECKING:
    from rich.console import RenderableType

#: "unknown": the user's audit log cannot be read from here. "ungoverned": it can, and has no record of the process.
State = Literal["within", "over", "ungoverned", "switched off", "failed", "unknown"]

_COLUMNS = (
    TableColumn("GPU"), TableColumn("user"), TableColumn("pid", is_number=True), TableColumn("job"),
    TableColumn("memory", is_number=True), TableColumn("at most", is_number=True),
    TableColumn("wall", is_number=True), TableColumn("program"),
    TableColumn("framework"), TableColumn("policy"),
)  # fmt: skip
#: A limit is the allocator's: the CUDA context, cuDNN and cuBLAS come on top of it, and NVML counts them.
_OVERHEAD = 1024 * MIB
_STYLES: Mapping[State, str] = {"over": "red", "ungoverned": "yellow", "switched off": "yellow", "failed": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its arguments."""
    add_description(
        parser,
        "For each process you see how much GPU memory it uses and how much it may use. The limits come from "
        "leases and from the audit logs that you can read. The arguments of programs are never shown. "
        "Exit codes: 0 ok, 1 the driver does not answer, 2 wrong usage.",
    )
    add_display_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command with the arguments of a command line."""
    return show_processes(arguments.watch, arguments.format)


def show_processes(seconds: float | None, output_format: str) -> int:
    """Show the processes once, or every some seconds. Return the exit code: 1 if NVML cannot be asked."""
    return FINDINGS if show_snapshots(_take_snapshot, seconds, output_format).usage.problem else OK


# ---- looking


@frozen
class GpuHolder:
    """A process on a GPU, and what it may take there.

    Attributes:
        process: What NVML and the kernel tell of it.
        state: Whether it keeps to its policy, or why there is none to keep to.
        limit: Bytes it may take of this GPU, all its frameworks together. None: unlimited, or not known.
        script: The program's file, as recorded.
        sources: The files of its policy, the nearest last.
        job: Its job and step. "": it has none, or no record tells.
        lease: Whether it holds a lease on the GPU.
        frameworks: The packages that a policy was applied to, in the order of their first record.
    """

    process: GpuProcess
    state: State
    limit: int | None = None
    script: str | None = None
    sources: tuple[str, ...] = ()
    lease: bool = False
    job: str = ""
    frameworks: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Return it for JSON, in one level."""
        process = self.process
        return {
            "gpu": process.gpu,
            "instance": process.instance,
            "uuid": process.uuid,
            "pid": process.pid,
            "uid": process.uid,
            "user": process.user,
            "program": process.program,
            "script": self.script,
            "job": self.job or None,
            "frameworks": list(self.frameworks),
            "memory_bytes": process.memory,
            "limit_bytes": self.limit,
            "wall": None if process.wall is None else process.wall.as_dict(),
            "state": self.state,
            "sources": list(self.sources),
            "lease": self.lease,
        }


def _take_snapshot() -> ProcessSnapshot:
    usage, leases = read_usage(), read_leases()
    processes = (*usage.processes, *_find_waiting(leases, usage))
    records = read_user_records(processes, load(current_start()).policy.audit) if processes else {}
    holders = [_build_holder(process, usage, records, _find_lease(process, leases)) for process in processes]
    holders.sort(key=lambda holder: (holder.process.gpu, holder.process.instance or 0))
    return ProcessSnapshot(usage, tuple(holders))


def _find_waiting(leases: Iterable[Lease], usage: GpuUsage) -> Iterator[GpuProcess]:
    """Yield the processes that have a lease on a GPU and hold no memory of it yet."""
    here = nvml.counts_pids_as_here()
    holding = {(process.pid, process.uuid) for process in usage.processes if here}
    gpus = {gpu.uuid: gpu for gpu in usage.gpus}
    for lease in leases:
        gpu = gpus.get(lease.allocation.uuid)
        if gpu is None or (lease.pid, gpu.uuid) in holding:
            continue
        process = describe_process(gpu, lease.pid, 0)
        if process.uid != lease.uid:  # a process of another container has no number here
            process = GpuProcess(gpu.index, lease.pid, 0, gpu.instance, gpu.uuid, lease.user, lease.uid)
        yield process


def _find_lease(process: GpuProcess, leases: Iterable[Lease]) -> Lease | None:
    """Return the lease of a process. Its user must fit, too: the kernel may not tell who the holder is."""
    mine = (lease for lease in leases if (lease.pid, lease.uid) == (process.pid, process.uid))
    return next((lease for lease in mine if lease.allocation.uuid == process.uuid), None)


def _build_holder(
    process: GpuProcess, usage: GpuUsage, records_by_uid: Mapping[int, UserRecords], lease: Lease | None
) -> GpuHolder:
    of_user = records_by_uid.get(-1 if process.uid is None else process.uid, UserRecords(readable=False))
    records = of_user.by_pid.get(process.pid, ())
    if not records and lease is not None:
        state = _judge_memory(process, lease.allocation.limit)
        return GpuHolder(process, state, lease.allocation.limit, lease.script, lease=True)
    if not records:
        return GpuHolder(process, "ungoverned" if of_user.readable else "unknown")
    on_this_gpu = (record for record in reversed(records) if _find_device(record, process) is not None)
    record = next(on_this_gpu, records[-1])
    limit = _add_limits(records, process, usage)
    sources = [str(source.get("path")) for source in record.get("sources") or () if isinstance(source, dict)]
    state = _judge_state(record, process, limit)
    job = format_step(read_job(record))
    frameworks = tuple(_group_by_framework(records))
    return GpuHolder(process, state, limit, record.get("script"), tuple(sources), lease is not None, job, frameworks)


def _group_by_framework(records: Iterable[LoggedRecord]) -> dict[str, list[LoggedRecord]]:
    grouped: dict[str, list[LoggedRecord]] = {}
    for record in records:
        grouped.setdefault(str(record.get("framework") or ""), []).append(record)
    return {name: grouped[name] for name in grouped if name} or grouped


def _add_limits(records: Iterable[LoggedRecord], process: GpuProcess, usage: GpuUsage) -> int | None:
    """Return what the newest record of each framework gives it of the GPU, in all. None: one is unlimited."""
    of_each = [
        next((record for record in reversed(theirs) if _find_device(record, process) is not None), None)
        for theirs in _group_by_framework(records).values()
    ]
    limits = [_read_limit(record, process, usage) for record in of_each if record is not None]
    known = [limit for limit in limits if limit is not None]
    return sum(known) if known and len(known) == len(limits) else None


def _find_device(record: LoggedRecord, process: GpuProcess) -> Mapping[str, Any] | None:
    """Return what the record tells of the GPU the process is on. None if it tells nothing."""
    devices = record.get("devices")
    found = [device for device in devices if isinstance(device, dict)] if isinstance(devices, list) else []
    return next((device for device in found if device.get("uuid") == process.uuid), None)


def _read_limit(record: LoggedRecord, process: GpuProcess, usage: GpuUsage) -> int | None:
    device = _find_device(record, process) or {}
    size, fraction = device.get("limit_bytes"), device.get("limit_fraction")
    if isinstance(size, int):
        return size
    total = next((gpu.total for gpu in usage.gpus if gpu.uuid == process.uuid), None)
    return int(fraction * total) if isinstance(fraction, float) and total is not None else None


def _judge_state(record: LoggedRecord, process: GpuProcess, limit: int | None) -> State:
    if record["event"] == "policy_disabled":
        return "switched off"
    if record["event"] == "policy_failed":
        return "failed"
    return _judge_memory(process, limit)


def _judge_memory(process: GpuProcess, limit: int | None) -> State:
    over = limit is not None and process.memory is not None and process.memory > limit + _OVERHEAD
    return "over" if over else "within"


# ---- showing


@frozen
class ProcessSnapshot:
    """The processes at one moment.

    Attributes:
        usage: What NVML tells.
        holders: The processes, by GPU.
    """

    usage: GpuUsage
    holders: tuple[GpuHolder, ...] = ()

    def list_samples(self) -> Mapping[str, float | None]:
        """Return how much of its limit each process holds. Without a limit, how much of the card."""
        totals = {gpu.label: gpu.total for gpu in self.usage.gpus}
        return {_name_trend(holder): _measure(holder, totals.get(holder.process.label)) for holder in self.holders}

    def render(self, trends: Trends | None = None) -> RenderableType:
        """Return the table for people."""
        columns, rows = hide_empty_column("job", _COLUMNS, [_build_row(holder) for holder in self.holders])
        columns, rows = hide_empty_column("framework", columns, rows)
        columns, rows = hide_empty_column("wall", columns, rows)
        added = [TrendColumn("memory trend", tuple(map(_name_trend, self.holders)))]
        columns_shown, rows_shown = add_trend_columns(columns, rows, added, trends, expendable="framework")
        return build_report(build_table(columns_shown, rows_shown), self._find_notes())

    def as_dict(self) -> dict[str, object]:
        """Return the same for programs."""
        return {
            "processes": [holder.as_dict() for holder in self.holders],
            "problem": self.usage.problem,
            "notes": [": ".join(note) for note in self._find_notes()],
        }

    def _find_notes(self) -> Iterator[tuple[str, str]]:
        usage = self.usage
        if usage.problem is not None:
            yield "driver", usage.problem
        elif not self.holders:
            yield "nobody", "no process that is visible from here uses GPU memory"
        for gpu in usage.gpus:
            if gpu.problem:
                yield f"GPU {gpu.label}", gpu.problem
        for labels, text in (
            (usage.silent, "the driver does not report who uses it"),
            (usage.list_unseen(), "its memory is in use, but not by a visible process; look outside this container"),
        ):
            if labels:
                yield f"GPU {', '.join(labels)}", text
        yield from _find_notes_on_holders(self.holders)


def _find_notes_on_holders(holders: Iterable[GpuHolder]) -> Iterator[tuple[str, str]]:
    strangers = [str(holder.process.pid) for holder in holders if holder.process.uid is None]
    if strangers:
        text = "not visible here (another container, or hidepid); these are the host's numbers"
        yield f"pid {', '.join(strangers)}", text
    for holder in holders:
        process, limit = holder.process, holder.limit
        if holder.state == "over" and limit is not None and process.memory is not None:
            held, allowed = format_bytes(process.memory), format_bytes(limit)
            kept = f"; {_describe_wall(process.wall)}" if process.wall is not None else ""
            yield f"pid {process.pid}", f"holds {held} of GPU {process.label}, its policy allows {allowed}{kept}"
    unknown = {holder.process.user for holder in holders if holder.state == "unknown" and holder.process.user}
    if unknown:
        yield "unknown", f"the audit log of {', '.join(sorted(unknown))} cannot be read from here"


def _describe_wall(wall: Wall) -> str:
    together = f"all programs in {wall.cgroup} together hold {format_bytes(wall.used)}"
    where = "within" if wall.used <= wall.limit else "beyond"
    return f"{together}, {where} the {format_bytes(wall.limit)} that the driver lets them have"


def _name_trend(holder: GpuHolder) -> str:
    return f"{holder.process.label} {holder.process.pid} {holder.process.start_ticks}"


def _measure(holder: GpuHolder, total: int | None) -> float | None:
    whole = holder.limit or total
    return holder.process.memory / whole if holder.process.memory is not None and whole else None


def _build_row(holder: GpuHolder) -> tuple[StyledText | str, ...]:
    process, style = holder.process, _STYLES.get(holder.state, "")
    memory = "?" if process.memory is None else format_bytes(process.memory)
    limit = "-" if holder.limit is None else format_bytes(holder.limit)
    held = StyledText(memory, style if holder.state == "over" else "")
    program, policy = _format_program(holder), _format_policy(holder, style)
    pid = str(process.pid or "?")
    return (
        process.label,
        process.user or "?",
        pid,
        holder.job,
        held,
        limit,
        "" if process.wall is None else format_bytes(process.wall.limit),
        program,
        ", ".join(holder.frameworks),
        policy,
    )


def _format_program(holder: GpuHolder) -> str:
    if holder.script is None:
        return holder.process.program or "?"
    return shorten_path(holder.script) if is_wide() else holder.script.rpartition("/")[2]


def _format_policy(holder: GpuHolder, style: str) -> StyledText:
    """Return the nearest file of the policy, or why there is none in force."""
    if holder.state not in ("within", "over"):
        return StyledText(holder.state, style)
    nearest = holder.sources[-1] if holder.sources else "a lease"
    name = shorten_path(nearest) if is_wide() else "/".join(nearest.rsplit("/", 2)[-2:])
    if holder.state != "over":
        return StyledText(name, style)
    wall = holder.process.wall
    is_held = wall is not None and wall.used <= wall.limit
    return StyledText(f"{name} ({'over, within the wall' if is_held else 'over'})", style)
