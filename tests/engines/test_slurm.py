"""What Slurm gave: a real cluster, and programs with a small stand-in for TensorFlow, or with TensorFlow itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SimulatedGpus
from tests.engines.slurm_cluster import SlurmCluster
from tfenv.deploy import launch
from tfenv.simulate.driver_requests import read_requests

pytestmark = pytest.mark.exhaustive

SEE = """
import json, os, tensorflow, tfenv
told = tfenv.explain()
print(json.dumps({
    "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    "codes": sorted({finding.code for finding in told.findings} - {"degraded"}),  # the stand-in has no entry points
    "launcher": told.grant.launcher,
    "job": dict(told.grant.job),
}))
"""
REQUIRE = "[ceiling]\nrequire_grant = true\n"
GROWTH = "[gpu]\nmemory_growth = true\n"
FIRST = "[gpu]\nvisible_devices = [0]\n"
RANK = '[gpu]\nvisible_devices = {rank = "auto"}\n'


class Project:
    """A folder with a policy, a stand-in for TensorFlow, and the program `see.py`."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self.see = f"{sys.executable} {folder}/see.py"
        self.env = launch.build_environment(env) | {"HOME": str(folder)}
        self.env["PYTHONPATH"] = os.pathsep.join((str(folder / "stand-in"), self.env.get("PYTHONPATH", "")))
        (folder / "stand-in" / "tensorflow").mkdir(parents=True)
        (folder / "stand-in" / "tensorflow" / "__init__.py").write_text("")
        (folder / "see.py").write_text(SEE)

    def write_policy(self, text: str) -> None:
        (self.folder / "tfgpu.toml").write_text(text)


@pytest.fixture
def make_project(tmp_path: Path, simulated_gpus: SimulatedGpus) -> Callable[..., Project]:
    def make(policy: str, gpus: str = "4x24GiB") -> Project:
        project = Project(tmp_path, simulated_gpus(gpus))
        project.write_policy(policy)
        return project

    return make


def read(printed: str) -> list[dict[str, Any]]:
    """What the copies of see.py printed, in the order of the GPUs."""
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return sorted(lines, key=lambda line: str(line["visible"]))


STEPS = {
    "a GPU": ("--gres=gpu:1", FIRST, ["0"], []),
    "two, of which the policy takes the second": ("--gres=gpu:2", "[gpu]\nvisible_devices = [1]\n", ["1"], []),
    "none under require_grant": ("", REQUIRE, ["-1"], ["no-grant"]),
    "a GPU for each task": ("-n2 --gpus-per-task=1", RANK, ["0", "1"], []),
    "two GPUs for two tasks": ("-n2 --gpus=2", RANK, ["0", "1"], []),
    "one bound to each of two tasks": ("-n2 --gpus=2 --gpu-bind=single:1", RANK, ["0", "1"], []),
    "a shard": ("--gres=shard:1", GROWTH, ["0"], []),
}


@pytest.mark.parametrize(("options", "policy", "visible", "codes"), STEPS.values(), ids=STEPS)
def test_a_step_has_what_slurm_gave_it(
    options: str,
    policy: str,
    visible: list[str],
    codes: list[str],
    slurm: SlurmCluster,
    make_project: Callable[..., Project],
) -> None:
    """Positions count in the step's own GPUs. Ranks with GPUs of their own are not warned."""
    project = make_project(policy)
    seen = read(slurm.srun(options, sys.executable, "see.py", cwd=project.folder, env=project.env))
    assert [line["visible"] for line in seen] == visible
    assert all((line["codes"], line["launcher"]) == (codes, "Slurm") for line in seen)


BATCHES = {
    "its script": ("--gres=gpu:1", GROWTH, "$SEE", ["0"], []),
    "a script that names all GPUs": (
        "--gres=gpu:1",
        GROWTH,
        "export CUDA_VISIBLE_DEVICES=0,1,2,3; $SEE",
        ["0"],
        ["clamped"],
    ),
    "a script that names another GPU": (
        "--gres=gpu:1",
        GROWTH,
        "export CUDA_VISIBLE_DEVICES=3; $SEE",
        ["0"],
        ["no-overlap"],
    ),
    "a script that names one of two": ("--gres=gpu:2", GROWTH, "export CUDA_VISIBLE_DEVICES=1; $SEE", ["1"], []),
    "a script that removes the variable": ("--gres=gpu:2", GROWTH, "unset CUDA_VISIBLE_DEVICES; $SEE", ["0,1"], []),
    "a script without GPUs that names one": ("", REQUIRE, "export CUDA_VISIBLE_DEVICES=2; $SEE", ["-1"], ["no-grant"]),
    "a step of one of two": ("--gres=gpu:2", FIRST, "srun --gres=gpu:1 $SEE", ["0"], []),
    "a step of none": ("--gres=gpu:2", GROWTH, "srun --gres=none $SEE", ["-1"], ["no-grant"]),
    "a step with a clean environment": (
        "--gres=gpu:1",
        GROWTH,
        "srun --export=NONE /usr/bin/env PYTHONPATH=$PYTHONPATH $SEE",
        ["0"],
        [],
    ),
    "a step inside of a step": ("--gres=gpu:2", FIRST, "srun --gres=gpu:1 srun --overlap --gres=gpu:1 $SEE", ["0"], []),
}


@pytest.mark.parametrize(("options", "policy", "script", "visible", "codes"), BATCHES.values(), ids=BATCHES)
def test_a_batch_job_has_what_slurm_gave_it(
    options: str,
    policy: str,
    script: str,
    visible: list[str],
    codes: list[str],
    slurm: SlurmCluster,
    make_project: Callable[..., Project],
) -> None:
    """What a script writes into CUDA_VISIBLE_DEVICES narrows the job's own list, and never widens it."""
    project = make_project(policy)
    printed = slurm.sbatch(options, script.replace("$SEE", project.see), project.folder, project.env)
    seen = read(next(iter(printed.values())))
    assert [(line["visible"], line["codes"]) for line in seen] == [(one, codes) for one in visible]


