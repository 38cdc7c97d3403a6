"""Processes that start processes see the same GPUs: real interpreters, with a small stand-in for TensorFlow.

Tokens are opaque here, MIG's too, which no simulated driver has to know. What real TensorFlow makes of them is in
tests/frameworks/tensorflow/test_environment.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SimulatedGpus
from tfenv.deploy import launch
from tfenv.launchers.parent import GRANT_VARIABLE, InheritedGrant, encode_grant, read_boot_id

#: Imports the framework, says what it may see, and starts the next generation in the way named first.
PROGRAM = """
import os, subprocess, sys

def generation(ways):
    import tensorflow
    with open("seen", "a") as file:
        file.write(os.environ.get("CUDA_VISIBLE_DEVICES", "unset") + "\\n")
    if not ways:
        return
    way, *rest = ways
    command = [sys.executable, __file__, *rest]
    if way == "spawn":
        import multiprocessing
        child = multiprocessing.get_context("spawn").Process(target=generation, args=(rest,))
        child.start()
        child.join()
        assert child.exitcode == 0
    elif way == "fork":
        if os.fork() == 0:
            generation(rest)
            os._exit(0)
        assert os.wait()[1] == 0
    elif way == "exec":
        os.execv(sys.executable, command)
    elif way == "run":
        subprocess.run([sys.executable, "-m", "tfenv", "run", "--", *command], check=True)
    else:
        os.environ.update(pair.split("=") for pair in way.split())  # what the program gives to a child
        subprocess.run(command, check=True)

if __name__ == "__main__":
    generation(sys.argv[1:])
