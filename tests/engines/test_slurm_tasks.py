"""`tfgpu slurm` as the TaskProlog and TaskEpilog of a real Slurm, and the shares that it gives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SimulatedGpus
from tests.engines.slurm_cluster import SlurmCluster, explain_missing_slurm
from tfenv.deploy import launch
from tfenv.simulate.driver_requests import read_requests

pytestmark = pytest.mark.exhaustive

GIB = 1 << 30
GRANTED = '[ceiling]\nmemory_limit = "granted"\n'
SEE = """
import json, os, tfenv
told = tfenv.explain()
print(json.dumps({
    "files": [os.path.basename(file.path) for file in told.files if file.state == "read"],
    "limits": [device.limit and device.limit.bytes for device in told.plan.devices or ()],
    "config": os.environ.get("TFGPU_CONFIG"),
}))
"""
#: It takes all that it may, at once.
TAKE = """
import tensorflow as tf
assert len(tf.config.list_logical_devices("GPU")) == 1
tf.zeros([8]) + 0
"""
SCRIPT = "#!/bin/sh\n{python} -I -m tfenv slurm {arguments}\nexit 0\n"

needs_tensorflow = pytest.mark.skipif(find_spec("tensorflow") is None, reason="TensorFlow is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files for the partitions gpu and shared. The partition bare has none."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "gpu.toml").write_text('[gpu]\nmemory_limit = "20GiB"\n')
    (folder / "shared.toml").write_text(GRANTED)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, site: Path) -> Iterator[SlurmCluster]:
    """A node in three partitions, whose slurm.conf names the scripts."""
    missing = explain_missing_slurm()
    if missing is not None:
        pytest.skip(missing)
    more = ["PartitionName=shared Nodes=ALL", "PartitionName=bare Nodes=ALL"]
    for name, arguments in {"TaskProlog": f"task-prolog --folder {site}", "TaskEpilog": "task-epilog"}.items():
        script = site / f"{name}.sh"
        script.write_text(SCRIPT.format(python=sys.executable, arguments=arguments))
        script.chmod(0o755)
        more.append(f"{name}={script}")
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster", more="\n".join(more))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def env(simulated_gpus: SimulatedGpus, tmp_path: Path) -> dict[str, str]:
    """What a user's jobs bring along. The node's GPUs have four shards each, and the log is in the project."""
    (tmp_path / "see.py").write_text(SEE)
    (tmp_path / "take.py").write_text(TAKE)
    (tmp_path / "tfgpu.toml").write_text('[audit]\nfile = "audit.jsonl"\n')
    return launch.build_environment(simulated_gpus(log=tmp_path / "driver.jsonl")) | {
        "HOME": str(tmp_path),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }


def read(printed: str) -> list[dict[str, Any]]:
    """What the copies of see.py printed."""
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def read_allocations(folder: Path) -> list[int]:
    """The most that each process asked the driver for at once, in bytes."""
    most: dict[int, int] = {}
    for request in read_requests(folder / "driver.jsonl"):
        if request.op == "alloc":
            most[request.pid] = max(most.get(request.pid, 0), request.bytes)
    return sorted(most.values())


# ---- the TaskProlog

SEEN = f"{sys.executable} see.py"
#: For each case: options of sbatch, its script, and for each process the files that count beside the project's.
JOBS = {
    "a batch script": ("-p gpu", SEEN, [["gpu.toml"]]),
    "a step": ("-p gpu", f"srun {SEEN}", [["gpu.toml"]]),
    "a step without the environment": (
        "-p gpu",
        f"srun --export=NONE /usr/bin/env LD_LIBRARY_PATH=$LD_LIBRARY_PATH {SEEN}",
        [["gpu.toml"]],
    ),
    "a partition without a file": ("-p bare", SEEN, [[]]),
    "a user's value in a batch script": (
        "-p gpu",
        f"export TFGPU_SITE_CONFIG=$PWD/mine.toml; srun {SEEN}",
        [["mine.toml"]],
    ),
    "a job from within a job": (
        "-p gpu",
        f"{SEEN}; sbatch -p shared -W -o inner.out see.sh; sbatch -p bare -W -o b.out see.sh; cat inner.out b.out",
        [["gpu.toml"], ["shared.toml"], []],
    ),
    "a job from within a step": (
        "-p gpu",
        f"srun bash -c '{SEEN}; sbatch -p shared --wait -o inner.out see.sh'; cat inner.out",
        [["gpu.toml"], ["shared.toml"]],
    ),
}


@pytest.mark.parametrize(("options", "script", "files"), JOBS.values(), ids=JOBS)
def test_each_task_has_the_file_of_its_own_partition(
    options: str, script: str, files: list[list[str]], cluster: SlurmCluster, env: dict[str, str], tmp_path: Path
) -> None:
    """Whatever its environment brought along from another job. A user's own value is kept."""
    (tmp_path / "mine.toml").write_text("[gpu]\nmemory_growth = true\n")
    (tmp_path / "see.sh").write_text(f"#!/bin/sh\n{SEEN}\n")
    printed = cluster.sbatch(options, script, tmp_path, env)
    seen = read(next(iter(printed.values())))
    assert [line["files"] for line in seen] == [[*names, "tfgpu.toml"] for names in files]


