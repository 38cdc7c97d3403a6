"""`memory_limit = "granted"` under real Ray and real TensorFlow: actors share a simulated GPU as Ray says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SimulatedGpus
from tfenv.simulate.driver_requests import read_requests

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.tensorflow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed here"),
    pytest.mark.timeout(900),
]

GIB = 1 << 30
#: Without the first, Ray listens on the network. Without the second it writes a token into the home.
RAY_VARIABLES = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
}
POLICY = """
[ceiling]
memory_limit = "granted"

[audit]
file = "audit.jsonl"
"""
CHILD = """
import os
import tensorflow as tf
tf.zeros([1])
print(os.getpid(), len(tf.config.list_physical_devices("GPU")))
"""
DRIVER = """
import json, os, subprocess, sys
import ray

def open_gpu():
    import tensorflow as tf
    tf.zeros([1])
    return os.getpid(), len(tf.config.list_physical_devices("GPU"))

class Trainer:
    def open_gpu(self):
        return open_gpu()

    def start_child(self):
        done = subprocess.run([sys.executable, os.environ["CHILD"]], capture_output=True, text=True, check=True)
        return *map(int, done.stdout.split()), done.stderr

def run_actors(number, *methods, **resources):
    actors = [ray.remote(Trainer).options(**resources).remote() for _ in range(number)]
    told = [ray.get([getattr(actor, method).remote() for actor in actors], timeout=300) for method in methods]
    for actor in actors:
        ray.kill(actor)
    return told

ray.init(num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
told = {
    "halves": run_actors(2, "open_gpu", num_gpus=0.5)[0],
    "quarter": run_actors(1, "open_gpu", "start_child", num_gpus=0.25),
    "uninformed child": run_actors(1, "start_child", num_gpus=0.25)[0],
    "task": ray.get(ray.remote(open_gpu).options(num_gpus=0.125).remote(), timeout=300),
    "whole": run_actors(1, "open_gpu", num_gpus=1)[0],
}
print(json.dumps(told))
ray.shutdown()
"""


@dataclass
class Told:
    """What one run of the driver came to.

    Attributes:
        answers: What the actors and the task returned: their pid, and how many GPUs TensorFlow listed.
        log: What was asked of the simulated driver.
        records: The audit log.
    """

    answers: dict[str, Any]
    log: Path
    records: list[dict[str, Any]]

    def sum_bytes(self, pid: int) -> int:
        """What a process asked for of its GPU. TensorFlow takes all that it may have at once."""
        return sum(request.bytes for request in read_requests(self.log, pid=pid) if request.op == "alloc")


@pytest.fixture(scope="module")
def told(simulated_gpus: SimulatedGpus) -> Iterator[Told]:
    """One run on one GPU of 24 GiB. Ray's sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="tfenv-"))
    for name, text in (("tfgpu.toml", POLICY), ("child.py", CHILD), ("driver.py", DRIVER)):
        (folder / name).write_text(text)
    log = folder / "requests.jsonl"
    variables = {"HOME": str(folder), "TFGPU_CONFIG": str(folder / "tfgpu.toml"), "CHILD": str(folder / "child.py")}
    env = simulated_gpus("1x24GiB", log=log, RAY_TMPDIR=str(folder)) | RAY_VARIABLES | variables
    done = subprocess.run(
        [sys.executable, str(folder / "driver.py")],
        cwd=folder, env=env, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    yield Told(json.loads(done.stdout.splitlines()[-1]), log, records)
    shutil.rmtree(folder, ignore_errors=True)


def test_two_actors_of_half_a_gpu_have_half_of_its_memory_each(told: Told) -> None:
    """On a card of 24 GiB with num_gpus=0.5 the driver is asked for no more than 12 GiB by each, at the same time."""
    pids = [pid for pid, gpus in told.answers["halves"] if gpus == 1]
    assert len(set(pids)) == 2
    for pid in pids:
        assert 11 * GIB < told.sum_bytes(pid) <= 12 * GIB


def test_the_share_follows_num_gpus(told: Told) -> None:
    """An actor of 0.25 has a quarter, a task of 0.125 an eighth, and an actor of 1 is held by no share."""
    (quarter, _), (task, _) = told.answers["quarter"][0][0], told.answers["task"]
    assert 5 * GIB < told.sum_bytes(quarter) <= 6 * GIB
    assert 2 * GIB < told.sum_bytes(task) <= 3 * GIB
    assert told.sum_bytes(told.answers["whole"][0][0]) > 12 * GIB


def test_a_process_that_an_actor_starts_has_the_actors_share(told: Told) -> None:
    """Ray tells it nothing. The actor, which imported TensorFlow before, passes its share on."""
    pid, gpus, _ = told.answers["quarter"][1][0]
    assert gpus == 1
    assert 5 * GIB < told.sum_bytes(pid) <= 6 * GIB


def test_a_process_that_nobody_told_its_share_says_so(told: Told) -> None:
    """Where the actor has no TensorFlow itself, the process it starts warns and has no limit."""
    pid, gpus, stderr = told.answers["uninformed child"][0]
    assert gpus == 1
    assert "Ray does not tell this process its share of a GPU" in stderr
    assert told.sum_bytes(pid) > 12 * GIB


def test_the_record_says_what_ray_gave(told: Told) -> None:
    """`policy_loaded` has the launcher, the share in Ray's own words, and the limit that it is."""
    pids = {pid for pid, _ in told.answers["halves"]}
    loaded = [one for one in told.records if one["pid"] in pids and one["event"] == "policy_loaded"]
    assert len(loaded) == 2
    for record in loaded:
        assert record["share"] == {"launcher": "Ray", "given": "num_gpus=0.5", "fraction": 0.5}
        assert record["limit_fraction"] == 0.5
