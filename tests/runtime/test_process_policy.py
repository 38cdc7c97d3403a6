"""Two frameworks in one process: one policy of the process, one choice, one grant, and what each can keep of it.

The second framework is a small one made for these tests. TensorFlow is the real one, on simulated GPUs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SimulatedGpus
from tests.selection import mark_rest
from tfenv.simulate.driver_requests import read_requests, summarise_requests

pytestmark = pytest.mark.tensorflow

#: A framework that opens GPUs in one function, and keeps growth and one limit for all of them.
SECOND = """
import os

def open_devices():
    return os.environ.get("CUDA_VISIBLE_DEVICES")
"""

#: Registers it, as its module in frameworks/ would be.
REGISTER = """
import json, os, sys
import _tfenv_boot
from tfenv.frameworks import registry
from tfenv.policy.model import DeviceOutcome, Outcome

class Second:
    name, title, first_listing, public_api = "second", "Second", "open_devices", "second.set_limit"
    supports = frozenset(("growth", "limit"))
    opened = False

    def version(self):
        return "1.0"

    def devices_exist(self, *, gpu_is_open):
        return self.opened

    def read_peaks(self, created):
        return ()

    def can_use_gpus(self):
        return True

    def find_master(self, earlier):
        return None

    def release_memory(self):
        return getattr(sys.modules["second"], "is_idle", False)

    def prepare(self, plan, environ):
        return []

    def intercept(self, policy):
        module = sys.modules["second"]
        original = module.open_devices

        def open_devices():
            policy.before_listing()
            self.opened = True
            planned = policy.identify_devices()
            devices = () if policy.is_cpu_only() else policy.get_plan().devices or ()
            self.limits = [device.limit.on(device.total) >> 20 if device.limit else None for device in devices]
            created = [
                DeviceOutcome(number, device.token, device.identity, limit=limit and limit << 20)
                for number, (device, limit) in enumerate(zip(devices, self.limits))
            ]
            policy.report(Outcome("applied", "open_devices", tuple(created)))
            return original()

        module.open_devices = open_devices
        return ()

    def apply_publicly(self, policy):
        raise AssertionError("nothing is missing")

registry.register(Second())
_tfenv_boot.WATCHED += ("second",)

def tell(*results):
    from tfenv.runtime.enforce import get_current
    process = get_current()
    names = [] if process is None else list(process.frameworks)
    outcomes = {name: [o.entry_point for o in process.frameworks[name].outcomes] for name in names}
    print(json.dumps({"frameworks": names, "outcomes": outcomes, "results": results,
                      "leases": 0 if process is None else len(process.leases)}))
