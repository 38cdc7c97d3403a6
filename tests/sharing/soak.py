"""Processes that take GPUs without end, and what may befall them: SIGKILL, SIGSTOP, forks, descriptors that are closed.

Started by `test_soak.py`. Reads {"log": "...", "stop": "...", "strangers": "...", "count": processes, "uids": [...],
"seed": number} from stdin. Keeps so many processes alive until the file `stop` is there. Then lets all of them finish,
and prints their statuses. Each writes into the log, with CLOCK_MONOTONIC, what it asked for and what it was given.
"""

from __future__ import annotations

import codecs
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from tests.sharing.crowd import write
from tfenv.policy.model import AutoChoice, Choice, Device, Inventory, MemoryLimit, MemoryUse, Plan, PlannedDevice
from tfenv.sharing.allocate import AllocationResult, Requester, allocate_gpus, renew_lease
from tfenv.values import frozen

GIB = 1 << 30
TOTAL = 24 * GIB
OVERHEAD = 600 << 20
DEVICES = tuple(Device(number, f"GPU-{number}", "Card", TOTAL) for number in range(4))
#: Where the log is in a process, which closes all others.
_LOG = 1
#: Seconds. A process that is stopped for longer than 30 may keep the directory locked, and all others give up.
_LONGEST_STOP = 3.0


@frozen
class Request:
    """What a process asks for.

    Attributes:
        limit: Bytes of each GPU. None: all of it.
        count: How many GPUs.
        only: The one GPU it may have. None: any.
    """

    limit: int | None = None
    count: int = 1
    only: int | None = None

    @classmethod
    def draw(cls, chance: random.Random) -> Request:
        """Return a request that four cards of 24 GiB can serve, if a stranger leaves 20 of one of them."""
        limit = None if chance.random() < 0.05 else chance.randint(2, 20) * GIB
        return cls(limit, 2 if chance.random() < 0.2 else 1)

    def make_plan(self) -> Plan:
        size = None if self.limit is None else MemoryLimit(bytes=self.limit)
        devices = [d for d in DEVICES if self.only in (None, d.index)]
        planned = tuple(PlannedDevice(str(device.index), device, size) for device in devices)
        return Plan(devices=planned, choosing=AutoChoice(self.count))


# ---- one process


def run_program(request: Request, strangers: str, chance: random.Random) -> None:
    """Take GPUs, keep them for a moment, and end. A second thread may fork meanwhile."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    def measure(_: tuple[str, ...]) -> Mapping[str, MemoryUse]:
        with open(strangers, encoding="ascii") as file:
            return {uuid: MemoryUse(size, {1: size}) for uuid, size in json.load(file).items()}

    if chance.random() < 0.4:
        threading.Thread(target=fork_often, args=(random.Random(chance.random()),), daemon=True).start()
    requester = Requester(os.geteuid(), measure, speaks=False, overhead=OVERHEAD)
    plan = request.make_plan()
    write(_LOG, "asked", only=request.only)
    result = allocate_gpus(plan, Inventory(DEVICES), requester)
    write_result(result)
    time.sleep(chance.uniform(0, 0.4))
    write(_LOG, "leave")
    if chance.random() < 0.2 and result.choice is not None:
        os.closerange(3, 256)
        renew(result.choice, plan, requester)
        time.sleep(chance.uniform(0, 0.2))
        write(_LOG, "leave")


def renew(choice: Choice, plan: Plan, requester: Requester) -> None:
    result = renew_lease(choice, plan, requester)
    if result is None:
        raise RuntimeError("the lease was not missed")
    write_result(result)


def write_result(result: AllocationResult) -> None:
    codes = [finding.code for finding in result.findings]
    choice = result.choice or Choice()
    # Who lost its lease to others knows that it shares the GPU.
    parts = [] if "lease-lost" in codes else [[part.uuid, part.limit, part.shared] for part in choice.allocations]
    write(_LOG, "enter", allocations=parts, findings=codes)


def fork_often(chance: random.Random) -> None:
    """Fork children that outlive their parent."""
    while True:
        time.sleep(chance.uniform(0, 0.6))
        if os.fork() == 0:
            time.sleep(chance.uniform(0, 5))
            os._exit(0)


# ---- all of them


class Soak:
    """Keeps processes alive and does them harm."""

    def __init__(self, orders: Mapping[str, Any]) -> None:
        self.orders = orders
        self.chance = random.Random(orders["seed"])
        self.log = os.open(orders["log"], os.O_WRONLY | os.O_APPEND)
        self.statuses: list[int] = []
        self.running: set[int] = set()
        self.stopped: dict[int, float] = {}
        self.spared: set[int] = set()
        self.started = 0

    def start(self, request: Request) -> int:
        seed, uid = self.chance.random(), self.orders["uids"][self.started % len(self.orders["uids"])]
        self.started += 1
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.dup2(self.log, _LOG)
                os.setgid(uid)
                os.setuid(uid)
                run_program(request, self.orders["strangers"], random.Random(seed))
                status = 0
            except BaseException as error:  # noqa: BLE001 - the test judges it
                write(_LOG, "raised", error=f"{type(error).__name__}: {error}")
            os._exit(status)
        self.running.add(pid)
        return pid

    def reap(self) -> None:
        for pid in tuple(self.running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.running.discard(pid)
                self.stopped.pop(pid, None)
                self.statuses.append(status)

    def harm(self) -> None:
        """Kill one, or stop one for a moment."""
        victims = sorted(self.running - self.spared - self.stopped.keys())
        if victims and self.chance.random() < 0.04:
            victim = self.chance.choice(victims)
            write(self.log, "killed", victim=victim)
            os.kill(victim, signal.SIGKILL)
        elif victims and self.chance.random() < 0.1:
            victim = self.chance.choice(victims)
            os.kill(victim, signal.SIGSTOP)
            self.stopped[victim] = time.monotonic() + self.chance.uniform(0, _LONGEST_STOP)

    def resume(self, now: float) -> None:
        for pid in [pid for pid, until in self.stopped.items() if until <= now]:
            del self.stopped[pid]
            os.kill(pid, signal.SIGCONT)

    def run(self) -> None:
        # Comes first, and a stranger is in its way as long as the others run.
        self.spared.add(self.start(Request(22 * GIB, only=0)))
        while not os.path.exists(self.orders["stop"]):
            while len(self.running) < self.orders["count"]:
                self.start(Request.draw(self.chance))
            self.harm()
            self.resume(time.monotonic())
            time.sleep(0.02)
            self.reap()
        self.resume(float("inf"))
        while self.running:
            time.sleep(0.02)
            self.reap()


def main() -> None:
    codecs.lookup("ascii")  # is loaded late, and another user may not be able to read the interpreter's files
    soak = Soak(json.load(sys.stdin))
    soak.run()
    print(json.dumps(soak.statuses), flush=True)


if __name__ == "__main__":
    main()
