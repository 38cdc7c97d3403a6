"""A process's turn: it takes all it needs or waits in line, and nobody starves or blocks another for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.sharing.holders import TOTAL, Holder, gpu_request, hold, take
from tfenv.policy.model import UNNOTICED_BYTES, Allocation, MemoryUse
from tfenv.sharing.choose import Candidate, GpuRequest, share
from tfenv.sharing.queue import Acquired, Unavailable, acquire, look


@pytest.fixture
def crew() -> Iterator[list[Holder]]:
    """Processes that are ended with the test."""
    holders: list[Holder] = []
    yield holders
    for holder in holders:
        holder.close()


def for_ever(_: Unavailable) -> bool:
    return True


def in_line(machine: Path) -> int:
    return sum(name.startswith("ticket-") for name in os.listdir(machine))


def line_up(crew: list[Holder], machine: Path, made: GpuRequest) -> Holder:
    """One more that waits, behind all who are there."""
    before = in_line(machine)
    crew.append(Holder(made))
    while in_line(machine) == before:
        time.sleep(0.01)
    return crew[-1]


def test_first_come_first_served(machine: Path, crew: list[Holder]) -> None:
    """Waiters for one GPU get it in the order in which they came."""
    with hold(gpu_request(gpus="a")) as first:
        waiters = [line_up(crew, machine, gpu_request(gpus="a")) for _ in range(4)]
        first.end()
        times = []
        for waiter in waiters:
            times.append(waiter.got()[1])
            waiter.end()
    assert times == sorted(times)


def test_who_waits_for_two_is_not_starved_by_those_who_wait_for_one(machine: Path, crew: list[Holder]) -> None:
    """GPUs become free one at a time; they are kept for who came first."""
    with ExitStack() as stack:
        held = {gpu: stack.enter_context(hold(gpu_request(gpus=gpu))) for gpu in "ab"}
        two = line_up(crew, machine, gpu_request(2, gpus="ab"))
        ones = [line_up(crew, machine, gpu_request(gpus="ab")) for _ in range(3)]
        held["a"].end()
        time.sleep(0.5)
        assert take("a") is None, "a newcomer does not take it either"
        held["b"].end()
        gpus, at = two.got()
        assert sorted(gpus) == ["a", "b"]
        two.end()
        first = ones[0].got()
        assert first[1] > at


def test_who_waits_for_one_gpu_does_not_hold_up_those_who_want_another(machine: Path, crew: list[Holder]) -> None:
    """A line is a GPU's, not the machine's."""
    with hold(gpu_request(gpus="a")):
        line_up(crew, machine, gpu_request(gpus="a"))
        assert take("b") is not None


def test_two_waiters_for_two_gpus_do_not_deadlock(machine: Path, crew: list[Holder]) -> None:
    """Each gets both, one after the other, whatever order they name them in."""
    with hold(gpu_request(2, gpus="ab")) as first:
        waiters = [line_up(crew, machine, gpu_request(2, gpus=gpus)) for gpus in ("ab", "ba")]
        first.end()
        for waiter in waiters:
            assert sorted(waiter.got()[0]) == ["a", "b"]
            waiter.end()


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_a_waiter_that_ends_leaves_the_line(machine: Path, crew: list[Holder], how: str) -> None:
    """Those behind it move up; Ctrl-C ends the waiting at once."""
    with hold(gpu_request(gpus="a")) as first:
        impatient = line_up(crew, machine, gpu_request(gpus="a"))
        patient = line_up(crew, machine, gpu_request(gpus="a"))
        began = time.monotonic()
        impatient.end(how)
        assert time.monotonic() - began < 10
        first.end()
        assert patient.got()[0] == "a"


def test_who_was_stopped_is_passed_over_and_keeps_the_place(machine: Path, crew: list[Holder]) -> None:
    """Ctrl-Z on a waiter holds up the others for a minute at most; when it goes on, it is served in its turn."""
    with hold(gpu_request(gpus="a")) as first:
        stopped = line_up(crew, machine, gpu_request(gpus="a"))
        time.sleep(0.5)  # it has its number, and is done with the directory
        os.kill(stopped.pid, signal.SIGSTOP)
        (ticket,) = machine.glob("ticket-*")
        first.end()
        assert take("a") is None, "it came earlier"
        os.utime(ticket, times=(time.time() - 61,) * 2)
        second = Holder(gpu_request(gpus="a"))
        crew.append(second)
        assert second.got()[0] == "a"
        os.kill(stopped.pid, signal.SIGCONT)
        second.end()
        assert stopped.got()[0] == "a"


def test_a_dead_holders_place_is_taken_within_a_second(machine: Path, crew: list[Holder]) -> None:
    """SIGKILL: the kernel drops the lock, and the next in line looks often enough."""
    delays = []
    for _ in range(3):
        with hold(gpu_request(gpus="a")) as first:
            waiter = line_up(crew, machine, gpu_request(gpus="a"))
            killed = time.monotonic()
            first.end("SIGKILL")
            delays.append(waiter.got()[1] - killed)
            waiter.end()
    assert min(delays) < 1


def test_waiting_costs_next_to_nothing(machine: Path) -> None:
    """A process that waits for days must not use a core."""
    program = """
