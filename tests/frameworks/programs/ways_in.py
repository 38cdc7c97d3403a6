"""What programs do with TensorFlow: the ways in, the calls before them, and a greedy allocation after them.

Each function is a step of a case and returns what a test may want to know, as JSON. The modules of TensorFlow
are used as programs use them; nothing here knows of tfenv.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import tensorflow as tf

v1 = tf.compat.v1
MIB = 1 << 20
#: What greedy allocations take at a time, and where they give up.
PIECE_MIB = 100
PLENTY_MIB = 3000


# ---- taking memory


def _piece() -> Any:
    return tf.zeros([PIECE_MIB, MIB // 4])


def take(device: str = "/GPU:0") -> int:
    """Take memory in pieces until TensorFlow refuses; MiB that were taken, or PLENTY_MIB."""
    held: list[Any] = []
    with tf.device(device):
        while len(held) * PIECE_MIB < PLENTY_MIB:
            try:
                held.append(_piece())
            except tf.errors.ResourceExhaustedError as error:
                if _is_about(device, str(error)):
                    break
    return len(held) * PIECE_MIB


def _is_about(device: str, text: str) -> bool:
    """Whether it is this device that is full: TensorFlow raises the error of one thread in others that compute, too."""
    return "by allocator" not in text or f"device:GPU:{device.rpartition(':')[2]} by allocator" in text


def take_all() -> list[int]:
    """Take the memory of every logical GPU, of all at once."""
    devices = [device.name for device in tf.config.list_logical_devices("GPU")]
    taken = [0] * len(devices)

    def work(index: int) -> None:
        taken[index] = take(devices[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(devices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def too_big(size_mib: str = "1200") -> str:
    """One tensor that is bigger than the limit."""
    with tf.device("/GPU:0"):
        try:
            tf.zeros([int(size_mib), MIB // 4])
        except tf.errors.ResourceExhaustedError:
            return "ResourceExhaustedError"
    return "allocated"


# ---- ways in: eager


def eager() -> str:
    return str(tf.zeros([8]).device)


def keras_fit() -> list[int]:
    model = tf.keras.Sequential([tf.keras.Input([4]), tf.keras.layers.Dense(3), tf.keras.layers.Dense(1)])
    model.compile("adam", "mse")
    history = model.fit(tf.zeros([16, 4]), tf.zeros([16, 1]), epochs=1, batch_size=4, verbose=0)
    return list(history.epoch)


def tf_function() -> str:
    @tf.function  # type: ignore[untyped-decorator]
    def doubled(x: Any) -> Any:
        return x + x

    return str(doubled(tf.ones([16])).device)


def variable() -> str:
    return str(tf.Variable([1.0, 2.0]).device)


def dataset() -> int:
    return sum(1 for _ in tf.data.Dataset.range(3).prefetch(1))


def tf_device() -> str:
    with tf.device("/GPU:1"):
        return str(tf.zeros([8]).device)


def enable_eager_execution(fraction: str) -> str:
    """The way to give eager execution a ConfigProto."""
    config = v1.ConfigProto()
    config.gpu_options.per_process_gpu_memory_fraction = float(fraction)
    v1.enable_eager_execution(config=config)
    return eager()


def impatient() -> None:
    """Have TensorFlow refuse at once what it cannot allocate, instead of waiting ten seconds."""
    from tensorflow.python.eager import context

    # No public call gives eager execution this option: enable_eager_execution does nothing where it is on.
    context.context()._config = _session_config("")


def list_logical_devices() -> list[str]:
    return [device.name for device in tf.config.list_logical_devices("GPU")]


def get_memory_info() -> dict[str, int]:
    info = tf.config.experimental.get_memory_info("GPU:0")
    tf.zeros([8])
    return dict(info)


# ---- ways in: tf.distribute


def _replicas(strategy: Any) -> int:
    with strategy.scope():
        tf.Variable([1.0, 2.0])
    return int(strategy.num_replicas_in_sync)


def mirrored() -> int:
    return _replicas(tf.distribute.MirroredStrategy())


def one_device() -> int:
    return _replicas(tf.distribute.OneDeviceStrategy("/GPU:1"))


#: Below the ports that the kernel gives to whoever asks for any: one of those may be taken before it is used here.
_PORTS = range(10_000, 32_000)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody uses, in a part of the range that is this process's own among the others of these tests."""
    found: list[int] = []
    first = os.getpid() * 16 % len(_PORTS)
    for port in (*_PORTS[first:], *_PORTS[:first]):
        if _can_bind(port):
            found.append(port)
        if len(found) == count:
            break
    return found


