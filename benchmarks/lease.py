"""What an automatic choice costs: time to a lease among 1, 10 and 100 processes, and the first listing of devices.

    python benchmarks/lease.py [--rounds N] [--listings N]

The first part starts processes together, on four simulated cards. What each asks for fits beside all others, so that
nobody waits for a card, only for the lock on the directory. The second part lists devices in real TensorFlow under the
hook, on simulated GPUs, alternately with `visible_devices = [0]` and with `{count = 1}`. The bar is 100 ms more. The
second part needs TensorFlow.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tfenv.deploy import launch
from tfenv.sharing.queue import Acquired, acquire
from tfenv.sharing.request import Candidate, GpuRequest
from tfenv.simulate.environment import build_environment, parse_gpus

REPOSITORY = Path(__file__).parents[1]
BAR_MS = 100.0
CONTENDERS = (1, 10, 100)
GIB = 1 << 30
#: Seconds in which all processes of a round start, before they ask.
_START_SECONDS = 0.3

LISTING = """
import sys, time
import tensorflow as tf
began, cpu = time.perf_counter(), time.process_time()
gpus = tf.config.list_physical_devices("GPU")
took = time.perf_counter() - began, time.process_time() - cpu
print(len(gpus), took[0] * 1000, took[1] * 1000, sys.dont_write_bytecode)
"""


# ---- time to a lease


def measure_lease(at: float) -> float:
    """Ask at that moment, and return the milliseconds until the lease is written."""
    gpu_request = GpuRequest(os.geteuid(), tuple(Candidate(f"GPU-{number}", 96 * GIB, GIB) for number in range(4)), 1)
    time.sleep(max(0.0, at - time.monotonic()))
    began = time.perf_counter()
    assert isinstance(acquire(gpu_request, dict, keep_waiting=lambda _: True), Acquired)
    return (time.perf_counter() - began) * 1000


def measure_contention(contenders: int) -> list[float]:
    """Start so many processes that ask together, and return the milliseconds of each."""
    with tempfile.TemporaryDirectory(prefix="tfgpu-lease-") as folder:
        os.environ.update(TFGPU_SIMULATE="count=4", TFGPU_SIMULATE_LOG=f"{folder}/log")
        at = time.monotonic() + _START_SECONDS
        readers = []
        for _ in range(contenders):
            reader, writer = os.pipe()
            if os.fork() == 0:
                os.write(writer, json.dumps(measure_lease(at)).encode())
                os._exit(0)
            os.close(writer)
            readers.append(reader)
        for _ in range(contenders):
            os.wait()
        return [_read(reader) for reader in readers]


def _read(reader: int) -> float:
    with os.fdopen(reader, "rb") as file:
        return float(file.read())


def print_contention(rounds: int) -> None:
    """Print one line per number of contenders."""
    times: dict[int, list[float]] = {number: [] for number in CONTENDERS}
    for _ in range(rounds):
        for number in CONTENDERS:
            times[number] += measure_contention(number)
    print(f"milliseconds to a lease, {rounds} rounds in turn")
    for number, found in times.items():
        worst = sorted(found)[int(len(found) * 0.99)]
        print(f"{number:>4} at once   median {median(found):7.2f}   99 % below {worst:7.2f}   last {max(found):7.2f}")


# ---- the first listing


def measure_listing(policy: str, folder: Path) -> tuple[float, float, str]:
    """Measure the first listing under the policy: milliseconds by the clock, of processor time, and "True" or "False".

    "True" tells that no bytecode is written.
    """
    (folder / "tfgpu.toml").write_text(f'{policy}[audit]\nfile = "none"\nstderr = "none"\n')
    base = {key: value for key, value in os.environ.items() if not key.startswith(("TFGPU_", "CUDA_", "TF_"))}
    base |= {"PYTHONPATH": str(REPOSITORY), "TF_CPP_MIN_LOG_LEVEL": "3"}
    env = launch.build_environment(build_environment(parse_gpus("4x24GiB"), log=folder / "log", base=base))
    done = subprocess.run(
        [sys.executable, "-c", LISTING], env=env, cwd=folder, capture_output=True, text=True, check=True
    )
    gpus, wall, cpu, without = done.stdout.split()
    assert gpus == "1", "the policy does not hold: a benchmark of nothing"
    return float(wall), float(cpu), without


def print_listings(rounds: int) -> None:
    """Print the medians of both policies, and of the differences within each round."""
    policies = {"[0]": "[gpu]\nvisible_devices = [0]\n", "{count = 1}": "[gpu]\nvisible_devices = {count = 1}\n"}
    found: dict[str, list[tuple[float, float, str]]] = {name: [] for name in policies}
    with tempfile.TemporaryDirectory(prefix="tfgpu-listing-") as folder:
        for policy in policies.values():
            measure_listing(policy, Path(folder))  # so that caches are warm
        for number in range(rounds):
            for name in sorted(policies, reverse=bool(number % 2)):
                found[name].append(measure_listing(policies[name], Path(folder)))
    bytecode = "not written" if found["[0]"][0][2] == "True" else "present"
    print(f"first listing of devices, {rounds} rounds in turn, bytecode {bytecode}; bar: {BAR_MS:.0f} ms more")
    for name, times in found.items():
        print(f"{name:>12}  median {median(t[0] for t in times):7.1f} ms   CPU {median(t[1] for t in times):7.1f} ms")
    pairs = list(zip(found["{count = 1}"], found["[0]"], strict=True))
    wall, cpu = (median(chosen[part] - plain[part] for chosen, plain in pairs) for part in (0, 1))  # type: ignore[operator]
    print(f"  difference  median {wall:+7.1f} ms   CPU {cpu:+7.1f} ms")


def main() -> None:
    """Read the options, and print both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--listings", type=int, default=10)
    arguments = parser.parse_args()
    print_contention(arguments.rounds)
    if importlib.util.find_spec("tensorflow") is not None:
        print_listings(arguments.listings)


if __name__ == "__main__":
    main()
