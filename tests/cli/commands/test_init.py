"""`tfgpu init` writes a first policy and takes nobody's away."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomli

from tests.cli.conftest import Tfgpu
from tests.shared_machine import ALICE, ROOT, SharedMachine
from tfenv.api import check
from tfenv.simulate.environment import build_environment, parse_gpus


def test_what_it_writes_is_right(project: Path, tfgpu: Tfgpu) -> None:
    """The file has no finding, declares growth and nothing else, and the next steps are shown."""
    result = tfgpu("init")
    assert result.returncode == 0
    assert "tfgpu check" in result.stdout
    path = project / "tfgpu.toml"
    assert check(path) == ()
    assert tomli.loads(path.read_text())["gpu"] == {"memory_growth": True}
    assert list(project.iterdir()) == [path]


def test_its_schema_is_found_offline(project: Path, tfgpu: Tfgpu) -> None:
    """The first line names a schema file that exists on this machine."""
    tfgpu("init")
    marker, _, schema = (project / "tfgpu.toml").read_text().splitlines()[0].partition(" ")
    assert marker == "#:schema"
    assert Path(schema).is_file()


def test_every_comment_may_be_uncommented(project: Path, tfgpu: Tfgpu) -> None:
    """All the values that stand in comments are right when they are uncommented together."""
    tfgpu("init")
    path = project / "tfgpu.toml"
    lines = path.read_text().splitlines()
    opened = [
        line[2:] if line.startswith("# ") and (" = " in line or line == "# [ceiling]") else line for line in lines
    ]
    path.write_text("\n".join(opened) + "\n")
    policy = tomli.loads(path.read_text())
    assert set(policy["gpu"]) == {"memory_growth", "memory_limit", "visible_devices"}
    assert set(policy["ceiling"]) == {"memory_limit", "max_devices"}
    assert [finding for finding in check(path) if finding.severity == "error"] == []


def test_nothing_is_overwritten_unasked(project: Path, tfgpu: Tfgpu) -> None:
    """A tfgpu.toml that is there stays as it is, with 1 and a word on --force, which replaces it."""
    path = project / "tfgpu.toml"
    path.write_text("# mine\n")
    refused = tfgpu("init")
    assert (refused.returncode, path.read_text()) == (1, "# mine\n")
    assert "--force" in refused.stderr
    assert tfgpu("init", "--force").returncode == 0
    assert path.read_text().startswith("#:schema")


def test_a_dangling_link_counts_as_there(project: Path, tfgpu: Tfgpu) -> None:
    """A symbolic link that leads nowhere is not written through."""
    (project / "tfgpu.toml").symlink_to(project / "elsewhere.toml")
    assert tfgpu("init").returncode == 1
    assert not (project / "elsewhere.toml").exists()


def test_a_policy_in_pyproject_is_not_shadowed(project: Path, tfgpu: Tfgpu) -> None:
    """Where pyproject.toml holds the policy, a second file would silently replace it: refused without --force."""
    pyproject = project / "pyproject.toml"
    pyproject.write_text("[project]\nname = 'x'\n")
    assert tfgpu("init").returncode == 0
    (project / "tfgpu.toml").unlink()
    pyproject.write_text("[tool.tfgpu.gpu]\nmemory_growth = true\n")
    refused = tfgpu("init")
    assert refused.returncode == 1
    assert "pyproject.toml" in refused.stderr
    assert not (project / "tfgpu.toml").exists()


def test_another_directory(project: Path, tfgpu: Tfgpu) -> None:
    """--path names the project's root. One that does not exist is wrong usage."""
    (project / "inner").mkdir()
    assert tfgpu("init", "--path", "inner").returncode == 0
    assert (project / "inner" / "tfgpu.toml").is_file()
    assert tfgpu("init", "--path", "nowhere").returncode == 2


# ---- the machine's


def uncomment(text: str) -> str:
    """Return the file with all values in force that stand in comments."""
    return re.sub(r'^# *(\[.*\]$|\]$|"GPU-|[a-z_]+ = )', r"\1", text, flags=re.MULTILINE)


def test_a_draft_names_the_machines_gpus(project: Path, tfgpu: Tfgpu) -> None:
    """With NVML the UUIDs of all cards stand in the file, with name and memory. Nothing is wrong with it."""
    cards = build_environment(parse_gpus("2x24GiB:NVIDIA A10,1x80GiB:NVIDIA A100"), base={})
    result = tfgpu("init", "--machine", "--path", "etc", env=cards)
    assert (result.returncode, result.stderr) == (0, "")
    path = project / "etc" / "tfgpu.toml"
    text = path.read_text()
    assert len(re.findall(r'"GPU-[0-9a-f-]{36}",  # [012]: NVIDIA A10', text)) == 3
    assert "# 2: NVIDIA A100, 80.0 GiB" in text
    for target in ("etc", "etc/tfgpu.toml"):
        assert tfgpu("check", target, env=cards).stdout == "ok: etc/tfgpu.toml\n"
    assert tomli.loads(text)["gpu"] == {"memory_growth": True}
    assert tomli.loads(text)["ceiling"] == {}


