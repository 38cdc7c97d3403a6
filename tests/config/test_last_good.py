"""A machine file that breaks: the last good copy stays in force, for those who could read the file."""

from __future__ import annotations

import json
import sys

import pytest

from tests.shared_machine import ALICE, BOB, REPOSITORY, ROOT, SharedMachine, User, shared_machine

__all__ = ["shared_machine"]

GOOD = 'on_error = "fail"\n[ceiling]\nmemory_limit = "2GiB"\n[machine]\nallow_disable = false\n'
COPY = "/var/lib/tfgpu/etc/tfgpu.toml"
BROKEN = {
    "a typo": '[ceiling\nmemory_limit = "2GiB"\n',
    "not UTF-8": "[ceiling]\nmemory_limit = '\udcff'\n",
    "too large": "#" * (1 << 19),
}


@pytest.fixture
def machine(shared_machine: SharedMachine) -> SharedMachine:
    """A machine whose policy is right, and was checked by root."""
    shared_machine.clear()
    shared_machine.policy({"tfgpu.toml": GOOD})
    command = f"umask 077; PYTHONPATH={REPOSITORY} {sys.executable} -m tfenv check"
    done = shared_machine.run(ROOT, "sh", "-c", command)
    assert done.returncode == 0, done.stdout
    return shared_machine


def explain(machine: SharedMachine, user: User = ALICE) -> dict[str, object]:
    """What a program of this user's is under, and the findings' codes with their severity."""
    told = json.loads(machine.tfgpu("explain", "--format", "json", user=user).stdout)
    found = [(finding["code"], finding["severity"]) for finding in told["findings"]]
    return {"limit": told["plan"]["limit_bytes"], "on_error": told["on_error"], "findings": found, "all": told}


@pytest.mark.parametrize("how", BROKEN)
def test_a_typo_takes_no_ceiling_away(how: str, machine: SharedMachine) -> None:
    """Ceilings, `on_error` and allow_disable stay as they were. The finding says so, and stops no program."""
    machine.path("/etc/tfgpu/tfgpu.toml").write_text(BROKEN[how], encoding="utf-8", errors="surrogateescape")
    seen = explain(machine)
    assert seen["limit"] == 2 << 30
    assert [severity for _, severity in seen["findings"]] == ["warning"]  # type: ignore[attr-defined]
    told: dict[str, list[dict[str, str]]] = seen["all"]  # type: ignore[assignment]
    assert "the last good copy, of 20" in told["findings"][0]["message"]
    assert COPY in json.dumps(told["ceilings"])
    assert machine.tfgpu("check").returncode == 1
    assert explain(machine)["limit"] == 2 << 30, "root's check of a broken file keeps no copy of it"


def test_a_file_that_others_could_write_falls_back_too(machine: SharedMachine) -> None:
    """What somebody else may have written does not count, and what root wrote before does."""
    path = machine.path("/etc/tfgpu/tfgpu.toml")
    path.write_text("[ceiling]\n")
    path.chmod(0o666)
    assert explain(machine)["limit"] == 2 << 30


def test_without_a_copy_it_is_an_error(shared_machine: SharedMachine) -> None:
    """Where nobody ever checked the layer there is nothing to fall back to."""
    shared_machine.policy({"tfgpu.toml": BROKEN["a typo"]})
    assert explain(shared_machine)["findings"] == [("syntax", "error")]


def test_a_copy_that_others_could_write_does_not_count(machine: SharedMachine) -> None:
    """The copy is judged as the file is."""
    machine.path(COPY).chmod(0o666)
    machine.path("/etc/tfgpu/tfgpu.toml").write_text(BROKEN["a typo"])
    assert explain(machine)["findings"] == [("syntax", "error")]


