"""What a program does about GPUs it shares with others: it takes, shares, waits, goes without, or is refused."""

from __future__ import annotations

import os
import pty
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from tfenv.policy.model import (
    Allocation,
    AutoChoice,
    Choice,
    Device,
    Inventory,
    MemoryLimit,
    MemoryUse,
    Plan,
    PlannedDevice,
)
from tfenv.sharing import allocate
from tfenv.sharing import lease as leases
from tfenv.sharing.allocate import AllocationResult, Requester, allocate_gpus
from tfenv.sharing.choose import Candidate, GpuRequest
from tfenv.sharing.queue import Acquired, acquire

GIB = 1 << 30
TOTAL = 24 * GIB
DEVICES = tuple(Device(number, f"GPU-{number}", "Card", TOTAL) for number in range(2))
INVENTORY = Inventory(DEVICES)


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFGPU_SIMULATE", "count=2")
    monkeypatch.setenv("TFGPU_SIMULATE_LOG", str(tmp_path / "log"))


def plan(when_busy: str = "wait", limit: int | None = None, **choice: object) -> Plan:
    planned = tuple(
        PlannedDevice(str(device.index), device, None if limit is None else MemoryLimit(bytes=limit))
        for device in DEVICES
    )
    return Plan(devices=planned, choosing=AutoChoice(when_busy=when_busy, **{"count": 1, **choice}))  # type: ignore[arg-type]


def nothing(_: tuple[str, ...]) -> Mapping[str, MemoryUse]:
    return {}


def requester(**facts: object) -> Requester:
    return Requester(os.geteuid(), nothing, **facts)  # type: ignore[arg-type]


def codes(made: AllocationResult) -> list[tuple[str, str]]:
    return [(finding.code, finding.severity) for finding in made.findings]


def fill(*limits: int | None) -> None:
    """Somebody holds GPU 0, GPU 1, so much of each."""
    for number, limit in enumerate(limits):
        gpu_request = GpuRequest(os.geteuid(), (Candidate(f"GPU-{number}", TOTAL, limit),), 1)
        assert isinstance(acquire(gpu_request, dict), Acquired)


def allocations(made: AllocationResult) -> tuple[Allocation, ...]:
    assert made.choice is not None
    return made.choice.allocations


def test_a_free_gpu_is_taken_and_kept() -> None:
    """With a lease that others see, and nothing to complain of."""
    fill(None)
    made = allocate_gpus(plan(), INVENTORY, requester(script="/srv/a.py"))
    assert (allocations(made), codes(made)) == ((Allocation("GPU-1"),), [])
    assert [lease.script for lease in leases.read_leases() if lease.allocation.uuid == "GPU-1"] == ["/srv/a.py"]


def test_cpu_goes_without_and_says_so() -> None:
    """`when_busy = "cpu"`: no GPU, a warning that names who is there, and no lease."""
    fill(None, None)
    made = allocate_gpus(plan("cpu"), INVENTORY, requester())
    assert (allocations(made), codes(made), made.refused) == ((), [("no-free-gpu", "warning")], False)
    assert f"(pid {os.getpid()}) all of it" in made.findings[0].message


def test_fail_refuses() -> None:
    """`when_busy = "fail"` is the policy's own word, whatever on_error says."""
    fill(None, None)
    made = allocate_gpus(plan("fail"), INVENTORY, requester())
    assert (made.refused, codes(made)) == (True, [("no-free-gpu", "error")])


def test_share_takes_the_least_used_and_says_so() -> None:
    """`when_busy = "share"`: on record as shared, with a lease of its own."""
    fill(20 * GIB, 22 * GIB)
    made = allocate_gpus(plan("share", 8 * GIB), INVENTORY, requester())
    assert (allocations(made), codes(made)) == (
        (Allocation("GPU-0", 8 * GIB, shared=True),),
        [("shared-gpu", "warning")],
    )
    assert len(leases.read_leases()) == 3


@pytest.mark.parametrize(("on_error", "shared"), [("warn", True), ("cpu", False), ("fail", False)])
def test_after_the_timeout_on_error_decides(on_error: str, shared: bool) -> None:
    """An error; a program that goes on shares the least used GPU, one that may not takes none."""
    fill(None, None)
    made = allocate_gpus(plan(timeout_s=0.3), INVENTORY, requester(on_error=on_error))
    assert codes(made) == [("no-free-gpu", "error")]
    assert made.choice is not None
    assert made.choice.waited_s >= 0.3
    assert bool(made.choice.allocations) is shared
    assert len(leases.read_leases()) == 2 + shared


def test_what_cannot_be_is_an_error_at_once() -> None:
    """More free memory than a card has: waiting would never end."""
    made = allocate_gpus(plan(min_free=MemoryLimit(bytes=2 * TOTAL)), INVENTORY, requester())
    assert (allocations(made), codes(made)) == ((), [("no-free-gpu", "error")])
    assert "large enough" in made.findings[0].message


