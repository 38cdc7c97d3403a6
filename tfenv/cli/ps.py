"""`tfgpu ps`: who uses which GPU, how much of it, and under which policy."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from tfenv.audit.query import LoggedRecord
from tfenv.cli.output import FINDINGS, OK, shown_path
from tfenv.cli.records import Known, known_of
from tfenv.cli.refresh import Cell, Column, add_options, block, is_wide, show
from tfenv.devices.usage import GpuProcess, GpuUsage, describe_process, read_usage
from tfenv.pipeline import current_start, load
from tfenv.policy.model import Lease
from tfenv.policy.units import MIB, format_bytes
from tfenv.sharing.lease import read_leases
from tfenv.values import frozen

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tfenv.cli.output import SubParsers

__all__ = ["add_parser", "run"]

#: "unknown": the user's audit log cannot be read from here. "ungoverned": it can, and says nothing.
State = Literal["within", "over", "ungoverned", "switched off", "failed", "unknown"]

_COLUMNS = (
    Column("GPU"), Column("user"), Column("pid", number=True), Column("memory", number=True),
    Column("at most", number=True), Column("program"), Column("policy"),
)  # fmt: skip
#: A limit is the allocator's: the CUDA context, cuDNN and cuBLAS come on top of it, and NVML counts them.
_OVERHEAD = 1024 * MIB
_STYLES: Mapping[State, str] = {"over": "red", "ungoverned": "yellow", "switched off": "yellow", "failed": "red"}


def add_parser(subparsers: SubParsers) -> None:
    """Add the command to the program's parser."""
    parser = subparsers.add_parser(
        "ps",
        help="show who uses which GPU, under which policy",
        description="Show every process that holds memory of a GPU, and what it may take of it: from the audit logs "
        "that can be read and from leases. Arguments of programs are never shown. "
        "Exit codes: 0 ok, 1 the driver cannot be asked.",
    )
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Show the processes; 1 when NVML cannot be asked."""
    return FINDINGS if show(_look, args).usage.problem else OK


# ---- looking


@frozen
class _Holder:
    """A process on a GPU, and what it may take there.

    Attributes:
        process: As NVML and the kernel tell.
        state: How it stands to its policy.
        limit: Bytes it may take of this GPU; None: unlimited, or not known.
        script: The program's file, as recorded.
        sources: The files of its policy, the nearest last.
        lease: It holds a lease on the GPU.
    """

    process: GpuProcess
    state: State
    limit: int | None = None
    script: str | None = None
    sources: tuple[str, ...] = ()
    lease: bool = False

    def as_dict(self) -> dict[str, object]:
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
            "memory_bytes": process.memory,
            "limit_bytes": self.limit,
            "state": self.state,
            "sources": list(self.sources),
            "lease": self.lease,
        }


def _look() -> _Sight:
    usage, leases = read_usage(), read_leases()
    processes = (*usage.processes, *_waiting(leases, usage))
    known = known_of(processes, load(current_start()).policy.audit) if processes else {}
    found = [_holder(process, usage, known, _lease_of(process, leases)) for process in processes]
    return _Sight(usage, tuple(sorted(found, key=lambda holder: (holder.process.gpu, holder.process.instance or 0))))


def _waiting(leases: Iterable[Lease], usage: GpuUsage) -> Iterator[GpuProcess]:
    """Processes that have a place on a GPU and hold no memory of it yet."""
    holding = {(process.pid, process.uuid) for process in usage.processes}
    gpus = {gpu.uuid: gpu for gpu in usage.gpus}
    for lease in leases:
        gpu = gpus.get(lease.allocation.uuid)
        if gpu is None or (lease.pid, gpu.uuid) in holding:
            continue
        process = describe_process(gpu, lease.pid, 0)
        if process.uid != lease.uid:  # in another container the number is somebody else's here
            process = GpuProcess(gpu.index, lease.pid, 0, gpu.instance, gpu.uuid, lease.user, lease.uid)
        yield process


def _lease_of(process: GpuProcess, leases: Iterable[Lease]) -> Lease | None:
    """A lease says by itself whose it is; its pid is that of the holder's own container."""
    mine = (lease for lease in leases if (lease.pid, lease.uid) == (process.pid, process.uid))
    return next((lease for lease in mine if lease.allocation.uuid == process.uuid), None)


def _holder(process: GpuProcess, usage: GpuUsage, known: Mapping[int, Known], lease: Lease | None) -> _Holder:
    theirs = known.get(-1 if process.uid is None else process.uid, Known(readable=False))
    records = theirs.records.get(process.pid, ())
    if not records and lease is not None:
        state = _within(process, lease.allocation.limit)
        return _Holder(process, state, lease.allocation.limit, lease.script, lease=True)
    if not records:
        return _Holder(process, "ungoverned" if theirs.readable else "unknown")
    record = next((r for r in reversed(records) if _device(r, process) is not None), records[-1])
    limit = _limit(record, process, usage)
    sources = [str(source.get("path")) for source in record.get("sources") or () if isinstance(source, dict)]
    state = _state(record, process, limit)
    return _Holder(process, state, limit, record.get("script"), tuple(sources), lease is not None)


