"""What opens CUDA, or makes devices, beside TensorFlow's entry points."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frameworks.harness import MIB, Case, World, run_program
from tests.frameworks.tensorflow.test_ways_in import Reports

POLICY = World('[gpu]\nvisible_devices = [1, 2]\nmemory_growth = true\nmemory_limit = "1000MiB"\n')


def of_program(text: str) -> pytest.MarkDecorator:
    """Give a test the case of a program for which nothing matters before its import: a fork of one that has it."""
    return pytest.mark.parametrize("case", [pytest.param(Case(POLICY, (f"program:{text}",)), id="forked")])


PROFILER = """
import os
import tensorflow as tf
os.environ["CUDA_VISIBLE_DEVICES"] = "0"
tf.profiler.experimental.start("trace")
tf.profiler.experimental.stop()
print(len(tf.config.list_physical_devices("GPU")))
tf.zeros([8])
"""


@of_program(PROFILER)
def test_a_profiler_that_opens_cuda_first_finds_the_visibility_settled(case: Case, reports: Reports) -> None:
    """The profiler's start calls cuInit: a list the program wrote before it is intersected with the policy."""
    report = reports(case)
    assert report.stdout == "2\n", report.stderr
    assert set(report.gpus) == {1}


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


@of_program(OTHER_LIBRARY)
def test_cuda_opened_wider_by_somebody_else_is_a_finding(case: Case, reports: Reports) -> None:
    """Another library read a wider list first: only the policy's GPUs are used all the same, and the record says so."""
    report = reports(case)
    assert report.stdout == "4\n", report.stderr
    assert any(
        "lists 2 GPUs that the policy does not allow, because something opened CUDA" in line for line in report.ours
    )
    assert "too-late" in report.codes
    allocations = [request for request in report.requests if request.op == "alloc"]
    assert {request.gpu for request in allocations} == {1}
    assert sum(request.bytes for request in allocations) <= 1000 * MIB


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


ANOTHER_CARD = """
import ctypes, os
os.environ["CUDA_VISIBLE_DEVICES"] = "3"
ctypes.CDLL("libcuda.so.1").cuInit(0)
import tensorflow as tf
tf.zeros([8])
"""


def test_as_many_gpus_but_others_are_told_by_their_uuid(tmp_path: Path, needs_tensorflow: None) -> None:
    """One GPU is allowed and one is listed, and it is another: counting would not see that."""
    ended = run_program(World("[gpu]\nvisible_devices = [0]\n"), ANOTHER_CARD, tmp_path)
    assert any(
        "lists 1 GPU that the policy does not allow, because something opened CUDA" in line for line in ended.ours
    ), ended.stderr
    codes = {found["code"] for record in ended.records for found in record["findings"]}
    assert "too-late" in codes


LAUNCHER = """
import os, subprocess, sys
import tensorflow as tf
child = "import tensorflow as tf; tf.zeros([8])"
for rank in "01":
    subprocess.run([sys.executable, "-c", child], env={**os.environ, "CUDA_VISIBLE_DEVICES": rank}, check=True)
"""


def test_a_launchers_list_for_each_child_stays_within_the_policy(tmp_path: Path, needs_tensorflow: None) -> None:
    """A parent that writes CUDA_VISIBLE_DEVICES for its children asks for them; GPUs 0 and 1 are not the policy's."""
    ended = run_program(World("[gpu]\nvisible_devices = [2, 3]\nmemory_growth = true\n"), LAUNCHER, tmp_path)
    assert ended.status == 0, ended.stderr
    assert {request.gpu for request in ended.requests if request.op == "alloc"} <= {2, 3}
    assert "no-overlap" in {found["code"] for record in ended.records for found in record["findings"]}


FORK_IN_AN_ENTRY_POINT = """
import os, signal, threading, time
import tensorflow as tf
config = tf.compat.v1.ConfigProto(device_count={"GPU": 0})
def pass_entry_point():
    tf.compat.v1.Session(config=config).close()
thread = threading.Thread(target=pass_entry_point)
thread.start()
time.sleep(0.002)
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    from tensorflow.python.client import pywrap_tf_session
    pywrap_tf_session.TF_NewSessionOptions(target=b"", config=config)
    os._exit(0)
thread.join()
print(os.waitpid(pid, 0)[1])
"""


@of_program(FORK_IN_AN_ENTRY_POINT)
def test_a_fork_waits_until_an_entry_point_is_left(case: Case, reports: Reports) -> None:
    """The child does not inherit locks that a thread held in an entry point of the parent's."""
    report = reports(case)
    assert (report.error, report.stdout) == (None, "0\n"), report.stderr


HANDLER = """
import signal
import tensorflow as tf
from tfenv.frameworks.tensorflow import config_proto
class Timeout(Exception): pass
def ring(*_): raise Timeout
signal.signal(signal.SIGALRM, ring)
original = config_proto.clamp
def interrupted(*args):
    config_proto.clamp = original
    signal.raise_signal(signal.SIGALRM)
    return original(*args)
config_proto.clamp = interrupted
try:
    tf.compat.v1.Session()
except Timeout:
    print("heard")
tf.zeros([8])
"""


@of_program(HANDLER)
def test_an_exception_of_the_programs_own_passes_an_entry_point(case: Case, reports: Reports) -> None:
    """A signal handler that raises while an entry point is passed reaches the program, and the next try is limited."""
    report = reports(case)
    assert report.stdout == "heard\n", report.stderr
    assert max(request.held for request in report.requests) <= 1000 * MIB


LATER = """
import os
import tensorflow as tf
os.environ["CUDA_VISIBLE_DEVICES"] = "0"
tf.zeros([8])
"""


@of_program(LATER)
def test_what_the_listing_finds_is_on_record(case: Case, reports: Reports) -> None:
    """A list the program wrote after the import, and that names none of the policy's GPUs, is in the audit log."""
    (applied,) = [record for record in reports(case).records if record["event"] != "policy_loaded"]
    assert "no-overlap" in {found["code"] for found in applied["findings"]}


MIXED = World('[gpu]\nmemory_limit = "30GiB"\n', gpus="2x24GiB:NVIDIA A30,1x80GiB:NVIDIA H100")
HALF = """
import tensorflow as tf
options = tf.compat.v1.GPUOptions(per_process_gpu_memory_fraction=0.5)
session = tf.compat.v1.Session(config=tf.compat.v1.ConfigProto(gpu_options=options))
print([device.memory_limit_bytes >> 20 for device in session.list_devices() if "GPU" in device.name])
"""


def test_a_fraction_is_each_cards_own_where_only_some_reach_the_limit(tmp_path: Path, needs_tensorflow: None) -> None:
    """Half of 24 GiB is less than the limit of 30, half of 80 is more: TensorFlow takes no fraction beside sizes."""
    ended = run_program(MIXED, HALF, tmp_path)
    assert ended.stdout == "[30720, 12288, 12288]\n", ended.stderr  # CUDA counts the fastest first


ONE_WORKER = """
import tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
print(len(tf.config.list_logical_devices("GPU")))
"""
SPLIT = """
[gpu]
visible_devices = [0, 1]
memory_limit = "1000MiB"
[[gpu.device]]
match = 0
logical_devices = ["500MiB", "500MiB"]
"""


def test_a_cluster_gets_the_policys_split(tmp_path: Path, needs_tensorflow: None) -> None:
    """The ServerDef of a cluster carries a ConfigProto of its own, which must agree with the context's."""
    ended = run_program(World(SPLIT), ONE_WORKER, tmp_path)
    assert ended.stdout == "3\n", ended.stderr
