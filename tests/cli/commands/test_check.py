"""`tfgpu check` finds every mistake, and says where it is."""

from __future__ import annotations

import grp
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cli.conftest import Tfgpu
from tests.shared_machine import ALICE, BOB, ROOT, SharedMachine
from tfenv.simulate.environment import build_environment, parse_gpus

DAEMON = grp.getgrnam("daemon").gr_gid


GOOD = "[gpu]\nmemory_growth = true\n"
BAD = '[gpu]\nmemory_growth = true\nmemory_limit = "8 gigs"\nmemory_groth = true\n'


def test_a_good_file_is_ok(project: Path, tfgpu: Tfgpu) -> None:
    """A file without a mistake is named, and the exit code is 0."""
    (project / "tfgpu.toml").write_text(GOOD)
    result = tfgpu("check")
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok: tfgpu.toml\n", "")


def test_no_file_is_no_mistake(tfgpu: Tfgpu) -> None:
    """Without any policy file there is nothing wrong. How to get one is told."""
    result = tfgpu("check")
    assert result.returncode == 0
    assert "tfgpu init" in result.stdout


def test_every_mistake_has_its_place(project: Path, tfgpu: Tfgpu) -> None:
    """Each finding is one line with file:line:column, the key and what would be right. The exit code is 1."""
    (project / "tfgpu.toml").write_text(BAD)
    result = tfgpu("check")
    assert result.returncode == 1
    first, second, tally = result.stdout.splitlines()
    assert first.startswith("tfgpu.toml:3:1: gpu.memory_limit: ")
    assert first.endswith("[error invalid-value]")
    assert second.startswith("tfgpu.toml:4:1: gpu.memory_groth: ")
    assert 'did you mean "memory_growth"?' in second
    assert tally == "1 error, 1 warning in 1 file"


def test_all_layers_are_checked(project: Path, tmp_path: Path, tfgpu: Tfgpu) -> None:
    """Without a path the user's own file is checked as well."""
    (project / "tfgpu.toml").write_text(GOOD)
    user = tmp_path / "config" / "tfgpu" / "tfgpu.toml"
    user.parent.mkdir(parents=True)
    user.write_text(BAD)
    result = tfgpu("check")
    assert result.returncode == 1
    assert f"{user}:3:1: gpu.memory_limit" in result.stdout
    assert "in 2 files" in result.stdout


def test_json(project: Path, tfgpu: Tfgpu) -> None:
    """--format json tells the same, for programs."""
    (project / "tfgpu.toml").write_text(BAD)
    result = tfgpu("check", "--format", "json")
    report = json.loads(result.stdout)
    assert result.returncode == 1
    assert report["files"] == [str(project / "tfgpu.toml")]
    found = [(finding["line"], finding["key"], finding["severity"]) for finding in report["findings"]]
    assert found == [(3, "gpu.memory_limit", "error"), (4, "gpu.memory_groth", "warning")]


def test_a_path_that_does_not_exist(tfgpu: Tfgpu) -> None:
    """A path that is not there is said, and is wrong usage, as in all other commands."""
    result = tfgpu("check", "nowhere.toml")
    assert result.returncode == 2
    assert "nowhere.toml: there is no such file" in result.stdout


def test_tfgpu_config_that_does_not_exist(tfgpu: Tfgpu) -> None:
    """TFGPU_CONFIG that names no file is a finding."""
    result = tfgpu("check", env={"TFGPU_CONFIG": "/nowhere/tfgpu.toml"})
    assert result.returncode == 1
    assert result.stdout.startswith("/nowhere/tfgpu.toml: TFGPU_CONFIG names this file, but there is no such file")


def test_the_sites_file_is_checked_as_the_sites(project: Path, tfgpu: Tfgpu) -> None:
    """Alone and with all the others: people that nobody has, and tables that only the administrator may write."""
    text = "[user.nobody-has-this.gpu]\nmemory_growth = true\n[machine]\nallow_disable = false\n"
    (project / "site.toml").write_text(text)
    (project / "tfgpu.toml").write_text("[user.nobody-has-this.gpu]\nmemory_growth = true\n")
    for paths in ((), ("site.toml",)):
        result = tfgpu("check", *paths, "--format", "json", env={"TFGPU_SITE_CONFIG": "site.toml"})
        found = [
            (finding["path"], finding["line"], finding["code"]) for finding in json.loads(result.stdout)["findings"]
        ]
        path = str(project / "site.toml")
        assert found == [(path, 3, "machine-layer-only"), (path, 1, "unknown-user")]


