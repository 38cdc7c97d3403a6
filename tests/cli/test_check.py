"""`tfgpu check` finds every mistake, and says where it is."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Tfgpu = Callable[..., subprocess.CompletedProcess[str]]


GOOD = "[gpu]\nmemory_growth = true\n"
BAD = '[gpu]\nmemory_growth = true\nmemory_limit = "8 gigs"\nmemory_groth = true\n'


def test_a_good_file_is_ok(project: Path, tfgpu: Tfgpu) -> None:
    """A file without a mistake is named, and the exit code is 0."""
    (project / "tfgpu.toml").write_text(GOOD)
    result = tfgpu("check")
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok: tfgpu.toml\n", "")


def test_no_file_is_no_mistake(tfgpu: Tfgpu) -> None:
    """Without any policy file there is nothing wrong; how to get one is said."""
    result = tfgpu("check")
    assert result.returncode == 0
    assert "tfgpu init" in result.stdout


def test_every_mistake_has_its_place(project: Path, tfgpu: Tfgpu) -> None:
    """Each finding is one line with file:line:column, the key and what would be right; the exit code is 1."""
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
    """A path that is not there is a finding, not silence."""
    result = tfgpu("check", "nowhere.toml")
    assert result.returncode == 1
    assert "nowhere.toml: there is no such file" in result.stdout


def test_tfgpu_config_that_does_not_exist(tfgpu: Tfgpu) -> None:
    """TFGPU_CONFIG that names no file is a finding."""
    result = tfgpu("check", env={"TFGPU_CONFIG": "/nowhere/tfgpu.toml"})
    assert result.returncode == 1
    assert result.stdout.startswith("/nowhere/tfgpu.toml: there is no such file")


def test_pyproject(project: Path, tfgpu: Tfgpu) -> None:
    """A pyproject.toml is checked by its own table, with the places of the whole file."""
    (project / "pyproject.toml").write_text("[project]\nname = 'x'\n\n[tool.tfgpu.gpu]\nmemory_growth = 3\n")
    result = tfgpu("check", "pyproject.toml")
    assert result.returncode == 1
    assert result.stdout.startswith("pyproject.toml:5:1: gpu.memory_growth: ")


def test_a_pyproject_without_our_table(project: Path, tfgpu: Tfgpu) -> None:
    """Named on purpose it is a mistake; with --table-optional it is none, and what else is named is checked as ever."""
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
    assert "neither tfgpu.toml nor pyproject.toml" in result.stdout


def test_hostile_names_do_not_steer_the_terminal(project: Path, tfgpu: Tfgpu) -> None:
    """Escape sequences in keys are shown escaped, each finding stays one line."""
    (project / "tfgpu.toml").write_text('"a\\u001b[31m\\nb" = 1\n')
    result = tfgpu("check")
    assert result.returncode == 1
    assert "\x1b" not in result.stdout
    assert len(result.stdout.splitlines()) == 2
