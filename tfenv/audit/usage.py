"""Who used which GPU: the records of a log grouped by user and GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tfenv.audit import duckdb_engine
from tfenv.audit.query import Group, Query, Record, Tally, devices_of, gpu_name, is_worth_reading
from tfenv.audit.query import groups as plain_groups
from tfenv.values import frozen, replace

__all__ = ["UserGpu", "summarize", "summarize_logs"]

#: The events of a use; plans (policy_loaded, policy_changed) are none.
_USES = frozenset({"policy_applied", "policy_clamped", "policy_failed"})
_MIB = 1 << 20
#: Below that plain reading is done before DuckDB is imported.
_SMALL_LOGS_BYTES = 8 << 20


@dataclass
class UserGpu:
    """What one user did with one GPU.

    Attributes:
        user: Name.
        gpu: UUID; the entry of CUDA_VISIBLE_DEVICES or TensorFlow's number where there is none; "" for
            records without a GPU.
        processes: Those that created devices, as host and pid.
        clamped: Records of a program that asked for more than it got.
        failed: Records of a policy that was not in force.
        asked_bytes: The largest limit a program asked for itself, a split counted as its sum; None: none in bytes.
        asked_fraction: Likewise as a fraction of the card's memory.
        given_bytes: The largest limit that was given; None: none in bytes.
        given_fraction: Likewise as a fraction of the card's memory, where its size was not known.
        last: Timestamp of the newest record.
    """

    user: str
    gpu: str
    processes: set[tuple[str, str]] = field(default_factory=set)
    clamped: int = 0
    failed: int = 0
    asked_bytes: int | None = None
    asked_fraction: float | None = None
    given_bytes: int | None = None
    given_fraction: float | None = None
    last: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the processes as their number."""
        return {**asdict(replace(self, processes=set())), "processes": len(self.processes)}


def summarize_logs(logs: Sequence[Path], query: Query, tally: Tally) -> list[UserGpu]:
    """The wanted records of all logs per user and GPU, by DuckDB where it is installed and worth its import.

    Raises:
        OSError: A log cannot be read.
    """
    events = query.events & _USES if query.events else _USES
    if not events:
        return []
    query = replace(query, events=events)
    logs = [log for log in logs if is_worth_reading(log, query.since)]
    large = sum(log.stat().st_size for log in logs) > _SMALL_LOGS_BYTES
    read_groups = duckdb_engine.groups if large and duckdb_engine.is_there() else plain_groups
    return summarize((group for log in logs for group in read_groups(log, query, tally)), query)


def summarize(groups: Iterable[Group], query: Query = Query()) -> list[UserGpu]:  # noqa: B008 - it is frozen
    """Per user and GPU, sorted by both; of a record with several GPUs only those that the query wants."""
    rows: dict[tuple[str, str], UserGpu] = {}
    for group in groups:
        if group.record["event"] in _USES:
            for gpu in _gpus(group.record, query):
                key = (str(group.record.get("user")), gpu.name)
                _count(rows.setdefault(key, UserGpu(*key)), group, gpu)
    return [rows[key] for key in sorted(rows)]


@frozen
class _Gpu:
    """One GPU of a record: what was asked of it and given."""

    name: str
    asked_bytes: int | None = None
    asked_fraction: float | None = None
    given_bytes: int | None = None
    given_fraction: float | None = None


def _gpus(record: Record, query: Query) -> list[_Gpu]:
    devices = devices_of(record)
    if not devices:
        return [_Gpu("")]
    return [_gpu(record, place, device) for place, device in enumerate(devices) if query.has_gpu(device)]


def _gpu(record: Record, place: int, device: Mapping[str, Any]) -> _Gpu:
    asked = record.get("asked")
    terms: Mapping[str, Any] = asked if isinstance(asked, dict) else {}
    return _Gpu(
        gpu_name(device),
        _split_bytes(terms.get("virtual_devices"), place),
        _number(terms.get("per_process_gpu_memory_fraction")),
        _size(device.get("limit_bytes")),
        _number(device.get("limit_fraction")),
    )


def _split_bytes(split: object, place: int) -> int | None:
    """What a program's own virtual devices (lists of MiB, one for each GPU) take of one GPU together."""
    if not isinstance(split, list) or place >= len(split) or not isinstance(split[place], list):
        return None
    sizes = [size for size in map(_number, split[place]) if size is not None]
    return int(sum(sizes) * _MIB) if sizes else None


def _size(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _count(row: UserGpu, group: Group, gpu: _Gpu) -> None:
    event, host = group.record["event"], str(group.record.get("host"))
    row.processes.update((host, pid) for pid in group.pids)
    row.clamped += group.times * (event == "policy_clamped")
    row.failed += group.times * (event == "policy_failed")
    row.last = max(row.last, group.record["timestamp"])
    row.asked_bytes = _larger(row.asked_bytes, gpu.asked_bytes)
    row.asked_fraction = _larger(row.asked_fraction, gpu.asked_fraction)
    row.given_bytes = _larger(row.given_bytes, gpu.given_bytes)
    row.given_fraction = _larger(row.given_fraction, gpu.given_fraction)


def _larger(one: Any, other: Any) -> Any:
    return other if one is None else one if other is None else max(one, other)
