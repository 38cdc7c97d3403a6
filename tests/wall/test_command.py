"""`tfgpu wall`: the ceilings in /etc/tfgpu become limits that the driver keeps."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jsonschema import Draft7Validator

from tests.pages import ROOT as ROOT_FOLDER
from tests.pages import blocks
from tests.shared_machine import ALICE, BOB, ROOT, SharedMachine
from tests.wall.conftest import GIB, WallMachine, open_wall_machine

LOG = '[audit]\nfile = "/var/log/tfgpu/<uid>.jsonl"\n'
POLICY = LOG + '[ceiling]\nmemory_total = "50%"\n[group.students.ceiling]\nmemory_total = "8GiB"\n'
ALICES, BOBS = f"user-{ALICE.uid}.slice", f"user-{BOB.uid}.slice"
SCHEMA = json.loads((Path(__file__).parents[2] / "schemas" / "audit.schema.json").read_text())


def test_apply_sets_what_the_policy_says_for_each_user(machine: WallMachine) -> None:
    """A student may take 8 GiB of each GPU, everybody else half of it. The second time nothing is left to do."""
    machine.shared.policy({"tfgpu.toml": POLICY})
    done = machine.tfgpu("wall", "apply", "--all")
    assert done.returncode == 0, done.stderr
    assert f"{ALICES} (alice), GPU 0: no limit -> 8.0 GiB" in done.stdout
    assert machine.read_limits() == {ALICES: [8192, 8192], BOBS: [12288, 12288]}
    again = machine.tfgpu("wall", "apply", "--all")
    assert again.stdout == "nothing to change: 2 cgroups have their limits\n"
    records = machine.read_records("wall_changed")
    assert [(record["limited_user"], len(record["cgroup_limits"])) for record in records] == [("alice", 2), ("bob", 2)]
    for record in records:
        assert list(Draft7Validator(SCHEMA).iter_errors(record)) == []
    assert records[0]["cgroup_limits"][0]["after_bytes"] == 8 * GIB
    shown = machine.tfgpu("audit", "--event", "wall_changed").stdout.splitlines()
    assert [ALICES in line and "8.0 GiB" in line for line in shown] == [False, True, False]


def test_a_dry_run_changes_nothing(machine: WallMachine) -> None:
    """It prints what would change, also for somebody who is not root, and writes no record."""
    machine.shared.policy({"tfgpu.toml": POLICY})
    done = machine.tfgpu("wall", "apply", "--user", "alice", "--dry-run", user=BOB)
    assert done.stdout.splitlines()[-1] == "nothing is changed, because of --dry-run"
    assert done.stdout.startswith(f"user.slice/{ALICES} (alice), GPU 0: no limit -> 8.0 GiB\n")
    assert machine.read_limits() == {ALICES: [None, None], BOBS: [None, None]}, "what the policy says is shown"
    assert "limit" not in {request.op for request in machine.read_requests()}


def test_only_root_sets_limits(machine: WallMachine) -> None:
    """Anybody else is told to use sudo."""
    machine.shared.policy({"tfgpu.toml": POLICY})
    done = machine.tfgpu("wall", "apply", "--all", user=ALICE)
    assert (done.returncode, done.stdout) == (1, "")
    assert "only root may set limits; run the command with sudo" in done.stderr


def test_a_change_of_the_policy_changes_the_limits(machine: WallMachine) -> None:
    """A larger, a smaller and no total: apply brings each about, and show says where it is missing."""
    machine.shared.policy({"tfgpu.toml": POLICY})
    machine.tfgpu("wall", "apply", "--all")
    machine.shared.policy({"tfgpu.toml": LOG + '[user.alice.ceiling]\nmemory_total = "4GiB"\n'})
    shown = machine.tfgpu("wall", "show").stdout
    assert "says 4.0 GiB; run tfgpu wall apply --user alice" in shown
    assert "says no limit; run tfgpu wall apply --user bob" in shown
    machine.tfgpu("wall", "apply", "--all")
    assert machine.read_limits() == {ALICES: [4096, 4096]}
    assert "as it says" in machine.tfgpu("wall", "show").stdout
    machine.shared.policy({"tfgpu.toml": POLICY + '[machine]\nwall = "off"\n'})
    machine.tfgpu("wall", "apply", "--all")
    assert machine.read_limits() == {}


def test_one_user_and_a_user_by_number(machine: WallMachine) -> None:
    """`--user` takes a name or a number. Others keep what they have, and a user without a session is no error."""
    machine.shared.policy({"tfgpu.toml": POLICY})
    machine.tfgpu("wall", "apply", "--user", str(BOB.uid))
    assert machine.read_limits()[BOBS] == [12288, 12288]
    away = machine.tfgpu("wall", "apply", "--user", "carol")
    assert (away.returncode, "carol is not logged in" in away.stdout) == (0, True)
    wrong = machine.tfgpu("wall", "apply", "--user", "carla")
    assert (wrong.returncode, 'there is no user "carla"' in wrong.stderr) == (1, True)


def test_a_cgroup_of_a_job_by_hand(machine: WallMachine) -> None:
    """A cgroup is limited by the policy of a user, or by a size that is given."""
    machine.shared.policy({"tfgpu.toml": POLICY})
    job = machine.cgroups.make("system.slice/slurmstepd.scope/job_14")
    assert machine.tfgpu("wall", "apply", "--cgroup", job, "--user", "alice").returncode == 0
    assert machine.read_limits()["job_14"] == [8192, 8192]
    assert machine.tfgpu("wall", "apply", "--cgroup", job, "--limit", "25%").returncode == 0
    assert machine.read_limits()["job_14"] == [6144, 6144]
    assert "limited_user" not in machine.read_records("wall_changed")[-1]
    machine.tfgpu("wall", "clear", "--cgroup", job)
    assert "job_14" not in machine.read_limits()


def test_the_prolog_of_the_page_limits_the_job_that_it_runs_in(machine: WallMachine) -> None:
    """Slurm runs it as root in a step of the job. Outside of a job's cgroup it does nothing, and never fails."""
    machine.shared.policy({"tfgpu.toml": POLICY})
    (page,) = [
        block.text for block in blocks("bash", pages=[ROOT_FOLDER / "docs" / "wall.md"]) if "Prolog" in block.text
    ]
    prolog = page.replace("/opt/tfenv/bin/tfgpu", f"{sys.executable} -m tfenv")
    machine.environment |= {"SLURM_JOB_ID": "14", "SLURM_JOB_USER": "alice"}
    job = "system.slice/slurmstepd.scope/job_14"
    for cgroup in (job, f"{job}/step_extern", job.replace("14", "141")):
        machine.cgroups.make(cgroup)
    for cgroup, limits in (("job_141", [None, None]), ("job_14/step_extern", [[8192, 8192], None])):
        done = machine.run(ROOT, "sh", "-c", prolog, cgroup=f"system.slice/slurmstepd.scope/{cgroup}")
        assert (done.returncode, done.stderr) == (0, "")
        assert [machine.read_limits().get(name) for name in ("job_14", "job_141")] == limits


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("apply",), 2, "say for whom: --user NAME, --all or --cgroup PATH"),
        (("apply", "--all", "--user", "alice"), 2, "leave out --user"),
        (
            ("apply", "--cgroup", "/sys/fs/cgroup/user.slice"),
            2,
            "either --user NAME, whose policy counts, or --limit SIZE",
        ),
        (("apply", "--all", "--limit", "8GiB"), 2, "--limit is for one cgroup"),
        (("apply", "--cgroup", "/tmp", "--limit", "8GiB"), 1, "/tmp is not below /sys/fs/cgroup"),
        (("apply", "--cgroup", "no.slice", "--limit", "8GiB"), 1, "there is no cgroup /sys/fs/cgroup/no.slice"),
        (("apply", "--cgroup", "user.slice", "--limit", "8"), 2, '"8" is not a size; write "8GiB"'),
        (("apply", "--cgroup", "user.slice", "--limit", "none"), 2, "to take a limit away run tfgpu wall clear"),
        (("clear",), 2, "say for whom"),
        (("clear", "--user", "alice", "--cgroup", "user.slice"), 2, "name either a user or a cgroup"),
    ],
)
def test_wrong_usage_is_told(
    shared_machine: SharedMachine, arguments: tuple[str, ...], code: int, message: str
) -> None:
    """Each mistake on the command line says what to write."""
    with open_wall_machine(shared_machine, "dmem") as machine:
        done = machine.tfgpu("wall", *arguments)
        assert (done.returncode, message in done.stderr) == (code, True), done.stderr