"""


class Told:
    """What a program printed, and what it left in the log."""

    def __init__(self, done: subprocess.CompletedProcess[str], log: Path) -> None:
        assert done.returncode == 0, done.stderr
        self.stderr = done.stderr
        self.answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        self.records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def findings(self, framework: str) -> set[str]:
        """Codes of the findings in the records of one framework."""
        records = [record for record in self.records if record.get("framework") == framework]
        return {finding["code"] for record in records for finding in record["findings"]}


def run(program: str, policy: str, tmp_path: Path, simulated_gpus: SimulatedGpus) -> Told:
    (tmp_path / "second.py").write_text(SECOND)
    log = tmp_path / "audit.jsonl"
    (tmp_path / "tfgpu.toml").write_text(f'{policy}\n[audit]\nfile = "audit.jsonl"\n')
    (tmp_path / "train.py").write_text(REGISTER + program)
    done = subprocess.run(
        [sys.executable, "train.py"],
        env=simulated_gpus("4x24GiB", log=tmp_path / "requests"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    return Told(done, log)


BOTH = """
import second, tensorflow as tf
gpus = len(tf.config.list_logical_devices("GPU"))
tell(gpus, second.open_devices())
"""
SECOND_FIRST = """
import second
visible = second.open_devices()
import tensorflow as tf
tell(len(tf.config.list_logical_devices("GPU")), visible)
"""


@pytest.mark.parametrize(
    "program",
    [BOTH, pytest.param(SECOND_FIRST, marks=pytest.mark.exhaustive)],
    ids=["tensorflow-first", "second-first"],
)
def test_two_frameworks_share_the_policy_of_their_process(
    program: str, tmp_path: Path, simulated_gpus: SimulatedGpus
) -> None:
    """One process policy, two framework policies: the same GPUs whatever lists them first, a record for each."""
    told = run(program, "[gpu]\nvisible_devices = [1, 2]\nmemory_growth = true", tmp_path, simulated_gpus)
    # TensorFlow imports JAX where it is installed.
    assert sorted({*told.answer["frameworks"]} - {"jax"}) == ["second", "tensorflow"]
    assert told.answer["results"] == [2, "1,2"]
    outcomes = {"second": ["open_devices"], "tensorflow": ["TFE_ContextOptionsSetConfig"]}
    assert {name: passed for name, passed in told.answer["outcomes"].items() if passed} == outcomes
    events = [(record["framework"], record["event"]) for record in told.records if record["event"] != "policy_ended"]
    first = events[0][0]
    assert [event for framework, event in events if framework == first] == ["policy_loaded", "policy_applied"]
    assert [event for framework, event in events if framework != first] == ["policy_applied"]


@pytest.mark.parametrize(
    "program",
    [pytest.param(BOTH, marks=pytest.mark.exhaustive), SECOND_FIRST],
    ids=["tensorflow-first", "second-first"],
)
def test_two_frameworks_share_one_free_gpu(program: str, tmp_path: Path, simulated_gpus: SimulatedGpus) -> None:
    """`{count = 1}` is chosen once for the process, and held by one lease."""
    policy = '[gpu]\nvisible_devices = {count = 1}\nmemory_limit = "1000MiB"'
    told = run(f"import second; second.is_idle = True\n{program}", policy, tmp_path, simulated_gpus)
    assert told.answer["results"] == [1, "0"]
    assert told.answer["leases"] == 1


SPLIT = """
[gpu]
memory_growth = true

[[gpu.device]]
match = 0
memory_limit = "2GiB"
logical_devices = ["1GiB", "1GiB"]

[[gpu.device]]
match = 1
memory_limit = "4GiB"
"""


def test_what_a_framework_cannot_keep_is_a_finding_of_that_framework(
    tmp_path: Path, simulated_gpus: SimulatedGpus
) -> None:
    """The second framework neither splits a GPU nor has a limit for each. TensorFlow does both, and hears nothing."""
    told = run(BOTH, f"{SPLIT}\n[ceiling]\nallowed_devices = [0, 1]", tmp_path, simulated_gpus)
    assert told.answer["results"][0] == 3
    assert "unsupported" in told.findings("second")
    assert "unsupported" not in told.findings("tensorflow")


def test_a_framework_alone_needs_no_tensorflow(tmp_path: Path, simulated_gpus: SimulatedGpus) -> None:
    """A process that imports only the second framework has one framework policy, and never loads TensorFlow."""
    program = "import second\nvisible = second.open_devices()\ntell(visible, 'tensorflow' in sys.modules)"
    told = run(program, "[gpu]\nvisible_devices = [3]", tmp_path, simulated_gpus)
    assert told.answer["frameworks"] == ["second"]
    assert told.answer["results"] == ["3", False]


SHARING = """
import second
second.is_idle = {idle}

def take(mib):
    import tensorflow as tf
    held = []
    try:
        while len(held) * 100 < mib:
            held.append(tf.zeros([100, 1 << 18]))
    except tf.errors.ResourceExhaustedError:
        pass
    return len(tf.config.list_logical_devices("GPU"))

def open_tensorflow():
    return take(1500)

def open_second():
    from tfenv.frameworks.registry import get_framework
    second.open_devices()
    return get_framework("second").limits

