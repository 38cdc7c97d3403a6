"""How long a summary of the audit log takes: 1,000,000 records of 1000 bytes, per user and GPU.

`--form spaced` and `--form sorted` take the records as collectors write them anew: with blanks, or with their keys in
another order.

Each round times every way once, beginning with another one each time: DuckDB and plain reading, as `tfgpu audit
summary` uses them, and for comparison the same counts by hand with orjson and with polars, where they are installed
(pip install orjson polars). All must give the same answer. The command is timed too, from its start to its end.

Bars: at most 2.5 s for the command, at most 1.3 times that for records that were written anew, at most 6 s for plain
reading with orjson.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

from tfenv.audit import duckdb_engine, gpu_totals, query
from tfenv.audit.query import LineTally, RecordGroup, RecordQuery
from tfenv.audit.record import ProcessFacts, RecordContext, encode_record, make_outcome_record
from tfenv.policy.model import DeviceOutcome, Grant, Outcome, Source, Subject

USERS, GPUS = 50, 8
EVENTS = {"policy_loaded": 40, "policy_applied": 45, "policy_clamped": 10, "policy_failed": 5}
STATUSES = {"policy_clamped": "clamped", "policy_failed": "failed"}
RECORD_BYTES = 1000
QUERY = RecordQuery(events=frozenset(EVENTS) - {"policy_loaded"})
Answer = dict[tuple[str, str], tuple[int, int, int, int]]


# ---- the log


def make_template(user: str, gpu: int, event: str) -> str:
    """Make a record of ours, with a place for pid and time, filled up to its size by the project's path."""
    project = f"/home/{user}/"
    device = DeviceOutcome(0, str(gpu), f"GPU-{gpu:08x}-0000-4000-8000-000000000000", "NVIDIA H100", (4 + gpu) << 30)
    outcome = Outcome(STATUSES.get(event, "applied"), "TFE_ContextOptionsSetConfig", (device,), growth=True)  # type: ignore[arg-type]
    sources = (Source("machine", "/etc/tfgpu/tfgpu.toml"), Source("project", f"{project}tfgpu.toml"))
    context = RecordContext(
        ProcessFacts(7654321, 1, "node17.cluster", f"{project}train.py", "3.11.7", "tensorflow", "2.21.0"),
        Subject(user, 1000, project=project),
        Grant(tokens=("0", "1")),
        sources,
        {source.path: "ab" * 32 for source in sources},
    )
    record = {**make_outcome_record(context, outcome, 0.5).as_dict(), "event": event}
    missing = RECORD_BYTES - len(encode_record(record))
    return encode_record({**record, "project": project + "p" * missing}).decode("ascii")


def rewrite(text: str, form: str) -> str:
    """Write a record as a collector does."""
    if form == "ours":
        return text
    record = json.loads(text)
    if form == "spaced":
        return json.dumps(record)
    return json.dumps(dict(sorted(record.items())), separators=(",", ":"))


def write_log(path: Path, count: int, form: str) -> None:
    """Write records in the order of time, twenty a second. Three in a row are of one process."""
    chosen = random.Random(1)
    templates = [
        (make_template(f"user{user:03}", gpu, event), weight / USERS / GPUS)
        for user in range(USERS)
        for gpu in range(GPUS)
        for event, weight in EVENTS.items()
    ]
    texts, weights = zip(*((rewrite(text, form), weight) for text, weight in templates), strict=True)
    blank = " " if form == "spaced" else ""
    with path.open("w", encoding="ascii") as file:
        for number, text in enumerate(chosen.choices(texts, weights, k=count)):
            second, part = divmod(number, 20)
            time = f"2026-11-{1 + second // 86400:02}T{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}"
            line = text.replace(f'"pid":{blank}7654321', f'"pid":{blank}{1000000 + number // 3}', 1)
            start = line.index('"timestamp"') + len('"timestamp":"') + len(blank)
            file.write(f"{line[:start]}{time}.{part * 50000:06}Z{line[start + query.TIMESTAMP_BYTES :].rstrip()}\n")


# ---- the ways


