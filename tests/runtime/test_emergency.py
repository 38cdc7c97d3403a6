"""What is done where tfenv cannot be loaded: the machine's `on_error` decides, read from the machine's own file."""

from __future__ import annotations

import json
import os
import pwd
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.environments import Environment, install, make_environment
from tests.shared_machine import ROOT, SharedMachine, shared_machine
from tfenv.runtime import emergency
from tfenv.runtime.emergency import read_machine_on_error

__all__ = ["shared_machine"]

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root's file counts")

PROGRAM = """
import os
for attempt in range(2):
    try:
        import tensorflow
        print("imported", os.environ.get("CUDA_VISIBLE_DEVICES"))
    except RuntimeError as error:
        print(type(error).__name__, isinstance(error, ImportError))
"""


@pytest.fixture
def broken(wheel: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Environment:
    """An environment whose tfenv is there and cannot be loaded."""
    environment = make_environment(sys.executable, tmp_path / "broken")
    install(environment, wheel)
    (environment.site_packages / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (environment.site_packages / "tensorflow").mkdir()
    (environment.site_packages / "tensorflow" / "__init__.py").write_text("")
    (environment.site_packages / "tfenv" / request.param).write_text("this is no Python")
    return environment


@pytest.mark.parametrize("broken", ["pipeline.py", "runtime/import_hook.py", "errors.py"], indirect=True)
@pytest.mark.parametrize(
    ("on_error", "expected"),
    [("fail", ["PolicyError False"] * 2), ("cpu", ["imported -1"] * 2), ("warn", ["imported None"] * 2)],
)
def test_the_machines_on_error_holds_where_tfenv_is_broken(
    shared_machine: SharedMachine, broken: Environment, on_error: str, expected: list[str]
) -> None:
    """ "fail" raises, again on a retry, "cpu" shows no GPU, "warn" says a line and goes on."""
    shared_machine.policy({"tfgpu.toml": f'on_error = "{on_error}"\n[gpu]\nmemory_growth = true\n'})
    done = shared_machine.run(ROOT, str(broken.python), "-c", PROGRAM)
    assert done.stdout.splitlines() == expected, done.stderr
    assert on_error == "fail" or done.stderr.startswith("tfgpu: tfenv ")


@AS_ROOT
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('on_error = "cpu"', "cpu"),
        ("version = 1\n'on_error' = 'fail' # loud\n[gpu]", "fail"),
        ('\ufeffon_error="fail"', "fail"),
        ('[gpu]\non_error = "fail"', "warn"),
        ('on_error = "soon"', "warn"),
        ("", "warn"),
    ],
)
def test_on_error_is_read_without_a_parser(tmp_path: Path, text: str, expected: str) -> None:
    """It counts where it stands before the first table."""
    path = tmp_path / "tfgpu.toml"
    path.write_text(text, encoding="utf-8")
    assert read_machine_on_error(str(path)) == expected


@AS_ROOT
@pytest.mark.parametrize("kind", ["of a stranger", "writable", "a FIFO", "missing"])
def test_only_a_file_of_roots_counts(tmp_path: Path, kind: str) -> None:
    """A file that others may write, or that is none, says nothing and holds nothing up."""
    path = tmp_path / "tfgpu.toml"
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind != "missing":
        path.write_text('on_error = "fail"')
        path.chmod(0o666 if kind == "writable" else 0o644)
        os.chown(path, 1 if kind == "of a stranger" else 0, 0)
    assert read_machine_on_error(str(path)) == "warn"


@pytest.mark.parametrize(
    ("variables", "log"),
    [
        ({"XDG_STATE_HOME": "{state}"}, "{state}/tfgpu/audit.jsonl"),
        ({"XDG_STATE_HOME": "state"}, "{home}/.local/state/tfgpu/audit.jsonl"),
        ({"XDG_STATE_HOME": "{state}", "SUDO_UID": "0"}, "{home}/.local/state/tfgpu/audit.jsonl"),
    ],
)
def test_the_record_is_in_the_users_state_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], log: str
) -> None:
    """The minimal record goes where others go: into XDG_STATE_HOME, if it is absolute and the user's own."""
    places = {"state": f"{tmp_path}/state", "home": f"{tmp_path}/home"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(**places))
    account = pwd.getpwuid(os.geteuid())
    mine = pwd.struct_passwd((*account[:5], places["home"], account[6]))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: mine)
    emergency.handle(ValueError(f"broken for {variables}"), "tensorflow", "warn")
    assert json.loads(Path(log.format(**places)).read_text())["event"] == "policy_failed"