def test_every_comment_of_it_may_be_uncommented(project: Path, tfgpu: Tfgpu) -> None:
    """All the values that stand in comments are right together, on the machine they were written for."""
    cards = build_environment(parse_gpus("8x24GiB"), base={})
    tfgpu("init", "--machine", "--path", "etc", env=cards)
    path = project / "etc" / "tfgpu.toml"
    path.write_text(uncomment(path.read_text()).replace("group.students", "group.root").replace("deploy", "root"))
    policy = tomli.loads(path.read_text())
    assert len(policy["ceiling"]["allowed_devices"]) == 8
    assert policy["group"]["root"]["ceiling"] == {"memory_limit": "25%"}
    assert set(policy["machine"]) == {"allow_disable", "allow_project_files", "trusted_owners"}
    assert tfgpu("check", "etc", env=cards).stdout == "ok: etc/tfgpu.toml\n"


def test_without_nvml_it_says_so(project: Path, tfgpu: Tfgpu) -> None:
    """Without a driver the file and the terminal say that no GPU is named and how to get the UUIDs."""
    result = tfgpu("init", "--machine", "--path", "etc")
    text = (project / "etc" / "tfgpu.toml").read_text()
    if not result.stderr:
        pytest.skip("this machine has GPUs")
    assert result.returncode == 0
    assert result.stderr.startswith("tfgpu init: no GPU is named in the file: NVML")
    assert "# Which are here is not known: NVML" in text
    assert "nvidia-smi -L" in text
    tomli.loads(uncomment(text))


def test_a_draft_is_readable_by_all_whatever_the_umask(project: Path, variables: dict[str, str]) -> None:
    """Only the owner may write to it and everybody may read it: otherwise it would not count, or not for all."""
    for umask in (0o077, 0o002):
        folder = project / f"{umask:o}"
        command = [sys.executable, "-m", "tfenv", "init", "--machine", "--path", str(folder)]
        subprocess.run(command, env=variables, umask=umask, capture_output=True, check=True)
        modes = [path.stat().st_mode & 0o777 for path in (folder, folder / "users", folder / "tfgpu.toml")]
        assert modes == [0o755, 0o755, 0o644]
        assert sorted(os.listdir(folder)) == ["groups", "tfgpu.toml", "users"]


def test_a_draft_replaces_nothing_unasked(project: Path, tfgpu: Tfgpu) -> None:
    """What is there stays, be it a link that leads nowhere. --force replaces it."""
    (project / "etc").mkdir()
    path = project / "etc" / "tfgpu.toml"
    path.symlink_to(project / "elsewhere.toml")
    refused = tfgpu("init", "--machine", "--path", "etc")
    assert (refused.returncode, refused.stderr) == (
        1,
        "tfgpu init: etc/tfgpu.toml is there already; --force replaces it\n",
    )
    assert tfgpu("init", "--machine", "--path", "etc", "--force").returncode == 0
    assert path.read_text().startswith("#:schema")
    assert not path.is_symlink()
    assert not (project / "elsewhere.toml").exists()


def test_a_draft_needs_a_place(project: Path, tfgpu: Tfgpu) -> None:
    """A folder whose parent is missing, and a file in its place, are wrong usage."""
    (project / "file").touch()
    for path in ("no/where", "file"):
        refused = tfgpu("init", "--machine", "--path", path)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "is not a directory" in refused.stderr


def test_the_machines_own(server: SharedMachine) -> None:
    """As root it writes /etc/tfgpu/tfgpu.toml, which counts for all at once, and replaces it only with --force."""
    server.path("/etc/tfgpu").rmdir()
    env = build_environment(parse_gpus("8x24GiB"), base={})
    written = server.tfgpu("init", "--machine", env=env)
    assert (written.returncode, written.stderr) == (0, "")
    path = server.path("/etc/tfgpu/tfgpu.toml")
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (0, 0o644)
    assert server.tfgpu("check", "/etc/tfgpu", env=env).stdout == "ok: /etc/tfgpu/tfgpu.toml\n"
    told = server.tfgpu("explain", "--user", "alice", env=env).stdout
    assert "memory growth         on" in told
    path.write_text("# mine\n")
    assert server.tfgpu("init", "--machine", env=env).returncode == 1
    assert path.read_text() == "# mine\n"
    assert server.tfgpu("init", "--machine", "--force", env=env).returncode == 0


def test_who_is_not_root_is_told_what_to_do(server: SharedMachine) -> None:
    """The machine's policy is root's: exit code 2, and a draft is offered."""
    refused = server.tfgpu("init", "--machine", user=ALICE)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "tfgpu init: only root writes to /etc/tfgpu; use sudo, or write a draft with --path DIR\n"
    )
    drafted = server.tfgpu("init", "--machine", "--path", "draft", cwd="/home/alice", user=ALICE)
    assert drafted.returncode == 0
    server.run(ROOT, "cp", "-r", "/home/alice/draft/.", "/etc/tfgpu")
    assert server.tfgpu("check", "/etc/tfgpu").stdout == "ok: /etc/tfgpu/tfgpu.toml\n"


def test_roots_draft_in_somebodys_folder(server: SharedMachine) -> None:
    """A draft may be root's in a directory of a user: checking it finds nothing."""
    server.tfgpu("init", "--machine", "--path", "/home/alice")
    assert server.tfgpu("check", "/home/alice").returncode == 0
