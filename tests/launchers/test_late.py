"""Launchers that assign GPUs after Python started: real Ray and real Dask, with a small stand-in for TensorFlow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import SimulatedGpus
from tfenv.deploy import launch

RAY = """
import json, os, ray

ray.init(num_gpus=3, num_cpus=3, include_dashboard=False, logging_level="ERROR", _node_ip_address="127.0.0.1")

@ray.remote(num_gpus=1)
class Actor:
    def see(self):
        import tensorflow
        return os.environ["CUDA_VISIBLE_DEVICES"], ray.get_runtime_context().get_accelerator_ids()["GPU"]

actors = [Actor.remote() for _ in range(2)]
print(json.dumps(ray.get([actor.see.remote() for actor in actors])))
"""

DASK = """
import json, os
from distributed import Client, Nanny, Scheduler
from distributed.utils import sync

def see():
    import tensorflow
    return os.environ["CUDA_VISIBLE_DEVICES"], [os.environ["GIVEN"]]

async def main():
    async with Scheduler(port=0, dashboard_address=None, host="127.0.0.1") as scheduler:
        workers = [
            Nanny(scheduler.address, name=gpu, nthreads=1, host="127.0.0.1", dashboard_address=None,
                  env={"CUDA_VISIBLE_DEVICES": gpu, "GIVEN": gpu})
            for gpu in ("1", "2")
        ]
        async with workers[0], workers[1], Client(scheduler.address, asynchronous=True) as client:
            seen = await client.run(see)
            print(json.dumps(list(seen.values())))

if __name__ == "__main__":
    import asyncio
    asyncio.run(main())
"""


def run(program: str, folder: Path, simulated_gpus: SimulatedGpus, policy: str) -> list[tuple[str, list[str]]]:
    """Run a program under a policy. Return what each worker sees and what it was given."""
    (folder / "tensorflow").mkdir()
    (folder / "tensorflow" / "__init__.py").write_text("")
    (folder / "tfgpu.toml").write_text(policy)
    (folder / "program.py").write_text(program)
    env = launch.build_environment(simulated_gpus()) | {"RAY_USAGE_STATS_ENABLED": "0", "HOME": str(folder)}
    env["PYTHONPATH"] = os.pathsep.join((str(folder), env.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [(seen, given) for seen, given in json.loads(done.stdout.strip().splitlines()[-1])]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("module", "program"), [("ray", RAY), ("distributed", DASK)], ids=["Ray's actors", "Dask's workers"]
)
@pytest.mark.parametrize(
    "policy", ["[gpu]\nvisible_devices = [0]\n", "[ceiling]\nrequire_grant = true\n"], ids=["[0]", "require_grant"]
)
def test_a_worker_has_the_gpu_that_it_was_assigned(
    module: str, program: str, policy: str, tmp_path: Path, simulated_gpus: SimulatedGpus
) -> None:
    """What the launcher writes while the worker runs is its grant: positions count in it, and it satisfies a job."""
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed here")
    seen = run(program, tmp_path, simulated_gpus, policy)
    assert len({own for own, _ in seen}) == 2
    assert all(given == [own] for own, given in seen)
