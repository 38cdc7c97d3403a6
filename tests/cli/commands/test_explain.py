"""`tfgpu explain`: each value with the one who set it, and what follows on this machine."""

from __future__ import annotations

import grp
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import REPOSITORY, Tfgpu
from tests.shared_machine import ALICE, BOB, ROOT, SharedMachine
from tfenv.policy.model import Grant
from tfenv.simulate.environment import build_environment, parse_gpus
from tfenv.values import as_dict

USER = '[gpu]\nmemory_limit = "20GiB"\n\n[ceiling]\nrequire_memory_growth = true\nmemory_limit = "50%"\n'
PROJECT = '[gpu]\nvisible_devices = [1, 2]\nmemory_limit = "16GiB"\nmemory_growth = false\n'


@pytest.fixture
def layers(project: Path, tmp_path: Path) -> Path:
    """Write a user's file and a project's. Return the user's."""
    (project / "tfgpu.toml").write_text(PROJECT)
    user = tmp_path / "config" / "tfgpu" / "tfgpu.toml"
    user.parent.mkdir(parents=True)
    user.write_text(USER)
    return user


@pytest.fixture(scope="module")
def four_gpus() -> dict[str, str]:
    """Return variables that show four GPUs to NVML. The last is another model."""
    made = build_environment(parse_gpus("3x24GiB:NVIDIA A10,1x80GiB:NVIDIA A100"), base={})
    assert "count=4" in made["TFGPU_SIMULATE"]
    return made


