"""`memory_limit = "granted"` under real TensorFlow: what the driver is asked for follows the launcher's share."""

from __future__ import annotations

import pytest

from tests.frameworks.harness import Case, World, read_records
from tests.frameworks.tensorflow.test_ways_in import Reports
from tests.frameworks.test_shared_machine import run_cases
from tests.shared_machine import ALICE, BOB, SharedMachine, User, shared_machine

__all__ = ["shared_machine"]

CEILING = '[ceiling]\nmemory_limit = "granted"\n'
GPU_MIB = 24 << 10
#: Variables as Slurm 22.05 sets them in a step of one task, and of two.
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "1"}
SLURM = STEP | {"SLURM_STEP_GPUS": "0", "CUDA_VISIBLE_DEVICES": "0", "SLURM_TASKS_PER_NODE": "1"}
PERCENTAGE = {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30"}


def start_with(policy: str | None, variables: dict[str, str]) -> World:
    return World(policy, inherited=tuple(variables.items()))


@pytest.mark.parametrize(
    ("case", "part"),
    [
        (Case(start_with(CEILING, PERCENTAGE), ("eager",)), 0.3),
        (Case(start_with('[gpu]\nmemory_limit = "granted"\n', SLURM | PERCENTAGE), ("eager",)), 0.3),
        (Case(start_with(CEILING, SLURM | PERCENTAGE | {"SLURM_TASKS_PER_NODE": "2"}), ("eager",)), 0.15),
        (Case(start_with(f'{CEILING}[gpu]\nmemory_limit = "1000MiB"\n', PERCENTAGE), ("eager",)), 1000 / GPU_MIB),
        (Case(start_with(CEILING, PERCENTAGE), ("set_logical_devices:9000", "eager")), 0.3),
    ],
    ids=["MPS", "a percentage of Slurm's", "two tasks", "a smaller wish", "a larger split"],
)
def test_a_process_takes_its_share_of_the_card(case: Case, part: float, reports: Reports) -> None:
    """TensorFlow takes all that it may have in its first request, and that is the share to a few MiB."""
    report = reports(case)
    assert report.error is None, report.stderr
    assert part * GPU_MIB - 8 < report.first_mib(0) <= part * GPU_MIB
    assert report.peak_mib(0) <= part * GPU_MIB
    assert not any("[no-share]" in line for line in report.ours)


WITHOUT = Case(World(f'on_error = "fail"\n{CEILING}'), ("eager",))


@pytest.mark.parametrize("case", [WITHOUT], ids=str)
def test_a_missing_share_is_only_a_warning(case: Case, reports: Reports) -> None:
    """Outside of a job the program goes on without a limit, even under `on_error = "fail"`. The line says no-share."""
    report = reports(case)
    assert report.error is None
    assert any("[no-share]" in line for line in report.ours)
    assert report.first_mib(0) > 0.9 * GPU_MIB


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("user", "tasks", "part"),
    [
        pytest.param(ALICE, "1", 0.75, id="alone", marks=pytest.mark.exhaustive),
        pytest.param(BOB, "2", 0.375, id="of two"),
    ],
)
@pytest.mark.usefixtures("needs_tensorflow")
def test_a_job_of_three_shards_of_four_takes_three_quarters(
    user: User, tasks: str, part: float, shared_machine: SharedMachine
) -> None:
    """/etc/tfgpu says how many shards a GPU has. A project that asks for all of it is clamped, and two tasks divide."""
    policy = f'{CEILING}[machine]\nshards_per_gpu = 4\n[audit]\nfile = "/var/log/tfgpu/<uid>.jsonl"\n'
    shared_machine.policy({"tfgpu.toml": policy})
    variables = SLURM | {"SLURM_SHARDS_ON_NODE": "3", "SLURM_TASKS_PER_NODE": tasks}
    (report,) = run_cases(shared_machine, user, start_with(None, variables), [("eager",)])
    assert report.error is None, report.stderr
    assert part * GPU_MIB - 8 < report.first_mib(0) <= part * GPU_MIB
    records = read_records(shared_machine.path(f"/var/log/tfgpu/{user.uid}.jsonl"))
    shares = [record["share"] for record in records if record["event"] == "policy_loaded"]
    assert [(share["launcher"], share["fraction"]) for share in shares] == [("Slurm", part)]
