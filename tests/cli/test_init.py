"""`tfgpu init` writes a first policy and takes nobody's away."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import tomli

from tfenv.api import check

Tfgpu = Callable[..., subprocess.CompletedProcess[str]]


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
    """--path names the project's root; one that does not exist is wrong usage."""
    (project / "inner").mkdir()
    assert tfgpu("init", "--path", "inner").returncode == 0
    assert (project / "inner" / "tfgpu.toml").is_file()
    assert tfgpu("init", "--path", "nowhere").returncode == 2
