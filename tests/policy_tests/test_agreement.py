"""`tfgpu test` and `tfgpu explain` cannot disagree: both describe the same processes, on the same GPUs.

The processes of a batch are explained in one interpreter, under NVML's stub library and the real /etc/tfgpu of a
machine of its own. Each has its own directory, environment and files.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.shared_machine import ALICE, SharedMachine, shared_machine
from tfenv.explanation import plan_as_dict
from tfenv.policy_tests.load import PolicyLoader
from tfenv.policy_tests.model import Case
from tfenv.policy_tests.read import read_suite
from tfenv.policy_tests.run import decide_case
from tfenv.simulate.environment import build_environment, parse_gpus

__all__ = ["shared_machine"]

MACHINES = {
    "alike": "4x24GiB:NVIDIA A10",
    "unlike": "2x24GiB:NVIDIA A10,2x80GiB:NVIDIA A100",
    "split": "80GiB/mig=1x40GiB+2x20GiB:NVIDIA A100,80GiB:NVIDIA A100",
}
POLICY = {
    "tfgpu.toml": """\
[gpu]
memory_growth = true
memory_limit = "30%"

[ceiling]
max_devices = 3
memory_limit = "granted"
require_grant = true

[user.alice]
expires = 2099-01-01
reason = "thesis"

[user.alice.ceiling]
memory_total = "60%"

[machine]
shards_per_gpu = 4
""",
    "groups/students.toml": """\
[ceiling]
memory_limit = "50%"
allowed_devices = ["GPU-a0", "GPU-a1", "name:*A100*"]
""",
}
FILES: tuple[dict[str, Any], ...] = (
    {},
    {"gpu": {"visible_devices": [1, 0], "memory_limit": "20GiB"}},
    {"gpu": {"visible_devices": {"count": 2}, "allocator": "cuda_malloc_async"}},
    {"gpu": {"visible_devices": {"rank": "auto"}}, "on_error": "fail"},
    {"gpu": {"visible_devices": [5], "memory_growth": False}, "on_error": "cpu"},
    {"ceiling": {"memory_limit": "3GiB", "max_devices": 1}, "gpu": {"memory_limit": "none"}},
    {"gpu": {"device": [{"match": "name:*A100*", "memory_limit": "9GiB", "logical_devices": ["4GiB", "5GiB"]}]}},
    {"gpu": {"memory_limit": "8 gigs"}, "on_error": "fail"},
)  # fmt: skip
LAUNCHERS = (None, "Slurm", "PBS", "Kubernetes", "Ray", "Flux")
GRANTS: tuple[list[int | str] | None, ...] = (None, [], [0], [1, 0], [3], ["GPU-a1fa4e00"], [0, 9])
VARIABLES: tuple[dict[str, str], ...] = (
    {}, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, {"SLURM_SHARDS_ON_NODE": "3"}, {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25"},
)  # fmt: skip

#: Explains each process in a directory and an environment of its own, and prints what `tfgpu explain` prints.
EXPLAIN = """
import contextlib, io, json, os, sys
from tfenv.cli.main import main
before = dict(os.environ)
for folder, variables in json.load(sys.stdin):
    os.environ.clear()
    os.environ.update(before, **variables, XDG_CONFIG_HOME=f"{folder}/config")
    os.chdir(f"{folder}/project")
    with contextlib.redirect_stdout(io.StringIO()) as told:
        code = main(["explain", "--format", "json"])
    print(json.dumps([code, told.getvalue()]))
"""


def make_cases(gpus: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield processes, spread over all that can be combined."""
    combined = list(itertools.product(FILES, FILES, LAUNCHERS, GRANTS, (None, 1), VARIABLES))
    for number, values in enumerate(random.Random(7).sample(combined, count)):
        user_file, project_file, launcher, grant, rank, environment = values
        given = {"launcher": launcher, "grant": grant, "rank": rank, "environment": environment}
        given |= {"user_file": user_file, "project_file": project_file}
        case = {key: value for key, value in given.items() if value not in (None, {})}
        yield {"name": str(number), "gpus": gpus, "user": "alice", "groups": ["students", "vision"], **case}


def format_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {format_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(format_toml, value)) + "]"
    return json.dumps(value)


def format_case(table: dict[str, Any]) -> str:
    lines = [f"{key} = {format_toml(value)}" for key, value in table.items()]
    return "\n".join(["[[case]]", *lines, "expect.refused = false", ""])


def explain_cases(machine: SharedMachine, gpus: str, tables: list[dict[str, Any]], cases: list[Case]) -> list[Any]:
    """Return what `tfgpu explain` says of each process."""
    asked = []
    for table, case in zip(tables, cases, strict=True):
        folder = machine.folder(f"/home/alice/{case.name}", ALICE)
        for name, place in (("user_file", "config/tfgpu"), ("project_file", "project")):
            text = "\n".join(f"{key} = {format_toml(value)}" for key, value in table.get(name, {}).items())
            machine.folder(f"{folder}/{place}", ALICE)
            if name in table:
                machine.write(f"{folder}/{place}/tfgpu.toml", text, ALICE)
        asked.append((folder, dict(case.environment)))
    env = build_environment(parse_gpus(gpus), base={})
    done = machine.python(ALICE, EXPLAIN, text=json.dumps(asked), **env)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def compare(machine: SharedMachine, gpus: str, count: int) -> None:
    machine.clear()
    machine.policy(POLICY)
    tables = list(make_cases(gpus, count))
    text = "".join(map(format_case, tables))
    # What it tests is the same policy, seen from outside.
    etc = machine.path("/etc/tfgpu")
    machine.write("/etc/tfgpu/a.test.toml", f'layer = "machine"\n{text}')
    suite = read_suite(str(etc / "a.test.toml"))
    assert suite.findings == ()
    loader, cases = PolicyLoader(), list(suite.cases)
    told = explain_cases(machine, gpus, tables, cases)
    assert len(told) == len(cases) == count
    seen: set[object] = set()
    for case, (code, output) in zip(cases, told, strict=True):
        loaded = loader.load(suite, case)
        decision = decide_case(case, loaded)
        explained = json.loads(output)
        errors = {
            finding.code for finding in (*loaded.findings, *decision.plan.findings) if finding.severity == "error"
        }
        assert explained["plan"] == plan_as_dict(decision.plan), case
        assert explained["refused"] is decision.refused, case
        assert {finding["code"] for finding in explained["findings"] if finding["severity"] == "error"} == errors, case
        assert explained["inventory"]["devices"] == json.loads(json.dumps(plan_inventory(case))), case
        assert code in (0, 1)
        seen.add((decision.plan.visible, decision.plan.limit, decision.refused))
    assert len(seen) > 12


def plan_inventory(case: Case) -> Any:
    from tfenv.values import as_dict

    return as_dict(case.inventory.devices)


def test_they_agree(shared_machine: SharedMachine) -> None:
    """Under the machine's, a user's and a project's file, in jobs and in none, both say the same of a process."""
    compare(shared_machine, MACHINES["unlike"], 40)


@pytest.mark.exhaustive
@pytest.mark.parametrize("gpus", MACHINES)
def test_they_agree_on_hundreds(gpus: str, shared_machine: SharedMachine) -> None:
    """So do they for hundreds of processes on each machine."""
    compare(shared_machine, MACHINES[gpus], 150)
