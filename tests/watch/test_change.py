"""What a change of files means for a process that starts after it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from tests.machine import ME, Machine
from tfenv import machine_date
from tfenv.audit.record import MAX_RECORD_BYTES
from tfenv.config.document import Trust
from tfenv.policy.model import AuditSinks
from tfenv.values import replace
from tfenv.watch.change import (
    ChangeRecorder,
    PolicyChange,
    PolicyState,
    _join_sinks,
    compare_states,
    find_ends,
    read_state,
)

SCHEMA = json.loads((Path(__file__).parents[2] / "schemas/audit.schema.json").read_text())
Edit = Callable[..., "PolicyChange | None"]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Make a machine whose user\'s log is in the test\'s own folder."""
    machine = Machine(tmp_path)
    machine.write("home/.config/tfgpu/tfgpu.toml", f'[audit]\nfile = "{tmp_path}/log.jsonl"\n')
    return machine


def read_machine_state(machine: Machine) -> PolicyState:
    trust = Trust(ME, administrator=ME, checked_from=str(machine.root))
    return read_state(machine.start, machine.subject, str(machine.etc), trust)


@pytest.fixture
def edit(machine: Machine) -> Edit:
    """`edit("home/project/tfgpu.toml", "…")` writes a file, or with None removes it, and tells what that means."""

    def change(name: str, text: str | None) -> PolicyChange | None:
        before = read_machine_state(machine)
        if text is None:
            (machine.root / name).unlink()
        else:
            machine.write(name, text)
        return compare_states(before, read_machine_state(machine))

    return change


def list_values(change: PolicyChange | None) -> list[tuple[str, object, object]]:
    """Return each difference with its old and new value."""
    assert change is not None
    values = [difference.as_dict() for difference in change.differences]
    return [(str(value["key"]), value["old"], value["new"]) for value in values]


PROJECT = "home/project/tfgpu.toml"


def test_a_value_is_told_with_both_origins(machine: Machine, edit: Edit) -> None:
    """A new value comes with the old one, each with its file and line."""
    machine.write(PROJECT, '[gpu]\nmemory_limit = "8GiB"\n')
    change = edit(PROJECT, '# more\n[gpu]\nmemory_limit = "16GiB"\n')
    assert change is not None
    path = machine.root / PROJECT
    assert [difference.as_dict() for difference in change.differences] == [
        {
            "key": "gpu.memory_limit",
            "old": "8GiB",
            "new": "16GiB",
            "old_origin": f"{path}:2",
            "new_origin": f"{path}:3",
        }
    ]
    assert [(file.path, file.what) for file in change.files] == [(str(path), "changed")]
    assert change.after.in_force.startswith("all GPUs, at most 16.0 GiB each (")


def test_a_file_that_comes_and_goes(machine: Machine, edit: Edit) -> None:
    """What a new file sets was not set before. What a removed one set falls back to the farther layer's value."""
    machine.write("home/.config/tfgpu/tfgpu.toml", '[gpu]\nmemory_limit = "4GiB"\n')
    come = edit(PROJECT, '[gpu]\nmemory_limit = "2GiB"\nmemory_growth = true\n')
    assert list_values(come) == [("gpu.memory_limit", "4GiB", "2GiB"), ("gpu.memory_growth", None, True)]
    gone = edit(PROJECT, None)
    assert list_values(gone) == [("gpu.memory_limit", "2GiB", "4GiB"), ("gpu.memory_growth", True, None)]
    assert [file.what for change in (come, gone) if change for file in change.files] == ["new", "gone"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("etc/tfgpu.toml", "[ceiling]\nmax_devices = 2\n", ("ceiling.max_devices", None, 2)),
        (
            "etc/tfgpu.toml",
            "[group.students.ceiling]\nmax_devices = 1\n",
            ("group.students.ceiling.max_devices", None, 1),
        ),
        ("etc/users/alice.toml", "[gpu]\nmemory_growth = true\n", ("gpu.memory_growth", None, True)),
        ("etc/tfgpu.toml", "[machine]\nallow_disable = false\n", ("machine.allow_disable", None, False)),
        (PROJECT, 'on_error = "cpu"\n', ("on_error", None, "cpu")),
        (PROJECT, '[audit]\nfile = "gpu.jsonl"\n', ("audit.file", None, "gpu.jsonl")),
        (PROJECT, '[audit]\nstderr = "none"\n', ("audit.stderr", None, "none")),
    ],
)
def test_every_part_of_a_policy_is_compared(
    edit: Edit, name: str, text: str, expected: tuple[str, object, object]
) -> None:
    """Ceilings, on_error, logs and the machine's own switches are told like settings."""
    assert list_values(edit(name, text)) == [expected]


def test_what_has_no_say_is_no_difference(machine: Machine, edit: Edit) -> None:
    """A milder on_error than the machine's, and a word on stderr where the machine spoke already, change nothing."""
    machine.write("etc/tfgpu.toml", 'on_error = "fail"\n[audit]\nstderr = "none"\n')
    change = edit(PROJECT, 'on_error = "warn"\n[audit]\nstderr = "json"\n')
    assert change is not None
    assert (change.differences, change.alters_policy) == ((), False)


