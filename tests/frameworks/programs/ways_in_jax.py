"""What programs do with JAX on GPUs: steps of cases, see `harness`. `zygote` imports this, and with it JAX."""

from __future__ import annotations

import multiprocessing
import os
import threading
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

MIB = 1 << 20
_kept: list[Any] = []
_RATE = 0.1


def _list_gpus() -> list[jax.Device]:
    return [device for device in jax.devices() if device.platform == "gpu"]


# ---- before the first client


def env(text: str) -> None:
    """Set a variable after the import."""
    name, _, value = text.partition("=")
    os.environ[name] = value


def config(text: str) -> None:
    """Set a setting of jax.config."""
    name, _, value = text.partition("=")
    jax.config.update(name, value)


def option(text: str) -> None:
    """Set an option of the client as a value of its type."""
    name, _, value = text.partition("=")
    values: dict[str, object] = {"True": True, "False": False}
    number = float(value) if "." in value else value
    jax.config.update("jax_pjrt_client_create_options", {name: values.get(value, number)})


# ---- listing and taking


def devices() -> list[str]:
    return [device.platform for device in jax.devices()]


def gpu_ids() -> list[int]:
    return [device.local_hardware_id for device in _list_gpus()]


def devices_of(platform: str) -> list[str]:
    return [device.platform for device in jax.devices(platform)]


def _take(mib: int, number: int = 0) -> None:
    block = jax.device_put(np.zeros((mib, MIB), np.uint8), _list_gpus()[number])
    block.block_until_ready()
    _kept.append(block)


def take_200() -> int:
    _take(200)
    return 200


def take() -> int:
    """Take 100 MiB of the first GPU, and 950 beside them."""
    _take(100)
    _take(950)
    return 1050


def take_much(number: str = "0") -> int:
    """Take 1500 MiB of a GPU in blocks of 300."""
    for _ in range(5):
        _take(300, int(number))
    return 1500


def limits_mib() -> list[int]:
    return [device.memory_stats()["bytes_limit"] // MIB for device in _list_gpus()]


# ---- computing


def jit() -> list[int]:
    result = jax.jit(lambda x: x @ x + 1)(jnp.ones((64, 64)))
    return list(result.block_until_ready().shape)


def pmap() -> list[int]:
    count = jax.local_device_count()
    result = jax.pmap(lambda x: x * 2)(np.ones((count, 1024), np.float32))
    return list(result.block_until_ready().shape)


def shard() -> list[int]:
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    values = jax.device_put(np.ones((8 * jax.device_count(), 16), np.float32), sharding)
    return list(jax.jit(lambda x: x + 1)(values).block_until_ready().shape)


def sgd() -> list[int]:
    """A step of gradient descent."""

    def loss(weights: jax.Array, data: jax.Array) -> jax.Array:
        return jnp.mean((data * weights) ** 2)

    weights, data = jnp.ones((16,)), jnp.ones((8, 16))
    weights -= _RATE * jax.jit(jax.grad(loss))(weights, data)
    return list(weights.block_until_ready().shape)


def optax_step() -> list[int]:
    import optax

    optimiser, weights = optax.adam(_RATE), jnp.ones((16,))
    state = optimiser.init(weights)
    updates, _ = optimiser.update(jnp.ones((16,)), state)
    return list(optax.apply_updates(weights, updates).block_until_ready().shape)


def keras_fit() -> list[str]:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), keras.layers.Dense(1)])
    model.compile(loss="mse", optimizer="sgd")
    model.fit(np.ones((32, 8), np.float32), np.ones((32, 1), np.float32), batch_size=16, verbose=0)
    return [keras.backend.backend(), *sorted({device.platform for device in jax.devices()})]


# ---- several clients, threads, processes


def drop() -> None:
    """Let go of what was taken."""
    _kept.clear()


def clear_backends() -> None:
    jax.extend.backend.clear_backends()


def threads() -> list[int]:
    """List devices in eight threads at once."""
    barrier, found = threading.Barrier(8), list[int]()

    def list_devices() -> None:
        barrier.wait()
        found.append(len(_list_gpus()))

    started = [threading.Thread(target=list_devices) for _ in range(8)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return found


def _answer(queue: Any) -> None:
    queue.put((devices(), take_200()))


def spawned() -> list[object]:
    """List devices and take memory in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_answer, args=(queue,))
    process.start()
    answer = list(queue.get(timeout=100))
    process.join()
    return answer


def forked() -> int:
    """Use GPUs in a forked child. Return how it ended."""
    pid = os.fork()
    if pid == 0:
        try:
            take_200()
        except Exception:  # noqa: BLE001
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
