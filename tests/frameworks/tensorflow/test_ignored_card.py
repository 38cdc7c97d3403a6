"""A card that TensorFlow leaves out of its list, but uses where nothing else is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frameworks.harness import World, run_program
from tfenv.simulate.driver_requests import summarise_requests

pytestmark = pytest.mark.tensorflow

#: TensorFlow ignores a card with far fewer multiprocessors than the best. Its eager context counts the listed ones
#: from 0 all the same, and so names the one that it ignores.
PROGRAM = """
import tensorflow as tf
print([device.name for device in tf.config.list_physical_devices("GPU")])
tf.zeros([1])
"""


def test_a_card_that_tensorflow_ignores_keeps_the_limit(tmp_path: Path) -> None:
    """Where the ignored card lies first, the limit holds on whatever card TensorFlow takes, and the record names it."""
    ended = run_program(
        World('[gpu]\nmemory_limit = "2GiB"\n', gpus="2x24GiB"),
        PROGRAM,
        tmp_path,
        TFGPU_SIMULATE="count=2,memory_mib=24576:24576,multiprocessors=4:108",
        CUDA_DEVICE_ORDER="PCI_BUS_ID",
    )
    assert ended.status == 0, ended.stderr
    assert "GPU:1" in ended.stdout
    assert "GPU:0" not in ended.stdout
    peaks = [total.peak_process for total in summarise_requests(ended.requests).values()]
    assert 0 < max(peaks) <= 2 << 30
    applied = [record for record in ended.records if record["event"] == "policy_applied"]
    assert [device["limit_bytes"] for device in applied[-1]["devices"]] == [2 << 30]
