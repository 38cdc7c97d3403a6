"""Whether there may be a policy is told cheaply, and never wrongly denied."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tfenv import pipeline
from tfenv.config import presence
from tfenv.config.discover import discover
from tfenv.config.presence import may_find_policy
from tfenv.identity import identify

FILES = {
    "tfgpu.toml": "[gpu]\n",
    "pyproject.toml": "[tool.tfgpu.gpu]\n",
    "a/tfgpu.toml": "not TOML",
    "a/pyproject.toml": "[project]\nname = 'x'\n",
    "home/.config/tfgpu/tfgpu.toml": "[gpu]\n",
    "elsewhere/policy.toml": "[gpu]\n",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a layer of its own, whose user's home is in the folder."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.setattr(presence, "MACHINE_ROOT", str(tmp_path / "etc"))
    monkeypatch.setattr(presence, "_list_importer_folders", lambda _: [])  # the tests are the importer
    return tmp_path


def starts(root: Path) -> list[dict[str, str | None]]:
    """Starts of processes in every folder, of scripts elsewhere, and with every variable."""
    plain: list[dict[str, str | None]] = [
        {"cwd": str(root / "a" / "b"), "script": "train.py"},
        {"cwd": str(root), "script": "-c"},
        {"cwd": "/", "script": str(root / "a" / "b" / "train.py")},
        {"cwd": None, "script": ""},
    ]
    home: dict[str, str | None] = {"XDG_CONFIG_HOME": str(root / "home" / ".config")}
    named = [
        {"TFGPU_CONFIG": str(root / "elsewhere" / "policy.toml")},
        {"TFGPU_CONFIG": "/missing"},
        {"TFGPU_RUN": "[gpu]"},
    ]
    return [{**start, **home, **more} for start in plain for more in ({}, *named, {"SUDO_UID": "1000"})]


@pytest.mark.parametrize("present", [[], *([name] for name in FILES)], ids=lambda names: "".join(names) or "nothing")
def test_what_discover_finds_is_never_denied(root: Path, present: list[str]) -> None:
    """Wherever `discover` finds a file, or something wrong, there may be one."""
    for name in present:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(FILES[name])
    for start in starts(root):
        made = pipeline.make_start(start)
        sources, findings = discover(made, identify(os.geteuid()), str(root / "etc"))
        if sources or findings:
            assert may_find_policy(start), start


def test_nothing_is_nothing(root: Path) -> None:
    """Without a file anywhere the answer is no, also beside a pyproject.toml of others."""
    (root / "a" / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    start = {"cwd": str(root / "a" / "b"), "script": "train.py", "XDG_CONFIG_HOME": str(root / "home")}
    assert not may_find_policy(start)


def test_the_look_ends_where_the_walk_ends(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the home directory nothing is asked for: it may be an automount point."""
    (root / "tfgpu.toml").write_text("")
    monkeypatch.setattr(presence, "_find_home", lambda: str(root / "a"))
    start = {"cwd": str(root / "a" / "b"), "script": "-c", "XDG_CONFIG_HOME": "/nowhere"}
    assert not may_find_policy(start)
    assert list(presence.list_upward(str(root / "a" / "b"), str(root / "a"))) == [
        str(root / "a" / "b"),
        str(root / "a"),
    ]


@pytest.mark.parametrize("made", ["file", "folder", "dangling link"])
def test_a_machine_layer_of_any_kind_counts(root: Path, made: str) -> None:
    """Whatever is at /etc/tfgpu is worth a look: a folder that may not be entered must be a finding, not silence."""
    etc = root / "etc"
    if made == "file":
        etc.write_text("")
    elif made == "folder":
        etc.mkdir()
    else:
        etc.symlink_to("nowhere")
    assert may_find_policy({"cwd": "/", "script": "-c", "XDG_CONFIG_HOME": str(root / "home")})


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_a_pyproject_that_is_no_file_holds_nothing_up(root: Path, kind: str) -> None:
    """A FIFO is not waited for, and a directory is no policy."""
    path = root / "a" / "pyproject.toml"
    os.mkfifo(path) if kind == "fifo" else path.mkdir()
    assert not may_find_policy({"cwd": str(root / "a"), "script": "-c", "XDG_CONFIG_HOME": str(root / "home")})


def test_a_program_without_a_policy_loads_nothing_of_the_pipeline(tmp_path: Path) -> None:
    """Importing a framework where no file is found loads the hook and the look for files, and nothing else of tfenv."""
    (tmp_path / "tensorflow.py").write_text("")
    program = """
import sys
from tfenv.runtime import finder
finder.arm()
before = set(sys.modules)
import tensorflow
print(sorted(name for name in sys.modules if name.startswith("tfenv")))
print(sorted(set(sys.modules) - before - {"tensorflow"}))
"""
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}", "XDG_CONFIG_HOME": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    ours, new = done.stdout.splitlines()
    names = ["", ".config.presence", ".runtime", ".runtime.finder", ".runtime.import_hook"]
    assert ours == str([f"tfenv{name}" for name in names])
    assert "tomli" not in new
    assert "dataclasses" not in new
