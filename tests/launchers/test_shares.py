"""The share of each GPU that a launcher gave, as its variables and modules tell it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from tests.launchers.small_ray import Context, Worker, load
from tfenv.launchers.grant import read_grant
from tfenv.launchers.parent import GRANT_VARIABLE, InheritedGrant, encode_grant, read_inherited_grant
from tfenv.policy.model import Share

BOOT = "b0"
#: As measured with Slurm 22.05: `srun --gres=…` on a node with four GPUs.
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "1"}
ALONE = STEP | {"SLURM_TASKS_PER_NODE": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
PAIR = STEP | {"SLURM_TASKS_PER_NODE": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
WHOLE = {"GPU_DEVICE_ORDINAL": "0", "ROCR_VISIBLE_DEVICES": "0"}
MPS = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"


def read_share(environ: dict[str, str], start: dict[str, str] | None = None) -> Share | None:
    return read_grant(environ if start is None else start, environ, BOOT)[0].share


def shards(number: int, tasks: int = 1, gpus: int = 1) -> Share:
    noun = "shard" if number == 1 else "shards"
    text = f"{number} {noun}" if tasks == 1 else f"{number} {noun} among {tasks} tasks"
    return Share("Slurm", text, 1 / tasks, shards=number, gpus=gpus)


SLURM: dict[str, tuple[dict[str, str], Share | None]] = {
    "shards of one task": (ALONE | {"SLURM_SHARDS_ON_NODE": "3"}, shards(3)),
    "shards that two tasks divide": (PAIR | {"SLURM_SHARDS_ON_NODE": "2"}, shards(2, tasks=2)),
    "one shard for two tasks": (PAIR | {"SLURM_SHARDS_ON_NODE": "1"}, shards(1, tasks=2)),
    "shards of two GPUs": (ALONE | {"SLURM_SHARDS_ON_NODE": "6", "SLURM_GPUS_ON_NODE": "2"}, shards(6, gpus=2)),
    "a batch script whose job has two tasks": (
        {"SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "2", "SLURM_SHARDS_ON_NODE": "3"},
        shards(3, tasks=2),
    ),
    "a job submitted from a step, whose variables it inherits": (
        PAIR | {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_SHARDS_ON_NODE": "3"},
        shards(3, tasks=2),
    ),
    "a percentage": (ALONE | {MPS: "30"}, Share("Slurm", "MPS percentage 30", 0.3)),
    "a percentage that two tasks divide": (PAIR | {MPS: "30"}, Share("Slurm", "MPS percentage 30 among 2 tasks", 0.15)),
    "more than all": (ALONE | {MPS: "750"}, Share("Slurm", "1 GPU")),
    "whole GPUs": (PAIR | WHOLE | {"SLURM_GPUS_ON_NODE": "2"}, Share("Slurm", "2 GPUs")),
    "whole GPUs and a percentage of one's own": (PAIR | WHOLE | {MPS: "50"}, Share("MPS", "percentage 50", 0.5)),
    "a step without GPUs": ({"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "0", "SLURM_TASKS_PER_NODE": "1"}, None),
}


@pytest.mark.parametrize(("environ", "share"), SLURM.values(), ids=SLURM)
def test_slurm_gives_shards_a_percentage_or_whole_gpus(environ: dict[str, str], share: Share | None) -> None:
    """It counts shards and percentages for all tasks on the node, in each of them."""
    assert read_share(environ) == share


@pytest.mark.parametrize(
    ("counts", "node", "tasks"),
    [
        ("2(x3),1", "0", 2),
        ("2(x3),1", "2", 2),
        ("2(x3),1", "3", 1),
        ("1,4,2", "1", 4),
        ("1,4,2", "9", 4),
        ("1,4,2", None, 4),
        ("1,4,2", "x", 4),
        ("", "0", 1),
        ("0", "0", 1),
        ("2,,x(", "2", 1),
        ("(x3)", "0", 1),
        ("2(x", "0", 2),
        ("2(x999999999999),1", "5", 2),
        ("9" * 5000, "0", 1),
    ],
)
def test_a_node_has_its_own_number_of_tasks(counts: str, node: str | None, tasks: int) -> None:
    """Slurm writes "2(x3),1" for four nodes. Where this node is not named, the largest number counts."""
    environ = {"SLURM_JOB_ID": "7", "SLURM_SHARDS_ON_NODE": "1", "SLURM_TASKS_PER_NODE": counts}
    share = read_share(environ if node is None else environ | {"SLURM_NODEID": node})
    assert share is not None
    assert share.fraction == 1 / tasks


@pytest.mark.parametrize(
    ("value", "fraction"),
    [("30", 0.3), ("12.5", 0.125), ("100", 1.0), ("1", 0.01)],
)
def test_mps_gives_a_percentage(value: str, fraction: float) -> None:
    """The percentage of threads is taken for that of memory, as Slurm does."""
    assert read_share({MPS: value}) == Share("MPS", f"percentage {value}", fraction)


@pytest.mark.parametrize("value", ["", "0", "101", "-3", "nan", "inf", "1e1", "30%", "٣", ".5", "5.", "9" * 5000])
def test_what_is_no_percentage_is_no_share(value: str) -> None:
    """Whatever the variable holds, reading it never raises."""
    assert read_share({MPS: value}) is None


@pytest.mark.parametrize(
    "environ",
    [{}, {"PBS_JOBID": "7"}, {"LSB_JOBID": "7"}, {"FLUX_JOB_ID": "f7"}, {"SGE_TASK_ID": "1"}, {"RAY_JOB_ID": "01"}],
)
def test_others_tell_no_share(environ: dict[str, str]) -> None:
    """What no variable tells, nobody guesses."""
    assert read_share(environ | {"CUDA_VISIBLE_DEVICES": "0"}) is None


# ---- Ray


class Assigned(Context):
    """A worker's context with resources."""

    def __init__(self, resources: object) -> None:
        self.resources = resources

    def get_assigned_resources(self) -> object:
        return self.resources


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the modules away afterwards."""
    before = {name: sys.modules.get(name) for name in ("ray._private.worker", "ray.runtime_context")}
    yield
    for name, module in before.items():
        if module is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = module


@pytest.mark.parametrize(
    ("resources", "share"),
    [
        ({"CPU": 1.0, "GPU": 0.25}, Share("Ray", "num_gpus=0.25", 0.25)),
        ({"GPU": 1}, Share("Ray", "num_gpus=1", 1.0)),
        ({"GPU": 2.0}, Share("Ray", "num_gpus=2", 1.0)),
        ({"CPU": 1.0}, None),
        ({"GPU": 0.0}, None),
        ({"GPU": -1.0}, None),
        ({"GPU": float("nan")}, None),
        ({"GPU": "half"}, None),
        ({}, None),
        (None, None),
        ([("GPU", 0.5)], None),
    ],
)
def test_ray_gives_what_the_task_asked_for(resources: object, share: Share | None) -> None:
    """From one GPU on it is all of each. A task without a GPU has no share, and nothing that Ray says raises."""
    load(Assigned(resources), Worker())
    assert read_share({"RAY_JOB_ID": "01000000"}) == share


def test_another_version_of_ray_tells_no_share() -> None:
    """Without `get_assigned_resources` there is none, and no exception."""
    load(Context(), Worker())
    assert read_share({"RAY_JOB_ID": "01000000"}) is None


def test_a_driver_is_not_asked() -> None:
    """Its context raises, or starts a cluster."""
    driver = Worker()
    driver.mode = 0
    load(Assigned({"GPU": 0.5}), driver)
    assert read_share({}) is None


def test_rays_share_is_of_what_slurm_gave() -> None:
    """Half of a GPU of which Slurm gave two shards is one shard, in the words of both."""
    load(Assigned({"GPU": 0.5}), Worker())
    share = read_share(ALONE | {"SLURM_SHARDS_ON_NODE": "2"})
    assert share == Share("Ray", "num_gpus=0.5 of Slurm's 2 shards", 0.5, shards=2)
    assert share is not None
    assert share.measure(4) == 0.25
    assert read_share(ALONE) == Share("Ray", "num_gpus=0.5", 0.5)


@pytest.mark.parametrize(("percentage", "giver"), [("80", "Ray"), ("50", "Ray"), ("20", "MPS")])
def test_the_smaller_of_rays_and_mpss_shares_holds(percentage: str, giver: str) -> None:
    """Who starts actors with half a GPU under MPS gives them its percentage, too: they do not multiply."""
    load(Assigned({"GPU": 0.5}), Worker())
    share = read_share({"RAY_JOB_ID": "01000000", MPS: percentage})
    assert share is not None
    assert (share.giver, share.fraction) == (giver, min(0.5, int(percentage) / 100))


# ---- children


def test_a_child_of_a_worker_has_the_workers_share() -> None:
    """Ray tells a child nothing. What the worker wrote into TFGPU_GRANT does, in the same job."""
    load(Assigned({"GPU": 0.25}), Worker())
    environ = {"RAY_JOB_ID": "01000000", "CUDA_VISIBLE_DEVICES": "0"}
    _, inherited = read_grant(environ, environ, BOOT)
    start = environ | {GRANT_VARIABLE: encode_grant(inherited, BOOT)}
    for name in ("ray._private.worker", "ray.runtime_context"):
        del sys.modules[name]
    assert read_share(environ, start) == Share("Ray", "num_gpus=0.25", 0.25)
    assert read_share(environ | {"RAY_JOB_ID": "02000000"}, start) is None


def test_slurms_share_is_read_anew_by_each_child() -> None:
    """It is in the child's own environment, so nothing is handed on."""
    environ = ALONE | {"SLURM_SHARDS_ON_NODE": "3"}
    assert read_grant(environ, environ, BOOT)[1].share is None


