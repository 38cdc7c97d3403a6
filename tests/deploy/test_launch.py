"""`tfgpu run`: the environment it makes, and the sitecustomize that loads through it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.environments import (
    STAND_IN_TENSORFLOW,
    Environment,
    clean_environment,
    find_python,
    launched,
    make_environment,
    told,
)
from tfenv.deploy.launch import PYTHONPATH_FOLDER, RESOLVER, build_environment

TELL = "import json, sys; print(json.dumps(sys.story))"
GOVERNED = ["before", "code", "after"]


# ---- the environment


def test_prefixes_pythonpath() -> None:
    """Our folder comes first, what was there stays behind it in its order."""
    assert build_environment({"PYTHONPATH": "/a:/b"})["PYTHONPATH"] == f"{PYTHONPATH_FOLDER}:/a:/b"


@pytest.mark.parametrize("base", [{}, {"PYTHONPATH": ""}])
def test_unset_and_empty_pythonpath(base: dict[str, str]) -> None:
    """No entry is made up: an empty one would be the current directory."""
    assert build_environment(base)["PYTHONPATH"] == PYTHONPATH_FOLDER


@given(st.lists(st.sampled_from(["/a", "/b", "", PYTHONPATH_FOLDER])).map(os.pathsep.join))
def test_prefixes_once(before: str) -> None:
    """Nested runs add nothing: making the environment twice is making it once."""
    once = build_environment({"PYTHONPATH": before, "HOME": "/h"})
    assert build_environment(once) == once
    assert once["PYTHONPATH"].split(os.pathsep).count(PYTHONPATH_FOLDER) == 1
    assert once["HOME"] == "/h"


def test_base_is_not_changed() -> None:
    """The mapping that was given stays as it is."""
    base = {"PYTHONPATH": "/a"}
    build_environment(base)
    assert base == {"PYTHONPATH": "/a"}


def test_folder_holds_nothing_else() -> None:
    """On PYTHONPATH our folder offers programs one module and no other."""
    assert [path.name for path in Path(PYTHONPATH_FOLDER).iterdir() if path.name != "__pycache__"] == [
        "sitecustomize.py"
    ]


# ---- interpreters of another environment


def test_lends_itself_to_another_environment(armed: Environment, bare: Environment) -> None:
    """A Python whose environment has no tfenv is governed by the one that runs it."""
    assert bare.story(f"import tensorflow; {TELL}", env=launched(armed)) == GOVERNED
    assert bare.story(f"import tensorflow; {TELL}") == ["code"]


def test_lends_itself_to_another_version(own: Environment, tmp_path: Path) -> None:
    """Also a Python of another version than the one tfenv is installed for."""
    python = find_python("3.12") or find_python("3.10")
    if python is None:
        pytest.skip("there is no other Python here")
    other = make_environment(python, tmp_path / "other")
    (other.site_packages / "tensorflow.py").write_text(STAND_IN_TENSORFLOW)
    assert other.story(f"import tensorflow; {TELL}", env=launched(own)) == GOVERNED


def test_same_environment(armed: Environment) -> None:
    """Where the .pth has armed the hook already, sitecustomize adds nothing."""
    program = f"import sys, tensorflow; assert sum('TfenvFinder' in str(f) for f in sys.meta_path) == 1; {TELL}"
    assert armed.story(program, env=launched(armed)) == GOVERNED


def test_leaves_no_trace_on_the_path(armed: Environment, bare: Environment) -> None:
    """The program sees the sys.path it would have without us, and no module of ours but the hook."""
    program = "import json, sys; loaded = sorted(sys.modules); print(json.dumps([sys.path, loaded]))"
    with_us, without = bare.story(program, env=launched(armed)), bare.story(program)
    assert isinstance(with_us, list)
    assert isinstance(without, list)
    assert with_us[0] == without[0]
    assert not [name for name in with_us[1] if name.startswith("tfenv")]


def test_lends_nothing_before_a_framework(armed: Environment, bare: Environment) -> None:
    """A program that imports no framework cannot import from the environment that runs it."""
    program = "import importlib.util, json; print(json.dumps([importlib.util.find_spec(n) for n in ('tfenv', 'rich')]))"
    assert bare.story(program, env=launched(armed)) == [None, None]


def test_lends_nothing_but_itself(own: Environment, bare: Environment) -> None:
    """After the import, too, only tfenv is within reach: its dependencies are used in its own interpreter."""
    (own.site_packages / "a_stranger.py").write_text("")
    (own.site_packages / "structlog.py").write_text("")
    program = """
