"""Real Ray and real TensorFlow on simulated GPUs: what each actor and task asks the driver for.

One cluster on 127.0.0.1 serves all tests but those about how a cluster is started.
"""

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
from tests.pages import ROOT, blocks, commands
from tfenv.simulate.driver_requests import read_requests

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.tensorflow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed here"),
    pytest.mark.timeout(600),
]

#: Without the first, Ray listens on the network. Without the second it writes a token into the home.
RAY_VARIABLES = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_COLOR_PREFIX": "0",
}

#: The first driver starts the cluster, and ends it with its stdin.
HEAD = """
import sys, ray
context = ray.init(num_cpus=16, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
ray.shutdown()
"""

#: What programs have in common: `use` opens the GPUs, takes memory of each, and says what was assigned.
COMMON = """
import json, os, sys, time
import ray

def use():
    import tensorflow as tf
    for device in tf.config.list_logical_devices("GPU"):
        with tf.device(device.name):
            tf.zeros([256, 1024])
    return os.getpid(), ray.get_runtime_context().get_accelerator_ids()["GPU"]

class User:
    def use(self):
        return use()

def tell(*references):
    print(json.dumps(ray.get(list(references), timeout=200)), flush=True)
"""
JOIN = """
ray.init(address=os.environ["CLUSTER"], runtime_env={"env_vars": {"TFGPU_CONFIG": os.environ["POLICY"]}})
"""


@dataclass
class Run:
    """What a driver program came to.

    Attributes:
        told: What it printed as JSON, a line each.
        stderr: Its stderr, with that of its workers.
        log: What was asked of the simulated driver.
        records: The audit log of the policy beside the program.
    """

    told: list[Any]
    stderr: str
    log: Path
    records: list[dict[str, Any]]

    def gpus(self, pid: int) -> list[int]:
        """The GPUs of which a process took memory."""
        return sorted({request.gpu for request in read_requests(self.log, pid=pid) if request.op == "alloc"})