def _device(record: LoggedRecord, process: GpuProcess) -> Mapping[str, Any] | None:
    """What the record says of the GPU the process is on."""
    devices = record.get("devices")
    found = [device for device in devices if isinstance(device, dict)] if isinstance(devices, list) else []
    return next((device for device in found if device.get("uuid") == process.uuid), None)


def _limit(record: LoggedRecord, process: GpuProcess, usage: GpuUsage) -> int | None:
    device = _device(record, process) or {}
    size, fraction = device.get("limit_bytes"), device.get("limit_fraction")
    if isinstance(size, int):
        return size
    total = next((gpu.total for gpu in usage.gpus if gpu.uuid == process.uuid), None)
    return int(fraction * total) if isinstance(fraction, float) and total is not None else None


def _state(record: LoggedRecord, process: GpuProcess, limit: int | None) -> State:
    if record["event"] == "policy_disabled":
        return "switched off"
    if record["event"] == "policy_failed":
        return "failed"
    return _within(process, limit)


def _within(process: GpuProcess, limit: int | None) -> State:
    over = limit is not None and process.memory is not None and process.memory > limit + _OVERHEAD
    return "over" if over else "within"


# ---- showing


@frozen
class _Sight:
    """The processes at one moment."""

    usage: GpuUsage
    holders: tuple[_Holder, ...] = ()

    def text(self) -> RenderableType:
        return block(_COLUMNS, (_row(holder) for holder in self.holders), self._notes())

    def as_dict(self) -> dict[str, object]:
        return {
            "processes": [holder.as_dict() for holder in self.holders],
            "problem": self.usage.problem,
            "notes": [": ".join(note) for note in self._notes()],
        }

    def _notes(self) -> Iterator[tuple[str, str]]:
        usage = self.usage
        if usage.problem is not None:
            yield "driver", usage.problem
        elif not self.holders:
            yield "nobody", "no process holds memory of a GPU, as far as can be seen from here"
        for gpu in usage.gpus:
            if gpu.problem:
                yield f"GPU {gpu.label}", gpu.problem
        for labels, said in (
            (usage.silent, "the driver does not tell who uses it"),
            (usage.list_unseen(), "memory is held by nobody that can be seen: see outside of this container"),
        ):
            if labels:
                yield f"GPU {', '.join(labels)}", said
        yield from _notes_on(self.holders)


def _notes_on(holders: Iterable[_Holder]) -> Iterator[tuple[str, str]]:
    unleased_bytes = [str(holder.process.pid) for holder in holders if holder.process.uid is None]
    if unleased_bytes:
        said = "not to be seen here: another container's, or hidden by hidepid; the numbers are the host's"
        yield f"pid {', '.join(unleased_bytes)}", said
    for holder in holders:
        process, limit = holder.process, holder.limit
        if holder.state == "over" and limit is not None and process.memory is not None:
            said = (
                f"holds {format_bytes(process.memory)} of GPU {process.label}, its policy allows {format_bytes(limit)}"
            )
            yield f"pid {process.pid}", said
    unknown = {holder.process.user for holder in holders if holder.state == "unknown" and holder.process.user}
    if unknown:
        yield "unknown", f"the audit log of {', '.join(sorted(unknown))} cannot be read from here"


def _row(holder: _Holder) -> tuple[Cell | str, ...]:
    process, style = holder.process, _STYLES.get(holder.state, "")
    memory = "?" if process.memory is None else format_bytes(process.memory)
    limit = "-" if holder.limit is None else format_bytes(holder.limit)
    shown = (process.label, process.user or "?", str(process.pid))
    return (
        *shown,
        Cell(memory, style if holder.state == "over" else ""),
        limit,
        _program(holder),
        _policy(holder, style),
    )


def _program(holder: _Holder) -> str:
    if holder.script is None:
        return holder.process.program or "?"
    return shown_path(holder.script) if is_wide() else holder.script.rpartition("/")[2]


def _policy(holder: _Holder, style: str) -> Cell:
    """The nearest file; or why there is none in force."""
    if holder.state not in ("within", "over"):
        return Cell(holder.state, style)
    nearest = holder.sources[-1] if holder.sources else "a lease"
    named = shown_path(nearest) if is_wide() else "/".join(nearest.rsplit("/", 2)[-2:])
    return Cell(f"{named} (over)" if holder.state == "over" else named, style)
