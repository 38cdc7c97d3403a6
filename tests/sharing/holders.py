"""Processes that hold leases, for the tests of leases."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tfenv.sharing.queue import Acquired, acquire
from tfenv.sharing.request import Candidate, GpuRequest
from tfenv.values import as_dict

NOBODY = 65534
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")
#: All sizes of these tests are bytes of a card of 24.
TOTAL = 24

_PROGRAM = """
import json, os, subprocess, sys, time
from tfenv.sharing.queue import acquire
from tfenv.sharing.request import Candidate, GpuRequest
orders = json.loads(sys.argv[1])
asked = orders["request"]
candidates = tuple(Candidate(**each) for each in asked["candidates"])
gpu_request = GpuRequest(os.geteuid(), candidates, asked["count"])
print("asking", flush=True)
acquired = acquire(gpu_request, dict, script=orders["script"], keep_waiting=lambda unavailable: True)
print(json.dumps([[allocation.uuid for allocation in acquired.allocations], time.monotonic()]), flush=True)
exec(orders["then"])
sys.stdin.readline()
command = sys.stdin.readline()
if command == "exec\\n":
    os.execvp("sleep", ["sleep", "30"])
"""


def make_request(count: int = 1, need: int | None = None, gpus: str = "abcd") -> GpuRequest:
    return GpuRequest(os.geteuid(), tuple(Candidate(gpu, TOTAL, need) for gpu in gpus), count)


def take(gpu: str, need: int | None = None) -> Acquired | None:
    """This process takes the GPU, if it is free."""
    answer = acquire(make_request(1, need, gpu), dict)
    return answer if isinstance(answer, Acquired) else None


class Holder:
    """A process that asks for GPUs, waits for them, and keeps them until it is told otherwise."""

    def __init__(self, made: GpuRequest, script: str | None = None, then: str = "") -> None:
        content = as_dict(made)
        content.pop("ancestor_leases")
        orders = {"request": content, "script": script, "then": then}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(orders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            start_new_session=True,
        )
        self.pid = self._process.pid
        assert self.read_line() == "asking"

    def read_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def wait_for_gpus(self) -> tuple[str, float]:
        """Wait until it has its GPUs, and return them as one word, and when it got them."""
        uuids, at = json.loads(self.read_line())
        return "".join(uuids), at

    def end(self, how: str = "SIGKILL") -> None:
        assert self._process.stdin is not None
        if how == "exec":
            self._process.stdin.write("\nexec\n")
            self._process.stdin.flush()
            while _read_command(self.pid) != "sleep":
                time.sleep(0.01)
        elif how == "exit":
            self._process.stdin.write("\n\n")
            self._process.stdin.flush()
            self._process.wait(20)
        else:
            self._process.send_signal(getattr(signal, how))
            self._process.wait(20)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _read_command(pid: int) -> str:
    with open(f"/proc/{pid}/comm", encoding="ascii") as file:
        return file.read().strip()


@contextlib.contextmanager
def hold(made: GpuRequest, **orders: Any) -> Iterator[Holder]:
    """A process that has what it asks for."""
    holder = Holder(made, **orders)
    try:
        holder.wait_for_gpus()
        yield holder
    finally:
        holder.close()
