"""A machine with four GPUs for tests in process: layers below one temporary folder, and what may never be exceeded."""

from __future__ import annotations

import os
from pathlib import Path

from tfenv import pipeline
from tfenv.config.document import Trust
from tfenv.policy.model import Device, Grant, Inventory, MemoryLimit, Plan, Start, Subject

GIB = 1 << 30
ME = os.geteuid()
CARDS = tuple(Device(i, f"GPU-{i:08x}-0000-4000-8000-000000000000", "NVIDIA A100", 40 * GIB) for i in range(4))
INVENTORY = Inventory(CARDS)
MACHINE = """
[ceiling]
allowed_devices = [1, 2, 3]
memory_limit = "20GiB"
"""


class Machine:
    """A machine layer, a user's and a project's folder below one temporary folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.etc = root / "etc"
        self.project = root / "home" / "project"
        self.project.mkdir(parents=True)
        self.etc.mkdir()
        for folder in (root, self.etc, self.project.parent, self.project):
            folder.chmod(0o755)
        self.start = Start(
            cwd=str(self.project), uid=ME, home=str(root / "home"), config_home=str(root / "home" / ".config")
        )
        self.subject = Subject("alice", ME, ("students",))

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o644)
        return path

    def load(self, start: Start | None = None) -> pipeline.LoadedPolicy:
        trust = Trust(ME, administrator=ME, checked_from=str(self.root))
        return pipeline.load(start or self.start, self.subject, str(self.etc), trust)

    def plan(self, start: Start | None = None, grant: Grant | None = None) -> Plan:
        return pipeline.make_plan(self.load(start), grant or Grant(), INVENTORY)


HOSTILE = """
on_error = "warn"
[gpu]
visible_devices = "all"
memory_growth = false
memory_limit = "none"
allocator = "cuda_malloc_async"
[ceiling]
allowed_devices = [0, 1, 2, 3]
max_devices = 99
memory_limit = "100%"
require_memory_growth = false
[machine]
allow_disable = true
trusted_owners = ["nobody"]
[audit]
file = "/etc/passwd"
[project."/".gpu]
memory_limit = "none"
"""
STRICT = (
    'on_error = "fail"\n'
    + MACHINE
    + "max_devices = 2\nrequire_memory_growth = true\n[machine]\nallow_disable = false\n"
)


def assert_within(machine: Machine, loaded: pipeline.LoadedPolicy) -> None:
    """Devices, memory, growth, on_error, switches and logs are within what `STRICT` allows."""
    plan = pipeline.make_plan(loaded, Grant(), INVENTORY)
    tokens = set((plan.visible or "0").split(","))
    assert tokens <= {"1", "2", "3", "-1"}
    assert len(tokens) <= 2
    assert plan.growth is True
    assert plan.allocator == "bfc"
    assert _count_bytes(plan.limit) <= 20 * GIB
    for device in plan.devices or ():
        assert _count_bytes(device.limit) <= 20 * GIB
        assert sum(_count_bytes(part) for part in device.logical_devices) <= 20 * GIB
    assert loaded.policy.on_error == "fail"
    assert not loaded.policy.allow_disable
    for path in loaded.policy.audit.files:
        assert_new_log(path, machine.project)


def assert_new_log(path: str, project: Path) -> None:
    """Check that a project\'s log is in the project, followed through links, and looks like none of its files."""
    for real in (Path(path), Path(path).resolve()):
        parts = real.relative_to(project).parts
        assert not any(part.startswith(".") for part in parts)
        assert real.suffix == ".jsonl"


def _count_bytes(limit: MemoryLimit | None) -> int:
    assert limit is not None
    size = limit.on(40 * GIB)
    assert size is not None
    return size