def test_soft_limits_are_given_back_first(machine: WallMachine) -> None:
    """The cgroups above would keep what a soft limit reserves: it is set to 0 before the limit is cleared."""
    cgroup = machine.cgroups.make("system.slice/db.service")
    code = (
        "import sys; from tfenv.devices import nvml, cgroups\n"
        "with nvml.open_nvml() as n: cgroups.set_limits(n, n.nvmlDeviceGetHandleByIndex(0), sys.argv[1], "
        "cgroups.CgroupLimits(soft=1 << 30, hard=2 << 30))"
    )
    machine.run(ROOT, sys.executable, "-c", code, cgroup)
    assert "2.0 GiB, of which 1.0 GiB reserved -> no limit" in machine.tfgpu("wall", "clear", "--cgroup", cgroup).stdout
    number = str((machine.cgroups.root / "system.slice/db.service").stat().st_ino)
    asked = [request for request in machine.read_requests() if (request.op, request.call) == ("limit", number)]
    limits = [(request.held, request.bytes) for request in asked]
    assert limits == [(1 << 30, 2 << 30), (0, 2 << 30), (0, (1 << 64) - 1)]


def test_a_policy_with_mistakes_changes_no_limit(machine: WallMachine) -> None:
    """The mistake is shown with its place, and all limits stay."""
    machine.shared.policy({"tfgpu.toml": POLICY})
    machine.tfgpu("wall", "apply", "--all")
    before = machine.read_limits()
    machine.shared.write("/etc/tfgpu/tfgpu.toml", "[ceiling]\nmemory_total = 3\n")
    done = machine.tfgpu("wall", "apply", "--all")
    assert done.returncode == 1
    assert "/etc/tfgpu/tfgpu.toml:2:1: ceiling.memory_total: " in done.stdout
    assert "the policy has mistakes, so all limits stay as they are" in done.stderr
    assert machine.read_limits() == before
    assert "has mistakes; run tfgpu check" in machine.tfgpu("wall", "show").stdout


