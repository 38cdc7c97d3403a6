"""What `tfgpu test` takes for very many cases.

    python benchmarks/policy_tests.py [--cases N] [--rounds N]

Makes a machine layer for 200 users in 20 groups below a temporary folder, and beside it files of 500 cases each. Every
case is another process: of some user in two groups, on one of several machines, in a job or in none, with a file of
the user's or without, and with a wish of the program's. Each case has five expectations. What is right is taken from a
first run, so that all cases pass, as they do day by day.

Each round is a process of its own: `python -m tfenv test FOLDER`, with the start of the interpreter, reading, running
and printing. It runs in turn with the same command on one case, which is what the start alone takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

from tfenv.policy_tests.load import PolicyLoader
from tfenv.policy_tests.read import read_suite
from tfenv.policy_tests.run import decide_case

IN_A_FILE = 500
USERS, GROUPS = 200, 20
MACHINE_FILE = """\
[gpu]
memory_growth = true
memory_limit = "20GiB"

[ceiling]
max_devices = 2
memory_limit = "50%"
require_grant = true
"""
USER_FILE = '[ceiling]\nmemory_limit = "{}GiB"\nmax_devices = 3\n'
GROUP_FILE = '[ceiling]\nmemory_limit = "{}%"\n'
MACHINES = ("8x80GiB:NVIDIA A100", "4x24GiB:NVIDIA A10", "2x24GiB:NVIDIA A10,80GiB:NVIDIA H100", "2x16GiB")


def write_policy(root: Path) -> None:
    files = {"tfgpu.toml": MACHINE_FILE}
    files |= {f"users/user{number}.toml": USER_FILE.format(number % 70 + 4) for number in range(USERS)}
    files |= {f"groups/group{number}.toml": GROUP_FILE.format(number * 2 + 10) for number in range(GROUPS)}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def make_case(number: int) -> str:
    lines = [
        "[[case]]",
        f'name = "case {number}"',
        f'user = "user{number % (USERS * 2)}"',
        f'groups = ["group{number % GROUPS}", "group{number // GROUPS % GROUPS}"]',
        f'gpus = "{MACHINES[number % len(MACHINES)]}"',
    ]
    if number % 3 == 0:
        lines += ['launcher = "Slurm"', f"grant = [{number % 2}]"]
    if number % 5 == 0:
        lines.append(f'cuda_visible_devices = "{number % 2}"')
    if number % 7 == 0:
        lines += ["[case.user_file.gpu]", f'memory_limit = "{number % 60 + 1}GiB"']
    return "\n".join(lines)


def write_cases(root: Path, count: int) -> None:
    for first in range(0, count, IN_A_FILE):
        path = root / f"{first // IN_A_FILE:04}.test.toml"
        cases = [make_case(number) for number in range(first, min(first + IN_A_FILE, count))]
        path.write_text("\n\n".join(f"{case}\n[case.expect]\ndevices = 0\n" for case in cases))
        path.write_text("\n\n".join(f"{case}\n{text}\n" for case, text in zip(cases, find_right(path), strict=True)))


def find_right(path: Path) -> Iterator[str]:
    suite, loader = read_suite(str(path)), PolicyLoader()
    assert not suite.findings, suite.findings[0]
    for case in suite.cases:
        plan = decide_case(case, loader.load(suite, case)).plan
        devices = plan.devices or ()
        limits = [limit for each in devices if (limit := each.limit) is not None]
        texts = [f"{each.bytes >> 20}MiB" if each.bytes else f"{(each.fraction or 0) * 100:g}%" for each in limits]
        known = len(devices) == len(limits) > 0 and not any(limit.mixed for limit in limits)
        yield "\n".join(
            [
                "[case.expect]",
                f"devices = [{', '.join(each.token for each in devices)}]",
                f"memory_limit = {json.dumps(texts)}" if known else "findings = []",
                "memory_growth = true",
                f'allocator = "{plan.allocator or "none"}"',
                "refused = false",
            ]
        )


def measure(folder: Path, expected: str) -> float:
    began = perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "tfenv", "test", str(folder)], capture_output=True, text=True, check=False
    )
    took = perf_counter() - began
    assert (done.returncode, done.stdout) == (0, expected), done.stdout[-2000:] + done.stderr
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        many, one = Path(temporary, "many"), Path(temporary, "one")
        for folder, count in ((many, options.cases), (one, 1)):
            write_policy(folder)
            write_cases(folder, count)
        times: dict[str, list[float]] = {"many": [], "one": []}
        for _ in range(options.rounds):
            times["one"].append(measure(one, "1 passed\n"))
            times["many"].append(measure(many, f"{options.cases} passed\n"))
    print(f"{sys.version.split()[0]}, load {os.getloadavg()[0]:.1f}, {options.rounds} rounds")
    for name, label in (("one", "1 case"), ("many", f"{options.cases} cases")):
        found = times[name]
        print(f"{label:>14}  {median(found):6.2f} s  ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
