"""What the records of one process say of its GPUs: when it had them, how much it might take and what it took. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

from tfenv.audit.query import get_gpu_id

#: How far the time from the start of a process to its end may differ from what it measured itself.
_SLACK_MS = 2000
#: Of a name, a script or a job, in characters. Records are not longer, but for those of others.
LONGEST_TEXT = 300


class FrameworkGpu(NamedTuple):
    """One GPU, as one framework of a process used it.

    Attributes:
        framework: Its package. "" where it is not told.
        gpu: The GPU's id, as `query.get_gpu_id` gives it.
        name: Product name. "" where it is not told.
        limit: Bytes that the framework might take. -1: there was no limit, or it is not told.
        total: The card's memory in bytes. -1: it is not told.
        peak: The most bytes that the framework had. -1: it is not told.
    """

    framework: str
    gpu: str
    name: str = ""
    limit: int = -1
    total: int = -1
    peak: int = -1


def read_framework_gpus(framework: str, devices: object) -> tuple[FrameworkGpu, ...]:
    """Return what the entry `devices` of a record says, by GPU. None, all that CUDA shows, is one without a name."""
    if devices is None:
        return (FrameworkGpu(framework, ""),)
    entries = devices if isinstance(devices, list) else []
    gpus = [_read_gpu(framework, entry) for entry in entries if isinstance(entry, dict)]
    return tuple(gpus) if len(gpus) < 2 else _merge_gpus(gpus)  # noqa: PLR2004 - one needs no merging


def _read_gpu(framework: str, device: Mapping[str, Any]) -> FrameworkGpu:
    limit, total = _read_size(device, "limit_bytes"), _read_size(device, "total_bytes")
    fraction = device.get("limit_fraction")
    if limit < 0 <= total and isinstance(fraction, float) and 0 <= fraction <= 1:
        limit = int(total * fraction)
    name = device.get("name")
    gpu = get_gpu_id(device)[:LONGEST_TEXT]
    peak = _read_size(device, "peak_bytes")
    return FrameworkGpu(framework, gpu, name[:LONGEST_TEXT] if isinstance(name, str) else "", limit, total, peak)


def _read_size(device: Mapping[str, Any], name: str) -> int:
    value = device.get(name)
    return value if type(value) is int and 0 <= value < 1 << 62 else -1


def _merge_gpus(gpus: Iterable[FrameworkGpu]) -> tuple[FrameworkGpu, ...]:
    """Return each GPU of each framework once, sorted. Of what differs the larger counts."""
    found: dict[tuple[str, str], FrameworkGpu] = {}
    for gpu in gpus:
        other = found.get(gpu[:2])
        found[gpu[:2]] = gpu if other is None else FrameworkGpu(*map(max, gpu, other))  # type: ignore[arg-type]
    return tuple(sorted(found.values()))


@dataclass(slots=True)
class ProcessUse:
    """What the records say of one process that created devices. Of one record at first, then merged.

    Attributes:
        host: The machine's name.
        pid: Process id.
        user: Whose it is.
        first: When its first record was made, in milliseconds since 1970. So are the other times.
        last: When its last one was made.
        script: Its program, as the first record has it. "" for `-c` and notebooks.
        job: Its job, likewise.
        begun: When it created its first device. None: no record tells.
        ended: When it ended. None: no record tells.
        ran_ms: How long it ran, as it measured itself. None: no record tells.
        gpus: Its GPUs.
        begun_in: The frameworks that created devices.
        ended_in: The frameworks whose end was recorded.
        waited_ms: How long it waited for GPUs. None: there was nothing to wait for.
        has_lease: Whether it held a lease.
    """

    host: str
    pid: int
    user: str
    first: int
    last: int
    script: str = ""
    job: str = ""
    begun: int | None = None
    ended: int | None = None
    ran_ms: int | None = None
    gpus: tuple[FrameworkGpu, ...] = ()
    begun_in: frozenset[str] = frozenset()
    ended_in: frozenset[str] = frozenset()
    waited_ms: int | None = None
    has_lease: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether its begin and its end are recorded, in all frameworks that are known of."""
        return self.begun is not None and self.ended is not None and self.begun_in <= self.ended_in

    def merge(self, other: ProcessUse) -> None:
        """Add what other records of the same process say. The order does not matter."""
        own, others = ((use.first, use.script, use.job, use.user) for use in (self, other))
        self.first, self.script, self.job, self.user = min(own, others)
        self.last = max(self.last, other.last)
        self.begun = _choose(min, self.begun, other.begun)
        self.ended = _choose(max, self.ended, other.ended)
        self.ran_ms = _choose(max, self.ran_ms, other.ran_ms)
        self.waited_ms = _choose(max, self.waited_ms, other.waited_ms)
        self.has_lease = self.has_lease or other.has_lease
        self.add_gpus(other.gpus)
        self.begun_in |= other.begun_in
        self.ended_in |= other.ended_in

    def note_end(self, moment: int, ran_ms: int | None, framework: frozenset[str]) -> None:
        """Add an end, which is the last that is heard of most processes. It was not before the first record."""
        self.last = max(self.last, moment)
        self.ended = moment if self.ended is None or moment > self.ended else self.ended
        self.ran_ms = _choose(max, self.ran_ms, ran_ms)
        self.ended_in = self.ended_in | framework if self.ended_in else framework

    def add_gpus(self, gpus: tuple[FrameworkGpu, ...]) -> None:
        """Add what a record says of GPUs."""
        known = self.gpus
        if gpus is known or not gpus:
            return
        if len(gpus) == len(known) == 1 and gpus[0][:-1] == known[0][:-1]:  # most of them: only the peak is new
            self.gpus = gpus if gpus[0].peak > known[0].peak else known
        elif gpus != known:
            self.gpus = _merge_gpus((*known, *gpus))