def test_of_a_file_that_cannot_be_read_the_last_good_copy_counts(machine: WallMachine) -> None:
    """Limits are those under which programs run. The command says so, and ends with 1."""
    machine.shared.policy({"tfgpu.toml": POLICY})
    machine.tfgpu("wall", "apply", "--user", "alice")
    machine.shared.write("/etc/tfgpu/tfgpu.toml", "[ceiling\n")
    done = machine.tfgpu("wall", "apply", "--user", "bob")
    assert done.returncode == 1
    assert "[warning" in done.stdout
    assert machine.read_limits() == {ALICES: [8192, 8192], BOBS: [12288, 12288]}


def test_apply_keeps_the_last_good_copy(machine: WallMachine) -> None:
    """A typo in the policy after that leaves programs under the copy."""
    machine.shared.policy({"tfgpu.toml": POLICY})
    machine.tfgpu("wall", "apply", "--all", "--dry-run")
    assert not machine.shared.path("/var/lib/tfgpu/etc/tfgpu.toml").exists()
    machine.tfgpu("wall", "apply", "--all")
    assert machine.shared.path("/var/lib/tfgpu/etc/tfgpu.toml").read_text() == POLICY


# ---- where limits cannot be set


def test_cgroups_that_users_nest_deeply_hide_nothing(machine: WallMachine) -> None:
    """show looks at all of them, one after another."""
    machine.shared.policy({"tfgpu.toml": POLICY})
    machine.tfgpu("wall", "apply", "--user", "alice")
    machine.cgroups.make(f"user.slice/{ALICES}/" + "/".join(["a"] * 300))
    assert machine.read_limits()[ALICES] == [8192, 8192]


def test_an_older_driver_says_so(shared_machine: SharedMachine) -> None:
    """apply ends with 1 and the release that is needed. show and its JSON say the same."""
    with open_wall_machine(shared_machine, "none") as machine:
        machine.shared.policy({"tfgpu.toml": POLICY})
        done = machine.tfgpu("wall", "apply", "--all")
        why = "driver 580.00.00 does not keep limits for cgroups; they came with release 615"
        assert (done.returncode, why in done.stderr) == (1, True)
        assert machine.tfgpu("wall", "show").stdout == f"D{why[1:]}.\n"
        assert machine.read_json("wall", "show")["problem"] == why


