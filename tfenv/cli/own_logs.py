"""Which logs a command reads: those that were named, or else the one that the policy in force here names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from glob import escape, glob
from importlib.util import find_spec
from pathlib import Path

from tfenv.audit.query import LineTally, RecordQuery
from tfenv.audit.rotation import STORED, LogOrigin, find_all_log_files
from tfenv.audit.sinks import RefusedLogError, expand_path, list_log_names
from tfenv.audit.store import can_summarize, is_store, list_record_files
from tfenv.policy.model import Start


def find_logs(files: Sequence[Path] | None, start: Start | None = None) -> tuple[list[Path], LineTally]:
    """Return the logs with what was rotated away from them, and what counts their lines.

    Args:
        files: The logs. None: the one that the policy here names.
        start: Where the policy is looked for. None: as this process started.
    """
    named, origin = find_named_logs(files, start)
    logs, tally = find_all_log_files(named), LineTally(origin=origin)
    if files is not None or any(log.exists() for log in logs):
        return logs, tally
    return [], tally


def find_named_logs(files: Sequence[Path] | None, start: Start | None = None) -> tuple[Sequence[Path], LogOrigin]:
    """Return the logs without what was rotated away from them. The arguments are those of `find_logs`."""
    return _find_own_logs(start) if files is None else (list(_expand_named(files)), LogOrigin())


def _expand_named(files: Sequence[Path]) -> Iterator[Path]:
    """Yield the logs that are named: of a directory all in it and below it, of a pattern in quotes those it matches."""
    for path in files:
        if path.is_dir():
            yield from _list_logs(path)
        elif not path.exists() and any(char in str(path) for char in "*?["):
            found = [Path(name) for name in sorted(glob(str(path), recursive=True))]
            yield from _expand_named(found) if found else [path]
        else:
            yield path


def _list_logs(folder: Path) -> Iterator[Path]:
    """Yield the logs below a directory, without what was rotated away from them. Of a store those with its records."""
    if is_store(folder):
        yield from list_record_files(folder)
        return
    for place, folders, names in os.walk(folder):
        here = Path(place)
        stores = [name for name in folders if is_store(here / name)]
        folders[:] = sorted(name for name in folders if name not in stores)
        for name in stores:
            yield from list_record_files(here / name)
        yield from (here / name for name in sorted(names) if name.endswith((".jsonl", STORED)))


def _find_own_logs(start: Start | None = None) -> tuple[Sequence[Path], LogOrigin]:
    """Return the log that the policy in force here names, or the caller's own.

    Every record is in every log of a policy: the first one that exists is enough.
    """
    from tfenv.pipeline import current_start, load

    loaded = load(start or current_start())
    candidates = [
        (_expand_log(name, loaded.start), LogOrigin(is_trusted=False, name=name))
        for name in list_log_names(loaded.policy.audit)
    ]
    existing = [logs for logs in candidates if any(log.exists() for log in find_all_log_files(logs[0]))]
    return [*existing, *candidates, ([], LogOrigin())][0]


def _expand_log(name: str, start: Start) -> list[Path]:
    """Return the log's path. For root those of all users if each has one of their own."""
    if start.uid == 0 and "<uid>" in name and name.startswith("/"):
        origin = LogOrigin(name=name)
        found = sorted(Path("/").glob(escape(name[1:]).replace("<uid>", "*")))
        logs = [log for log in found if origin.is_whole(log)]
        if logs:
            return logs
    try:
        return [Path(expand_path(name, start.home, start.uid))]
    except RefusedLogError:
        return []


def find_store(files: Sequence[Path] | None, query: RecordQuery) -> Path | None:
    """Return the store, if nothing but one is named and it can be summed up by these filters without its records.

    Without DuckDB it is read as logs are, which says what to install.
    """
    if files is None or len(files) != 1 or not is_store(files[0]) or not can_summarize(query):
        return None
    return files[0] if find_spec("duckdb") is not None else None
