"""`tfgpu doctor`: tells what is wrong where something is, and nothing where nothing is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.cli.conftest import REPOSITORY, Tfgpu
from tfenv.deploy.launch import PYTHONPATH_FOLDER
from tfenv.simulate.environment import build_environment, parse_gpus

QUICK = ("doctor", "--no-tensorflow", "--format", "json")
needs_tensorflow = pytest.mark.skipif(find_spec("tensorflow") is None, reason="no TensorFlow here")


@pytest.fixture(autouse=True)
def policy(project: Path) -> Path:
    """Write a policy whose log is inside of the test."""
    path = project / "tfgpu.toml"
    path.write_text("[gpu]\nmemory_growth = true\n\n[audit]\nfile = 'audit.jsonl'\n")
    return path


@pytest.fixture
def live(variables: dict[str, str]) -> dict[str, str]:
    """Return variables under which the hook is live, whether this interpreter has tfenv installed or not."""
    return {"PYTHONPATH": os.pathsep.join([PYTHONPATH_FOLDER, variables["PYTHONPATH"]])}


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """Return the Python of a fresh virtual environment, which has no tfenv."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    return tmp_path / "venv" / "bin" / "python"


def read_rows(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the rows by topic. Of several on one topic the first problem counts, or else the last row."""
    assert result.stdout, result.stderr
    found = json.loads(result.stdout)["rows"]
    return {row["topic"]: row for row in sorted(found, key=lambda row: row["verdict"] == "problem")}


def find_site_packages(python: Path) -> Path:
    return next((python.parent.parent / "lib").glob("python3*")) / "site-packages"


def install_tfenv(python: Path) -> Path:
    """Put tfenv into a virtual environment as the wheel does. Return its site-packages."""
    folder = find_site_packages(python)
    (folder / "tfenv.pth").write_text((REPOSITORY / "tfenv/deploy/tfenv.pth").read_text())
    (folder / "_tfenv_boot.py").write_text((REPOSITORY / "tfenv/runtime/finder.py").read_text())
    (folder / "tfenv").symlink_to(REPOSITORY / "tfenv")
    return folder


# ---- the hook


def test_a_sites_file_that_is_missing_is_a_problem(tfgpu: Tfgpu, live: dict[str, str]) -> None:
    """The row names the variable and the file."""
    row = read_rows(tfgpu(*QUICK, env=live | {"TFGPU_SITE_CONFIG": "/nowhere/site.toml"}))["policy"]
    assert (row["verdict"], row["found"].startswith("/nowhere/site.toml: TFGPU_SITE_CONFIG names")) == ("problem", True)


def test_the_hook_is_live(tfgpu: Tfgpu, live: dict[str, str]) -> None:
    """Where the hook is armed and complete it is ok, and the interpreter is named. The exit code is 0."""
    result = tfgpu(*QUICK, env=live)
    assert read_rows(result)["hook"]["verdict"] == "ok"
    assert read_rows(result)["hook"]["found"].startswith("active in ")
    assert result.returncode == 0


def diagnose_broken_hook(python: Path, tfgpu: Tfgpu, **env: str) -> Any:
    result = tfgpu(*QUICK, "--python", str(python), env=env)
    assert result.returncode == 1
    row = read_rows(result)["hook"]
    assert row["verdict"] == "problem"
    return row


def write_wrapper(tmp_path: Path, line: str) -> Path:
    """Write a shell script that starts an interpreter in its own way."""
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\n{line} "$@"\n')
    wrapper.chmod(0o755)
    return wrapper


def test_not_installed(tfgpu: Tfgpu, bare_python: Path, tmp_path: Path) -> None:
    """An interpreter without tfenv is a problem, and the two ways out are told. The exit code is 1."""
    row = diagnose_broken_hook(write_wrapper(tmp_path, f"unset PYTHONPATH; exec {bare_python}"), tfgpu)
    assert "tfenv is not installed there" in row["found"]
    assert "pip install tfenv" in row["advice"]
    assert "tfgpu run" in row["advice"]


def test_installed(tfgpu: Tfgpu, bare_python: Path) -> None:
    """An environment with the wheel's three parts and the dependencies is live through its own tfenv.pth."""
    folder = install_tfenv(bare_python)
    (folder / "dependencies.pth").write_text(str(Path(structlog.__file__).parents[1]))
    result = tfgpu(*QUICK, "--python", str(bare_python))
    row = read_rows(result)["hook"]
    assert (row["verdict"], row["found"].startswith("active in ")) == ("ok", True)
    assert str(bare_python) in row["found"]


def test_installed_without_pth(tfgpu: Tfgpu, bare_python: Path) -> None:
    """tfenv.pth is gone: that is what is told."""
    (install_tfenv(bare_python) / "tfenv.pth").unlink()
    assert "tfenv.pth is missing" in diagnose_broken_hook(bare_python, tfgpu)["found"]


def test_installed_without_boot_module(tfgpu: Tfgpu, bare_python: Path) -> None:
    """_tfenv_boot.py is gone: that is what is told."""
    (install_tfenv(bare_python) / "_tfenv_boot.py").unlink()
    assert "_tfenv_boot.py beside it is missing" in diagnose_broken_hook(bare_python, tfgpu)["found"]


def test_dependencies_missing(tfgpu: Tfgpu, bare_python: Path) -> None:
    """An environment with tfenv and without its dependencies is armed and cannot work: they are named."""
    install_tfenv(bare_python)
    result = tfgpu(*QUICK, "--python", str(bare_python))
    assert result.returncode == 1
    assert "structlog" in read_rows(result)["dependencies"]["found"]


def test_a_broken_package(tfgpu: Tfgpu, bare_python: Path, tmp_path: Path) -> None:
    """A tfenv that cannot be imported is told, with the reason."""
    package = install_tfenv(bare_python) / "tfenv"
    package.unlink()  # a link to ours
    (package / "runtime").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "runtime" / "import_hook.py").write_text("raise RuntimeError('half gone')")
    wrapper = write_wrapper(tmp_path, f"exec {bare_python}")
    assert "RuntimeError: half gone" in diagnose_broken_hook(wrapper, tfgpu)["found"]


