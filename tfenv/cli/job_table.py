"""What a job did with its GPUs, as a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tfenv.audit.job_names import format_step
from tfenv.audit.job_report import JobGpu, JobProcess, JobReport, format_duration, format_job_lines
from tfenv.cli.tables import StyledText, TableColumn, build_report, build_table, is_wide
from tfenv.policy.units import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

_BAR_CELLS = 10
#: From here on a peak is close to its limit.
_NEARLY_FULL = 0.95


def build_job_report(report: JobReport) -> RenderableType:
    """Return the report: a line on the whole job, a row for each process and GPU, and notes."""
    from rich.console import Group
    from rich.text import Text

    from tfenv.errors import escape_for_terminal

    processes = report.processes
    steps = {format_step(process.job) for process in processes}
    shown = {
        "host": len({process.host for process in processes}) > 1,
        "user": len({process.user for process in processes}) > 1,
        "step": len(steps) > 1,
        "role": len(processes) > 1 and any(process.role for process in processes),
        "program": True,
    }
    names = [name for name, is_shown in shown.items() if is_shown]
    numbers = [TableColumn(title, is_number=True) for title in ("limit", "peak", "", "time")]
    columns: list[TableColumn | str] = [TableColumn("pid", is_number=True), *names, "GPU", *numbers]
    rows = [row for process in processes for row in _build_rows(process, names)]
    title = Text(escape_for_terminal(format_job_lines(report)[0]))
    return Group(title, "", build_report(build_table(columns, rows), _find_notes(report)))


def _build_rows(process: JobProcess, shown: Sequence[str]) -> Iterator[tuple[StyledText | str, ...]]:
    cells = {
        "host": process.host,
        "user": process.user,
        "step": format_step(process.job),
        "role": process.role,
        "program": _format_program(process),
    }
    first = [str(process.pid), *(cells[name] for name in shown)]
    time = "" if process.seconds is None else format_duration(process.seconds)
    for number, gpu in enumerate(process.gpus or (None,)):
        # What is the same for all GPUs of a process is shown once.
        start, end = (first, time) if number == 0 else ([""] * len(first), "")
        yield (*start, *_format_gpu(gpu), end)


def _format_program(process: JobProcess) -> str:
    if process.script is None:
        return process.job.get("notebook", "-").rpartition("/")[2]
    return process.script if is_wide() else process.script.rpartition("/")[2]


def _format_gpu(gpu: JobGpu | None) -> tuple[StyledText | str, ...]:
    if gpu is None:
        return ("-", "", "", "")
    limit = "-" if gpu.limit_fraction is None else f"{gpu.limit_fraction:.0%}"
    limit = limit if gpu.limit_bytes is None else format_bytes(gpu.limit_bytes)
    peak = "-" if gpu.peak_bytes is None else format_bytes(gpu.peak_bytes)
    return (gpu.gpu if is_wide() else gpu.gpu[:12], limit, peak, _format_part(gpu.part))


def _format_part(part: float | None) -> StyledText:
    """Return a bar and a percentage. In a narrow terminal only that."""
    if part is None:
        return StyledText("")
    style = "yellow" if part >= _NEARLY_FULL else ""
    filled = min(_BAR_CELLS, round(part * _BAR_CELLS))
    bar = f"{'█' * filled}{'░' * (_BAR_CELLS - filled)} " if is_wide() else ""
    return StyledText(f"{bar}{part:.0%}", style)


def _find_notes(report: JobReport) -> Iterator[tuple[str, str]]:
    for text in report.failed:
        yield "not in force", text
    for text in report.cut:
        yield "asked for more", text
    unended = [str(process.pid) for process in report.processes if process.ended is None]
    if unended:
        yield (
            "no end",
            f"pid {', '.join(unended)}: still running, killed, or had no GPU; its peak and time are not known",
        )
