"""sample_configs/demo: what `make demo` runs, from end to end and in its parts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SimulatedGpus
from tfenv.deploy import launch

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "sample_configs" / "demo"
SHOWN_LINE = "tfgpu: TensorFlow on GPU 0 of 4 (GPU-a0fa4e00), growth on, at most 2.0 GiB (tfgpu.toml)"
_ROW = re.compile(r"^ +(\d+)  +\S.*?  +[\d.]+ GiB  +([\d.]+ \w+|-)  +([\d.]+ \w+|-) *$", re.MULTILINE)


def armed(**variables: str) -> dict[str, str]:
    """An environment in which the hook is there, also where tfenv is not installed."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("TFGPU_", "CUDA_"))}
    fixed = {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "XDG_CONFIG_HOME": "/nonexistent"}  # no user's own policy
    return launch.build_environment({**ours, **fixed, **variables})


def run_demo(
    *arguments: str, env: dict[str, str], python: str = sys.executable, folder: Path = Path("/")
) -> subprocess.CompletedProcess[str]:
    """Run the demo as the Makefile does, by default from another directory."""
    command = [str(DEMO / "run"), python, *arguments]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False, timeout=250)


def rows(text: str) -> dict[int, tuple[str, str]]:
    """What the table says was taken of each GPU, without and with the policy; "-" for nothing."""
    return {int(number): (without, governed) for number, without, governed in _ROW.findall(text)}


