"""The page's figures as Vega-Lite, drawn as SVG by vl-convert: no script is left on the page.

Each figure is laid out for two widths. Colours are variables of the page's style, and what differs in colour differs
in its hatching, too. Every mark has a description, which becomes its tooltip.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tfenv.audit.report.times import DAY_MS, HOUR_MS
from tfenv.audit.report.totals import Bar
from tfenv.audit.report.view import WEEKDAYS, EventSeries, GpuRow, PeakRow, ReportView, WaitRow, format_local
from tfenv.audit.report.words import clip, count, format_ms, format_part, format_size, name_gpu, name_process, show
from tfenv.dependencies import import_dependency

#: Pixels of a figure on a wide page and on a phone.
WIDTHS = {"wide": 1000, "narrow": 340}
#: How many hatchings there are, see `page.PATTERNS`. The last one is of all the rest.
PATTERNS = 8
MOST_GPUS, MOST_PEAKS, MOST_USERS, MOST_IDLE = 24, 20, 12, 12
#: Pixels of a character, on average.
_CHARACTER, _BOLD_CHARACTER = 6.3, 7.2
_LANE, _TITLE, _GAP, _REST = 18, 18, 12, 12
#: What a time line shows at least.
_SHORTEST_MS = 60_000
_FEW = 4
_SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
_INK, _FAINT, _LINE, _STRONG = "var(--ink)", "var(--faint)", "var(--line)", "var(--bar)"
_CONFIG = {
    "background": None,
    "view": {"stroke": None},
    "axis": {
        "labelColor": _INK, "titleColor": _INK, "domainColor": _FAINT, "tickColor": _FAINT, "gridColor": _LINE,
        "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
    },
    "text": {"fill": _INK, "fontSize": 12, "baseline": "middle"},
}  # fmt: skip
_MARK = re.compile(r'<path aria-label="([^"]*)"([^>]*)/>')


def draw(spec: Mapping[str, Any]) -> str:
    """Draw a figure as SVG.

    Raises:
        ImportError: vl-convert is not installed.
    """
    svg = str(import_dependency("vl_convert").vegalite_to_svg(dict(spec)))
    return _MARK.sub(r"<path\2><title>\1</title></path>", svg)


def _make_spec(width: float, height: float, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "$schema": _SCHEMA, "width": width, "height": height, "padding": 2, "config": _CONFIG, "layer": list(layers),
        "autosize": {"type": "pad", "contains": "padding"},
    }  # fmt: skip


def _place(height: float) -> dict[str, Any]:
    """Return a scale of pixels from the top."""
    return {"type": "quantitative", "scale": {"domain": [0, height], "range": [0, height], "nice": False}, "axis": None}


def _layer_texts(values: Sequence[Mapping[str, Any]], x: Mapping[str, Any], y: Mapping[str, Any], **mark: Any) -> Any:
    encoding = {"x": {"field": "x", **x}, "y": {"field": "y", **y}, "text": {"field": "text", "type": "nominal"}}
    return {"data": {"values": list(values)}, "mark": {"type": "text", "aria": False, **mark}, "encoding": encoding}


def _layer_boxes(values: Sequence[Mapping[str, Any]], x: Mapping[str, Any], y: Mapping[str, Any], **mark: Any) -> Any:
    return {
        "data": {"values": list(values)},
        "mark": {"type": "rect", "stroke": "var(--edge)", "strokeWidth": 1, **mark},
        "encoding": {
            "x": {"field": "x", **x},
            "x2": {"field": "x2"},
            "y": {"field": "y", **y},
            "y2": {"field": "y2"},
            "fill": {"field": "fill", "type": "nominal", "scale": None},
            "description": {"field": "about", "type": "nominal"},
        },
    }


def _make_time_axis(view: ReportView, width: float, **more: Any) -> dict[str, Any]:
    end = max(view.end, view.begin + _SHORTEST_MS)
    span = end - view.begin
    pattern = "%H:%M" if span <= DAY_MS else "%a %H:%M" if span <= 3 * DAY_MS else "%b %d"
    ticks = {"tickCount": max(3, int(width // 110)), "format": pattern, "labelFlush": True}
    axis = {"orient": "bottom", "title": None, "grid": True, **ticks, **more}
    return {
        "type": "temporal",
        "scale": {"type": "utc", "domain": [view.begin, end], "nice": False},
        "axis": {"labelOverlap": True, **axis},
    }


# ---- who used which GPU when


def list_user_patterns(view: ReportView) -> dict[str, int]:
    """Return the hatching of each user. Those who used the GPUs most have one of their own."""
    named = [user for user, _ in view.users[: PATTERNS - 1]]
    return {user: named.index(user) if user in named else PATTERNS - 1 for user, _ in view.users}


def make_timeline(view: ReportView, width: int) -> dict[str, Any]:
    """Make the time line of each GPU, the most used first."""
    patterns = list_user_patterns(view)
    boxes: list[dict[str, Any]] = []
    titles: list[dict[str, Any]] = []
    labels: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    per_pixel = max(view.end - view.begin, _SHORTEST_MS) / width
    top = 0.0
    for row in list_timeline_rows(view):
        for text in _title_gpu(row, width):
            titles.append({"x": 0, "y": top + _TITLE / 2, "text": clip(text, int(width / _BOLD_CHARACTER))})
            top += _TITLE
        for lane, bar in row.lanes:
            at, end = top + lane * _LANE, bar.begin + max(bar.ms, 2 * per_pixel)
            fill = f"url(#p{patterns.get(bar.user, PATTERNS - 1)})"
            about = _describe_bar(row, bar)
            boxes.append({"x": bar.begin, "x2": end, "y": at + 1, "y2": at + _LANE - 2, "fill": fill, "about": about})
            text = _label_bar(bar, int((bar.ms / per_pixel - 8) / _CHARACTER))
            labels += [{"x": bar.begin, "y": at + _LANE / 2, "text": text}] if text else []
        top += (max((lane for lane, _ in row.lanes), default=-1) + 1) * _LANE
        if row.rest:
            steps += _make_steps(row, top)
            top += _REST
        top += _GAP
    x, y = _make_time_axis(view, width), _place(top)
    pixel = {"type": "quantitative", "scale": {"domain": [0, width], "nice": False}, "axis": None}
    by_time = [
        _layer_boxes(steps, x, y, strokeWidth=0),
        _layer_boxes(boxes, _make_time_axis(view, width, orient="top", grid=False), y, clip=True),
        _layer_texts(labels, {**x, "axis": None}, y, align="left", dx=4, fontSize=11, clip=True),
    ]
    independent = {"scale": {"x": "independent"}, "axis": {"x": "independent"}}
    spec = _make_spec(
        width,
        top,
        [
            {"layer": by_time, "resolve": {"axis": {"x": "independent"}}},
            _layer_texts(titles, pixel, y, align="left", fontWeight="bold"),
        ],
    )
    return {**spec, "resolve": independent}


def list_timeline_rows(view: ReportView) -> list[GpuRow]:
    """Return the GPUs that are drawn: the most used ones, by name."""
    return sorted(view.gpus[:MOST_GPUS], key=lambda row: (row.host, row.gpu))


def _title_gpu(row: GpuRow, width: int) -> list[str]:
    totals = row.totals
    name = name_gpu(row.host, row.gpu, totals.name)
    uses = f"{count(totals.processes, 'process', 'processes')}, {format_ms(totals.ms)}"
    return [f"{name}: {uses}"] if width > WIDTHS["narrow"] else [name, uses]


def _label_bar(bar: Bar, characters: int) -> str:
    """Return as much of the process's name as there is room for, but at least its user."""
    mark = " …?" if bar.is_open else ""
    for text in (name_process(bar.user, bar.script, bar.job), show(bar.user, 40)):
        if len(text) + len(mark) <= characters:
            return text + mark
    return mark.strip() if 0 < len(mark) <= characters + 1 else ""


