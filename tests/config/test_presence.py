"""Whether there may be a policy is told cheaply, and never wrongly denied."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.shared_machine import ALICE, ROOT, SharedMachine, shared_machine
from tfenv import pipeline
from tfenv.config import presence
from tfenv.config.discover import discover
from tfenv.config.presence import may_find_policy
from tfenv.identity import identify

__all__ = ["shared_machine"]

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
        {"TFGPU_SITE_CONFIG": str(root / "elsewhere" / "policy.toml")},
        {"TFGPU_SITE_CONFIG": "/missing"},
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


@pytest.mark.parametrize(
    "below",
    [
        pytest.param("gone", id="removed"),
        pytest.param("gone/too", id="removed with its parent"),
        pytest.param("tfgpu.toml/x", id="replaced by a file"),
        pytest.param("n" * 256, id="too long"),
    ],
)
def test_what_is_gone_hides_nothing_above_it(root: Path, below: str) -> None:
    """A working directory that was removed or replaced, or a path that is too long, does not end the walk."""
    (root / "a" / "tfgpu.toml").write_text("")
    assert str(root / "a") in presence.list_upward(str(root / "a" / below), None)
    assert may_find_policy({"cwd": str(root / "a" / below), "script": "-c", "XDG_CONFIG_HOME": str(root / "home")})


def test_a_home_that_is_gone_ends_the_walk(root: Path) -> None:
    """Above the home directory nothing is looked at, also where the home directory itself cannot be."""
    home = str(root / "gone")
    assert list(presence.list_upward(f"{home}/project", home)) == []


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EACCES])
def test_the_walk_does_not_leave_a_file_system_that_refuses(
    number: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is gone, and a FUSE mount of somebody else (EACCES below an open directory), end the walk."""
    look_at = os.stat

    def refuse(path: str) -> os.stat_result:
        if path.startswith(str(root / "a" / "b")):
            raise OSError(number, os.strerror(number))
        return look_at(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", refuse)
        looked = list(presence.list_upward(str(root / "a" / "b" / "c"), None))
    assert looked == []


def test_a_locked_directory_hides_nothing_above_it(shared_machine: SharedMachine) -> None:
    """Who is started inside a directory that they may not enter is under the policy above it."""
    shared_machine.clear()
    shared_machine.write("/srv/project/tfgpu.toml", '[gpu]\nmemory_limit = "2GiB"\n', ROOT)
    shared_machine.folder("/srv/project/locked", ROOT, 0o700)
    shared_machine.folder("/srv/project/locked/run", ROOT)
    program = "import tfenv; print(tfenv.explain().as_dict()['plan']['limit_bytes'])"
    done = shared_machine.python(ALICE, program, cwd="/srv/project/locked/run")
    assert (done.stdout, done.stderr) == (f"{2 << 30}\n", "")


def test_pwd_of_a_directory_that_is_gone_counts_for_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither $PWD nor the working directory can be looked at, nothing says that they are the same."""
    (root / "link").symlink_to(root / "a")
    monkeypatch.setenv("PWD", str(root / "link" / "gone"))
    start = {"cwd": str(root / "away"), "script": "-c"}
    assert presence.list_program_folders(start, at_import=False) == []


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
