"""Real engines for the tests: each is started once for all tests of a process, and only if a test needs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.slurm_cluster import SlurmCluster, explain_missing_slurm


def start_slurm(
    tmp_path_factory: pytest.TempPathFactory, *, shared: str = "shard", constrain_devices: bool = False
) -> Iterator[SlurmCluster]:
    """Start a cluster, and stop it when the fixture ends."""
    missing = explain_missing_slurm()
    if missing is not None:
        pytest.skip(missing)
    cluster = SlurmCluster(
        tmp_path_factory.mktemp("slurm") / "cluster", shared=shared, constrain_devices=constrain_devices
    )
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A node with four GPUs of four shards each."""
    yield from start_slurm(tmp_path_factory)


@pytest.fixture(scope="session")
def slurm_with_mps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A node with four GPUs whose memory MPS divides."""
    yield from start_slurm(tmp_path_factory, shared="mps")


@pytest.fixture(scope="module")
def slurm_with_cgroups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A node that shows a job its own GPUs alone, and counts them from 0."""
    yield from start_slurm(tmp_path_factory, constrain_devices=True)
