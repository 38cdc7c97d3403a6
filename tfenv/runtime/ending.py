"""Writes the record of a process's end, if it created devices.

A process that ends with os._exit, by a signal that it does not handle, or by exec, has none.
"""

from __future__ import annotations

import atexit
import os
import sys
import time

from tfenv.runtime.own_imports import Inside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tfenv.frameworks.base import CreatedDevices, Framework, Peaks
    from tfenv.policy.model import DeviceOutcome, Outcome


class EndReporter:
    """Remembers which devices a process created, and reports them once, at its end. A forked child has its own."""

    def __init__(self, report: Callable[[Framework, CreatedDevices], None]) -> None:
        """
        Args:
            report: Writes the record of a framework, with what it created. It does not raise.
        """
        self._report = report
        self._pid = 0
        self._created: dict[str, tuple[Framework, dict[str, tuple[DeviceOutcome, ...]]]] = {}

    def note(self, framework: Framework, outcome: Outcome) -> None:
        """Remember the devices of an entry point."""
        if not outcome.devices:
            return
        if self._pid != os.getpid():
            self._pid, self._created = os.getpid(), {}
            self._register()
        _, created = self._created.setdefault(framework.name, (framework, {}))
        created.pop(outcome.entry_point, None)
        created[outcome.entry_point] = outcome.devices

    def _register(self) -> None:
        atexit.register(self.report)
        # What multiprocessing forked ends with os._exit. It calls only its own finalizers.
        process, util = (sys.modules.get(f"multiprocessing.{name}") for name in ("process", "util"))
        if process is not None and util is not None and process.parent_process() is not None:
            util.Finalize(None, self.report, exitpriority=0)

    def report(self) -> None:
        """Report what was created in this process, unless that was done."""
        if self._pid != os.getpid():  # a forked child inherits what is to be called at the exit
            return
        frameworks, self._created = self._created, {}
        with Inside():
            for framework, created in frameworks.values():
                self._report(framework, created)


def merge_devices(created: CreatedDevices, peaks: Peaks) -> tuple[tuple[DeviceOutcome, int | None], ...]:
    """Return each card that was created once, with its peak.

    Args:
        created: The devices of each entry point, the latest last. They count as they are in the latest one.
        peaks: The devices whose peak is known. They count as they are here.
    """
    last = [(device, None) for devices in created.values() for device in devices]
    cards: dict[str, tuple[DeviceOutcome, int | None]] = {}
    for device, peak in (*last, *peaks):
        cards[device.identity or str(device.index)] = (device, peak)
    return tuple(cards.values())


def measure_process_ms(start_ticks: int | None) -> float | None:
    """Return how long this process runs, in milliseconds. None: it is not known when it started.

    Args:
        start_ticks: When it started, as in its records.
    """
    if start_ticks is None:
        return None
    return (time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")) * 1000