def start(command: list[str], env: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=folder, env=env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its sockets. Their paths must be short, so it is not pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="tfenv-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def variables(ray_folder: Path, simulated_gpus: SimulatedGpus) -> dict[str, str]:
    """The environment of drivers, and so of Ray and its workers."""
    log = ray_folder / "requests.jsonl"
    return simulated_gpus(log=log) | {"HOME": str(ray_folder), "RAY_TMPDIR": str(ray_folder)} | RAY_VARIABLES


@pytest.fixture(scope="module")
def cluster(ray_folder: Path, variables: dict[str, str]) -> Iterator[str]:
    """The address of a cluster with four GPUs."""
    elsewhere = ray_folder / "elsewhere"
    elsewhere.mkdir()
    head = start([sys.executable, "-c", HEAD], variables, elsewhere)
    assert head.stdin is not None
    assert head.stdout is not None
    address = head.stdout.readline().strip()
    if not address:
        pytest.skip(f"Ray does not start here: {head.communicate()[1][-500:]}")
    yield address
    head.communicate(timeout=60)


def run(
    program: str, folder: Path, variables: dict[str, str], policy: str = "", *, join: str = JOIN, **more: str
) -> Run:
    """Run a driver program, with a policy beside it. Unless `join` is "" it joins the cluster of CLUSTER."""
    (folder / "tfgpu.toml").write_text(f'{policy}\n[audit]\nfile = "audit.jsonl"\n')
    (folder / "program.py").write_text(f"{COMMON}{join}{program}\nray.shutdown()\n")
    env = variables | {"POLICY": str(folder / "tfgpu.toml")} | more
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", "{", '"'))]
    log = folder / "audit.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return Run(told, done.stdout + done.stderr, Path(env["TFGPU_SIMULATE_LOG"]), records)


#: As the README has it, and as a site that schedules by Ray has it.
POLICIES = {
    "[0]": "[gpu]\nvisible_devices = [0]\nmemory_growth = true\n",
    "require_grant": "[gpu]\nmemory_growth = true\n[ceiling]\nrequire_grant = true\n",
}


# ---- what was assigned


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_each_actor_uses_the_gpu_that_it_was_assigned(
    policy: str, tmp_path: Path, variables: dict[str, str], cluster: str
) -> None:
    """Ray assigns it in a worker that runs. It is the actor's grant, and positions count in it."""
    program = "Actor = ray.remote(num_gpus=1)(User)\nactors = [Actor.remote() for _ in range(2)]\n"
    done = run(
        program + "tell(*[actor.use.remote() for actor in actors])", tmp_path, variables, policy, CLUSTER=cluster
    )
    (told,) = done.told
    assert {assigned[0] for _, assigned in told} == {"0", "1"}
    assert [done.gpus(pid) for pid, _ in told] == [[int(assigned[0])] for _, assigned in told]


def test_a_part_of_a_gpu_is_that_gpu(tmp_path: Path, variables: dict[str, str], cluster: str) -> None:
    """Two actors with a half share one GPU, one with a quarter gets what is free, and one with two has both."""
    program = """
parts = [ray.remote(num_gpus=part)(User).remote() for part in (0.5, 0.5, 0.25, 2)]
tell(*[actor.use.remote() for actor in parts])
"""
    done = run(program, tmp_path, variables, POLICIES["require_grant"], CLUSTER=cluster)
    (told,) = done.told
    assert [done.gpus(pid) for pid, _ in told] == [[int(gpu) for gpu in assigned] for _, assigned in told]
    first, second, quarter, two = (assigned for _, assigned in told)
    assert first == second
    assert [len(first), len(quarter), len(two)] == [1, 1, 2]
    assert not {*first, *quarter} & set(two)


@pytest.mark.parametrize(
    ("policy", "gpus"), [("[gpu]\nmemory_growth = true\n", [0, 1, 2, 3]), (POLICIES["require_grant"], [])]
)
def test_without_gpus_an_actor_has_all_of_them_unless_a_grant_is_required(
    policy: str, gpus: list[int], tmp_path: Path, variables: dict[str, str], cluster: str
) -> None:
    """With num_gpus=0 Ray leaves CUDA_VISIBLE_DEVICES unset, so TensorFlow would take every GPU of the host."""
    program = "tell(ray.remote(num_gpus=0)(User).remote().use.remote())"
    done = run(program, tmp_path, variables, policy, CLUSTER=cluster)
    (((pid, assigned),),) = done.told
    assert assigned == []
    assert done.gpus(pid) == gpus


# ---- a worker that is used again

REUSED = """
function = ray.remote(max_calls={max_calls})(use)

def call(gpus):
    try:
        tell(function.options(num_gpus=gpus).remote())
    except RuntimeError as error:  # Ray raises what the task raised
        print(json.dumps([type(error).__mro__[3].__name__, str(error).splitlines()[-1]]), flush=True)

call(1)
call(2)
call(1)
time.sleep(2)  # the lines of workers come with a delay
"""
STALE = (
    "Ray assigned GPU 0,1 to this task, but TensorFlow keeps GPU 0 of an earlier task; "
    "give each task its own process, in Ray with max_calls=1"
)


def test_gpus_of_an_earlier_task_are_said_and_recorded(tmp_path: Path, variables: dict[str, str], cluster: str) -> None:
    """Ray runs a function of other options in the same worker, where TensorFlow keeps the first GPU."""
    done = run(REUSED.format(max_calls=0), tmp_path, variables, "[gpu]\nmemory_growth = true", CLUSTER=cluster)
    pids = {pid for ((pid, _),) in done.told}
    assert [assigned for ((_, assigned),) in done.told] == [["0"], ["0", "1"], ["0"]]
    assert len(pids) == 1
    assert done.gpus(pids.pop()) == [0]
    assert done.stderr.count(f'tfgpu: {STALE} (on_error = "warn") [stale-devices]') == 1
    failed = [record for record in done.records if record["event"] == "policy_failed"]
    assert [finding["code"] for record in failed for finding in record["findings"]] == ["stale-devices"]


def test_gpus_of_an_earlier_task_are_refused(tmp_path: Path, variables: dict[str, str], cluster: str) -> None:
    """With `on_error = "fail"` the task raises PolicyError to its caller, and the worker goes on to serve others."""
    done = run(REUSED.format(max_calls=0), tmp_path, variables, 'on_error = "fail"\n[gpu]', CLUSTER=cluster)
    ((first, assigned),), refused, ((third, _),) = done.told
    assert assigned == ["0"]
    assert refused == ["PolicyError", f"tfenv.errors.PolicyError: {STALE} [stale-devices]"]
    assert first == third
    assert done.gpus(first) == [0]


def test_a_process_for_each_call_has_the_gpus_of_its_call(
    tmp_path: Path, variables: dict[str, str], cluster: str
) -> None:
    """With max_calls=1 nothing is left of an earlier task."""
    done = run(REUSED.format(max_calls=1), tmp_path, variables, 'on_error = "fail"\n[gpu]', CLUSTER=cluster)
    calls = [call for (call,) in done.told]
    assert [assigned for _, assigned in calls] == [["0"], ["0", "1"], ["0"]]
    assert [done.gpus(pid) for pid, _ in calls] == [[0], [0, 1], [0]]


# ---- who it was

JOBS = """
def describe():
    from tfenv.launchers.grant import read_current_grant
    return dict(read_current_grant()[0].job)

def in_thread():
    from threading import Thread
    told = []
    thread = Thread(target=lambda: told.append(describe()))
    thread.start()
    thread.join()
    return told[0]

def in_child():
    import subprocess
    code = "from tfenv.launchers.grant import read_current_grant as read; import json; print(json.dumps(read()[0].job))"
    return json.loads(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)

class Trainer:
    def describe(self):
        return describe()
    def in_thread(self):
        return in_thread()

class AsyncTrainer:
    async def describe(self):
        return describe()

print(json.dumps(ray.get_runtime_context().get_job_id()))
tell(
    ray.remote(describe).remote(),
    ray.remote(describe).options(name="fold-3").remote(),
    ray.remote(in_child).remote(),
    ray.remote(Trainer).remote().describe.remote(),
    ray.remote(Trainer).options(name="learner").remote().describe.remote(),
    ray.remote(Trainer).remote().in_thread.remote(),
    ray.remote(AsyncTrainer).remote().describe.remote(),
)
"""


def test_the_job_and_the_actor_or_task_are_known(tmp_path: Path, variables: dict[str, str], cluster: str) -> None:
    """By the runtime context, in workers that were started before the job and in threads, too. A child has the job."""
    done = run(JOBS, tmp_path, variables, CLUSTER=cluster)
    job, told = done.told
    for one in told:
        assert one.pop("scheduler") == "ray"
    child = told.pop(2)
    assert child in ({"ray_job": job}, {})  # {}: of a worker that was started before there was a job
    actor = {"ray_job": job, "actor": "Trainer"}
    assert told == [
        {"ray_job": job, "task": "describe"},
        {"ray_job": job, "task": "fold-3"},
        actor,
        {"ray_job": job, "actor": "learner"},
        actor,
        {"ray_job": job, "actor": "AsyncTrainer"},
    ]


# ---- Ray Train and Tune

NEEDS_TRAIN = pytest.mark.skipif(
    any(find_spec(module) is None for module in ("pandas", "pyarrow", "tensorboardX")),
    reason="ray[train] is not installed here",
)
#: Workers write what they have to tell into files of a folder.
WRITE = """
RESULTS = os.getcwd()

def write(assigned, replicas):
    from tfenv.launchers.grant import read_current_grant
    told = os.getpid(), assigned, replicas, read_current_grant()[0].job["actor"]
    with open(f"{RESULTS}/{os.getpid()}.json", "w") as file:
        json.dump(told, file)
"""
TRAIN = """
from ray.train import RunConfig, ScalingConfig
from ray.train.tensorflow import TensorflowTrainer

def train():
    import tensorflow as tf
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        tf.keras.Sequential([tf.keras.layers.Input((4,)), tf.keras.layers.Dense(1)])
    write(ray.get_runtime_context().get_accelerator_ids()["GPU"], strategy.num_replicas_in_sync)

scaling = ScalingConfig(num_workers=2, use_gpu=True)
TensorflowTrainer(train, scaling_config=scaling, run_config=RunConfig(storage_path=RESULTS)).fit()
"""
TUNE = """
from ray import tune

def trial(config):
    write(use()[1], 2)
    time.sleep(3)  # both run at the same time
    tune.report({"loss": 1})

trainable = tune.with_resources(trial, {"cpu": 1, "gpu": 1})
run_config = tune.RunConfig(storage_path=RESULTS, verbose=0)
tune.Tuner(trainable, param_space={"number": tune.grid_search([0, 1])}, run_config=run_config).fit()
"""


@NEEDS_TRAIN
@pytest.mark.parametrize(
    ("program", "actor"), [(TRAIN, "RayTrainWorker"), (TUNE, "ImplicitFunc")], ids=["Train", "Tune"]
)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_the_workers_of_a_training_have_their_own_gpus(
    policy: str, program: str, actor: str, tmp_path: Path, variables: dict[str, str], cluster: str
) -> None:
    """The two workers of TensorflowTrainer reach each other, and two trials of Tune run side by side."""
    done = run(WRITE + program, tmp_path, variables, policy, CLUSTER=cluster)
    told = [json.loads(file.read_text()) for file in tmp_path.glob("[0-9]*.json")]
    assert sorted(assigned for _, assigned, *_ in told) == [["0"], ["1"]]
    assert [done.gpus(pid) for pid, *_ in told] == [[int(assigned[0])] for _, assigned, *_ in told]
    assert {(replicas, name) for *_, replicas, name in told} == {(2, actor)}


# ---- how a cluster is started

LOCAL = """
ray.init(num_cpus=4, include_dashboard=False, object_store_memory=80 << 20)
actors = [ray.remote(num_gpus=1)(User).remote() for _ in range(2)]
tell(*[actor.use.remote() for actor in actors])
"""
#: A driver that opens the GPUs itself, before it starts Ray.
IMPORTS_FIRST = "use_here = 'import tensorflow as tf; tf.config.list_logical_devices()'\nexec(use_here)\n"


@pytest.mark.parametrize(
    ("policy", "before"),
    [
        (POLICIES["[0]"], ""),
        ('[gpu]\nmemory_growth = true\nmemory_limit = "8GiB"\n', IMPORTS_FIRST),
    ],
    ids=["the README's", "a driver that uses TensorFlow"],
)
def test_workers_keep_the_policy_beside_the_driver(
    policy: str, before: str, tmp_path: Path, variables: dict[str, str]
) -> None:
    """`ray.init()` starts them in the driver's directory, and what the driver did before is not their assignment."""
    done = run(before + LOCAL, tmp_path, variables, policy, join="")
    (told,) = done.told
    assert sorted(assigned for _, assigned in told) == [["0"], ["1"]]
    assert [done.gpus(pid) for pid, _ in told] == [[int(assigned[0])] for _, assigned in told]
    applied = {record["pid"] for record in done.records if record["event"] == "policy_applied"}
    assert {pid for pid, _ in told} <= applied


def test_a_driver_that_narrows_its_gpus_starts_a_cluster_of_those(tmp_path: Path, variables: dict[str, str]) -> None:
    """Ray counts the GPUs of CUDA_VISIBLE_DEVICES, which the policy wrote when the driver imported TensorFlow."""
    program = """
print(json.dumps([ray.init(include_dashboard=False, object_store_memory=80 << 20) and ray.cluster_resources()["GPU"]]))
tell(ray.remote(num_gpus=1)(User).remote().use.remote())
"""
    uuid = '"GPU-a2fa4e00", "GPU-a3fa4e00"'
    policy = f"[gpu]\nvisible_devices = [{uuid}]\nmemory_growth = true\n"
    done = run(IMPORTS_FIRST + program, tmp_path, variables, policy, join="")
    (count,), ((pid, assigned),) = done.told
    assert (count, assigned) == (2, ["2"])
    assert done.gpus(pid) == [2]


# ---- the recipe

PAGE = ROOT / "docs" / "recipes" / "ray.md"


@pytest.mark.parametrize("name", ["actors.py", "task.py"])
def test_the_recipe_is_true(name: str, tmp_path: Path, variables: dict[str, str], cluster: str) -> None:
    """The policy and a program of the page print what it shows. The workers find the policy in the working_dir."""
    (tmp_path / "tfgpu.toml").write_text(blocks("toml", pages=[PAGE])[0].text)
    (text,) = [block.text for block in blocks("python", pages=[PAGE]) if block.text.startswith(f"# {name}\n")]
    (tmp_path / name).write_text(f"{text}\nimport time; time.sleep(2)  # the lines of workers come with a delay\n")
    shown = [command for block in blocks("console", pages=[PAGE]) for command in commands(block.text)]
    (command,) = [command for command in shown if command.words == ("python", name)]
    done = subprocess.run(
        [sys.executable, name],
        cwd=tmp_path, env=variables | {"RAY_ADDRESS": cluster}, capture_output=True, text=True, check=False,
        timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith(("[", "1"))]
    assert printed == list(command.output)
    half = "at most 50% by Ray's num_gpus=0.5 (tfgpu.toml)"
    assert ((done.stderr + done.stdout).count(half) > 0) == (name == "actors.py"), done.stderr + done.stdout