def test_without_site(tfgpu: Tfgpu, tmp_path: Path, live: dict[str, str]) -> None:
    """An interpreter that is started with -S is told to be."""
    assert "(-S)" in diagnose_broken_hook(write_wrapper(tmp_path, f"exec {sys.executable} -S"), tfgpu, **live)["found"]


def test_a_shadowing_sitecustomize(tfgpu: Tfgpu, tmp_path: Path, bare_python: Path, variables: dict[str, str]) -> None:
    """A sitecustomize in front of ours is named."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("")
    path = os.pathsep.join([str(tmp_path / "site"), PYTHONPATH_FOLDER, variables["PYTHONPATH"]])
    row = diagnose_broken_hook(bare_python, tfgpu, PYTHONPATH=path)
    assert f"{tmp_path}/site/sitecustomize.py shadows" in row["found"]
    assert PYTHONPATH_FOLDER in row["advice"]


def test_a_shadowed_system_wide_hook(tfgpu: Tfgpu, tmp_path: Path, bare_python: Path) -> None:
    """A sitecustomize in front of the one that `install --system` wrote is named, and so is that one."""
    for name, text in (("front", ""), ("system", "# >>> tfenv >>>\n# <<< tfenv <<<\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sitecustomize.py").write_text(text)
    row = diagnose_broken_hook(bare_python, tfgpu, PYTHONPATH=f"{tmp_path}/front:{tmp_path}/system:{REPOSITORY}")
    front, system = (tmp_path / name / "sitecustomize.py" for name in ("front", "system"))
    assert f"{front} shadows {system}, which `tfgpu install --system` wrote to" in row["found"]


def test_another_tfenv_in_front(tfgpu: Tfgpu, live: dict[str, str], tmp_path: Path) -> None:
    """Where two tfenv are on the path, both are named: which is used, and which is not."""
    (tmp_path / "other" / "tfenv").mkdir(parents=True)
    (tmp_path / "other" / "tfenv" / "__init__.py").write_text("")
    result = tfgpu(*QUICK, env=live | {"PYTHONPATH": f"{live['PYTHONPATH']}:{tmp_path}/other"})
    (row,) = [row for row in json.loads(result.stdout)["rows"] if row["verdict"] == "note" and row["topic"] == "hook"]
    assert f"the tfenv in {REPOSITORY}/tfenv shadows the one in {tmp_path}/other/tfenv" in row["found"]


def test_no_such_interpreter(tfgpu: Tfgpu) -> None:
    """--python that is none is wrong usage."""
    assert tfgpu("doctor", "--python", "/nowhere/python").returncode == 2
    assert tfgpu("doctor", "--python", "/bin/true").returncode == 2


# ---- policy and log


def test_findings_in_files(tfgpu: Tfgpu, live: dict[str, str], policy: Path) -> None:
    """A mistake in a file is a problem. Its code is there to look up."""
    policy.write_text("[gpu]\nmemory_growth = 3\n")
    result = tfgpu(*QUICK, env=live)
    assert result.returncode == 1
    found = read_rows(result)["policy"]["found"]
    assert "gpu.memory_growth" in found
    assert found.endswith(" [invalid-value]")


def test_the_log_is_writable(tfgpu: Tfgpu, live: dict[str, str], project: Path) -> None:
    """A log that takes records is ok. Trying it writes nothing into it."""
    record = '{"timestamp":"2026-01-02T03:04:05.000000Z"}\n'
    (project / "audit.jsonl").write_text(record)
    result = tfgpu(*QUICK, env=live)
    assert read_rows(result)["audit log"]["verdict"] == "ok"
    assert (project / "audit.jsonl").read_text() == record


def test_the_log_is_refused(tfgpu: Tfgpu, live: dict[str, str], project: Path) -> None:
    """A log that will be refused is a problem, with the reason."""
    (project / "audit.jsonl").symlink_to("elsewhere.jsonl")
    result = tfgpu(*QUICK, env=live)
    assert result.returncode == 1
    assert "symbolic link" in read_rows(result)["audit log"]["found"]


# ---- GPUs


def test_gpus_and_who_uses_them(tfgpu: Tfgpu, live: dict[str, str], tmp_path: Path) -> None:
    """The driver's GPUs are counted by model, and every process on them is told with user, pid and memory."""
    held = tmp_path / "processes"
    held.write_text(f"1 {os.getpid()} 5120\n")
    gpus = build_environment(parse_gpus("2x24GiB:NVIDIA A10,80GiB:NVIDIA A100"), processes=held, base={})
    result = tfgpu(*QUICK, env=live | gpus)
    assert read_rows(result)["GPUs"]["found"] == "2 x NVIDIA A10 24.0 GiB, 1 x NVIDIA A100 80.0 GiB"
    (process,) = json.loads(result.stdout)["processes"]
    assert (process["gpu"], process["pid"], process["memory"]) == (1, os.getpid(), 5120 << 20)
    assert process["user"]
    text = tfgpu("doctor", "--no-tensorflow", env=live | gpus).stdout
    assert "Who uses which GPU" in text
    assert "5.0 GiB" in text


