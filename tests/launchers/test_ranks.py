"""The local rank, by whichever launcher's variable."""

from __future__ import annotations

import pytest

from tfenv.launchers.grant import read_grant

BOOT = "b0"


def read_rank(**variables: str) -> int | None:
    grant, _ = read_grant({}, variables, BOOT)
    return grant.rank


@pytest.mark.parametrize(
    "variable",
    [
        "LOCAL_RANK",
        "HOROVOD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MPI_LOCALRANKID",
        "PMI_LOCAL_RANK",
        "PALS_LOCAL_RANKID",
        "JSM_NAMESPACE_LOCAL_RANK",
        "FLUX_TASK_LOCAL_ID",
        "SLURM_LOCALID",
    ],
)
def test_each_launcher_tells_the_rank(variable: str) -> None:
    """The variable is the process's place among those of the job on this host, whatever the others say of the job."""
    assert read_rank(**{variable: "3"}) == 3


@pytest.mark.parametrize("inner", ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "FLUX_TASK_LOCAL_ID"])
def test_the_launcher_nearest_to_the_process_counts(inner: str) -> None:
    """A launcher inside of a Slurm step finds SLURM_LOCALID set, which is its own rank and not its tasks'."""
    assert read_rank(SLURM_JOB_ID="14", SLURM_LOCALID="0", **{inner: "2"}) == 2


@pytest.mark.parametrize("value", ["", "-1", "one", "٣", "1" * 5000])
def test_what_is_no_number_is_no_rank(value: str) -> None:
    """The next variable is asked, and none of them breaks a program."""
    assert read_rank(LOCAL_RANK=value) is None
    assert read_rank(LOCAL_RANK=value, SLURM_LOCALID="1") == 1


SLURM = {"SLURM_JOB_ID": "14", "SLURM_LOCALID": "1", "SLURM_PROCID": "5"}


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        (SLURM, "5"),
        ({**SLURM, "OMPI_COMM_WORLD_RANK": "2"}, "2"),
        ({**SLURM, "OMPI_COMM_WORLD_RANK": "2", "RANK": "7"}, "7"),
        ({**SLURM, "RANK": "first"}, "5"),
    ],
)
def test_a_job_has_the_rank_among_all_its_processes(variables: dict[str, str], rank: str) -> None:
    """mpirun inside of a Slurm job starts many processes in one task of Slurm's."""
    grant, _ = read_grant({}, variables, BOOT)
    assert grant.job == {"scheduler": "slurm", "id": "14", "rank": rank}


def test_a_rank_alone_is_no_job() -> None:
    """RANK is too common a name to mean a launcher."""
    grant, _ = read_grant({}, {"RANK": "5"}, BOOT)
    assert (grant.rank, grant.job) == (None, {})
