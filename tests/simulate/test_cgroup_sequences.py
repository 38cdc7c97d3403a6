"""Memory limits of cgroups while much happens: random sequences, and processes of several users at the same time."""

from __future__ import annotations

import json
import random
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cgroups import needs_cgroups
from tests.simulate.cgroup_lab import (
    ALICE,
    ALICE_UID,
    BOB,
    BOB_UID,
    CGROUPS,
    DEEP,
    FIRST,
    GIB,
    MIB,
    NO_LIMIT,
    SECOND,
    Lab,
    Workers,
    path_of,
)

pytestmark = needs_cgroups

OUT_OF_MEMORY, INVALID_ARGUMENT, NOT_INITIALIZED, NOT_SUPPORTED, NOT_FOUND = 2, 2, 3, 3, 6
CARD, CONTEXT = 2 * GIB, 6
KINDS = ("cuMemAlloc", "cuMemCreate", "cuMemAllocAsync", "cuMemAllocFromPoolAsync", "cuMemAllocManaged")
#: Who runs processes where.
USERS = {FIRST: ALICE_UID, DEEP: ALICE_UID, SECOND: ALICE_UID, BOB: BOB_UID, "system.slice": 0}


def list_chain(cgroup: str) -> Iterator[str]:
    """Yield a cgroup and those above it, up to the root ""."""
    while cgroup:
        yield cgroup
        cgroup = cgroup.rpartition("/")[0]
    yield ""


class Reckoning:
    """What the driver should answer, worked out from the rules alone.

    Attributes:
        held: What each process has allocated, in the order in which it did: how, and how many MiB.
        soft, hard: The limits of cgroups.
    """

    def __init__(self, backend: str) -> None:
        self.is_flat = backend == "misc"
        self.depth = int(backend.partition("/")[2] or 99)
        self.held: dict[tuple[str, str], list[tuple[str, int]]] = {}
        self.soft: dict[str, int] = {}
        self.hard: dict[str, int] = {}

    def is_set(self, cgroup: str) -> bool:
        return bool(self.soft.get(cgroup)) or cgroup in self.hard

    def can_be_set(self, cgroup: str) -> bool:
        return bool(cgroup) and (self.is_flat or cgroup.count("/") < self.depth)

    def find_nearest(self, cgroup: str) -> str | None:
        """Return the cgroup whose limits are told for this one. None: nothing is set."""
        holds = self.is_set if self.is_flat else lambda path: not path or self.can_be_set(path)
        return next((path for path in list_chain(cgroup) if holds(path)), None)

    def count_used(self, cgroup: str) -> int:
        total = 0
        for (place, _), held in self.held.items():
            counts = self.find_nearest(place) == cgroup if self.is_flat else cgroup in list_chain(place)
            total += sum(mib for kind, mib in held if kind != "cuMemAllocManaged") if counts else 0
        return total

    def find_room(self, cgroup: str) -> int:
        limited = [path for path in list_chain(cgroup) if self.is_set(path)][: 1 if self.is_flat else None]
        card = CARD - sum(mib for held in self.held.values() for _, mib in held)
        return min(card, *(self.hard[path] - self.count_used(path) for path in limited if path in self.hard), card)

    def take(self, process: tuple[str, str], kind: str, mib: int) -> int:
        if kind != "cuMemAllocManaged" and mib > self.find_room(process[0]):
            return OUT_OF_MEMORY
        self.held[process].append((kind, mib))
        return 0

    def limit(self, cgroup: str, soft: int, hard: int) -> int:
        if hard != NO_LIMIT and soft > hard:
            return INVALID_ARGUMENT
        if not self.can_be_set(cgroup):
            return NOT_FOUND
        before = self.soft.get(cgroup, 0)
        above = [] if self.is_flat or soft == before else list(list_chain(cgroup))[1:]
        after = {path: max(0, self.soft.get(path, 0) - before) + soft for path in above}
        most = {path: CARD if not path else self.hard.get(path, 1 << 40) for path in above}
        if soft > before and any(after[path] > most[path] for path in above):
            return INVALID_ARGUMENT
        self.soft |= {**after, cgroup: soft}
        self.hard.pop(cgroup, None)
        if hard != NO_LIMIT:
            self.hard[cgroup] = hard
        return 0

    def tell(self, cgroup: str) -> list[int]:
        nearest = self.find_nearest(cgroup)
        if nearest is None:
            return [NOT_SUPPORTED]
        return [0, self.soft.get(nearest, 0), self.hard.get(nearest, NO_LIMIT), self.count_used(nearest)]