def _can_bind(port: int) -> bool:
    with socket.socket() as server:
        try:
            server.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _in_child(work: Callable[[], object]) -> int:
    """Start a forked child, as a program does that starts its own workers."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            sys.stderr.flush()
            os._exit(0)
    return pid


def _call(step: str) -> None:
    name, _, argument = step.partition(":")
    function = globals()[name]
    _ = function(argument) if argument else function()


def multi_worker(before: str = "nothing") -> int:
    """MultiWorkerMirroredStrategy with two processes, each of which calls `before` first; this one is the chief.

    The other one is forked before anything lists devices: CUDA does not survive a fork.
    """
    workers = [f"127.0.0.1:{port}" for port in _free_ports(2)]

    def work(index: int) -> int:
        task = {"type": "worker", "index": index}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
        _call(before)
        ring = tf.distribute.experimental.CommunicationImplementation.RING
        options = tf.distribute.experimental.CommunicationOptions(implementation=ring)
        replicas = _replicas(tf.distribute.MultiWorkerMirroredStrategy(communication_options=options))
        take_all()
        return replicas

    other = _in_child(lambda: work(1))
    replicas = work(0)
    os.waitpid(other, 0)
    return replicas


def parameter_server(before: str = "nothing") -> str:
    """ParameterServerStrategy; a worker and a parameter server run in children. Each process calls `before` first."""
    jobs = ("worker", "ps", "chief")
    cluster = {job: [f"127.0.0.1:{port}"] for job, port in zip(jobs, _free_ports(3), strict=True)}

    def serve(job: str) -> None:
        _call(before)
        tf.distribute.Server(tf.train.ClusterSpec(cluster), job_name=job, task_index=0).join()

    for job in ("worker", "ps"):
        _in_child(partial(serve, job))
    _call(before)
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(cluster), rpc_layer="grpc", task_type="chief", task_id=0
    )
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        weights = tf.Variable([1.0, 2.0])

    @tf.function  # type: ignore[untyped-decorator]
    def step() -> Any:
        with tf.device("/GPU:0"):
            return tf.identity(weights) + tf.random.uniform([2])

    value = coordinator.schedule(step)
    coordinator.join()
    return str(value.fetch().shape)


def server() -> dict[str, int]:
    """tf.distribute.Server, with a session that is greedy on it."""
    spec = tf.train.ClusterSpec({"worker": [f"127.0.0.1:{_free_ports(1)[0]}"]})
    running = tf.distribute.Server(spec, job_name="worker", task_index=0)
    return _greedy_session(v1.Session, running.target, None)


# ---- ways in: sessions


def _session_config(text: str) -> Any:
    """A ConfigProto from "key=value" pairs: `allow_growth=1+per_process_gpu_memory_fraction=0.4`.

    It also has TensorFlow refuse at once what it cannot allocate, instead of waiting ten seconds.
    """
    config = v1.ConfigProto()
    options = config.gpu_options
    options.experimental.disallow_retry_on_allocation_failure = True
    for pair in filter(None, text.split("+")):
        key, _, value = pair.partition("=")
        if key == "device_count":
            config.device_count["GPU"] = int(value)
        elif key == "virtual_devices":
            for sizes in value.split("|"):
                entry = options.experimental.virtual_devices.add()
                entry.memory_limit_mb.extend(float(size) for size in sizes.split(",") if size)
        elif key == "priority":
            for entry in options.experimental.virtual_devices:
                entry.priority.extend(int(part) for part in value.split(","))
        elif key == "visible_device_list":
            options.visible_device_list = value
        else:
            holder = options if key in options.DESCRIPTOR.fields_by_name else options.experimental
            setattr(holder, key, type(getattr(holder, key))(float(value)))
    return config


def _greedy_session(make: Callable[..., Any], target: str, config: Any) -> dict[str, int]:
    """How many GPUs a session has, and the most MiB one of its runs could take on the first."""
    with tf.Graph().as_default():
        shape = v1.placeholder(tf.int32, [2])
        name = "/CPU:0"
        with make(target, config=config) as session:
            gpus = [device.name for device in session.list_devices() if device.device_type == "GPU"]
            if gpus:
                name = gpus[0]
            with tf.device(name):
                # Grappler cannot fold what depends on a placeholder: each of them is allocated at run time.
                filled = tf.fill(shape, 1.0)
            taken = 0
            while gpus and taken < PLENTY_MIB:
                try:
                    session.run(filled.op, {shape: [taken + PIECE_MIB, MIB // 4]})
                except tf.errors.ResourceExhaustedError:
                    break
                taken += PIECE_MIB
    return {"gpus": len(gpus), "taken": taken}


def session(text: str = "") -> dict[str, int]:
    """A compat.v1.Session, with its own ConfigProto where one is described."""
    return _greedy_session(v1.Session, "", _session_config(text) if text else None)


def small_session(text: str = "") -> int:
    """A compat.v1.Session that asks for nothing; how many GPUs it has."""
    with tf.Graph().as_default(), v1.Session(config=_session_config(text) if text else None) as running:
        return sum(device.device_type == "GPU" for device in running.list_devices())


def interactive_session() -> int:
    with tf.Graph().as_default():
        running = v1.InteractiveSession()
        found = len(running.list_devices())
        running.close()
    return found


def monitored_session() -> float:
    with tf.Graph().as_default():
        v1.train.get_or_create_global_step()
        with tf.device("/GPU:0"):
            two = tf.random.uniform([2])
        with v1.train.MonitoredTrainingSession() as running:
            return len(running.run(two))


# ---- ways in: listing


def list_local_devices() -> list[int]:
    from tensorflow.python.client import device_lib

    return [device.memory_limit // MIB for device in device_lib.list_local_devices() if device.device_type == "GPU"]


def is_gpu_available() -> bool:
    return bool(tf.test.is_gpu_available())


def gpu_device_name() -> str:
    return str(tf.test.gpu_device_name())


def list_physical_devices() -> int:
    return len(tf.config.list_physical_devices("GPU"))


# ---- ways in: grappler


def _meta_graph() -> Any:
    with tf.Graph().as_default() as graph:
        with tf.device("/GPU:0"):
            total = tf.random.uniform([16]) + 1.0
        graph.add_to_collection("train_op", total.op)
        return v1.train.export_meta_graph(graph=graph)


def measure_costs() -> int:
    from tensorflow.python.grappler import cluster, item

    found = cluster.Cluster(disable_detailed_stats=True)
    found.MeasureCosts(item.Item(_meta_graph()))
    return len(found.ListDevices())


def optimize_graph() -> int:
    from tensorflow.python.grappler import tf_optimizer

    config = v1.ConfigProto()
    config.graph_options.rewrite_options.min_graph_nodes = -1
    return len(tf_optimizer.OptimizeGraph(config, _meta_graph()).node)


# ---- what programs call before


def set_memory_growth(which: str = "all") -> list[bool]:
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus if which == "all" else gpus[:1]:
        tf.config.experimental.set_memory_growth(gpu, which != "off")
    return [tf.config.experimental.get_memory_growth(gpu) for gpu in gpus]


def set_growth_off() -> None:
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, False)


def set_logical_devices(sizes: str) -> None:
    """`set_logical_devices:300` for GPU 0, `600,600` in two, `300;300` for two GPUs."""
    for gpu, text in zip(tf.config.list_physical_devices("GPU"), sizes.split(";"), strict=False):
        parts = [tf.config.LogicalDeviceConfiguration(memory_limit=int(size)) for size in text.split(",")]
        tf.config.set_logical_device_configuration(gpu, parts)


def set_virtual_devices(size: str) -> None:
    gpu = tf.config.list_physical_devices("GPU")[0]
    part = tf.config.experimental.VirtualDeviceConfiguration(memory_limit=int(size))
    tf.config.experimental.set_virtual_device_configuration(gpu, [part])


def set_visible_devices(which: str) -> list[str]:
    gpus = tf.config.list_physical_devices("GPU")
    chosen = [gpus[int(position)] for position in which.split(",")] if which != "none" else []
    tf.config.set_visible_devices(chosen, "GPU")
    return [gpu.name for gpu in tf.config.get_visible_devices("GPU")]


def hide_gpus() -> None:
    """The way to say "CPU only"; unlike `set_visible_devices:none` nothing is listed first."""
    tf.config.set_visible_devices([], "GPU")


def set_soft_placement() -> None:
    tf.config.set_soft_device_placement(True)


def set_environment(pair: str) -> None:
    name, _, value = pair.partition("=")
    os.environ[name] = value


def unset_environment(name: str) -> None:
    os.environ.pop(name, None)


# ---- processes


def nothing() -> None:
    """Only `import tensorflow`."""


def threads() -> list[int]:
    """Many threads, each with a first operation of its own."""
    results: list[int] = []

    def work() -> None:
        results.append(len(tf.zeros([8])))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


def forked() -> int:
    """A forked child of a program that has imported TensorFlow is greedy."""
    child = _in_child(take_all)
    return os.waitpid(child, 0)[1]


def forked_pool() -> list[int]:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(_take_little, range(2))


def spawned() -> list[int]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(_take_little, range(1))


def _take_little(number: int) -> int:
    time.sleep(0.05 * number)
    return take()


def executed() -> str:
    """A program this one starts, which lists its devices."""
    import subprocess

    text = "import tensorflow as tf; tf.zeros([8]); print(len(tf.config.list_physical_devices('GPU')))"
    result = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def program(text: str) -> None:
    """Run a text, as a program that has imported TensorFlow."""
    exec(compile(text, "program.py", "exec"), {"__name__": "__main__"})


def environment_variable(name: str) -> str | None:
    return os.environ.get(name)
