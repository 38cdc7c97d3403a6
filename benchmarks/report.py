"""How long `tfgpu audit report` takes, how much memory, and how large the page is: 1,000,000 records of 1000 bytes.

The log holds 50 users on 4 hosts with 8 GPUs each: of each process the import, the devices, a clamp now and then, and
the end, with a peak. One in twenty was killed. The command is timed from its start to its end, and its memory is the
most that one of its processes held at a time, and the sum of these.

Bars: at most 10 s on two cores, and a page below 5 MB.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from tfenv.audit.query import TIMESTAMP_BYTES
from tfenv.audit.record import ProcessFacts, RecordContext, encode_record, make_outcome_record
from tfenv.errors import Finding
from tfenv.policy.model import Allocation, Choice, DeviceOutcome, Grant, Outcome, Source, Subject

USERS, HOSTS, GPUS = 50, 4, 8
RECORD_BYTES = 1000
GIB = 1 << 30
PEAK = 987654321987
PID, TICKS, RAN, WAITED = 7654321, 8765432198, 98765432.125, 87654321.125


def make_template(user: int, host: int, gpu: int, event: str) -> str:
    """Make a record of ours, with places for what differs from process to process."""
    project = f"/home/user{user:03}/"
    uuid = f"GPU-{host:04x}{gpu:04x}-0000-4000-8000-000000000000"
    device = DeviceOutcome(0, str(gpu), uuid, "NVIDIA H100", (4 + gpu) * GIB, total=80 * GIB)
    finding = Finding("clamped", "x", "note", asked="memory_limit = 70.0 GiB", given=f"{4 + gpu}.0 GiB")
    choice = Choice((Allocation(uuid, device.limit),), "lease", WAITED / 1000)
    clamped = event == "policy_clamped"
    outcome = Outcome(
        "clamped" if clamped else "applied", "TFE_ContextOptionsSetConfig", (device,), growth=True,
        findings=(finding,) if clamped else (), choice=choice if user % 3 == 0 else None,
    )  # fmt: skip
    sources = (Source("machine", "/etc/tfgpu/tfgpu.toml"), Source("project", f"{project}tfgpu.toml"))
    facts = ProcessFacts(
        PID, 1, f"node{host}.cluster", f"{project}train{user % 7}.py", "3.11.7", "tensorflow", "2.21.0", TICKS
    )
    context = RecordContext(facts, Subject(f"user{user:03}", 1000 + user, project=project), Grant(), sources)
    record: dict[str, Any] = {**make_outcome_record(context, outcome, 0.5).as_dict(), "event": event}
    if event == "policy_ended":
        record |= {"duration_ms": RAN, "devices": [{**record["devices"][0], "peak_bytes": PEAK}]}
        record = {name: value for name, value in record.items() if name not in ("choice", "status", "entry_point")}
    missing = RECORD_BYTES - len(encode_record(record))
    return encode_record({**record, "project": project + "p" * max(0, missing)}).decode("ascii")


def list_records(count: int, days: int) -> Iterator[tuple[datetime, str]]:
    """Yield records in the order of processes: about three of each, then sort them by time."""
    chosen = random.Random(1)
    templates: dict[tuple[int, int, int, str], str] = {}
    begin = datetime(2026, 11, 1, tzinfo=timezone.utc)
    for number in range(count // 3):
        user, host, gpu = chosen.randrange(USERS), chosen.randrange(HOSTS), chosen.randrange(GPUS)
        start = begin + timedelta(days=days * number * 3 / count)
        ran = timedelta(seconds=chosen.lognormvariate(6, 2))
        peak = int((4 + gpu) * GIB * chosen.random())
        waited = chosen.choice((0, 0, 5, 300_000)) * chosen.random()
        events = ["policy_loaded", chosen.choice(("policy_applied",) * 9 + ("policy_clamped",))]
        events += ["policy_ended"] if chosen.random() > 0.05 else ["policy_loaded"]
        for event, moment in zip(events, (start, start + timedelta(seconds=2), start + ran), strict=True):
            key = (user, host, gpu, event)
            text = templates.get(key) or templates.setdefault(key, make_template(*key))
            for old, new in (
                (f'"pid":{PID}', f'"pid":{1_000_000 + number % 3_000_000}'),
                (str(TICKS), str(1_000_000_000 + number)),
                (str(PEAK), str(peak)),
                (str(RAN), f"{ran.total_seconds() * 1000:.3f}"),
                (str(WAITED), f"{waited:.3f}"),
            ):
                text = text.replace(old, new, 1)
            yield moment, text


def write_log(path: Path, count: int, days: int) -> None:
    """Write a log of about so many records, in the order of time."""
    start = len('{"timestamp":"')
    with path.open("w", encoding="ascii") as file:
        for moment, text in sorted(list_records(count, days)):
            file.write(f"{text[:start]}{moment:%Y-%m-%dT%H:%M:%S.%f}Z{text[start + TIMESTAMP_BYTES :]}")


_COMMAND = """
import resource, sys
from tfenv.cli.main import main
sys.argv[1:] = ["audit", "report", "--html", sys.argv[2], "--file", sys.argv[1]]
code = main()
with open("/proc/self/status") as file:
    own = next(int(line.split()[1]) >> 10 for line in file if line.startswith("VmHWM:"))
print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
sys.exit(code)
"""


def _read_time_of_children() -> float:
    spent = os.times()
    return spent.children_user + spent.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--days", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        log, page = Path(name) / "audit.jsonl", Path(name) / "report.html"
        write_log(log, arguments.records, arguments.days)
        size = log.stat().st_size >> 20
        print(f"{arguments.records} records, {size} MiB, {arguments.rounds} rounds, {os.cpu_count()} cores")
        walls, processor, memory = [], [], []
        for _ in range(arguments.rounds):
            before, spent = perf_counter(), _read_time_of_children()
            command = [sys.executable, "-c", _COMMAND, str(log), str(page)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            walls.append(perf_counter() - before)
            processor.append(_read_time_of_children() - spent)
            memory.append([int(text) for text in done.stdout.split()[-2:]])
        print(f"seconds: {median(walls):.2f} ({min(walls):.2f} to {max(walls):.2f})")
        print(f"CPU seconds: {median(processor):.2f} ({min(processor):.2f} to {max(processor):.2f})")
        own, helper = (max(several) for several in zip(*memory, strict=True))
        print(f"MiB: {own} in the command, at most {helper} in a helper")
        print(f"page: {page.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