tell({first}(), {second}())
"""
ONE_LIMIT = '[gpu]\nvisible_devices = [1]\nmemory_growth = true\nmemory_limit = "1000MiB"\n'


def share(
    tmp_path: Path, simulated_gpus: SimulatedGpus, *order: str, policy: str = ONE_LIMIT, idle: bool = False
) -> tuple[Told, float]:
    """What TensorFlow and the second framework get in this order, and the most TensorFlow took of GPU 1, in MiB."""
    first, second = (f"open_{name}" for name in order)
    told = run(SHARING.format(first=first, second=second, idle=idle), policy, tmp_path, simulated_gpus)
    totals = summarise_requests(read_requests(tmp_path / "requests"))
    assert set(totals) <= {1}
    return told, totals[1].peak_process / (1 << 20) if 1 in totals else 0


def test_the_first_framework_has_the_limit_and_the_second_no_gpu(tmp_path: Path, simulated_gpus: SimulatedGpus) -> None:
    """The second framework took the budget, so TensorFlow sees no GPU, takes nothing of it, and says why."""
    told, peak = share(tmp_path, simulated_gpus, "second", "tensorflow")
    assert told.answer["results"] == [[1000], 0]
    assert peak == 0
    assert told.findings("tensorflow") == {"budget-spent"}
    assert "tfgpu: NO GPU for TensorFlow: tfgpu.toml:4:1: gpu.memory_limit: Second has all of the" in told.stderr


@pytest.mark.exhaustive
def test_tensorflow_first_leaves_nothing(tmp_path: Path, simulated_gpus: SimulatedGpus) -> None:
    """TensorFlow was created with all of the limit and keeps it. The second framework gets no GPU."""
    told, peak = share(tmp_path, simulated_gpus, "tensorflow", "second")
    assert told.answer["results"] == [1, []]
    assert 900 <= peak <= 1000
    assert told.findings("second") == {"budget-spent"}


def test_an_idle_framework_gives_its_budget_back(tmp_path: Path, simulated_gpus: SimulatedGpus) -> None:
    """A framework that holds no memory of a GPU leaves all of the limit to the one that wants some."""
    told, peak = share(tmp_path, simulated_gpus, "second", "tensorflow", idle=True)
    assert told.answer["results"] == [[1000], 1]
    assert 900 <= peak <= 1000


def test_declared_shares_hold_by_what_the_driver_was_asked(tmp_path: Path, simulated_gpus: SimulatedGpus) -> None:
    """With `[gpu.frameworks]` each framework takes its share and no more."""
    policy = f'{ONE_LIMIT}[gpu.frameworks]\ntensorflow = "400MiB"\n'
    told, peak = share(tmp_path, simulated_gpus, "tensorflow", "second", policy=policy)
    assert told.answer["results"] == [1, [600]]
    assert 300 <= peak <= 400


LATE = """
import second
sys.modules["_tfenv_boot"].WATCHED = ()
sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__name__", "") != "TfenvFinder"]
import tensorflow as tf
{before}
import tfenv
_tfenv_boot.WATCHED = ("tensorflow", "second")
status = tfenv.apply()
tell([outcome.status for outcome in status.outcomes], list(status.frameworks))
"""
WAYS = {
    "listing": "from tensorflow.python.client import device_lib; device_lib.list_local_devices()",
    "session": "tf.compat.v1.Session().close()",
    "server": "tf.distribute.Server.create_local_server()",
    "gpu_device_name": "tf.test.gpu_device_name()",
    "eager": "tf.constant(1)",
}


@pytest.mark.parametrize("way", mark_rest(WAYS, ("listing",)))
def test_applying_after_devices_is_too_late_whatever_created_them(
    way: str, tmp_path: Path, simulated_gpus: SimulatedGpus
) -> None:
    """Sessions, listings and servers leave no trace in Python, and take the GPUs all the same."""
    told = run(LATE.format(before=WAYS[way]), '[gpu]\nmemory_limit = "1000MiB"', tmp_path, simulated_gpus)
    assert told.answer["results"][0][-1:] == ["too_late"]


@pytest.mark.parametrize(
    "before",
    [
        pytest.param("", id="imported", marks=pytest.mark.exhaustive),
        pytest.param("tf.config.list_physical_devices()", id="listed"),
    ],
)
def test_applying_before_devices_is_in_time(before: str, tmp_path: Path, simulated_gpus: SimulatedGpus) -> None:
    """An import takes nothing, and neither does a listing of physical devices."""
    told = run(LATE.format(before=before), '[gpu]\nmemory_limit = "1000MiB"', tmp_path, simulated_gpus)
    assert "too_late" not in told.answer["results"][0]
