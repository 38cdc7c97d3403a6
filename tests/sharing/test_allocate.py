"""How a program comes to GPUs it shares with others: it takes, shares, waits, goes without, or is refused."""

from __future__ import annotations

import os
import pty
import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from tfenv.sharing.allocate import AllocationResult, Requester, allocate_gpus, renew_lease
from tfenv.sharing.queue import Acquired, acquire
from tfenv.sharing.request import Candidate, GpuRequest
from tfenv.values import as_dict

GIB = 1 << 30
TOTAL = 24 * GIB
DEVICES = tuple(Device(number, f"GPU-{number}", "Card", TOTAL) for number in range(2))
INVENTORY = Inventory(DEVICES)


@pytest.fixture(autouse=True)
def _simulate_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFGPU_SIMULATE", "count=2")
    monkeypatch.setenv("TFGPU_SIMULATE_LOG", str(tmp_path / "log"))


def make_plan(when_busy: str = "wait", limit: int | None = None, **choice: object) -> Plan:
    planned = tuple(
        PlannedDevice(str(device.index), device, None if limit is None else MemoryLimit(bytes=limit))
        for device in DEVICES
    )
    return Plan(devices=planned, choosing=AutoChoice(when_busy=when_busy, **{"count": 1, **choice}))  # type: ignore[arg-type]


def measure_nothing(_: tuple[str, ...]) -> Mapping[str, MemoryUse]:
    return {}


def make_requester(**facts: object) -> Requester:
    return Requester(os.geteuid(), measure_nothing, **facts)  # type: ignore[arg-type]


def list_codes(made: AllocationResult) -> list[tuple[str, str]]:
    return [(finding.code, finding.severity) for finding in made.findings]


def fill(*limits: int | None) -> None:
    """Take so many bytes of GPU 0 and of GPU 1. None: the whole GPU."""
    for number, limit in enumerate(limits):
        gpu_request = GpuRequest(os.geteuid(), (Candidate(f"GPU-{number}", TOTAL, limit),), 1)
        assert isinstance(acquire(gpu_request, dict), Acquired)


def get_allocations(made: AllocationResult) -> tuple[Allocation, ...]:
    assert made.choice is not None
    return made.choice.allocations


def test_a_free_gpu_is_taken_and_kept() -> None:
    """Others see its lease, and there is no finding."""
    fill(None)
    made = allocate_gpus(make_plan(), INVENTORY, make_requester(script="/srv/a.py"))
    assert (get_allocations(made), list_codes(made)) == ((Allocation("GPU-1"),), [])
    assert [lease.script for lease in leases.read_leases() if lease.allocation.uuid == "GPU-1"] == ["/srv/a.py"]


def test_cpu_goes_without_a_gpu() -> None:
    """`when_busy = "cpu"`: no GPU, a warning that names who has the GPUs, and no lease."""
    fill(None, None)
    made = allocate_gpus(make_plan("cpu"), INVENTORY, make_requester())
    assert (get_allocations(made), list_codes(made), made.refused) == ((), [("no-free-gpu", "warning")], False)
    assert f"(pid {os.getpid()}) all of it" in made.findings[0].message


def test_fail_refuses() -> None:
    """`when_busy = "fail"` stops the program, whatever on_error is."""
    fill(None, None)
    made = allocate_gpus(make_plan("fail"), INVENTORY, make_requester())
    assert (made.refused, list_codes(made)) == (True, [("no-free-gpu", "error")])


def test_share_takes_the_least_used() -> None:
    """`when_busy = "share"`: the GPU is on record as shared, and the process has a lease of its own."""
    fill(20 * GIB, 22 * GIB)
    made = allocate_gpus(make_plan("share", 8 * GIB), INVENTORY, make_requester())
    assert (get_allocations(made), list_codes(made)) == (
        (Allocation("GPU-0", 8 * GIB, shared=True),),
        [("shared-gpu", "warning")],
    )
    assert len(leases.read_leases()) == 3


@pytest.mark.parametrize(("on_error", "shared"), [("warn", True), ("cpu", False), ("fail", False)])
def test_after_the_timeout_on_error_decides(on_error: str, shared: bool) -> None:
    """There is an error. A program that goes on shares the least used GPU. One that may not takes none."""
    fill(None, None)
    made = allocate_gpus(make_plan(timeout_s=0.3), INVENTORY, make_requester(on_error=on_error))
    assert list_codes(made) == [("no-free-gpu", "error")]
    assert made.choice is not None
    assert made.choice.waited_s >= 0.3
    assert bool(made.choice.allocations) is shared
    assert len(leases.read_leases()) == 2 + shared


