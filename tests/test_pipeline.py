"""The line from files to a Plan, on real files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.machine import GIB, HOSTILE, INVENTORY, MACHINE, ME, STRICT, Machine, assert_within
from tfenv import pipeline
from tfenv.audit import sinks
from tfenv.policy.model import Grant, MemoryLimit
from tfenv.values import replace


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def list_codes(loaded: pipeline.LoadedPolicy) -> list[str]:
    return [finding.code for finding in loaded.findings]


def test_nothing_is_found_where_nothing_is(machine: Machine) -> None:
    """Without any file there is no policy and no finding."""
    loaded = machine.load()
    assert not loaded.found
    assert loaded.policy.silent


def test_all_layers_meet_in_one_plan(machine: Machine) -> None:
    """The project's choice counts within what the machine allows, its limit is clamped, the user's growth stands."""
    machine.write("etc/tfgpu.toml", MACHINE)
    machine.write("home/.config/tfgpu/tfgpu.toml", "[gpu]\nmemory_growth = true\nmemory_limit = '1GiB'\n")
    machine.write("home/project/tfgpu.toml", "[gpu]\nvisible_devices = [0]\nmemory_limit = '30GiB'\n")
    plan = machine.plan()
    assert (plan.visible, plan.growth) == ("1", True)
    assert [device.limit for device in plan.devices or ()] == [MemoryLimit(bytes=20 * GIB)]
    assert [finding.code for finding in plan.findings] == ["clamped"]


@pytest.mark.parametrize("on_error", ["warn", "cpu", "fail"])
@pytest.mark.parametrize("asked", ["file = '/no/such/directory/<uid>.jsonl'", "syslog = true"])
@pytest.mark.parametrize("layer", ["machine", "user"])
def test_a_log_that_the_machine_asks_for_has_its_say(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, layer: str, asked: str, on_error: str
) -> None:
    """Where the administrator's log cannot be written, `on_error` decides. A user's own log stops nothing."""
    monkeypatch.setattr(sinks, "SYSLOG_SOCKET", str(machine.root / "nobody-listens"))
    monkeypatch.setenv(sinks.COMPLAINED_VARIABLE, "1")
    file = {"machine": "etc/tfgpu.toml", "user": "home/.config/tfgpu/tfgpu.toml"}[layer]
    machine.write(file, f'on_error = "{on_error}"\n[audit]\n{asked}\n')
    loaded = machine.load()
    log = sinks.AuditLog(loaded.policy.audit, loaded.start.home, ME)
    log.open_now()
    decision = pipeline.decide(loaded, Grant(), INVENTORY, elsewhere=log.findings)
    assert bool(decision.errors) == (layer == "machine")
    said = "warn" if layer == "user" else on_error
    assert (decision.refused, decision.no_gpu) == (said == "fail", said == "cpu")


def test_a_broken_file_is_left_out_and_the_others_apply(machine: Machine) -> None:
    """A project file that does not parse costs its own settings, with its position, and no ceiling."""
    machine.write("etc/tfgpu.toml", MACHINE)
    broken = machine.write("home/project/tfgpu.toml", "[gpu]\nmemory_limit = \n")
    loaded = machine.load()
    (finding,) = loaded.findings
    assert (finding.code, finding.path, finding.line) == ("syntax", str(broken), 2)
    assert pipeline.make_plan(loaded, Grant(), INVENTORY).visible == "1,2,3"


def test_findings_of_a_plan_have_positions(machine: Machine) -> None:
    """A wish for a GPU that is not there names file, line and column."""
    path = machine.write("home/project/tfgpu.toml", "# ours\n[gpu]\n  visible_devices = [7]\n")
    (finding,) = machine.plan().findings
    assert str(finding).startswith(f"{path}:3:3: gpu.visible_devices: ")


def test_tfgpu_config_replaces_the_walk_and_never_the_machine_layer(machine: Machine) -> None:
    """The file it names counts as the project's. One that is not there is an error."""
    machine.write("etc/tfgpu.toml", MACHINE)
    machine.write("home/project/tfgpu.toml", "[gpu]\nvisible_devices = [0]\n")
    other = machine.write("home/other.toml", "[gpu]\nvisible_devices = [2]\n")
    assert machine.plan(replace(machine.start, config=str(other))).visible == "3"
    missing = machine.load(replace(machine.start, config="nowhere.toml"))
    assert list_codes(missing) == ["not-found"]
    assert pipeline.select_errors(missing.findings)


def test_options_of_tfgpu_run_are_the_nearest_layer(machine: Machine) -> None:
    """They win over the project's settings and are held by the machine's ceilings."""
    machine.write("etc/tfgpu.toml", MACHINE)
    machine.write("home/project/tfgpu.toml", "[gpu]\nmemory_limit = '1GiB'\n")
    plan = machine.plan(replace(machine.start, run="[gpu]\nmemory_limit = '99GiB'\n"))
    assert plan.limit == MemoryLimit(bytes=20 * GIB)


def test_the_administrator_can_leave_project_files_out(machine: Machine) -> None:
    """`allow_project_files = false`: only machine and user have a say."""
    machine.write("etc/tfgpu.toml", "[machine]\nallow_project_files = false\n")
    machine.write("home/project/tfgpu.toml", "[gpu]\nmemory_growth = true\n")
    assert machine.load().policy.silent


def test_under_sudo_only_the_machine_layer_counts(machine: Machine) -> None:
    """Root must not run by the file of whoever owns the directory."""
    machine.write("etc/tfgpu.toml", MACHINE)
    machine.write("home/project/tfgpu.toml", "[gpu]\nmemory_growth = true\n")
    loaded = machine.load(replace(machine.start, elevated=True))
    assert [source.layer for source in loaded.sources] == ["machine"]