def _describe_bar(row: GpuRow, bar: Bar) -> str:
    end = "end unknown" if bar.is_open else format_local(bar.begin + bar.ms)
    begin = f"{'before ' if bar.is_cut else ''}{format_local(bar.begin)}"
    who = name_process(bar.user, bar.script, bar.job)
    return f"{who}, pid {bar.pid}, on {name_gpu(row.host, row.gpu)}: {begin} to {end} ({format_ms(bar.ms)})"


def _make_steps(row: GpuRow, top: float) -> list[dict[str, Any]]:
    highest = max(mean for _, _, mean in row.rest)
    return [
        {
            "x": begin, "x2": end, "y": top + _REST - 1, "y2": top + _REST - 1 - max(1.0, mean / highest * (_REST - 2)),
            "fill": _FAINT,
            "about": f"{mean:.1f} more on average, {format_local(begin)} to {format_local(end)}",
        }
        for begin, end, mean in row.rest
    ]  # fmt: skip


# ---- rows of bars


def _make_rows(rows: Sequence[Mapping[str, Any]], width: int, title: str) -> dict[str, Any]:
    """Make one bar a row, below its text: `outer` is outlined, `inner` is hatched inside of it."""
    step = 60 if any(row.get("below") for row in rows) else 44
    height = float(step * len(rows))
    largest = max([1e-9, *(max(row["outer"], row["inner"]) for row in rows)])
    x = {
        "type": "quantitative", "scale": {"domain": [0, largest], "nice": True},
        "axis": {"title": title, "grid": True, "tickCount": max(3, width // 120), "labelOverlap": True},
    }  # fmt: skip
    outlines, inners, titles = [], [], []
    for at, row in enumerate(rows):
        foot = (at + 1) * step - 6
        box = {"x": 0, "about": row["about"]}
        if row["outer"] > 0:
            outlines.append({**box, "x2": row["outer"], "y": foot - 18, "y2": foot, "fill": "var(--room)"})
        inners.append({**box, "x2": row["inner"], "y": foot - 15, "y2": foot - 3, "fill": row["fill"]})
        for line, text in enumerate(filter(None, (row["text"], row.get("below")))):
            place = at * step + 10 + 16 * line
            titles.append({"x": 0, "y": place, "text": clip(text, int(width / _CHARACTER))})
    y = _place(height)
    layers = [
        _layer_boxes(outlines, x, y, stroke=_INK),
        _layer_boxes(inners, x, y),
        _layer_texts(titles, x, y, align="left"),
    ]
    return _make_spec(width, height, layers)


def make_peaks(view: ReportView, width: int) -> dict[str, Any]:
    """Make the limit and the highest peak of each user on each GPU."""
    return _make_rows([_make_peak_row(row, width) for row in list_peak_rows(view)], width, "GiB")


def list_peak_rows(view: ReportView) -> list[PeakRow]:
    """Return the rows that are drawn: those that told a peak, the longest use first."""
    return [row for row in view.peaks if row.totals.peak >= 0][:MOST_PEAKS]


def _make_peak_row(row: PeakRow, width: int) -> dict[str, Any]:
    totals = row.totals
    limit = format_size(totals.limit) if totals.limit >= 0 else "no limit"
    part = f" ({format_part(totals.fullest)})" if totals.fullest >= 0 else ""
    figures = f"{format_size(totals.peak)} of {limit}{part}"
    verdict = f", {row.verdict}" if row.verdict else ""
    gpu = name_gpu(row.host, row.gpu)
    text = f"{show(row.user)}: {figures}{verdict}"
    is_wide = width > WIDTHS["narrow"]
    return {
        "text": f"{text}  ·  {gpu}" if is_wide else text,
        "below": "" if is_wide else gpu,
        "about": f"{show(row.user)} on {gpu}: peak {figures}{verdict}",
        "fill": "url(#p5)" if row.verdict == "nearly full" else "url(#p0)",
        "outer": max(totals.limit, 0) / 2**30,
        "inner": totals.peak / 2**30,
    }


def make_idle(view: ReportView, width: int) -> dict[str, Any]:
    """Make the longest idle uses."""
    rows = []
    for idle in view.idle[:MOST_IDLE]:
        who = name_process(idle.user, idle.script, idle.job)
        took = f"took {format_size(idle.peak)} of {format_size(idle.allowed)}"
        rows.append(
            {
                "text": f"{who}: {format_ms(idle.ms)}, {took}",
                "about": f"{who}, pid {idle.pid}, on {name_gpu(idle.host, idle.gpu)}: {format_ms(idle.ms)}, {took}",
                "fill": "url(#p2)",
                "outer": 0.0,
                "inner": idle.ms / HOUR_MS,
            }
        )
    return _make_rows(rows, width, "hours")


def make_waits(view: ReportView, width: int) -> dict[str, Any]:
    """Make the median and the longest waiting time of each user who waited."""
    return _make_rows([_make_wait_row(row, width) for row in list_wait_rows(view)], width, "minutes")


def list_wait_rows(view: ReportView) -> list[WaitRow]:
    """Return the users that are drawn: those who waited the longest."""
    return [row for row in view.waits_by_user if row.waited][:MOST_USERS]


def _describe_wait(row: WaitRow) -> str:
    times = f"median {format_ms(row.median_ms)}, longest {format_ms(row.longest_ms)}"
    return f"{show(row.name)}: {row.waited} of {row.chosen} waited, {times}"


def _make_wait_row(row: WaitRow, width: int) -> dict[str, Any]:
    about = _describe_wait(row)
    short = f"{show(row.name)}: {row.waited} waited, {format_ms(row.median_ms)}, up to {format_ms(row.longest_ms)}"
    text = about if width > WIDTHS["narrow"] else short
    return {
        "text": text,
        "about": about,
        "fill": "url(#p1)",
        "outer": row.longest_ms / 60_000,
        "inner": row.median_ms / 60_000,
    }


# ---- over time


def _make_count_axis(boxes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make an axis of numbers, without halves."""
    highest = max((box["y2"] for box in boxes), default=0)
    ticks = {"values": list(range(highest + 1))} if highest <= _FEW else {"tickCount": 4}
    return {"type": "quantitative", "axis": {"title": None, "format": "~s", **ticks}}


def make_events(view: ReportView, series: EventSeries, width: int) -> dict[str, Any]:
    """Make the bars of what happened over time, by cause."""
    patterns = {cause: number for number, (cause, _) in enumerate(series.causes)}
    boxes = []
    for begin, by_cause in sorted(series.counts.items()):
        below = 0
        for cause, times in sorted(by_cause.items(), key=lambda item: patterns[item[0]]):
            about = f"{format_local(begin)}: {show(cause)}: {count(times, 'time', 'times')}"
            boxes.append(
                {
                    "x": begin + view.bar_ms * 0.08, "x2": begin + view.bar_ms * 0.92, "y": below, "y2": below + times,
                    "fill": f"url(#p{patterns[cause]})", "about": about,
                }
            )  # fmt: skip
            below += times
    x = _make_time_axis(view, width)
    first, last = min(series.counts), max(series.counts) + view.bar_ms
    x["scale"]["domain"] = [min(view.begin // view.bar_ms * view.bar_ms, first), max(view.end, last)]
    y = _make_count_axis(boxes)
    return _make_spec(width - 40, 150, [_layer_boxes(boxes, x, y)])


def make_waits_by_day(view: ReportView, width: int) -> dict[str, Any]:
    """Make the number of those who waited, by day."""
    boxes = []
    for row in view.waits_by_day:
        begin = _parse_day(row.name)
        box = {"x": begin + DAY_MS * 0.1, "x2": begin + DAY_MS * 0.9, "y": 0, "y2": row.waited}
        boxes.append({**box, "fill": "url(#p1)", "about": _describe_wait(row)})
    x = _make_time_axis(view, width)
    days = [_parse_day(row.name) for row in view.waits_by_day]
    x["scale"]["domain"] = [min(view.begin // DAY_MS * DAY_MS, *days), max(view.end, max(days) + DAY_MS)]
    y = _make_count_axis(boxes)
    return _make_spec(width - 40, 130, [_layer_boxes(boxes, x, y)])


def _parse_day(text: str) -> int:
    from datetime import datetime, timezone

    return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=timezone.utc).timestamp() * 1000)


def make_heat(view: ReportView, width: int) -> dict[str, Any]:
    """Make the map of the busiest hours. On a phone the hours go down."""
    is_wide = width > WIDTHS["narrow"]
    largest = max(1, *(ms for row in view.heat for ms in row))
    left, top = 44, 22
    column, line = ((width - left) / 24, 30.0) if is_wide else ((width - left) / 7, 24.0)
    cells, texts = [], []
    for day, row in enumerate(view.heat):
        for hour, ms in enumerate(row):
            across, down = (hour, day) if is_wide else (day, hour)
            x, y = left + across * column, top + down * line
            hours = ms / HOUR_MS
            strength = round(ms / largest * 100)
            cells.append(
                {
                    "x": x + 1, "x2": x + column - 1, "y": y + 1, "y2": y + line - 1,
                    "fill": f"color-mix(in srgb, var(--bar) {strength * 0.75:.0f}%, var(--room))",
                    "about": f"{WEEKDAYS[day]} {hour:02}:00 to {(hour + 1) % 24:02}:00: {hours:.1f} GPU-hours",
                }
            )  # fmt: skip
            texts.append({"x": x + column / 2, "y": y + line / 2, "text": _shorten_number(hours)})
    texts += _list_heads(is_wide, left, top, column, line)
    height = top + line * (7 if is_wide else 24)
    scale = {"type": "quantitative", "scale": {"domain": [0, width], "nice": False}, "axis": None}
    place = _place(height)
    layers = [_layer_boxes(cells, scale, place, strokeWidth=0), _layer_texts(texts, scale, place, fontSize=11)]
    return _make_spec(width, height, layers)


def _list_heads(is_wide: bool, left: float, top: float, column: float, line: float) -> Iterable[dict[str, Any]]:
    hours = [f"{hour:02}" for hour in range(24)]
    across, down = (hours, WEEKDAYS) if is_wide else (WEEKDAYS, hours)
    for at, text in enumerate(across):
        yield {"x": left + (at + 0.5) * column, "y": top / 2, "text": text}
    for at, text in enumerate(down):
        yield {"x": left / 2, "y": top + (at + 0.5) * line, "text": text}


def _shorten_number(hours: float) -> str:
    if hours < 0.05:  # noqa: PLR2004 - it would be shown as 0.0
        return ""
    if hours < 10:  # noqa: PLR2004 - three characters
        return f"{hours:.1f}"
    return f"{hours:.0f}" if hours < 10_000 else f"{hours / 1000:.0f}k"  # noqa: PLR2004