def test_a_card_that_is_lost(tfgpu: Tfgpu, live: dict[str, str]) -> None:
    """A card that does not answer is a problem. The driver and the other cards are shown all the same."""
    gpus = build_environment(parse_gpus("2x24GiB:NVIDIA A10"), base={})
    gpus["TFGPU_SIMULATE"] += ",error=0:15"
    result = tfgpu(*QUICK, env=live | gpus)
    found = [(row["topic"], row["verdict"], row["found"]) for row in json.loads(result.stdout)["rows"]]
    assert ("driver", "ok", "580.00.00, CUDA up to 13.0") in found
    assert ("GPUs", "ok", "1 x NVIDIA A10 24.0 GiB") in found
    assert any(verdict == "problem" and "GPU 1 does not answer" in text for _, verdict, text in found)
    assert result.returncode == 1


def test_drivers_that_tell_less(tfgpu: Tfgpu, live: dict[str, str], tmp_path: Path) -> None:
    """A driver that tells neither sizes nor processes, as under WSL2, is no problem, and what follows is told."""
    gpus = build_environment(parse_gpus("1x24GiB"), base={})
    gpus["TFGPU_SIMULATE"] += ",memory_error=3,processes_error=3"
    found = " ".join(
        f"{row['found']} {row['advice']}" for row in json.loads(tfgpu(*QUICK, env=live | gpus).stdout)["rows"]
    )
    assert "cannot tell how much memory they have" in found
    assert "cannot tell who uses GPU 0" in found
    assert "write limits as sizes" in found


