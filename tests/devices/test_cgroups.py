"""Limits for cgroups as a process finds them: real cgroups, and simulated GPUs whose driver keeps the limits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cgroups import ROOT, CgroupMachine, needs_cgroups
from tests.simulate.cgroup_lab import open_place
from tfenv.devices.cgroups import find_cgroup, find_reported_total, list_chain
from tfenv.policy.model import Wall
from tfenv.policy.units import MIB
from tfenv.simulate.environment import SimulatedGpu, build_environment

pytestmark = needs_cgroups

GIB = 1 << 30
REPOSITORY = Path(__file__).parents[2]
SLICE, SESSION = "user.slice/user-61001.slice", "user.slice/user-61001.slice/session-1.scope"
#: Sets limits, "cgroup=MiB", then prints what this process finds, what it asks the driver and which files it reads.
PROGRAM = """
import json, sys
import pynvml
from tfenv.devices import cgroups, inventory, nvml
with nvml.open_nvml():
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    for text in sys.argv[1:]:
        cgroup, size = text.split("=")
        cgroups.set_limits(pynvml, gpu, "/sys/fs/cgroup/" + cgroup, cgroups.CgroupLimits(hard=int(size) << 20))
asked, read, ask = [], [], pynvml.nvmlDeviceGetMemoryLimits_v1
pynvml.nvmlDeviceGetMemoryLimits_v1 = lambda *arguments: (asked.append(1), ask(*arguments))[1]
sys.addaudithook(lambda event, of: read.append(str(of[0])) if event == "open" else None)
device = inventory.read_inventory().devices[0]
questions, files = len(asked), [path for path in read if path.endswith(("/cgroup", "/dmem.max"))]
wall = device.wall
found = None if wall is None else [wall.cgroup, wall.limit >> 20, len(wall.chain), wall.cgroup_id in wall.chain]
with nvml.open_nvml():
    support = cgroups.read_support(pynvml)
print(json.dumps({"own": cgroups.find_own_cgroup(), "wall": found, "asked": questions, "total": device.total >> 20,
                  "card": device.card_total >> 20, "backend": support.backend, "problem": support.problem,
                  "read": files}))
"""


class Place:
    """Where a program looks for the limits of its cgroup."""

    def __init__(self, folder: Path, machine: CgroupMachine) -> None:
        self.folder, self.machine = folder, machine
        machine.make(SESSION)

    def look(
        self,
        backend: str,
        *limits: str,
        cgroup: str = SESSION,
        enter: tuple[str, ...] = (),
        gpus: int = 1,
        again: bool = False,
    ) -> Any:
        """Set limits as root, and return what the process finds. With `again` the limits of before are still there."""
        log = self.folder / f"log-{backend.replace('/', '-')}"
        if not again:
            log.unlink(missing_ok=True)
        cards = (SimulatedGpu(24 * GIB, cgroup_limits=backend, reserved=480 * MIB),) * gpus
        base = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(REPOSITORY)}
        env = build_environment(cards, log=log, libraries=self.folder / "lib", base=base)
        done = self.machine.run([*enter, sys.executable, "-c", PROGRAM, *limits], cgroup=cgroup, env=env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Yield a place of this module's own."""
    with open_place() as (folder, machine):
        yield Place(folder, machine)


def test_the_own_limit_is_what_cuda_reports(place: Place) -> None:
    """The total of the card is then that of the limit, and the card's own is still known."""
    for backend in ("dmem", "misc"):
        found = place.look(backend, f"{SLICE}=8192", cgroup=SLICE)
        assert found["wall"] == [f"{ROOT}/{SLICE}", 8192, 3, True]
        assert (found["total"], found["card"]) == (8192, 24 * 1024 - 480)
        above = place.look(backend, f"{SLICE}=8192")
        assert above["wall"] == [f"{ROOT}/{SLICE}", 8192, 4, True], "the cgroup that has it is named"
        assert (above["total"], above["card"]) == (24 * 1024 - 480,) * 2