def read_json(result: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(result.stdout)


def test_each_value_has_its_origin(layers: Path, tfgpu: Tfgpu) -> None:
    """A value is shown as written, with file:line, and so are the values it overrode."""
    lines = [" ".join(line.split()) for line in tfgpu("explain").stdout.splitlines()]
    chosen = lines.index('memory_limit = "16GiB" tfgpu.toml:3')
    assert lines[chosen + 1] == f'overrides "20GiB" {layers}:2'
    assert f"require_memory_growth = true {layers}:5" in lines


def test_a_table_for_one_user_overrides(project: Path, tfgpu: Tfgpu) -> None:
    """Inside one file the more specific table wins. What it replaced is shown, and which table it is."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    text = f'[user.{user}.gpu]\nmemory_limit = "2GiB"\n\n[gpu]\nmemory_limit = "1GiB"\n'
    (project / "tfgpu.toml").write_text(text + '\n[user.somebody-else.gpu]\nmemory_limit = "3GiB"\n')
    lines = [" ".join(line.split()) for line in tfgpu("explain").stdout.splitlines()]
    chosen = lines.index(f'memory_limit = "2GiB" tfgpu.toml:2 [user.{user}.gpu]')
    assert lines[chosen + 1] == 'overrides "1GiB" tfgpu.toml:5'
    assert not any("3GiB" in line for line in lines)


def test_an_exception_says_from_what(project: Path, tfgpu: Tfgpu) -> None:
    """Below a ceiling stands what it replaces in its own layer."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    (project / "tfgpu.toml").write_text(f"[ceiling]\nmax_devices = 1\n[user.{user}.ceiling]\nmax_devices = 2\n")
    lines = [" ".join(line.split()) for line in tfgpu("explain").stdout.splitlines()]
    held = lines.index(f"max_devices = 2 tfgpu.toml:4 [user.{user}.ceiling]")
    assert lines[held + 1] == "replaces 1 tfgpu.toml:2"


OBSERVED = """
[gpu]
memory_limit = "16GiB"
[user.{user}]
expires = 9999-01-31
reason = "thesis"
[user.{user}.ceiling]
max_devices = 3
[group."{group}"]
expires = 2026-01-31
[group."{group}".ceiling]
max_devices = 1
[observe.ceiling]
memory_limit = "4GiB"
require_memory_growth = true
[observe.gpu]
visible_devices = [0, 1]
"""


def test_a_second_column_for_what_is_observed(tmp_path: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """Each observed value has its place, and each GPU what it would have. Exceptions have their day and reason."""
    account = pwd.getpwuid(os.geteuid())
    own = tmp_path / "config" / "tfgpu" / "tfgpu.toml"
    own.parent.mkdir(parents=True)
    group = grp.getgrgid(account.pw_gid).gr_name
    own.write_text(OBSERVED.format(user=account.pw_name, group=group))
    lines = [" ".join(line.split()) for line in tfgpu("explain", env=four_gpus).stdout.splitlines()]
    observed = lines.index("Observed, not in force")
    assert lines[observed + 1 : observed + 4] == [
        f"visible_devices = [0, 1] {own}:17 [observe.gpu]",
        f'memory_limit = "4GiB" {own}:14 [observe.ceiling]',
        f"require_memory_growth = true {own}:15 [observe.ceiling]",
    ]
    exceptions = lines.index("Exceptions")
    assert lines[exceptions + 1 : exceptions + 3] == [
        f"[user.{account.pw_name}] expires on 9999-01-31 (thesis) {own}:4",
        f"[group.{group}] expired on 2026-01-31 {own}:9",
    ]
    assert f"max_devices = 3 {own}:8 [user.{account.pw_name}.ceiling], until 9999-01-31 (thesis)" in lines
    assert "memory growth set by the program (observed: on)" in lines
    rows = [line.split() for line in lines if line.startswith("GPU:")]
    assert [row[-2:] if "GPU-" in row[-1] else row for row in rows] == [
        ["GiB", rows[0][-1]], ["GiB", rows[1][-1]], ["GPU", rows[2][-1]],
    ]  # fmt: skip
    assert [" ".join(row[-5:-1]) for row in rows] == ["16.0 GiB 4.0 GiB", "16.0 GiB 4.0 GiB", "16.0 GiB no GPU"]


def test_what_is_observed_is_in_json(tmp_path: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """Scripts get the observed values, the plan that would follow, and the exceptions."""
    account = pwd.getpwuid(os.geteuid())
    own = tmp_path / "config" / "tfgpu" / "tfgpu.toml"
    own.parent.mkdir(parents=True)
    own.write_text(OBSERVED.format(user=account.pw_name, group=grp.getgrgid(account.pw_gid).gr_name))
    told = read_json(tfgpu("explain", "--format", "json", env=four_gpus))
    assert told["plan"]["growth"] is None
    observed = told["observed"]
    assert (observed["plan"]["growth"], observed["tell"], observed["refused"]) == (True, False, False)
    assert [device["limit_bytes"] for device in observed["plan"]["devices"]] == [4 << 30] * 2
    assert (observed["settings"]["visible_devices"]["line"], observed["ceilings"][0]["line"]) == (17, 14)
    ends = [(one["expires"], one["reason"], one["expired"]) for one in told["exceptions"]]
    assert ends == [("9999-01-31", "thesis", False), ("2026-01-31", "", True)]
    assert (told["ceilings"][0]["expires"], told["ceilings"][0]["reason"]) == ("9999-01-31", "thesis")
    assert "expired" in [finding["code"] for finding in told["findings"]]


def test_what_clamped_it(layers: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """Below a value that a ceiling changed stands which ceiling did."""
    result = tfgpu("explain", env=four_gpus)
    assert f"clamped: 16.0 GiB is above the ceiling of 50% from {layers} (ceiling.memory_limit)" in result.stdout
    assert "clamped: growth stays on" in result.stdout
    assert result.returncode == 0


def test_what_a_count_cut(project: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """`max_devices` clamps the list it cut: that is told below the list."""
    (project / "tfgpu.toml").write_text("[gpu]\nvisible_devices = [0, 1, 2]\n[ceiling]\nmax_devices = 2\n")
    lines = [" ".join(line.split()) for line in tfgpu("explain", env=four_gpus).stdout.splitlines()]
    chosen = lines.index("visible_devices = [0, 1, 2] tfgpu.toml:2")
    assert lines[chosen + 1] == "clamped: at most 2 of 3 GPUs (0, 1, 2)"


def test_the_plan_names_the_cards(layers: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """With NVML the plan has each GPU's number, name, UUID and limit in bytes. A clamp is no finding."""
    plan = read_json(tfgpu("explain", "--format", "json", env=four_gpus))["plan"]
    assert (plan["cuda_visible_devices"], plan["growth"], plan["allocator"]) == ("1,2", True, "bfc")
    assert [(device["index"], device["name"]) for device in plan["devices"]] == [(1, "NVIDIA A10"), (2, "NVIDIA A10")]
    assert all(device["uuid"].startswith("GPU-") for device in plan["devices"])
    assert [device["limit_fraction"] for device in plan["devices"]] == [0.5, 0.5]


def test_rows_are_whole_in_a_pipe(layers: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """In a pipe a row of the table is one line with the whole UUID, for grep."""
    shown = tfgpu("explain", env=four_gpus).stdout
    uuids = [
        device["uuid"] for device in read_json(tfgpu("explain", "--format", "json", env=four_gpus))["plan"]["devices"]
    ]
    rows = [line.split() for line in shown.splitlines() if line.startswith("  GPU:")]
    assert [row[-1] for row in rows] == uuids
    assert "12.0 GiB (50%)" in shown


def test_long_lists_are_shortened(project: Path, tfgpu: Tfgpu) -> None:
    """Of eight UUIDs the first few are shown, and how many there are, so that origins stay in view. JSON has all."""
    uuids = [f"GPU-{number}932f937-0000-4000-8000-000000000000" for number in range(8)]
    text = f"[gpu]\nmemory_growth = true\n[ceiling]\nallowed_devices = {uuids}\nmemory_limit = '8GiB'\n"
    (project / "tfgpu.toml").write_text(text)
    shown = tfgpu("explain").stdout.splitlines()
    assert max(len(line) for line in shown if "tfgpu.toml:" in line) <= 100
    (line,) = [line for line in shown if "allowed_devices" in line]
    assert '["GPU-0932f937…", "GPU-1932f937…", "GPU-2932f937…", … 8 in all]' in line
    told = read_json(tfgpu("explain", "--format", "json"))
    assert [c["value"] for c in told["ceilings"] if c["key"] == "ceiling.allowed_devices"] == [uuids]


def test_without_a_gpu(layers: Path, tfgpu: Tfgpu) -> None:
    """Without a driver the plan is there all the same, and why nothing is known of the cards is said."""
    result = tfgpu("explain")
    if "tfenv does not know their names and sizes" not in result.stdout:
        pytest.skip("this machine has GPUs")
    assert "CUDA_VISIBLE_DEVICES  1,2" in result.stdout


def test_the_grant_of_this_environment(layers: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """Positions count within what was granted here: [1, 2] of "3,2,0" are the cards 2 and 0."""
    granted = four_gpus | {"CUDA_VISIBLE_DEVICES": "3,2,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    told = read_json(tfgpu("explain", "--format", "json", env=granted))
    assert told["grant"]["tokens"] == ["3", "2", "0"]
    assert told["plan"]["cuda_visible_devices"] == "2,0"


def test_where_files_were_looked_for(project: Path, tfgpu: Tfgpu, tmp_path: Path) -> None:
    """Without any file each layer says where one was looked for, and that programs run unchanged."""
    result = tfgpu("explain")
    assert result.returncode == 0
    rows = [line.split()[:3] for line in result.stdout.splitlines() if line.startswith(("  user", "  project"))]
    assert rows == [["user", str(tmp_path / "config/tfgpu/tfgpu.toml"), "-"], ["project", str(project), "-"]]
    assert "programs run unchanged. Run `tfgpu init`" in result.stdout


def test_a_dropped_file_says_why(project: Path, tfgpu: Tfgpu) -> None:
    """A file that does not count is shown as dropped, with the reason, and the exit code is 1."""
    path = project / "tfgpu.toml"
    path.write_text(PROJECT)
    path.chmod(0o666)
    told = tfgpu("explain", "--format", "json")
    assert told.returncode == 1
    seen = [file for file in read_json(told)["files"] if file["state"] == "dropped"]
    assert [file["path"] for file in seen] == [str(path)]
    assert "writable by everybody" in seen[0]["why"]
    assert "  ignored  " in tfgpu("explain").stdout


def list_files(result: subprocess.CompletedProcess[str]) -> list[tuple[str, str, str]]:
    """List layer, path and state of each file but the machine's."""
    files = [(file["layer"], file["path"], file["state"]) for file in read_json(result)["files"]]
    return [file for file in files if file[0] != "machine"]


def test_the_sites_file_is_between_machine_and_user(layers: Path, project: Path, tfgpu: Tfgpu, tmp_path: Path) -> None:
    """The file of TFGPU_SITE_CONFIG is listed as the site's. The user's value and the project's override its own."""
    site = tmp_path / "site.toml"
    site.write_text('[gpu]\nmemory_limit = "30GiB"\nallocator = "bfc"\n')
    env = {"TFGPU_SITE_CONFIG": str(site)}
    assert list_files(tfgpu("explain", "--format", "json", env=env)) == [
        ("site", str(site), "read"), ("user", str(layers), "read"), ("project", str(project / "tfgpu.toml"), "read"),
    ]  # fmt: skip
    lines = [" ".join(line.split()) for line in tfgpu("explain", env=env).stdout.splitlines()]
    assert f"site {site} read" in lines
    chosen = lines.index('memory_limit = "16GiB" tfgpu.toml:3')
    assert lines[chosen + 1 : chosen + 3] == [f'overrides "20GiB" {layers}:2', f'overrides "30GiB" {site}:2']
    assert f'allocator = "bfc" {site}:3' in lines


@pytest.mark.parametrize(
    ("elevated", "why"),
    [
        ({"SUDO_UID": "1000"}, "TFGPU_SITE_CONFIG does not count under sudo"),
        ({}, "TFGPU_SITE_CONFIG names the file of another layer"),
    ],
)
def test_why_there_is_no_sites_file(layers: Path, tfgpu: Tfgpu, elevated: dict[str, str], why: str) -> None:
    """Under sudo the variable does not count. The user's own file stays the user's."""
    files = read_json(tfgpu("explain", "--format", "json", env={"TFGPU_SITE_CONFIG": str(layers)} | elevated))["files"]
    assert [(file["path"], file["state"], file["why"]) for file in files if file["layer"] == "site"] == [
        (str(layers), "none", why)
    ]


def test_a_sites_file_beside_the_program_is_no_projects(project: Path, tfgpu: Tfgpu) -> None:
    """It is the site's, and the search says that it found no other."""
    (project / "tfgpu.toml").write_text(PROJECT)
    shown = tfgpu("explain", env={"TFGPU_SITE_CONFIG": "tfgpu.toml"}).stdout
    assert "  site     tfgpu.toml" in shown
    assert "  no other tfgpu.toml and no pyproject.toml" in shown


def test_what_tfgpu_config_replaces_is_listed(project: Path, tfgpu: Tfgpu, tmp_path: Path) -> None:
    """The project's file is in the list with the reason, in text and JSON, and a note names it. The code is 0."""
    (project / "tfgpu.toml").write_text(PROJECT)
    job = tmp_path / "job.toml"
    job.write_text('[gpu]\nmemory_limit = "20GiB"\n')
    env = {"TFGPU_CONFIG": str(job)}
    told = tfgpu("explain", "--format", "json", env=env)
    assert told.returncode == 0
    assert list_files(told)[1:] == [
        ("project", str(project / "tfgpu.toml"), "replaced"), ("project", str(job), "read"),
    ]  # fmt: skip
    shown = tfgpu("explain", env=env).stdout
    assert "replaced  TFGPU_CONFIG names another file" in shown
    assert f"so the project's {project / 'tfgpu.toml'} does not apply [note project-replaced]" in shown


def test_what_a_missing_tfgpu_config_replaces_is_listed(project: Path, tfgpu: Tfgpu) -> None:
    """Where the file in the variable is not there, the project's is replaced all the same."""
    (project / "tfgpu.toml").write_text(PROJECT)
    told = tfgpu("explain", "--format", "json", env={"TFGPU_CONFIG": "/nowhere/job.toml"})
    assert list_files(told)[1:] == [
        ("project", str(project / "tfgpu.toml"), "replaced"), ("project", "/nowhere/job.toml", "dropped"),
    ]  # fmt: skip


def test_another_directory(layers: Path, project: Path, tfgpu: Tfgpu) -> None:
    """--project tells of a program that starts elsewhere. A path that is no directory is wrong usage."""
    other = project / "other"
    other.mkdir()
    (other / "tfgpu.toml").write_text("[gpu]\nvisible_devices = 'none'\n")
    told = read_json(tfgpu("explain", "--project", "other", "--format", "json"))
    assert told["settings"]["visible_devices"]["path"] == str(other / "tfgpu.toml")
    assert told["plan"]["devices"] == []
    assert tfgpu("explain", "--project", "nowhere").returncode == 2


def test_run_options_are_a_layer(layers: Path, tfgpu: Tfgpu) -> None:
    """Options of `tfgpu run` around it are shown as what they are: the nearest layer."""
    told = read_json(tfgpu("explain", "--format", "json", env={"TFGPU_RUN": 'gpu = {memory_limit = "1GiB"}'}))
    limit = told["settings"]["memory_limit"]
    assert (limit["value"], limit["layer"], limit["path"]) == ("1GiB", "run", "<tfgpu run>")
    assert [lost["value"] for lost in limit["overrides"]] == ["16GiB", "20GiB"]


def test_disabled(layers: Path, tfgpu: Tfgpu) -> None:
    """TFGPU_DISABLE is told: the policy is read, and nothing follows."""
    result = tfgpu("explain", env={"TFGPU_DISABLE": "1"})
    assert "TFGPU_DISABLE=1 switches the policy off" in result.stdout


def test_it_needs_no_tensorflow(layers: Path, project: Path, variables: dict[str, str]) -> None:
    """Explaining imports no TensorFlow and leaves the environment alone."""
    program = "import os, sys, tfenv; before = dict(os.environ); tfenv.explain(); "
    program += "print('tensorflow' in sys.modules, before == dict(os.environ))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=project, env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False True\n"


@pytest.mark.parametrize(("on_error", "devices", "refused"), [("warn", 4, False), ("cpu", 0, False), ("fail", 4, True)])
def test_what_follows_from_an_error(
    project: Path, tfgpu: Tfgpu, four_gpus: dict[str, str], on_error: str, devices: int, refused: bool
) -> None:
    """A wish that no GPU meets is a finding, and what follows is what `on_error` says."""
    (project / "tfgpu.toml").write_text(f"on_error = '{on_error}'\n[gpu]\nvisible_devices = [7]\n")
    result = tfgpu("explain", "--format", "json", env=four_gpus)
    told = read_json(result)
    assert result.returncode == 1
    assert [(finding["code"], finding["line"]) for finding in told["findings"]] == [("no-overlap", 3)]
    assert (len(told["plan"]["devices"]), told["refused"]) == (devices, refused)
    shown = tfgpu("explain", env=four_gpus).stdout
    assert ("raises PolicyError" in shown) is refused


def test_an_automatic_choice_is_shown_and_takes_nothing(project: Path, tfgpu: Tfgpu, tmp_path: Path) -> None:
    """The GPU that would be chosen now is shown. No lease is taken, so asking twice gives the same."""
    (project / "tfgpu.toml").write_text("[gpu]\nvisible_devices = {count = 1}\n")
    others = tmp_path / "others"
    others.write_text("0 4190001 9000\n")
    variables = build_environment(parse_gpus("3x24GiB"), log=tmp_path / "log", processes=others, base={})
    for _ in range(2):
        lines = [" ".join(line.split()) for line in tfgpu("explain", env=variables).stdout.splitlines()]
        assert "CUDA_VISIBLE_DEVICES 1 of the candidates below (at the start: unset)" in lines
        assert "chosen when your program first lists its devices; now it would be 1" in lines
    explained = read_json(tfgpu("explain", "--format", "json", env=variables))
    assert explained["choosing"] == {"count": 1, "when_busy": "wait", "now": ["1"], "scene": ""}
    assert not (tmp_path / "log.leases").exists()
    others.write_text("0 4190001 9000\n1 4190001 9000\n2 4190001 9000\n")
    shown = tfgpu("explain", env=variables).stdout
    assert "now it would wait (GPU 0: 8.8 GiB used without a lease (pid 4190001); GPU 1:" in shown


def test_an_automatic_choice_does_not_contradict_the_variable(project: Path, tfgpu: Tfgpu, tmp_path: Path) -> None:
    """CUDA_VISIBLE_DEVICES is told as a choice. What a program sees before that has a row of its own."""
    (project / "tfgpu.toml").write_text("[gpu]\nvisible_devices = {count = 1}\n[ceiling]\nmax_devices = 2\n")
    variables = build_environment(parse_gpus("4x24GiB"), log=tmp_path / "log", base={})
    shown = tfgpu("explain", env=variables).stdout.partition("Effect\n")[2]
    rows = [line.split("  ", 2)[1:] for line in shown.splitlines()]
    told = {name: text.strip() for name, text in (row for row in rows if len(row) == 2)}
    assert told["CUDA_VISIBLE_DEVICES"] == "1 of the candidates below  (at the start: unset)"
    assert told["chosen"] == "when your program first lists its devices; now it would be 0"
    assert told["until then"] == "0,1"


def test_a_choice_counts_what_processes_take_beside_their_limits(project: Path, tfgpu: Tfgpu, tmp_path: Path) -> None:
    """What is shown is what a program would get: half of a card does not fit beside the half of another program."""
    (project / "tfgpu.toml").write_text("[gpu]\nvisible_devices = {count = 1}\nmemory_limit = '50%'\n")
    others = tmp_path / "others"
    others.write_text("0 4190001 12288\n")
    variables = build_environment(parse_gpus("1x24GiB"), log=tmp_path / "log", processes=others, base={})
    assert read_json(tfgpu("explain", "--format", "json", env=variables))["choosing"]["now"] is None
    others.write_text("0 4190001 11000\n")
    assert read_json(tfgpu("explain", "--format", "json", env=variables))["choosing"]["now"] == ["0"]


# ---- somebody else: with real users, on a machine of its own


def explain_as_root(server: SharedMachine, user: str, *arguments: str, **variables: str) -> Any:
    """Return what root is told of a user."""
    done = server.tfgpu("explain", "--user", user, "--format", "json", *arguments, env=variables)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_root_is_told_of_somebody_else(server: SharedMachine) -> None:
    """A user's own tables, his groups', his own file and the project's count, with origins. Nobody else's do."""
    files = {
        "tfgpu.toml": "[gpu]\nmemory_growth = true\n[ceiling]\nmemory_limit = '20GiB'\n",
        "groups/students.toml": "[ceiling]\nmemory_limit = '10GiB'\n",
        "users/bob.toml": "[ceiling]\nmemory_limit = '1GiB'\n",
    }
    server.policy(files)
    own = server.write("/home/alice/.config/tfgpu/tfgpu.toml", "[gpu]\nmemory_limit = '8GiB'\n", ALICE)
    server.write("/home/alice/vision/tfgpu.toml", "[gpu]\nmemory_growth = false\n", ALICE)
    told = explain_as_root(server, "alice", "--project", "/home/alice/vision")
    assert (told["user"], told["groups"]) == ("alice", ["alice", "students", "vision"])
    assert told["project"] == "/home/alice/vision"
    assert [(c["value"], c["path"]) for c in told["ceilings"]] == [("10GiB", "/etc/tfgpu/groups/students.toml")]
    assert [(c["value"], c["path"]) for c in told["ceilings"][0]["replaces"]] == [("20GiB", "/etc/tfgpu/tfgpu.toml")]
    limit, growth = told["settings"]["memory_limit"], told["settings"]["memory_growth"]
    assert (limit["value"], limit["path"]) == ("8GiB", own)
    assert (growth["layer"], [lost["layer"] for lost in growth["overrides"]]) == ("project", ["machine"])
    assert explain_as_root(server, "carol")["ceilings"][0]["path"] == "/etc/tfgpu/tfgpu.toml"


def test_the_callers_environment_is_not_theirs(server: SharedMachine) -> None:
    """Variables of root, his XDG_CONFIG_HOME and those of sudo, schedulers and ranks say nothing of alice."""
    server.policy({"tfgpu.toml": "[gpu]\nvisible_devices = {rank = 'auto'}\n[ceiling]\nrequire_grant = true\n"})
    elsewhere = server.write("/srv/elsewhere/tfgpu/tfgpu.toml", "[gpu]\nmemory_limit = '1GiB'\n")
    theirs = server.write("/home/alice/.config/tfgpu/tfgpu.toml", "[gpu]\nmemory_limit = '8GiB'\n", ALICE)
    told = explain_as_root(
        server,
        "alice",
        XDG_CONFIG_HOME="/srv/elsewhere",
        SUDO_UID=str(os.getuid()),
        CUDA_VISIBLE_DEVICES="3",
        TFGPU_CONFIG=elsewhere,
        TFGPU_RUN="gpu = {memory_limit = '2GiB'}",
        TFGPU_DISABLE="1",
        SLURM_JOB_ID="1",
        LOCAL_RANK="2",
    )
    limit = told["settings"]["memory_limit"]
    assert (limit["path"], limit["overrides"]) == (theirs, [])
    assert told["grant"] == json.loads(json.dumps(as_dict(Grant())))
    assert (told["disabled"], told["new_login"], list_codes(told)) == (False, True, ["no-rank"])


def test_trust_and_permissions_are_theirs(server: SharedMachine) -> None:
    """A file of bob's does not count for alice, one that only root can read does not either, and both are told."""
    project, text = "/home/alice/vision", "[gpu]\nmemory_limit = '8GiB'\n"
    path = server.write(f"{project}/tfgpu.toml", text, ALICE)
    assert explain_as_root(server, "alice", "--project", project)["findings"] == []
    told = explain_as_root(server, "bob", "--project", project)
    assert told["findings"] == [], "the owner of the directory is trusted"
    server.write(path, text, BOB)
    assert list_codes(explain_as_root(server, "alice", "--project", project)) == ["untrusted-owner"]
    server.policy({"tfgpu.toml": f"[machine]\ntrusted_owners = ['uid:{BOB.uid}']\n"})
    assert list_codes(explain_as_root(server, "alice", "--project", project)) == []
    server.write(path, text, mode=0o600)
    assert list_codes(explain_as_root(server, "alice", "--project", project)) == ["unreadable"]


def list_codes(told: Any) -> list[str]:
    return [finding["code"] for finding in told["findings"]]


def test_root_reads_no_secret_for_a_user(server: SharedMachine) -> None:
    """A user's link to a file of root's is not followed with root's permissions."""
    link = server.path("/home/alice/tfgpu.toml")
    link.symlink_to(server.write("/srv/secret", "password = hunter2\n", mode=0o600))
    os.chown(link, ALICE.uid, ALICE.uid, follow_symlinks=False)
    done = server.tfgpu("explain", "--user", "alice", "--project", "/home/alice")
    assert "unreadable" in done.stdout
    assert "password" not in done.stdout + done.stderr


def test_tfenv_may_stand_where_only_root_can_look(server: SharedMachine) -> None:
    """All that reading takes is loaded before root becomes somebody else. Mistakes are named all the same."""
    hidden = server.folder("/srv/hidden", mode=0o700)
    copied = server.run(ROOT, "cp", "-a", f"{REPOSITORY}/tfenv", f"{REPOSITORY}/schemas", hidden)
    assert copied.returncode == 0, copied.stderr
    server.policy({"tfgpu.toml": "[gpu]\nmemory_limit = 8\n[ceiling]\nmax_devics = 1\n"})
    told = explain_as_root(server, "alice", PYTHONPATH=hidden)
    assert [(finding["code"], finding["line"]) for finding in told["findings"]] == [
        ("invalid-value", 2),
        ("unknown-key", 4),
    ]


def test_a_uid_without_an_entry(server: SharedMachine) -> None:
    """uid:1234 asks for somebody of whom the databases know nothing: no groups, no home, the machine's policy."""
    server.policy({"tfgpu.toml": "[user.'uid:47999'.ceiling]\nmax_devices = 1\n"})
    told = explain_as_root(server, "uid:47999")
    assert (told["user"], told["groups"]) == ("uid:47999", [])
    assert [ceiling["key"] for ceiling in told["ceilings"]] == ['user."uid:47999".ceiling.max_devices']
    assert told["files"][1]["why"] == "there is no home directory"
    assert explain_as_root(server, f"uid:{ALICE.uid}")["user"] == "alice"


def test_a_directory_they_may_not_enter(server: SharedMachine) -> None:
    """Where the user has no way in, that is said, and no file behind it speaks."""
    closed = server.folder("/srv/closed", mode=0o700)
    server.write(f"{closed}/tfgpu.toml", "[gpu]\nmemory_growth = true\n")
    shown = server.tfgpu("explain", "--user", "alice", "--project", closed).stdout
    assert "alice cannot enter this directory" in shown
    assert "memory_growth" not in shown


def test_where_no_projects_file_counts(server: SharedMachine) -> None:
    """A project's file that the administrator lets not count is not said to be missing."""
    server.policy({"tfgpu.toml": "[machine]\nallow_project_files = false\n"})
    server.write("/home/alice/project/tfgpu.toml", "[gpu]\nmemory_growth = true\n", ALICE)
    told = explain_as_root(server, "alice", "--project", "/home/alice/project")
    (seen,) = [file for file in told["files"] if file["layer"] == "project"]
    assert seen["why"] == "project files are ignored: allow_project_files = false in /etc/tfgpu/tfgpu.toml"
    assert told["settings"] == {}


def test_others_are_nobodys_business(server: SharedMachine) -> None:
    """A user is told of himself, in his own environment, and of nobody else: exit code 2 and what to do."""
    own = server.tfgpu("explain", "--user", "alice", "--format", "json", user=ALICE)
    assert (json.loads(own.stdout)["user"], json.loads(own.stdout)["new_login"]) == ("alice", False)
    refused = server.tfgpu("explain", "--user", "bob", user=ALICE)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "tfgpu explain: only root can ask about another user; try `sudo tfgpu explain --user bob`\n"
    )


def test_from_python(server: SharedMachine) -> None:
    """tfenv.explain(directory, user=...) tells the same, and who is not there is a LookupError."""
    server.policy({"users/alice.toml": "[ceiling]\nmax_devices = 1\n"})
    program = "import tfenv; told = tfenv.explain('/usr', user='alice'); print(told.user, told.ceilings[0].value)\n"
    program += "try: tfenv.explain(user='no-such-user')\nexcept LookupError as error: print(error)\n"
    done = server.python(ROOT, program)
    assert done.stderr == ""
    assert done.stdout.startswith('alice 1\nthere is no user "no-such-user" here')


def test_a_user_who_is_not_there(tfgpu: Tfgpu) -> None:
    """An unknown name is wrong usage, and a similar one is offered."""
    done = tfgpu("explain", "--user", "rooot")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'tfgpu explain: there is no user "rooot" here; did you mean "root"?\n'
    for name in ("uid:99999999999", "uid:x", "a\nb", ""):
        assert tfgpu("explain", "--user", name).returncode == 2


def test_a_link_to_a_directory_is_that_directory(project: Path, tfgpu: Tfgpu) -> None:
    """--project through a symbolic link tells what a program sees there: the kernel knows no links in a directory."""
    (project / "real").mkdir()
    (project / "link").symlink_to(project / "real")
    assert read_json(tfgpu("explain", "--project", "link", "--format", "json"))["project"] == str(project / "real")


def test_what_granted_means_here(project: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """Below each "granted": who gave which share. Without a share the finding says what is missing instead."""
    rule = '[[gpu.device]]\nmatch = 0\nmemory_limit = "granted"\n'
    (project / "tfgpu.toml").write_text(f'{rule}[ceiling]\nmemory_limit = "granted"\n')
    result = tfgpu("explain", env=four_gpus | {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30"})
    assert result.stdout.count("    granted: MPS gave 0.3 of each GPU (percentage 30)\n") == 2
    assert "7.2 GiB (30%)" in result.stdout
    assert result.returncode == 0
    without = tfgpu("explain", env=four_gpus)
    assert "granted:" not in without.stdout
    assert without.stdout.count("[warning no-share]") == 2
    assert without.returncode == 1


def test_the_launcher_that_spoke_and_what_it_gave(project: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """Inside of a job: which launcher, which job, which GPUs it listed, and what a script named beyond them."""
    (project / "tfgpu.toml").write_text("[gpu]\nmemory_growth = true\n")
    job = {"SLURM_JOB_ID": "14", "SLURM_STEP_GPUS": "2", "SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "2,3"}
    result = tfgpu("explain", env=four_gpus | job)
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[lines.index("Grant") + 1 : lines.index("Effect") - 1] == ["launcher Slurm", "job 14", "gave GPU 2"]
    assert "CUDA_VISIBLE_DEVICES=2,3 goes beyond what Slurm gave this job (2) [note clamped]" in lines
    assert result.returncode == 0
    grant = read_json(tfgpu("explain", "--format", "json", env=four_gpus | job))["grant"]
    assert (grant["launcher"], grant["listed"], grant["job"]) == ("Slurm", ["2"], {"scheduler": "slurm", "id": "14"})
    assert "Grant" not in tfgpu("explain", env=four_gpus).stdout
