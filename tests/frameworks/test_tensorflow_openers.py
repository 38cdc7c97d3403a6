"""What opens CUDA, or makes devices, beside TensorFlow's doors."""

from __future__ import annotations

from pathlib import Path

from tests.frameworks.harness import MIB, World, run_program

POLICY = World('[gpu]\nvisible_devices = [1, 2]\nmemory_growth = true\nmemory_limit = "1000MiB"\n')

PROFILER = """
import os
import tensorflow as tf
os.environ["CUDA_VISIBLE_DEVICES"] = "0"
tf.profiler.experimental.start("trace")
tf.profiler.experimental.stop()
print(len(tf.config.list_physical_devices("GPU")))
tf.zeros([8])
"""


def test_a_profiler_that_opens_cuda_first_finds_the_visibility_settled(tmp_path: Path, needs_tensorflow: None) -> None:
    """The profiler's start calls cuInit: a list the program wrote before it is intersected with the policy."""
    ended = run_program(POLICY, PROFILER, tmp_path)
    assert ended.stdout == "2\n", ended.stderr
    assert {request.gpu for request in ended.requests if request.op == "alloc"} == {1}


OTHER_LIBRARY = """
import ctypes, os
import tensorflow as tf
os.environ["CUDA_VISIBLE_DEVICES"] = "0,1,2,3"
ctypes.CDLL("libcuda.so.1").cuInit(0)
try:
    tf.zeros([8])
    print(len(tf.config.list_physical_devices("GPU")))
except RuntimeError as error:
    print(type(error).__name__)
"""


def test_cuda_opened_wider_by_somebody_else_is_a_finding(tmp_path: Path, needs_tensorflow: None) -> None:
    """Another library read the program's wider list first: it cannot be narrowed any more, and the record says so."""
    ended = run_program(POLICY, OTHER_LIBRARY, tmp_path)
    assert ended.stdout == "4\n", ended.stderr
    assert any("4 GPUs, the policy allows 2" in line for line in ended.ours)
    assert "too-late" in {found["code"] for record in ended.records for found in record["findings"]}
    held = sum(request.bytes for request in ended.requests if request.op == "alloc")
    assert 0 < held <= 1000 * MIB


def test_cuda_opened_wider_fails_where_the_policy_asks_for_that(tmp_path: Path, needs_tensorflow: None) -> None:
    """`on_error = "fail"`: no device is created on GPUs that the policy does not allow."""
    ended = run_program(World('on_error = "fail"\n' + str(POLICY.policy)), OTHER_LIBRARY, tmp_path)
    assert ended.stdout == "PolicyError\n", ended.stderr
    assert not [request for request in ended.requests if request.op == "alloc"]


XLA_DEVICES = """
import os
os.environ["TF_XLA_FLAGS"] = "--tf_xla_enable_xla_devices --tf_xla_cpu_global_jit"
import tensorflow as tf
print(len(tf.config.list_physical_devices("GPU")), len(tf.config.list_logical_devices("XLA_GPU")))
tf.zeros([8])
print(os.environ["TF_XLA_FLAGS"])
"""


def test_devices_that_know_no_limit_are_not_made(tmp_path: Path, needs_tensorflow: None) -> None:
    """The deprecated XLA_GPU devices have an allocator of their own: under a limit the flag for them is cleared."""
    ended = run_program(POLICY, XLA_DEVICES, tmp_path)
    assert ended.stdout == "2 0\n--tf_xla_cpu_global_jit\n", ended.stderr
    assert any("XLA_GPU" in found["message"] for record in ended.records for found in record["findings"])
