"""Programs that something else starts, from somewhere else: the policy beside the program counts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environments import clean_environment
from tfenv.deploy import launch

PROGRAM = """
import os
import tensorflow
print("sees", os.environ.get("CUDA_VISIBLE_DEVICES"))
def test_nothing():
    pass
"""
POLICY = '[gpu]\nvisible_devices = [1]\n[audit]\nfile = "none"\nstderr = "none"\n'

#: How a tool runs PROJECT/train.py. The module that it needs, and its arguments for Python.
TOOLS = {
    "python": ("sys", ["{project}/train.py"]),
    "cProfile": ("cProfile", ["-m", "cProfile", "{project}/train.py"]),
    "trace": ("trace", ["-m", "trace", "--listfuncs", "{project}/train.py"]),
    "coverage": ("coverage", ["-m", "coverage", "run", "--data-file={elsewhere}/data", "{project}/train.py"]),
    "coverage's script": ("coverage", ["{scripts}/coverage", "run", "--data-file={elsewhere}/d", "{project}/train.py"]),
    "debugpy": ("debugpy", ["-m", "debugpy", "--listen", "0", "{project}/train.py"]),
    "pytest": ("pytest", ["-m", "pytest", "-qsp", "no:cacheprovider", "--rootdir={project}", "{project}/train.py"]),
    "pytest's script": ("pytest", ["{scripts}/pytest", "-qsp", "no:cacheprovider", "{project}/train.py"]),
    "ipython": ("IPython", ["-m", "IPython", "--no-banner", "{project}/train.py"]),
    "runpy": ("runpy", ["-c", "import runpy; runpy.run_path('{project}/train.py')"]),
    "a server with --chdir": ("os", ["-c", "import os; os.chdir('{project}'); import train"]),
    "a link": ("sys", ["{elsewhere}/link.py"]),
}  # fmt: skip


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """A project with a policy, and a directory elsewhere with a link to its program."""
    project, elsewhere, library = tmp_path / "project", tmp_path / "elsewhere", tmp_path / "library"
    for folder in (project / "deep", elsewhere, library / "tensorflow"):
        folder.mkdir(parents=True)
    (library / "tensorflow" / "__init__.py").touch()
    (project / "train.py").write_text(PROGRAM)
    (project / "tfgpu.toml").write_text(POLICY)
    (elsewhere / "link.py").symlink_to(project / "train.py")
    (project / "runs").symlink_to(elsewhere)
    folders = {"project": project, "elsewhere": elsewhere, "library": library, "scripts": Path(sys.executable).parent}
    return {name: str(path) for name, path in folders.items()}


def run(places: dict[str, str], *arguments: str, **variables: str) -> str:
    """Run Python elsewhere, with a stand-in for TensorFlow, and return what it prints."""
    repository = str(Path(__file__).parents[2])
    path = os.pathsep.join([places["library"], repository])
    # Debuggers and IPython write into the home directory.
    env = launch.build_environment(clean_environment() | {"PYTHONPATH": path, "IPYTHONDIR": places["elsewhere"]})
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=places["elsewhere"],
        env=env | variables,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.parametrize("tool", TOOLS)
def test_the_policy_beside_the_program_counts(tool: str, places: dict[str, str]) -> None:
    """Whatever tool starts it, from whatever directory, by whatever link."""
    module, arguments = TOOLS[tool]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed here")
    assert "sees 1" in run(places, *(argument.format(**places) for argument in arguments))


def test_a_policy_above_the_working_directory_comes_first(places: dict[str, str]) -> None:
    """What runs is looked at only where nothing speaks for the directory of the start."""
    Path(places["elsewhere"], "tfgpu.toml").write_text(POLICY.replace("[1]", "[0]"))
    assert "sees 0" in run(places, "-m", "cProfile", f"{places['project']}/train.py")


@pytest.mark.parametrize("option", ["-I", "-E"])
def test_isolated_programs_look_nowhere(option: str, places: dict[str, str]) -> None:
    """`python -I` and `-E` were told to heed nothing of their surroundings."""
    code = f"import sys; sys.path[:0] = [{places['library']!r}]; import runpy; "
    code += "import tfenv; tfenv.apply(); " if importlib.util.find_spec("_tfenv_boot") else ""
    text = run(places, option, "-c", f"{code}runpy.run_path({places['project'] + '/train.py'!r})")
    assert "sees None" in text


def test_a_linked_directory_belongs_to_both_projects(places: dict[str, str]) -> None:
    """After `cd project/runs`, which leads to another disk, the policy of the project counts."""
    runs = os.path.join(places["project"], "runs")
    program = "import tensorflow, os; print('sees', os.environ.get('CUDA_VISIBLE_DEVICES'))"
    assert "sees 1" in run(places, "-c", program, PWD=runs)
    assert "sees None" in run(places, "-c", program, PWD=places["project"]), "a stale PWD names another directory"
    assert "sees None" in run(places, "-c", program, PWD="relative")
