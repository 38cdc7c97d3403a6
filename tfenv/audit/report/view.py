"""What the page shows: the sums as rows, in local time, with what is left out counted. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from tfenv.audit.report.collect import Collection
from tfenv.audit.report.times import BIN_MS, DAY_MS, HOUR_MS, LocalClock
from tfenv.audit.report.totals import OTHERS, WAIT_MS, Bar, GpuTotals, IdleUse, PeakTotals, TimeBins, sum_bins
from tfenv.values import field, frozen

#: Rows of a table. Those that follow are counted.
MOST_ROWS = 200
#: Causes that have a pattern of their own. The rest are one.
MOST_CAUSES = 6
#: Processes side by side on one GPU that are drawn. The rest are drawn together.
MOST_LANES = 4
KINDS = ("clamped", "failed", "would_clamp")
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
#: From a Monday on. 1970 began on a Thursday.
_FIRST_WEEKDAY = 3
#: A bar of time is a day, but an hour in a short log and a week or four in a long one.
_SHORTEST_DAYS, _LONG_DAYS, _LONGEST_DAYS = 3, 120, 1000
_FULL_PART, _LOW_PART = 0.95, 0.25


@frozen
class GpuRow:
    """One GPU on the time line. All times are milliseconds of the local clock.

    Attributes:
        host: The machine's name.
        gpu: The GPU's id.
        totals: What it was used for.
        lanes: Processes that are drawn one by one, each with its lane.
        rest_count: How many are not.
        rest_ms: How long these had it, all of them together.
        rest: When they did: begin, end, and how many at a time, on average.
    """

    host: str
    gpu: str
    totals: GpuTotals
    lanes: tuple[tuple[int, Bar], ...] = ()
    rest_count: int = 0
    rest_ms: int = 0
    rest: tuple[tuple[int, int, float], ...] = ()


class PeakRow(NamedTuple):
    """One user on one GPU."""

    user: str
    host: str
    gpu: str
    totals: PeakTotals

    @property
    def verdict(self) -> str:
        """What a reader may want to do about the limit. "" where there is nothing to say."""
        totals = self.totals
        if totals.fullest >= _FULL_PART * 1_000_000:
            return "nearly full"
        if totals.limit > 0 and 0 <= totals.fullest < _LOW_PART * 1_000_000:
            return "far too large"
        return ""


class WaitRow(NamedTuple):
    """Waiting times of a day or a user. In milliseconds. The median and the longest are of those who waited."""

    name: str
    chosen: int
    waited: int
    median_ms: int
    longest_ms: int


@frozen
class EventSeries:
    """How often one kind of thing happened.

    Attributes:
        total: In all.
        causes: The most frequent ones, with how often. The rest are the last, OTHERS.
        counts: By begin of a bar of time, in milliseconds of the local clock: how often each cause.
    """

    total: int
    causes: tuple[tuple[str, int], ...]
    counts: Mapping[int, Mapping[str, int]]


@frozen
class ReportView:
    """Everything that the page shows.

    Attributes:
        collection: What was read.
        clock: The local time.
        begin: The first moment, in milliseconds of the local clock.
        end: The last one.
        bar_ms: How long a bar of time is.
        gpus: The GPUs, the most used first.
        peaks: Users on GPUs, the longest first.
        events: By kind.
        waits_by_day: In the order of time.
        waits_by_user: Who waited the longest first.
        heat: Milliseconds by weekday and hour.
        idle: The longest idle uses.
        users: Everybody who used a GPU, by how long, in milliseconds.
    """

    collection: Collection
    clock: LocalClock
    begin: int
    end: int
    bar_ms: int
    gpus: tuple[GpuRow, ...] = ()
    peaks: tuple[PeakRow, ...] = ()
    events: Mapping[str, EventSeries] = field(default_factory=dict)
    waits_by_day: tuple[WaitRow, ...] = ()
    waits_by_user: tuple[WaitRow, ...] = ()
    heat: tuple[tuple[int, ...], ...] = ()
    idle: tuple[IdleUse, ...] = ()
    users: tuple[tuple[str, int], ...] = ()

    @property
    def gpu_ms(self) -> int:
        """How long all GPUs were had by processes, all of them together."""
        return sum(row.totals.ms for row in self.gpus)


def make_view(collection: Collection, clock: LocalClock) -> ReportView:
    """Make what the page shows of what was read."""
    totals, events = collection.totals, collection.events
    begin = min([events.first, *(gpu.begin for gpu in totals.gpus.values())])
    end = max([events.last, *(gpu.end for gpu in totals.gpus.values())])
    begin, end = (clock.shift(begin), clock.shift(end)) if end else (0, HOUR_MS)
    bar_ms = _choose_bar(end - begin)
    gpus = sorted(totals.gpus.items(), key=lambda item: (-item[1].ms, item[0]))
    peaks = sorted(totals.peaks.items(), key=lambda item: (-item[1].ms, item[0]))
    users: Counter[str] = Counter()
    for (user, _, _), row in totals.peaks.items():
        users[user] += row.ms
    return ReportView(
        collection,
        clock,
        begin,
        end,
        bar_ms,
        tuple(_make_gpu_row(host, gpu, row, clock) for (host, gpu), row in gpus),
        tuple(PeakRow(*key, row) for key, row in peaks),
        {kind: _make_series(kind, events.causes, clock, bar_ms) for kind in KINDS},
        tuple(_list_waits_by_day(totals.waits, clock)),
        tuple(_list_waits_by_user(totals.waits)),
        _make_heat(totals.gpus, clock),
        tuple(reversed(totals.idle)),
        tuple(sorted(users.items(), key=lambda item: (-item[1], item[0]))),
    )


def _choose_bar(span: int) -> int:
    days = span / DAY_MS
    if days <= _SHORTEST_DAYS:
        return HOUR_MS
    if days <= _LONG_DAYS:
        return DAY_MS
    return 7 * DAY_MS if days <= _LONGEST_DAYS else 28 * DAY_MS


# ---- the time line


def _make_gpu_row(host: str, gpu: str, totals: GpuTotals, clock: LocalClock) -> GpuRow:
    lanes = _place_bars(totals.bars)
    drawn_ms = sum(bar.ms for _, bar in lanes)
    rest_bins = TimeBins()
    rest_bins.add(totals.bins)
    for _, bar in lanes:
        rest_bins.add_interval(bar.begin, bar.begin + bar.ms, -1)
    rest = tuple(_merge_bins(rest_bins.list_bins(), clock)) if totals.processes > len(lanes) else ()
    moved = tuple((lane, _move_bar(bar, clock)) for lane, bar in lanes)
    return GpuRow(host, gpu, totals, moved, totals.processes - len(lanes), totals.ms - drawn_ms, rest)


def _move_bar(bar: Bar, clock: LocalClock) -> Bar:
    begin = clock.shift(bar.begin)
    return bar._replace(begin=begin, ms=max(0, clock.shift(bar.begin + bar.ms) - begin))


def _place_bars(bars: Iterable[Bar]) -> list[tuple[int, Bar]]:
    """Return the bars for which there is a lane, with it. Those on one lane follow each other."""
    ends: list[int] = []
    placed: list[tuple[int, Bar]] = []
    for bar in sorted(bars, key=lambda bar: (bar.begin, -bar.ms, bar)):
        lane = next((lane for lane, end in enumerate(ends) if end <= bar.begin), len(ends))
        if lane >= MOST_LANES:
            continue
        ends[lane : lane + 1] = [bar.begin + bar.ms]
        placed.append((lane, bar))
    return placed


def _merge_bins(bins: Mapping[int, int], clock: LocalClock, most: int = 120) -> Iterator[tuple[int, int, float]]:
    """Yield begin, end and mean number of processes, in so many steps at most."""
    if not bins:
        return
    first, last = min(bins), max(bins)
    width = (last - first) // most + 1
    steps: Counter[int] = Counter()
    for number, ms in bins.items():
        steps[(number - first) // width] += ms
    for step, ms in sorted(steps.items()):
        begin = (first + step * width) * BIN_MS
        yield clock.shift(begin), clock.shift(begin + width * BIN_MS), ms / (width * BIN_MS)


# ---- the other figures


def _make_series(kind: str, causes: Mapping[tuple[int, str, str], int], clock: LocalClock, bar_ms: int) -> EventSeries:
    totals: Counter[str] = Counter()
    for (_, of_kind, cause), count in causes.items():
        if of_kind == kind:
            totals[cause] += count
    named = [cause for cause, _ in sorted(totals.items(), key=lambda item: (-item[1], item[0]))]
    named = named if len(named) <= MOST_CAUSES else named[: MOST_CAUSES - 1]
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for (number, of_kind, cause), count in causes.items():
        if of_kind == kind:
            local = clock.shift(number * BIN_MS)
            counts[_round_down(local, bar_ms)][cause if cause in named else OTHERS] += count
    shown = [(cause, totals[cause]) for cause in named]
    rest = sum(totals.values()) - sum(count for _, count in shown)
    return EventSeries(sum(totals.values()), (*shown, *([(OTHERS, rest)] if rest else [])), counts)


def _round_down(local: int, bar_ms: int) -> int:
    """Return the begin of the bar of time. Weeks begin on Mondays."""
    start = (7 - _FIRST_WEEKDAY) * DAY_MS if bar_ms > DAY_MS else 0
    return (local - start) // bar_ms * bar_ms + start


def _make_heat(gpus: Mapping[tuple[str, str], GpuTotals], clock: LocalClock) -> tuple[tuple[int, ...], ...]:
    heat = [[0] * 24 for _ in WEEKDAYS]
    for number, ms in sum_bins(gpus).items():
        local = clock.shift(number * BIN_MS)
        heat[(local // DAY_MS + _FIRST_WEEKDAY) % 7][local // HOUR_MS % 24] += ms
    return tuple(map(tuple, heat))


def _list_waits_by_day(waits: Mapping[tuple[int, str], Sequence[int]], clock: LocalClock) -> Iterator[WaitRow]:
    by_day: dict[int, list[int]] = defaultdict(list)
    for (number, _), several in waits.items():
        by_day[clock.shift(number * BIN_MS) // DAY_MS].extend(several)
    for day, several in sorted(by_day.items()):
        yield _make_wait_row(format_local(day * DAY_MS, "%Y-%m-%d"), several)


def _list_waits_by_user(waits: Mapping[tuple[int, str], Sequence[int]]) -> list[WaitRow]:
    by_user: dict[str, list[int]] = defaultdict(list)
    for (_, user), several in waits.items():
        by_user[user].extend(several)
    rows = [_make_wait_row(user, several) for user, several in by_user.items()]
    return sorted(rows, key=lambda row: (-row.longest_ms, -row.waited, row.name))


def _make_wait_row(name: str, several: Sequence[int]) -> WaitRow:
    waited = [ms for ms in several if ms >= WAIT_MS]
    return WaitRow(name, len(several), len(waited), round(median(waited)) if waited else 0, max(waited, default=0))


def format_local(local: int, pattern: str = "%Y-%m-%d %H:%M") -> str:
    """Return a time of the local clock for people."""
    from datetime import datetime, timezone

    return datetime.fromtimestamp(local / 1000, timezone.utc).strftime(pattern)
