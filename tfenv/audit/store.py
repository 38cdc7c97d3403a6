"""A store of many records: Parquet files of a directory, one folder a day, made and read with DuckDB.

`records/` has every record as it was written. `uses/` has what a summary asks of it, one row for each GPU of a record,
so that a hundred million of them can be summed up without a look at the records themselves.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from hashlib import blake2b
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from tfenv.audit.gpu_totals import SUMMARIZED_EVENTS, UserGpuTotals, list_uses
from tfenv.audit.query import LineTally, LoggedRecord, RecordQuery, count_times, parse_line, read_lines
from tfenv.audit.record import format_timestamp
from tfenv.dependencies import import_dependency
from tfenv.errors import TfenvError
from tfenv.values import frozen

RECORDS, USES = "records", "uses"
_LOCK, _WORK, _STATE = ".lock", ".work", "state.json"
_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d)T\d\d:\d\d:\d\d\.\d{6}Z")
#: The day of records whose timestamp is none of ours.
_NO_DAY = "unknown"
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
#: DuckDB spills to disk beyond it.
_MEMORY = "2GB"
#: Rows of which programs are counted one by one. More of them would take a minute.
_MOST_EXACT = 5_000_000
_BATCH = 10_000
_LARGEST = (1 << 63) - 1
_COLUMNS = {
    RECORDS: {"id": "UBIGINT", "day": "VARCHAR", "time": "BIGINT", "event": "VARCHAR", "host": "VARCHAR",
              "user": "VARCHAR", "line": "VARCHAR"},
    USES: {"id": "UBIGINT", "place": "INTEGER", "day": "VARCHAR", "time": "BIGINT", "event": "VARCHAR",
           "user": "VARCHAR", "program": "UBIGINT", "gpu": "VARCHAR", "times": "BIGINT", "cut": "VARCHAR[]",
           "asked_bytes": "BIGINT", "asked_fraction": "DOUBLE", "given_bytes": "BIGINT", "given_fraction": "DOUBLE"},
}  # fmt: skip
#: What makes a row of a kind different from all others.
_KEYS = {RECORDS: "id", USES: "id, place"}


_TOTALS = """
SELECT user, gpu, {counted}, sum(times) FILTER (event = 'policy_clamped'), sum(times) FILTER (event = 'policy_failed'),
    max(asked_bytes), max(asked_fraction), max(given_bytes), max(given_fraction), max(time)