import importlib.util, json, tensorflow
print(json.dumps([importlib.util.find_spec(name) is not None for name in ("tfenv", "structlog", "a_stranger")]))
"""
    assert bare.story(program, env=launched(own)) == [True, False, False]


def test_own_dependencies_win(own: Environment, bare: Environment, tmp_path: Path) -> None:
    """A program that has its own structlog keeps it."""
    (own.site_packages / "structlog.py").write_text("whose = 'lent'")
    (tmp_path / "structlog.py").write_text("whose = 'own'")
    env = launched(own)
    env["PYTHONPATH"] += f":{tmp_path}"
    assert bare.story("import tensorflow, structlog; print(f'\"{structlog.whose}\"')", env=env) == "own"


def test_reaches_grandchildren(armed: Environment, bare: Environment) -> None:
    """Processes started by the command are governed, too."""
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import tensorflow; {TELL}'])"
    assert bare.story(program, env=launched(armed)) == GOVERNED


def test_reaches_spawned_children(armed: Environment, bare: Environment, tmp_path: Path) -> None:
    """Children of multiprocessing, which get the parent's sys.path, are governed."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import json, multiprocessing, sys\n"
        "def work(queue):\n    import tensorflow\n    queue.put(sys.story)\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n    queue = context.SimpleQueue()\n"
        "    child = context.Process(target=work, args=(queue,))\n    child.start()\n"
        "    print(json.dumps(queue.get()))\n    child.join()\n"
    )
    assert told(bare.run(str(script), env=launched(armed))) == GOVERNED


def test_isolated_processes_are_not_covered(armed: Environment, bare: Environment) -> None:
    """PYTHONPATH does not reach `python -I` and -E: there only the .pth does. It is documented as not covered."""
    assert bare.story(f"import tensorflow; {TELL}", "-I", env=launched(armed)) == ["code"]


# ---- the sitecustomize it shadows


@pytest.mark.parametrize(
    "code",
    [
        "print('theirs')",
        "import sys; print(__name__, __file__, sys.modules['sitecustomize'].__file__)",
        "raise ValueError('theirs')",
        "import a_module_that_is_missing",
        "import tensorflow; print(tensorflow.__name__)",
        "raise SystemExit(7)",
        "this is no Python",
    ],
)
def test_chains_the_shadowed_one(armed: Environment, bare: Environment, tmp_path: Path, code: str) -> None:
    """The user's sitecustomize runs, fails and complains exactly as it would without us."""
    (tmp_path / "sitecustomize.py").write_text(code)
    program = "import sys; print(getattr(sys.modules.get('sitecustomize'), '__file__', None))"
    with_us = bare.run("-c", program, env=launched(armed, PYTHONPATH=str(tmp_path)))
    without = bare.run("-c", program, env={"PYTHONPATH": str(tmp_path)})
    assert (with_us.returncode, with_us.stdout) == (without.returncode, without.stdout)
    if "SystemExit" not in code:  # there the interpreter dies and shows its stack, which has our frame in it
        assert with_us.stderr == without.stderr


def test_usercustomize_runs(armed: Environment, bare: Environment, tmp_path: Path) -> None:
    """usercustomize is none of our business and runs as before."""
    (tmp_path / "usercustomize.py").write_text("import sys; sys.user = True")
    home = {"PYTHONUSERBASE": str(tmp_path), "PYTHONNOUSERSITE": ""}
    program = "import sys; print(str(getattr(sys, 'user', False)).lower())"
    expected = bare.story(program, env={"PYTHONPATH": str(tmp_path), **home})
    assert bare.story(program, env=launched(armed, PYTHONPATH=str(tmp_path), **home)) == expected


def test_missing_libraries_are_silent(bare: Environment) -> None:
    """When the environment that ran the command is gone by now, the program runs as if tfenv were not there."""
    env = {"PYTHONPATH": PYTHONPATH_FOLDER, RESOLVER: "/gone"}
    assert bare.story(f"import tensorflow; {TELL}", env=env) == ["code"]


def test_from_a_checkout(bare: Environment) -> None:
    """The sitecustomize of a checkout finds the boot module beside its folder."""
    env = build_environment(clean_environment())
    program = "import json, sys; print(json.dumps([str(f) for f in sys.meta_path if 'TfenvFinder' in str(f)]))"
    assert bare.story(program, env=env) == json.loads("[\"<class '_tfenv_boot.TfenvFinder'>\"]")


def test_a_policy_holds_without_any_dependency(bare: Environment, tmp_path: Path) -> None:
    """An environment that has neither tfenv nor tomli keeps the policy: tfenv's own interpreter reads the files.

    The Python of that environment may be of the same version as tfenv's, or of another one.
    """
    (tmp_path / "tfgpu.toml").write_text('[gpu]\nvisible_devices = [2]\n\n[audit]\nfile = "audit.jsonl"\n')
    program = """
import importlib.util, json, os, sys
import tensorflow
there = [name for name in ("tomli", "structlog", "jsonschema", "pynvml") if importlib.util.find_spec(name)]
print(json.dumps([os.environ.get("CUDA_VISIBLE_DEVICES"), there]))
"""
    done = subprocess.run(
        [bare.python, "-c", program],
        env=build_environment(clean_environment()),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["2", []], done.stderr
    records = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert records[0]["event"] == "policy_loaded"
