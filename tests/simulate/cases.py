"""Runs cases with one framework on simulated GPUs.

The framework is imported once. Each case runs in a process forked from there, with its own log. That this works at all
shows that the import opens no CUDA: CUDA does not survive fork().
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfenv.simulate.driver_requests import DriverRequest, GpuRequestTotals, read_requests, summarise_requests

if TYPE_CHECKING:
    from tests.simulate.conftest import RunPython

PROGRAM = """
import json, os, sys, traceback
module, folder, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
os.environ["TFGPU_SIMULATE_LOG"] = folder + "/import"
imported = {}
exec("import " + module, imported)
for number, (name, body) in enumerate(cases.items()):
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        continue
    os.environ["TFGPU_SIMULATE_LOG"] = f"{folder}/{number}"
    scope = {**imported, "os": os, "result": None}
    try:
        exec(body, scope)
    except BaseException:
        scope["result"] = traceback.format_exc()
    print(json.dumps([name, scope["result"]]), flush=True)
    os._exit(0)
"""


class Cases:
    """What each case answered, and what it asked the driver for.

    Attributes:
        results: What each case left in `result`. A traceback where it failed. No entry where it crashed.
        requests: What each case asked the driver for.
        at_import: What the import asked the driver for.
    """

    def __init__(self, names: tuple[str, ...], folder: Path, output: str) -> None:
        lines = [line for line in output.splitlines() if line.startswith("[")]
        self.results: dict[str, Any] = dict(json.loads(line) for line in lines)
        self.requests = {name: read_requests(folder / str(number)) for number, name in enumerate(names)}
        self.at_import = read_requests(folder / "import")

    def summarise(self, name: str) -> dict[int, GpuRequestTotals]:
        """Sum up the requests of a case by GPU."""
        return summarise_requests(self.requests[name])

    def list_allocations(self, name: str) -> list[DriverRequest]:
        """Return the allocations of a case."""
        return [request for request in self.requests[name] if request.op == "alloc"]


def run_cases(
    run_python: RunPython, module: str, cases: Mapping[str, str], env: Mapping[str, str], folder: Path
) -> Cases:
    """Run each case in a process of its own.

    Args:
        run_python: The fixture.
        module: What the cases import, as behind `import`.
        cases: Their code by their names. It may set `result`.
        env: The environment with the simulated GPUs.
        folder: Where the logs go.
    """
    return Cases(tuple(cases), folder, run_python(PROGRAM, env, module, str(folder), json.dumps(cases)))
