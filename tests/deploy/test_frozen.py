"""Programs that PyInstaller froze: with tfenv they apply the policy, without it `tfgpu run` says what is not kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tfenv.deploy import pyinstaller
from tfenv.deploy.frozen import is_frozen_without_tfenv
from tfenv.simulate.driver_requests import read_requests, summarise_requests
from tfenv.simulate.environment import build_environment, parse_gpus

pytest.importorskip("PyInstaller", reason="PyInstaller is not installed here")

POLICY = """
[gpu]
visible_devices = [1]
memory_limit = "2GiB"
[audit]
file = "audit.jsonl"
"""
PRINT_VARIABLES = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
PRINT_STATUS = "import tfenv; status = tfenv.apply(); print(status.armed, [str(f) for f in status.findings])"

Freeze = Callable[..., Path]
#: What others than tfenv would bring, half a minute of work.
NEEDLESS = ("IPython", "pytest", "rich", "tkinter", "yaml")


def _clean() -> dict[str, str]:
    ours = ("TFGPU_", "CUDA_", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


@pytest.fixture
def freeze(tmp_path: Path) -> Freeze:
    """Freezes the text of a program, in a folder of its own, and returns the executable."""

    def run(text: str, *options: str) -> Path:
        (tmp_path / "program.py").write_text(text, encoding="utf-8")
        # An installed tfenv names this folder by its entry point.
        own = ["--additional-hooks-dir", *pyinstaller.get_hook_dirs()]
        own += [f"--exclude-module={name}" for name in NEEDLESS]
        subprocess.run(
            [sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level", "ERROR", *own, *options, "program.py"],
            cwd=tmp_path,
            env=_clean() | {"PYTHONPATH": str(REPOSITORY), "PYINSTALLER_CONFIG_DIR": str(tmp_path / "cache")},
            check=True,
            timeout=800,
        )
        return tmp_path / "dist" / "program" / "program"

    return run


def _run(command: list[str], cwd: Path, gpus: str = "4x24GiB") -> subprocess.CompletedProcess[str]:
    env = build_environment(parse_gpus(gpus), log=str(cwd / "requests"), base=_clean() | {"TF_CPP_MIN_LOG_LEVEL": "3"})
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=120)


def _run_governed(program: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tfenv", "run", *options, "--", str(program)]
    return _run(command, program.parents[2])


def test_run_holds_what_a_variable_can_hold(freeze: Freeze) -> None:
    """A program frozen without tfenv sees the GPU of the policy. What is not kept is said once, and recorded."""
    program = freeze(PRINT_VARIABLES)
    assert is_frozen_without_tfenv(str(program))
    assert _run_governed(program).stdout == "None\n"
    ended = _run_governed(program, "--gpus", "1", "--memory-limit", "500MiB")
    assert ended.stdout == "1\n"
    assert ended.stderr.count("cannot limit memory") == 1
    assert "(frozen without tfenv) on GPU 1 " in ended.stderr

    (program.parents[2] / "tfgpu.toml").write_text(POLICY, encoding="utf-8")
    assert _run_governed(program).stdout == "1\n"
    records = [json.loads(line) for line in (program.parents[2] / "audit.jsonl").read_text().splitlines()]
    assert [record["event"] for record in records] == ["policy_failed", "policy_applied"]
    assert records[0]["findings"][0]["code"] == "unsupported"

    ceiling = POLICY.replace("[gpu]\nvisible_devices = [1]\n", "[ceiling]\nallowed_devices = [1]\n")
    (program.parents[2] / "tfgpu.toml").write_text(ceiling, encoding="utf-8")
    assert _run_governed(program, "--gpus", "1,3").stdout == "1\n"
    *_, last = [json.loads(line) for line in (program.parents[2] / "audit.jsonl").read_text().splitlines()]
    assert (last["event"], last["cut"]) == ("policy_clamped", ["visible_devices"])
    assert [finding["asked"] for finding in last["findings"] if "asked" in finding] == ["visible_devices = 1, 3"]

    (program.parents[2] / "tfgpu.toml").write_text(f'on_error = "cpu"\n{POLICY}', encoding="utf-8")
    assert _run_governed(program).stdout == "-1\n"
    (program.parents[2] / "tfgpu.toml").write_text(f'on_error = "fail"\n{POLICY}', encoding="utf-8")
    refused = _run_governed(program)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "cannot limit memory" in refused.stderr
    (program.parents[2] / "tfgpu.toml").write_text("[gpu]\nvisible_devices = {count = 1}\n", encoding="utf-8")
    chosen = _run_governed(program)
    assert chosen.stdout == "0\n"
    assert "gets the first GPU, because tfenv cannot choose a free one for it" in chosen.stderr


def test_a_program_frozen_with_tfenv_is_armed(freeze: Freeze) -> None:
    """The hook for PyInstaller brings all that tfenv imports by name. `tfgpu run` leaves such a program to itself."""
    program = freeze(PRINT_STATUS)
    assert _run([str(program)], program.parents[2]).stdout == "True []\n"
    assert not is_frozen_without_tfenv(str(program))


@pytest.mark.exhaustive
def test_a_program_that_lacks_parts_of_tfenv_says_so(freeze: Freeze) -> None:
    """Whoever left a module out is told which. The program goes on."""
    program = freeze(PRINT_STATUS, "--exclude-module", "tfenv.runtime.import_hook")
    ended = _run([str(program)], program.parents[2])
    assert ended.returncode == 0
    assert ended.stdout.startswith('False ["tfenv failed at import tfenv: ModuleNotFoundError: No module named')
    assert "no policy is applied" in ended.stderr


@pytest.mark.parametrize("kind", ["python", "text", "missing"])
def test_other_programs_are_not_taken_for_frozen(kind: str, tmp_path: Path) -> None:
    """An interpreter, a script and a file that is not there are other programs."""
    text = tmp_path / "script"
    text.write_bytes(b"#!/bin/sh\nMEI\x0c\x0b\x0a\x0b\x0e")
    paths = {"python": sys.executable, "text": str(text), "missing": str(tmp_path / "none")}
    assert not is_frozen_without_tfenv(paths[kind])


@pytest.mark.exhaustive
@pytest.mark.tensorflow
@pytest.mark.timeout(900)
def test_frozen_tensorflow_keeps_the_limit(freeze: Freeze) -> None:
    """A program that names tfenv nowhere, frozen with `--hidden-import tfenv`, keeps the policy of the project."""
    program = freeze("import tensorflow as tf\ntf.zeros([1])\n", "--hidden-import", "tfenv")
    (program.parents[2] / "tfgpu.toml").write_text(POLICY, encoding="utf-8")
    ended = _run([str(program)], program.parents[2])
    assert ended.returncode == 0, ended.stderr
    totals = summarise_requests(read_requests(program.parents[2] / "requests"))
    assert {gpu: total.peak_process for gpu, total in totals.items()} == {1: 2 << 30}
    shutil.rmtree(program.parents[1])