def test_without_cgroup_v2_it_says_so(shared_machine: SharedMachine) -> None:
    """The driver looks at /sys/fs/cgroup alone."""
    with open_wall_machine(shared_machine, "dmem") as machine:
        done = shared_machine.tfgpu("wall", "show", env=machine.environment)
        assert done.stdout == "Cgroup v2 is not mounted on /sys/fs/cgroup, where the driver needs it.\n"


def test_a_gpu_that_is_split_by_mig_is_left_out(shared_machine: SharedMachine) -> None:
    """The driver refuses limits for it. The others get theirs."""
    with open_wall_machine(shared_machine, "misc", gpus=1, instances=(8 * GIB, 8 * GIB)) as machine:
        machine.shared.policy({"tfgpu.toml": POLICY})
        done = machine.tfgpu("wall", "apply", "--all")
        assert (done.returncode, done.stdout) == (0, "nothing to change: 2 cgroups have their limits\n")
        assert "GPU 0 is split by MIG, so the driver keeps no limits for it" in done.stderr


def test_a_card_that_is_lost_keeps_no_other_from_its_limits(machine: WallMachine) -> None:
    """A card fell off the bus. The other gets its limits, and the command says which did not and fails."""
    machine.shared.policy({"tfgpu.toml": POLICY})
    machine.environment["TFGPU_SIMULATE"] += ",error=15:0"
    done = machine.tfgpu("wall", "apply", "--all")
    assert done.returncode == 1
    assert "tfgpu wall apply: GPU 0 does not answer, so its limits stay as they are: the card fell off" in done.stderr
    assert machine.read_limits() == {ALICES: [8192], BOBS: [12288]}
    (silent,) = machine.read_json("wall", "show")["silent_gpus"]
    assert (silent["gpu"], silent["problem"][:13]) == (0, "the card fell")
    assert "tfgpu wall show: GPU 0 does not answer: the card fell off" in machine.tfgpu("wall", "show").stderr


def test_a_cgroup_without_the_kernels_files_is_named(shared_machine: SharedMachine) -> None:
    """Where the controller cannot be switched on so deep, the cgroup that lacks it is named."""
    with open_wall_machine(shared_machine, "dmem/1") as machine:
        machine.shared.policy({"tfgpu.toml": POLICY})
        done = machine.tfgpu("wall", "apply", "--all")
        text = "tfgpu wall apply: the kernel's controller dmem cannot be switched on for /sys/fs/cgroup/user.slice/{}\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", text.format(ALICES) + text.format(BOBS))
    with open_wall_machine(shared_machine, "dmem/2") as machine:
        machine.shared.policy({"tfgpu.toml": POLICY})
        assert machine.tfgpu("wall", "apply", "--user", "alice").returncode == 0
        assert machine.read_limits()[ALICES] == [8192, 8192]


def test_watch_brings_each_change_about(machine: WallMachine) -> None:
    """`tfgpu watch --all-users --exec "tfgpu wall apply --all"` sets new limits as soon as a file is saved.

    It does so for a change that is for alice alone, and for a new file of her own.
    """
    machine.shared.policy({"tfgpu.toml": POLICY})
    command = [sys.executable, "-m", "tfenv"]
    apply = " ".join([*command, "wall", "apply", "--all"])
    watching = machine.start(ROOT, *command, "watch", "--all-users", "--exec", apply, stdout=subprocess.PIPE)
    with watching as watch:
        assert watch.stdout is not None
        while "Running processes" not in watch.stdout.readline():
            pass
        machine.shared.write("/etc/tfgpu/tfgpu.toml", POLICY.replace("8GiB", "3GiB"))
        first = wait_for_limits(machine, [3072, 3072])
        machine.shared.write("/etc/tfgpu/users/alice.toml", '[ceiling]\nmemory_total = "2GiB"\n')
        second = wait_for_limits(machine, [2048, 2048])
        machine.shared.write("/etc/tfgpu/users/alice.toml", '[ceiling]\nmemory_total = "1GiB"\n')
        third = wait_for_limits(machine, [1024, 1024])
        watch.terminate()
        said = watch.communicate(timeout=30)[0]
    assert (first, second, third) == (True, True, True), said


def wait_for_limits(machine: WallMachine, wanted: list[int]) -> bool:
    """Wait until these are alice's limits. Return whether they are."""
    deadline = time.monotonic() + 30
    while machine.read_limits().get(ALICES) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    return machine.read_limits().get(ALICES) == wanted
