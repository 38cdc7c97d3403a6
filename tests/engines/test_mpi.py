"""Real Open MPI and real TensorFlow on simulated GPUs: what each rank asks the driver for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SimulatedGpus
from tests.pages import ROOT, blocks, commands
from tfenv.simulate.driver_requests import read_requests

pytestmark = [pytest.mark.exhaustive, pytest.mark.tensorflow]
NEEDS_MPI = pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed here")
PAGE = ROOT / "docs" / "recipes" / "mpi.md"

#: For a machine with fewer cores than ranks, and for root.
MPI_VARIABLES = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_btl": "self,vader",
    "OMPI_MCA_oob_tcp_if_include": "lo",
}

#: Each rank writes what it is into a file of the working directory.
PROGRAM = """
import json, os
import tensorflow as tf

devices = tf.config.list_logical_devices("GPU")
for device in devices:
    with tf.device(device.name):
        tf.zeros([256, 1024])
rank = os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK") or os.environ.get("LOCAL_RANK")
with open(f"rank-{rank}.json", "w") as file:
    json.dump(os.getpid(), file)
"""


def make_environment(folder: Path, simulated_gpus: SimulatedGpus, **variables: str) -> dict[str, str]:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    names = {name: value for name, value in variables.items() if value}
    return simulated_gpus(log=folder / "requests.jsonl") | {"PATH": path, "HOME": str(folder)} | MPI_VARIABLES | names


def read_gpus(folder: Path) -> dict[int, list[int]]:
    """Return for each local rank the GPUs of which it took memory."""
    gpus = {}
    for file in folder.glob("rank-*.json"):
        requests = read_requests(folder / "requests.jsonl", pid=json.loads(file.read_text()))
        gpus[int(file.stem[len("rank-") :])] = sorted({one.gpu for one in requests if one.op == "alloc"})
    return gpus


def run(command: tuple[str, ...], policy: str, folder: Path, env: dict[str, str], program: str = PROGRAM) -> str:
    """Run a command with train.py and a policy beside it. Return its stderr."""
    (folder / "tfgpu.toml").write_text(policy)
    (folder / "train.py").write_text(program)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stderr


BY_RANK = '[gpu]\nvisible_devices = { rank = "auto" }\nmemory_growth = true\n'
TWO_RANKS = ("mpirun", "-n", "2", "python", "train.py")


@NEEDS_MPI
@pytest.mark.parametrize(
    ("policy", "given", "gpus"),
    [
        (BY_RANK, "", {0: [0], 1: [1]}),
        (BY_RANK, "3,1,2", {0: [3], 1: [1]}),
        ("[gpu]\nvisible_devices = [0]\nmemory_growth = true\n", "", {0: [0], 1: [0]}),
        ("[gpu]\nmemory_growth = true\n", "2,3", {0: [2, 3], 1: [2, 3]}),
    ],
    ids=["rank", "rank within what was given", "one place for all", "no place"],
)
def test_a_rank_has_the_gpu_at_its_place(
    policy: str, given: str, gpus: dict[int, list[int]], tmp_path: Path, simulated_gpus: SimulatedGpus
) -> None:
    """mpirun gives every rank the same list. `rank` takes one of it for each, and nothing else does."""
    env = make_environment(tmp_path, simulated_gpus, CUDA_VISIBLE_DEVICES=given)
    run(TWO_RANKS, policy, tmp_path, env)
    assert read_gpus(tmp_path) == gpus


#: Starts its ranks as torchrun does: it sets LOCAL_RANK and leaves CUDA_VISIBLE_DEVICES alone.
LAUNCHER = """
import os, subprocess, sys
import tensorflow as tf  # a launcher may use it itself, and narrow its own GPUs

tf.config.list_logical_devices("GPU")
ranks = [subprocess.Popen([sys.executable, "rank.py"], env={**os.environ, "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
sys.exit(any([rank.wait() for rank in ranks]))
"""


def test_a_rank_of_a_launcher_that_uses_tensorflow_has_its_own_gpu(
    tmp_path: Path, simulated_gpus: SimulatedGpus
) -> None:
    """The launcher has no rank and sees all GPUs. Its ranks' places are in what the launcher was given."""
    (tmp_path / "rank.py").write_text(PROGRAM)
    env = make_environment(tmp_path, simulated_gpus, CUDA_VISIBLE_DEVICES="2,3")
    run((sys.executable, "train.py"), BY_RANK, tmp_path, env, LAUNCHER)
    assert read_gpus(tmp_path) == {0: [2], 1: [3]}


@NEEDS_MPI
def test_the_recipe_is_true(tmp_path: Path, simulated_gpus: SimulatedGpus) -> None:
    """The policy and the program of the page, under each command that it shows, print what it shows."""
    (policy,) = blocks("toml", pages=[PAGE])
    (program,) = blocks("python", pages=[PAGE])
    shown = [command for block in blocks("console", pages=[PAGE]) for command in commands(block.text)]
    assert shown
    for command in shown:
        env = make_environment(tmp_path, simulated_gpus, **command.variables)
        printed = run(command.words, policy.text, tmp_path, env, program.text)
        assert sorted(line for line in printed.splitlines() if line.startswith("tfgpu:")) == sorted(command.output)
