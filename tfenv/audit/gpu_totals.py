"""Who used which GPU: the totals over the records of logs, by user and GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tfenv.audit import duckdb_engine
from tfenv.audit.query import (
    LineTally,
    LoggedRecord,
    RecordGroup,
    RecordQuery,
    get_gpu_id,
    is_worth_reading,
    list_logged_devices,
    read_groups,
)
from tfenv.values import replace

_Number = TypeVar("_Number", int, float)

#: The events of a use. Plans (policy_loaded, policy_changed) are none.
_USES = frozenset({"policy_applied", "policy_clamped", "policy_failed"})
_MIB = 1 << 20
#: More repeats than this are no count of ours.
_MOST_REPEATS = 1 << 40
#: Below that plain reading is done before DuckDB is imported.
_SMALL_LOGS_BYTES = 8 << 20


@dataclass
class UserGpuTotals:
    """What one user did with one GPU.

    Attributes:
        user: Name.
        gpu: Its id, as `query.get_gpu_id` gives it. "" for records without a GPU.
        processes: Those that created devices, as host and pid.
        clamped: Records of a program that asked for more than it got.
        failed: Records of a policy that was not in force.
        asked_bytes: The largest limit a program asked for itself, a split counted as its sum. None: none in bytes.
        asked_fraction: Likewise as a fraction of the card's memory.
        given_bytes: The largest limit that was given. None: none in bytes.
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
        """Return the totals as JSON has them: the processes as their number."""
        return {**vars(self), "processes": len(self.processes)}


def summarize_logs(logs: Sequence[Path], query: RecordQuery, tally: LineTally) -> list[UserGpuTotals]:
    """Sum up the wanted records of all logs, by DuckDB where it is installed and worth its import.

    Raises:
        OSError: A log cannot be read.
    """
    events = query.events & _USES if query.events else _USES
    if not events:
        return []
    query = replace(query, events=events)
    logs = [log for log in logs if is_worth_reading(log, query.since)]
    is_large = sum(log.stat().st_size for log in logs) > _SMALL_LOGS_BYTES
    make_groups = duckdb_engine.group_records if is_large and duckdb_engine.is_installed() else read_groups
    return summarize_groups((group for log in logs for group in make_groups(log, query, tally)), query)


def summarize_groups(groups: Iterable[RecordGroup], query: RecordQuery = RecordQuery()) -> list[UserGpuTotals]:  # noqa: B008 - it is frozen
    """Sum up records per user and GPU.

    Args:
        groups: The records.
        query: Which GPUs of a record with several count.

    Returns:
        Totals sorted by user and GPU.
    """
    rows: dict[tuple[str, str], UserGpuTotals] = {}
    for group in groups:
        if group.record["event"] in _USES:
            for use in _list_uses(group.record, query):
                key = (str(group.record.get("user")), use.gpu)
                if key not in rows:
                    rows[key] = UserGpuTotals(*key)
                _add_use(rows[key], group, use)
    return [rows[key] for key in sorted(rows)]


class _GpuUse(NamedTuple):
    """What a record says of one GPU: what was asked of it and given. A tuple, for there is one for each line."""

    gpu: str
    asked_bytes: int | None = None
    asked_fraction: float | None = None
    given_bytes: int | None = None
    given_fraction: float | None = None


def _list_uses(record: LoggedRecord, query: RecordQuery) -> list[_GpuUse]:
    devices = list_logged_devices(record)
    if not devices:
        return [_GpuUse("")]
    return [_read_use(record, place, device) for place, device in enumerate(devices) if query.matches_gpu(device)]


def _read_use(record: LoggedRecord, place: int, device: Mapping[str, Any]) -> _GpuUse:
    asked = record.get("asked")
    terms: Mapping[str, Any] = asked if isinstance(asked, dict) else {}
    size = device.get("limit_bytes")
    return _GpuUse(
        get_gpu_id(device),
        _sum_split(terms.get("virtual_devices"), place),
        _check_number(terms.get("per_process_gpu_memory_fraction")),
        size if isinstance(size, int) and not isinstance(size, bool) else None,
        _check_number(device.get("limit_fraction")),
    )


def _sum_split(split: object, place: int) -> int | None:
    """Return the bytes that a program's own virtual devices (lists of MiB, one for each GPU) take of one GPU."""
    if not isinstance(split, list) or place >= len(split) or not isinstance(split[place], list):
        return None
    sizes = [size for size in map(_check_number, split[place]) if size is not None]
    return int(sum(sizes) * _MIB) if sizes else None


def _check_number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _add_use(row: UserGpuTotals, group: RecordGroup, use: _GpuUse) -> None:
    event, host = group.record["event"], str(group.record.get("host"))
    row.processes.update((host, pid) for pid in group.pids)
    repeats = group.record.get("repeats", 1)
    times = group.times * (repeats if type(repeats) is int and 0 < repeats < _MOST_REPEATS else 1)
    row.clamped += times * (event == "policy_clamped")
    row.failed += times * (event == "policy_failed")
    row.last = max(row.last, group.record["timestamp"])
    row.asked_bytes = _take_larger(row.asked_bytes, use.asked_bytes)
    row.asked_fraction = _take_larger(row.asked_fraction, use.asked_fraction)
    row.given_bytes = _take_larger(row.given_bytes, use.given_bytes)
    row.given_fraction = _take_larger(row.given_fraction, use.given_fraction)


def _take_larger(one: _Number | None, other: _Number | None) -> _Number | None:
    return other if other is not None and (one is None or other > one) else one
