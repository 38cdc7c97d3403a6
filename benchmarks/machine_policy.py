"""What the machine layer costs one user on a machine of 10 users, and on one of 10,000. The same, it should be.

    python benchmarks/machine_policy.py [--rounds N] [--users N]

Makes two machine layers below a temporary folder: a tfgpu.toml, a file in users/ for each user, and a file in groups/
for every fifth. Then the policy of one user in three groups is loaded as at `import tensorflow`: found, read, checked,
merged. It is loaded from the one and from the other, in turn, each round beginning with the other one. Beside them
stands what users cost as [user.NAME] tables of one tfgpu.toml, which everybody reads whole.

The files are in the page cache, and the modules are imported before: bytecode plays no part.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter_ns

from tfenv.config.document import LARGEST, Trust
from tfenv.pipeline import LoadedPolicy, load
from tfenv.policy.model import Start, Subject

FEW = 10
WARM_UP = 20
USER_FILE = '[gpu]\nvisible_devices = ["GPU-8932f937"]\n\n[ceiling]\nmemory_limit = "20GiB"\n'
GROUP_FILE = '[ceiling]\nmemory_limit = "10GiB"\nmax_devices = 1\n'
MACHINE_FILE = '[gpu]\nmemory_growth = true\n\n[ceiling]\nmemory_limit = "50%"\n'
USER_TABLE = '\n[user.user{}.ceiling]\nmemory_limit = "20GiB"\n'
ME = Subject("user3", os.geteuid(), ("group0", "group1", "everybody"))


class MachineLayer:
    """A machine layer on disk.

    Attributes:
        root: Its folder.
        times: Milliseconds of each load.
    """

    def __init__(self, root: Path, files: dict[str, str]) -> None:
        self.root = root
        self.times: list[float] = []
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def load(self) -> LoadedPolicy:
        start = Start(cwd="/", uid=os.geteuid())
        return load(
            start, ME, str(self.root), Trust(os.geteuid(), administrator=os.geteuid(), checked_from=str(self.root))
        )

    def measure(self) -> None:
        began = perf_counter_ns()
        self.load()
        self.times.append((perf_counter_ns() - began) / 1e6)

    def assert_in_force(self, files: int, limit: str) -> None:
        """Check that the policy holds: a benchmark of nothing must not pass."""
        loaded = self.load()
        assert not loaded.findings, loaded.findings
        assert len(loaded.documents) == files
        assert limit in str(loaded.policy.ceilings)


def make_user_files(users: int) -> dict[str, str]:
    """Return a file for each user, and one for every fifth as a group."""
    return {
        "tfgpu.toml": MACHINE_FILE,
        **{f"users/user{number}.toml": USER_FILE for number in range(users)},
        **{f"groups/group{number}.toml": GROUP_FILE for number in range(max(2, users // 5))},
    }


def make_one_file(users: int) -> dict[str, str]:
    """Return one file, with all users as tables."""
    return {"tfgpu.toml": MACHINE_FILE + "".join(USER_TABLE.format(number) for number in range(users))}


def count_most_tables() -> int:
    """Return how many users' tables fit into one file. A larger file is not read."""
    users = 1000
    while len(make_one_file(users + 100)["tfgpu.toml"]) < LARGEST:
        users += 100
    return users


def measure_interleaved(machines: Sequence[MachineLayer], rounds: int) -> None:
    """Load from each in turn. Every round begins with another one."""
    for machine in machines:
        for _ in range(WARM_UP):
            machine.load()
    for number in range(rounds):
        first = number % len(machines)
        for machine in (*machines[first:], *machines[:first]):
            machine.measure()


def compute_paired_ratio(one: MachineLayer, other: MachineLayer) -> float:
    """Return the median of the ratios within each round."""
    return median(a / b for a, b in zip(one.times, other.times, strict=True))


def print_report(few: MachineLayer, others: dict[str, MachineLayer]) -> None:
    """Print a table: medians, and ratios to the machine of few users."""
    print(f"{'':<34} {'median ms':>9} {'ratio':>6} {'paired':>6}")
    for name, machine in {f"{FEW} users, a file each": few, **others}.items():
        ratio = median(machine.times) / median(few.times)
        print(f"{name:<34} {median(machine.times):9.3f} {ratio:6.2f} {compute_paired_ratio(machine, few):6.2f}")


def make_layer(folder: Path, files: dict[str, str], documents: int) -> MachineLayer:
    """Return a machine layer that was seen to hold for the user."""
    machine = MachineLayer(folder, files)
    machine.assert_in_force(documents, limit=str(20 << 30))
    return machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--users", type=int, default=10_000)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tfgpu-machine-"))
    try:
        few = make_layer(folder / "few", make_user_files(FEW), documents=4)
        many = make_layer(folder / "many", make_user_files(arguments.users), documents=4)
        tables = {
            users: make_layer(folder / f"{users}", make_one_file(users), documents=1)
            for users in (FEW, 40, count_most_tables())
        }
        print(f"{arguments.rounds} rounds, one user in three groups; load average {os.getloadavg()[0]:.1f}")
        measure_interleaved([few, many], arguments.rounds)
        print_report(few, {f"{arguments.users} users, a file each": many})
        few.times.clear()
        # A large file takes a while: fewer rounds say as much.
        measure_interleaved([few, *tables.values()], max(1, arguments.rounds // 20))
        print_report(few, {f"{users} users, tables of one file": machine for users, machine in tables.items()})
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
