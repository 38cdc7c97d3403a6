"""A card whose memory NVML does not tell: some WSL installations, containers without the utility library."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frameworks.harness import World, run_program
from tfenv.simulate.driver_requests import summarise_requests

pytestmark = pytest.mark.tensorflow

POLICY = """
[gpu]
memory_limit = "8GiB"
[ceiling]
memory_limit = "50%"
"""
PROGRAM = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))
import tensorflow as tf
assert tf.config.list_physical_devices("GPU")
tf.zeros([1])
print(*sorted(device.name for device in tf.config.list_logical_devices()))
"""
#: NVML's answer "not supported" to how much memory a card has.
NO_MEMORY = "count=1,memory_mib=12288,memory_error=3"


def _peak(requests: tuple[object, ...]) -> int:
    return max(total.peak_process for total in summarise_requests(requests).values())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "granted", [pytest.param(None, id="unset", marks=pytest.mark.exhaustive), pytest.param("0", id="granted")]
)
def test_cuda_tells_the_memory_that_nvml_does_not(granted: str | None, tmp_path: Path) -> None:
    """The smaller of 8 GiB and half of 12 GiB holds, and the record says that the wish was cut."""
    variables = {"TFGPU_SIMULATE": NO_MEMORY} | ({} if granted is None else {"CUDA_VISIBLE_DEVICES": granted})
    ended = run_program(World(POLICY, gpus="1x12GiB"), PROGRAM, tmp_path, **variables)
    assert ended.status == 0, ended.stderr
    assert _peak(ended.requests) == 6 << 30
    applied = next(record for record in ended.records if record["event"] == "policy_applied")
    assert [device["limit_bytes"] for device in applied["devices"]] == [6 << 30]
    assert [finding["code"] for finding in applied["findings"]] == ["clamped"]


def test_cuda_tells_the_memory_where_nvml_cannot_be_asked(tmp_path: Path) -> None:
    """Without nvidia-ml-py the smaller limit holds, too."""
    program = PROGRAM.replace("sys.argv[1:]", "['pynvml']")
    ended = run_program(World(POLICY, gpus="1x12GiB"), program, tmp_path)
    assert ended.status == 0, ended.stderr
    assert _peak(ended.requests) == 6 << 30


@pytest.mark.parametrize(
    ("on_error", "peak"), [("warn", 8 << 30), pytest.param("cpu", None, marks=pytest.mark.exhaustive), ("fail", None)]
)
def test_a_share_that_nobody_can_compute_is_an_error(on_error: str, peak: int | None, tmp_path: Path) -> None:
    """Where CUDA does not tell either, `on_error` decides, and the line says what is not kept."""
    world = World(f'on_error = "{on_error}"\n{POLICY}', gpus="1x12GiB")
    ended = run_program(world, PROGRAM, tmp_path, TFGPU_SIMULATE=f"{NO_MEMORY},uuid_error=1")
    assert any("neither NVML nor CUDA says how much memory" in line for line in (*ended.ours, ended.stderr))
    assert any(f["code"] == "unknown-memory" for record in ended.records for f in record["findings"])
    assert (ended.status != 0) == (on_error == "fail")
    if peak is None:
        assert not summarise_requests(ended.requests)
    else:
        assert _peak(ended.requests) == peak
