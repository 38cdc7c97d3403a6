"""Real frameworks in cgroups that the driver limits: they are refused at the rail, before the driver has to refuse."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hardware.conftest import list_installed
from tests.shared_machine import ALICE, BOB, SharedMachine, User
from tests.wall.conftest import CONTEXT, GIB, SESSIONS, WallMachine, open_wall_machine
from tfenv.policy.units import MIB

OVERHEAD = 600 * MIB
#: Small, because what a framework fills with zeros takes the memory of this machine.
TOTAL = 2 * GIB
RAIL = TOTAL - OVERHEAD
PIECE = 16 * MIB
POLICY = '[gpu]\nmemory_growth = true\n[ceiling]\nmemory_total = "2GiB"\n[audit]\nfile = "/var/log/tfgpu/<uid>.jsonl"\n'
SLICE = f"user.slice/user-{ALICE.uid}.slice"

#: Each takes pieces of 16 MiB until it is refused, gives one back, and takes it again.
PROGRAMS = {
    "tensorflow": """
import tensorflow as tf
take, refused = lambda: tf.zeros([16 << 18]), tf.errors.ResourceExhaustedError
""",
    "jax": """
import jax
take, refused = lambda: jax.numpy.zeros((16 << 18,)).block_until_ready(), jax.errors.JaxRuntimeError
""",
    "torch": """
import torch
take, refused = lambda: torch.empty(16 << 20, dtype=torch.uint8, device="cuda"), torch.OutOfMemoryError
""",
}
FILL = """
import sys
held = []
try:
    while len(held) < 400: held.append(take())
except refused as error:
    print("refused", len(held), type(error).__name__, flush=True)
held.pop()
held.append(take())
print("again", len(held), flush=True)
if sys.argv[1:]: sys.stdin.readline()
"""
frameworks = pytest.mark.parametrize(
    "framework",
    [
        pytest.param(
            name, marks=[getattr(pytest.mark, name), *([] if name in list_installed() else [pytest.mark.skip])]
        )
        for name in PROGRAMS
    ],
)
#: Takes as much as it is told, in MiB on stdin, by CUDA alone. It prints what CUDA answered.
HUNGRY = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
context, pointer = ctypes.c_void_p(), ctypes.c_ulonglong()
cuda.cuInit(0)
print(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0), flush=True)
cuda.cuCtxSetCurrent(context)
for line in sys.stdin:
    print(cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(int(line) << 20)), flush=True)
"""


@pytest.fixture
def dmem(shared_machine: SharedMachine) -> Iterator[WallMachine]:
    """Yield a machine for what is the same with each backend."""
    with open_wall_machine(shared_machine, "dmem", gpus=1) as machine:
        yield machine


@pytest.fixture(
    params=[
        pytest.param(("dmem/2", False), id="dmem-above"),
        pytest.param(("misc", True), id="misc-own", marks=pytest.mark.exhaustive),
    ]
)
def place(request: pytest.FixtureRequest, shared_machine: SharedMachine) -> Iterator[tuple[WallMachine, str]]:
    """Yield a machine, and a cgroup of alice's where the limit holds: below the one that has it, or that one."""
    backend, own = request.param
    with open_wall_machine(shared_machine, backend, gpus=1) as machine:
        machine.shared.policy({"tfgpu.toml": POLICY})
        assert machine.tfgpu("wall", "apply", "--all").returncode == 0
        yield machine, SLICE if own else SESSIONS[ALICE.uid]


def fill(machine: WallMachine, framework: str, cgroup: str | None = None) -> subprocess.CompletedProcess[str]:
    return machine.run(ALICE, sys.executable, "-c", PROGRAMS[framework] + FILL, cgroup=cgroup)


def measure_peak(machine: WallMachine) -> int:
    """Return the most bytes of GPU 0 that all processes held together at one time, with their contexts."""
    return max(request.held for request in machine.read_requests() if request.op in ("alloc", "context"))


@frameworks
def test_a_framework_is_refused_at_the_rail(place: tuple[WallMachine, str], framework: str) -> None:
    """It takes what is left beside its context, is refused by its own allocator, and goes on."""
    machine, cgroup = place
    done = fill(machine, framework, cgroup)
    assert done.returncode == 0, done.stderr
    pieces = [line.split() for line in done.stdout.splitlines()]
    assert [piece[:2] for piece in pieces] == [["refused", pieces[0][1]], ["again", pieces[0][1]]]
    assert RAIL - 128 * MIB <= int(pieces[0][1]) * PIECE <= RAIL
    assert not [request for request in machine.read_requests() if request.op == "oom"], "the driver had to refuse"
    assert RAIL - 128 * MIB + CONTEXT <= measure_peak(machine) <= TOTAL
    assert "at most 1.4 GiB (etc/tfgpu/tfgpu.toml)" in done.stderr.replace(" each", "")


@pytest.mark.exhaustive
@frameworks
def test_a_share_is_of_what_cuda_reports(dmem: WallMachine, framework: str) -> None:
    """Half of a card is half of the 2 GiB that it reports to a process whose own cgroup has the limit."""
    dmem.shared.policy({"tfgpu.toml": POLICY.replace("[gpu]\n", '[gpu]\nmemory_limit = "50%"\n')})
    dmem.tfgpu("wall", "apply", "--all")
    done = fill(dmem, framework, SLICE)
    taken = int(done.stdout.split()[1]) * PIECE
    assert GIB - 128 * MIB <= taken <= GIB, done.stderr


