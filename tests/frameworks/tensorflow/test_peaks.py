"""What is on record at the end of a TensorFlow program: the peak of each GPU, as TensorFlow itself tells it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.frameworks.harness import Ended, World, run_program
from tfenv.frameworks.tensorflow.peaks import add_up_parts, read_peaks
from tfenv.policy.model import DeviceOutcome

MIB = 1 << 20
SPLIT = """
[gpu]
visible_devices = [0, 1]
memory_growth = true
memory_limit = "1000MiB"
[[gpu.device]]
match = 1
memory_limit = "1000MiB"
logical_devices = ["600MiB", "400MiB"]
"""

#: Holds 200 MiB of the first GPU and gives them back, then 10 of it, 60 and 40 of the parts of the second.
EAGER = """
import json
import tensorflow as tf
for gpu, sizes in enumerate([(200, 10), (60,), (40,)]):
    with tf.device(f"GPU:{gpu}"):
        for size in sizes:
            held = tf.zeros([size, 1024, 256])
            del held
told = [tf.config.experimental.get_memory_info(f"GPU:{gpu}")["peak"] for gpu in range(3)]
print(json.dumps(told))
"""

SESSION = """
import tensorflow.compat.v1 as tf
tf.disable_v2_behavior()
with tf.Session() as session:
    print(session.run(tf.zeros([4])))
"""

CPU = """
import tensorflow as tf
tf.config.set_visible_devices([], "GPU")
print(tf.zeros([4]))
"""

POOL = """
import multiprocessing

def work(size):
    import tensorflow as tf
    with tf.device("GPU:0"):
        held = tf.zeros([size, 1024, 256])
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]

if __name__ == "__main__":
    pool = multiprocessing.get_context("fork").Pool(1)
    print(pool.map(work, [100]))
    pool.close()
    pool.join()
"""

CLUSTER = """
import json, os, socket, subprocess, sys
if len(sys.argv) == 1:
    ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    workers = [f"127.0.0.1:{port.getsockname()[1]}" for port in ports]
    for port in ports:
        port.close()
    started = []
    for index in range(2):
        task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
        variables = {**os.environ, "TF_CONFIG": json.dumps(task), "CUDA_VISIBLE_DEVICES": str(index)}
        started.append(subprocess.Popen([sys.executable, __file__, "worker"], env=variables))
    sys.exit(max(one.wait() for one in started))
import tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
with tf.device("GPU:0"):
    held = tf.zeros([100, 1024, 256])
"""


def read_ends(ended: Ended) -> list[dict[str, Any]]:
    assert ended.status == 0, ended.stderr
    return [record for record in ended.records if record["event"] == "policy_ended"]


@pytest.mark.tensorflow
@pytest.mark.matrix
def test_the_peak_of_each_card_is_what_tensorflow_tells(needs_tensorflow: None, tmp_path: Path) -> None:
    """Not what is held in the end, and of a card that is split the sum of its parts."""
    ended = run_program(World(SPLIT), EAGER, tmp_path)
    (record,) = read_ends(ended)
    first, *parts = json.loads(ended.stdout)
    assert 200 * MIB <= first < 300 * MIB
    assert [device["peak_bytes"] for device in record["devices"]] == [first, sum(parts)]
    assert [device["limit_bytes"] for device in record["devices"]] == [1000 * MIB, 1000 * MIB]
    assert record["duration_ms"] > 0


@pytest.mark.tensorflow
@pytest.mark.exhaustive
def test_a_session_has_an_end_without_peaks(needs_tensorflow: None, tmp_path: Path) -> None:
    """Its allocators tell nobody in Python, and nothing is created only to ask them."""
    (record,) = read_ends(run_program(World(SPLIT), SESSION, tmp_path))
    assert [device.get("peak_bytes") for device in record["devices"]] == [None, None]


@pytest.mark.tensorflow
@pytest.mark.exhaustive
def test_a_program_on_the_cpu_has_no_end(needs_tensorflow: None, tmp_path: Path) -> None:
    """It created no GPU."""
    assert read_ends(run_program(World(SPLIT), CPU, tmp_path)) == []


@pytest.mark.tensorflow
@pytest.mark.exhaustive
def test_a_worker_of_a_pool_has_an_end_with_its_peak(needs_tensorflow: None, tmp_path: Path) -> None:
    """A forked worker that came to its end by itself. The parent never imported TensorFlow."""
    ended = run_program(World('[gpu]\nmemory_limit = "1000MiB"\n'), POOL, tmp_path)
    (record,) = read_ends(ended)
    assert record["devices"][0]["peak_bytes"] == json.loads(ended.stdout)[0] >= 100 * MIB


@pytest.mark.tensorflow
@pytest.mark.exhaustive
def test_each_worker_of_a_cluster_has_the_peak_of_its_own_gpu(needs_tensorflow: None, tmp_path: Path) -> None:
    """The context of a cluster lists the other's GPUs, too. To ask for one of them would crash the process."""
    records = read_ends(run_program(World('[gpu]\nmemory_limit = "1000MiB"\n'), CLUSTER, tmp_path))
    assert len({record["pid"] for record in records}) == 2
    assert all(record["devices"][0]["peak_bytes"] >= 100 * MIB for record in records)


WHOLE = DeviceOutcome(0, "0", "GPU-aaaa", limit=8)
HALVES = DeviceOutcome(1, "1", "GPU-bbbb", limit=8, logical_devices=(4, 4))


def test_the_peak_of_a_split_card_is_the_sum_of_its_parts() -> None:
    """TensorFlow numbers the parts one after the other."""
    assert add_up_parts((HALVES, WHOLE), (1, 2, 4)) == ((HALVES, 3), (WHOLE, 4))


@pytest.mark.parametrize("peaks", [(), (1, 2), (1, 2, 3, 4)])
def test_peaks_of_other_devices_than_were_created_are_not_told(peaks: tuple[int, ...]) -> None:
    """Nobody knows which is whose."""
    assert add_up_parts((HALVES, WHOLE), peaks) == ()


def test_without_tensorflow_there_is_no_peak() -> None:
    """Nothing is imported to ask for it."""
    assert read_peaks({"TFE_ContextOptionsSetConfig": (WHOLE,), "TF_NewSessionOptions": (WHOLE,)}) == ()
