"""What a process was given, and how it tells its children."""

from __future__ import annotations

import pytest

from tfenv.jobs import identify_job
from tfenv.launchers.grant import read_grant
from tfenv.launchers.parent import GRANT_VARIABLE, InheritedGrant, encode_grant, read_boot_id, split_tokens

BOOT = "b0"


@pytest.mark.parametrize(
    ("value", "tokens"),
    [(None, None), ("", ()), (" ", ()), ("0,1", ("0", "1")), ("MIG-x/1/0", ("MIG-x/1/0",)), ("-1", ("-1",))],
)
def test_the_variable_is_split_and_kept_verbatim(value: str | None, tokens: tuple[str, ...] | None) -> None:
    """Unset means all GPUs, empty none. Tokens are opaque."""
    assert split_tokens(value) == tokens


def test_the_current_list_is_the_grant() -> None:
    """Without a governed parent the value at start is what the scheduler gave."""
    grant, carried = read_grant({"CUDA_VISIBLE_DEVICES": "2,3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, {}, BOOT)
    assert (grant.tokens, grant.pci_order) == (("2", "3"), True)
    assert carried == InheritedGrant("2,3", None, "2,3")


def start(carried: InheritedGrant, boot: str = BOOT, **variables: str) -> dict[str, str]:
    return {GRANT_VARIABLE: encode_grant(carried, boot), **variables}


def test_a_child_gets_the_grant_of_its_parent() -> None:
    """The parent narrowed all GPUs to 1: in the child, too, positions count among all."""
    grant, carried = read_grant(start(InheritedGrant(None, "1", "1"), CUDA_VISIBLE_DEVICES="1"), {}, BOOT)
    assert grant.tokens is None
    assert carried.request == "1"


def test_a_child_knows_the_leases_of_its_ancestors() -> None:
    """Also where the parent gives it a list of its own: it must not wait for who may wait for it."""
    carried = InheritedGrant(None, None, "1", ("lease-1", "lease-2"))
    for current in ("1", "2"):
        _, child = read_grant(start(carried, CUDA_VISIBLE_DEVICES=current), {}, BOOT)
        assert child.leases == ("lease-1", "lease-2")


@pytest.mark.parametrize(("boot", "current"), [("another boot", "1"), (BOOT, "3"), ("", "1")])
def test_a_carried_grant_is_dropped_elsewhere_and_where_others_were_given(boot: str, current: str) -> None:
    """ssh and sbatch carry environments to other hosts. A list with other GPUs is a new grant."""
    carried = InheritedGrant("0,1,2", None, "1")
    grant, _ = read_grant(start(carried, boot, CUDA_VISIBLE_DEVICES=current), {}, BOOT)
    assert grant.tokens == split_tokens(current)


@pytest.mark.parametrize(("given", "current"), [("0,1,2", "0"), (None, "3"), ("0,1", None), ("0,1", "")])
def test_a_parents_own_list_for_a_child_is_a_request(given: str | None, current: str | None) -> None:
    """Launchers write a list per child: it is asked within the parent's grant, and widens nothing."""
    variables = {} if current is None else {"CUDA_VISIBLE_DEVICES": current}
    grant, carried = read_grant(start(InheritedGrant(given, None, "1"), **variables), {}, BOOT)
    assert (grant.tokens, carried.request) == (split_tokens(given), current)


SLURM = {"SLURM_JOB_ID": "14", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("parent", "child"),
    [
        ({}, SLURM),
        (SLURM, SLURM | {"SLURM_JOB_ID": "15"}),
        (SLURM, SLURM | {"SLURM_STEP_ID": "1"}),
        ({"SLURM_JOB_ID": "14"}, SLURM),
        ({}, {"PBS_JOBID": "7.host"}),
        ({}, {"SGE_ROOT": "/opt/sge", "JOB_ID": "7", "SGE_TASK_ID": "2"}),
        ({}, {"RAY_JOB_ID": "ffffffff"}),
    ],
)
def test_nothing_is_carried_into_another_job(parent: dict[str, str], child: dict[str, str]) -> None:
    """sbatch and srun hand on the environment of whoever submits: in the job the scheduler's list is the grant."""
    carried = InheritedGrant("1", None, "0", ("lease-1",), identify_job(parent))
    grant, ours = read_grant(start(carried, CUDA_VISIBLE_DEVICES="0"), child, BOOT)
    assert (grant.tokens, ours.leases, ours.job) == (("0",), (), identify_job(child))
    same, _ = read_grant(start(carried, CUDA_VISIBLE_DEVICES="0"), parent, BOOT)
    assert same.tokens == ("1",)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[2]",
        '[1,"b0",null,null,"1",[]]',
        '[2,"b0","",1,2,3,[]]',
        '[2,"b0","",null,null,"1",[7]]',
        '[2,"b0","",null,null,"1",7]',
        "null",
        "[1]",
        '"x"',
        "7",
        '{"a":1}',
        "[" * 100_000,
    ],
)
def test_a_forged_or_broken_carrier_is_ignored(text: str) -> None:
    """Whatever stands in the variable, reading it never raises."""
    grant, _ = read_grant({GRANT_VARIABLE: text, "CUDA_VISIBLE_DEVICES": "1"}, {}, BOOT)
    assert grant.tokens == ("1",)


def test_the_launcher_nearest_to_the_process_names_the_rank() -> None:
    """Under mpirun inside a Slurm job srun's SLURM_LOCALID is the same for all ranks."""
    environ = {"SLURM_LOCALID": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "3", "SLURM_JOB_ID": "17"}
    grant, _ = read_grant({}, environ, BOOT)
    assert (grant.rank, grant.scheduler) == (3, True)
    assert read_grant({}, {"LOCAL_RANK": "9" * 6000, "SLURM_LOCALID": "2"}, BOOT)[0].rank == 2
    assert read_grant({}, {}, BOOT)[0].rank is None


def test_the_boot_id_is_read_and_may_be_missing() -> None:
    """Linux tells it in /proc. Where it does not, nothing is carried."""
    assert len(read_boot_id()) == 36
    assert read_boot_id("/nonexistent") == ""
