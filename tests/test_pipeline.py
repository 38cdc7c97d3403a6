"""The line from files to a Plan, on real files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.machine import GIB, HOSTILE, INVENTORY, MACHINE, ME, STRICT, Machine, assert_within
from tfenv import pipeline
from tfenv.audit import sinks
from tfenv.policy.model import Grant, MemoryLimit, Plan, Start
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
@pytest.mark.parametrize("layer", ["machine", "site", "user"])
def test_a_log_that_the_machine_asks_for_has_its_say(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, layer: str, asked: str, on_error: str
) -> None:
    """Where the administrator's log cannot be written, `on_error` decides. A site's or a user's log stops nothing."""
    monkeypatch.setattr(sinks, "SYSLOG_SOCKET", str(machine.root / "nobody-listens"))
    monkeypatch.setenv(sinks.COMPLAINED_VARIABLE, "1")
    files = {"machine": "etc/tfgpu.toml", "site": "opt/site.toml", "user": "home/.config/tfgpu/tfgpu.toml"}
    path = machine.write(files[layer], f'on_error = "{on_error}"\n[audit]\n{asked}\n')
    loaded = machine.load(replace(machine.start, site=str(path) if layer == "site" else None))
    log = sinks.AuditLog(loaded.policy.audit, loaded.start.home, ME)
    log.open_now()
    decision = pipeline.decide(loaded, Grant(), INVENTORY, elsewhere=log.findings)
    assert bool(decision.errors) == (layer == "machine")
    said = on_error if layer == "machine" else "warn"
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


# ---- the site's file


def plan_under_site(machine: Machine, site: str, project: str, **start: str) -> Plan:
    machine.write("opt/site.toml", site)
    machine.write("home/project/tfgpu.toml", project)
    return machine.plan(replace(machine.start, site=str(machine.root / "opt" / "site.toml"), **start))


def test_a_projects_limit_is_nearer_than_the_sites(machine: Machine) -> None:
    """A site sets 20 GiB for all, the project wants 2: it gets 2, also where TFGPU_CONFIG names its file."""
    site, project = "[gpu]\nmemory_limit = '20GiB'\n", "[gpu]\nmemory_limit = '2GiB'\n"
    assert plan_under_site(machine, site, project).limit == MemoryLimit(bytes=2 * GIB)
    other = machine.write("home/other.toml", "[gpu]\nmemory_limit = '3GiB'\n")
    assert plan_under_site(machine, site, project, config=str(other)).limit == MemoryLimit(bytes=3 * GIB)
    assert plan_under_site(machine, site, "[gpu]\nmemory_growth = true\n").limit == MemoryLimit(bytes=20 * GIB)


def test_a_sites_ceiling_holds_a_project(machine: Machine) -> None:
    """A site's ceiling of 4 GiB cuts the project's 8, and one of 99 lifts nothing of the machine's 20."""
    project = "[gpu]\nmemory_limit = '8GiB'\n[ceiling]\nmemory_limit = '30GiB'\n"
    made = plan_under_site(machine, "[ceiling]\nmemory_limit = '4GiB'\n", project)
    assert made.limit == MemoryLimit(bytes=4 * GIB)
    assert [finding.code for finding in made.findings] == ["clamped"]
    machine.write("etc/tfgpu.toml", MACHINE)
    loose = plan_under_site(machine, "[gpu]\nmemory_limit = '99GiB'\n[ceiling]\nmemory_limit = '99GiB'\n", "")
    assert loose.limit == MemoryLimit(bytes=20 * GIB)


def test_a_sites_numbers_are_positions(machine: Machine) -> None:
    """As in a user's file, 0 is the first of the GPUs that the grant and the machine leave."""
    machine.write("etc/tfgpu.toml", MACHINE)
    assert plan_under_site(machine, "[gpu]\nvisible_devices = [0]\n", "").visible == "1"


def test_a_sites_tables_for_groups_and_users_count(machine: Machine) -> None:
    """`[group.X]` and `[user.X]` of the site's file apply as in any layer. `[machine]` and `[project]` do not."""
    tables = (
        "[gpu]\nmemory_limit = '1GiB'\n[group.students.gpu]\nmemory_limit = '5GiB'\n[user.bob.gpu]\n"
        "memory_limit = '9GiB'\n[machine]\nallow_disable = false\n[project.'/'.gpu]\nmemory_limit = '7GiB'\n"
    )
    assert plan_under_site(machine, tables, "").limit == MemoryLimit(bytes=5 * GIB)
    loaded = machine.load(replace(machine.start, site=str(machine.root / "opt" / "site.toml")))
    assert list_codes(loaded) == ["machine-layer-only"] * 2
    assert loaded.policy.allow_disable