@needs_tensorflow
@pytest.mark.tensorflow
def test_what_tensorflow_sees(tfgpu: Tfgpu, live: dict[str, str], policy: Path) -> None:
    """All devices, the default one and Keras as the policy leaves them, and a driver too old for this TensorFlow."""
    policy.write_text(f"{policy.read_text()}\n[ceiling]\nallowed_devices = [2, 3]\n")
    gpus = build_environment(parse_gpus("4x24GiB"), base={})
    gpus["TFGPU_SIMULATE"] = f"driver=11040,release=470.57.02,{gpus['TFGPU_SIMULATE']}"
    result = tfgpu("doctor", "--format", "json", env=live | gpus)
    seen = read_rows(result)
    assert seen["TensorFlow"]["verdict"] == "ok"
    assert "lists 2 GPUs, built for CUDA" in seen["TensorFlow"]["found"]
    gpu = "Simulated GPU (compute capability 8.0)"
    assert seen["devices"]["found"] == f"CPU:0, GPU:0 {gpu}, GPU:1 {gpu}"
    assert seen["default device"]["found"] == "GPU:0 Simulated GPU"
    assert seen["Keras"]["found"].endswith(" runs on TensorFlow, which has 2 GPUs")
    assert "MirroredStrategy" in seen["several GPUs"]["advice"]
    too_old = [row for row in json.loads(result.stdout)["rows"] if "too old for TensorFlow" in row["found"]]
    assert [(row["topic"], row["verdict"]) for row in too_old] == [("driver", "problem")]
    assert "470.57.02, CUDA up to 11.4: " in too_old[0]["found"]
    assert "driver 525 or newer" in too_old[0]["advice"]


@needs_tensorflow
@pytest.mark.tensorflow
def test_busy_gpus_are_not_waited_for(tfgpu: Tfgpu, live: dict[str, str], policy: Path, tmp_path: Path) -> None:
    """Where a policy would wait for a free GPU the doctor does not: it tells how many a program would get."""
    policy.write_text(f"{policy.read_text()}\n[gpu.visible_devices]\ncount = 1\n")
    held = tmp_path / "held"
    held.write_text(f"0 {os.getpid()} 24000\n1 {os.getpid()} 24000\n")
    gpus = build_environment(parse_gpus("2x24GiB"), processes=held, log=tmp_path / "requests", base={})
    seen = read_rows(tfgpu("doctor", "--format", "json", env=live | gpus))
    assert seen["TensorFlow"]["verdict"] == "ok"
    assert "lists 1 GPU," in seen["TensorFlow"]["found"]


@needs_tensorflow
@pytest.mark.tensorflow
def test_missing_libraries_are_named(tfgpu: Tfgpu, live: dict[str, str], tmp_path: Path) -> None:
    """Where TensorFlow lists fewer GPUs than the driver has, the libraries it did not find are named."""
    gpus = build_environment(parse_gpus("2x24GiB"), base={})
    folder = tmp_path / "lib"
    folder.mkdir()
    for library in Path(gpus["LD_LIBRARY_PATH"]).iterdir():
        if "cudnn" not in library.name:
            (folder / library.name).symlink_to(library)
    result = tfgpu("doctor", "--format", "json", env=live | gpus | {"LD_LIBRARY_PATH": str(folder), "LD_PRELOAD": ""})
    row = read_rows(result)["TensorFlow"]
    assert (result.returncode, row["verdict"]) == (1, "problem")
    assert "lists 0 GPUs" in row["found"]
    assert "2 should be visible; not found: libcudnn.so" in row["found"]


