"""A program under test: imports a framework once, then forks a child per case and says what became of each.

Started by `harness`. Reads {"before": {...}, "parallel": n, "folder": "...", "ways_in": "...", "cases": [[step, ...],
...]} from stdin; each case's results go to `<folder>/<number>.*`. Importing first and forking afterwards is itself
one of the promises under test.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

#: Seconds after which a case is killed. Thirty may run at once, on two cores that others use, too.
PATIENCE = 240


def run_steps(ways_in: ModuleType, steps: list[str]) -> dict[str, Any]:
    """Call the functions of `ways_in` that the steps name, `name` or `name:argument`, until one raises."""
    results: list[Any] = []
    for step in steps:
        name, _, argument = step.partition(":")
        function = getattr(ways_in, name)
        try:
            results.append(function(argument) if argument else function())
        except Exception as error:  # noqa: BLE001 - the test judges it
            traceback.print_exc()
            kinds = [kind.__name__ for kind in type(error).__mro__]
            return {"results": results, "error": {"kinds": kinds, "text": str(error), "step": step}}
    return {"results": results, "error": None}


def redirect(folder: Path, number: int) -> None:
    """stdout, stderr and the driver's log of this process and its children go to files of its own."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        target = os.open(folder / f"{number}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        os.dup2(target, descriptor)
    os.environ["TFGPU_SIMULATE_LOG"] = str(folder / f"{number}.driver")


def child(folder: Path, number: int, ways_in: ModuleType, steps: list[str]) -> None:
    os.setpgid(0, 0)
    signal.alarm(PATIENCE)
    redirect(folder, number)
    report = run_steps(ways_in, steps) | {"pid": os.getpid()}
    (folder / f"{number}.report").write_text(json.dumps(report, default=str), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    # Neither TensorFlow's teardown nor threads that hang in a server decide over a case.
    os._exit(0)


def reap(running: dict[int, int], folder: Path) -> None:
    """Wait for one child, note its status, and end what it left behind."""
    pid, status = os.wait()
    number = running.pop(pid)
    (folder / f"{number}.status").write_text(str(os.waitstatus_to_exitcode(status)), encoding="utf-8")
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def main() -> None:
    orders = json.load(sys.stdin)
    folder = Path(orders["folder"])
    os.environ.update(orders["before"])
    # Here, once for all children: tf.compat.v1 is lazy and takes 0.2 s. The folder of this script is on sys.path.
    ways_in = importlib.import_module(orders["ways_in"])  # imports the framework

    running: dict[int, int] = {}
    for number, steps in enumerate(orders["cases"]):
        if len(running) >= orders["parallel"]:
            reap(running, folder)
        pid = os.fork()
        if pid == 0:
            try:
                child(folder, number, ways_in, steps)
            finally:
                os._exit(70)
        running[pid] = number
    while running:
        reap(running, folder)


if __name__ == "__main__":
    main()