def test_a_users_config_is_kept(cluster: SlurmCluster, env: dict[str, str], tmp_path: Path) -> None:
    """TFGPU_CONFIG replaces the project's file, and the partition's file is beneath it."""
    (tmp_path / "mine.toml").write_text('[gpu]\nmemory_limit = "2GiB"\n')
    printed = cluster.srun("--gres=gpu:1", *SEEN.split(), cwd=tmp_path, env=env | {"TFGPU_CONFIG": "mine.toml"})
    assert read(printed) == [{"files": ["gpu.toml", "mine.toml"], "limits": [2 * GIB], "config": "mine.toml"}]


def test_a_task_whose_tfenv_is_gone_runs(cluster: SlurmCluster, env: dict[str, str], tmp_path: Path) -> None:
    """A TaskProlog that fails fails the task. The script ends with 0 whatever Python does."""
    broken = {"PYTHONHOME": "/nowhere", "PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": "/nowhere"}
    (tmp_path / "argparse.py").write_text("raise SystemExit(3)\n")
    printed = cluster.srun("--gres=gpu:1", "env", cwd=tmp_path, env=env | broken)
    assert "TFGPU_SITE_CONFIG=" in printed
    (tmp_path / "prolog.sh").write_text(SCRIPT.format(python="/nowhere/python", arguments="task-prolog"))
    (tmp_path / "prolog.sh").chmod(0o755)
    assert cluster.srun(f"--task-prolog={tmp_path}/prolog.sh", "echo", "runs", cwd=tmp_path, env=env) == "runs\n"


# ---- the TaskEpilog


def list_lines(printed: str) -> list[str]:
    """The lines about jobs and steps, without their times."""
    lines = [line.rpartition(", ")[0] for line in printed.splitlines() if line.startswith("tfgpu: job ")]
    return [line.removeprefix("tfgpu: ") for line in lines]


@pytest.mark.tensorflow
@needs_tensorflow
def test_each_task_of_an_array_ends_with_its_line(cluster: SlurmCluster, env: dict[str, str], tmp_path: Path) -> None:
    """The last line of the output file is about that task alone, and `tfgpu audit` finds it by the same name."""
    printed = cluster.sbatch("-p gpu --array=0-1 --gres=gpu:1", f"{sys.executable} take.py", tmp_path, env)
    assert len(printed) == 2
    for name, text in printed.items():
        (line,) = list_lines(text)
        assert line.startswith(f"job {name}: 1 GPU, peak ")
        assert line.endswith(" of 20.0 GiB (0%), 1 process")
        assert text.splitlines()[-1].startswith(f"tfgpu: {line}")
        asked = [sys.executable, "-m", "tfenv", "audit", "--job", name, "--format", "json"]
        found = subprocess.run(asked, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
        jobs = [json.loads(record)["job"] for record in found.splitlines()]
        assert {f"{job['array_id']}_{job['array_task']}" for job in jobs} == {name}


@pytest.mark.tensorflow
@needs_tensorflow
def test_a_job_from_within_a_step_ends_with_a_line_of_its_own(
    cluster: SlurmCluster, env: dict[str, str], tmp_path: Path
) -> None:
    """The inner batch script inherits the outer step's SLURM_STEP_ID, and is no step."""
    (tmp_path / "take.sh").write_text(f"#!/bin/sh\n{sys.executable} take.py\n")
    submit = ("sbatch", "-p", "gpu", "--gres=gpu:1", "--wait", "-o", "inner.out", "take.sh")
    number = cluster.srun("-p gpu --gres=gpu:1", *submit, cwd=tmp_path, env=env).split()[-1]
    (line,) = list_lines((tmp_path / "inner.out").read_text())
    assert line.startswith(f"job {number}: 1 GPU, peak ")


@pytest.mark.tensorflow
@needs_tensorflow
def test_a_job_that_was_cancelled_ends_with_a_line(cluster: SlurmCluster, env: dict[str, str], tmp_path: Path) -> None:
    """Its process had no time to tell its peak. The line says how many GPUs it had."""
    script = f"{sys.executable} -c 'exec(open(\"take.py\").read()); import os, time; os.kill(os.getpid(), 9)'"
    printed = cluster.sbatch("-p gpu --gres=gpu:1", f"{script}; true", tmp_path, env)
    ((number, text),) = printed.items()
    assert text.splitlines()[-1] == f"tfgpu: job {number}: 1 GPU, 1 process"


def test_a_job_without_gpus_ends_without_a_line(cluster: SlurmCluster, env: dict[str, str], tmp_path: Path) -> None:
    """Nor does one with a GPU that used none."""
    for options in ("-p gpu", "-p gpu --gres=gpu:1"):
        (text,) = cluster.sbatch(options, f"srun {SEEN}", tmp_path, env).values()
        assert "tfgpu" not in text.replace("tfgpu.toml", "")


# ---- MPS

PERCENTAGES = {"a task": ("--gres=mps:30", [30]), "two tasks": ("-n2 --gres=mps:30", [15, 15])}


@pytest.mark.tensorflow
@needs_tensorflow
@pytest.mark.parametrize(("options", "percentages"), PERCENTAGES.values(), ids=PERCENTAGES)
def test_a_percentage_of_mps_is_one_of_memory(
    options: str, percentages: list[int], slurm_with_mps: SlurmCluster, env: dict[str, str], tmp_path: Path
) -> None:
    """Slurm counts it for the step, so that its tasks divide it. The driver is asked for no more."""
    (tmp_path / "tfgpu.toml").write_text(GRANTED)
    slurm_with_mps.srun(options, sys.executable, "take.py", cwd=tmp_path, env=env)
    most = [24 * GIB * percentage // 100 for percentage in percentages]
    assert read_allocations(tmp_path) == [limit - limit % 256 for limit in most]  # TensorFlow's unit