def test_another_comment_is_no_change_of_the_policy(machine: Machine, edit: Edit) -> None:
    """A file with other bytes and the same policy is named, and the policy is the same. So is a finding that moved."""
    machine.write(PROJECT, "[gpu]\nmemory_growth = true\nmemory_groth = true\n")
    change = edit(PROJECT, "# why\n[gpu]\nmemory_growth = true\nmemory_groth = true\n")
    assert change is not None
    assert [file.what for file in change.files] == ["changed"]
    assert (change.differences, change.alters_policy, change.valid) == ((), False, True)


def test_a_touch_is_nothing(machine: Machine) -> None:
    """A new time stamp, or the same bytes in another file, is no change."""
    path = machine.write(PROJECT, "[gpu]\nmemory_growth = true\n")
    before = read_machine_state(machine)
    path.touch()
    assert compare_states(before, read_machine_state(machine)) is None
    path.rename(path.with_suffix(".old"))
    machine.write(PROJECT, "[gpu]\nmemory_growth = true\n")
    assert compare_states(before, read_machine_state(machine)) is None


def test_a_bad_key_costs_itself_alone(machine: Machine, edit: Edit) -> None:
    """Of a file that parses the bad key is not set any more, and a new process gets the rest: not the old value."""
    machine.write(PROJECT, '[gpu]\nmemory_limit = "8GiB"\n')
    change = edit(PROJECT, '[gpu]\nmemory_limit = "16 gigs"\nmemory_growth = true\n')
    assert list_values(change) == [("gpu.memory_limit", "8GiB", None), ("gpu.memory_growth", None, True)]
    assert change is not None
    assert [error.code for error in change.errors] == ["invalid-value"]
    assert change.after.in_force.startswith("all GPUs, growth on (")


def test_a_file_that_does_not_parse_is_out_as_a_whole(machine: Machine, edit: Edit) -> None:
    """Nothing of it holds for a new process. The user's own file still does. A second mistake is another change."""
    machine.write("home/.config/tfgpu/tfgpu.toml", '[gpu]\nmemory_limit = "4GiB"\n')
    machine.write(PROJECT, '[gpu]\nmemory_limit = "8GiB"\n')
    change = edit(PROJECT, '[gpu]\nmemory_limit = "8GiB"\n[gpu\n')
    assert list_values(change) == [("gpu.memory_limit", "8GiB", "4GiB")]
    assert change is not None
    assert [file.what for file in change.files] == ["left out"]
    assert not change.valid
    assert edit(PROJECT, '[gpu]\nmemory_limit = "8GiB"\n\n[gpu\n') is not None


def test_a_file_that_everybody_may_write_is_out(machine: Machine) -> None:
    """A change of permissions alone is a change: the file does not count any more."""
    path = machine.write(PROJECT, "[gpu]\nmemory_growth = true\n")
    before = read_machine_state(machine)
    path.chmod(0o666)
    change = compare_states(before, read_machine_state(machine))
    assert list_values(change) == [("gpu.memory_growth", True, None)]
    assert change is not None
    assert [file.what for file in change.files] == ["left out"]


def test_what_on_error_makes_of_a_mistake(machine: Machine, edit: Edit) -> None:
    """Where a mistake means no import or no GPU, that is what is said of a new process."""
    machine.write("etc/tfgpu.toml", 'on_error = "fail"\n')
    change = edit(PROJECT, "[gpu\n")
    assert change is not None
    assert change.after.in_force == 'the import of a framework raises PolicyError: on_error is "fail"'
    machine.write("etc/tfgpu.toml", 'on_error = "cpu"\n')
    assert read_machine_state(machine).in_force.startswith("NO GPU: ")


def test_a_mistake_elsewhere_is_not_this_changes(machine: Machine, edit: Edit) -> None:
    """A change is valid when the files that changed are. What was wrong with another file is not its fault."""
    machine.write("home/.config/tfgpu/tfgpu.toml", "[gpu\n")
    change = edit(PROJECT, "[gpu]\nmemory_growth = true\n")
    assert change is not None
    assert change.valid
    assert change.after.findings


def test_a_gpu_this_machine_lacks_is_no_mistake(edit: Edit) -> None:
    """What cannot be planned here is found, and the file is valid all the same: it may be meant for another machine."""
    change = edit(PROJECT, '[gpu]\nvisible_devices = ["name:*none such*"]\n')
    assert change is not None
    assert change.valid
    assert change.after.findings


def test_a_configured_file_that_is_not_there_yet(machine: Machine, tmp_path: Path) -> None:
    """The file TFGPU_CONFIG names is new when it comes and gone when it goes, though it was missed before."""
    config = tmp_path / "job" / "tfgpu.toml"
    machine.start = replace(machine.start, config=str(config))
    before = read_machine_state(machine)
    machine.write("job/tfgpu.toml", "[gpu]\nmemory_growth = true\n")
    there = read_machine_state(machine)
    config.unlink()
    changes = [compare_states(before, there), compare_states(there, read_machine_state(machine))]
    assert [file.what for change in changes if change for file in change.files] == ["new", "gone"]