FROM {source} GROUP BY user, gpu ORDER BY user, gpu
"""
_CUTS = """
SELECT user, gpu, name, sum(times) FROM (SELECT user, gpu, times, unnest(cut) AS name FROM {source} AND len(cut) > 0)
GROUP BY user, gpu, name
"""


class StoreError(TfenvError):
    """A store cannot be read or written. Its text says why."""


class StoreBusyError(StoreError):
    """Another process writes into the store."""


@frozen
class Compaction:
    """What was added to a store.

    Attributes:
        added: Records that are new in it.
        known: Records that it had already.
        skipped: Logs that have not changed since they were read last.
    """

    added: int = 0
    known: int = 0
    skipped: int = 0


def is_store(folder: Path) -> bool:
    """Return whether a directory is a store."""
    return (folder / RECORDS).is_dir() and (folder / USES).is_dir()


# ---- writing


def compact_logs(logs: Sequence[Path], folder: Path, query: RecordQuery, tally: LineTally) -> Compaction:
    """Add the records of logs to a store. A record that it has already, byte for byte, is not added again.

    New files are written beside and renamed. Whatever interrupts it, the next run goes on.

    Args:
        logs: The logs.
        folder: The store. It is made if it is not there.
        query: Which records are wanted.
        tally: Counts what is no record, and gets the logs that are left out.

    Raises:
        ImportError: DuckDB is not installed.
        StoreBusyError: Another process writes into it.
        StoreError: A file of it is damaged, or the disk is full.
        OSError: A log cannot be read, or the store not be written.
    """
    import_dependency("duckdb")  # before anything is made
    for name in (RECORDS, USES):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        state = _read_state(folder)
        marks = {str(log.resolve()): _mark(log, query) for log in logs}
        changed = [log for log in logs if state.get(str(log.resolve())) != marks[str(log.resolve())]]
        work = folder / _WORK
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            count = _write_rows(changed, work, query, tally)
            with _open_database(folder, work) as database:
                # In this order a record that is there has its uses, too.
                _add_new_rows(database, folder, USES)
                added = _add_new_rows(database, folder, RECORDS)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        if not tally.left_out:
            _write_state(folder, {**state, **marks})
    return Compaction(added, count - added, len(logs) - len(changed))


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreBusyError(f"{folder}: another process writes into it") from None
        yield


def _mark(log: Path, query: RecordQuery) -> str:
    """Return what changes when a log does."""
    status = log.stat()
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {query!r}"


def _read_state(folder: Path) -> dict[str, str]:
    try:
        state = json.loads((folder / _STATE).read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _write_state(folder: Path, state: Mapping[str, str]) -> None:
    new = folder / f"{_STATE}.new"
    new.write_text(json.dumps(state, indent=1))
    new.replace(folder / _STATE)


def _write_rows(logs: Sequence[Path], work: Path, query: RecordQuery, tally: LineTally) -> int:
    """Write the rows of all wanted records as lines of JSON, and return how many records there are."""
    count = 0
    with (work / RECORDS).open("w") as records, (work / USES).open("w") as uses:
        for log in logs:
            for line in read_lines(log, query, tally):
                record = parse_line(line, tally)
                if record is None or not query.matches(record):
                    continue
                count += 1
                row = _make_row(record, line)
                records.write(json.dumps(row) + "\n")
                for use in _make_uses(record, row):
                    uses.write(json.dumps(use) + "\n")
    return count


def _make_row(record: LoggedRecord, line: bytes) -> dict[str, Any]:
    # Of a damaged line what was read, so that it is read alike from the store.
    whole = line.decode() if line.startswith(b"{") and line.isascii() else json.dumps(record)
    found = _TIMESTAMP.fullmatch(record["timestamp"])
    return {
        "id": _hash(whole),
        "day": _NO_DAY if found is None else found[1],
        "time": _count_microseconds(record["timestamp"]),
        "event": record["event"],
        "host": str(record.get("host")),
        "user": str(record.get("user")),
        "line": whole,
    }


def _make_uses(record: LoggedRecord, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if record["event"] not in SUMMARIZED_EVENTS:
        return
    cut = record.get("cut")
    for place, use in enumerate(list_uses(record, RecordQuery())):
        yield {
            **{name: row[name] for name in ("id", "day", "time", "event", "user")},
            "place": place,
            "program": _hash(f"{record.get('host')}\n{record.get('pid')}"),
            "gpu": use.gpu,
            "times": count_times(record),
            "cut": [name for name in dict.fromkeys(cut) if isinstance(name, str)] if isinstance(cut, list) else [],
            "asked_bytes": _clip(use.asked_bytes),
            "asked_fraction": use.asked_fraction,
            "given_bytes": _clip(use.given_bytes),
            "given_fraction": use.given_fraction,
        }


def _clip(size: int | None) -> int | None:
    """Return a size as a column can hold it. No card has as much."""
    return None if size is None else max(-_LARGEST, min(size, _LARGEST))


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).digest(), "big")


def _count_microseconds(timestamp: str) -> int | None:
    """Return a timestamp of ours as microseconds since 1970. None: it is none."""
    if _TIMESTAMP.fullmatch(timestamp) is None:
        return None
    try:
        moment = datetime.fromisoformat(timestamp[:-1]).replace(tzinfo=timezone.utc)
    except ValueError:  # the 31st of February
        return None
    return (moment - _EPOCH) // timedelta(microseconds=1)


@contextmanager
def _open_database(folder: Path, work: Path) -> Iterator[Any]:
    """Open a database in memory that spills into a directory. What goes wrong in it is said of the store.

    Raises:
        ImportError: DuckDB is not installed.
        StoreError: A file of the store is damaged, or the disk is full.
    """
    duckdb = import_dependency("duckdb")
    try:
        with duckdb.connect() as database:
            database.execute(f"SET memory_limit = '{_MEMORY}'")
            database.execute(f"SET threads = {len(os.sched_getaffinity(0))}")
            database.execute("SET preserve_insertion_order = false")
            database.execute("SET temp_directory = ?", [str(work / "tfgpu-spill")])
            yield database
    except duckdb.Error as error:
        raise StoreError(f"{folder}: {str(error).splitlines()[0]}") from None


def _add_new_rows(database: Any, folder: Path, kind: str) -> int:
    """Add the rows that are not there yet, a file for each day, and return how many."""
    columns = ", ".join(f"'{name}': '{type_}'" for name, type_ in _COLUMNS[kind].items())
    source = f"read_json({_quote(folder / _WORK / kind)}, format = 'newline_delimited', columns = {{{columns}}})"
    added = 0
    for (day,) in database.execute(f"SELECT DISTINCT day FROM {source} ORDER BY day").fetchall():
        place = folder / kind / f"day={day}"
        old = _list_parts(place)
        keys = _KEYS[kind]
        query = f"SELECT * FROM {source} WHERE day = '{day}' QUALIFY row_number() OVER (PARTITION BY {keys}) = 1"
        if old:
            there = f"SELECT {keys} FROM read_parquet({_quote_all(old)})"
            query = f"SELECT * FROM ({query}) WHERE ({keys}) NOT IN ({there})"
        target = folder / _WORK / "part.parquet"
        order = "ORDER BY time" if kind == RECORDS else "ORDER BY user, gpu"
        database.execute(f"COPY ({query} {order}) TO {_quote(target)} (FORMAT parquet, COMPRESSION zstd)")
        (count,) = database.execute(f"SELECT count(*) FROM read_parquet({_quote(target)})").fetchone()
        if count:
            place.mkdir(exist_ok=True)
            target.replace(place / f"part-{len(old):06}.parquet")
        added += count
    return int(added)


def _list_parts(place: Path) -> list[Path]:
    return sorted(place.glob("part-*.parquet"))


def _quote(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


def _quote_all(paths: Iterable[Path]) -> str:
    return f"[{', '.join(map(_quote, paths))}]"


# ---- reading


def list_record_files(folder: Path, since: str = "") -> list[Path]:
    """Return the Parquet files of a store's records, oldest day first.

    Args:
        folder: The store.
        since: None of days before this moment.
    """
    days = sorted(folder.glob(f"{RECORDS}/day=*"))
    return [part for day in days if day.name[4:] >= since[:10] for part in _list_parts(day)]


def read_store_lines(path: Path) -> Iterator[bytes]:
    """Yield the records of a Parquet file as they were written, oldest first.

    Raises:
        ImportError: DuckDB is not installed.
        ValueError: It is no file of a store.
    """
    duckdb = import_dependency("duckdb")
    with duckdb.connect() as database:
        try:
            found = database.execute("SELECT line FROM read_parquet(?) ORDER BY time", [str(path)])
        except duckdb.Error as error:
            raise ValueError(f"it has no records: {str(error).splitlines()[0]}") from None
        while rows := found.fetchmany(_BATCH):
            yield from (line.encode() for (line,) in rows)


@frozen
class StoreSummary:
    """Totals of a store.

    Attributes:
        rows: By user and GPU.
        is_exact: Whether programs were counted one by one. Otherwise their number is right to about 2 %.
    """

    rows: tuple[UserGpuTotals, ...] = ()
    is_exact: bool = True


def can_summarize(query: RecordQuery) -> bool:
    """Return whether a store has all in `uses/` that these filters ask for."""
    return query == RecordQuery(events=query.events, users=query.users, since=query.since, until=query.until)


def summarize_store(folder: Path, query: RecordQuery) -> StoreSummary:
    """Sum up a store per user and GPU, as `gpu_totals.summarize_logs` does logs.

    Args:
        folder: The store.
        query: Of events, users and time. `can_summarize` tells whether it is.

    Raises:
        ImportError: DuckDB is not installed.
        StoreError: A file of it is damaged.
    """
    days = sorted(folder.glob(f"{USES}/day=*"))
    parts = [part for day in days if day.name[4:] >= query.since[:10] for part in _list_parts(day)]
    if not parts:
        return StoreSummary()
    with _open_database(folder, Path(gettempdir())) as database:
        where, values = _make_conditions(query)
        source = f"read_parquet({_quote_all(parts)}) WHERE {where}"
        (size,) = database.execute(f"SELECT count(*) FROM {source}", values).fetchone()
        is_exact = size <= _MOST_EXACT
        counted = "count(DISTINCT program)" if is_exact else "approx_count_distinct(program)"
        found = database.execute(_TOTALS.format(counted=counted, source=source), values).fetchall()
        cuts = database.execute(_CUTS.format(source=source), values).fetchall()
    rows = {(row[0], row[1]): _make_totals(row) for row in found}
    for user, gpu, name, times in cuts:
        rows[user, gpu].cut[name] = int(times)
    return StoreSummary(tuple(rows.values()), is_exact)


def _make_conditions(query: RecordQuery) -> tuple[str, list[object]]:
    conditions, values = ["true"], list[object]()
    for name, wanted in (("event", query.events), ("user", query.users)):
        if wanted:
            conditions.append(f"list_contains(?, {name})")
            values.append(sorted(wanted))
    for sign, moment in ((">=", query.since), ("<", query.until)):
        if moment:
            conditions.append(f"time {sign} ?")
            values.append(_count_microseconds(moment))
    return " AND ".join(conditions), values


def _make_totals(row: Sequence[Any]) -> UserGpuTotals:
    user, gpu, programs, clamped, failed, asked, asked_part, given, given_part, time = row
    last = "" if time is None else format_timestamp(_EPOCH + timedelta(microseconds=time))
    return UserGpuTotals(
        user,
        gpu,
        clamped=int(clamped or 0),
        failed=int(failed or 0),
        asked_bytes=asked,
        asked_fraction=asked_part,
        given_bytes=given,
        given_fraction=given_part,
        last=last,
        counted=programs,
    )
