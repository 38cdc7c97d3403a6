"""The machine's policy inside of a user namespace, where root has no number: bubblewrap, `unshare -r`."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests.shared_machine import ALICE, REPOSITORY, ROOT, SharedMachine, shared_machine

__all__ = ["shared_machine"]

CEILINGS = {
    "tfgpu.toml": 'on_error = "fail"\n[ceiling]\nmemory_limit = "2GiB"\n[user.root.ceiling]\nmemory_limit = "80GiB"\n',
    "users/alice.toml": '[ceiling]\nmemory_limit = "1GiB"\n',
}
EXPLAIN = """
import json, sys, tfenv
told = tfenv.explain().as_dict()
print(json.dumps([told["user"], told["plan"]["limit_bytes"], [f["code"] for f in told["findings"]]]))
"""


def explain(machine: SharedMachine, *options: str) -> list[Any]:
    """The user, the limit and the findings of alice's program in a namespace made with these options of `unshare`."""
    python = ("env", f"PYTHONPATH={REPOSITORY}", sys.executable, "-c", EXPLAIN)
    done = machine.run(ALICE, "unshare", *options, "--", *python)
    if "unshare failed" in done.stderr:
        pytest.skip(f"no user namespace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    told: list[Any] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("options", [["--user", "--map-root-user"], ["--user", "--map-current-user"], ["--user"]])
def test_the_machines_ceilings_hold_in_a_namespace(options: list[str], shared_machine: SharedMachine) -> None:
    """They are those of the user outside, whatever number that user gave themself inside."""
    shared_machine.policy(CEILINGS)
    user, limit, codes = explain(shared_machine, *options)
    if options != ["--user"]:  # without any mapping nobody can tell who it is
        assert (user, limit) == ("alice", 1 << 30)
    assert isinstance(limit, int)
    assert limit <= 2 << 30
    assert codes == []


def test_what_the_user_may_write_is_not_roots(shared_machine: SharedMachine) -> None:
    """A machine file that others can write is left out in a namespace as it is outside."""
    shared_machine.policy(CEILINGS)
    shared_machine.path("/etc/tfgpu/tfgpu.toml").chmod(0o666)
    _, _, codes = explain(shared_machine, "--user", "--map-root-user")
    assert "insecure-permissions" in codes
    shared_machine.policy({})


def test_a_fault_of_ours_knows_the_machines_answer(shared_machine: SharedMachine) -> None:
    """What is read where nothing of tfenv can be loaded knows `on_error` in a namespace, too."""
    shared_machine.policy(CEILINGS)
    program = "from tfenv.runtime.emergency import read_machine_on_error; print(read_machine_on_error())"
    python = ("env", f"PYTHONPATH={REPOSITORY}", sys.executable, "-c", program)
    assert shared_machine.run(ROOT, *python).stdout == "fail\n"
    done = shared_machine.run(ALICE, "unshare", "--user", "--map-root-user", "--", *python)
    if "unshare failed" in done.stderr:
        pytest.skip(f"no user namespace here: {done.stderr.strip()}")
    assert done.stdout == "fail\n", done.stderr
