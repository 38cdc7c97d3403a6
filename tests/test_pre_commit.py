"""pre-commit: what this repository offers to others (`.pre-commit-hooks.yaml`), and what it uses itself.

The real pre-commit installs this checkout and checks what is about to be committed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

yaml: Any = pytest.importorskip("yaml", reason="of the development group")

ROOT = Path(__file__).resolve().parent.parent
#: What building the package takes; also what is not committed yet.
PARTS = ("tfenv", "schemas", "pyproject.toml", "README.md", "LICENSE", ".pre-commit-hooks.yaml")
CONFIG = """
repos:
- repo: {repository}
  rev: {revision}
  hooks:
  - id: tfgpu-check
  - id: tfgpu-test
"""
TESTS = """
[[case]]
name = "a student gets 8 GiB"
groups = ["students"]
gpus = "2x24GiB"
expect.memory_limit = "8GiB"
"""
PYPROJECT = "[project]\nname = 'vision'\n"


def git(folder: Path, *arguments: str) -> str:
    identity = {f"GIT_{who}_{what}": "tests" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    command = ["git", "-c", "init.defaultBranch=main", *arguments]
    environment = {**os.environ, **identity, "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def repository(folder: Path) -> str:
    """Make this checkout a repository of its own; its one commit."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(ROOT / part, folder / part)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--message", "all")
    return git(folder, "rev-parse", "HEAD")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_what_is_committed_is_checked(tmp_path: Path) -> None:
    """A mistake stops the commit and is told with its place; files of others, and a pyproject without us, do not."""
    revision = repository(tmp_path / "tfenv")
    project = tmp_path / "project"
    (project / "deep" / "er").mkdir(parents=True)
    git(project, "init", "--quiet")
    (project / ".pre-commit-config.yaml").write_text(
        CONFIG.format(repository=tmp_path / "tfenv", revision=revision), encoding="utf-8"
    )
    (project / "pyproject.toml").write_text(PYPROJECT)
    (project / "other.toml").write_text("[gpu\n")
    policy = project / "deep" / "er" / "tfgpu.toml"
    policy.write_text('[gpu]\nmemory_limit = "8 gigs"\n')
    policy.with_name("a.test.toml").write_text(TESTS)

    failed = commit(project)
    assert failed.returncode == 1, failed.stderr
    assert 'deep/er/tfgpu.toml:2:1: gpu.memory_limit: "gigs" is not a unit' in failed.stderr
    assert "1 error in 2 files" in failed.stderr

    policy.write_text('[gpu]\nmemory_limit = "8GiB"\n')
    passed = commit(project)
    assert passed.returncode == 0, passed.stderr
    assert "Passed" in passed.stderr

    (project / "pyproject.toml").write_text(f"{PYPROJECT}[tool.tfgpu.gpu]\nmemory_growth = 1\n")
    table = commit(project)
    assert table.returncode == 1
    assert "pyproject.toml:4:1: gpu.memory_growth: " in table.stderr

    (project / "pyproject.toml").write_text(PYPROJECT)
    etc = project / "etc"
    (etc / "groups").mkdir(parents=True)
    (etc / "tfgpu.toml").write_text("[gpu]\nmemory_growth = true\n")
    (etc / "tfgpu.test.toml").write_text(TESTS)
    (etc / "groups" / "students.toml").write_text('[ceiling]\nmemory_limit = "8GiB"\n')
    tested = commit(project)
    assert tested.returncode == 0, tested.stderr
    assert tested.stderr.count("Passed") == 2

    # A change of one group's file runs the tests beside it.
    (etc / "groups" / "students.toml").write_text('[ceiling]\nmemory_limit = "9GiB"\n')
    broken = commit(project)
    assert broken.returncode == 1
    assert "memory_limit  expected 8.0 GiB  got 9.0 GiB" in broken.stderr
    assert "etc/groups/students.toml:2  ceiling.memory_limit" in broken.stderr


def commit(project: Path) -> subprocess.CompletedProcess[str]:
    """`git commit` of everything, with pre-commit's hook in its place."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TFGPU_", "PYTHON", "GIT_"))}
    environment |= {"PRE_COMMIT_HOME": str(project.parent / "home"), "GIT_CONFIG_GLOBAL": os.devnull}
    git(project, "add", "--all")
    subprocess.run(
        [sys.executable, "-m", "pre_commit", "install"], cwd=project, env=environment, capture_output=True, check=True
    )
    command = ["git", "-c", "user.name=tests", "-c", "user.email=tests", "commit", "--message", "a change"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    if "No matching distribution found" in done.stdout + done.stderr:
        pytest.skip("pre-commit cannot install the package's dependencies here")
    return done


def test_our_own_hooks_fetch_nothing() -> None:
    """The hooks for contributors are local, and run the tools that `make venv` puts into `.venv`."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repository["repo"] for repository in config["repos"]} == {"local"}
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks)
