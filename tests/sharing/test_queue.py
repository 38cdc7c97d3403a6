"""A process takes all it needs or waits in the queue, and nobody starves or blocks another for ever."""

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
from tests.sharing.holders import TOTAL, Holder, hold, make_request, take
from tfenv.policy.model import UNNOTICED_BYTES, Allocation, MemoryUse
from tfenv.sharing.choose import share_gpus
from tfenv.sharing.queue import Acquired, Unavailable, acquire, look
from tfenv.sharing.request import Candidate, GpuRequest


@pytest.fixture
def crew() -> Iterator[list[Holder]]:
    """Processes that end with the test."""
    holders: list[Holder] = []
    yield holders
    for holder in holders:
        holder.close()


def wait_for_ever(_: Unavailable) -> bool:
    return True


def count_tickets(machine: Path) -> int:
    return sum(name.startswith("ticket-") for name in os.listdir(machine))


def line_up(crew: list[Holder], machine: Path, made: GpuRequest) -> Holder:
    """Start one more that waits, behind all others."""
    before = count_tickets(machine)
    crew.append(Holder(made))
    while count_tickets(machine) == before:
        time.sleep(0.01)
    return crew[-1]


def test_first_come_first_served(machine: Path, crew: list[Holder]) -> None:
    """Waiters for one GPU get it in the order in which they came."""
    with hold(make_request(gpus="a")) as first:
        waiters = [line_up(crew, machine, make_request(gpus="a")) for _ in range(4)]
        first.end()
        times = []
        for waiter in waiters:
            times.append(waiter.wait_for_gpus()[1])
            waiter.end()
    assert times == sorted(times)


def test_who_waits_for_two_is_not_starved_by_those_who_wait_for_one(machine: Path, crew: list[Holder]) -> None:
    """GPUs become free one at a time, and are kept for the process that came first."""
    with ExitStack() as stack:
        held = {gpu: stack.enter_context(hold(make_request(gpus=gpu))) for gpu in "ab"}
        two = line_up(crew, machine, make_request(2, gpus="ab"))
        ones = [line_up(crew, machine, make_request(gpus="ab")) for _ in range(3)]
        held["a"].end()
        time.sleep(0.5)
        assert take("a") is None, "a newcomer does not take it either"
        held["b"].end()
        gpus, at = two.wait_for_gpus()
        assert sorted(gpus) == ["a", "b"]
        two.end()
        first = ones[0].wait_for_gpus()
        assert first[1] > at


def test_who_waits_for_one_gpu_does_not_hold_up_those_who_want_another(machine: Path, crew: list[Holder]) -> None:
    """Each GPU has a queue of its own."""
    with hold(make_request(gpus="a")):
        line_up(crew, machine, make_request(gpus="a"))
        assert take("b") is not None


def test_two_waiters_for_two_gpus_do_not_deadlock(machine: Path, crew: list[Holder]) -> None:
    """Each gets both, one after the other, in whatever order they name them."""
    with hold(make_request(2, gpus="ab")) as first:
        waiters = [line_up(crew, machine, make_request(2, gpus=gpus)) for gpus in ("ab", "ba")]
        first.end()
        for waiter in waiters:
            assert sorted(waiter.wait_for_gpus()[0]) == ["a", "b"]
            waiter.end()


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_a_waiter_that_ends_leaves_the_queue(machine: Path, crew: list[Holder], how: str) -> None:
    """Those behind it move up. Ctrl-C ends the waiting at once."""
    with hold(make_request(gpus="a")) as first:
        interrupted = line_up(crew, machine, make_request(gpus="a"))
        waiting = line_up(crew, machine, make_request(gpus="a"))
        began = time.monotonic()
        interrupted.end(how)
        assert time.monotonic() - began < 10
        first.end()
        assert waiting.wait_for_gpus()[0] == "a"


def test_a_stopped_waiter_is_passed_over_and_keeps_its_ticket(machine: Path, crew: list[Holder]) -> None:
    """Ctrl-Z on a waiter holds up the others for a minute at most. When it goes on, it is served in its order."""
    with hold(make_request(gpus="a")) as first:
        stopped = line_up(crew, machine, make_request(gpus="a"))
        time.sleep(0.5)  # it has its number, and is done with the directory
        os.kill(stopped.pid, signal.SIGSTOP)
        (ticket,) = machine.glob("ticket-*")
        first.end()
        assert take("a") is None, "it came earlier"
        os.utime(ticket, times=(time.time() - 61,) * 2)
        second = Holder(make_request(gpus="a"))
        crew.append(second)
        assert second.wait_for_gpus()[0] == "a"
        os.kill(stopped.pid, signal.SIGCONT)
        second.end()
        assert stopped.wait_for_gpus()[0] == "a"


def test_a_dead_holders_gpu_is_taken_within_a_second(machine: Path, crew: list[Holder]) -> None:
    """SIGKILL: the kernel drops the lock, and the next in the queue looks often enough."""
    delays = []
    for _ in range(3):
        with hold(make_request(gpus="a")) as first:
            waiter = line_up(crew, machine, make_request(gpus="a"))
            killed = time.monotonic()
            first.end("SIGKILL")
            delays.append(waiter.wait_for_gpus()[1] - killed)
            waiter.end()
    assert min(delays) < 1