def test_isolated_mode_walks_nowhere(machine: Machine) -> None:
    """`python -I` and `-E` know neither the working directory nor TFGPU_CONFIG."""
    path = machine.write("home/project/tfgpu.toml", "[gpu]\nmemory_growth = true\n")
    assert not machine.load(replace(machine.start, isolated=True, config=str(path))).found


@pytest.mark.skipif(ME != 0, reason="only root can give files to somebody else")
def test_a_strangers_file_counts_only_if_the_administrator_trusts_him(machine: Machine) -> None:
    """A planted file is dropped. `trusted_owners` of the machine layer lets it in."""
    path = machine.write("home/project/tfgpu.toml", "[gpu]\nmemory_growth = true\n")
    os.chown(path, 65534, -1)
    assert list_codes(machine.load()) == ["untrusted-owner"]
    machine.write("etc/tfgpu.toml", '[machine]\ntrusted_owners = ["nobody", "no-such-user"]\n')
    assert machine.load().policy.settings["memory_growth"].value is True


@pytest.mark.skipif(ME != 0, reason="only root can give files to somebody else")
@pytest.mark.parametrize("name", ["tfgpu.toml", "pyproject.toml"])
def test_a_strangers_file_is_a_warning_and_the_walk_goes_on(name: str, machine: Machine) -> None:
    """Whoever plants a file takes nobody's GPU, is not parsed, and hides no policy above."""
    machine.write("home/tfgpu.toml", "[gpu]\nmemory_growth = true\n")
    os.chown(machine.write(f"home/project/{name}", "[[tool.tfgpu] this is no TOML"), 65534, -1)
    loaded = machine.load()
    assert [(finding.code, finding.severity) for finding in loaded.findings] == [("untrusted-owner", "warning")]
    assert loaded.policy.settings["memory_growth"].value is True


@pytest.mark.skipif(ME != 0, reason="only root can give files to somebody else")
@pytest.mark.parametrize("name", ["tfgpu.toml", "pyproject.toml"])
def test_a_file_of_others_in_a_public_directory_is_a_warning(name: str, machine: Machine) -> None:
    """Anybody could have put it there. One's own file in such a directory is a mistake that stops the walk."""
    machine.write("home/tfgpu.toml", "[gpu]\nmemory_growth = true\n")
    machine.write("etc/tfgpu.toml", '[machine]\ntrusted_owners = ["nobody"]\n')
    table = "tool.tfgpu.gpu" if name == "pyproject.toml" else "gpu"
    path = machine.write(f"home/project/{name}", f"[{table}]\nmemory_growth = false\n")
    path.parent.chmod(0o777)
    os.chown(path, 65534, -1)
    loaded = machine.load()
    assert [(finding.code, finding.severity) for finding in loaded.findings] == [("insecure-permissions", "warning")]
    assert loaded.policy.settings["memory_growth"].value is True
    os.chown(path, ME, -1)
    assert [finding.severity for finding in machine.load().findings] == ["error"]


@pytest.mark.skipif(ME != 0, reason="only root can give files to somebody else")
def test_a_trusted_owners_pyproject_that_only_mentions_us_hides_nothing(machine: Machine) -> None:
    """Without a table of ours it is no policy, whoever owns it."""
    machine.write("home/tfgpu.toml", "[gpu]\nmemory_growth = true\n")
    machine.write("etc/tfgpu.toml", '[machine]\ntrusted_owners = ["nobody"]\n')
    os.chown(machine.write("home/project/pyproject.toml", "[project]\nname = 'uses-tfgpu'\n"), 65534, -1)
    loaded = machine.load()
    assert list_codes(loaded) == []
    assert loaded.policy.settings["memory_growth"].value is True


def test_the_start_is_read_from_what_was_remembered() -> None:
    """A relative script stands in the working directory. `-m`, `-c` and a deleted directory have none."""
    start = pipeline.make_start({"cwd": "/srv/p", "script": "bin/train.py", "SUDO_UID": "1000"})
    assert (start.cwd, start.program_folders, start.elevated) == ("/srv/p", ("/srv/p/bin",), True)
    for script in ("-m", "-c", "", None):
        assert pipeline.make_start({"cwd": "/srv/p", "script": script}).program_folders == ()
    assert pipeline.make_start({"cwd": None, "script": "train.py"}).program_folders == ()
    assert pipeline.make_start({"cwd": None, "XDG_CONFIG_HOME": "relative"}).config_home != "relative"


@pytest.mark.parametrize(
    ("remembered", "log"),
    [
        ({"XDG_STATE_HOME": "/srv/state/"}, "/srv/state/tfgpu/audit.jsonl"),
        ({"XDG_STATE_HOME": "state"}, "~/.local/state/tfgpu/audit.jsonl"),
        ({"XDG_STATE_HOME": ""}, "~/.local/state/tfgpu/audit.jsonl"),
        ({"XDG_STATE_HOME": "/srv/state", "SUDO_UID": "1000"}, "~/.local/state/tfgpu/audit.jsonl"),
        ({}, "~/.local/state/tfgpu/audit.jsonl"),
    ],
)
def test_the_default_log_is_in_the_users_state_directory(
    machine: Machine, remembered: dict[str, str | None], log: str
) -> None:
    """XDG_STATE_HOME names it, if it is absolute and the process is the user's own."""
    start = pipeline.make_start({"cwd": str(machine.project), **remembered})
    assert pipeline.load(start).policy.audit.default_log == log


def test_a_hostile_project_file_widens_nothing(machine: Machine) -> None:
    """Whatever a cloned repository says, devices, memory, growth, on_error and the log stay the administrator's."""
    machine.write("etc/tfgpu.toml", STRICT)
    machine.write("home/project/tfgpu.toml", HOSTILE)
    assert_within(machine, machine.load())