def test_without_nvml_the_first_ones_are_taken_and_it_is_said() -> None:
    """As many as were asked for, by their numbers or by the grant's tokens."""
    blind = Inventory(problem="NVML: Driver Not Loaded")
    made = allocate_gpus(Plan(choosing=AutoChoice(2)), blind, requester())
    assert (allocations(made), codes(made)) == ((Allocation("0"), Allocation("1")), [("no-inventory", "warning")])
    assert "Driver Not Loaded" in made.findings[0].message
    granted = Plan(devices=(PlannedDevice("7"), PlannedDevice("3")), choosing=AutoChoice(1))
    assert allocations(allocate_gpus(granted, blind, requester())) == (Allocation("7"),)


def test_where_no_lease_can_be_written_a_choice_is_made_by_memory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error, since another may choose the same at that moment."""
    (tmp_path / "log.leases").write_text("in the way")
    monkeypatch.setattr(leases, "_UNFIT_SECONDS", 0.1)
    unavailable = Requester(os.geteuid(), lambda _: {"GPU-0": MemoryUse(GIB, {5: GIB})})
    made = allocate_gpus(plan(), INVENTORY, unavailable)
    assert (allocations(made), codes(made)) == ((Allocation("GPU-1"),), [("no-lease", "error")])
    assert made.choice == Choice((Allocation("GPU-1"),))


def totals(size: int) -> Plan:
    """GPU 0, whatever others have of it, and so much for all processes of the user."""
    planned = PlannedDevice("0", DEVICES[0], MemoryLimit(bytes=size), user_total=MemoryLimit(bytes=size))
    return Plan(devices=(planned,))


def test_a_users_total_is_held_for_a_list_of_gpus_too() -> None:
    """What the user's other processes leave is the limit, and the lease that others see."""
    fill(10 * GIB)
    made = allocate_gpus(totals(16 * GIB), INVENTORY, requester())
    assert (allocations(made), codes(made)) == ((Allocation("GPU-0", 6 * GIB),), [])
    assert sorted(lease.allocation.limit or 0 for lease in leases.read_leases()) == [6 * GIB, 10 * GIB]


def test_a_child_goes_without_where_its_parent_holds_the_total() -> None:
    """It does not wait: the parent may be waiting for it."""
    parent = allocate_gpus(totals(16 * GIB), INVENTORY, requester()).choice
    assert parent is not None
    made = allocate_gpus(totals(16 * GIB), INVENTORY, requester(ancestor_leases=(parent.lease,)))
    assert (allocations(made), codes(made)) == ((), [("no-free-gpu", "error")])
    assert "a parent process holds" in made.findings[0].message


def test_a_users_total_without_nvml_is_a_limit_alone() -> None:
    """Nobody can tell which GPUs these are: nothing is agreed on, and it is said."""
    planned = PlannedDevice("0", None, MemoryLimit(bytes=GIB), user_total=MemoryLimit(bytes=GIB))
    made = allocate_gpus(Plan(devices=(planned,)), Inventory(problem="no driver"), requester())
    assert (made.choice, codes(made)) == (None, [("no-inventory", "warning")])


# ---- words while waiting


def wait_for(seconds: float, **facts: object) -> None:
    fill(None, None)
    allocate_gpus(plan(timeout_s=seconds), INVENTORY, requester(on_error="fail", **facts))


def test_a_log_gets_a_line_at_first_and_then_one_a_minute(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits says for what and why; not each time it looks."""
    monkeypatch.setattr(allocate, "_IN_LOG", 0.4)
    wait_for(1.1)
    lines = capfd.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 2
    assert lines[0].startswith("tfgpu: waiting for a free GPU (0:00): GPU 0: ")


def test_silence_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    """`stderr = "none"` says nothing, also of waiting."""
    wait_for(0.8, speaks=False)
    assert capfd.readouterr().err == ""


def test_a_terminal_shows_progress_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is written over, no longer than the terminal is wide, and gone at the end."""
    master, slave = pty.openpty()
    with open(slave, "w", closefd=True) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(allocate, "_ON_TERMINAL", 0.1)
        monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((60, 20)))
        wait_for(1.0)
        shown = ""
        while not shown.endswith("\r\x1b[K"):  # a terminal gives what it has in parts
            shown += os.read(master, 1 << 16).decode()
    os.close(master)
    parts = shown.split("\r\x1b[K")
    assert "\n" not in shown
    assert len(parts) >= 3
    assert all(len(part) < 60 for part in parts)
    assert parts[-1] == ""


def test_a_gpu_that_becomes_free_ends_the_waiting() -> None:
    """The record says how long it was."""
    fill(None)
    gpu_request = GpuRequest(os.geteuid(), (Candidate("GPU-1", TOTAL),), 1)
    assert isinstance(acquire(gpu_request, dict), Acquired)
    descriptor = list(leases._kept)[-1]
    timer = threading.Timer(0.6, leases.release_file, [descriptor])
    timer.start()
    made = allocate_gpus(plan(timeout_s=30), INVENTORY, requester())
    timer.join()
    assert allocations(made) == (Allocation("GPU-1"),)
    assert made.choice is not None
    assert made.choice.waited_s > 0.3
