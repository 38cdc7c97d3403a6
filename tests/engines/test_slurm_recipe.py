"""docs/recipes/slurm.md, followed to the letter: its files on a machine of several people, its commands by one of them.

The machine is a mount namespace with an /etc of its own. A real Slurm runs in it. GPUs are simulated.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import SimulatedGpus
from tests.engines.slurm_cluster import SlurmCluster, explain_missing_slurm
from tests.pages import ROOT, Block, blocks
from tests.shared_machine import ALICE, SharedMachine, shared_machine
from tests.shared_machine import ROOT as ROOT_USER
from tfenv.deploy import launch
from tfenv.simulate.driver_requests import read_requests

__all__ = ["shared_machine"]

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.tensorflow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("tensorflow") is None, reason="TensorFlow is not installed"),
]

PAGE = ROOT / "docs" / "recipes" / "slurm.md"
HOME = "/home/alice"
#: It holds 1 GiB. Without a GPU it ends.
TRAIN = """
import tensorflow as tf
if tf.config.list_logical_devices("GPU"):
    with tf.device("GPU:0"):
        held = tf.zeros([1 << 28])
"""


class ClusterInside(SlurmCluster):
    """A cluster whose daemons and commands run in the namespace of a machine."""

    def __init__(self, folder: Path, machine: SharedMachine, more: str) -> None:
        super().__init__(folder, more=more)
        self.namespace = ("nsenter", f"--mount=/proc/{machine.process.pid}/ns/mnt")

    def run(
        self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands."""
        return super().run(*self.namespace, *command, cwd=cwd, env=env, timeout=timeout)

    def reconfigure(self) -> None:
        """Have slurm.conf read again, and wait until it is. slurmd does so later, and tells nobody when."""
        log = self.folder / "slurmd.log"
        before = len(log.read_bytes())
        done = self.run("scontrol", "reconfigure")
        assert done.returncode == 0, done.stderr
        deadline = time.monotonic() + 60
        while b"Node configuration differs" not in log.read_bytes()[before:]:
            assert time.monotonic() < deadline, "slurmd does not read slurm.conf"
            time.sleep(0.1)
        size = 0
        while size != (size := len(log.read_bytes())):  # it loads its plugins
            time.sleep(0.5)


@pytest.fixture
def cluster(shared_machine: SharedMachine) -> Iterator[ClusterInside]:
    """A cluster that all people of the machine can use. Its first job is number 14."""
    missing = explain_missing_slurm()
    if missing is not None:
        pytest.skip(missing)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    cluster = ClusterInside(folder / "cluster", shared_machine, "FirstJobId=14\nPartitionName=shared Nodes=ALL")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


class Reader:
    """Somebody who does what the page says, from the top to the end."""

    def __init__(self, machine: SharedMachine, cluster: ClusterInside, env: Mapping[str, str]) -> None:
        self.machine = machine
        self.cluster = cluster
        self.env = {**env, **cluster.environ, "HOME": HOME, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}

    def follow(self, block: Block) -> Iterator[tuple[str, list[str], list[str]]]:
        """Write the block's file, or run its commands and yield each with what it prints and what it should."""
        if block.language == "console":
            for typed, shown in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE):
                done = self.machine.run(ALICE, "sh", "-c", f"{typed} 2>&1", cwd=HOME, env=self.env)
                assert done.returncode == 0, f"{block}: {typed}: {done.stdout}"
                yield typed, normalize(done.stdout), normalize(shown or done.stdout)
        elif block.language == "text":
            self._configure(block.text)
        else:
            self._write(block)

    def _write(self, block: Block) -> None:
        (name,) = re.findall(r"^# (\S+(?:/|\.toml)\S*)$", block.text, re.MULTILINE)
        text = block.text.replace("/opt/tfenv", sys.prefix)
        owner = ROOT_USER if name.startswith("/") else ALICE
        self.machine.write(os.path.join(HOME, name), text, owner, 0o755 if block.language == "bash" else 0o644)

    def _configure(self, lines: str) -> None:
        with (self.cluster.folder / "slurm.conf").open("a") as file:
            file.write(lines)
        self.cluster.reconfigure()


#: TensorFlow's own lines, and what srun says while a node still cleans up after the job before.
NOISE = re.compile(r"[IWE]\d{4} |WARNING: All log messages|srun: job \d+ (queued|has been allocated)")


def normalize(output: str) -> list[str]:
    """The lines without what is not the same each time: the order of tasks, and how long a job took."""
    lines = [line for line in output.splitlines() if not NOISE.match(line)]
    return sorted(re.sub(r"\d+\.\ds$", "7.2s", line) for line in lines)


def test_the_recipe_does_what_it_says(
    shared_machine: SharedMachine, cluster: ClusterInside, simulated_gpus: SimulatedGpus
) -> None:
    """Each file is written where the page says. Each command prints what the page shows."""
    reader = Reader(shared_machine, cluster, launch.build_environment(simulated_gpus()))
    shared_machine.write(f"{HOME}/train.py", TRAIN, owner=ALICE)
    page = blocks(pages=[PAGE])
    assert {block.language for block in page} == {"bash", "console", "text", "toml"}
    followed = [(str(block), *line) for block in page for line in reader.follow(block)]
    wrong = [line for line in followed if line[2] != line[3]]
    assert not wrong, "\n".join(map(str, wrong))


#: It takes all that it may, at once.
TAKE = """
import tensorflow as tf
assert len(tf.config.list_logical_devices("GPU")) == 1
tf.zeros([8]) + 0
"""
SHARDS = "[ceiling]\nmemory_limit = 'granted'\n\n[machine]\nshards_per_gpu = 4\n"


def test_a_step_has_the_memory_of_its_own_shards(
    shared_machine: SharedMachine, cluster: ClusterInside, simulated_gpus: SimulatedGpus
) -> None:
    """A batch script of three shards, its step of one, and two tasks of two: the driver is asked for no more."""
    shared_machine.clear()
    shared_machine.policy({"tfgpu.toml": SHARDS})
    log = Path(HOME, "driver.jsonl")
    reader = Reader(shared_machine, cluster, launch.build_environment(simulated_gpus(log=log)))
    shared_machine.write(f"{HOME}/take.py", TAKE, owner=ALICE)
    most = []
    for options, script in (
        ("--gres=shard:3", "python take.py; srun --gres=shard:1 python take.py"),
        ("--gres=shard:2 -n2", "srun python take.py"),
    ):
        shared_machine.path(str(log)).unlink(missing_ok=True)
        line = f"sbatch --wait {options} --wrap '{script}' || cat *.out"
        done = shared_machine.run(ALICE, "sh", "-c", line, cwd=HOME, env=reader.env)
        requests = [request for request in read_requests(shared_machine.path(str(log))) if request.op == "alloc"]
        assert {request.gpu for request in requests} == {0}, done.stdout
        by_process = {request.pid: 0 for request in requests}
        for request in requests:
            by_process[request.pid] = max(by_process[request.pid], request.bytes)
        most.append([size / (6 << 30) for size in by_process.values()])
    assert most == [[3, 1], [1, 1]]