def test_uncompiled_packages_are_told(tfgpu: Tfgpu, live: dict[str, str], project: Path) -> None:
    """A TensorFlow and a Keras without bytecode are told, with the command that compiles them."""
    for name in ("tensorflow", "keras"):
        (project / name).mkdir()
        (project / name / "__init__.py").write_text("")
    path = os.pathsep.join(filter(None, (str(project), live.get("PYTHONPATH"))))
    row = read_rows(tfgpu(*QUICK, env=live | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": path}))["bytecode"]
    assert "PYTHONDONTWRITEBYTECODE" in row["found"]
    assert "not compiled: tensorflow, keras" in row["found"]
    assert "compileall -q tensorflow keras" in row["advice"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to somebody else")
def test_a_directory_of_leases_that_a_user_owns(tfgpu: Tfgpu, live: dict[str, str], tmp_path: Path) -> None:
    """Whoever owns it can remove everybody's leases: doctor names the owner and what helps."""
    gpus = build_environment(parse_gpus("1x24GiB"), log=str(tmp_path / "log"), base={})
    folder = tmp_path / "log.leases"
    folder.mkdir()
    folder.chmod(0o1777)
    assert "leases" not in read_rows(tfgpu(*QUICK, env=live | gpus))
    os.chown(folder, 65534, -1)
    row = read_rows(tfgpu(*QUICK, env=live | gpus))["leases"]
    assert row["verdict"] == "note"
    assert f"{folder} belongs to" in row["found"]
    assert "/run/lock/tfgpu" in row["advice"]


@pytest.mark.parametrize("active", ["VIRTUAL_ENV", "CONDA_PREFIX", None])
def test_the_active_environment_is_examined(active: str | None, bare_python: Path, tmp_path: Path) -> None:
    """A `tfgpu` in /usr/local/bin examines the Python that people mean, and not tfenv's own environment."""
    command = tmp_path / "bin" / "tfgpu"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nimport sys\nfrom tfenv.cli.main import main\nsys.exit(main())\n")
    command.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    folder = bare_python.parent
    env |= {"PYTHONPATH": str(REPOSITORY)} | ({active: str(folder.parent)} if active else {})
    if active is None:
        if not (folder / "python3").exists():
            (folder / "python3").symlink_to(bare_python)
        env["PATH"] = f"{folder}:{env['PATH']}"
    done = subprocess.run([command, *QUICK], env=env, cwd="/", capture_output=True, text=True, check=False)
    assert str(bare_python) in read_rows(done)["hook"]["found"]


def test_a_policy_that_only_observes_is_all_right(tfgpu: Tfgpu, live: dict[str, str], policy: Path) -> None:
    """Nothing is missing in a file that tries limits. A table that has ended is worth a look."""
    policy.unlink()
    site = policy.with_name("site.toml")
    observed = '[audit]\nfile = "none"\n[observe.ceiling]\nmemory_limit = "8GiB"\n'
    site.write_text(observed)
    row = read_rows(tfgpu(*QUICK, env=live | {"TFGPU_SITE_CONFIG": str(site)}))["policy"]
    assert (row["verdict"], row["found"].partition(": ")[2]) == ("ok", "nothing in force, only tables to observe")
    site.write_text(f"{observed}[user.root]\nexpires = 2026-01-31\n")
    row = read_rows(tfgpu(*QUICK, env=live | {"TFGPU_SITE_CONFIG": str(site)}))["policy"]
    assert row["verdict"] == "note"
    assert row["found"].endswith("so this table does not count; remove it, or write a later day [expired]")
