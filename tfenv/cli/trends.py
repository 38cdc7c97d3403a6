"""Sparklines: how a value went while it was watched. They take what is left of the terminal's width."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TextIO

from tfenv.cli.tables import StyledText, TableColumn, build_table, make_console
from tfenv.values import frozen

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = "_.-=+*#@"
#: The Linux console's fonts have three of the eight blocks.
_WITHOUT_BLOCKS = frozenset({"linux", "dumb", ""})
_MOST_SAMPLES = 40
_FEWEST_SAMPLES = 6
_GAP = 2

Row = Sequence[StyledText | str]


class Trends:
    """The last samples of each value that is watched.

    Args:
        levels: What stands for the parts of the whole, from nothing to all of it.
    """

    def __init__(self, levels: str = _BLOCKS) -> None:
        self._levels = levels
        self._samples: dict[str, deque[float | None]] = {}

    def add(self, samples: Mapping[str, float | None]) -> None:
        """Add one sample of each value. What is not among them is forgotten.

        Args:
            samples: Each value as a part of its whole, 0 to 1. None: it is not told.
        """
        known = self._samples
        self._samples = {name: known.get(name, deque(maxlen=_MOST_SAMPLES)) for name in samples}
        for name, sample in samples.items():
            self._samples[name].append(sample)

    def draw(self, name: str, width: int) -> str:
        """Return the newest samples in so many characters, the newest at the right."""
        newest = list(self._samples.get(name, ()))[-width:]
        return "".join(map(self._choose_level, newest)).rjust(width)

    def _choose_level(self, sample: float | None) -> str:
        if sample is None:
            return " "
        return self._levels[min(int(max(sample, 0.0) * len(self._levels)), len(self._levels) - 1)]


def choose_levels(stream: TextIO) -> str:
    """Return the characters that a stream can show: blocks, or else ASCII."""
    if os.environ.get("TERM", "") in _WITHOUT_BLOCKS:
        return _ASCII
    try:
        _BLOCKS.encode(stream.encoding or "ascii")
    except (LookupError, UnicodeError):
        return _ASCII
    return _BLOCKS


@frozen
class TrendColumn:
    """A column of sparklines.

    Attributes:
        title: Its heading.
        names: The value of each row, as `Trends.add` names it.
    """

    title: str
    names: tuple[str, ...]


def add_trend_columns(
    columns: Sequence[TableColumn],
    rows: Sequence[Row],
    added: Sequence[TrendColumn],
    trends: Trends | None,
    expendable: str = "",
) -> tuple[Sequence[TableColumn], Sequence[Row]]:
    """Return columns and rows with sparklines, as wide as the terminal allows. Where there is no room, as they are.

    Args:
        columns: Of the table.
        rows: Of the table.
        added: What is added at the right.
        trends: The samples. None: nothing is watched.
        expendable: Title of a column that is left out if there is no room otherwise.
    """
    if trends is None or not rows:
        return columns, rows
    kept = [place for place, column in enumerate(columns) if column.title != expendable]
    fewer = [columns[place] for place in kept], [[row[place] for place in kept] for row in rows]
    for shown_columns, shown_rows in ((columns, rows), fewer):
        width = min(_find_room(shown_columns, shown_rows) // len(added) - _GAP, _MOST_SAMPLES)
        if width >= _FEWEST_SAMPLES:
            sparklines = [[trends.draw(name, width) for name in column.names] for column in added]
            widened = [[*row, *cells] for row, cells in zip(shown_rows, zip(*sparklines, strict=True), strict=True)]
            return [*shown_columns, *(TableColumn(column.title) for column in added)], widened
    return columns, rows


def _find_room(columns: Sequence[TableColumn], rows: Sequence[Row]) -> int:
    """Return how many characters of the terminal a table leaves free."""
    console = make_console(sys.stdout)
    return console.width - console.measure(build_table(columns, rows)).maximum
