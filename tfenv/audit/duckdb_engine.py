"""Groups a long log with DuckDB, which reads and parses on all cores: an optional library, tfenv[audit].

DuckDB only reduces many records to few: it puts together those that are equal but for their time and process. What a
record means is decided where it is decided for every record, in Python. What DuckDB cannot read goes there, too, line
by line, or as a whole file. So both ways of reading give the same answer, but for what JSON readers never agreed on: a
key twice in one object, as in two records melted into one, and a bare nan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from tfenv.audit.query import (
    RECORD_BEGIN,
    TIMESTAMP_BYTES,
    LineTally,
    RecordGroup,
    RecordQuery,
    decode_json,
    make_group,
    read_groups,
    select_records,
)
from tfenv.dependencies import import_dependency

#: What DuckDB decompresses itself, by the suffix. Everything else is taken as it is.
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_COMPRESSED_OTHERWISE = (".bz2", ".xz")

#: Where the fields are that a summary needs, and those that only a filter needs.
_FIELDS = {
    "timestamp": "$.timestamp",
    "event": "$.event",
    "pid": "$.pid",
    "user": "$.user",
    "host": "$.host",
    "devices": "$.devices",
    "repeats": "$.repeats",
    "virtual_devices": "$.asked.virtual_devices",
    "per_process_gpu_memory_fraction": "$.asked.per_process_gpu_memory_fraction",
}
_ASKED = ("virtual_devices", "per_process_gpu_memory_fraction")
_FILTERED = ("uid", "status", "project", "script")

# A line is a text between two newlines: no delimiter that a text could have, no quotes, no header. What JSON readers do
# not agree on (a comma before a bracket), a process number that is none, and what DuckDB cannot parse is odd: it comes
# back as it is, each different line once. How a line is written does not matter: a collector may have put blanks into
# it, or its keys into another order.
# Plans, which are half of a log, are left out before they are parsed, where they are written as we write them. Other
# events are not: a condition on a field would make DuckDB parse each line twice.
_SQL = """
WITH line AS (
    SELECT line, starts_with(line, $begin) AS ours
    FROM read_csv($path, columns = {{'line': 'VARCHAR'}}, auto_detect = false, header = false,
        delim = '\x01', quote = '', escape = '', comment = '', new_line = '\\n', compression = $compression)
    WHERE line IS NOT NULL AND NOT line LIKE $plans AND NOT {out_of_time}
), parsed AS (
    SELECT line, ours, CAST(try(json_extract(line, {paths})) AS VARCHAR[]) AS field FROM line
), checked AS (
    SELECT field, CASE WHEN field IS NULL
        OR length(field[1]) <> $quoted_timestamp OR field[1] IS NULL
        OR contains(field[1], '\\') OR NOT starts_with(field[2], '"') OR field[2] IS NULL
        OR length(field[3]) > 40 OR regexp_matches(field[3], '[eENI]')
        OR contains(line, ',}}') OR contains(line, ',]')
        OR (NOT ours AND regexp_matches(line, ',\\s+[}}\\]]')) THEN line END AS odd
    FROM parsed
)
SELECT odd, count(*), max(field[1]), list(DISTINCT field[3]), field[2], field[4:] FROM checked
WHERE odd IS NOT NULL OR (field[2] <> $plan AND {in_time})
GROUP BY ALL
"""
#: Whole plans as they are written, where they are not wanted. Where they are wanted, a form that nothing has.
_PLANS = RECORD_BEGIN.decode() + "_" * TIMESTAMP_BYTES + '","event":"policy_loaded",%}'
_NO_PLANS = ""
# Compared as a whole, lines come in the order of their timestamps. Behind a torn line that is out of time a whole
# record may follow; a line without its first brace that begins a record has another one in it.
_OUT_OF_TIME = """(starts_with(line, $begin) AND (line < $begin || $since OR line >= $begin || $until)
    AND NOT contains(ltrim(line, '{'), $begin))"""

_IN_TIME = "field[1] >= '\"' || $since AND field[1] < '\"' || $until"


def is_installed() -> bool:
    """Tell whether DuckDB is installed."""
    return PathFinder.find_spec("duckdb") is not None


def group_records(log: Path, query: RecordQuery, tally: LineTally) -> Iterator[RecordGroup]:
    """Yield the wanted records of a log, put together where they differ in nothing but time and process.

    Raises:
        OSError: The log cannot be read.
    """
    rows = None if _is_for_python(log) else _read_rows(log, query)
    if rows is None:
        yield from read_groups(log, query, tally)
        return
    names = _list_fields(query)[3:]
    prefilter = query.build_prefilter()
    for odd_line, times, timestamp, pids, event, fields in rows:
        if odd_line is None:
            try:
                group = _make_group(dict(zip(names, fields, strict=True)), event, timestamp, times, pids)
            except (ValueError, RecursionError):
                # Without DuckDB a line that cannot match is not parsed, and so not counted.
                text = " ".join(filter(None, (event, *fields))).encode()
                tally.unreadable += times * all(any(wanted in text for wanted in texts) for texts in prefilter)
                continue
            if query.matches(group.record):
                yield group
        else:
            yield from map(make_group, select_records([odd_line.encode()] * times, query, tally))


def _is_for_python(log: Path) -> bool:
    """Tell whether the log is compressed in another way, a pipe, or at a path that DuckDB would take for a pattern."""
    return log.suffix in _COMPRESSED_OTHERWISE or not log.is_file() or any(sign in str(log) for sign in "*?[")


def _read_rows(log: Path, query: RecordQuery) -> Sequence[Any] | None:
    """Return what DuckDB makes of the log. None where it does not take it: bytes that are no text, a damaged end."""
    log.open("rb").close()  # so that a log that cannot be read is Python's error
    try:
        duckdb = import_dependency("duckdb")
    except ImportError:  # half uninstalled, or made for another Python
        return None
    parameters = {
        "path": str(log.absolute()),
        "compression": _COMPRESSION.get(log.suffix, "none"),
        "begin": RECORD_BEGIN.decode(),
        "quoted_timestamp": TIMESTAMP_BYTES + 2,
        "plans": _NO_PLANS,
        "plan": "",
    }
    if query.events and "policy_loaded" not in query.events:
        parameters |= {"plans": _PLANS, "plan": '"policy_loaded"'}
    out_of_time, in_time = "false", "true"
    if query.since or query.until:
        out_of_time, in_time = _OUT_OF_TIME, _IN_TIME
        parameters |= {"since": query.since, "until": query.until or "~"}
    sql = _SQL.format(out_of_time=out_of_time, in_time=in_time, paths=_list_paths(query))
    try:
        with duckdb.connect(config=_CONFIGURATION) as connection:
            rows: list[Any] = connection.execute(sql, parameters).fetchall()
    except duckdb.Error:
        return None
    return rows


#: In memory, without files beside the program. Nothing is fetched from anywhere.
_CONFIGURATION = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "temp_directory": "",
}


def _list_fields(query: RecordQuery) -> list[str]:
    """Name the fields to group by: those the query needs. With others there would be many groups of few records."""
    needed = {
        "uid": bool(query.uids),
        "status": bool(query.outcomes),
        "project": query.project is not None,
        "script": query.script is not None or query.project is not None,
    }
    return [*_FIELDS, *(name for name in _FILTERED if needed[name])]


def _list_paths(query: RecordQuery) -> list[str]:
    """Name the fields' places as SQL spells a list: as a parameter it would be looked at anew for each line."""
    return [_FIELDS.get(name, f"$.{name}") for name in _list_fields(query)]


def _make_group(texts: dict[str, str | None], event: str, timestamp: str, times: int, pids: list[Any]) -> RecordGroup:
    """Make a record with the fields that were asked for, from their JSON."""
    fields = {name: decode_json(text) for name, text in texts.items() if text is not None}
    fields["asked"] = {name: fields.pop(name) for name in _ASKED if name in fields}
    record = {**fields, "event": decode_json(event), "timestamp": decode_json(timestamp)}
    return RecordGroup(record, times, tuple(_parse_pid(text) for text in pids))


def _parse_pid(text: str | None) -> str:
    return text if text is not None and text.isdecimal() else str(decode_json(text or "null"))
