"""Shares the reading of long logs among processes: parts of logs, and what comes of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from signal import SIG_DFL, SIGINT, signal
from typing import TYPE_CHECKING, TypeVar

from tfenv.audit.query import is_worth_reading
from tfenv.audit.rotation import COMPRESSED, STORED
from tfenv.values import frozen

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

_Result = TypeVar("_Result")

#: Of a log, for a process of its own. Below that it is read before others have started.
_SMALLEST_PART_BYTES = 16 << 20
_MOST_PROCESSES = 16


@frozen
class LogPart:
    """A part of a log. Of one that is compressed, or a pipe, the whole.

    Attributes:
        path: The log.
        begin: Where its first line may begin, in bytes.
        stop: Its lines begin before that. None: it goes to the end.
    """

    path: Path
    begin: int = 0
    stop: int | None = None


def split_logs(logs: Sequence[Path], since: str) -> list[LogPart]:
    """Return the parts of all logs that can hold a record of that moment or later, about one for each core.

    Raises:
        OSError: A log cannot be looked at.
    """
    logs = [log for log in logs if is_worth_reading(log, since)]
    size = sum(log.stat().st_size for log in logs) // _count_cores() + 1
    return [part for log in logs for part in _split_log(log, max(size, _SMALLEST_PART_BYTES))]


def _count_cores() -> int:
    return min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)


def _split_log(log: Path, size: int) -> list[LogPart]:
    if log.suffix in (*COMPRESSED, STORED) or not log.is_file():
        return [LogPart(log)]
    *begins, last = range(0, max(1, log.stat().st_size), size)
    return [*(LogPart(log, begin, begin + size) for begin in begins), LogPart(log, last)]


def map_parts(work: Callable[[LogPart], _Result], parts: Sequence[LogPart]) -> Iterator[_Result]:
    """Yield what comes of each part. In this process where there is one part or core, or no way to share the work.

    Args:
        work: Reads a part. It can be pickled, and so can what it returns.
        parts: The parts.
    """
    count = min(len(parts), _count_cores())
    pool = _make_pool(count) if count > 1 else None
    if pool is None:
        yield from map(work, parts)
        return
    with pool:
        yield from pool.map(work, parts)


def _make_pool(count: int) -> ProcessPoolExecutor | None:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    try:
        # Ctrl-C ends the others without a word.
        return ProcessPoolExecutor(count, get_context("fork"), signal, (SIGINT, SIG_DFL))
    except (ImportError, OSError):  # a machine without semaphores, as some sandboxes are
        return None
