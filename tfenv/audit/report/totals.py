"""Sums over processes: by GPU, by user and GPU, by time. What was summed up in parts is added. Pure.

All are whole numbers, so that neither the order of the records nor the parts of a log change a sum.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from tfenv.audit.report.process_use import CardUse, Interval, ProcessUse, add_up_frameworks, find_interval
from tfenv.audit.report.times import BIN_MS, HOUR_MS

#: The longest processes of each GPU, which are drawn one by one.
MOST_BARS = 40
#: The idle processes that are named.
MOST_IDLE = 100
#: What has more names than this was written to fill the memory. The rest goes by the name OTHERS.
MOST_NAMES = 20_000
OTHERS = "(others)"
#: A process is idle if it had a GPU for so long and took less than this part of what it might.
IDLE_MS = HOUR_MS // 2
IDLE_PART = 0.1
#: Whoever got their GPUs within this time did not wait.
WAIT_MS = 1000


class Bar(NamedTuple):
    """One process on one GPU, in the order of length.

    Attributes:
        ms: How long.
        begin: In milliseconds since 1970.
        user: Whose it is.
        script: Its program.
        job: Its job.
        pid: Process id.
        is_open: No record tells when it ended.
        is_cut: No record tells when it created its devices.
    """

    ms: int
    begin: int
    user: str
    script: str
    job: str
    pid: int
    is_open: bool
    is_cut: bool


class IdleUse(NamedTuple):
    """One process on one GPU that took little of it, in the order of time."""

    ms: int
    begin: int
    user: str
    host: str
    gpu: str
    script: str
    job: str
    pid: int
    peak: int
    allowed: int
    has_lease: bool


class TimeBins:
    """How many milliseconds fell into each half hour. To add an interval costs the same however long it is."""

    __slots__ = ("_changes", "_parts")

    def __init__(self) -> None:
        self._parts: Counter[int] = Counter()
        self._changes: Counter[int] = Counter()

    def add_interval(self, begin: int, end: int, times: int = 1) -> None:
        """Add the time between two moments so many times."""
        first, last = begin // BIN_MS, end // BIN_MS
        if first == last:
            self._parts[first] += (end - begin) * times
            return
        self._parts[first] += ((first + 1) * BIN_MS - begin) * times
        self._parts[last] += (end - last * BIN_MS) * times
        if first + 1 < last:
            self._changes[first + 1] += times
            self._changes[last] -= times

    def add(self, other: TimeBins) -> None:
        """Add what fell into other bins."""
        self._parts.update(other._parts)
        self._changes.update(other._changes)

    def list_bins(self) -> dict[int, int]:
        """Return the milliseconds of each half hour since 1970 that has some, in the order of time."""
        found = Counter({number: ms for number, ms in self._parts.items() if ms})
        changes = sorted(number for number, change in self._changes.items() if change)
        running = 0
        for number, following in zip(changes, [*changes[1:], *changes[-1:]], strict=True):
            running += self._changes[number]
            if running:
                for each in range(number, following):
                    found[each] += running * BIN_MS
        return dict(sorted((number, ms) for number, ms in found.items() if ms))


@dataclass(slots=True)
class GpuTotals:
    """One GPU of one host.

    Attributes:
        name: Product name. "" where it is not told.
        total: The card's memory in bytes. -1: it is not told.
        processes: How many had it.
        still_open: How many of these have no end.
        ms: How long they had it, all of them together.
        begin: When the first one began, in milliseconds since 1970.
        end: When the last one ended.
        bins: When they had it.
        bars: The longest, the shortest of them first.
    """

    name: str = ""
    total: int = -1
    processes: int = 0
    still_open: int = 0
    ms: int = 0
    begin: int = 1 << 62
    end: int = 0
    bins: TimeBins = field(default_factory=TimeBins)
    bars: list[Bar] = field(default_factory=list)

    def add_use(self, card: CardUse, bar: Bar) -> None:
        """Add a process."""
        self.name, self.total = max(self.name, card.name), max(self.total, card.total)
        self.processes += 1
        self.still_open += bar.is_open
        self.ms += bar.ms
        self.begin, self.end = min(self.begin, bar.begin), max(self.end, bar.begin + bar.ms)
        self.bins.add_interval(bar.begin, bar.begin + bar.ms)
        _keep_largest(self.bars, bar, MOST_BARS)

    def add(self, other: GpuTotals) -> None:
        """Add what was summed up elsewhere."""
        self.name, self.total = max(self.name, other.name), max(self.total, other.total)
        self.processes += other.processes
        self.still_open += other.still_open
        self.ms += other.ms
        self.begin, self.end = min(self.begin, other.begin), max(self.end, other.end)
        self.bins.add(other.bins)
        for bar in other.bars:
            _keep_largest(self.bars, bar, MOST_BARS)


@dataclass(slots=True)
class PeakTotals:
    """One user on one GPU.

    Attributes:
        processes: How many.
        ms: How long, all of them together.
        measured: How many told a peak.
        unlimited: How many had no limit, or none that is told.
        limit: The largest limit in bytes. -1: none is told.
        peak: The highest peak in bytes. -1: none is told.
        total: The card's memory in bytes. -1: it is not told.
        fullest: The highest peak as a part of its own process's limit, in millionths. -1: none is told.
    """

    processes: int = 0
    ms: int = 0
    measured: int = 0
    unlimited: int = 0
    limit: int = -1
    peak: int = -1
    total: int = -1
    fullest: int = -1

    def add_use(self, card: CardUse, ms: int) -> None:
        """Add a process."""
        self.processes += 1
        self.ms += ms
        self.measured += card.peak >= 0
        self.unlimited += card.limit < 0
        self.limit, self.peak = max(self.limit, card.limit), max(self.peak, card.peak)
        self.total = max(self.total, card.total)
        if card.limit > 0 and card.peak >= 0:
            self.fullest = max(self.fullest, card.peak * 1_000_000 // card.limit)

    def add(self, other: PeakTotals) -> None:
        """Add what was summed up elsewhere."""
        self.processes += other.processes
        self.ms += other.ms
        self.measured += other.measured
        self.unlimited += other.unlimited
        self.limit, self.peak = max(self.limit, other.limit), max(self.peak, other.peak)
        self.total, self.fullest = max(self.total, other.total), max(self.fullest, other.fullest)


@dataclass(slots=True)
class UseTotals:
    """Sums over processes.

    Attributes:
        processes: How many created devices, be it none.
        without_gpu: How many of them had no GPU.
        still_open: How many have no end.
        cut: How many have an end and no begin.
        shifted: While how many of them somebody set the clock.
        unmeasured: How many uses of a GPU that were long enough to be called idle told no peak, or no size.
        idle_count: How many uses of a GPU were idle.
        idle_ms: How long, all of them together.
        unchecked: Uses of a GPU that were long enough and told enough to be called idle or not.
        gpus: By host and GPU.
        peaks: By user, host and GPU.
        waits: By the half hour since 1970 in which it got its GPUs, and user: the milliseconds of each that chose.
        idle: The longest idle ones, the shortest of them first.
    """

    processes: int = 0
    without_gpu: int = 0
    still_open: int = 0
    cut: int = 0
    shifted: int = 0
    unmeasured: int = 0
    checked: int = 0
    idle_count: int = 0
    idle_ms: int = 0
    gpus: dict[tuple[str, str], GpuTotals] = field(default_factory=dict)
    peaks: dict[tuple[str, str, str], PeakTotals] = field(default_factory=dict)
    waits: dict[tuple[int, str], array[int]] = field(default_factory=dict)
    idle: list[IdleUse] = field(default_factory=list)

    def add_use(self, use: ProcessUse, since: int = 0) -> None:
        """Add a process. What was before `since`, in milliseconds since 1970, does not count."""
        interval = find_interval(use, since)
        self.processes += 1
        self.still_open += interval.is_open
        self.cut += interval.is_cut
        self.shifted += interval.is_shifted
        if use.waited_ms is not None:
            key = (interval.begin // BIN_MS, use.user)
            _find(self.waits, key, (0, OTHERS), lambda: array("q")).append(use.waited_ms)
        cards = add_up_frameworks(use.gpus)
        self.without_gpu += not cards
        for card in cards:
            self._add_card(use, card, interval)

    def _add_card(self, use: ProcessUse, card: CardUse, interval: Interval) -> None:
        ms = interval.end - interval.begin
        bar = Bar(ms, interval.begin, use.user, use.script, use.job, use.pid, interval.is_open, interval.is_cut)
        _find(self.gpus, (use.host, card.gpu), (OTHERS, OTHERS), GpuTotals).add_use(card, bar)
        peak_key = (use.user, use.host, card.gpu)
        _find(self.peaks, peak_key, (OTHERS, OTHERS, OTHERS), PeakTotals).add_use(card, ms)
        if ms >= IDLE_MS:
            self._add_long_use(use, card, interval)

    def _add_long_use(self, use: ProcessUse, card: CardUse, interval: Interval) -> None:
        allowed = card.limit if card.limit > 0 else card.total
        if card.peak < 0 or allowed <= 0:
            self.unmeasured += 1
            return
        self.checked += 1
        if card.peak >= allowed * IDLE_PART:
            return
        ms = interval.end - interval.begin
        self.idle_count += 1
        self.idle_ms += ms
        idle = IdleUse(
            ms, interval.begin, use.user, use.host, card.gpu, use.script, use.job, use.pid, card.peak, allowed,
            use.has_lease,
        )  # fmt: skip
        _keep_largest(self.idle, idle, MOST_IDLE)

    def add(self, other: UseTotals) -> None:
        """Add what was summed up elsewhere."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for gpu_key, gpu in other.gpus.items():
            _find(self.gpus, gpu_key, (OTHERS, OTHERS), GpuTotals).add(gpu)
        for peak_key, peak in other.peaks.items():
            _find(self.peaks, peak_key, (OTHERS, OTHERS, OTHERS), PeakTotals).add(peak)
        for wait_key, waits in other.waits.items():
            _find(self.waits, wait_key, (0, OTHERS), lambda: array("q")).extend(waits)
        for idle in other.idle:
            _keep_largest(self.idle, idle, MOST_IDLE)


