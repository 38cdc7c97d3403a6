"""What is shown once, or again and again: a table for people, JSON for programs, `--watch` for both."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar

from tfenv.cli.output import add_format_option, print_json, print_json_line
from tfenv.cli.tables import make_console, print_renderable
from tfenv.cli.trends import Trends, choose_levels

if TYPE_CHECKING:
    from rich.console import RenderableType

_DEFAULT_SECONDS = 2.0
#: Looking costs the driver some work: more often is no use to anybody.
_FEWEST_SECONDS = 0.1


class Snapshot(Protocol):
    """What was seen at one moment."""

    def render(self, trends: Trends | None = None) -> RenderableType:
        """Return it for people, with sparklines if it is watched on a terminal."""
        ...

    def list_samples(self) -> Mapping[str, float | None]:
        """Return the values that have a sparkline, each as a part of its whole. None: it is not told."""
        ...

    def as_dict(self) -> dict[str, object]:
        """Return it for programs."""
        ...


SnapshotType = TypeVar("SnapshotType", bound=Snapshot)


# ---- options


def add_display_options(parser: argparse.ArgumentParser) -> None:
    """Add `--watch` and `--format`."""
    parser.add_argument(
        "--watch", nargs="?", type=_parse_seconds, const=_DEFAULT_SECONDS, metavar="SECONDS",
        help=f"Refresh every SECONDS (default {_DEFAULT_SECONDS:g}) until Ctrl-C.",
    )  # fmt: skip
    add_format_option(parser)


def _parse_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not _FEWEST_SECONDS <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(
            f'"{text}" is not a number of seconds; write a number such as 2, at least {_FEWEST_SECONDS:g}'
        )
    return seconds


# ---- showing


def show_snapshots(look: Callable[[], SnapshotType], seconds: float | None, output_format: str) -> SnapshotType:
    """Show what is seen, once or until Ctrl-C.

    Args:
        look: Takes a snapshot.
        seconds: Time between two looks. None: look once.
        output_format: "text" or "json".

    Returns:
        The only snapshot. Does not return if `seconds` are given.
    """
    if seconds is not None:
        _watch(look, seconds, output_format)
    snapshot = look()
    if output_format == "json":
        print_json(snapshot.as_dict())
    else:
        print_renderable(snapshot.render())
    return snapshot


def _watch(look: Callable[[], Snapshot], seconds: float, output_format: str) -> NoReturn:
    """Show snapshots in place on a terminal, one block after the other in a pipe."""
    if output_format == "json":
        _repeat(lambda: print_json_line(look().as_dict()), seconds)
    elif sys.stdout.isatty():
        _show_in_place(look, seconds)
    else:
        _repeat(lambda: _print_block(look()), seconds)


def _repeat(action: Callable[[], None], seconds: float) -> NoReturn:
    while True:
        action()
        sys.stdout.flush()
        time.sleep(seconds)


def _print_block(snapshot: Snapshot) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"))
    print_renderable(snapshot.render())
    print()


def _show_in_place(look: Callable[[], Snapshot], seconds: float) -> NoReturn:
    from rich.live import Live

    trends = Trends(choose_levels(sys.stdout))

    def draw() -> RenderableType:
        snapshot = look()
        trends.add(snapshot.list_samples())
        return snapshot.render(trends)

    with Live(draw(), console=make_console(sys.stdout), auto_refresh=False) as live:
        while True:
            live.refresh()
            time.sleep(seconds)
            live.update(draw())
