"""Project files that a nearer one keeps from counting are named: in a monorepo, and two in one directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Tfgpu, project, tfgpu, variables

__all__ = ["project", "tfgpu", "variables"]

ROOT = '[gpu]\nmemory_limit = "2GiB"\n'


@pytest.fixture
def member(project: Path) -> Path:
    """A member of a monorepo whose root has a policy."""
    (project / "tfgpu.toml").write_text(ROOT)
    folder = project / "member"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("text", ["[tool.tfgpu]\n", '[tool.tfgpu.audit]\nstderr = "none"\n'])
def test_a_member_that_says_nothing_of_gpus_hides_the_root(text: str, member: Path, tfgpu: Tfgpu) -> None:
    """`check` warns, there and from above, and `explain` names the file that is left out."""
    (member / "pyproject.toml").write_text(text)
    for arguments, cwd in ((("check",), member), (("check", str(member)), member.parent)):
        done = tfgpu(*arguments, "--format", "json", cwd=cwd)
        (finding,) = json.loads(done.stdout)["findings"]
        assert (done.returncode, finding["code"], finding["severity"]) == (1, "hides-policy", "warning")
        assert f"hides {member.parent}/tfgpu.toml" in finding["message"]
    lines = [line.split() for line in tfgpu("explain", cwd=member).stdout.splitlines() if " hidden " in line]
    assert [words[1].endswith("/project/tfgpu.toml") for words in lines] == [True]


@pytest.mark.parametrize(
    ("name", "text", "advice"),
    [
        ("tfgpu.toml", "# nothing yet\n", "delete this file, or write those keys here"),
        ("pyproject.toml", "[tool.tfgpu]\n", "remove this table, or write those keys here"),
    ],
)
def test_explain_names_the_file_that_counts(name: str, text: str, advice: str, member: Path, tfgpu: Tfgpu) -> None:
    """Of a file without settings `explain` says to add them there, and shows what `check` finds."""
    (member / name).write_text(text)
    shown = tfgpu("explain", cwd=member)
    assert f"No GPU settings apply: programs run unchanged. Add settings to {name}.\n" in shown.stdout
    finding = f"{name}: sets nothing about GPUs but hides {member.parent}/tfgpu.toml; {advice} [warning hides-policy]"
    assert finding in shown.stdout
    assert finding in tfgpu("check", cwd=member).stdout
    assert shown.returncode == 1


def test_a_member_with_a_policy_of_its_own_is_no_mistake(member: Path, tfgpu: Tfgpu) -> None:
    """The nearest counts, as the laws say. `explain` names the one above all the same."""
    (member / "tfgpu.toml").write_text("[gpu]\nmemory_growth = true\n")
    assert tfgpu("check", cwd=member).returncode == 0
    assert "hidden" in tfgpu("explain", cwd=member).stdout


def test_two_files_in_one_directory(member: Path, tfgpu: Tfgpu) -> None:
    """`[tool.tfgpu]` beside a tfgpu.toml does not count, and `check` says so of it."""
    (member.parent / "pyproject.toml").write_text('[tool.tfgpu.gpu]\nmemory_limit = "1GiB"\n')
    done = tfgpu("check", "--format", "json", cwd=member.parent)
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["code"], finding["path"]) == ("hidden", f"{member.parent}/pyproject.toml")