def test_a_copy_is_for_those_who_could_read_the_file(machine: SharedMachine) -> None:
    """Mode and group are kept, and a file that is gone leaves no copy."""
    machine.write("/etc/tfgpu/users/alice.toml", '[ceiling]\nmemory_limit = "1GiB"\n', ROOT, 0o640)
    machine.path("/etc/tfgpu/users/alice.toml").chmod(0o640)
    assert machine.tfgpu("check", "/etc/tfgpu").returncode in (0, 1)
    copy = machine.path("/var/lib/tfgpu/etc/users/alice.toml")
    assert copy.stat().st_mode & 0o777 == 0o640
    assert machine.run(BOB, "cat", "/var/lib/tfgpu/etc/users/alice.toml").returncode != 0
    machine.path("/etc/tfgpu/users/alice.toml").unlink()
    machine.tfgpu("check", "/etc/tfgpu")
    assert not copy.exists()


def test_others_keep_nothing(machine: SharedMachine) -> None:
    """A user's check reads, and writes no copy."""
    machine.path("/etc/tfgpu/tfgpu.toml").write_text(GOOD.replace("2GiB", "3GiB"))
    assert machine.tfgpu("check", user=ALICE).returncode == 0
    assert "2GiB" in machine.path(COPY).read_text()
    assert machine.tfgpu("check", "/etc/tfgpu").returncode == 0
    assert "3GiB" in machine.path(COPY).read_text()


# ---- what check says of it


def test_check_says_that_the_copy_is_another(machine: SharedMachine) -> None:
    """Somebody else's check names both files and what root runs. Root's own check keeps the copy, and says nothing."""
    machine.path("/etc/tfgpu/tfgpu.toml").write_text(GOOD.replace("2GiB", "3GiB"))
    for arguments in ((), ("/etc/tfgpu",)):
        done = machine.tfgpu("check", *arguments, user=ALICE)
        assert done.returncode == 0, "a note is no mistake"
        assert f"/etc/tfgpu/tfgpu.toml: differs from its last good copy {COPY}, of 20" in done.stdout
        assert "run `sudo tfgpu check /etc/tfgpu` to keep a new copy [note copy-differs]" in done.stdout
    assert "copy-differs" not in machine.tfgpu("check").stdout
    assert "copy-differs" not in machine.tfgpu("check", user=ALICE).stdout


def test_of_a_file_with_errors_the_copy_stays_another(machine: SharedMachine) -> None:
    """Root's check keeps no copy of it, and says that the copy is older."""
    machine.path("/etc/tfgpu/tfgpu.toml").write_text(GOOD.replace('"2GiB"', "3"))
    done = machine.tfgpu("check")
    assert done.returncode == 1
    assert "copy-differs" in done.stdout
    assert "2GiB" in machine.path(COPY).read_text()


def test_check_of_a_broken_file_names_the_copy_in_force(machine: SharedMachine) -> None:
    """Programs have the copy, so the check of the directory says which file that is."""
    machine.path("/etc/tfgpu/tfgpu.toml").write_text(BROKEN["a typo"])
    done = machine.tfgpu("check", "/etc/tfgpu")
    assert done.returncode == 1
    assert f"programs use its last good copy {COPY}, of 20" in done.stdout


def test_without_a_copy_check_says_nothing_of_it(shared_machine: SharedMachine) -> None:
    """A machine on which root never ran tfgpu has none, and users cannot change that."""
    shared_machine.policy({"tfgpu.toml": GOOD})
    assert "copy-differs" not in shared_machine.tfgpu("check", user=ALICE).stdout


@pytest.mark.parametrize("command", [("check",), ("check", "/etc/tfgpu")])
def test_these_commands_of_root_keep_a_copy(command: tuple[str, ...], shared_machine: SharedMachine) -> None:
    """Each of them keeps what it found without errors. (For `wall apply` and `watch` see their tests.)"""
    shared_machine.policy({"tfgpu.toml": GOOD})
    shared_machine.tfgpu(*command)
    assert shared_machine.path(COPY).read_text() == GOOD
