"""Files beside the program that have our names: the program runs as it would without tfenv."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROGRAM = """
import tfenv.runtime.finder
tfenv.runtime.finder.arm()
for name in [name for name in sys.modules if name == "tfenv" or name.startswith("tfenv.")]:
    del sys.modules[name]
sys.path.remove(repository)
sys.path.append(repository)
import tensorflow
print(os.environ.get("CUDA_VISIBLE_DEVICES"))
sys.exit(3)
"""
STAND_IN = "print('tensorflow')\n"
POLICY = '[gpu]\nvisible_devices = "none"\n[audit]\nfile = "audit.jsonl"\n'
EVIL = "print('beside the program')\nraise SystemExit(7)\n"


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "tensorflow").mkdir()
    (folder / "tensorflow" / "__init__.py").write_text(STAND_IN)
    (folder / "tfgpu.toml").write_text(POLICY)
    arming = f"import os, sys\nrepository = {str(REPOSITORY)!r}\nsys.path.insert(0, repository)\n"
    (folder / "program.py").write_text(arming + PROGRAM)
    return subprocess.run(
        [sys.executable, "program.py"],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", ["tomli", "structlog", "pynvml", "jsonschema"])
def test_a_dependency_s_name_beside_the_program_changes_nothing(tmp_path: Path, name: str) -> None:
    """The file is not run by us, the policy is applied, the exit status is the program's."""
    (tmp_path / f"{name}.py").write_text(EVIL)
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (3, "tensorflow\n-1\n"), done.stderr


@pytest.mark.parametrize("package", [True, False], ids=["package", "module"])
def test_our_own_name_beside_the_program_is_left_alone_and_said(tmp_path: Path, *, package: bool) -> None:
    """A tfenv that is not ours is not run; no policy is applied, and one line says why."""
    if package:
        (tmp_path / "tfenv").mkdir()
        (tmp_path / "tfenv" / "__init__.py").write_text(EVIL)
    else:
        (tmp_path / "tfenv.py").write_text(EVIL)
    done = run(tmp_path)
    assert (done.returncode, done.stdout) == (3, "tensorflow\nNone\n"), done.stderr
    assert "hides tfenv: no policy is applied" in done.stderr
