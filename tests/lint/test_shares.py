"""What `tfgpu check` says of "granted" on a machine whose Slurm gives shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lint.test_combinations import find_remarks, list_codes

GRANTED = 'ceiling.memory_limit = "granted"'


@pytest.fixture(autouse=True)
def slurm_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster whose nodes have GPUs and shards."""
    path = tmp_path / "slurm.conf"
    path.write_text("ClusterName=lab\nGresTypes=gpu,shard\n")
    monkeypatch.setenv("SLURM_CONF", str(path))
    return path


@pytest.mark.parametrize(
    "text",
    [
        GRANTED,
        'gpu.memory_limit = "granted"',
        'user.root.ceiling.memory_limit = "granted"',
        'project."/srv".gpu.memory_limit = "granted"',
        '[[gpu.device]]\nmatch = "GPU-1"\nmemory_limit = "granted"',
    ],
)
def test_shards_need_their_number(text: str, slurm_file: Path) -> None:
    """Wherever the machine's file says "granted", it must say how many shards a GPU has."""
    (remark,) = find_remarks(text)
    assert (remark.code, remark.severity) == ("no-shards-per-gpu", "warning")
    assert remark.message == (
        f"Slurm gives shards here ({slurm_file}: GresTypes) and does not tell a job of how many; "
        "write shards_per_gpu in the table [machine], too"
    )


@pytest.mark.parametrize(
    "text", [f"{GRANTED}\nmachine.shards_per_gpu = 4", 'ceiling.memory_limit = "50%"', "gpu.memory_growth = true"]
)
def test_where_nothing_is_missing_nothing_is_said(text: str) -> None:
    """The number is there, or nothing needs it."""
    assert list_codes(text) == []


@pytest.mark.parametrize("slurm", ["GresTypes=gpu,mps\n", "#GresTypes=gpu,shard\n", "GresTypes=gpu # shard\n", None])
def test_without_shards_nothing_is_said(slurm: str | None, slurm_file: Path) -> None:
    """Slurm gives whole GPUs here, or there is no Slurm."""
    slurm_file.unlink() if slurm is None else slurm_file.write_text(slurm)
    assert list_codes(GRANTED) == []


def test_a_project_cannot_know_it() -> None:
    """Only the machine's file has the key."""
    assert list_codes(GRANTED, "project") == []