def _choose(which: Any, one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return int(which(one, other))


def merge_records(records: Sequence[ProcessUse]) -> Iterator[ProcessUse]:
    """Yield the processes that have one number in turn. Records of older versions do not tell them apart otherwise.

    An end tells how long the process ran: what was recorded before is of another, which was killed.

    Args:
        records: What each record of that host, number and user says. They are changed.
    """
    waiting: list[ProcessUse] = []
    closed: ProcessUse | None = None
    for record in sorted(records, key=attrgetter("last", "first", "script", "job", "gpus")):
        start = None if record.ended is None or record.ran_ms is None else record.ended - record.ran_ms - _SLACK_MS
        if record.ended is None:
            waiting.append(record)
            continue
        if closed is not None and not waiting and start is not None and start <= closed.last:
            closed.merge(record)  # another framework of it ends
            continue
        if closed is not None:
            yield closed
        killed = [other for other in waiting if start is not None and other.first < start]
        if killed:
            yield _merge_all(killed)
        closed = _merge_all([*(other for other in waiting if other not in killed), record])
        waiting = []
    if closed is not None:
        yield closed
    if waiting:
        yield _merge_all(waiting)


def _merge_all(uses: Sequence[ProcessUse]) -> ProcessUse:
    first, *others = uses
    for other in others:
        first.merge(other)
    return first


# ---- when it had its GPUs


class Interval(NamedTuple):
    """When a process had its GPUs, as far as the records tell.

    Attributes:
        begin: In milliseconds since 1970.
        end: Likewise. Not before `begin`.
        is_open: No record tells when it ended. `end` is its last record.
        is_cut: No record tells when it created its devices. `begin` is the start of the process, as far as it is told.
        is_shifted: The clock was set while it ran. Its own measure of time counts, up to its end.
    """

    begin: int
    end: int
    is_open: bool = False
    is_cut: bool = False
    is_shifted: bool = False


def find_interval(use: ProcessUse, since: int = 0) -> Interval:
    """Return when a process had its GPUs.

    Args:
        use: The process.
        since: What was before is not looked at, in milliseconds since 1970.
    """
    if use.ended is None:
        begin = use.first if use.begun is None else use.begun
        return Interval(max(begin, since), max(begin, use.last, since), is_open=True, is_cut=use.begun is None)
    start = None if use.ran_ms is None else use.ended - use.ran_ms
    if use.begun is None:
        begin = use.ended if start is None else start
        return Interval(max(begin, min(since, use.ended)), use.ended, is_cut=True)
    if use.begun <= use.ended and (start is None or use.begun >= start - _SLACK_MS):
        return Interval(max(use.begun, min(since, use.ended)), use.ended)
    begin = use.ended if start is None else start
    return Interval(max(begin, min(since, use.ended)), use.ended, is_shifted=True)


# ---- how much it took


class CardUse(NamedTuple):
    """One GPU of a process, all its frameworks together. -1: it is not told, or there is no limit."""

    gpu: str
    name: str
    limit: int
    total: int
    peak: int


def add_up_frameworks(gpus: Iterable[FrameworkGpu]) -> list[CardUse]:
    """Return each GPU once. Peaks of two frameworks count as if they were at one time."""
    cards: dict[str, CardUse] = {}
    for _, gpu, name, limit, total, peak in gpus:
        other = cards.get(gpu)
        if other is None:
            cards[gpu] = CardUse(gpu, name, limit, total, peak)
        else:
            cards[gpu] = CardUse(
                gpu, max(name, other.name), _add(limit, other.limit), max(total, other.total), _add(peak, other.peak)
            )
    return list(cards.values())


def _add(one: int, other: int) -> int:
    return -1 if one < 0 or other < 0 else one + other