# ---- the record


def read_valid_records(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for record in found:
        assert not list(Draft7Validator(SCHEMA).iter_errors(record))
    return found


def test_the_record(machine: Machine, edit: Edit, tmp_path: Path) -> None:
    """`policy_changed` says what changed and what is planned now, and fits the published schema."""
    change = edit(PROJECT, '[gpu]\nvisible_devices = [1]\nmemory_limit = "8GiB"\n')
    assert change is not None
    ChangeRecorder().write(change)
    (record,) = read_valid_records(tmp_path / "log.jsonl")
    assert (record["event"], record["level"], record["pid"]) == ("policy_changed", "info", os.getpid())
    assert [(entry["key"], entry["old"], entry["new"]) for entry in record["changes"]] == list_values(change)
    assert record["changes"][1]["new_origin"] == f"{machine.root / PROJECT}:3"
    assert [source["layer"] for source in record["sources"]] == ["user", "project"]
    assert record["visible"] == "1"


def test_a_log_that_is_taken_away_is_told_so(machine: Machine, edit: Edit) -> None:
    """The log of the policy before has the change, too: it is the last it hears."""
    machine.write(PROJECT, '[audit]\nfile = "old.jsonl"\n')
    change = edit(PROJECT, '[audit]\nfile = "new.jsonl"\n')
    assert change is not None
    ChangeRecorder().write(change)
    assert [len(read_valid_records(machine.project / name)) for name in ("old.jsonl", "new.jsonl")] == [1, 1]


def test_logs_of_before_and_after_add_up() -> None:
    """Every sink of either policy gets the record but stderr, where the command speaks for itself."""
    old = AuditSinks(files=("/a",), required_files=("/a",), syslog=True, default_file=False, stderr="json")
    new = AuditSinks(files=("/b", "/a"), required_files=("/b",), default_log="/state/a.jsonl")
    expected = replace(new, files=("/a", "/b"), required_files=("/a", "/b"), syslog=True, stderr="none")
    assert (_join_sinks(old, new), _join_sinks(new, new).syslog, expected.default_file) == (expected, False, True)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_what_the_machine_requires_holds_for_a_watcher(*, before: bool, after: bool) -> None:
    """A syslog that the machine's files ask for, before the change or after it, is required of the record, too."""
    old, new = (AuditSinks(syslog=required, required_syslog=required) for required in (before, after))
    assert _join_sinks(old, new).required_syslog == (before or after)


def test_a_record_of_many_changes_is_one_line(machine: Machine, edit: Edit, tmp_path: Path) -> None:
    """A change of very many, very long values is shortened, and counted."""
    names = "".join(f'[[gpu.device]]\nmatch = "GPU-{"a" * 900}{n}"\nmemory_limit = "1GiB"\n' for n in range(40))
    machine.write("etc/tfgpu.toml", f"[gpu]\nmemory_growth = true\n{names}")
    change = edit(PROJECT, f"[gpu]\nmemory_growth = false\nmemory_limit = '2GiB'\n{names}")
    assert change is not None
    ChangeRecorder().write(change)
    (record,) = read_valid_records(tmp_path / "log.jsonl")
    assert record["truncated"] is True
    assert all(len(line) < MAX_RECORD_BYTES for line in (tmp_path / "log.jsonl").read_bytes().splitlines())


EXCEPTION = """[ceiling]
memory_limit = "8GiB"
[user.alice]
expires = 2027-01-31
reason = "thesis"
[user.alice.ceiling]
memory_limit = "16GiB"
"""


def test_an_end_is_told_with_its_reason(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the day on the value for everybody holds. The record names the table, the day and the reason."""
    monkeypatch.setattr(machine_date, "_latest", "2027-01-30")
    monkeypatch.setattr(machine_date, "_read_date", lambda: "2027-01-30")
    machine.write("etc/tfgpu.toml", EXCEPTION)
    before = read_machine_state(machine)
    assert find_ends(before) == ("2027-01-31",)
    monkeypatch.setattr(machine_date, "_read_date", lambda: "2027-01-31")
    change = compare_states(before, read_machine_state(machine))
    assert list_values(change) == [("ceiling.memory_limit", "16GiB", "8GiB")]
    assert change is not None
    assert (change.files, change.valid, find_ends(change.after)) == ((), True, ())
    assert [table.describe_end() for table in change.expired] == ["expired on 2027-01-31 (thesis)"]
    ChangeRecorder().write(change)
    record = json.loads((tmp_path / "log.jsonl").read_text())
    Draft7Validator(SCHEMA).validate(record)
    (finding,) = record["findings"]
    assert (finding["code"], finding["severity"], finding["key"]) == ("expired", "note", "user.alice")
    assert compare_states(change.after, read_machine_state(machine)) is None