class Sequence:
    """One random sequence of what root and several processes do. Each answer is compared with the reckoning."""

    def __init__(self, backend: str, seed: int, workers: Mapping[str, Workers]) -> None:
        self.random, self.expected, self.workers = random.Random(f"{backend} {seed}"), Reckoning(backend), workers
        self.steps: list[object] = [f"{backend}, seed {seed}"]
        self.started = 0

    def compare(self, answer: object, expected: object, *step: object) -> None:
        self.steps.append((*step, answer))
        assert answer == expected, f"{expected} was expected after {self.steps}"

    def run(self, steps: int) -> None:
        acts = [self.start, self.take, self.take, self.take, self.free, self.limit, self.limit, self.clear]
        acts += [self.tell, self.fork, self.end]
        for _ in range(steps):
            self.random.choice(acts)()
        self.finish()

    def pick(self) -> tuple[str, str] | None:
        return self.random.choice(sorted(self.expected.held)) if self.expected.held else None

    def start(self) -> None:
        self.started += 1
        process = (self.random.choice(list(USERS)), f"process {self.started}")
        self.expected.held[process] = []
        fits = self.expected.take(process, "context", CONTEXT)
        self.compare(self.workers[process[0]].ask(process[1], "open"), fits, "open", *process)
        if fits:
            del self.expected.held[process]
            self.compare(self.workers[process[0]].ask(process[1], "exit"), 0, "exit", *process)

    def take(self) -> None:
        if process := self.pick():
            step = (self.random.choice(KINDS), 2 * self.random.choice((1, 5, 50, self.random.randint(1, CARD // 2))))
            answer = self.workers[process[0]].ask(process[1], "take", *step)
            self.compare(answer, self.expected.take(process, *step), *step, *process)

    def free(self) -> None:
        process = self.pick()
        if process and len(held := self.expected.held[process]) > 1:
            index = self.random.randrange(1, len(held))  # the first is the context
            del held[index]
            self.compare(self.workers[process[0]].ask(process[1], "free", index - 1), 0, "free", index, *process)

    def limit(self) -> None:
        hard = self.random.choice((NO_LIMIT, 0, self.random.randint(0, CARD), self.random.randint(0, CARD)))
        soft = self.random.choice((0, 0, 0, hard, self.random.randint(0, CARD)))
        self.set(self.random.choice(("", *CGROUPS)), max(soft, 0), hard)

    def clear(self) -> None:
        self.set(self.random.choice(CGROUPS), 0, NO_LIMIT)

    def set(self, cgroup: str, soft: int, hard: int) -> None:
        answer = self.workers[""].ask("root", "limit", path_of(cgroup), soft, hard)
        self.compare(answer, self.expected.limit(cgroup, soft, hard), "limit", cgroup, soft, hard)

    def tell(self) -> None:
        cgroup = self.random.choice(CGROUPS)
        answer = self.workers[""].ask("root", "limits", path_of(cgroup))
        self.compare(answer, self.expected.tell(cgroup), "limits", cgroup)

    def fork(self) -> None:
        if process := self.pick():
            self.compare(self.workers[process[0]].ask(process[1], "fork"), NOT_INITIALIZED, "fork", *process)

    def end(self) -> None:
        if process := self.pick():
            self.stop(process, self.random.choice(("exit", "kill")))

    def stop(self, process: tuple[str, str], verb: str) -> None:
        del self.expected.held[process]
        self.compare(self.workers[process[0]].ask(process[1], verb), 0 if verb == "exit" else -9, verb, *process)

    def finish(self) -> None:
        """End all processes and clear all limits. Nothing is left, and the next process can have the whole card."""
        for process in list(self.expected.held):
            self.stop(process, "exit")
        for cgroup in CGROUPS:
            self.compare(self.workers[""].ask("root", "limits", path_of(cgroup)), self.expected.tell(cgroup), cgroup)
        for cgroup in reversed(CGROUPS):
            self.set(cgroup, 0, NO_LIMIT)
        nothing = [NOT_SUPPORTED] if self.expected.is_flat else [0, 0, NO_LIMIT, 0]
        for cgroup in CGROUPS:
            self.compare(self.workers[""].ask("root", "limits", path_of(cgroup)), nothing, "left", cgroup)
        self.compare(self.workers[""].ask("root", "open"), 0, "open")
        self.compare(self.workers[""].ask("root", "take", "cuMemAlloc", CARD - CONTEXT), 0, "all")
        self.compare(self.workers[""].ask("root", "exit"), 0, "exit")


@pytest.mark.parametrize(
    "sequences",
    [pytest.param(range(40), id="40"), pytest.param(range(40, 400), id="360", marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize("backend", ["dmem", "dmem/3", "misc"])
def test_random_sequences(lab: Lab, backend: str, sequences: range) -> None:
    """Set, allocate, free, clear, fork and exit in any order: each answer is as the rules say, and nothing is leaked.

    So what a cgroup holds is never above a limit that held when it was allocated.
    """
    env = lab.simulate(backend, gpus=f"1x{CARD}MiB", context=CONTEXT)
    workers = {cgroup: lab.start(env, cgroup, uid) for cgroup, uid in {**USERS, "": 0}.items()}
    for seed in sequences:
        log = lab.make_log()
        for group in workers.values():
            group.ask("", "environ", {"TFGPU_SIMULATE_LOG": str(log)})
        Sequence(backend, seed, workers).run(20)
        log.unlink()


# ---- at the same time


#: Allocates 2 to 40 MiB and frees in turns, as fast as it can, until its stdin is closed.
C_PROGRAM = r"""
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
int cuInit(unsigned);
int cuDevicePrimaryCtxRetain(void **, int);
int cuCtxSetCurrent(void *);
int cuMemAlloc_v2(unsigned long long *, size_t);
int cuMemFree_v2(unsigned long long);
int main(void) {
  static unsigned long long held[64];
  struct pollfd input = {0, POLLIN, 0};
  void *context;
  if (cuInit(0) || cuDevicePrimaryCtxRetain(&context, 0) || cuCtxSetCurrent(context)) return 1;
  puts("open"), fflush(stdout);
  for (unsigned i = 0; !poll(&input, 1, 0); i++) {
    unsigned long long *place = &held[rand() % 64];
    if (*place) cuMemFree_v2(*place), *place = 0;
    else if (cuMemAlloc_v2(place, (size_t)(2 + rand() % 39) << 20)) *place = 0;
  }
  return 0;
}
"""
#: The same by ctypes, without the site module, so without anything of an environment.
PYTHON_PROGRAM = """
import ctypes, random, select, sys
cuda = ctypes.CDLL("libcuda.so.1")
context, held = ctypes.c_void_p(), [0] * 64
assert not cuda.cuInit(0) and not cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
assert not cuda.cuCtxSetCurrent(context)
print("open", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    place, pointer = random.randrange(64), ctypes.c_ulonglong()
    if held[place]:
        cuda.cuMemFree_v2(ctypes.c_ulonglong(held[place]))
        held[place] = 0
    elif not cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(random.randint(2, 40) << 20)):
        held[place] = pointer.value
"""


def compile_program(lab: Lab) -> Path:
    program = lab.folder / "allocate"
    command = ["cc", "-o", str(program), "-xc", "-", "-xnone", str(lab.folder / "lib" / "libcuda.so.1")]
    subprocess.run(command, input=C_PROGRAM, text=True, check=True)
    program.chmod(0o755)
    return program


def wait_for_growth(log: Path) -> None:
    """Wait for some 1,500 requests of whoever is at work."""
    end = log.stat().st_size + 150_000
    deadline = time.monotonic() + 60
    while log.stat().st_size < end:
        assert time.monotonic() < deadline, "nobody allocates"
        time.sleep(0.01)


def read_log(log: Path) -> list[dict[str, Any]]:
    """Return the records, without one that is being written."""
    return [json.loads(line) for line in log.read_text().split("\n")[:-1]]


def find_open_python() -> Path:
    """Return an interpreter that every user can run. Without one, skip."""
    for path in (Path(sys.executable).resolve(), Path("/usr/bin/python3")):
        if path.exists() and all(folder.stat().st_mode & stat.S_IXOTH for folder in path.parents):
            return path
    pytest.skip("other users cannot run any interpreter here")


@pytest.mark.parametrize("backend", ["dmem", "misc"])
def test_programs_of_a_user_at_the_same_time(lab: Lab, backend: str) -> None:
    """A C program and `python -S` together never pass their user's limit while root raises, lowers and clears it.

    Another user's program is never refused. The log has the order in which the driver decided.
    """
    env = lab.simulate(backend, gpus="1x16GiB")
    root, program = lab.start(env), compile_program(lab)
    assert root.ask("r", "limit", path_of(ALICE), 0, 300) == 0
    script: list[str | Path] = [find_open_python(), "-S", "-c", textwrap.dedent(PYTHON_PROGRAM)]
    places: list[tuple[list[str | Path], str, int]]
    places = [([program], FIRST, ALICE_UID), (script, SECOND, ALICE_UID), ([program], BOB, BOB_UID)]
    pipes: Mapping[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = [lab.machine.start(command, cgroup=cgroup, uid=uid, env=env, **pipes) for command, cgroup, uid in places]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
    log = Path(env["TFGPU_SIMULATE_LOG"])
    for hard in (300, 900, 40, NO_LIMIT, 200, 600, 100):
        assert root.ask("r", "limit", path_of(ALICE), 0, hard) == 0
        wait_for_growth(log)
    records = read_log(log)  # now: one that has ended holds nothing, and no record says so
    for process in started:
        process.communicate()
        assert process.returncode == 0
    assert root.ask("r", "limits", path_of(ALICE)) == [0, 0, 100, 0]

    alice, bob = {started[0].pid, started[1].pid}, started[2].pid
    held, limit, refused, most = 0, 1 << 62, 0, 0
    for record in records:
        if record["op"] == "limit":
            limit = record["bytes"]
        assert (record["pid"], record["op"]) != (bob, "oom")
        if record["pid"] in alice:
            held += {"alloc": record["bytes"], "free": -record["bytes"]}.get(record["op"], 0)
            refused += record["op"] == "oom"
            most = max(most, held)
            assert record["op"] != "alloc" or held <= limit
            assert record["op"] != "oom" or held + record["bytes"] > limit
    assert refused > 20  # the limit was in the way
    assert most > 600 * MIB  # and it was raised