def test_an_impossible_request_is_an_error_at_once() -> None:
    """More free memory than a card has: waiting would never end."""
    made = allocate_gpus(make_plan(min_free=MemoryLimit(bytes=2 * TOTAL)), INVENTORY, make_requester())
    assert (get_allocations(made), list_codes(made)) == ((), [("no-free-gpu", "error")])
    assert "large enough" in made.findings[0].message


def test_without_nvml_the_first_ones_are_taken_with_a_warning() -> None:
    """As many as were asked for, by their numbers or by the grant's tokens."""
    blind = Inventory(problem="NVML: Driver Not Loaded")
    made = allocate_gpus(Plan(choosing=AutoChoice(2)), blind, make_requester())
    assert get_allocations(made) == (Allocation("0"), Allocation("1"))
    assert list_codes(made) == [("no-inventory", "warning")]
    assert "Driver Not Loaded" in made.findings[0].message
    granted = Plan(devices=(PlannedDevice("7"), PlannedDevice("3")), choosing=AutoChoice(1))
    assert get_allocations(allocate_gpus(granted, blind, make_requester())) == (Allocation("7"),)


def test_where_no_lease_can_be_written_a_choice_is_made_by_memory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error, since another may choose the same at that moment."""
    (tmp_path / "log.leases").write_text("in the way")
    monkeypatch.setattr(leases, "_CREATION_SECONDS", 0.1)
    unavailable = Requester(os.geteuid(), lambda _: {"GPU-0": MemoryUse(GIB, {5: GIB})})
    made = allocate_gpus(make_plan(), INVENTORY, unavailable)
    assert (get_allocations(made), list_codes(made)) == ((Allocation("GPU-1"),), [("no-lease", "error")])
    assert made.choice == Choice((Allocation("GPU-1"),))


def make_plan_with_total(size: int) -> Plan:
    """GPU 0, whatever others have of it, and so many bytes for all processes of the user."""
    planned = PlannedDevice("0", DEVICES[0], MemoryLimit(bytes=size), user_total=MemoryLimit(bytes=size))
    return Plan(devices=(planned,))


def test_a_users_total_is_held_for_a_list_of_gpus_too() -> None:
    """What the user's other processes leave is the limit, and the lease that others see."""
    fill(10 * GIB)
    made = allocate_gpus(make_plan_with_total(16 * GIB), INVENTORY, make_requester())
    assert (get_allocations(made), list_codes(made)) == ((Allocation("GPU-0", 6 * GIB),), [])
    assert sorted(lease.allocation.limit or 0 for lease in leases.read_leases()) == [6 * GIB, 10 * GIB]


def test_a_child_goes_without_where_its_parent_holds_the_total() -> None:
    """It does not wait: the parent may be waiting for it."""
    parent = allocate_gpus(make_plan_with_total(16 * GIB), INVENTORY, make_requester()).choice
    assert parent is not None
    made = allocate_gpus(make_plan_with_total(16 * GIB), INVENTORY, make_requester(ancestor_leases=(parent.lease,)))
    assert (get_allocations(made), list_codes(made)) == ((), [("no-free-gpu", "error")])
    assert "a parent process holds" in made.findings[0].message


def test_a_users_total_without_nvml_is_a_limit_alone() -> None:
    """Nobody can tell which GPUs these are. Nothing is agreed on, with a warning."""
    planned = PlannedDevice("0", None, MemoryLimit(bytes=GIB), user_total=MemoryLimit(bytes=GIB))
    made = allocate_gpus(Plan(devices=(planned,)), Inventory(problem="no driver"), make_requester())
    assert (made.choice, list_codes(made)) == (None, [("no-inventory", "warning")])


# ---- messages while waiting


def wait_in_vain(seconds: float, **facts: object) -> None:
    fill(None, None)
    allocate_gpus(make_plan(timeout_s=seconds), INVENTORY, make_requester(on_error="fail", **facts))


