"""How long a summary of a store takes: 100,000,000 records of 30 days, of 50 users and 8 GPUs.

DuckDB writes what `tfgpu audit compact` would have written into `uses/`, from which a summary is made. Three records in
a row are of one process. `tfgpu audit summary --file STORE` is timed from its start to its end.

Bar: at most 10 s on two cores, with at most 2 GB for DuckDB.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import duckdb

from tfenv.audit.store import RECORDS, USES

DAYS = 30
_ROWS = """
COPY (
    SELECT hash(i)::UBIGINT AS id, 0::INTEGER AS place, '{day}' AS day,
        (1793491200000000 + {number} * 86400000000 + (i - {begin}) * 86400000000 // {count})::BIGINT AS time,
        CASE WHEN hash(i, 1) % 20 < 16 THEN 'policy_applied' WHEN hash(i, 1) % 20 < 19 THEN 'policy_clamped'
            ELSE 'policy_failed' END AS event,
        'user' || lpad((hash(i // 3, 2) % 50)::VARCHAR, 3, '0') AS user, hash(i // 3, 3)::UBIGINT AS program,
        'GPU-0000000' || (hash(i // 3, 4) % 8)::VARCHAR || '-0000-4000-8000-000000000000' AS gpu, 1::BIGINT AS times,
        CASE WHEN hash(i, 1) % 20 IN (16, 17, 18) THEN ['memory_limit'] ELSE []::VARCHAR[] END AS cut,
        NULL::BIGINT AS asked_bytes, NULL::DOUBLE AS asked_fraction,
        ((hash(i // 3, 4) % 8 + 4) * 1073741824)::BIGINT AS given_bytes, NULL::DOUBLE AS given_fraction
    FROM range({begin}, {begin} + {count}) rows(i) ORDER BY user, gpu
) TO '{path}' (FORMAT parquet, COMPRESSION zstd)
"""


def write_store(folder: Path, records: int) -> None:
    """Write the rows of so many records, a file for each day."""
    (folder / RECORDS).mkdir()
    count = records // DAYS
    with duckdb.connect() as database:
        database.execute("SET memory_limit = '4GB'")
        database.execute("SET temp_directory = ?", [str(folder / "spill")])
        for number in range(DAYS):
            day = f"2026-11-{number + 1:02}"
            place = folder / USES / f"day={day}"
            place.mkdir(parents=True)
            path = place / "part-000000.parquet"
            database.execute(_ROWS.format(day=day, number=number, begin=number * count, count=count, path=path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="Keep the store here, and use it if it is there.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        if not (folder / USES).is_dir():
            folder.mkdir(exist_ok=True)
            write_store(folder, arguments.records)
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet")) >> 20
        walls = []
        for _ in range(arguments.rounds):
            begin = perf_counter()
            command = [sys.executable, "-m", "tfenv", "audit", "summary", "--format", "json", "--file", str(folder)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            walls.append(perf_counter() - begin)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = (spent.ru_utime + spent.ru_stime) / arguments.rounds
    print(f"{arguments.records:,} records, {size} MiB in uses/, {arguments.rounds} rounds, {os.cpu_count()} cores")
    print(f"wall {median(walls):.2f} s ({min(walls):.2f} to {max(walls):.2f}), CPU {processor:.2f} s, ")
    print(f"largest process {spent.ru_maxrss >> 10} MiB, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