def summarize_by(make_groups: Callable[..., Iterator[RecordGroup]]) -> Callable[[Path], Answer]:
    def run(path: Path) -> Answer:
        rows = gpu_totals.summarize_groups(make_groups(path, QUERY, LineTally()), QUERY)
        return {
            (row.user, row.gpu): (len(row.processes), row.clamped, row.failed, row.given_bytes or 0) for row in rows
        }

    return run


def count_by_orjson(path: Path) -> Answer:
    import orjson

    rows: dict[tuple[str, str], list[int]] = {}
    processes: dict[tuple[str, str], set[tuple[str, int]]] = {}
    with path.open("rb") as file:
        for line in file:
            if b'"policy_loaded"' in line:
                continue
            record = orjson.loads(line)
            for device in record["devices"]:
                key = (record["user"], device["uuid"])
                row = rows.setdefault(key, [0, 0, 0])
                processes.setdefault(key, set()).add((record["host"], record["pid"]))
                row[0] += record["event"] == "policy_clamped"
                row[1] += record["event"] == "policy_failed"
                row[2] = max(row[2], device["limit_bytes"] or 0)
    return {key: (len(processes[key]), *row) for key, row in rows.items()}  # type: ignore[misc]


def count_by_polars(path: Path) -> Answer:
    import polars as pl

    device = pl.List(pl.Struct({"uuid": pl.String, "limit_bytes": pl.Int64}))
    text = dict.fromkeys(("event", "user", "host"), pl.String)
    rows = (
        pl.scan_ndjson(path, schema={**text, "pid": pl.Int64, "devices": device})
        .filter(pl.col("event") != "policy_loaded")
        .explode("devices")
        .unnest("devices")
        .group_by("user", "uuid")
        .agg(
            pl.struct("host", "pid").n_unique(),
            (pl.col("event") == "policy_clamped").sum().alias("clamped"),
            (pl.col("event") == "policy_failed").sum().alias("failed"),
            pl.col("limit_bytes").max(),
        )
        .collect()
    )
    return {(user, uuid): tuple(row) for user, uuid, *row in rows.rows()}


def run_command(path: Path) -> Answer:
    command = [sys.executable, "-m", "tfenv", "audit", "summary", "--format", "json", "--file", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {}


WAYS: dict[str, tuple[str, Callable[[Path], Answer]]] = {
    "tfgpu audit summary": ("tfenv", run_command),
    "DuckDB": ("duckdb", summarize_by(duckdb_engine.group_records)),
    "plain reading": ("json", summarize_by(query.read_groups)),
    "orjson": ("orjson", count_by_orjson),
    "polars": ("polars", count_by_polars),
}


# ---- timing


def time_all(path: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds of each way in each round: by the clock, and of all processor cores together."""
    names = [name for name, (module, _) in WAYS.items() if find_spec(module) is not None]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    answers: dict[str, Answer] = {}
    for round_ in range(rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            wall, processor = perf_counter(), process_time() + _read_time_of_children()
            answers[name] = WAYS[name][1](path)
            times[name].append((perf_counter() - wall, process_time() + _read_time_of_children() - processor))
    if len({tuple(sorted(answer.items())) for answer in answers.values() if answer}) != 1:
        sys.exit("the ways do not agree")
    return times


def _read_time_of_children() -> float:
    spent = os.times()
    return spent.children_user + spent.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--form", choices=("ours", "spaced", "sorted"), default="ours")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "audit.jsonl")
        write_log(path, arguments.records, arguments.form)
        size = path.stat().st_size >> 20
        print(f"{arguments.records} records, {size} MiB, {arguments.rounds} rounds, {os.cpu_count()} cores")
        times = time_all(path, arguments.rounds)
    plain = [median(column) for column in zip(*times["plain reading"], strict=True)]
    print(f"{'':<20} wall s  ratio   CPU s  ratio   (medians; ratio to plain reading)")
    for name, measured in times.items():
        wall, processor = (median(column) for column in zip(*measured, strict=True))
        print(f"{name:<20} {wall:6.2f} {wall / plain[0]:6.2f}  {processor:6.2f} {processor / plain[1]:6.2f}")


if __name__ == "__main__":
    main()
