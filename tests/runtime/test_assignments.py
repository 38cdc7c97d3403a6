"""What a launcher assigns while the process runs. Real TensorFlow on simulated GPUs, in a worker as Ray has it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SimulatedGpus

#: Hands GPUs to one task after another, as Ray does in one worker, and tells what came of each.
TASKS = """
import json, os, sys
from tests.launchers.small_ray import assign

def run(gpus, task):
    assign(gpus)
    try:
        told.append(task())
    except RuntimeError as error:
        told.append(f"{type(error).__name__}: {error}")
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]

def use():
    import tensorflow as tf
    return len(tf.config.list_physical_devices("GPU")), str(tf.zeros([2]).device)[-5:]

def only_import():
    import tensorflow
    return os.environ["CUDA_VISIBLE_DEVICES"]

def no_tensorflow():
    return os.environ["CUDA_VISIBLE_DEVICES"]

def with_part(part, task):
    def work():
        context = sys.modules["ray.runtime_context"].get_runtime_context()
        context.get_assigned_resources = lambda: {"GPU": part}
        return task()
    return work

def say_more():
    os.environ["CUDA_VISIBLE_DEVICES"] = "3"
    return use()

told = []
"""
MESSAGE = (
    "Ray assigned GPU 2 to this task, but TensorFlow keeps GPU 1,3 of an earlier task; "
    "give each task its own process, in Ray with max_calls=1"
)


def run(
    calls: str, policy: str, folder: Path, simulated_gpus: SimulatedGpus
) -> tuple[list[object], str, list[dict[str, object]]]:
    """Run tasks under a policy.

    Returns:
        What came of each, the lines of tfenv on stderr, and the records of what went wrong.
    """
    (folder / "tfgpu.toml").write_text(f'{policy}\n[audit]\nfile = "audit.jsonl"\n')
    done = subprocess.run(
        [sys.executable, "-c", f"{TASKS}\n{calls}\nprint(json.dumps(told))"],
        cwd=folder, env=simulated_gpus(), capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = "\n".join(line for line in done.stderr.splitlines() if line.startswith("tfgpu: "))
    records = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    return json.loads(done.stdout), lines, [record for record in records if record["event"] == "policy_failed"]


@pytest.mark.tensorflow
@pytest.mark.parametrize("on_error", ["warn", pytest.param("cpu", marks=pytest.mark.exhaustive)])
def test_gpus_of_an_earlier_task_are_said_and_recorded(
    on_error: str, tmp_path: Path, simulated_gpus: SimulatedGpus
) -> None:
    """TensorFlow cannot give GPUs back, so the program goes on with them. The line and the record say it once."""
    calls = 'run("1,3", use); run("2", use); run("2", use); run("1,3", say_more)'
    told, lines, records = run(calls, f'on_error = "{on_error}"\n[gpu]', tmp_path, simulated_gpus)
    assert told == [[2, "GPU:0"]] * 4
    assert lines.count("stale-devices") == 1
    assert f'tfgpu: {MESSAGE} (on_error = "{on_error}") [stale-devices]' in lines
    (record,) = records
    assert record["framework"] == "tensorflow"
    assert [finding["code"] for finding in record["findings"]] == ["stale-devices"]  # type: ignore[attr-defined]


@pytest.mark.tensorflow
def test_gpus_of_an_earlier_task_are_refused(tmp_path: Path, simulated_gpus: SimulatedGpus) -> None:
    """With `on_error = "fail"` a task that uses TensorFlow gets PolicyError. One with the same GPUs goes on."""
    calls = 'run("1,3", use); run("2", no_tensorflow); run("2", use); run("2", use); run("1,3", use)'
    told, lines, records = run(calls, 'on_error = "fail"\n[gpu]', tmp_path, simulated_gpus)
    refused = f"PolicyError: {MESSAGE} [stale-devices]"
    assert told == [[2, "GPU:0"], "2", refused, refused, [2, "GPU:0"]]
    assert lines.count("stale-devices") == 1
    assert len(records) == 1


@pytest.mark.tensorflow
def test_gpus_count_as_soon_as_they_are_opened(tmp_path: Path, simulated_gpus: SimulatedGpus) -> None:
    """A task that only imports TensorFlow opens no GPU. The next one of the process uses those it was assigned."""
    policy = "[gpu]\nvisible_devices = [0]\n[ceiling]\nrequire_grant = true"
    told, lines, records = run('run("1", only_import); run("2,3", use)', policy, tmp_path, simulated_gpus)
    assert told == ["1", [1, "GPU:0"]]
    assert "tfgpu: TensorFlow on GPU 2 of 4" in lines
    assert records == []


@pytest.mark.tensorflow
def test_the_share_of_the_task_that_opens_a_gpu_counts(tmp_path: Path, simulated_gpus: SimulatedGpus) -> None:
    """A task of half a GPU only imports TensorFlow. The next one has a quarter of the same GPU, and takes that."""
    calls = 'run("1", with_part(0.5, only_import)); run("1", with_part(0.25, use))'
    told, lines, _ = run(calls, '[gpu]\nmemory_limit = "granted"', tmp_path, simulated_gpus)
    assert told == ["1", [1, "GPU:0"]]
    assert "at most 25% by Ray's num_gpus=0.25" in lines


#: A function that fails is noticed by an assignment, before and after another one is named.
NOTICE = """
import os
from tfenv.runtime.assignments import watch_assignments

watch_assignments(lambda value: 1 / 0)
os.environ["CUDA_VISIBLE_DEVICES"] = "0"
seen = []
watch_assignments(seen.append)
os.environ["CUDA_VISIBLE_DEVICES"] = "1,2"
os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
del os.environ["CUDA_VISIBLE_DEVICES"]
os.putenv("CUDA_VISIBLE_DEVICES", "3")
print(seen)
"""


def test_each_assignment_is_noticed_and_none_fails(tmp_path: Path, simulated_gpus: SimulatedGpus) -> None:
    """Other variables are not, nor is a removal. A fault of tfenv's own is a line on stderr and breaks nothing."""
    done = subprocess.run(
        [sys.executable, "-c", NOTICE],
        cwd=tmp_path, env=simulated_gpus(), capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "['1,2', '3']\n"
    assert done.stderr.count("\n") == 1
    assert "ZeroDivisionError" in done.stderr
    assert done.stderr.rstrip().endswith("[internal-error]")
