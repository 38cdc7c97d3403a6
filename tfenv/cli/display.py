"""What is shown once, or again and again: a table for people, JSON for programs, `--watch` for both."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar

from tfenv.cli.output import add_format, print_json, wants_colour
from tfenv.errors import escape_for_terminal
from tfenv.values import frozen

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["Column", "Cell", "Shown", "add_options", "block", "is_wide", "show"]

_SECONDS = 2.0
#: Looking costs the driver some work: more often is no use to anybody.
_FEWEST_SECONDS = 0.1
_WIDEST_PIPE = 10_000
#: Characters of a terminal in which UUIDs and paths have room in full.
_WIDE = 120


class Shown(Protocol):
    """What was seen at one moment."""

    def text(self) -> RenderableType:
        """For people."""
        ...

    def as_dict(self) -> dict[str, object]:
        """For programs."""
        ...


Sight = TypeVar("Sight", bound=Shown)


# ---- options


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--watch` and `--format`."""
    parser.add_argument(
        "--watch", nargs="?", type=_seconds, const=_SECONDS, metavar="SECONDS",
        help=f"look again every SECONDS (default {_SECONDS:g}), until Ctrl-C",
    )  # fmt: skip
    add_format(parser)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not _FEWEST_SECONDS <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(
            f'"{text}" is no number of seconds; write 2, or 0.5; {_FEWEST_SECONDS:g} at least'
        )
    return seconds


# ---- showing


def show(look: Callable[[], Sight], args: argparse.Namespace) -> Sight:
    """Look once, show it, and return it; with `--watch` again and again, until Ctrl-C."""
    if args.watch is not None:
        _watch(look, args)
    sight = look()
    _print_once(sight, args.format)
    return sight


def _watch(look: Callable[[], Shown], args: argparse.Namespace) -> NoReturn:
    """In place on a terminal, one block after the other in a pipe."""
    if args.format == "json":
        _repeat(lambda: print(json.dumps(look().as_dict(), ensure_ascii=True)), args.watch)
    elif sys.stdout.isatty():
        _show_in_place(look, args.watch)
    else:
        _repeat(lambda: _print_block(look()), args.watch)


def _print_once(shown: Shown, shape: str) -> None:
    if shape == "json":
        print_json(shown.as_dict())
    else:
        _print(shown.text())


def _repeat(action: Callable[[], None], seconds: float) -> NoReturn:
    while True:
        action()
        sys.stdout.flush()
        time.sleep(seconds)


def _print_block(shown: Shown) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"))
    _print(shown.text())
    print()


def _show_in_place(look: Callable[[], Shown], seconds: float) -> NoReturn:
    from rich.live import Live

    with Live(look().text(), console=_console(), auto_refresh=False) as live:
        while True:
            live.refresh()
            time.sleep(seconds)
            live.update(look().text())


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, color_system="auto" if wants_colour(sys.stdout) else None)


def _print(text: RenderableType) -> None:
    """As wide as the terminal; into a pipe, where grep wants a row in one line, as wide as it is."""
    console = _console()
    if not sys.stdout.isatty():
        console.width = _WIDEST_PIPE
        console.width = max(1, console.measure(text).maximum)
    with console.capture() as captured:
        console.print(text)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def is_wide() -> bool:
    """Whether there is room for what is long."""
    return not sys.stdout.isatty() or _console().width >= _WIDE


# ---- tables


@frozen
class Column:
    """One column: its title, and whether it holds numbers."""

    title: str
    number: bool = False


@frozen
class Cell:
    """A text in a style of rich's."""

    text: str
    style: str = ""


def block(
    columns: Sequence[Column], rows: Iterable[Sequence[Cell | str]], notes: Iterable[tuple[str, str]]
) -> RenderableType:
    """A table without lines, and notes below it: what each is about, and what is to be said."""
    from rich.console import Group
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.title, justify="right" if column.number else "left", no_wrap=column.number)
    for row in rows:
        table.add_row(*(_styled(cell) for cell in row))
    below = Table.grid(padding=(0, 2))
    for topic, said in notes:
        below.add_row(_styled(Cell(topic, "yellow")), _styled(said))
    if not table.row_count:
        return below
    return Group(table, "", below) if below.row_count else table


def _styled(cell: Cell | str) -> RenderableType:
    """Safe to print: names of processes and GPUs are other people's text."""
    from rich.text import Text

    return (
        Text(escape_for_terminal(cell))
        if isinstance(cell, str)
        else Text(escape_for_terminal(cell.text), style=cell.style)
    )
