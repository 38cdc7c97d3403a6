"""Many processes that want GPUs at once: each goes the whole way of a program under the hook, without TensorFlow.

Started by `test_crowd.py`. Reads {"log": "...", "members": [{"config": "...", "hold": seconds, "uid": null}, ...]}
from stdin, forks one process a member and starts them together. Each writes into the log, with CLOCK_MONOTONIC,
that it asked, what it was given, and that it is about to give it back.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from typing import Any

from tfenv.policy.model import Grant

#: Seconds after which a member is killed.
PATIENCE = 100


def write(log: int, event: str, **more: Any) -> None:
    """One line, in one write: none is torn."""
    line = {"at": time.monotonic(), "event": event, "pid": os.getpid(), "uid": os.geteuid(), **more}
    os.write(log, json.dumps(line).encode() + b"\n")


def enforce_policy(config: str) -> Any:
    """What the hook does at `import tensorflow` and at the first listing of devices."""
    from tfenv.runtime import enforce

    enforce.before_import("tensorflow", {"cwd": os.getcwd(), "TFGPU_CONFIG": config})
    process = enforce.get_current()
    assert process is not None
    process.frameworks["tensorflow"].before_listing()
    return process


def member(log: int, gate: int, orders: dict[str, Any]) -> None:
    signal.alarm(PATIENCE)
    if orders.get("uid") is not None:
        os.setgroups([])
        os.setgid(orders["uid"])
        os.setuid(orders["uid"])
    select.select([gate], [], [])  # readable as soon as its other end is closed
    write(log, "asked", name=orders.get("name"))
    process = enforce_policy(orders["config"])
    allocations = [[allocation.uuid, allocation.limit, allocation.shared] for allocation in process.choice.allocations]
    findings = [finding.code for finding in (*process.findings, *process.reporter.pending)]
    visible = os.environ["CUDA_VISIBLE_DEVICES"]
    write(log, "enter", allocations=allocations, visible=visible, findings=findings, name=orders.get("name"))
    time.sleep(orders["hold"])
    write(log, "leave", allocations=allocations)


def preload(config: str) -> None:
    """Load once what is loaded late. A member of another uid may not even be able to read these files."""
    import structlog  # noqa: F401

    from tfenv import pipeline
    from tfenv.audit import record, sinks, stderr_line  # noqa: F401
    from tfenv.devices.inventory import read_inventory
    from tfenv.devices.memory import read_memory  # noqa: F401
    from tfenv.frameworks.registry import get_framework
    from tfenv.launchers.parent import read_boot_id
    from tfenv.runtime import enforce  # noqa: F401
    from tfenv.sharing import allocate  # noqa: F401

    get_framework("tensorflow")
    inventory = read_inventory()
    assert inventory.devices
    loaded = pipeline.load(pipeline.make_start({"cwd": os.getcwd(), "TFGPU_CONFIG": config}))
    assert not loaded.findings, loaded.findings
    pipeline.make_plan(loaded, Grant(), inventory)
    read_boot_id()


def main() -> None:
    orders = json.load(sys.stdin)
    preload(orders["members"][0]["config"])
    log = os.open(orders["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    gate, opener = os.pipe()
    pids = []
    for number, each in enumerate(orders["members"]):
        pid = os.fork()
        if pid == 0:
            os.close(opener)
            try:
                member(log, gate, {"name": number, **each})
            except BaseException as error:  # noqa: BLE001 - the test judges it
                write(log, "raised", error=f"{type(error).__name__}: {error}")
            os._exit(0)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    os.close(opener)
    print(json.dumps([os.waitpid(pid, 0)[1] for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
