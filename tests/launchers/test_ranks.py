from __future__ import annotations

import pytest

from tfenv.launchers.grant import read_grant
from tfenv.launchers.ranks import read_global_rank

SLURM = {"SLURM_JOB_ID": "14", "SLURM_PROCID": "5"}


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, None),
        (SLURM, 5),
        ({**SLURM, "OMPI_COMM_WORLD_RANK": "2"}, 2),
        ({**SLURM, "OMPI_COMM_WORLD_RANK": "2", "RANK": "7"}, 7),
        ({**SLURM, "RANK": "first"}, 5),
    ],
)
def test_the_innermost_launcher_tells_the_rank(variables: dict[str, str], rank: int | None) -> None:
    """mpirun inside of a Slurm job starts many processes in one task of Slurm's."""
    assert read_global_rank(variables) == rank


def test_a_job_has_the_rank_of_the_process() -> None:
    """Outside of a job a rank alone is no job."""
    grant, _ = read_grant({}, SLURM, "boot")
    assert grant.job == {"scheduler": "slurm", "id": "14", "rank": "5"}
    grant, _ = read_grant({}, {"RANK": "5"}, "boot")
    assert grant.job == {}
