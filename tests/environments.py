"""Virtual environments with the built wheel and two stand-ins, and how programs are run in them.

TensorFlow weighs 600 MB and exists for few of these Pythons, and here it is the start of the interpreter and the
import that are under test, not TensorFlow: a small package of its name stands in for it, and a small
`tfenv.runtime.enforce` for the policy. Both write what happens, in its order, into `sys.story`. What the real ones
do together is tested with the frameworks and with the whole line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")

STAND_IN_TENSORFLOW = """\
import sys

sys.__dict__.setdefault("story", []).append("code")
if getattr(sys, "break_tensorflow", False):
    raise ImportError("libfoo.so: cannot open shared object file")
"""

STAND_IN_ENFORCE = """\
import sys

story = sys.__dict__.setdefault("story", [])
starts = []


def before_import(name, start):
    story.append("before")
    starts.append(dict(start))
    if start["TFGPU_CONFIG"] == "fail":
        from tfenv.errors import Finding, PolicyError

        raise PolicyError((Finding("test", "the policy says no"),))
    if start["TFGPU_CONFIG"] == "bug":
        raise ZeroDivisionError


def after_import(name, module):
    assert module is sys.modules[name]
    story.append("after")


def too_late(name, start):
    story.append("too late")
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment and how programs are run in it."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    @property
    def site_packages(self) -> Path:
        return next((self.folder / "lib").glob("python3.*")) / "site-packages"

    def run(
        self, *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments, in an environment without PYTHON* and TFGPU_* of the tests' own."""
        return subprocess.run(
            [self.python, *arguments],
            env=clean_environment() | (env or {}),
            cwd=cwd or self.folder,  # not the checkout: `-c` puts it on sys.path
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def story(self, program: str, *options: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> object:
        """What a program tells that prints its result as JSON; it must end well and say nothing else."""
        done = self.run(*options, "-c", program, env=env, cwd=cwd)
        return told(done)


def clean_environment() -> dict[str, str]:
    ours = ("PYTHON", "TFGPU_", "COVERAGE", "COV_", "__PYVENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def told(done: subprocess.CompletedProcess[str]) -> object:
    """The JSON a program printed; it must have ended well and complained about nothing."""
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return json.loads(done.stdout)


def launched(armed: Environment, **variables: str) -> dict[str, str]:
    """What `tfgpu run` of that environment gives to its command, beside what a test's programs get anyway."""
    program = f"""
import json
from tfenv.deploy.launch import build_environment
print(json.dumps(build_environment({variables})))
"""
    result = told(armed.run("-c", program))
    assert isinstance(result, dict)
    return result


def make_environment(python: str, folder: Path) -> Environment:
    """An empty virtual environment; without pip, which Debian's Python cannot install and which takes seconds."""
    subprocess.run(
        [python, "-m", "venv", "--without-pip", str(folder)], check=True, capture_output=True, env=clean_environment()
    )
    return Environment(folder)


def pip(environment: Environment, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Our own pip, working on that environment."""
    command = [sys.executable, "-m", "pip", "--python", environment.python, "--quiet", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environment(), timeout=280)


def install(environment: Environment, wheel: Path) -> None:
    done = pip(environment, "install", "--no-deps", "--no-index", str(wheel))
    assert done.returncode == 0, done.stderr


def add_stand_ins(environment: Environment) -> None:
    site_packages = environment.site_packages
    (site_packages / "tensorflow").mkdir()
    (site_packages / "tensorflow" / "__init__.py").write_text(STAND_IN_TENSORFLOW)
    (site_packages / "tfenv" / "runtime" / "enforce.py").write_text(STAND_IN_ENFORCE)
    (site_packages / "tfenv" / "config" / "presence.py").write_text("def may_find_policy(start):\n    return True\n")


@cache
def find_python(version: str) -> str | None:
    """Find an interpreter of that version that runs: the tests' own, on PATH, or one of pyenv's. None if none does."""
    candidates = [sys.executable, shutil.which(f"python{version}") or ""]
    candidates += sorted(str(path) for path in Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    return next((path for path in candidates if path and _version(path) == version), None)


@cache
def find_quick_pythons() -> frozenset[str]:
    """Return the oldest and the newest version that are here. `make test` is content with those."""
    oldest = next((version for version in VERSIONS if find_python(version)), None)
    newest = next((version for version in reversed(VERSIONS) if find_python(version)), None)
    return frozenset(version for version in (oldest, newest) if version is not None)


@cache
def _version(python: str) -> str | None:
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def interpreter(which: str) -> str:
    if which != "system":
        python = find_python(which)
        if python is None:
            pytest.skip(f"there is no Python {which} here")
        return python
    if not list(Path("/usr/lib").glob("python3*/sitecustomize.py")):
        pytest.skip("the system's Python has no sitecustomize of its own, as Debian's has")
    if _version("/usr/bin/python3") not in VERSIONS:
        pytest.skip("the system's Python is none of those supported")
    return "/usr/bin/python3"


# ---- fixtures, for every test


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built once."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session", params=[*VERSIONS, "system"])
def python(request: pytest.FixtureRequest) -> str:
    """Each Python that is supported and here. "system" is Debian's or Ubuntu's with its own sitecustomize."""
    return interpreter(request.param)


@pytest.fixture(scope="session")
def armed(python: str, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel and the stand-ins. Tests only read it."""
    environment = make_environment(python, tmp_path_factory.mktemp("armed") / "venv")
    install(environment, wheel)
    add_stand_ins(environment)
    return environment


@pytest.fixture(scope="session")
def bare(python: str, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment of the same Python with the stand-in for TensorFlow and a .pth that does nothing.

    Reading any .pth, Python 3.13 imports an encoding; that is not the hook's doing.
    """
    environment = make_environment(python, tmp_path_factory.mktemp("bare") / "venv")
    (environment.site_packages / "nothing.pth").write_text("# nothing\n")
    (environment.site_packages / "tensorflow").mkdir()
    (environment.site_packages / "tensorflow" / "__init__.py").write_text(STAND_IN_TENSORFLOW)
    return environment


@pytest.fixture
def own(wheel: Path, tmp_path: Path) -> Environment:
    """An environment of this Python that a test may change, with the wheel and the stand-ins."""
    environment = make_environment(sys.executable, tmp_path / "own")
    install(environment, wheel)
    add_stand_ins(environment)
    return environment