"""

UUID = "GPU-a{}fa4e00-0000-4000-8000-00000000000{}"


class Family:
    """Starts a process in a folder with a policy, and tells what each generation saw."""

    def __init__(self, folder: Path, simulated_gpus: SimulatedGpus) -> None:
        self.folder = folder
        self.simulated_gpus = simulated_gpus
        (folder / "tensorflow").mkdir()
        (folder / "tensorflow" / "__init__.py").write_text("")
        (folder / "program.py").write_text(PROGRAM)
        self.stderr = ""

    def seen(self, policy: str, *ways: str, **variables: str) -> list[str]:
        """CUDA_VISIBLE_DEVICES in each generation, the first one's first."""
        (self.folder / "tfgpu.toml").write_text(f'[gpu]\nvisible_devices = {policy}\n[audit]\nfile = "a.jsonl"\n')
        (self.folder / "seen").unlink(missing_ok=True)
        env = launch.build_environment(self.simulated_gpus()) | variables
        done = subprocess.run(
            [sys.executable, "program.py", *ways],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        self.stderr = done.stderr
        assert done.returncode == 0, done.stderr
        return (self.folder / "seen").read_text().splitlines()


@pytest.fixture
def family(tmp_path: Path, simulated_gpus: SimulatedGpus) -> Family:
    return Family(tmp_path, simulated_gpus)


#: The grant -> what position 1 of it is, verbatim.
GRANTS = {
    "numbers": ("3,2,1", "2"),
    "UUIDs": ("GPU-a3fa4e00,GPU-a0fa4e00", "GPU-a0fa4e00"),
    "MIG": ("MIG-3e6f1c2a-0000-5000-8000-1,MIG-9a0b1c2d-0000-5000-8000-2", "MIG-9a0b1c2d-0000-5000-8000-2"),
    "MIG, as older drivers write it": ("MIG-GPU-a1fa4e00-0/1/0,MIG-GPU-a1fa4e00-0/2/0", "MIG-GPU-a1fa4e00-0/2/0"),
    "an instance and a GPU": ("MIG-GPU-a1fa4e00-0/1/0,GPU-a2fa4e00", "GPU-a2fa4e00"),
    "cut where CUDA stops": ("2, 3,void,1", "3"),
}


@pytest.mark.parametrize(("grant", "token"), GRANTS.values(), ids=GRANTS)
def test_every_generation_sees_the_same_gpu(family: Family, grant: str, token: str) -> None:
    """Position 1 of the grant stays that GPU, as it was written, in a child and its child."""
    assert family.seen("[1]", "spawn", "exec", CUDA_VISIBLE_DEVICES=grant) == [token] * 3


def test_every_way_to_start_a_process_hands_the_grant_on(family: Family) -> None:
    """spawn, exec, `tfgpu run` and fork, one below the other."""
    grant, token = GRANTS["MIG"]
    assert family.seen("[1]", "spawn", "run", "fork", "exec", CUDA_VISIBLE_DEVICES=grant) == [token] * 5


def test_without_a_grant_positions_are_the_machines(family: Family) -> None:
    """An unset variable is all GPUs, for grandchildren too, though each of them starts with a list."""
    assert family.seen("[2]", "exec", "run") == ["2"] * 3
    assert family.seen('["GPU-a3fa4e00"]', "spawn") == ["GPU-a3fa4e00"] * 2


@pytest.mark.parametrize(("grant", "seen"), [("", "-1"), ("-1", "-1"), ("NoDevFiles", "-1"), ("0,0", "-1")])
def test_a_grant_of_nothing_stays_nothing(family: Family, grant: str, seen: str) -> None:
    """No policy gives a GPU where none was granted, in no generation."""
    assert family.seen("[0]", "exec", CUDA_VISIBLE_DEVICES=grant) == [seen] * 2


def test_a_programs_wish_holds_for_its_children_and_widens_nothing(family: Family) -> None:
    """A list the program sets for a child is a request within the policy; what is not in it keeps the policy's GPUs."""
    wish = "CUDA_VISIBLE_DEVICES={}".format
    assert family.seen("[1, 2]", wish("2"), "exec", CUDA_VISIBLE_DEVICES="0,2,3") == ["2,3", "2", "2"]
    assert family.seen("[1, 2]", wish("0"), "exec", CUDA_VISIBLE_DEVICES="0,2,3") == ["2,3"] * 3
    # CUDA shows one MIG instance at a time, here the first of both that are allowed.
    mig = "MIG-GPU-a1fa4e00-0/1/0,MIG-GPU-a1fa4e00-0/2/0,MIG-GPU-a1fa4e00-0/3/0"
    second, third = mig.split(",")[1:]
    assert family.seen("[1, 2]", wish(third), CUDA_VISIBLE_DEVICES=mig) == [second, third]


def test_a_job_that_a_governed_program_submits_has_the_gpus_of_the_job(family: Family) -> None:
    """The environment of whoever submits comes with it, what it was given does not."""
    submit = "SLURM_JOB_ID=1 CUDA_VISIBLE_DEVICES=1"
    assert family.seen("[0]", submit, CUDA_VISIBLE_DEVICES="1,0") == ["1", "1"]
    submit = "SLURM_JOB_ID=1 CUDA_VISIBLE_DEVICES=1,0"
    assert family.seen("[1]", submit, "exec", CUDA_VISIBLE_DEVICES="0,1") == ["1", "0", "0"]


@pytest.mark.parametrize(
    ("boot", "current", "seen"),
    [(None, "2", "3"), ("another boot", "2", "2"), (None, "0", "0"), ("another boot", "0", "0")],
    ids=["same boot", "another boot", "changed by somebody", "both"],
)
def test_a_carried_grant_holds_on_this_boot_and_until_it_is_changed(
    family: Family, boot: str | None, current: str, seen: str
) -> None:
    """sbatch and ssh carry environments elsewhere; a list with other GPUs than were granted is a new grant."""
    carried = encode_grant(InheritedGrant("3,2,1", None, "2"), boot or read_boot_id())
    variables = {GRANT_VARIABLE: carried, "CUDA_VISIBLE_DEVICES": current}
    assert family.seen("[0]", **variables) == [seen]


RANKS = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "LOCAL_RANK")


@pytest.mark.parametrize("variable", RANKS)
def test_each_rank_of_a_job_has_its_own_gpu(family: Family, variable: str) -> None:
    """`{rank = "auto"}` gives local rank 2 the third of the granted GPUs, and its children the same."""
    seen = family.seen('{rank = "auto"}', "exec", CUDA_VISIBLE_DEVICES="3,2,1,0", **{variable: "2"})
    assert seen == ["1", "1"]


@pytest.mark.parametrize("variable", RANKS)
def test_a_list_of_one_piles_no_ranks_up_silently(family: Family, variable: str) -> None:
    """`[0]` gives every rank the same card: from rank 1 on stderr says so, and how to spread them."""
    assert family.seen("[0]", CUDA_VISIBLE_DEVICES="3,2,1,0", **{variable: "1"}) == ["3"]
    assert (family.folder / "a.jsonl").read_text().count("ranks-share-a-gpu") == 1
