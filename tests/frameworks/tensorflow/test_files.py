"""Broken, unreadable and hostile files: the program is none the worse for them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.frameworks.harness import Ended, World, run_program
from tests.selection import mark_rest

PROGRAM = """
import sys
import tensorflow as tf
print("GPUs", len(tf.config.list_physical_devices("GPU")), tf.zeros([8]).device)
print("a line on stderr", file=sys.stderr)
sys.exit(3)
"""


def _text(content: str) -> Callable[[Path], None]:
    return _bytes(content.encode())


def _bytes(content: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(content)

    return make


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def _symlink_loop(path: Path) -> None:
    path.symlink_to(path.name)


def _writable_by_everybody(path: Path) -> None:
    path.write_text("[gpu]\nvisible_devices = [1]\n", encoding="utf-8")
    path.chmod(0o666)


def _strangers(path: Path) -> None:
    path.write_text("[gpu]\nvisible_devices = [1]\n", encoding="utf-8")
    os.chown(path, 12345, 12345)


#: What stands where tfgpu.toml should, by the code of the finding.
DROPPED: dict[str, tuple[Callable[[Path], None], bool]] = {
    "not-toml": (_text("[gpu\nmemory_limit = "), True),
    "half-written": (_text('[gpu]\nmemory_limit = "8Gi'), True),
    "utf-16": (_bytes("[gpu]\nmemory_growth = true\n".encode("utf-16")), True),
    "latin-1": (_bytes(b"# caf\xe9\n[gpu]\nvisible_devices = [1]\n"), True),
    "nul": (_bytes(b"[gpu]\nvisible_devices = [1]\0\n"), True),
    "huge": (_bytes(b"#" * 300_000 + b"\n[gpu]\nvisible_devices = [1]\n"), True),
    "deep": (_text("[gpu]\nvisible_devices = " + "[" * 20_000 + "]" * 20_000), True),
    "fifo": (os.mkfifo, True),
    "directory": (lambda path: path.mkdir(), True),
    "socket": (_socket, True),
    "symlink-loop": (_symlink_loop, True),
    "dangling": (lambda path: path.symlink_to("nowhere"), True),
    "writable-by-everybody": (_writable_by_everybody, True),
    "strangers": (_strangers, True),
    "escapes": (_text('[gpu]\n"\\u001b[31mred\\n\\u2028" = 1\nmemory_limit = "\\u001b[2J"\n'), True),
    "wrong-types": (_text('on_error = 5\ngpu = "all"\n'), True),
    "empty": (_text(""), False),
    "unknown-keys": (_text("[gpu]\nmemory_grwoth = true\n[ceilings]\n"), True),
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, needs_tensorflow: None) -> Ended:
    """The program without tfenv."""
    ended = run_program(World(None, gpus="2x24GiB", armed=False), PROGRAM, tmp_path_factory.mktemp("bare"))
    assert (ended.status, ended.stdout) == (3, "GPUs 2 /job:localhost/replica:0/task:0/device:GPU:0\n")
    return ended


def same(ours: Ended, bare: Ended) -> None:
    """stdout, exit status and stderr are those of a run without tfenv, apart from our lines."""
    assert ours.stdout == bare.stdout
    assert ours.status == bare.status
    assert ours.stderr == bare.stderr


#: Each is a program of its own that imports TensorFlow: `make test` has one of each sort.
_QUICK = ("fifo", "escapes")


@pytest.mark.parametrize("kind", mark_rest(DROPPED, _QUICK))
def test_a_bad_file_does_not_hurt_the_program(
    kind: str, bare: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is dropped, the program runs as without tfenv, and one printable line on stderr names the file."""
    monkeypatch.chdir(tmp_path)
    make, complains = DROPPED[kind]
    if kind == "strangers" and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    make(tmp_path / "tfgpu.toml")
    ours = run_program(World(None, gpus="2x24GiB"), PROGRAM, tmp_path)
    same(ours, bare)
    assert len(ours.ours) == complains
    assert all(line.isprintable() and "tfgpu.toml" in line for line in ours.ours)


def test_an_unreadable_file_does_not_hurt_the_program(bare: Ended, tmp_path: Path) -> None:
    """A file without read permission is dropped like any other."""
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (tmp_path / "tfgpu.toml").write_text("[gpu]\n", encoding="utf-8")
    (tmp_path / "tfgpu.toml").chmod(0)
    ours = run_program(World(None, gpus="2x24GiB"), PROGRAM, tmp_path)
    same(ours, bare)
    assert len(ours.ours) == 1


def test_one_bad_key_costs_no_other(bare: Ended, tmp_path: Path) -> None:
    """A file that parses loses only the bad key: visibility holds beside a limit that is none."""
    policy = '[gpu]\nvisible_devices = [1]\nmemory_limit = "lots"\n'
    ours = run_program(World(policy, gpus="2x24GiB"), PROGRAM, tmp_path)
    assert (ours.status, ours.stderr) == (bare.status, bare.stderr)
    assert ours.stdout == bare.stdout.replace("GPUs 2", "GPUs 1")
    assert {request.gpu for request in ours.requests if request.op == "alloc"} == {1}
    assert len(ours.ours) == 1
    assert "tfgpu.toml:3:" in ours.ours[0]


def test_a_path_that_does_not_exist_is_a_finding(bare: Ended, tmp_path: Path) -> None:
    """TFGPU_CONFIG names a file that is not there: the program runs, and one line says so."""
    ours = run_program(World(None, gpus="2x24GiB"), PROGRAM, tmp_path, TFGPU_CONFIG="/nowhere/tfgpu.toml")
    same(ours, bare)
    assert len(ours.ours) == 1
    assert "/nowhere/tfgpu.toml" in ours.ours[0]


def test_without_a_file_nothing_is_said(bare: Ended, tmp_path: Path) -> None:
    """The armed hook without any policy leaves no trace: same output, same requests, no record."""
    ours = run_program(World(None, gpus="2x24GiB"), PROGRAM, tmp_path)
    same(ours, bare)
    assert ours.ours == ()
    assert ours.records == ()
    assert [(r.op, r.gpu, r.bytes) for r in ours.requests] == [(r.op, r.gpu, r.bytes) for r in bare.requests]


HOSTILE = (
    '[gpu]\nvisible_devices = "all"\nmemory_limit = "none"\n[audit]\nfile = "../outside.jsonl"\n',
    '[gpu]\nvisible_devices = [0, 1]\n[machine]\nallow_disable = true\n[user.root.gpu]\nmemory_limit = "80GiB"\n',
)


@pytest.mark.parametrize("text", HOSTILE, ids=["audit-outside", "machine-keys"])
def test_a_project_cannot_write_outside_itself(text: str, bare: Ended, tmp_path: Path) -> None:
    """A cloned repository's file names no log outside the project, and machine keys have no effect in it."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "tfgpu.toml").write_text(text, encoding="utf-8")
    ours = run_program(World(None, gpus="2x24GiB"), PROGRAM, project)
    same(ours, bare)
    assert not (tmp_path / "outside.jsonl").exists()
    assert len(ours.ours) == 1
