"""`tfgpu explain`: each value with the one who set it, and what follows on this machine."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import REPOSITORY
from tests.cli.server import Server
from tfenv.simulate.environment import build_environment, parse_gpus

Tfgpu = Callable[..., subprocess.CompletedProcess[str]]

USER = '[gpu]\nmemory_limit = "20GiB"\n\n[ceiling]\nrequire_memory_growth = true\nmemory_limit = "50%"\n'
PROJECT = '[gpu]\nvisible_devices = [1, 2]\nmemory_limit = "16GiB"\nmemory_growth = false\n'


@pytest.fixture
def layers(project: Path, tmp_path: Path) -> Path:
    """A user's file and a project's; returns the user's."""
    (project / "tfgpu.toml").write_text(PROJECT)
    user = tmp_path / "config" / "tfgpu" / "tfgpu.toml"
    user.parent.mkdir(parents=True)
    user.write_text(USER)
    return user


@pytest.fixture(scope="module")
def four_gpus() -> dict[str, str]:
    """Variables that show four GPUs to NVML; the last is another model."""
    made = build_environment(parse_gpus("3x24GiB:NVIDIA A10,1x80GiB:NVIDIA A100"), base={})
    assert "count=4" in made["TFGPU_SIMULATE"]
    return made


def as_json(result: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(result.stdout)


def test_each_value_has_its_origin(layers: Path, tfgpu: Tfgpu) -> None:
    """A value is shown as written, with file:line; so are the values it overrode."""
    lines = [" ".join(line.split()) for line in tfgpu("explain").stdout.splitlines()]
    chosen = lines.index('memory_limit = "16GiB" tfgpu.toml:3')
    assert lines[chosen + 1] == f'overrides "20GiB" {layers}:2'
    assert f"require_memory_growth = true {layers}:5" in lines


def test_a_table_for_one_user_overrides(project: Path, tfgpu: Tfgpu) -> None:
    """Inside one file the more specific table wins; what it replaced is told, and which table it is."""
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


def test_what_clamped_it(layers: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """Below a value that a ceiling changed stands which ceiling did."""
    result = tfgpu("explain", env=four_gpus)
    assert f"clamped: 16.0 GiB is above the ceiling of 50% from {layers} (ceiling.memory_limit)" in result.stdout
    assert "clamped: growth stays on: required by" in result.stdout
    assert result.returncode == 0


def test_what_a_count_cut(project: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """`max_devices` clamps the list it cut: that is told below the list."""
    (project / "tfgpu.toml").write_text("[gpu]\nvisible_devices = [0, 1, 2]\n[ceiling]\nmax_devices = 2\n")
    lines = [" ".join(line.split()) for line in tfgpu("explain", env=four_gpus).stdout.splitlines()]
    chosen = lines.index("visible_devices = [0, 1, 2] tfgpu.toml:2")
    assert lines[chosen + 1] == "clamped: at most 2 of 3 GPUs (0, 1, 2)"


def test_the_plan_names_the_cards(layers: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """With NVML the plan has each GPU's number, name, UUID and limit in bytes; a clamp is no finding."""
    plan = as_json(tfgpu("explain", "--format", "json", env=four_gpus))["plan"]
    assert (plan["cuda_visible_devices"], plan["growth"], plan["allocator"]) == ("1,2", True, "bfc")
    assert [(device["index"], device["name"]) for device in plan["devices"]] == [(1, "NVIDIA A10"), (2, "NVIDIA A10")]
    assert all(device["uuid"].startswith("GPU-") for device in plan["devices"])
    assert [device["limit_fraction"] for device in plan["devices"]] == [0.5, 0.5]


def test_rows_are_whole_in_a_pipe(layers: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """In a pipe a row of the table is one line with the whole UUID, for grep."""
    shown = tfgpu("explain", env=four_gpus).stdout
    uuids = [
        device["uuid"] for device in as_json(tfgpu("explain", "--format", "json", env=four_gpus))["plan"]["devices"]
    ]
    rows = [line.split() for line in shown.splitlines() if line.startswith("  GPU:")]
    assert [row[-1] for row in rows] == uuids
    assert "12.0 GiB (50%)" in shown


def test_long_lists_are_shortened(project: Path, tfgpu: Tfgpu) -> None:
    """Eight UUIDs do not push origins off the screen: the first few are shown, and how many there are; JSON has all."""
    uuids = [f"GPU-{number}932f937-0000-4000-8000-000000000000" for number in range(8)]
    text = f"[gpu]\nmemory_growth = true\n[ceiling]\nallowed_devices = {uuids}\nmemory_limit = '8GiB'\n"
    (project / "tfgpu.toml").write_text(text)
    shown = tfgpu("explain").stdout.splitlines()
    assert max(len(line) for line in shown if "tfgpu.toml:" in line) <= 100
    (line,) = [line for line in shown if "allowed_devices" in line]
    assert '["GPU-0932f937…", "GPU-1932f937…", "GPU-2932f937…", … 8 in all]' in line
    told = as_json(tfgpu("explain", "--format", "json"))
    assert [c["value"] for c in told["ceilings"] if c["key"] == "ceiling.allowed_devices"] == [uuids]


def test_without_a_gpu(layers: Path, tfgpu: Tfgpu) -> None:
    """Without a driver the plan is there all the same, and why nothing is known of the cards is said."""
    result = tfgpu("explain")
    if "What cards these are is unknown" not in result.stdout:
        pytest.skip("this machine has GPUs")
    assert "CUDA_VISIBLE_DEVICES  1,2" in result.stdout


def test_the_grant_of_this_environment(layers: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """Positions count within what was granted here: [1, 2] of "3,2,0" are the cards 2 and 0."""
    granted = four_gpus | {"CUDA_VISIBLE_DEVICES": "3,2,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    told = as_json(tfgpu("explain", "--format", "json", env=granted))
    assert told["grant"]["tokens"] == ["3", "2", "0"]
    assert told["plan"]["cuda_visible_devices"] == "2,0"


def test_where_files_were_looked_for(project: Path, tfgpu: Tfgpu, tmp_path: Path) -> None:
    """Without any file each layer says where one was looked for, and that TensorFlow is left as it is."""
    result = tfgpu("explain")
    assert result.returncode == 0
    rows = [line.split()[:3] for line in result.stdout.splitlines() if line.startswith(("  user", "  project"))]
    assert rows == [["user", str(tmp_path / "config/tfgpu/tfgpu.toml"), "-"], ["project", str(project), "-"]]
    assert "TensorFlow is left as it is" in result.stdout


def test_a_dropped_file_says_why(project: Path, tfgpu: Tfgpu) -> None:
    """A file that does not count is shown as dropped, with the reason, and the exit code is 1."""
    path = project / "tfgpu.toml"
    path.write_text(PROJECT)
    path.chmod(0o666)
    told = tfgpu("explain", "--format", "json")
    assert told.returncode == 1
    seen = [file for file in as_json(told)["files"] if file["state"] == "dropped"]
    assert [file["path"] for file in seen] == [str(path)]
    assert "writable by everybody" in seen[0]["why"]
    assert "dropped" in tfgpu("explain").stdout


def test_another_directory(layers: Path, project: Path, tfgpu: Tfgpu) -> None:
    """--project tells of a program that starts elsewhere; one that is no directory is wrong usage."""
    other = project / "other"
    other.mkdir()
    (other / "tfgpu.toml").write_text("[gpu]\nvisible_devices = 'none'\n")
    told = as_json(tfgpu("explain", "--project", "other", "--format", "json"))
    assert told["settings"]["visible_devices"]["path"] == str(other / "tfgpu.toml")
    assert told["plan"]["devices"] == []
    assert tfgpu("explain", "--project", "nowhere").returncode == 2


def test_run_options_are_a_layer(layers: Path, tfgpu: Tfgpu) -> None:
    """Options of `tfgpu run` around it are shown as what they are: the nearest layer."""
    told = as_json(tfgpu("explain", "--format", "json", env={"TFGPU_RUN": 'gpu = {memory_limit = "1GiB"}'}))
    limit = told["settings"]["memory_limit"]
    assert (limit["value"], limit["layer"], limit["path"]) == ("1GiB", "run", "<tfgpu run>")
    assert [lost["value"] for lost in limit["overrides"]] == ["16GiB", "20GiB"]


def test_disabled(layers: Path, tfgpu: Tfgpu) -> None:
    """TFGPU_DISABLE is told: the policy is read, and nothing follows."""
    result = tfgpu("explain", env={"TFGPU_DISABLE": "1"})
    assert "TFGPU_DISABLE switches the policy off" in result.stdout


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
    told = as_json(result)
    assert result.returncode == 1
    assert [(finding["code"], finding["line"]) for finding in told["findings"]] == [("no-overlap", 3)]
    assert (len(told["plan"]["devices"]), told["refused"]) == (devices, refused)
    shown = tfgpu("explain", env=four_gpus).stdout
    assert ("raises PolicyError" in shown) is refused


def test_an_automatic_choice_is_shown_and_takes_nothing(project: Path, tfgpu: Tfgpu, tmp_path: Path) -> None:
    """Which GPU would be chosen now, of which; without a lease, so that asking twice gives the same."""
    (project / "tfgpu.toml").write_text("[gpu]\nvisible_devices = {count = 1}\n")
    others = tmp_path / "others"
    others.write_text("0 4190001 9000\n")
    variables = build_environment(parse_gpus("3x24GiB"), log=tmp_path / "log", processes=others, base={})
    for _ in range(2):
        lines = [" ".join(line.split()) for line in tfgpu("explain", env=variables).stdout.splitlines()]
        assert "chosen 1 of them, when devices are first listed; now it would be 1" in lines
    explained = as_json(tfgpu("explain", "--format", "json", env=variables))
    assert explained["choosing"] == {"count": 1, "when_busy": "wait", "now": ["1"], "scene": ""}
    assert not (tmp_path / "log.leases").exists()
    others.write_text("0 4190001 9000\n1 4190001 9000\n2 4190001 9000\n")
    said = tfgpu("explain", env=variables).stdout
    assert "now the program would wait (GPU 0: 8.8 GiB used without a lease; GPU 1:" in said


# ---- somebody else: with real users, on a machine of its own


def told_of(server: Server, variables: dict[str, str], user: str, *arguments: str, **also: str) -> Any:
    """What root is told of a user."""
    done = server.tfgpu("explain", "--user", user, "--format", "json", *arguments, env=variables | also)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_root_is_told_of_somebody_else(server: Server, variables: dict[str, str]) -> None:
    """A user's own tables, his groups', his own file and the project's speak, with origins; nobody else's do."""
    server.machine("tfgpu.toml", "[gpu]\nmemory_growth = true\n[ceiling]\nmemory_limit = '20GiB'\n")
    server.machine("groups/students.toml", "[ceiling]\nmemory_limit = '10GiB'\n")
    server.machine("users/bob.toml", "[ceiling]\nmemory_limit = '1GiB'\n")
    server.write(server.home / "alice/.config/tfgpu/tfgpu.toml", "[gpu]\nmemory_limit = '8GiB'\n", "alice")
    project = server.write(server.home / "alice/vision/tfgpu.toml", "[gpu]\nmemory_growth = false\n", "alice").parent
    told = told_of(server, variables, "alice", "--project", str(project))
    assert (told["user"], told["groups"], told["project"]) == ("alice", ["alice", "students", "vision"], str(project))
    assert [(c["value"], c["path"]) for c in told["ceilings"]] == [("10GiB", "/etc/tfgpu/groups/students.toml")]
    assert [(c["value"], c["path"]) for c in told["ceilings"][0]["replaces"]] == [("20GiB", "/etc/tfgpu/tfgpu.toml")]
    limit, growth = told["settings"]["memory_limit"], told["settings"]["memory_growth"]
    assert (limit["value"], limit["path"]) == ("8GiB", f"{server.home}/alice/.config/tfgpu/tfgpu.toml")
    assert (growth["layer"], [lost["layer"] for lost in growth["overrides"]]) == ("project", ["machine"])
    assert told_of(server, variables, "carol")["ceilings"][0]["path"] == "/etc/tfgpu/tfgpu.toml"


def test_the_callers_environment_is_not_theirs(server: Server, variables: dict[str, str]) -> None:
    """Variables of root, his XDG_CONFIG_HOME and those of sudo, schedulers and ranks say nothing of alice."""
    server.machine("tfgpu.toml", "[gpu]\nvisible_devices = {rank = 'auto'}\n[ceiling]\nrequire_grant = true\n")
    elsewhere = server.write(server.root / "elsewhere/tfgpu/tfgpu.toml", "[gpu]\nmemory_limit = '1GiB'\n", "root")
    theirs = server.write(server.home / "alice/.config/tfgpu/tfgpu.toml", "[gpu]\nmemory_limit = '8GiB'\n", "alice")
    told = told_of(
        server,
        variables,
        "alice",
        XDG_CONFIG_HOME=str(elsewhere.parent.parent),
        SUDO_UID=str(os.getuid()),
        CUDA_VISIBLE_DEVICES="3",
        TFGPU_CONFIG=str(elsewhere),
        TFGPU_RUN="gpu = {memory_limit = '2GiB'}",
        TFGPU_DISABLE="1",
        SLURM_JOB_ID="1",
        LOCAL_RANK="2",
    )
    limit = told["settings"]["memory_limit"]
    assert (limit["path"], limit["overrides"]) == (str(theirs), [])
    assert told["grant"] == {"tokens": None, "pci_order": False, "scheduler": False, "rank": None}
    assert (told["disabled"], told["new_login"], told["findings"]) == (False, True, [])


def test_trust_and_permissions_are_theirs(server: Server, variables: dict[str, str]) -> None:
    """A file of bob's does not count for alice, one that only root can read does not either, and both are told."""
    project = server.home / "alice" / "vision"
    path = server.write(project / "tfgpu.toml", "[gpu]\nmemory_limit = '8GiB'\n", "alice")
    assert told_of(server, variables, "alice", "--project", str(project))["findings"] == []
    told = told_of(server, variables, "bob", "--project", str(project))
    assert told["findings"] == [], "the owner of the directory is trusted"
    server.write(path, path.read_text(), "bob")
    assert codes(told_of(server, variables, "alice", "--project", str(project))) == ["untrusted-owner"]
    server.machine("tfgpu.toml", "[machine]\ntrusted_owners = ['uid:47002']\n")
    assert codes(told_of(server, variables, "alice", "--project", str(project))) == []
    server.write(path, path.read_text(), "root", mode=0o600)
    assert codes(told_of(server, variables, "alice", "--project", str(project))) == ["unreadable"]


def codes(told: Any) -> list[str]:
    return [finding["code"] for finding in told["findings"]]


def test_root_reads_no_secret_for_a_user(server: Server, variables: dict[str, str]) -> None:
    """A user's link to a file of root's is not followed with root's permissions."""
    secret = server.write(server.root / "secret", "password = hunter2\n", "root", mode=0o600)
    link = server.home / "alice" / "tfgpu.toml"
    link.symlink_to(secret)
    os.chown(link, 47001, 47001, follow_symlinks=False)
    done = server.tfgpu("explain", "--user", "alice", "--project", str(link.parent), env=variables)
    assert "unreadable" in done.stdout
    assert "password" not in done.stdout + done.stderr


def test_tfenv_may_stand_where_only_root_can_look(server: Server, variables: dict[str, str]) -> None:
    """Everything that reading takes is loaded before root becomes somebody else; mistakes are named all the same."""
    hidden = server.root / "hidden"
    hidden.mkdir(mode=0o700)
    for name in ("tfenv", "schemas"):
        subprocess.run(["cp", "-a", str(REPOSITORY / name), str(hidden / name)], check=True)
    server.machine("tfgpu.toml", "[gpu]\nmemory_limit = 8\n[ceiling]\nmax_devics = 1\n")
    told = told_of(server, variables, "alice", PYTHONPATH=str(hidden))
    assert [(finding["code"], finding["line"]) for finding in told["findings"]] == [
        ("invalid-value", 2),
        ("unknown-key", 4),
    ]


def test_a_uid_without_an_entry(server: Server, variables: dict[str, str]) -> None:
    """uid:1234 asks for somebody of whom the databases know nothing: no groups, no home, the machine's policy."""
    server.machine("tfgpu.toml", "[user.'uid:47999'.ceiling]\nmax_devices = 1\n")
    told = told_of(server, variables, "uid:47999")
    assert (told["user"], told["groups"]) == ("uid:47999", [])
    assert [ceiling["key"] for ceiling in told["ceilings"]] == ['user."uid:47999".ceiling.max_devices']
    assert told["files"][1]["why"] == "there is no home directory"
    assert told_of(server, variables, "uid:47001")["user"] == "alice"


def test_a_directory_they_may_not_enter(server: Server, variables: dict[str, str]) -> None:
    """Where the user has no way in, that is said, and no file behind it speaks."""
    closed = server.write(server.root / "closed" / "tfgpu.toml", "[gpu]\nmemory_growth = true\n", "root").parent
    closed.chmod(0o700)
    shown = server.tfgpu("explain", "--user", "alice", "--project", str(closed), env=variables).stdout
    assert "alice may not enter this directory" in shown
    assert "memory_growth" not in shown


def test_where_no_projects_file_counts(server: Server, variables: dict[str, str]) -> None:
    """A project's file that the administrator lets not count is not said to be missing."""
    server.machine("tfgpu.toml", "[machine]\nallow_project_files = false\n")
    project = server.write(server.home / "alice/p/tfgpu.toml", "[gpu]\nmemory_growth = true\n", "alice").parent
    told = told_of(server, variables, "alice", "--project", str(project))
    (seen,) = [file for file in told["files"] if file["layer"] == "project"]
    assert seen["why"] == "no project's file counts: allow_project_files = false in /etc/tfgpu/tfgpu.toml"
    assert told["settings"] == {}


def test_others_are_nobodys_business(server: Server, variables: dict[str, str]) -> None:
    """A user is told of himself, in his own environment, and of nobody else: exit code 2 and what to do."""
    if server.run([sys.executable, "-c", "import tfenv"], variables, user="alice").returncode != 0:
        pytest.skip("other users may not read this checkout")
    own = server.tfgpu("explain", "--user", "alice", "--format", "json", env=variables, user="alice")
    assert (json.loads(own.stdout)["user"], json.loads(own.stdout)["new_login"]) == ("alice", False)
    refused = server.tfgpu("explain", "--user", "bob", env=variables, user="alice")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "tfgpu explain: only root may ask for somebody else; try `sudo tfgpu explain --user bob`\n"
    )


def test_from_python(server: Server, variables: dict[str, str]) -> None:
    """tfenv.explain(directory, user=...) tells the same, and who is not there is a LookupError."""
    server.machine("users/alice.toml", "[ceiling]\nmax_devices = 1\n")
    program = "import tfenv; told = tfenv.explain('/usr', user='alice'); print(told.user, told.ceilings[0].value)\n"
    program += "try: tfenv.explain(user='no-such-user')\nexcept LookupError as error: print(error)\n"
    done = server.run([sys.executable, "-c", program], variables)
    assert done.stderr == ""
    assert done.stdout.startswith('alice 1\nthere is no user "no-such-user" here')


def test_a_user_who_is_not_there(tfgpu: Tfgpu) -> None:
    """An unknown name is wrong usage; a similar one is offered."""
    done = tfgpu("explain", "--user", "rooot")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'tfgpu explain: there is no user "rooot" here; did you mean "root"?\n'
    for name in ("uid:99999999999", "uid:x", "a\nb", ""):
        assert tfgpu("explain", "--user", name).returncode == 2


def test_a_link_to_a_directory_is_that_directory(project: Path, tfgpu: Tfgpu) -> None:
    """--project through a symbolic link tells what a program sees there: the kernel knows no links in a directory."""
    (project / "real").mkdir()
    (project / "link").symlink_to(project / "real")
    assert as_json(tfgpu("explain", "--project", "link", "--format", "json"))["project"] == str(project / "real")
