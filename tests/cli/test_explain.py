"""`tfgpu explain`: each value with the one who set it, and what follows on this machine."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tfenv.simulate.environment import environment, parse_gpus

Tfgpu = Callable[..., subprocess.CompletedProcess[str]]

USER = '[gpu]\nmemory_limit = "20GiB"\n\n[ceiling]\nrequire_memory_growth = true\nmemory_limit = "50%"\n'
PROJECT = '[gpu]\nvisible_devices = [1, 2]\nmemory_limit = "16GiB"\nmemory_growth = false\n'


@pytest.fixture
def layers(project: Path, tmp_path: Path) -> Path:
    """A user's file and a project's; returns the user's."""
    (project / "tfgpu.toml").write_text(PROJECT)
    user = tmp_path / "config" / "tfgpu" / "tfgpu.toml"
    user.parent.mkdir(parents=True)
    user.write_text(USER)
    return user


@pytest.fixture(scope="module")
def four_gpus() -> dict[str, str]:
    """Variables that show four GPUs to NVML; the last is another model."""
    made = environment(parse_gpus("3x24GiB:NVIDIA A10,1x80GiB:NVIDIA A100"), base={})
    assert "count=4" in made["TFGPU_SIMULATE"]
    return made


def as_json(result: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(result.stdout)


def test_each_value_has_its_origin(layers: Path, tfgpu: Tfgpu) -> None:
    """A value is shown as written, with file:line; so are the values it overrode."""
    lines = [" ".join(line.split()) for line in tfgpu("explain").stdout.splitlines()]
    chosen = lines.index('memory_limit = "16GiB" tfgpu.toml:3')
    assert lines[chosen + 1] == f'overrides "20GiB" {layers}:2'
    assert f"require_memory_growth = true {layers}:5" in lines


def test_a_table_for_one_user_overrides(project: Path, tfgpu: Tfgpu) -> None:
    """Inside one file the more specific table wins; what it replaced is told, and which table it is."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    text = f'[user.{user}.gpu]\nmemory_limit = "2GiB"\n\n[gpu]\nmemory_limit = "1GiB"\n'
    (project / "tfgpu.toml").write_text(text + '\n[user.somebody-else.gpu]\nmemory_limit = "3GiB"\n')
    lines = [" ".join(line.split()) for line in tfgpu("explain").stdout.splitlines()]
    chosen = lines.index(f'memory_limit = "2GiB" tfgpu.toml:2 [user.{user}.gpu]')
    assert lines[chosen + 1] == 'overrides "1GiB" tfgpu.toml:5'
    assert not any("3GiB" in line for line in lines)


def test_what_clamped_it(layers: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """Below a value that a ceiling changed stands which ceiling did."""
    result = tfgpu("explain", env=four_gpus)
    assert f"clamped: 16.0 GiB is above the ceiling of 50% from {layers} (ceiling.memory_limit)" in result.stdout
    assert "clamped: growth stays on: required by" in result.stdout
    assert result.returncode == 0


def test_the_plan_names_the_cards(layers: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """With NVML the plan has each GPU's number, name, UUID and limit in bytes; a clamp is no finding."""
    plan = as_json(tfgpu("explain", "--format", "json", env=four_gpus))["plan"]
    assert (plan["cuda_visible_devices"], plan["growth"], plan["allocator"]) == ("1,2", True, "bfc")
    assert [(device["index"], device["name"]) for device in plan["devices"]] == [(1, "NVIDIA A10"), (2, "NVIDIA A10")]
    assert all(device["uuid"].startswith("GPU-") for device in plan["devices"])
    assert [device["limit_fraction"] for device in plan["devices"]] == [0.5, 0.5]


def test_rows_are_whole_in_a_pipe(layers: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """In a pipe a row of the table is one line with the whole UUID, for grep."""
    shown = tfgpu("explain", env=four_gpus).stdout
    uuids = [
        device["uuid"] for device in as_json(tfgpu("explain", "--format", "json", env=four_gpus))["plan"]["devices"]
    ]
    rows = [line.split() for line in shown.splitlines() if line.startswith("  GPU:")]
    assert [row[-1] for row in rows] == uuids
    assert "12.0 GiB (50%)" in shown


def test_without_a_gpu(layers: Path, tfgpu: Tfgpu) -> None:
    """Without a driver the plan is there all the same, and why nothing is known of the cards is said."""
    result = tfgpu("explain")
    if "What cards these are is unknown" not in result.stdout:
        pytest.skip("this machine has GPUs")
    assert "CUDA_VISIBLE_DEVICES  1,2" in result.stdout


def test_the_grant_of_this_environment(layers: Path, tfgpu: Tfgpu, four_gpus: dict[str, str]) -> None:
    """Positions count within what was granted here: [1, 2] of "3,2,0" are the cards 2 and 0."""
    granted = four_gpus | {"CUDA_VISIBLE_DEVICES": "3,2,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    told = as_json(tfgpu("explain", "--format", "json", env=granted))
    assert told["grant"]["tokens"] == ["3", "2", "0"]
    assert told["plan"]["cuda_visible_devices"] == "2,0"


def test_where_files_were_looked_for(project: Path, tfgpu: Tfgpu, tmp_path: Path) -> None:
    """Without any file each layer says where one was looked for, and that TensorFlow is left as it is."""
    result = tfgpu("explain")
    assert result.returncode == 0
    rows = [line.split()[:3] for line in result.stdout.splitlines() if line.startswith(("  user", "  project"))]
    assert rows == [["user", str(tmp_path / "config/tfgpu/tfgpu.toml"), "-"], ["project", str(project), "-"]]
    assert "TensorFlow is left as it is" in result.stdout


def test_a_dropped_file_says_why(project: Path, tfgpu: Tfgpu) -> None:
    """A file that does not count is shown as dropped, with the reason, and the exit code is 1."""
    path = project / "tfgpu.toml"
    path.write_text(PROJECT)
    path.chmod(0o666)
    told = tfgpu("explain", "--format", "json")
    assert told.returncode == 1
    seen = [file for file in as_json(told)["files"] if file["state"] == "dropped"]
    assert [file["path"] for file in seen] == [str(path)]
    assert "writable by everybody" in seen[0]["why"]
    assert "dropped" in tfgpu("explain").stdout


def test_another_directory(layers: Path, project: Path, tfgpu: Tfgpu) -> None:
    """--project tells of a program that starts elsewhere; one that is no directory is wrong usage."""
    other = project / "other"
    other.mkdir()
    (other / "tfgpu.toml").write_text("[gpu]\nvisible_devices = 'none'\n")
    told = as_json(tfgpu("explain", "--project", "other", "--format", "json"))
    assert told["settings"]["visible_devices"]["path"] == str(other / "tfgpu.toml")
    assert told["plan"]["devices"] == []
    assert tfgpu("explain", "--project", "nowhere").returncode == 2


def test_run_options_are_a_layer(layers: Path, tfgpu: Tfgpu) -> None:
    """Options of `tfgpu run` around it are shown as what they are: the nearest layer."""
    told = as_json(tfgpu("explain", "--format", "json", env={"TFGPU_RUN": 'gpu = {memory_limit = "1GiB"}'}))
    limit = told["settings"]["memory_limit"]
    assert (limit["value"], limit["layer"], limit["path"]) == ("1GiB", "run", "<tfgpu run>")
    assert [lost["value"] for lost in limit["overrides"]] == ["16GiB", "20GiB"]


def test_disabled(layers: Path, tfgpu: Tfgpu) -> None:
    """TFGPU_DISABLE is told: the policy is read, and nothing follows."""
    result = tfgpu("explain", env={"TFGPU_DISABLE": "1"})
    assert "TFGPU_DISABLE switches the policy off" in result.stdout


def test_it_needs_no_tensorflow(layers: Path, project: Path, variables: dict[str, str]) -> None:
    """Explaining imports no TensorFlow and leaves the environment alone."""
    program = "import os, sys, tfenv; before = dict(os.environ); tfenv.explain(); "
    program += "print('tensorflow' in sys.modules, before == dict(os.environ))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=project, env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False True\n"


@pytest.mark.parametrize(("on_error", "devices", "refused"), [("warn", 4, False), ("cpu", 0, False), ("fail", 4, True)])
def test_what_follows_from_an_error(
    project: Path, tfgpu: Tfgpu, four_gpus: dict[str, str], on_error: str, devices: int, refused: bool
) -> None:
    """A wish that no GPU meets is a finding, and what follows is what `on_error` says."""
    (project / "tfgpu.toml").write_text(f"on_error = '{on_error}'\n[gpu]\nvisible_devices = [7]\n")
    result = tfgpu("explain", "--format", "json", env=four_gpus)
    told = as_json(result)
    assert result.returncode == 1
    assert [(finding["code"], finding["line"]) for finding in told["findings"]] == [("no-overlap", 3)]
    assert (len(told["plan"]["devices"]), told["refused"]) == (devices, refused)
    shown = tfgpu("explain", env=four_gpus).stdout
    assert ("raises PolicyError" in shown) is refused


def test_an_automatic_choice_is_shown_and_takes_nothing(project: Path, tfgpu: Tfgpu, tmp_path: Path) -> None:
    """Which GPU would be chosen now, of which; without a lease, so that asking twice gives the same."""
    (project / "tfgpu.toml").write_text("[gpu]\nvisible_devices = {count = 1}\n")
    others = tmp_path / "others"
    others.write_text("0 4190001 9000\n")
    variables = environment(parse_gpus("3x24GiB"), log=tmp_path / "log", processes=others, base={})
    for _ in range(2):
        lines = [" ".join(line.split()) for line in tfgpu("explain", env=variables).stdout.splitlines()]
        assert "chosen 1 of them, when devices are first listed; now it would be 1" in lines
    explained = as_json(tfgpu("explain", "--format", "json", env=variables))
    assert explained["choosing"] == {"count": 1, "when_busy": "wait", "now": ["1"], "scene": ""}
    assert not (tmp_path / "log.leases").exists()
    others.write_text("0 4190001 9000\n1 4190001 9000\n2 4190001 9000\n")
    said = tfgpu("explain", env=variables).stdout
    assert "now the program would wait (GPU 0: 8.8 GiB used without a lease; GPU 1:" in said