@pytest.mark.tensorflow
@pytest.mark.exhaustive
def test_shows_what_tensorflow_takes_without_and_with_the_policy(tmp_path: Path) -> None:
    """Without the policy all four GPUs are taken, with it a little of the first. The last line shows the records."""
    environment = armed(XDG_STATE_HOME=str(tmp_path))
    done = run_demo("--simulated", "--figures", str(tmp_path / "figures"), env=environment, folder=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(done.stdout)
    assert [without for without, _ in table.values()] == ["22.5 GiB"] * 4
    assert table[0][1].endswith(" MiB")
    assert [governed for _, governed in table.values()][1:] == ["-"] * 3
    assert SHOWN_LINE in done.stdout.splitlines()
    assert done.stderr == ""
    figures = json.loads((tmp_path / "figures").read_text(encoding="utf-8"))
    assert [gpu["without"] / 2**30 for gpu in figures] == [22.5] * 4
    assert [bool(gpu["governed"]) for gpu in figures] == [True, False, False, False]
    records = run_as_typed(done.stdout.splitlines()[-1], environment)
    assert "GPU-a0fa4e00" in records
    assert "2.0 GiB" in records


def run_as_typed(command: str, environment: dict[str, str]) -> str:
    """Return what a command prints in the root of the clone, with nothing of the project on PATH."""
    typed = {**environment, "PATH": "/usr/bin:/bin"}
    shell = ["sh", "-c", command]
    return subprocess.run(shell, env=typed, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


def test_make_demo_installs_only_what_it_needs(tmp_path: Path) -> None:
    """In a fresh clone `make demo` installs tfenv and TensorFlow, without the development group."""
    said = plan(tmp_path / "venv", "demo")
    assert "Installing tfenv and TensorFlow" in said
    assert '--editable ".[' in said
    assert "--group dev" not in said


@pytest.mark.parametrize(("extra", "size"), [("tensorflow", "600 MB"), ("cuda", "3.4 GB with CUDA")])
def test_make_demo_says_how_much_it_downloads(tmp_path: Path, extra: str, size: str) -> None:
    """Before it installs TensorFlow, `make demo` names its size, which is several times as much with CUDA."""
    said = plan(tmp_path / "venv", "demo", f"EXTRA={extra}")
    assert f"TensorFlow is about {size})" in said
    assert f'".[{extra}]"' in said


def test_make_demo_uses_the_environment_of_the_tests(tmp_path: Path) -> None:
    """After `make test` the demo has nothing to install. After `make demo`, `make test` still adds what it needs."""
    (tmp_path / ".installed").touch()
    assert "pip install" not in plan(tmp_path, "demo")
    (tmp_path / ".installed").rename(tmp_path / ".demo")
    assert "pip install" not in plan(tmp_path, "demo")
    assert "--group dev" in plan(tmp_path, "test")


def plan(environment: Path, target: str, *variables: str) -> str:
    """Return the commands that make would run, without running them."""
    command = ["make", "--dry-run", f"VENV={environment}", *variables, target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.tensorflow
@pytest.mark.exhaustive
def test_measures_with_nvml_where_there_is_a_driver(simulated_gpus: SimulatedGpus, tmp_path: Path) -> None:
    """On a machine with GPUs NVML says what the process took; here the driver is the simulated one."""
    outer = simulated_gpus("2x24GiB", log=tmp_path / "log")
    done = run_demo("--real", env=armed(**outer))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 GPU(s) of this machine" in done.stdout
    table = rows(done.stdout)
    assert [without for without, _ in table.values()] == ["22.5 GiB"] * 2
    assert table[0][1].endswith(" MiB")
    assert table[1][1] == "-"


@pytest.mark.tensorflow
@pytest.mark.exhaustive
def test_fails_when_the_policy_is_not_kept(tmp_path: Path) -> None:
    """In an interpreter without the hook TensorFlow takes everything again, and the demonstration says so."""
    environment = {**armed(), "PYTHONPATH": str(ROOT)}  # without the folder of `tfgpu run`
    done = run_demo("--simulated", env=environment, python=unarmed_python(tmp_path / "venv"))
    assert done.returncode == 1
    assert "GPU 0: 22.5 GiB taken, 2.0 GiB allowed." in done.stdout
    assert "4 GPUs used, 1 allowed." in done.stdout


def unarmed_python(folder: Path) -> str:
    """An interpreter that has what ours has, but not the hook: it reads no `.pth` of a folder that a `.pth` names."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (next(folder.glob("lib/python3*/site-packages")) / "borrowed.pth").write_text("\n".join(borrowed))
    return str(folder / "bin" / "python")


def test_leaves_a_gpu_alone_that_others_use(simulated_gpus: SimulatedGpus, tmp_path: Path) -> None:
    """Where somebody computes, a run without policy would take what is left: it is refused on the real GPUs."""
    others = tmp_path / "processes"
    others.write_text("1 4711 9000\n")
    outer = simulated_gpus("2x24GiB", log=tmp_path / "log", processes=others)
    done = run_demo("--real", env=armed(**outer))
    assert done.returncode == 1
    assert "GPU 1 is in use" in done.stdout


def test_says_so_when_there_is_no_gpu(simulated_gpus: SimulatedGpus, tmp_path: Path) -> None:
    """`--real` on a machine without GPUs ends with a sentence, not with a comparison of nothing."""
    empty = {**simulated_gpus("1x24GiB", log=tmp_path / "log"), "TFGPU_SIMULATE": "count=0"}
    done = run_demo("--real", env=armed(**empty))
    assert done.returncode == 1
    assert "This machine shows no GPU" in done.stdout


# ---- judging


PROGRAM = """
import json, sys
sys.path.insert(0, {folder!r})
from compare import Machine, Run, compare
MIB = 1 << 20
machine = Machine("", {{}}, {allowance} * MIB, lambda variables: None)
without, governed = ({{gpu: size * MIB for gpu, size in taken.items()}} for taken in ({without}, {governed}))
print(json.dumps(compare(machine, Run(0, "", without), Run({status}, "said", governed))))
"""


def judged(without: dict[int, int], governed: dict[int, int], *, allowance: int = 0, status: int = 0) -> str:
    """What `compare` says about two runs that took so many MiB of each GPU."""
    names = {"without": without, "governed": governed, "allowance": allowance, "status": status}
    code = PROGRAM.format(folder=str(DEMO), **names)
    done = subprocess.run([sys.executable, "-c", code], env=armed(), capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("governed", "allowance", "said"),
    [
        ({0: 2048}, 0, "[]"),
        ({3: 100}, 0, "[]"),  # which GPU is the first depends on what was granted
        ({0: 2049}, 0, "2.0 GiB allowed"),
        ({0: 2400}, 1024, "[]"),
        ({0: 3500}, 1024, "2.0 GiB allowed"),
        ({0: 1, 2: 1}, 0, "2 GPUs used, 1 allowed"),
        ({}, 0, "nothing to compare"),
    ],
    ids=str,
)
def test_judges_by_the_policy_beside_it(governed: dict[int, int], allowance: int, said: str) -> None:
    """More than the limit, or more GPUs than declared, is a policy that was not kept; nothing at all is no proof."""
    verdict = judged({0: 23040}, governed, allowance=allowance)
    assert verdict == said if said == "[]" else said in verdict


def test_a_run_that_failed_proves_nothing() -> None:
    """When train.py fails, its output is shown instead of a verdict."""
    assert "train.py failed" in judged({0: 1}, {0: 1}, status=1)
