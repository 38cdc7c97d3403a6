"""How long a summary of the audit log takes: 1,000,000 records of 1000 bytes, per user and GPU.

`tfgpu audit summary` is timed from its start to its end: for records as we write them, and as collectors write them
anew, with blanks (spaced) or with their keys in another order (sorted); with msgspec and without; on all cores and on
one. Each round times every way once, beginning with another one each time. All must give the same answer.

Bars: at most 2.5 s for our own records, at most 1.3 times that for rewritten ones, both with msgspec.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

from tfenv.audit.query import TIMESTAMP_BYTES
from tfenv.audit.record import ProcessFacts, RecordContext, encode_record, make_outcome_record
from tfenv.policy.model import DeviceOutcome, Grant, Outcome, Source, Subject

USERS, GPUS = 50, 8
EVENTS = {"policy_loaded": 40, "policy_applied": 45, "policy_clamped": 10, "policy_failed": 5}
STATUSES = {"policy_clamped": "clamped", "policy_failed": "failed"}
RECORD_BYTES = 1000


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
            file.write(f"{line[:start]}{time}.{part * 50000:06}Z{line[start + TIMESTAMP_BYTES :].rstrip()}\n")


# ---- the ways


_COMMAND = """
import os, sys
if "one core" in sys.argv[2]:
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
if "without msgspec" in sys.argv[2]:
    sys.modules["msgspec"] = None
from tfenv.cli.main import main
sys.argv[1:] = ["audit", "summary", "--format", "json", "--file", sys.argv[1]]
sys.exit(main())
"""
FORMS = ("ours", "spaced", "sorted")
WAYS = (
    *((form, "all cores") for form in FORMS),
    *((form, "one core") for form in FORMS),
    ("ours", "without msgspec, all cores"),
    ("spaced", "without msgspec, all cores"),
)


def time_all(folder: Path, rounds: int) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Return the seconds of each way in each round: by the clock, and of all processor cores together."""
    times: dict[tuple[str, str], list[tuple[float, float]]] = {way: [] for way in WAYS}
    answers = set()
    for round_ in range(rounds):
        for way in WAYS[round_ % len(WAYS) :] + WAYS[: round_ % len(WAYS)]:
            wall, processor = perf_counter(), _read_time_of_children()
            command = [sys.executable, "-c", _COMMAND, str(folder / way[0]), way[1]]
            answers.add(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            times[way].append((perf_counter() - wall, _read_time_of_children() - processor))
    if len(answers) != 1:
        sys.exit("the ways do not agree")
    return times


def _read_time_of_children() -> float:
    spent = os.times()
    return spent.children_user + spent.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for form in FORMS:
            write_log(folder / form, arguments.records, form)
        size = (folder / "ours").stat().st_size >> 20
        print(f"{arguments.records} records, {size} MiB, {arguments.rounds} rounds, {os.cpu_count()} cores")
        times = time_all(folder, arguments.rounds)
    first = median(wall for wall, _ in times[WAYS[0]])
    print(f"{'':<36} wall s  (range)        ratio   CPU s   (medians; ratio to the first)")
    for (form, how), measured in times.items():
        walls, processor = sorted(wall for wall, _ in measured), median(each for _, each in measured)
        wall = median(walls)
        label = f"{form}, {how}"
        print(f"{label:<36} {wall:6.2f}  ({walls[0]:.2f} to {walls[-1]:.2f})  {wall / first:6.2f}  {processor:6.2f}")


if __name__ == "__main__":
    main()