def test_a_log_gets_a_line_at_first_and_then_one_a_minute(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that waits tells for what and why, but not each time it looks."""
    monkeypatch.setattr(allocate, "_IN_LOG", 0.4)
    wait_in_vain(1.1)
    lines = capfd.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 2
    assert lines[0].startswith("tfgpu: waiting for a free GPU (0:00): GPU 0: ")
    assert all(line.endswith(" [waiting]") for line in lines)


def test_a_silent_policy_waits_silently(capfd: pytest.CaptureFixture[str]) -> None:
    """`stderr = "none"` prints nothing, not even about waiting."""
    wait_in_vain(0.8, speaks=False)
    assert capfd.readouterr().err == ""


def test_a_terminal_shows_progress_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is written over, no longer than the terminal is wide, and gone at the end."""
    master, slave = pty.openpty()
    with open(slave, "w", closefd=True) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(allocate, "_ON_TERMINAL", 0.1)
        monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((60, 20)))
        wait_in_vain(1.0)
        shown = ""
        while not shown.endswith("\r\x1b[K"):  # a terminal gives what it has in parts
            shown += os.read(master, 1 << 16).decode()
    os.close(master)
    parts = shown.split("\r\x1b[K")
    assert "\n" not in shown
    assert len(parts) >= 3
    assert all(len(part) < 60 for part in parts)
    assert all(part.endswith(" [waiting]") for part in parts[1:-1])
    assert parts[-1] == ""


def test_a_gpu_that_becomes_free_ends_the_waiting() -> None:
    """The choice has the time that was waited."""
    fill(None)
    gpu_request = GpuRequest(os.geteuid(), (Candidate("GPU-1", TOTAL),), 1)
    assert isinstance(acquire(gpu_request, dict), Acquired)
    descriptor = list(leases._locked)[-1]
    timer = threading.Timer(0.6, leases.release_entry, [descriptor])
    timer.start()
    made = allocate_gpus(make_plan(timeout_s=30), INVENTORY, make_requester())
    timer.join()
    assert get_allocations(made) == (Allocation("GPU-1"),)
    assert made.choice is not None
    assert made.choice.waited_s > 0.3


# ---- a lease that is lost


def test_a_lost_lease_is_taken_again(tmp_path: Path) -> None:
    """Others see it again, and the process is told."""
    plan, requester = make_plan(limit=8 * GIB), make_requester()
    made = allocate_gpus(plan, INVENTORY, requester)
    assert made.choice is not None
    assert renew_lease(made.choice, plan, requester) is None
    (tmp_path / "log.leases" / (made.choice.lease or "")).unlink()
    assert leases.read_leases() == ()
    again = renew_lease(made.choice, plan, requester)
    assert again is not None
    assert list_codes(again) == [("lease-renewed", "note")]
    assert [lease.allocation for lease in leases.read_leases()] == list(get_allocations(made))
    assert [lease.id for lease in leases.read_leases()] == [made.choice.lease], "children know it by its id"


def test_a_lost_lease_comes_before_those_who_wait(tmp_path: Path) -> None:
    """The process has the GPU already: that another one of its user waits for a part of it changes nothing."""
    plan, requester = make_plan(limit=8 * GIB), make_requester()
    made = allocate_gpus(plan, INVENTORY, requester)
    assert made.choice is not None
    waiting = Candidate("GPU-0", TOTAL, 20 * GIB, user_total=TOTAL)
    with leases.lock_directories() as directories:
        request = as_dict(GpuRequest(os.geteuid(), (waiting,), 1))
        del request["ancestor_leases"]
        leases.create_entry("ticket-1", {"request": request}, next(iter(directories.values())))
    (tmp_path / "log.leases" / (made.choice.lease or "")).unlink()
    again = renew_lease(made.choice, plan, requester)
    assert again is not None
    assert list_codes(again) == [("lease-renewed", "note")]
    assert len(leases.read_leases()) == 1


def test_children_are_not_those_who_took_the_gpu(tmp_path: Path) -> None:
    """They share the GPU of the process that lost its lease, and knew it."""
    plan, requester = make_plan(), make_requester()
    made = allocate_gpus(plan, INVENTORY, requester)
    assert made.choice is not None
    ancestors: tuple[str, ...] = ()
    for _ in range(2):
        ancestors += (leases.read_leases()[-1].id,)
        child = allocate_gpus(plan, INVENTORY, make_requester(ancestor_leases=ancestors))
        assert [allocation.uuid for allocation in get_allocations(child)] == ["GPU-0"]
    (tmp_path / "log.leases" / (made.choice.lease or "")).unlink()
    again = renew_lease(made.choice, plan, requester)
    assert again is not None
    assert list_codes(again) == [("lease-renewed", "note")]


