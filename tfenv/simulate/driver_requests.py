"""Reads what was asked of the simulated driver, and sums it up per GPU."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, cast

from tfenv.values import frozen, replace

Operation = Literal["cuInit", "context", "closed", "alloc", "free", "oom", "threshold", "cgroup", "limit", "reserve"]


@frozen
class DriverRequest:
    """One request to the driver.

    Attributes:
        pid: The process that asked.
        op: "cuInit", "alloc", "free". "oom": an allocation that was refused. "threshold": what a memory
            pool may keep. "context" and "closed": what the context of a process takes and gives back.
            "cgroup": a cgroup that the process is in. "limit": what a cgroup is limited to. "reserve":
            what one above it has for that.
        gpu: Number of the GPU in the machine, not CUDA's ordinal. -1 for cuInit.
        bytes: Size. For cuInit the number of GPUs the process sees.
        held: Bytes that all live simulated processes together hold on the GPU after the request. The soft limit.
        call: The driver's function: "cuMemAlloc". Of a cgroup or a limit, the cgroup's number in the kernel.
        instance: Number of the MIG instance. -1: the whole GPU.
    """

    pid: int
    op: Operation
    gpu: int
    bytes: int
    held: int
    call: str
    instance: int = -1


@frozen
class GpuRequestTotals:
    """What was asked of one GPU in all. Sizes in bytes.

    Attributes:
        gpu: Its number in the machine.
        allocations: How many requests for memory there were, refused ones too.
        out_of_memory: How many of them were refused.
        first: Size of the first one. None without any.
        peak: The most that all processes together held at once, with their contexts.
        peak_process: The most that one process held at once, without its context.
        processes: Ids of the processes that asked for memory, in the order of their first request.
    """

    gpu: int
    allocations: int = 0
    out_of_memory: int = 0
    first: int | None = None
    peak: int = 0
    peak_process: int = 0
    processes: tuple[int, ...] = ()


def read_requests(log: str | os.PathLike[str], *, pid: int | None = None) -> tuple[DriverRequest, ...]:
    """Return all requests in a log, without a last line that is being written.

    Args:
        log: The file. One that is not there is a log without requests.
        pid: Only those of this process. None: those of all.

    Raises:
        OSError: The log is there and cannot be read.
        ValueError: It is not such a log.
    """
    try:
        text = Path(log).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    lines = text.split("\n")[:-1]  # what follows the last newline is empty, or not complete
    requests = (_read_line(line, f"{log}:{number}") for number, line in enumerate(lines, 1))
    return tuple(request for request in requests if pid is None or request.pid == pid)


def _read_line(line: str, where: str) -> DriverRequest:
    try:
        fields = json.loads(line)
        return DriverRequest(
            int(fields["pid"]), cast(Operation, fields["op"]), int(fields["gpu"]),
            int(fields["bytes"]), int(fields["held"]), str(fields["call"]), int(fields.get("instance", -1)),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: not a request to the simulated driver ({error!r})") from error


def find_cuda_processes(requests: Iterable[DriverRequest]) -> frozenset[int]:
    """Return the ids of the processes that called cuInit."""
    return frozenset(request.pid for request in requests if request.op == "cuInit")


def summarise_requests(requests: Iterable[DriverRequest]) -> dict[int, GpuRequestTotals]:
    """Sum up requests per GPU. GPUs of which no memory was asked are left out."""
    held: dict[tuple[int, int], int] = defaultdict(int)
    summary: dict[int, GpuRequestTotals] = {}
    for request in requests:
        if request.op == "cuInit":
            # A new program: its predecessor, or whoever had this process id before, holds nothing more.
            held.update({key: 0 for key in held if key[0] == request.pid})
        elif request.op == "context":
            before = summary.get(request.gpu, GpuRequestTotals(request.gpu))
            summary[request.gpu] = replace(before, peak=max(before.peak, request.held))
        elif request.op in ("alloc", "free", "oom"):
            before = summary.get(request.gpu, GpuRequestTotals(request.gpu))
            change = {"alloc": request.bytes, "free": -request.bytes}.get(request.op, 0)
            held[request.pid, request.gpu] += change
            summary[request.gpu] = _add_request(before, request, held[request.pid, request.gpu])
    return dict(sorted(summary.items()))


def _add_request(before: GpuRequestTotals, request: DriverRequest, held_by_process: int) -> GpuRequestTotals:
    if request.op == "free":
        return before
    known = request.pid in before.processes
    return GpuRequestTotals(
        gpu=before.gpu,
        allocations=before.allocations + 1,
        out_of_memory=before.out_of_memory + (request.op == "oom"),
        first=request.bytes if before.first is None else before.first,
        peak=max(before.peak, request.held),
        peak_process=max(before.peak_process, held_by_process),
        processes=before.processes if known else (*before.processes, request.pid),
    )
