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
BEFORE
import tensorflow
print(os.environ.get("CUDA_VISIBLE_DEVICES"))
AFTER
sys.exit(3)
"""
STAND_IN = "print('tensorflow')\n"
POLICY = '[gpu]\nvisible_devices = "none"\n[audit]\nfile = "audit.jsonl"\nstderr = "none"\n'
EVIL = "print('beside the program')\nraise SystemExit(7)\n"


def run(folder: Path, before: str = "", after: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program with the hook armed and a policy beside it."""
    (folder / "tensorflow").mkdir()
    (folder / "tensorflow" / "__init__.py").write_text(STAND_IN)
    (folder / "tfgpu.toml").write_text(POLICY)
    arming = f"import os, sys\nrepository = {str(REPOSITORY)!r}\nsys.path.insert(0, repository)\n"
    (folder / "program.py").write_text(arming + PROGRAM.replace("BEFORE", before).replace("AFTER", after))
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


@pytest.mark.parametrize("name", ["grp", "hashlib", "json", "fcntl", "ctypes", "subprocess"])
def test_a_name_of_the_standard_library_beside_the_program_changes_nothing(tmp_path: Path, name: str) -> None:
    """tfenv takes its own from the library's folder, and the program gets the file beside it afterwards."""
    (tmp_path / f"{name}.py").write_text(f"print('the program {name}')\n")
    done = run(tmp_path, f"sys.modules.pop('{name}', None)\n", f"import {name}\n")
    assert (done.returncode, done.stdout) == (3, f"tensorflow\n-1\nthe program {name}\n"), done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("path", ["[]", "[folder]"])
def test_a_rewritten_path_changes_nothing(tmp_path: Path, path: str) -> None:
    """pex and hosts that embed Python set sys.path as they like, before the program imports a framework."""
    finder = """
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "tensorflow":
            import importlib.util
            return importlib.util.spec_from_file_location(name, folder + "/tensorflow/__init__.py")
import importlib.util
sys.meta_path.append(Finder)
"""
    rewrite = f"folder = os.getcwd()\n{finder}sys.path = {path}\n"
    done = run(tmp_path, rewrite)
    assert (done.returncode, done.stdout) == (3, "tensorflow\n-1\n"), done.stderr
    assert done.stderr == ""


OTHERS = {
    "a module": "tfenv.py",
    "a package": "tfenv/__init__.py",
    "a package with our modules": "tfenv/runtime/__init__.py",
    "a namespace": "tfenv/startup/data.txt",
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("when", ["", "import tfenv\n"], ids=["beside", "imported"])
def test_our_own_name_beside_the_program_switches_nothing_off(tmp_path: Path, kind: str, when: str) -> None:
    """The policy holds, `tfenv` is ours from the import of the framework on, and one line names the other."""
    file = tmp_path / OTHERS[kind]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("print('beside the program')\n" if not when else "")
    if kind.startswith("a package"):
        (tmp_path / "tfenv" / "__init__.py").write_text("")
    done = run(tmp_path, when)
    assert (done.returncode, done.stdout) == (3, "tensorflow\n-1\n"), done.stderr
    if kind == "a namespace":
        return  # Python itself would find ours, which is further on in the path
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{tmp_path}/tfenv" in done.stderr
    assert "is ignored" in done.stderr
    assert done.stderr.endswith(" [name-taken]\n")


def test_without_a_policy_the_name_stays_the_program_s(tmp_path: Path) -> None:
    """Where there is no file, nothing of tfenv is in the program's way."""
    (tmp_path / "tfenv.py").write_text("print('the program tfenv')\n")
    done = run(tmp_path, "os.remove('tfgpu.toml')\n", "import tfenv\n")
    assert (done.returncode, done.stdout) == (3, "tensorflow\nNone\nthe program tfenv\n"), done.stderr
    assert done.stderr == ""