@pytest.mark.parametrize(
    "share",
    [
        "1",
        "[]",
        '["Ray","x"]',
        '["Ray","x",2.0]',
        '["Ray","x",0]',
        '["Ray","x",-0.5]',
        '["Ray","x",NaN]',
        '["Ray","x",true]',
        '["Ray","x","0.5"]',
        '["Ray",7,0.5]',
        f'["Ray","{"x" * 200}",0.5]',
        '{"Ray":0.5}',
        '"Ray"',
    ],
)
def test_a_forged_share_voids_what_the_parent_wrote(share: str) -> None:
    """A share is a name, a text and a number above 0 and up to 1. Nothing else is believed, and nothing raises."""
    right = encode_grant(InheritedGrant("0,1", None, "0", share=Share("Ray", "x", 0.5)), BOOT)
    assert read_inherited_grant({GRANT_VARIABLE: right, "CUDA_VISIBLE_DEVICES": "0"}, BOOT).grant == "0,1"
    wrong = right.replace(json.dumps(["Ray", "x", 0.5], separators=(",", ":")), share)
    assert wrong != right
    inherited = read_inherited_grant({GRANT_VARIABLE: wrong, "CUDA_VISIBLE_DEVICES": "0"}, BOOT)
    assert (inherited.grant, inherited.share) == ("0", None)