def test_with_dmem_the_tightest_limit_above_holds(place: Place) -> None:
    """The kernel keeps all of them, whichever is nearest."""
    assert place.look("dmem", f"{SLICE}=4096", f"{SESSION}=8192")["wall"][:2] == [f"{ROOT}/{SLICE}", 4096]
    assert place.look("dmem", f"{SLICE}=8192", f"{SESSION}=4096")["wall"][:2] == [f"{ROOT}/{SESSION}", 4096]
    assert place.look("dmem/1", "user.slice=4096")["wall"][:2] == [f"{ROOT}/user.slice", 4096]


def test_with_misc_the_nearest_limit_holds(place: Place) -> None:
    """A tighter one above counts for nothing."""
    assert place.look("misc", f"{SLICE}=4096", f"{SESSION}=8192")["wall"][:2] == [f"{ROOT}/{SESSION}", 8192]


@pytest.mark.parametrize(("backend", "asked"), [("none", 1), ("dmem", 1), ("misc", 3)])
def test_without_a_limit_the_driver_is_hardly_asked(place: Place, backend: str, asked: int) -> None:
    """Once where there are no such limits or the kernel counts, and else once more for each of two GPUs."""
    found = place.look(backend, gpus=2)
    assert (found["wall"], found["total"], found["asked"]) == (None, 24 * 1024 - 480, asked)


@pytest.mark.parametrize(("backend", "deepest"), [("misc", 0), ("dmem/1", 1), ("dmem", 3)])
def test_nothing_is_read_below_the_first_cgroup_that_the_kernel_does_not_count_for(
    place: Place, backend: str, deepest: int
) -> None:
    """A process in no limited cgroup reads its own cgroup, and of those above as few as can be."""
    chain = ["", "/user.slice", f"/{SLICE}", f"/{SESSION}"]
    files = [f"{ROOT}{path}/dmem.max" for path in chain[: deepest + 2]]
    assert place.look(backend, cgroup=SESSION)["read"] == ["/proc/self/cgroup", *files]


def test_a_container_finds_the_limit_of_its_own_cgroup(place: Place) -> None:
    """In a cgroup namespace the process's cgroup is the root of all that it sees."""
    shell = 'umount /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; exec "$@"'
    enter = ("unshare", "--cgroup", "--mount", "sh", "-c", shell, "sh")
    for backend in ("dmem", "misc"):
        assert place.look(backend, f"{SLICE}=8192", cgroup=SLICE)["own"] == f"{ROOT}/{SLICE}"
        inside = place.look(backend, cgroup=SLICE, enter=enter, again=True)
        assert (inside["own"], inside["wall"], inside["total"]) == (ROOT, [ROOT, 8192, 1, True], 8192)


def test_the_reason_is_told_where_nobody_keeps_limits(place: Place) -> None:
    """An older driver, or none of the backends."""
    assert "they came with release 615" in place.look("none")["problem"]
    assert [place.look(backend)["backend"] for backend in ("none", "dmem", "misc")] == ["none", "dmem", "misc"]


# ---- the parts


def test_a_chain_ends_at_the_root() -> None:
    """It has the cgroup itself and all above."""
    assert list(list_chain(f"{ROOT}/a/b")) == [f"{ROOT}/a/b", f"{ROOT}/a", ROOT]
    assert list(list_chain("/elsewhere")) == []


def test_a_process_that_is_gone_is_in_no_cgroup() -> None:
    """Nor is one whose cgroup this machine shows elsewhere than at /sys/fs/cgroup."""
    assert find_cgroup(2**22) is None


def test_a_limit_above_what_cuda_can_give_is_not_more_than_that() -> None:
    """NVML's total has what the driver reserves. A limit between both is reported, and CUDA gives less."""
    wall = Wall(24 * GIB - MIB, 0, ROOT, card_total=24 * GIB - 480 * MIB)
    assert find_reported_total(24 * GIB - 481 * MIB, 480 * MIB, wall) == 24 * GIB - 480 * MIB
    assert find_reported_total(24 * GIB - 480 * MIB, 480 * MIB, wall) == 24 * GIB - 480 * MIB
    assert find_reported_total(None, None, wall) is None
