"""Real Dask and real TensorFlow on simulated GPUs: what each worker asks the driver for."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SimulatedGpus
from tests.pages import ROOT, blocks, commands
from tfenv.simulate.driver_requests import read_requests

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.tensorflow,
    pytest.mark.skipif(find_spec("distributed") is None, reason="Dask is not installed here"),
]

COMMON = """
import json, os, sys
from distributed import Client, LocalCluster, Nanny, Scheduler, SpecCluster

def use():
    import tensorflow as tf
    devices = tf.config.list_logical_devices("GPU")
    for device in devices:
        with tf.device(device.name):
            tf.zeros([256, 1024])
    return os.getpid()

def tell(cluster):
    with cluster, Client(cluster) as client:
        print(json.dumps(sorted(client.run(use).values())))
"""
#: One Nanny for each GPU with a list of its own that begins with that GPU, as LocalCUDACluster of dask-cuda has it.
NANNIES = """
def start(gpus):
    env = {"CUDA_VISIBLE_DEVICES": gpus}
    options = {"nthreads": 1, "env": env, "host": "127.0.0.1", "dashboard_address": None}
    return {"cls": Nanny, "options": options}

if __name__ == "__main__":
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": None}}
    tell(SpecCluster(workers={gpus: start(gpus) for gpus in sys.argv[1:]}, scheduler=scheduler))
"""
LOCAL = """
if __name__ == "__main__":
    tell(LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"))
"""


def run(program: str, policy: str, folder: Path, env: dict[str, str], *arguments: str) -> list[list[int]]:
    """Run a program with a policy beside it. Return the GPUs of which each worker took memory."""
    (folder / "tfgpu.toml").write_text(policy)
    (folder / "program.py").write_text(f"{COMMON}{program}")
    done = subprocess.run(
        [sys.executable, "program.py", *arguments],
        cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pids: Any = json.loads(done.stdout.splitlines()[-1])
    assert len(set(pids)) == 2
    requests = [read_requests(folder / "requests.jsonl", pid=pid) for pid in pids]
    return sorted(sorted({one.gpu for one in asked if one.op == "alloc"}) for asked in requests)


POLICIES = {
    "[0]": "[gpu]\nvisible_devices = [0]\nmemory_growth = true\n",
    "require_grant": "[gpu]\nmemory_growth = true\n[ceiling]\nrequire_grant = true\n",
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_each_worker_uses_the_gpu_that_its_nanny_gave_it(
    policy: str, tmp_path: Path, simulated_gpus: SimulatedGpus
) -> None:
    """A Nanny sets the variable in a worker that runs. It is the worker's grant, and positions count in it."""
    env = simulated_gpus(log=tmp_path / "requests.jsonl", HOME=str(tmp_path))
    assert run(NANNIES, policy, tmp_path, env, "1", "2") == [[1], [2]]


def test_the_first_of_a_list_is_the_workers_own(tmp_path: Path, simulated_gpus: SimulatedGpus) -> None:
    """dask-cuda gives every worker all GPUs in another order. Position 0 is another one for each."""
    env = simulated_gpus(log=tmp_path / "requests.jsonl", HOME=str(tmp_path))
    assert run(NANNIES, POLICIES["[0]"], tmp_path, env, "2,3,1", "3,1,2") == [[2], [3]]


def test_workers_of_a_local_cluster_have_what_the_program_was_given(
    tmp_path: Path, simulated_gpus: SimulatedGpus
) -> None:
    """LocalCluster assigns no GPU: all workers have the same list, and position 0 is one GPU for all of them."""
    env = simulated_gpus(log=tmp_path / "requests.jsonl", HOME=str(tmp_path), CUDA_VISIBLE_DEVICES="2,3")
    assert run(LOCAL, POLICIES["[0]"], tmp_path, env) == [[2], [2]]


def test_the_recipe_is_true(tmp_path: Path, simulated_gpus: SimulatedGpus) -> None:
    """The page's first policy and its program print what the page shows, in any order."""
    page = ROOT / "docs" / "recipes" / "dask.md"
    (tmp_path / "tfgpu.toml").write_text(blocks("toml", pages=[page])[0].text)
    (program,) = blocks("python", pages=[page])
    (tmp_path / "train.py").write_text(program.text)
    (command,) = [command for block in blocks("console", pages=[page]) for command in commands(block.text)]
    assert command.words == ("python", "train.py")
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path, env=simulated_gpus(HOME=str(tmp_path)), capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith(("tfgpu:", "["))]
    assert sorted(printed) == sorted(command.output)
