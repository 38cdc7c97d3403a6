"""A GPU that is looked at and then split: TensorFlow keeps what it first made, and the limit holds for all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frameworks.harness import Ended, World, run_program

pytestmark = pytest.mark.tensorflow

TF2 = """
import tensorflow as tf
{look}
gpu = tf.config.list_physical_devices("GPU")[0]
part = tf.config.LogicalDeviceConfiguration(memory_limit=1000)
tf.config.set_logical_device_configuration(gpu, [part] * 3)
keep = []
for device in tf.config.list_logical_devices("GPU"):
    with tf.device(device.name):
        try:
            for _ in range(15):
                keep.append(tf.zeros([25, 1024, 1024]))
        except (tf.errors.ResourceExhaustedError, tf.errors.FailedPreconditionError):
            print(device.name, "is full")
"""

TF1 = """
import tensorflow.compat.v1 as tf
tf.disable_v2_behavior()
tf.Session().close()
config = tf.ConfigProto()
config.gpu_options.experimental.virtual_devices.add(memory_limit_mb=[1000] * 3)
parts = []
for part in range(3):
    with tf.device(f"/gpu:{part}"):
        parts.append([tf.get_variable(f"v{part}{n}", [25, 1024, 1024], initializer=tf.zeros_initializer())
                      for n in range(12)])
with tf.Session(config=config) as session:
    for variables in parts:
        try:
            for variable in variables:
                session.run(variable.initializer)
        except (tf.errors.ResourceExhaustedError, tf.errors.FailedPreconditionError):
            pass  # TensorFlow has waited ten seconds for somebody to free memory
"""

LIMIT = '[gpu]\nmemory_growth = true\nmemory_limit = "1000MiB"\n'
PERCENT = '[gpu]\nmemory_growth = true\nmemory_limit = "4%"\n'


def peak_mib(ended: Ended) -> float:
    from tfenv.simulate.driver_requests import summarise_requests

    return summarise_requests(ended.requests)[0].peak_process / (1 << 20)


@pytest.mark.parametrize(
    ("policy", "text", "limit"),
    [
        pytest.param(LIMIT, TF2.format(look="tf.test.gpu_device_name()"), 1000, id="look"),
        pytest.param(LIMIT, TF1, 1000, id="TF1", marks=pytest.mark.exhaustive),
        pytest.param(
            PERCENT,
            TF2.format(look="tf.test.gpu_device_name()"),
            983.04,
            id="percentage",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_a_look_and_a_split_stay_within_the_limit(policy: str, text: str, limit: float, tmp_path: Path) -> None:
    """The driver gives no more than the limit, and the record says what was asked and what was given."""
    ended = run_program(World(policy, gpus="1x24GiB"), text, tmp_path, TF_CPP_MIN_LOG_LEVEL="3")
    assert ended.status == 0, ended.stderr
    assert limit - 100 <= peak_mib(ended) <= limit
    last = [record for record in ended.records if record.get("asked", {}).get("virtual_devices")][-1]
    assert last["asked"]["virtual_devices"] == [[1000.0, 1000.0, 1000.0]]
    assert sum(last["given"]["virtual_devices"][0]) <= limit
    assert any("Earlier sessions" in finding["message"] for finding in last["findings"])