def test_waiting_costs_next_to_nothing(machine: Path) -> None:
    """A process that waits for days must not use a core."""
    program = """
import time
from tests.sharing.holders import make_request
from tfenv.sharing.queue import acquire
began, cpu = time.monotonic(), time.process_time()
acquire(make_request(gpus="a"), dict, keep_waiting=lambda unavailable: unavailable.waited_s < 3)
print((time.process_time() - cpu) / (time.monotonic() - began))
"""
    with hold(make_request(gpus="a")):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.05


# ---- no waiting


def test_a_process_that_does_not_wait_has_its_answer_at_once(machine: Path) -> None:
    """It leaves no ticket behind."""
    with hold(make_request(gpus="a")):
        answer = acquire(make_request(gpus="a"), dict)
        assert isinstance(answer, Unavailable)
        assert answer.can_wait
        assert count_tickets(machine) == 0


def test_the_wait_ends_when_keep_waiting_says_so(machine: Path) -> None:
    """The answer has the time that was waited, and no ticket is left behind."""
    with hold(make_request(gpus="a")):
        answer = acquire(make_request(gpus="a"), dict, keep_waiting=lambda unavailable: unavailable.waited_s < 0.3)
        assert isinstance(answer, Unavailable)
        assert answer.waited_s >= 0.3
        assert count_tickets(machine) == 0


def test_others_see_a_process_that_fell_back(machine: Path) -> None:
    """A shared allocation is leased, and the answer tells why there was no better one."""
    with hold(make_request(gpus="ab")):
        answer = acquire(
            make_request(2, 8, "ab"),
            dict,
            fallback=lambda unavailable: share_gpus(make_request(2, 8, "ab"), unavailable.occupancy),
        )
    assert isinstance(answer, Acquired)
    assert answer.fell_back_from is not None
    assert answer.allocations == (Allocation("b", 8), Allocation("a", 8, shared=True))


def test_looking_takes_nothing(machine: Path) -> None:
    """`tfgpu explain` shows what would be chosen, and the next process gets the same."""
    assert look(make_request(gpus="ab"), dict) == (Allocation("a"),)
    assert look(make_request(gpus="ab"), dict) == (Allocation("a"),)
    with hold(make_request(2, gpus="ab")):
        assert isinstance(look(make_request(gpus="ab"), dict), Unavailable)


def test_an_impossible_request_is_not_waited_for(machine: Path) -> None:
    """More GPUs than there are: the answer comes at once, though the process would wait."""
    answer = acquire(make_request(3, gpus="ab"), dict, keep_waiting=wait_for_ever)
    assert isinstance(answer, Unavailable)
    assert not answer.possible


def test_memory_without_a_lease_is_measured_again(machine: Path) -> None:
    """A process without a lease ends, which only NVML tells."""
    size = 2 * UNNOTICED_BYTES
    card = GpuRequest(os.geteuid(), (Candidate("a", 4 * UNNOTICED_BYTES),), 1)
    until = time.monotonic() + 0.5

    def measure() -> Mapping[str, MemoryUse]:
        return {"a": MemoryUse(size, {5: size})} if time.monotonic() < until else {}

    answer = acquire(card, measure, keep_waiting=wait_for_ever)
    assert isinstance(answer, Acquired)
    assert answer.waited_s > 0.4


def test_an_interrupt_while_waiting_reaches_the_program(machine: Path) -> None:
    """An exception of the program's signal handler ends the wait."""

    class StopError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StopError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with hold(make_request(gpus="a")), pytest.raises(StopError):
            acquire(make_request(gpus="a"), dict, keep_waiting=wait_for_ever)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert count_tickets(machine) == 0


def test_sizes_add_up(machine: Path) -> None:
    """Three of 8 bytes fit on a card of 24, the fourth waits."""
    assert [take("a", TOTAL // 3) is not None for _ in range(4)] == [True, True, True, False]


#: Forks 24 processes that ask at one moment for a whole card of four; prints which GPUs were given.
RACE = """
import json, os, sys, time
from tests.sharing.holders import make_request
from tfenv.sharing.queue import Acquired, acquire
at = time.monotonic() + 0.1
pipes = []
for _ in range(24):
    reader, writer = os.pipe()
    if os.fork() == 0:
        while time.monotonic() < at:
            pass
        answer = acquire(make_request(), dict)
        os.write(writer, answer.allocations[0].uuid.encode() if isinstance(answer, Acquired) else b"-")
        sys.stdin.read()  # kept until all have asked
        os._exit(0)
    pipes.append(reader)
print("".join(os.read(reader, 1).decode() for reader in pipes), flush=True)
"""


def test_of_many_that_ask_at_one_moment_one_gets_each_gpu(machine: Path) -> None:
    """To look and to write the lease are one step: nobody comes between."""
    for _ in range(4):
        race = subprocess.Popen(
            [sys.executable, "-c", RACE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        assert race.stdout is not None
        given = race.stdout.readline().strip()
        race.communicate()
        assert sorted(given.replace("-", "")) == ["a", "b", "c", "d"]