def test_what_tfgpu_config_replaces_is_not_checked(project: Path, tfgpu: Tfgpu) -> None:
    """`tfgpu check` checks what counts. A note says which file does not."""
    (project / "tfgpu.toml").write_text(BAD)
    (project / "job.toml").write_text(GOOD)
    result = tfgpu("check", "--format", "json", env={"TFGPU_CONFIG": "job.toml"})
    assert result.returncode == 0
    report = json.loads(result.stdout)
    assert report["files"] == [str(project / "job.toml")]
    assert [finding["code"] for finding in report["findings"]] == ["project-replaced"]


def test_pyproject(project: Path, tfgpu: Tfgpu) -> None:
    """A pyproject.toml is checked by its own table, with the places of the whole file."""
    (project / "pyproject.toml").write_text("[project]\nname = 'x'\n\n[tool.tfgpu.gpu]\nmemory_growth = 3\n")
    result = tfgpu("check", "pyproject.toml")
    assert result.returncode == 1
    assert result.stdout.startswith("pyproject.toml:5:1: gpu.memory_growth: ")


def test_a_pyproject_without_our_table(project: Path, tfgpu: Tfgpu) -> None:
    """Named on purpose it is a mistake, with --table-optional it is none. Other files are checked all the same."""
    (project / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    (project / "tfgpu.toml").write_text(BAD)
    alone = tfgpu("check", "pyproject.toml")
    assert (alone.returncode, "has no [tool.tfgpu] table" in alone.stdout) == (1, True)
    assert tfgpu("check", "--table-optional", "pyproject.toml").returncode == 0
    both = tfgpu("check", "--table-optional", "pyproject.toml", "tfgpu.toml")
    assert both.returncode == 1
    assert both.stdout.splitlines()[-1] == "1 error, 1 warning in 2 files"


def test_a_machine_tree_is_checked_wholly(project: Path, tfgpu: Tfgpu) -> None:
    """Of a directory like /etc/tfgpu every group's and user's file counts, and [machine] is allowed there."""
    tree = project / "etc"
    for name in ("groups", "users"):
        (tree / name).mkdir(parents=True)
    (tree / "tfgpu.toml").write_text("[machine]\nallow_disable = false\n")
    (tree / "groups" / "students.toml").write_text("[ceiling]\nmax_devices = 'two'\n")
    (tree / "users" / "alice.toml").write_text(GOOD)
    result = tfgpu("check", "etc", "--format", "json")
    report = json.loads(result.stdout)
    names = [path.removeprefix(f"{tree}/") for path in report["files"]]
    assert names == ["tfgpu.toml", "groups/students.toml", "users/alice.toml"]
    # Whether there is an alice on this machine is another finding's matter.
    found = [(f["path"], f["key"]) for f in report["findings"] if not f["code"].startswith("unknown-")]
    assert found == [(str(tree / "groups" / "students.toml"), "ceiling.max_devices")]


def test_one_file_of_a_machine_tree(project: Path, tfgpu: Tfgpu) -> None:
    """A file that stands in such a tree is checked as an administrator's."""
    (project / "users").mkdir()
    (project / "users" / "alice.toml").write_text(GOOD)
    (project / "tfgpu.toml").write_text("[machine]\nallow_disable = false\n")
    assert tfgpu("check", "tfgpu.toml").returncode == 0


def test_advice(project: Path, tfgpu: Tfgpu) -> None:
    """What is right but hardly meant is a warning: max_devices alone gives everybody the first card."""
    (project / "tfgpu.toml").write_text("[ceiling]\nmax_devices = 1\n")
    result = tfgpu("check")
    assert result.returncode == 1
    assert "tfgpu.toml:2:1: ceiling.max_devices: " in result.stdout
    assert "[warning first-card-for-all]" in result.stdout


def test_an_empty_directory(project: Path, tfgpu: Tfgpu) -> None:
    """A directory without a policy is a finding when it is named."""
    (project / "empty").mkdir()
    result = tfgpu("check", "empty")
    assert result.returncode == 1
    assert "there is no tfgpu.toml or pyproject.toml here" in result.stdout


def test_hostile_names_do_not_steer_the_terminal(project: Path, tfgpu: Tfgpu) -> None:
    """Escape sequences in keys are shown escaped, each finding stays one line."""
    (project / "tfgpu.toml").write_text('"a\\u001b[31m\\nb" = 1\n')
    result = tfgpu("check")
    assert result.returncode == 1
    assert "\x1b" not in result.stdout
    assert len(result.stdout.splitlines()) == 2


# ---- a whole machine layer


def write_draft(folder: Path, **files: str) -> Path:
    """Write a machine layer's directory. `users__root` is the file users/root.toml."""
    for scope in ("groups", "users"):
        (folder / scope).mkdir(parents=True)
    for name, text in files.items():
        (folder / f"{name.replace('__', '/')}.toml").write_text(text)
    return folder


def list_findings(result: subprocess.CompletedProcess[str], root: Path) -> list[tuple[str, int | None, str]]:
    """Return file, line and code of each finding."""
    findings = json.loads(result.stdout)["findings"]
    return [(finding["path"].removeprefix(f"{root}/"), finding["line"], finding["code"]) for finding in findings]


def test_a_draft_is_checked_like_the_machines_own(project: Path, tfgpu: Tfgpu) -> None:
    """A directory with groups/ and users/ is a machine layer before it is installed: [machine] counts, people too."""
    etc = write_draft(
        project / "etc",
        tfgpu="[machine]\nallow_disable = false\n[gpu]\nvisible_devices = [0]\n[ceiling]\nallowed_devices = []\n",
        users__rooot="[gpu]\nmemory_growth = true\n",
    )
    result = tfgpu("check", "etc", "--format", "json")
    assert result.returncode == 1
    assert list_findings(result, etc) == [
        ("tfgpu.toml", 4, "numbers-in-machine-layer"),
        ("tfgpu.toml", 4, "no-devices-left"),
        ("users/rooot.toml", None, "unknown-user"),
    ]


def test_an_empty_draft_is_one(project: Path, tfgpu: Tfgpu) -> None:
    """The two folders alone make a directory a machine layer's."""
    write_draft(project / "etc", tfgpu="[machine]\nallow_disable = false\n")
    assert tfgpu("check", "etc").returncode == tfgpu("check", "etc/tfgpu.toml").returncode == 0


def test_files_that_are_never_read(project: Path, tfgpu: Tfgpu) -> None:
    """A policy under another name, or a user's file without its ending, is never looked at, and that is said."""
    etc = write_draft(project / "etc", tfgpu="", policy="", users__root="")
    (etc / "user").mkdir()
    (etc / "user" / "alice.toml").touch()
    (etc / "users" / "daemon").touch()
    (etc / "users" / "team").mkdir()
    (etc / "users" / "team" / "bob.toml").touch()
    (etc / "data").mkdir()
    (etc / "data" / "x.toml").touch()
    (etc / "users" / "README").touch()
    (etc / ".git").mkdir()
    (etc / ".git" / "x.toml").touch()
    assert sorted(list_findings(tfgpu("check", "etc", "--format", "json"), etc)) == [
        ("policy.toml", None, "never-read"),
        ("user/alice.toml", None, "never-read"),
        ("users/daemon", None, "never-read"),
        ("users/team/bob.toml", None, "never-read"),
    ]


def test_what_nvml_knows_of_the_cards(project: Path, tfgpu: Tfgpu) -> None:
    """On a machine with cards a number comes with its UUID, and what the cards cannot do is a warning."""
    cards = build_environment(parse_gpus("2x24GiB"), base={})
    write_draft(project / "etc", tfgpu="[gpu]\nvisible_devices = [1]\nmemory_limit = '30GiB'\n")
    shown = tfgpu("check", "etc", env=cards).stdout.splitlines()
    assert ["numbers-in-machine-layer" in shown[0], "above-card" in shown[1]] == [True, True]
    assert 'write "GPU-' in shown[0]
    assert "the largest card here has 24.0 GiB" in shown[1]


def test_a_large_machine_is_ok_in_one_line(project: Path, tfgpu: Tfgpu) -> None:
    """Forty files without a mistake are counted, not listed."""
    write_draft(project / "etc", tfgpu="", **{f"users__uid:{number}": "" for number in range(4_000_000, 4_000_040)})
    assert tfgpu("check", "etc").stdout == "ok: 41 files in etc\n"


def test_the_real_machine_layer_with_real_people(server: SharedMachine) -> None:
    """Who is in which group decides which tables can ever count."""
    exception = "[ceiling]\nmemory_limit = '9GiB'\n[group.vision.gpu]\nmemory_growth = true\n"
    files = {
        "tfgpu.toml": "[group.students.ceiling]\nmemory_limit = '8GiB'\nrequire_grant = true\n",
        "groups/vision.toml": "[user.alice.gpu]\nmemory_growth = true\n[user.bob.gpu]\nmemory_growth = true\n",
    }
    server.policy(files | dict.fromkeys(("users/alice.toml", "users/bob.toml"), exception))
    result = server.tfgpu("check", "/etc/tfgpu", "--format", "json")
    assert list_findings(result, Path("/etc/tfgpu")) == [
        ("tfgpu.toml", 2, "never-counts"),
        ("groups/vision.toml", 3, "unreachable-table"),
        ("users/bob.toml", 3, "unreachable-table"),
    ]


@pytest.mark.parametrize("name", ["tfgpu.toml", "users/alice.toml"])
def test_the_real_machine_layer_must_be_roots(server: SharedMachine, name: str) -> None:
    """A file of it that somebody else may change is a finding with what to do."""
    server.policy({name: GOOD})
    os.chown(server.path(f"/etc/tfgpu/{name}"), ALICE.uid, ALICE.uid)
    result = server.tfgpu("check", "/etc/tfgpu")
    assert result.returncode == 1
    assert f"/etc/tfgpu/{name}: it belongs to alice, not to root" in result.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another group")
def test_a_file_that_its_people_cannot_read(project: Path, tfgpu: Tfgpu) -> None:
    """What an umask of 077 closes to everybody is a warning. A user's or group's file may be open to a group only."""
    etc = write_draft(project / "etc", tfgpu="", users__daemon="", groups__daemon="", users__root="")
    for name, mode, group in (
        ("tfgpu.toml", 0o600, 0),
        ("users/daemon.toml", 0o640, DAEMON),
        ("groups/daemon.toml", 0o640, DAEMON),
        ("users/root.toml", 0o640, DAEMON),
    ):
        os.chown(etc / name, -1, group)
        (etc / name).chmod(mode)
    assert list_findings(tfgpu("check", "etc", "--format", "json"), etc) == [
        ("tfgpu.toml", None, "closed"),
        ("users/root.toml", None, "closed"),
    ]
    for name in ("tfgpu.toml", "users/root.toml"):
        (etc / name).chmod(0o644)
    (etc / "users").chmod(0o700)
    assert {path for path, _, _ in list_findings(tfgpu("check", "etc", "--format", "json"), etc)} == {
        "users/daemon.toml",
        "users/root.toml",
    }


def test_a_closed_machine_layer_is_an_error_for_its_people(server: SharedMachine) -> None:
    """What `check` warns of is what alice is told: her programs cannot read the policy."""
    server.policy({"tfgpu.toml": GOOD})
    server.path("/etc/tfgpu/tfgpu.toml").chmod(0o600)
    assert "[warning closed]" in server.tfgpu("check", "/etc/tfgpu").stdout
    assert "[error unreadable]" in server.tfgpu("explain", "--user", "alice").stdout


def test_folders_that_may_not_be_listed(server: SharedMachine) -> None:
    """Who may not look into users/ is told that its files were not checked."""
    server.policy({"tfgpu.toml": GOOD, "users/bob.toml": GOOD})
    server.path("/etc/tfgpu/users").chmod(0o711)
    result = server.tfgpu("check", "/etc/tfgpu", user=ALICE)
    assert result.returncode == 1
    assert "/etc/tfgpu/users: cannot be listed" in result.stdout


LOG_FOLDER = "/var/log/tfgpu"
APPEND = "import os; from tfenv.audit.sinks import FileSink\n"
APPEND += "FileSink('/var/log/tfgpu/<uid>.jsonl', None, os.geteuid()).write(b'{\"timestamp\":1}\\n', 'info')"
ADMINISTRATORS_PAGE = Path(__file__).parents[3] / "docs" / "administrators.md"


@pytest.mark.skipif(os.path.exists("/dev/log"), reason="syslog is here")
def test_a_syslog_that_nobody_listens_to_is_found(shared_machine: SharedMachine) -> None:
    """`check` of the machine's files warns, and `doctor` has a row: programs could not write a required log."""
    shared_machine.clear()
    shared_machine.policy({"tfgpu.toml": "[audit]\nsyslog = true\n"})
    reason = "(/dev/log: No such file or directory)"
    told = shared_machine.tfgpu("check", "/etc/tfgpu")
    assert told.returncode == 1
    assert f"tfgpu.toml:2:1: audit.syslog: no syslog listens on this machine {reason}; " in told.stdout
    shown = shared_machine.tfgpu("doctor", "--no-tensorflow").stdout
    assert f"no syslog listens here {reason}" in " ".join(shown.split())
    shared_machine.policy({"tfgpu.toml": "[audit]\nsyslog = false\n"})
    assert "syslog" not in shared_machine.tfgpu("check", "/etc/tfgpu").stdout


def test_a_log_directory_in_which_nobody_can_create_anothers_log(shared_machine: SharedMachine) -> None:
    """Root is told of one that everybody can write in. After the page's commands nobody can, and users write theirs."""
    shared_machine.clear()
    shared_machine.policy({"tfgpu.toml": '[audit]\nfile = "/var/log/tfgpu/<uid>.jsonl"\n'})
    folder = shared_machine.path(LOG_FOLDER)
    for left in folder.iterdir():
        left.unlink()
    told = shared_machine.tfgpu("check", "/etc/tfgpu")
    assert (told.returncode, "everybody can write in /var/log/tfgpu" in told.stdout) == (1, True), told.stdout
    assert "everybody can write in /var/log/tfgpu" in shared_machine.tfgpu("doctor").stdout
    assert shared_machine.tfgpu("check", user=ALICE).returncode == 0
    shutil.rmtree(folder)
    try:
        page = ADMINISTRATORS_PAGE.read_text(encoding="utf-8")
        (block,) = re.findall(r"```bash\n(sudo mkdir -m 755 /var/log/tfgpu\n.*?)```", page, re.DOTALL)
        script = block.replace("sudo ", "")
        for _ in range(2):  # again, for new users: what is there stays
            done = shared_machine.run(ROOT, "sh", "-c", script)
            assert shared_machine.python(ALICE, APPEND).stderr == ""
        assert "File exists" in done.stderr
        assert shared_machine.tfgpu("check", "/etc/tfgpu").returncode == 0
        log, theirs = folder / f"{ALICE.uid}.jsonl", f"{LOG_FOLDER}/{BOB.uid}.jsonl"
        assert (log.stat().st_uid, log.stat().st_mode & 0o777, log.read_text().count("\n")) == (ALICE.uid, 0o600, 2)
        for act in (["touch", f"{LOG_FOLDER}/4711.jsonl"], ["rm", "-f", theirs], ["cat", theirs]):
            assert shared_machine.run(ALICE, *act).returncode != 0
        assert shared_machine.path(theirs).stat().st_uid == BOB.uid
        _rotate_while_alice_writes(shared_machine, log)
    finally:
        shutil.rmtree(folder)
        shared_machine.folder(LOG_FOLDER, mode=0o1733)


def _rotate_while_alice_writes(machine: SharedMachine, log: Path) -> None:
    """Rename the log, and create the new one once she waits for it, as logrotate's `create` does."""
    log.rename(f"{log}.1")
    gate = log.with_name("gate")
    os.mkfifo(gate)
    waiting = f"import tfenv.audit.sinks as sinks\nsinks.time.sleep = lambda _: open('{LOG_FOLDER}/gate').read()\n"
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(machine.python, ALICE, waiting + APPEND)
        with gate.open("w"):
            log.touch(0o600)
            os.chown(log, ALICE.uid, ALICE.uid)
        assert written.result().stderr == ""
    assert log.read_text().count("\n") == 1