_COUNTS = (
    "processes", "without_gpu", "still_open", "cut", "shifted", "unmeasured", "checked", "idle_count", "idle_ms",
)  # fmt: skip
_Key = TypeVar("_Key")
_Row = TypeVar("_Row", GpuTotals, PeakTotals, "array[int]")
_Kept = TypeVar("_Kept", Bar, IdleUse)


def _find(rows: dict[_Key, _Row], key: _Key, others: _Key, make: type[_Row] | object) -> _Row:
    """Return the row of a key. Where there are far too many, that of all others."""
    row = rows.get(key)
    if row is None:
        if len(rows) >= MOST_NAMES:
            key = others
        row = rows.get(key)
        if row is None:
            row = rows[key] = make()  # type: ignore[operator]
    return row


def _keep_largest(kept: list[_Kept], new: _Kept, most: int) -> None:
    if len(kept) < most:
        insort(kept, new)
    elif new > kept[0]:
        del kept[0]
        insort(kept, new)


@dataclass(slots=True)
class EventTotals:
    """How often what happened: by half hour, kind and cause.

    Attributes:
        records: Records by event, as far as they are wanted.
        hosts: The hosts that they are of.
        users: Their users.
        first: When the first one was made, in milliseconds since 1970.
        last: When the last one was made.
        misdated: Records whose time cannot be right, or is none.
        lost: Records that processes could not write, as they told later.
        causes: By half hour since 1970, kind ("clamped", "failed", "would_clamp") and cause.
    """

    records: Counter[str] = field(default_factory=Counter)
    hosts: set[str] = field(default_factory=set)
    users: set[str] = field(default_factory=set)
    first: int = 1 << 62
    last: int = 0
    misdated: int = 0
    lost: int = 0
    causes: Counter[tuple[int, str, str]] = field(default_factory=Counter)

    def count_cause(self, moment: int, kind: str, cause: str, times: int) -> None:
        """Count what happened at a moment, in milliseconds since 1970."""
        key = (moment // BIN_MS, kind, cause)
        if key not in self.causes and len(self.causes) >= 10 * MOST_NAMES:
            key = (key[0], kind, OTHERS)
        self.causes[key] += times

    def add(self, other: EventTotals) -> None:
        """Add what was counted elsewhere."""
        self.records.update(other.records)
        for names, more in ((self.hosts, other.hosts), (self.users, other.users)):
            for name in more:
                add_name(names, name)
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)
        self.misdated += other.misdated
        self.lost += other.lost
        for key, count in other.causes.items():
            self.causes[key] += count


def add_name(names: set[str], name: str) -> None:
    """Add a name, as long as there are not far too many."""
    if name not in names:
        names.add(name if len(names) < MOST_NAMES else OTHERS)


def sum_bins(gpus: Mapping[tuple[str, str], GpuTotals]) -> dict[int, int]:
    """Return the milliseconds of each half hour since 1970, on all GPUs together."""
    all_bins = TimeBins()
    for gpu in gpus.values():
        all_bins.add(gpu.bins)
    return all_bins.list_bins()