import time
from tests.sharing.holders import gpu_request
from tfenv.sharing.queue import acquire
began, cpu = time.monotonic(), time.process_time()
acquire(gpu_request(gpus="a"), dict, keep_waiting=lambda unavailable: unavailable.waited_s < 3)
print((time.process_time() - cpu) / (time.monotonic() - began))
"""
    with hold(gpu_request(gpus="a")):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.05


# ---- who does not wait


def test_without_patience_the_answer_is_at_once(machine: Path) -> None:
    """And no place in line is left behind."""
    with hold(gpu_request(gpus="a")):
        answer = acquire(gpu_request(gpus="a"), dict)
        assert isinstance(answer, Unavailable)
        assert answer.can_wait
        assert in_line(machine) == 0


def test_patience_ends(machine: Path) -> None:
    """With the time that was waited, and without a ticket."""
    with hold(gpu_request(gpus="a")):
        answer = acquire(gpu_request(gpus="a"), dict, keep_waiting=lambda unavailable: unavailable.waited_s < 0.3)
        assert isinstance(answer, Unavailable)
        assert answer.waited_s >= 0.3
        assert in_line(machine) == 0


def test_who_resigns_is_seen_by_the_others(machine: Path) -> None:
    """A shared place is on record, with what kept the process from a better one."""
    with hold(gpu_request(gpus="ab")):
        answer = acquire(
            gpu_request(2, 8, "ab"),
            dict,
            fallback=lambda unavailable: share(gpu_request(2, 8, "ab"), unavailable.occupancy),
        )
    assert isinstance(answer, Acquired)
    assert answer.fell_back_from is not None
    assert answer.allocations == (Allocation("b", 8), Allocation("a", 8, shared=True))


def test_looking_takes_nothing(machine: Path) -> None:
    """`tfgpu explain` says what would be chosen; the next to choose gets the same."""
    assert look(gpu_request(gpus="ab"), dict) == (Allocation("a"),)
    assert look(gpu_request(gpus="ab"), dict) == (Allocation("a"),)
    with hold(gpu_request(2, gpus="ab")):
        assert isinstance(look(gpu_request(gpus="ab"), dict), Unavailable)


def test_what_cannot_be_is_not_waited_for(machine: Path) -> None:
    """More GPUs than there are: the answer comes at once, though the process has patience."""
    answer = acquire(gpu_request(3, gpus="ab"), dict, keep_waiting=for_ever)
    assert isinstance(answer, Unavailable)
    assert not answer.possible


def test_memory_without_a_lease_is_looked_at_again(machine: Path) -> None:
    """A process that knows nothing of leases ends: nobody tells us, we see it."""
    size = 2 * UNNOTICED_BYTES
    card = GpuRequest(os.geteuid(), (Candidate("a", 4 * UNNOTICED_BYTES),), 1)
    until = time.monotonic() + 0.5

    def memory() -> Mapping[str, MemoryUse]:
        return {"a": MemoryUse(size, {5: size})} if time.monotonic() < until else {}

    answer = acquire(card, memory, keep_waiting=for_ever)
    assert isinstance(answer, Acquired)
    assert answer.waited_s > 0.4


def test_an_interrupt_while_waiting_reaches_the_program(machine: Path) -> None:
    """A handler of the program's raises out of the wait."""

    class StopError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StopError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with hold(gpu_request(gpus="a")), pytest.raises(StopError):
            acquire(gpu_request(gpus="a"), dict, keep_waiting=for_ever)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert in_line(machine) == 0


def test_sizes_add_up(machine: Path) -> None:
    """Three of 8 bytes fit on a card of 24, the fourth waits."""
    assert [take("a", TOTAL // 3) is not None for _ in range(4)] == [True, True, True, False]


#: Forks 24 processes that ask at one moment for a whole card of four; prints which GPUs were given.
RACE = """
import json, os, sys, time
from tests.sharing.holders import gpu_request
from tfenv.sharing.queue import Acquired, acquire
at = time.monotonic() + 0.1
pipes = []
for _ in range(24):
    reader, writer = os.pipe()
    if os.fork() == 0:
        while time.monotonic() < at:
            pass
        answer = acquire(gpu_request(), dict)
        os.write(writer, answer.allocations[0].uuid.encode() if isinstance(answer, Acquired) else b"-")
        sys.stdin.read()  # kept until all have asked
        os._exit(0)
    pipes.append(reader)
print("".join(os.read(reader, 1).decode() for reader in pipes), flush=True)
"""


def test_of_many_that_ask_at_one_moment_one_gets_each_gpu(machine: Path) -> None:
    """A look and the lease that follows from it are one step: nobody comes between."""
    for _ in range(4):
        race = subprocess.Popen(
            [sys.executable, "-c", RACE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        assert race.stdout is not None
        given = race.stdout.readline().strip()
        race.communicate()
        assert sorted(given.replace("-", "")) == ["a", "b", "c", "d"]
