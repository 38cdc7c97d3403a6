"""Tables without lines: as wide as the terminal. In a pipe, where grep wants a row in one line, as wide as they are."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, TextIO, TypeVar

from tfenv.cli.output import print_error, supports_colour
from tfenv.errors import escape_for_terminal
from tfenv.values import frozen

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

_Column = TypeVar("_Column", bound="TableColumn | str")
_Cell = TypeVar("_Cell", bound="StyledText | str")

_WIDEST_PIPE = 10_000
#: Characters of a terminal that shows UUIDs and paths in full.
_WIDE_TERMINAL = 120


@frozen
class TableColumn:
    """A column of a table.

    Attributes:
        title: Its heading.
        is_number: Whether it holds numbers: they are aligned on the right and never broken.
    """

    title: str
    is_number: bool = False


@frozen
class StyledText:
    """A text in a style.

    Attributes:
        text: May be other people's: what could steer the terminal is escaped when it is shown.
        style: As rich names it: "red", "dim".
    """

    text: str
    style: str = ""


def build_table(columns: Iterable[TableColumn | str], rows: Iterable[Sequence[StyledText | str]]) -> Table:
    """Return a table. A column's title alone stands for one of text."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        number, title = (False, column) if isinstance(column, str) else (column.is_number, column.title)
        table.add_column(
            title, justify="right" if number else "left", no_wrap=number, min_width=len(title) if number else None
        )
    for row in rows:
        table.add_row(*map(_style_text, row))
    return table


def hide_empty_column(
    title: str, columns: Sequence[_Column], rows: Sequence[Sequence[_Cell]]
) -> tuple[list[_Column], list[list[_Cell]]]:
    """Return columns and rows without the column of this title, if it is empty in all rows."""
    titles = [column if isinstance(column, str) else column.title for column in columns]
    place = titles.index(title)
    shown = [number for number in range(len(columns)) if number != place or any(row[place] for row in rows)]
    return [columns[number] for number in shown], [[row[number] for number in shown] for row in rows]


def clip_cell(text: str, widest: int) -> str:
    """Return a text that is no wider than so many characters. One that is cut ends in "…"."""
    return text if len(text) <= widest else f"{text[: widest - 1]}…"


def build_report(table: Table, notes: Iterable[tuple[str, str]]) -> RenderableType:
    """Return a table with notes below it. Each note is what it is about, and what is said of that."""
    from rich.console import Group
    from rich.table import Table

    below = Table.grid(padding=(0, 2))
    for topic, text in notes:
        below.add_row(_style_text(StyledText(topic, "yellow")), _style_text(text))
    if not table.row_count:
        return below
    return Group(table, "", below) if below.row_count else table


def _style_text(cell: StyledText | str) -> Text:
    from rich.text import Text

    cell = StyledText(cell) if isinstance(cell, str) else cell
    return Text(escape_for_terminal(cell.text), style=cell.style)


def make_console(stream: TextIO, file: TextIO | None = None) -> Console:
    """Return a console that shows what a stream can show, and writes into `file`, or else into that stream."""
    from rich.console import Console

    colours: Literal["auto"] | None = "auto" if supports_colour(stream) else None
    return Console(file=file or stream, force_terminal=stream.isatty(), color_system=colours, highlight=False)


def is_wide() -> bool:
    """Return whether stdout shows UUIDs and paths in full."""
    return not sys.stdout.isatty() or make_console(sys.stdout).width >= _WIDE_TERMINAL


def print_renderable(content: RenderableType, stream: TextIO | None = None, indent: int = 0) -> None:
    """Print what rich renders, on stdout or on another stream, without blanks at the ends of lines."""
    from rich.padding import Padding

    # rich writes into memory only. When nobody reads the pipe that it writes into, it ends the whole process with 1.
    target: TextIO = sys.stdout if stream is None else stream
    memory, padded = io.StringIO(), Padding(content, (0, 0, 0, indent))
    console = make_console(target, memory)
    if not target.isatty():
        console.width = _WIDEST_PIPE
        console.width = max(1, console.measure(padded).maximum)
    console.print(padded)
    text = "\n".join(line.rstrip() for line in memory.getvalue().splitlines())
    (print_error if target is sys.stderr else print)(text)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], indent: int = 0) -> None:
    """Print a table of plain text on stdout."""
    print_renderable(build_table(columns, rows), indent=indent)
