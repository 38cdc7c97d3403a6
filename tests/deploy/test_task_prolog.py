"""What the TaskProlog says to Slurm: which file is the site's for a task, and whose value it replaces."""

from __future__ import annotations

from pathlib import Path

import pytest

from tfenv.deploy.task_prolog import format_task_prolog

TASK = {"SLURM_JOB_PARTITION": "gpu", "SLURM_JOB_ID": "14", "SLURM_STEP_ID": "0"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a file for each of the partitions `gpu` and `long`."""
    for name in ("gpu", "long"):
        (tmp_path / f"{name}.toml").touch()
    return tmp_path


def apply(lines: tuple[str, ...], environ: dict[str, str]) -> dict[str, str]:
    """The environment of the task, as Slurm changes it."""
    changed = dict(environ)
    for line in lines:
        verb, _, text = line.partition(" ")
        name, _, value = text.partition("=")
        if verb == "export":
            changed[name] = value
        else:
            assert verb == "unset"
            changed.pop(name, None)
    return changed


def test_a_task_has_the_file_of_its_partition_as_the_sites(folder: Path) -> None:
    """The variable has the absolute path. The stamp has the step and the same path."""
    assert format_task_prolog(TASK, str(folder)) == (
        f"export TFGPU_SITE_CONFIG={folder}/gpu.toml",
        f"export TFGPU_SLURM_SITE=14.0 {folder}/gpu.toml",
    )


@pytest.mark.parametrize("partition", ["debug", "../gpu", ".gpu", "x/gpu"])
def test_a_partition_without_a_file_has_none(partition: str, folder: Path) -> None:
    """Nothing is printed, also for names that are no names of partitions."""
    (folder / ".gpu.toml").touch()
    assert format_task_prolog({**TASK, "SLURM_JOB_PARTITION": partition}, str(folder / "..") + f"/{folder.name}") == ()


def test_a_file_that_leads_nowhere_is_named(folder: Path) -> None:
    """The task reports it. Without its name the task would have no policy, and nobody would know."""
    (folder / "lost.toml").symlink_to("nowhere")
    lines = format_task_prolog({**TASK, "SLURM_JOB_PARTITION": "lost"}, str(folder))
    assert lines[0] == f"export TFGPU_SITE_CONFIG={folder}/lost.toml"


def test_a_job_from_within_a_job_has_its_own_partitions_file(folder: Path) -> None:
    """What the TaskProlog set for the outer step is replaced. In a partition without a file it is removed."""
    outer = apply(format_task_prolog(TASK, str(folder)), TASK)
    inner = {**outer, "SLURM_JOB_ID": "15", "SLURM_JOB_PARTITION": "long"}
    assert apply(format_task_prolog(inner, str(folder)), inner)["TFGPU_SITE_CONFIG"] == f"{folder}/long.toml"
    inner["SLURM_JOB_PARTITION"] = "debug"
    left = apply(format_task_prolog(inner, str(folder)), inner)
    assert not [name for name in left if name.startswith("TFGPU_")]


@pytest.mark.parametrize("mine", ["/home/alice/site.toml", ""])
def test_what_somebody_else_set_is_kept(mine: str, folder: Path) -> None:
    """A value of a user, a hub or an image, also one that a batch script set after the TaskProlog had set its own."""
    assert format_task_prolog({**TASK, "TFGPU_SITE_CONFIG": mine}, str(folder)) == ()
    batch = apply(format_task_prolog(TASK, str(folder)), TASK)
    assert format_task_prolog({**batch, "TFGPU_SITE_CONFIG": mine}, str(folder)) == ()


def test_a_users_config_is_never_touched(folder: Path) -> None:
    """TFGPU_CONFIG replaces the project's file. The site's file is beneath both."""
    lines = format_task_prolog({**TASK, "TFGPU_CONFIG": "mine.toml"}, str(folder))
    assert [line.partition("=")[0] for line in lines] == ["export TFGPU_SITE_CONFIG", "export TFGPU_SLURM_SITE"]


def test_outside_of_slurm_it_says_so(folder: Path) -> None:
    """Without a partition there is nothing to do."""
    with pytest.raises(ValueError, match="SLURM_JOB_PARTITION is not set"):
        format_task_prolog({}, str(folder))