@pytest.mark.parametrize("content", [None, "[gpu\n"], ids=["missing", "broken"])
@pytest.mark.parametrize("on_error", ["warn", "cpu", "fail"])
def test_a_site_without_its_file_fails_as_on_error_says(machine: Machine, on_error: str, content: str | None) -> None:
    """A missing or broken site file is an error, never a policy without it and without a word."""
    machine.write("etc/tfgpu.toml", f'on_error = "{on_error}"\n')
    if content is not None:
        machine.write("opt/site.toml", content)
    loaded = machine.load(replace(machine.start, site=str(machine.root / "opt" / "site.toml")))
    decision = pipeline.decide(loaded, Grant(), INVENTORY)
    assert [finding.path for finding in decision.errors] == [str(machine.root / "opt" / "site.toml")]
    assert (decision.refused, decision.no_gpu) == (on_error == "fail", on_error == "cpu")


def test_the_machine_cannot_leave_the_site_out_by_leaving_projects_out(machine: Machine) -> None:
    """`allow_project_files = false` is about projects: the site's file still counts."""
    machine.write("etc/tfgpu.toml", "[machine]\nallow_project_files = false\n")
    made = plan_under_site(machine, "[gpu]\nmemory_limit = '20GiB'\n", "[gpu]\nmemory_limit = '2GiB'\n")
    assert made.limit == MemoryLimit(bytes=20 * GIB)


@pytest.mark.skipif(ME != 0, reason="only root can give files to somebody else")
def test_a_strangers_site_file_is_an_error(machine: Machine) -> None:
    """It counts from me, root and trusted owners. The owner of the start directory has no site."""
    path = machine.write("opt/site.toml", "[gpu]\nmemory_growth = true\n")
    os.chown(path, 65534, -1)
    os.chown(machine.project, 65534, -1)
    start = replace(machine.start, site=str(path))
    (finding,) = machine.load(start).findings
    assert (finding.code, finding.severity) == ("untrusted-owner", "error")
    assert "or root; copy it" in finding.message
    machine.write("etc/tfgpu.toml", '[machine]\ntrusted_owners = ["nobody"]\n')
    assert machine.load(start).policy.settings["memory_growth"].value is True


def test_the_sites_variable_counts_as_it_was_at_the_start() -> None:
    """`make_start` takes what the hook remembered. An empty variable is an unset one."""
    assert pipeline.make_start({"cwd": "/", "TFGPU_SITE_CONFIG": "/opt/site.toml"}).site == "/opt/site.toml"
    assert pipeline.make_start({"cwd": "/", "TFGPU_SITE_CONFIG": ""}).site is None


# ---- a project's file that TFGPU_CONFIG replaces


def write_job(machine: Machine) -> Start:
    """Write a file for TFGPU_CONFIG. Return a start with it."""
    path = machine.write("home/job.toml", "[gpu]\nmemory_growth = true\n")
    return replace(machine.start, config=str(path))


@pytest.mark.parametrize("text", ["[gpu]\nmemory_limit = '2GiB'\n", "[gpu\n"], ids=["right", "broken"])
def test_what_tfgpu_config_replaces_is_said(machine: Machine, text: str) -> None:
    """The note names the project's file that does not apply, and stops nothing."""
    path = machine.write("home/project/tfgpu.toml", text)
    start = write_job(machine)
    loaded = machine.load(start)
    assert loaded.replaced == str(path)
    (finding,) = loaded.findings
    assert (finding.code, finding.severity, finding.path) == ("project-replaced", "note", start.config)
    assert str(path) in finding.message
    assert "memory_limit" not in loaded.policy.settings


def test_nothing_is_replaced_where_nothing_is(machine: Machine) -> None:
    """No project's file, the very file in the variable, a variable that does not count: nothing is said."""
    start = write_job(machine)
    assert machine.load(start).replaced is None
    path = machine.write("home/project/tfgpu.toml", "[gpu]\nmemory_growth = true\n")
    for other in (
        replace(start, config="tfgpu.toml"),
        replace(start, config=None, site=str(path)),
        replace(start, isolated=True),
        replace(start, elevated=True),
    ):
        loaded = machine.load(other)
        assert (loaded.replaced, loaded.findings) == (None, ())
    machine.write("etc/tfgpu.toml", "[machine]\nallow_project_files = false\n")
    assert machine.load(start).replaced is None


@pytest.mark.skipif(ME != 0, reason="only root can give files to somebody else")
def test_a_strangers_file_is_not_what_was_replaced(machine: Machine) -> None:
    """It would not have counted. The one above it would."""
    above = machine.write("home/tfgpu.toml", "[gpu]\nmemory_growth = true\n")
    os.chown(machine.write("home/project/tfgpu.toml", "[gpu]\nmemory_growth = true\n"), 65534, -1)
    assert machine.load(write_job(machine)).replaced == str(above)


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