@pytest.mark.parametrize("limit", [8 * GIB, None])
def test_a_process_is_not_in_its_own_way(limit: int | None, tmp_path: Path) -> None:
    """Where NVML does not say whose memory it is, as in a container, what the process itself takes is its own."""
    plan = make_plan(limit=limit)
    made = allocate_gpus(plan, INVENTORY, make_requester())
    assert made.choice is not None
    (tmp_path / "log.leases" / (made.choice.lease or "")).unlink()
    requester = Requester(os.geteuid(), lambda uuids: {uuid: MemoryUse(limit or TOTAL) for uuid in uuids})
    again = renew_lease(made.choice, plan, requester)
    assert again is not None
    assert list_codes(again) == [("lease-renewed", "note")]


def test_a_gpu_that_others_took_meanwhile_is_an_error(tmp_path: Path) -> None:
    """`on_error` decides about a GPU that is shared beyond its memory."""
    plan, requester = make_plan(limit=20 * GIB), make_requester()
    made = allocate_gpus(plan, INVENTORY, requester)
    assert made.choice is not None
    (tmp_path / "log.leases" / (made.choice.lease or "")).unlink()
    fill(22 * GIB)
    again = renew_lease(made.choice, plan, requester)
    assert again is not None
    assert list_codes(again) == [("lease-lost", "error")]
    assert len(leases.read_leases()) == 2


def test_a_choice_that_fits_but_for_the_overhead_says_so() -> None:
    """Two halves of a card: the second program is told what is in its way, and what helps."""
    plan = make_plan("cpu", limit=TOTAL // 2)
    for _ in DEVICES:
        assert get_allocations(allocate_gpus(plan, INVENTORY, make_requester(overhead=600 << 20)))
    made = allocate_gpus(plan, INVENTORY, make_requester(overhead=600 << 20))
    assert list_codes(made) == [("no-free-gpu", "warning")]
    assert "It would fit without process_overhead (600.0 MiB beside the limit of each" in made.findings[0].message
    shared = allocate_gpus(make_plan("share", limit=TOTAL // 2), INVENTORY, make_requester(overhead=600 << 20))
    assert list_codes(shared) == [("shared-gpu", "warning")]
    assert "process_overhead" in shared.findings[0].message


@pytest.mark.parametrize(
    ("facts", "remedy"),
    [
        ({"limit": 22 * GIB}, "lower memory_limit to fit beside it"),
        ({"min_free": MemoryLimit(bytes=22 * GIB)}, "lower min_free, or set memory_limit"),
        ({}, "set memory_limit, or min_free"),
    ],
)
def test_a_remedy_fits_what_was_asked_for(facts: dict[str, Any], remedy: str) -> None:
    """Who has a limit lowers it, and who has none sets one."""
    strangers = {device.uuid: MemoryUse(3 * GIB, {1: 3 * GIB}) for device in DEVICES}
    made = allocate_gpus(make_plan("cpu", **facts), INVENTORY, Requester(os.geteuid(), lambda _: strangers))
    assert f"may never end; {remedy}" in made.findings[0].message


def test_a_terminal_shows_advice_in_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The line that is written over is cut. What may help stands above it, once."""
    desktop = {device.uuid: MemoryUse(GIB, {1: GIB}) for device in DEVICES}
    with (tmp_path / "terminal").open("w+", newline="") as terminal:
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(allocate, "_ON_TERMINAL", 0.1)
        monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((60, 20)))
        allocate_gpus(make_plan(timeout_s=1), INVENTORY, Requester(os.geteuid(), lambda _: desktop))
        terminal.seek(0)
        shown = terminal.read()
    assert shown.count("to share a GPU with it") == shown.count("\n") == 1


def test_waiting_for_what_has_no_lease_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """A desktop on every card: the line says who is in the way, that this may last for ever, and what helps."""
    desktop = {device.uuid: MemoryUse(GIB, {os.getppid(): GIB}) for device in DEVICES}
    requester = Requester(os.geteuid(), lambda _: desktop)
    made = allocate_gpus(make_plan(timeout_s=1), INVENTORY, requester)
    assert list_codes(made) == [("no-free-gpu", "error")]
    for text in (capsys.readouterr().err, made.findings[0].message):
        assert re.search(rf"1\.0 GiB used without a lease \(pid {os.getppid()} \S+\)", text)
        assert "may never end; set memory_limit, or min_free, to share a GPU with it" in text
