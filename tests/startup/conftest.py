"""An environment of every Python that is here, each with the built wheel and the stand-ins of `environments`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.startup.environments import (
    ROOT,
    STAND_IN_TENSORFLOW,
    VERSIONS,
    Environment,
    add_stand_ins,
    install,
    interpreter,
    make_environment,
)


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
    """Each Python that is supported and here; "system" is Debian's or Ubuntu's with its own sitecustomize."""
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