@pytest.mark.exhaustive
@pytest.mark.tensorflow
def test_without_the_feature_all_is_as_before(shared_machine: SharedMachine) -> None:
    """On an older driver memory_total is kept by the rail alone: all of it is for the one process."""
    with open_wall_machine(shared_machine, "none", gpus=1) as machine:
        machine.shared.policy({"tfgpu.toml": POLICY})
        assert machine.tfgpu("wall", "apply", "--all").returncode == 1
        done = fill(machine, "tensorflow")
        assert TOTAL - 128 * MIB <= int(done.stdout.split()[1]) * PIECE <= TOTAL
        assert "at most 2.0 GiB" in done.stderr


# ---- together


class Hungry:
    """A program that takes memory without a framework, and without tfenv."""

    def __init__(self, machine: WallMachine, user: User, *command: str) -> None:
        self.process = machine.start(
            user, *(command or (sys.executable, "-S", "-c", HUNGRY)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.opened = self.read()

    def read(self) -> int:
        """Return the next answer of CUDA."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def take(self, mib: int) -> bool:
        """Return whether CUDA gave this much."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{mib}\n")
        self.process.stdin.flush()
        return self.read() == 0

    def end(self) -> None:
        self.process.communicate()


@pytest.mark.tensorflow
def test_two_processes_never_pass_the_total(dmem: WallMachine) -> None:
    """One is TensorFlow under the policy, the other runs without tfenv. Another user has all that is theirs."""
    dmem.shared.policy({"tfgpu.toml": POLICY})
    dmem.tfgpu("wall", "apply", "--all")
    hungry = Hungry(dmem, ALICE)
    assert hungry.take(400)
    done = fill(dmem, "tensorflow")
    assert done.returncode == 0, done.stderr
    left = RAIL - 400 * MIB - CONTEXT
    assert left - 128 * MIB <= int(done.stdout.split()[1]) * PIECE <= left, "what the other holds is no part of it"
    with dmem.start(
        ALICE,
        sys.executable,
        "-c",
        PROGRAMS["tensorflow"] + FILL,
        "wait",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as governed:
        assert governed.stdout is not None
        governed.stdout.readline()
        assert not hungry.take(1000), "the driver refuses"
        assert not [
            request for request in dmem.read_requests()[-200:] if request.op == "oom" and request.pid == governed.pid
        ]
        governed.communicate("\n")
    assert measure_peak(dmem) <= TOTAL
    bobs = Hungry(dmem, BOB)
    assert [bobs.take(1500), bobs.take(100)] == [True, False], "what alice has is no part of what bob may have"
    for each in (hungry, bobs):
        each.end()


def test_a_program_in_c_is_held_too(machine: WallMachine, tmp_path: Path) -> None:
    """It calls cuMemAlloc itself, and gets no more than the policy says."""
    source, program = tmp_path / "hungry.c", machine.log.parent / "hungry"
    source.write_text("""
#include <stdio.h>
int cuInit(unsigned); int cuDevicePrimaryCtxRetain(void **, int); int cuCtxSetCurrent(void *);
int cuMemAlloc_v2(unsigned long long *, size_t);
int main(void) {
  void *context; unsigned long long pointer; unsigned long mib;
  cuInit(0);
  printf("%d\\n", cuDevicePrimaryCtxRetain(&context, 0)); fflush(stdout);
  cuCtxSetCurrent(context);
  while (scanf("%lu", &mib) == 1) { printf("%d\\n", cuMemAlloc_v2(&pointer, mib << 20)); fflush(stdout); }
}
""")
    libraries = str(machine.log.parent / "lib")
    subprocess.run(["cc", "-o", program, source, f"-L{libraries}", "-l:libcuda.so.1"], check=True)
    machine.shared.policy({"tfgpu.toml": POLICY})
    machine.tfgpu("wall", "apply", "--all")
    hungry = Hungry(machine, ALICE, str(program))
    assert [hungry.take(size) for size in (1000, 600, 548, 1)] == [True, False, True, False]
    hungry.end()
    assert measure_peak(machine) == TOTAL


def test_limits_change_while_programs_run(machine: WallMachine) -> None:
    """Raising lets a program take more, lowering refuses what is above, and clearing lets it take the card."""
    machine.shared.policy({"tfgpu.toml": POLICY})
    machine.tfgpu("wall", "apply", "--all")
    hungry = Hungry(machine, ALICE)
    assert [hungry.take(1400), hungry.take(500)] == [True, False]
    for total, more in (("3GiB", True), ("1GiB", False)):
        machine.shared.policy({"tfgpu.toml": POLICY.replace("2GiB", total)})
        machine.tfgpu("wall", "apply", "--all")
        assert hungry.take(500) is more
    machine.tfgpu("wall", "clear", "--user", "alice")
    assert [hungry.take(20000), hungry.take(3000)] == [True, False], "the card has 24 GiB"
    hungry.end()


@pytest.mark.tensorflow
def test_leases_reckon_with_what_is_left(dmem: WallMachine) -> None:
    """Three processes of 2 GiB fit into 8 GiB with what each takes beside its limit. A fourth gets no GPU."""
    choice = '[gpu]\nvisible_devices = {count = 1, when_busy = "cpu"}\nmemory_limit = "2GiB"\nmemory_growth = true\n'
    dmem.shared.policy({"tfgpu.toml": f'{choice}[ceiling]\nmemory_total = "8GiB"\nallowed_devices = [0]\n'})
    dmem.tfgpu("wall", "apply", "--all")
    code = (
        "import tensorflow as tf; tf.zeros([1]); print(len(tf.config.list_logical_devices('GPU')), flush=True); input()"
    )
    running = []
    seen = []
    for _ in range(4):
        process = dmem.start(ALICE, sys.executable, "-c", code, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        seen.append(process.stdout.readline().strip())
        running.append(process)
    for process in running:
        process.communicate("\n")
    assert seen == ["1", "1", "1", "0"]
    assert measure_peak(dmem) <= 8 * GIB