SUBMIT = """
import os, subprocess, sys, tensorflow
assert os.environ["CUDA_VISIBLE_DEVICES"] == "0", os.environ["CUDA_VISIBLE_DEVICES"]
for options in (["--gres=gpu:1"], []):
    subprocess.run(["sbatch", "--wait", "--output=inner.out", "--open-mode=append", *options, "inner.sh"], check=True)
print(open("inner.out").read())
"""


def test_a_job_that_a_program_submits_counts_as_its_own(
    slurm: SlurmCluster, make_project: Callable[..., Project]
) -> None:
    """A program with TensorFlow in a step of GPU 0 submits two jobs, and its environment comes along.

    The one with a GPU has its own, GPU 1. The one without has none.
    """
    project = make_project(REQUIRE + FIRST)
    (project.folder / "inner.sh").write_text(f"#!/bin/bash\n{project.see}\nsrun {project.see}\n")
    (project.folder / "submit.py").write_text(SUBMIT)
    printed = slurm.srun("--gres=gpu:1", sys.executable, "submit.py", cwd=project.folder, env=project.env)
    seen = read(printed)
    assert [(line["visible"], line["codes"]) for line in seen] == [("-1", ["no-grant"])] * 2 + [("1", [])] * 2
    assert len({line["job"]["id"] for line in seen}) == 2


def test_the_tasks_of_an_array_are_known_by_the_arrays_id(
    slurm: SlurmCluster, make_project: Callable[..., Project]
) -> None:
    """Each task has a job id of its own, and the id of the array with its place in it."""
    project = make_project(GROWTH)
    printed = slurm.sbatch("--array=0-1 --gres=gpu:1", project.see, project.folder, project.env)
    jobs = [read(text)[0]["job"] for text in printed.values()]
    assert {f"{job['array_id']}_{job['array_task']}" for job in jobs} == set(printed)
    assert len({job["id"] for job in jobs}) == 2
    assert {(job["scheduler"], job["partition"]) for job in jobs} == {("slurm", "gpu")}


HIDDEN = {
    "one": ("--gres=gpu:1", "$SEE", "1x24GiB", FIRST, ["0"]),
    "two": ("--gres=gpu:2", "$SEE", "2x24GiB", GROWTH, ["0,1"]),
    "two, of which a script takes the second": (
        "--gres=gpu:2",
        "export CUDA_VISIBLE_DEVICES=1; $SEE",
        "2x24GiB",
        GROWTH,
        ["1"],
    ),
    "a step of one": ("--gres=gpu:2", "srun --gres=gpu:1 $SEE", "1x24GiB", FIRST, ["0"]),
    "a GPU for each task": ("-n2 --gpus-per-task=1", "srun --gpus-per-task=1 $SEE", "1x24GiB", RANK, ["0", "0"]),
}


@pytest.mark.parametrize(("options", "script", "shown", "policy", "visible"), HIDDEN.values(), ids=HIDDEN)
def test_a_node_that_hides_other_gpus_counts_a_jobs_own_from_0(
    options: str,
    script: str,
    shown: str,
    policy: str,
    visible: list[str],
    slurm_with_cgroups: SlurmCluster,
    make_project: Callable[..., Project],
) -> None:
    """ConstrainDevices: another job has GPUs 0 and 1. Slurm lists 2 and 3. CUDA shows as many as were given."""
    project = make_project(policy, shown)
    other = subprocess.Popen(
        ["srun", "--immediate=30", "--gres=gpu:2", "sleep", "100"],
        env={**project.env, **slurm_with_cgroups.environ},
        stdin=subprocess.DEVNULL,
    )
    try:
        while "R" not in slurm_with_cgroups.run("squeue", "-h", "-o", "%t").stdout:
            assert other.poll() is None
            time.sleep(0.1)
        printed = slurm_with_cgroups.sbatch(options, script.replace("$SEE", project.see), project.folder, project.env)
    finally:
        slurm_with_cgroups.run("scancel", "--user=root", "--name=sleep")
        other.wait(timeout=60)
    seen = read(next(iter(printed.values())))
    assert [(line["visible"], line["codes"]) for line in seen] == [(one, []) for one in visible]


TRAIN = """
import tensorflow as tf
gpus = tf.config.list_logical_devices("GPU")
assert len(gpus) == 1, gpus
with tf.device("GPU:0"):
    tf.zeros([1024, 1024]) + 0
"""


@pytest.mark.tensorflow
def test_tensorflow_uses_the_gpu_of_its_job_alone(
    slurm: SlurmCluster, tmp_path: Path, simulated_gpus: SimulatedGpus
) -> None:
    """The script of a job of one names all four GPUs. The driver is asked for memory of the job's own."""
    if find_spec("tensorflow") is None:
        pytest.skip("TensorFlow is not installed")
    log = tmp_path / "driver.jsonl"
    env = launch.build_environment(simulated_gpus(log=log)) | {"HOME": str(tmp_path)}
    (tmp_path / "tfgpu.toml").write_text('[gpu]\nmemory_limit = "2GiB"\n')
    (tmp_path / "train.py").write_text(TRAIN)
    script = f"export CUDA_VISIBLE_DEVICES=0,1,2,3\n{sys.executable} train.py"
    printed = slurm.sbatch("--gres=gpu:1", script, tmp_path, env)
    asked = [request for request in read_requests(log) if request.op == "alloc"]
    assert {request.gpu for request in asked} == {0}, printed
    assert max(request.bytes for request in asked) <= 2 << 30
