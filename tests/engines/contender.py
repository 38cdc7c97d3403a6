"""A program in a container that takes GPUs as one does that imports TensorFlow, without TensorFlow.

It is the train.py of the tests of Docker. In each round it forks a process that waits until everybody is to begin,
goes the whole way of a program under the hook, writes down what it was given, and holds that until the round ends.

    {"folder": "...", "rounds": 10}     what it reads from $CONTENDER
    FOLDER/ready-NAME                   it waits for the rounds to begin
    FOLDER/begin-ROUND, end-ROUND       written by the test
    FOLDER/ROUND-NAME                   what it was given in that round
"""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from pathlib import Path
from typing import Any

ORDERS = json.loads(os.environ["CONTENDER"])
FOLDER = Path(ORDERS["folder"])
NAME = socket.gethostname()


def wait_for(name: str) -> None:
    while not (FOLDER / name).exists():
        time.sleep(0.001)


def write(name: str, content: object) -> None:
    """Write a file that others see only when it is complete."""
    draft = FOLDER / f".{name}"
    draft.write_text(json.dumps(content))
    draft.rename(FOLDER / name)


def preload() -> None:
    """Load what is loaded late, so that all begin at the same moment."""
    import structlog  # noqa: F401

    from tfenv.devices.memory import read_memory  # noqa: F401
    from tfenv.frameworks.registry import get_framework
    from tfenv.runtime import enforce  # noqa: F401
    from tfenv.sharing import allocate  # noqa: F401

    get_framework("tensorflow")


def take_gpus() -> dict[str, Any]:
    """Do what the hook does at `import tensorflow` and at the first listing of devices."""
    from tfenv.runtime import enforce

    asked = time.monotonic()
    enforce.before_import("tensorflow", {"cwd": os.getcwd()})
    process = enforce.get_current()
    assert process is not None, "there is no policy"
    process.frameworks["tensorflow"].before_listing()
    allocations = () if process.choice is None else process.choice.allocations
    return {
        "asked": asked,
        "entered": time.monotonic(),
        "uid": os.geteuid(),
        "gpus": {allocation.uuid: allocation.limit for allocation in allocations},
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "findings": [str(finding) for finding in (*process.findings, *process.reporter.pending)],
    }


def contend(number: int) -> None:
    wait_for(f"begin-{number}")
    try:
        write(f"{number}-{NAME}", take_gpus())
    except BaseException:  # noqa: BLE001 - the test shows it
        write(f"{number}-{NAME}", {"error": traceback.format_exc()})
    wait_for(f"end-{number}")


def main() -> None:
    preload()
    write(f"ready-{NAME}", os.getpid())
    for number in range(ORDERS["rounds"]):
        child = os.fork()
        if child == 0:
            contend(number)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
