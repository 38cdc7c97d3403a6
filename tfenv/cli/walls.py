"""Puts the limits that the driver keeps for cgroups into words and into JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tfenv.errors import escape_for_terminal
from tfenv.policy.model import Wall
from tfenv.policy.units import format_bytes


def describe_wall(wall: Wall) -> str:
    """Return a limit in words: "8.0 GiB for all programs in /sys/fs/cgroup/… together, 1.2 GiB of it used"."""
    cgroup = escape_for_terminal(wall.cgroup)
    used = f"{format_bytes(wall.used)} of it" if wall.used else "nothing of it"
    return f"{format_bytes(wall.limit)} for all programs in {cgroup} together, {used} used"


def group_walls(walls: Iterable[tuple[str, Wall | None]]) -> Iterator[tuple[str, str]]:
    """Yield each limit in words once, after the GPUs that it is for.

    Args:
        walls: The label of each GPU, and the limit there. None: there is none.
    """
    labels_by_text: dict[str, list[str]] = {}
    for label, wall in walls:
        if wall is not None:
            labels_by_text.setdefault(describe_wall(wall), []).append(label)
    yield from ((", ".join(labels), text) for text, labels in labels_by_text.items())
