"""What one clamp costs at an entry point: a ConfigProto in, a clamped one out, on 8 GPUs. The bar is 0.3 ms.

    python benchmarks/clamp.py [--rounds N] [--gpus N]

Needs TensorFlow for its ConfigProto; opens no device. Measured as an entry point does it: parse, clamp, serialise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

from tfenv.frameworks.tensorflow.config_proto import PolicyView, clamp, make_view
from tfenv.policy.model import Device, MemoryLimit, Plan, PlannedDevice

BAR_MS = 0.3
GIB = 1 << 30


def view_of(gpus: int, limit: MemoryLimit | None) -> PolicyView:
    """The policy on so many cards of 80 GiB."""
    devices = tuple(
        PlannedDevice(str(index), Device(index, f"GPU-{index}", "Card", 80 * GIB), limit) for index in range(gpus)
    )
    return make_view(Plan(devices=devices, growth=True), range(gpus))


def messages(gpus: int) -> dict[str, bytes]:
    """What programs send through an entry point, as bytes."""
    from tensorflow.core.protobuf import config_pb2

    fraction, split = config_pb2.ConfigProto(), config_pb2.ConfigProto()
    fraction.gpu_options.per_process_gpu_memory_fraction = 0.9
    for _ in range(gpus):
        split.gpu_options.experimental.virtual_devices.add().memory_limit_mb.extend([30000, 30000])
    return {"empty": b"", "fraction": fraction.SerializeToString(), "split in two": split.SerializeToString()}


def time_ms(action: Callable[[], object], rounds: int) -> list[float]:
    """Milliseconds of each round."""
    times = []
    for _ in range(rounds):
        began = perf_counter()
        action()
        times.append((perf_counter() - began) * 1000)
    return times


def entry_point(data: bytes, view: PolicyView, config_class: Any) -> bytes:
    """What an entry point does with the bytes of a ConfigProto."""
    config = config_class.FromString(data)
    clamped = clamp(config, view)
    return data if clamped.config is None else bytes(clamped.config.SerializeToString())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--gpus", type=int, default=8)
    arguments = parser.parse_args()
    from tensorflow.core.protobuf import config_pb2

    policies = {"8 GiB": MemoryLimit(bytes=8 * GIB), "40 %": MemoryLimit(fraction=0.4), "growth only": None}
    print(f"{arguments.gpus} GPUs, {arguments.rounds} rounds; bar: {BAR_MS} ms")
    for policy, limit in policies.items():
        view = view_of(arguments.gpus, limit)
        for name, data in messages(arguments.gpus).items():
            times = time_ms(partial(entry_point, data, view, config_pb2.ConfigProto), arguments.rounds)
            worst = sorted(times)[int(len(times) * 0.99)]
            print(f"{policy:>12}  {name:<13} median {median(times):.3f} ms   99 % below {worst:.3f} ms")


if __name__ == "__main__":
    main()
