"""The page: one HTML file without scripts, which fetches nothing. Every text of the log is escaped here."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tfenv.audit.query import LineTally
from tfenv.audit.report import figures
from tfenv.audit.report.times import HOUR_MS
from tfenv.audit.report.totals import IDLE_MS, IDLE_PART, MOST_IDLE, WAIT_MS, Bar
from tfenv.audit.report.view import (
    KINDS,
    MOST_ROWS,
    WEEKDAYS,
    EventSeries,
    GpuRow,
    PeakRow,
    ReportView,
    WaitRow,
    format_local,
)
from tfenv.audit.report.words import count, format_ms, format_part, format_size, show
from tfenv.dependencies import import_dependency

#: Logs and hosts that are named.
_NAMED = 10
_KIND_TITLES = {
    "clamped": "Asked for more and got less",
    "failed": "Policy not in force",
    "would_clamp": "Would be cut if the observed tables were in force",
}

STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")

_PEAK_COLUMNS = (
    "user", "host", "GPU", "#processes", "#with a peak", "#without a limit", "#limit", "#peak", "#of the limit",
    "remark",
)  # fmt: skip

#: Each hatching differs in its form, too: diagonals, dots, lines, a grid. `--c0` to `--c7` are its colours.
_SHAPES = (
    '<path d="M0 8L8 0M-2 2L2 -2M6 10L10 6"/>',
    '<path d="M0 0L8 8M-2 6L2 10M6 -2L10 2"/>',
    '<circle cx="2" cy="2" r="1.3"/><circle cx="6" cy="6" r="1.3"/>',
    '<path d="M0 2H8M0 6H8"/>',
    '<path d="M2 0V8M6 0V8"/>',
    '<path d="M0 4H8M4 0V8"/>',
    '<path d="M0 2L4 6L8 2"/>',
    "",
)
PATTERNS = "".join(
    f'<pattern id="p{number}" width="8" height="8" patternUnits="userSpaceOnUse">'
    f'<rect width="8" height="8" fill="var(--c{number})" fill-opacity=".35"/>'
    f'<g stroke="var(--c{number})" fill="var(--c{number})" stroke-width="1.6">{shape}</g></pattern>'
    for number, shape in enumerate(_SHAPES)
)
_DEFINITIONS = f'<svg class="defs" aria-hidden="true"><defs>{PATTERNS}</defs></svg>'


def check_drawing() -> None:
    """Find out early whether the figures can be drawn.

    Raises:
        ImportError: vl-convert is not installed.
    """
    import_dependency("vl_convert")


def make_page(view: ReportView, tally: LineTally, files: Sequence[str], asked: Sequence[str], now: int) -> str:
    """Make the page.

    Args:
        view: What it shows.
        tally: What could not be read.
        files: The logs that were read.
        asked: What was asked for, in words: a time, users.
        now: When it is made, in milliseconds since 1970.

    Raises:
        ImportError: vl-convert is not installed.
    """
    style_hash = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{style_hash}'; base-uri 'none'; form-action 'none'"
    body = "".join((*_write_head(view, tally, files, asked, now), *_write_sections(view), *_write_notes(view)))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>GPU use, {format_local(view.begin, '%Y-%m-%d')} to {format_local(view.end, '%Y-%m-%d')}</title>"
        f"<style>{STYLE}</style></head><body>{_DEFINITIONS}{body}</body></html>\n"
    )


# ---- pieces


def _paragraph(text: str, kind: str = "") -> str:
    return f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(text)}</p>"


def _figure(make: Callable[[int], dict[str, Any]], label: str, kind: str = "small") -> str:
    """Draw a figure for both widths. The tables are for those who do not see it."""
    drawn = (
        f'<div class="{name}">{_label_svg(figures.draw(make(width)), label)}</div>'
        for name, width in figures.WIDTHS.items()
    )
    return f'<figure class="{kind}">{"".join(drawn)}</figure>'


def _label_svg(svg: str, label: str) -> str:
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}. The table below has its figures." ', 1)


def _key(entries: Iterable[tuple[int, str]]) -> str:
    items = (
        f'<li><svg width="22" height="14" aria-hidden="true"><rect x=".5" y=".5" width="21" height="13" '
        f'fill="url(#p{pattern})" stroke="var(--edge)"/></svg>{escape(text)}</li>'
        for pattern, text in entries
    )
    return f'<ul class="key">{"".join(items)}</ul>'


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], left_out: str = "") -> str:
    """Write a table that opens on a click. Numbers, which stand at the right, are those columns that begin with "#"."""
    kinds = [' class="n"' if name.startswith("#") else "" for name in columns]
    names = [escape(name.removeprefix("#")) for name in columns]
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for kind, name in zip(kinds, names, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td{kind} data-name="{name}">{escape(str(cell))}</td>'
            for kind, name, cell in zip(kinds, names, row, strict=True)
        )
        + "</tr>"
        for row in rows[:MOST_ROWS]
    )
    more = len(rows) - MOST_ROWS
    missing = f"{more:,} more rows are not shown. {left_out}" if more > 0 else left_out
    caption = f"<caption>{escape(missing.strip())}</caption>" if missing else ""
    return (
        f"<details><summary>{escape(title)}</summary><table>{caption}<thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></details>"
    )


def _section(name: str, title: str, *content: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{"".join(content)}</section>'


# ---- the head


def _write_head(
    view: ReportView, tally: LineTally, files: Sequence[str], asked: Sequence[str], now: int
) -> Iterator[str]:
    events, totals = view.collection.events, view.collection.totals
    zone = view.clock.name_zone(events.last or now)
    yield "<header><h1>Who used the GPUs</h1>"
    yield _paragraph(f"{format_local(view.begin)} to {format_local(view.end)}, local time ({zone})", "faint")
    cards = (
        (
            "GPU-hours",
            f"{view.gpu_ms / HOUR_MS:,.{0 if view.gpu_ms >= 10 * HOUR_MS else 2}f}",
        ),
        ("users of GPUs", f"{len(view.users):,}"),
        ("GPUs", f"{len(view.gpus):,}"),
        ("processes", f"{totals.processes:,}"),
        ("asked for more", f"{view.events['clamped'].total:,}"),
        ("policy not in force", f"{view.events['failed'].total:,}"),
    )
    yield '<dl class="cards">'
    yield "".join(f"<div><dt>{escape(title)}</dt><dd>{escape(text)}</dd></div>" for title, text in cards)
    yield "</dl>"
    yield f'<nav aria-label="Figures">{"".join(_write_links())}</nav>'
    sources = _list(_list_sources(view, tally, files, asked, now))
    yield f"<details open><summary>What was read</summary>{sources}</details>"
    yield "</header>"


def _write_links() -> Iterator[str]:
    links = {
        "timeline": "Who, when", "peaks": "Limit and peak", "events": "Cut and failed", "waits": "Waiting",
        "heat": "Busiest hours", "idle": "Idle", "notes": "What is not known",
    }  # fmt: skip
    yield from (f'<a href="#{name}">{title}</a>' for name, title in links.items())


def _list(texts: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def _list_sources(
    view: ReportView, tally: LineTally, files: Sequence[str], asked: Sequence[str], now: int
) -> Iterator[str]:
    events = view.collection.events
    yield f"{count(len(files), 'log', 'logs')}: {_name_some(files)}"
    yield f"Asked for: {'; '.join(show(text, 200) for text in asked) or 'everything in them'}."
    several = ", ".join(f"{number:,} {name.removeprefix('policy_')}" for name, number in events.records.most_common())
    yield f"{count(sum(events.records.values()), 'record', 'records')}{f' ({several})' if several else ''}."
    yield f"{count(len(events.hosts), 'host', 'hosts')}: {_name_some(sorted(events.hosts))}"
    if tally.unreadable:
        yield f"{count(tally.unreadable, 'line is', 'lines are')} not audit records."
    for log, why in tally.left_out.items():
        yield f"Not read: {show(str(log), 200)}: {show(why, 200)}"
    yield f"Made {view.clock.format(now)} by tfgpu audit report."


def _name_some(names: Sequence[str]) -> str:
    shown = ", ".join(show(name, 200) for name in names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED:,} more" if len(names) > _NAMED else shown


# ---- the figures


def _write_sections(view: ReportView) -> Iterator[str]:
    yield _section("timeline", "Who used which GPU, and when", *_write_timeline(view))
    yield _section("peaks", "Limit and peak", *_write_peaks(view))
    yield _section("events", "Cut and failed", *_write_events(view))
    yield _section("waits", "Waiting for a GPU", *_write_waits(view))
    yield _section("heat", "The busiest hours", *_write_heat(view))
    yield _section("idle", "Idle: GPUs held and hardly used", *_write_idle(view))


def _write_timeline(view: ReportView) -> Iterator[str]:
    if not view.gpus:
        yield _paragraph("No process created a device on a GPU.")
        return
    yield _paragraph(
        "Each bar is a process, from its first device to its end. Where more run side by side than fit, or many were "
        "short, the grey steps below the bars show how many more there were. A bar that ends in “…?” has no recorded "
        "end: it was killed or still runs, and the bar ends with its last record."
    )
    patterns = figures.list_user_patterns(view)
    others = sum(pattern == figures.PATTERNS - 1 for pattern in patterns.values())
    named = [(pattern, show(user, 40)) for user, pattern in patterns.items() if pattern < figures.PATTERNS - 1]
    yield _key([*named, *([(figures.PATTERNS - 1, count(others, "other user", "other users"))] if others else [])])
    yield _figure(lambda width: figures.make_timeline(view, width), "Processes on each GPU over time", "large")
    shown, rest = figures.list_timeline_rows(view), view.gpus[figures.MOST_GPUS :]
    if rest:
        hours = format_ms(sum(row.totals.ms for row in rest))
        yield _paragraph(f"{len(rest)} more GPUs with {hours} in all are in the table only.")
    merged = sum(row.rest_count for row in shown)
    if merged:
        yield _paragraph(
            f"{count(merged, 'process is', 'processes are')} drawn as steps "
            f"({format_ms(sum(row.rest_ms for row in shown))} in all)."
        )
    yield _table(
        "Table: GPUs",
        ("host", "GPU", "model", "#processes", "#drawn one by one", "#without an end", "#GPU-hours"),
        [_list_gpu_cells(row) for row in view.gpus],
    )
    bars = sorted(
        ((bar, row) for row in shown for _, bar in row.lanes), key=lambda item: (-item[0].ms, item[0].begin, item[0])
    )
    yield _table(
        "Table: the longest processes",
        ("user", "script", "job", "#pid", "host", "GPU", "from", "to", "#hours"),
        [_list_bar_cells(bar, row) for bar, row in bars],
    )


def _list_gpu_cells(row: GpuRow) -> tuple[object, ...]:
    totals = row.totals
    drawn = totals.processes - row.rest_count
    hours = f"{totals.ms / HOUR_MS:,.2f}"
    return (
        show(row.host), show(row.gpu) or "all GPUs", show(totals.name), f"{totals.processes:,}", f"{drawn:,}",
        f"{totals.still_open:,}", hours,
    )  # fmt: skip


def _list_bar_cells(bar: Bar, row: GpuRow) -> tuple[object, ...]:
    begin = ("before " if bar.is_cut else "") + format_local(bar.begin)
    end = "end unknown" if bar.is_open else format_local(bar.begin + bar.ms)
    return (
        show(bar.user), show(bar.script), show(bar.job), bar.pid, show(row.host), show(row.gpu), begin, end,
        f"{bar.ms / HOUR_MS:,.2f}",
    )  # fmt: skip


def _write_peaks(view: ReportView) -> Iterator[str]:
    if not figures.list_peak_rows(view):
        yield _paragraph("No process told how much memory it took. It does at its end, where the framework tells.")
        return
    yield _paragraph(
        "The outline is the largest limit that a user had on a GPU, the hatched bar the most that one of their "
        "processes took. The percentage is that of the process that came nearest to its own limit. “Nearly full” is "
        "95% or more, “far too large” means that no process took a quarter of what it might."
    )
    yield _figure(lambda width: figures.make_peaks(view, width), "Limit and highest peak by user and GPU", "large")
    missing = len(view.peaks) - len(figures.list_peak_rows(view))
    if missing:
        pairs = count(missing, "pair", "pairs")
        yield _paragraph(f"{pairs} of user and GPU with less use, or without a peak, are in the table only.")
    yield _table(
        "Table: limits and peaks",
        (
            "user",
            "host",
            "GPU",
            "#processes",
            "#with a peak",
            "#without a limit",
            "#limit",
            "#peak",
            "#of the limit",
            "remark",
        ),
        [_list_peak_cells(row) for row in view.peaks],
    )


def _list_peak_cells(row: PeakRow) -> tuple[object, ...]:
    totals = row.totals
    return (
        show(row.user), show(row.host), show(row.gpu), f"{totals.processes:,}", f"{totals.measured:,}",
        f"{totals.unlimited:,}", format_size(totals.limit), format_size(totals.peak), format_part(totals.fullest),
        row.verdict,
    )  # fmt: skip


def _write_events(view: ReportView) -> Iterator[str]:
    for kind in KINDS:
        series = view.events[kind]
        if series.total:
            yield f"<h3>{escape(_KIND_TITLES[kind])}: {count(series.total, 'time', 'times')}</h3>"
            yield _key((number, f"{show(cause)}: {times:,}") for number, (cause, times) in enumerate(series.causes))
            yield _figure(_make_drawer(view, series), f"{_KIND_TITLES[kind]}, over time and by cause")
            yield _write_event_table(kind, series)
        elif kind != "would_clamp":
            yield _paragraph(f"{_KIND_TITLES[kind]}: never.")


def _make_drawer(view: ReportView, series: EventSeries) -> Callable[[int], dict[str, Any]]:
    return lambda width: figures.make_events(view, series, width)


def _write_event_table(kind: str, series: EventSeries) -> str:
    rows = [
        (format_local(begin), show(cause), f"{times:,}")
        for begin, causes in sorted(series.counts.items())
        for cause, times in sorted(causes.items())
    ]
    return _table(f"Table: {_KIND_TITLES[kind].lower()}", ("from", "cause", "#times"), rows)


def _write_waits(view: ReportView) -> Iterator[str]:
    chosen = sum(row.chosen for row in view.waits_by_user)
    waited = sum(row.waited for row in view.waits_by_user)
    if not chosen:
        yield _paragraph("No process had to choose a GPU, or to wait for one ({count = …}, memory_total).")
        return
    yield _paragraph(
        f"{count(chosen, 'process', 'processes')} had to choose a GPU, {waited:,} of them waited for it, "
        f"for {WAIT_MS // 1000} s or longer. Medians are of those who waited."
    )
    columns = ("#had to choose", "#waited", "#median", "#longest")
    if waited:
        yield "<h3>How many waited, by day</h3>"
        yield _figure(lambda width: figures.make_waits_by_day(view, width), "How many waited, by day")
        yield "<h3>How long, by user: the outline is the longest time, the hatched bar the median</h3>"
        yield _figure(lambda width: figures.make_waits(view, width), "Longest and median waiting time by user", "large")
        more = sum(bool(row.waited) for row in view.waits_by_user) - len(figures.list_wait_rows(view))
        if more > 0:
            yield _paragraph(f"{count(more, 'user', 'users')} who waited less are in the table only.")
    yield _table("Table: waiting by day", ("day", *columns), [_list_wait_cells(row) for row in view.waits_by_day])
    yield _table("Table: waiting by user", ("user", *columns), [_list_wait_cells(row) for row in view.waits_by_user])


def _list_wait_cells(row: WaitRow) -> tuple[object, ...]:
    times = (format_ms(row.median_ms), format_ms(row.longest_ms)) if row.waited else ("", "")
    return (show(row.name), f"{row.chosen:,}", f"{row.waited:,}", *times)


def _write_heat(view: ReportView) -> Iterator[str]:
    yield _paragraph(
        f"GPU-hours by weekday and hour, local time ({view.clock.name_zone(view.collection.events.last)}). A "
        "process that has two GPUs for an hour counts two, and so do two processes that share one GPU."
    )
    yield _figure(lambda width: figures.make_heat(view, width), "GPU-hours by weekday and hour", "small heat")
    yield _table(
        "Table: GPU-hours by weekday and hour",
        ("hour", *(f"#{day}" for day in WEEKDAYS)),
        [
            (f"{hour:02}:00", *(f"{view.heat[day][hour] / HOUR_MS:,.2f}" for day in range(len(WEEKDAYS))))
            for hour in range(24)
        ],
    )


def _write_idle(view: ReportView) -> Iterator[str]:
    totals = view.collection.totals
    yield _paragraph(
        f"A use of a GPU is idle here if a process had the GPU for {format_ms(IDLE_MS)} or longer and never took "
        f"{IDLE_PART:.0%} of what it might: of its limit, or of the card's memory where it had no limit. "
        f"{totals.checked:,} uses were long enough and told enough, {totals.idle_count:,} of them were idle, "
        f"{format_ms(totals.idle_ms)} in all. {totals.unmeasured:,} long uses told no peak or no size, as after a kill."
    )
    if not view.idle:
        return
    yield _figure(lambda width: figures.make_idle(view, width), "The longest idle uses, in hours", "large")
    more = totals.idle_count - len(view.idle)
    yield _table(
        "Table: idle uses",
        ("user", "script", "job", "#pid", "host", "GPU", "from", "#hours", "#peak", "#might take", "lease"),
        [
            (
                show(idle.user), show(idle.script), show(idle.job), idle.pid, show(idle.host), show(idle.gpu),
                view.clock.format(idle.begin), f"{idle.ms / HOUR_MS:,.2f}", format_size(idle.peak),
                format_size(idle.allowed), "yes" if idle.has_lease else "",
            )
            for idle in view.idle
        ],
        f"The longest {MOST_IDLE}. {more:,} shorter ones are counted above." if more > 0 else "",
    )  # fmt: skip


# ---- what is not known


def _write_notes(view: ReportView) -> Iterator[str]:
    yield _section("notes", "What is not known", _list(_list_notes(view)))


def _list_notes(view: ReportView) -> Iterator[str]:
    totals, events, closed = view.collection.totals, view.collection.events, view.collection.closed_early
    yield (
        "Only processes under a policy write records. What other programs did with the GPUs is not here. A GPU counts "
        "as used from the first device to the end of the process, whether or not it computed."
    )
    begin = "it counts from its start, as it told at its end"
    dated = "before 2015, in the future, or none: left out"
    facts = (
        (totals.still_open, "process has", "processes have", "no recorded end", "killed, or still running"),
        (totals.cut, "process has", "processes have", "no recorded begin", begin),
        (totals.without_gpu, "process", "processes", "created devices and had no GPU", "in no figure"),
        (totals.shifted, "process", "processes", "ran while the clock was set", "its own measure of time counts"),
        (events.misdated, "record has", "records have", "a time that cannot be right", dated),
        (events.lost, "record", "records", "could not be written", "as the processes told later"),
        (closed, "process", "processes", "without an end closed early", "too many to keep in mind"),
    )
    for number, one, several, what, why in facts:
        if number:
            yield f"{count(number, one, several)} {what} ({why})."
