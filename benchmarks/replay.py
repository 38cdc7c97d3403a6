"""How long it takes to run the audit log through another policy: 1,000,000 records of 1000 bytes.

`tfgpu audit replay` is timed from its start to its end, and `tfgpu audit summary --observed` beside it. The log is that
of `benchmarks/audit.py` with groups, sizes of cards and `would_clamp`: 50 users, half of them students, 8 GPUs, three
limits. In the second log each program has a project of its own, and the policy has a table for a project, so that no
two programs have one answer for that reason alone. Each round times every way once, beginning with another one each
time.

Bar: at most 30 s for either log, with msgspec.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

from tfenv.audit.query import TIMESTAMP_BYTES
from tfenv.audit.record import ProcessFacts, RecordContext, encode_record, make_outcome_record
from tfenv.policy.model import DeviceOutcome, Grant, Origin, Outcome, Source, Subject, WouldClamp

GIB = 1 << 30
USERS, GPUS, LIMITS = 50, 8, (4, 8, 16)
RECORD_BYTES = 1000
POLICY = """
[group.students.ceiling]
memory_limit = "8GiB"
max_devices = 1
[group.staff.ceiling]
memory_limit = "50%"
[project."/srv/shared".ceiling]
memory_limit = "2GiB"
"""
_PROJECT = "/srv/projects/0000000"


def make_template(number: int, gpu: int, limit: int, event: str) -> str:
    """Make a record of ours, with a place for pid, time and project, filled up to its size by the program's path."""
    user, uuid = f"user{number:03}", f"GPU-{gpu:08x}-0000-4000-8000-000000000000"
    device = DeviceOutcome(0, str(gpu), uuid, "NVIDIA H100", limit * GIB, total=80 * GIB)
    origin = Origin("machine", "/etc/tfgpu/tfgpu.toml", ("observe", "ceiling", "memory_limit"))
    sizes = f"{limit}.0 GiB", "8.0 GiB", uuid, limit * GIB, 8 * GIB
    lost = (WouldClamp("memory_limit", *sizes, (origin,)),) if limit > 8 else ()
    outcome = Outcome(
        "clamped" if event == "policy_clamped" else "applied",
        "TFE_ContextOptionsSetConfig",
        (device,),
        growth=True,
        would_clamp=lost,
    )
    context = RecordContext(
        ProcessFacts(7654321, 1, "node17.cluster", "/srv/train.py", "3.11.7", "tensorflow", "2.21.0", start_ticks=9),
        Subject(user, 1000 + number, ("students" if number % 2 else "staff", user), _PROJECT),
        Grant(),
        (Source("machine", "/etc/tfgpu/tfgpu.toml"),),
        {"/etc/tfgpu/tfgpu.toml": "ab" * 32},
    )
    record = {**make_outcome_record(context, outcome, 0.5).as_dict(), "event": event}
    missing = RECORD_BYTES - len(encode_record(record))
    return encode_record({**record, "script": "/srv/train.py" + "y" * max(0, missing)}).decode("ascii")


def write_log(path: Path, count: int, *, own_projects: bool) -> None:
    """Write records in the order of time, twenty a second. Three in a row are of one process."""
    chosen = random.Random(1)
    events = {"policy_loaded": 40, "policy_applied": 50, "policy_clamped": 10}
    cases = [(user, gpu, limit) for user in range(USERS) for gpu in range(GPUS) for limit in LIMITS]
    templates = [(make_template(*case, event), weight) for case in cases for event, weight in events.items()]
    texts, weights = zip(*templates, strict=True)
    with path.open("w", encoding="ascii") as file:
        for number, text in enumerate(chosen.choices(texts, weights, k=count)):
            second, part = divmod(number, 20)
            time = f"2026-11-{1 + second // 86400:02}T{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}"
            line = text.replace('"pid":7654321', f'"pid":{1000000 + number // 3}', 1)
            if own_projects:
                line = line.replace(_PROJECT, f"/srv/projects/{number // 3:07}", 1)
            start = len('{"timestamp":"')
            file.write(f"{line[:start]}{time}.{part * 50000:06}Z{line[start + TIMESTAMP_BYTES :].rstrip()}\n")


# ---- the ways

_COMMAND = """
import os, sys
if "one core" in sys.argv[1]:
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
if "without msgspec" in sys.argv[1]:
    sys.modules["msgspec"] = None
from tfenv.cli.main import main
sys.argv[1:] = sys.argv[2:]
sys.exit(main())
"""
#: The log, and how it is read.
WAYS = (
    ("shared projects", "replay, all cores"),
    ("own projects", "replay, all cores"),
    ("shared projects", "replay, one core"),
    ("shared projects", "replay, without msgspec, all cores"),
    ("shared projects", "summary --observed, all cores"),
)


def time_way(folder: Path, log: str, how: str) -> tuple[float, float]:
    """Return the seconds by the clock, and of all processor cores together."""
    report = ["summary", "--observed"] if "observed" in how else ["replay", "--policy", str(folder / "tfgpu.toml")]
    command = [sys.executable, "-c", _COMMAND, how, "audit", *report, "--format", "json", "--file", str(folder / log)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter()
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE)
    wall, after = perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != (0 if "observed" in how else 1) or not done.stdout:
        sys.exit(f"{how}: exit code {done.returncode}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    times: dict[tuple[str, str], list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tfgpu.toml").write_text(POLICY, encoding="ascii")
        for log in ("shared projects", "own projects"):
            write_log(folder / log, arguments.records, own_projects=log == "own projects")
        size = (folder / "own projects").stat().st_size >> 20
        print(f"{arguments.records} records, {size} MiB, {arguments.rounds} rounds, {os.cpu_count()} cores")
        for round_ in range(arguments.rounds):
            for way in WAYS[round_ % len(WAYS) :] + WAYS[: round_ % len(WAYS)]:
                times[way].append(time_way(folder, *way))
            print(f"load {os.getloadavg()[0]:.1f} after round {round_ + 1}", flush=True)
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    print(f"{'':<52} wall s  (range)         CPU s   (medians)")
    for (log, how), measured in times.items():
        walls, processor = sorted(wall for wall, _ in measured), median(each for _, each in measured)
        label = f"{log}, {how}"
        print(f"{label:<52} {median(walls):6.2f}  ({walls[0]:.2f} to {walls[-1]:.2f})  {processor:6.2f}")
    print(f"the largest process: {most} MiB")


if __name__ == "__main__":
    main()
