"""`tfgpu run`: the command becomes what it would be without us, but for the policy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tomli

from tests.cli.conftest import Tfgpu

PRINT_POLICY = [sys.executable, "-c", "import os; print(os.environ.get('TFGPU_RUN'))"]
HOOK = "import sys; print([getattr(finder, '__name__', '') for finder in sys.meta_path].count('TfenvFinder'))"


def test_options_become_a_policy(tfgpu: Tfgpu) -> None:
    """All options together arrive as one policy in TFGPU_RUN."""
    options = ["--gpus", "1,GPU-8932f937", "--memory-limit", "4GiB", "--no-growth"]
    result = tfgpu("run", *options, "--", *PRINT_POLICY)
    assert tomli.loads(result.stdout) == {
        "gpu": {"visible_devices": [1, "GPU-8932f937"], "memory_limit": "4GiB", "memory_growth": False}
    }


@pytest.mark.parametrize(
    ("written", "meant"),
    [("all", "all"), ("none", "none"), ("0", [0]), ("name:*A100*", ["name:*A100*"]), (" 0, 2 ", [0, 2])],
)
def test_forms_of_gpus(tfgpu: Tfgpu, written: str, meant: object) -> None:
    """--gpus takes words, positions, UUIDs and names."""
    result = tfgpu("run", "--gpus", written, "--", *PRINT_POLICY)
    assert tomli.loads(result.stdout)["gpu"]["visible_devices"] == meant


def test_the_limit_may_be_the_launchers_share(tfgpu: Tfgpu) -> None:
    """--memory-limit granted is the share of whoever starts the command."""
    command = ("run", "--memory-limit", "granted", "--", sys.executable, "-m", "tfenv", "explain", "--format", "json")
    plan = json.loads(tfgpu(*command, env={"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30"}).stdout)["plan"]
    assert (plan["limit_fraction"], plan["share"]["giver"]) == (0.3, "MPS")


def test_the_options_hold_without_any_file(tfgpu: Tfgpu) -> None:
    """What runs inside is under the options: `explain` in it names them as the origin."""
    result = tfgpu(
        "run", "--memory-limit", "4GiB", "--growth", "--", sys.executable, "-m", "tfenv", "explain", "--format", "json"
    )
    told = json.loads(result.stdout)
    assert {name: setting["layer"] for name, setting in told["settings"].items()} == {
        "memory_limit": "run",
        "memory_growth": "run",
    }
    assert told["plan"]["limit_bytes"] == 4 << 30


def test_without_options_the_files_hold(tfgpu: Tfgpu) -> None:
    """Without options no policy is added."""
    assert tfgpu("run", "--", *PRINT_POLICY).stdout == "None\n"


def test_a_run_inside_a_run(tfgpu: Tfgpu) -> None:
    """Options of the outer one hold where the inner one says nothing."""
    inner = [sys.executable, "-m", "tfenv", "run", "--gpus", "1", "--", *PRINT_POLICY]
    result = tfgpu("run", "--gpus", "0", "--memory-limit", "4GiB", "--", *inner)
    assert tomli.loads(result.stdout) == {"gpu": {"visible_devices": [1], "memory_limit": "4GiB"}}


def test_config(project: Path, tfgpu: Tfgpu) -> None:
    """--config becomes TFGPU_CONFIG, as an absolute path."""
    (project / "other.toml").write_text("[gpu]\nmemory_growth = true\n")
    program = [sys.executable, "-c", "import os; print(os.environ['TFGPU_CONFIG'])"]
    assert tfgpu("run", "--config", "other.toml", "--", *program).stdout == f"{project / 'other.toml'}\n"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--memory-limit", "4gigs"], "write 4GiB"),
        (["--memory-limit", "0GiB"], "less than 1 MiB"),
        (["--gpus", "-1"], 'visible_devices = "none"'),
        (["--gpus", ""], "is not a GPU"),
        (["--gpus", "0,,1"], "is not a GPU"),
        (["--config", "nowhere.toml"], "nowhere.toml does not exist"),
        (["--memory", "4GiB"], "unrecognized arguments: --memory"),
    ],
)
def test_bad_options_start_nothing(project: Path, tfgpu: Tfgpu, options: list[str], reason: str) -> None:
    """A bad option is told clearly, ends with 2, and the command never starts."""
    result = tfgpu("run", *options, "--", "touch", "started")
    assert result.returncode == 2
    assert reason in result.stderr
    assert not (project / "started").exists()


def test_no_command(tfgpu: Tfgpu) -> None:
    """Without a command it is wrong usage."""
    assert tfgpu("run", "--gpus", "0").returncode == 2
    assert tfgpu("run", "--gpus", "0", "--").returncode == 2


def test_the_arguments_are_the_commands_own(tfgpu: Tfgpu) -> None:
    """Everything behind the command's name goes to it unchanged, options of ours and a further "--", too."""
    program = [sys.executable, "-c", "import sys; print(sys.argv[1:])"]
    for command in (["--", *program], program):
        result = tfgpu("run", *command, "--gpus", "x", "--", "--help", "")
        assert result.stdout == "['--gpus', 'x', '--', '--help', '']\n"


def test_the_exit_code_is_the_commands_own(tfgpu: Tfgpu) -> None:
    """Its exit code, or the signal that ended it, is what the caller sees."""
    assert tfgpu("run", "--", "sh", "-c", "exit 7").returncode == 7
    assert tfgpu("run", "--", "sh", "-c", "kill -TERM $$").returncode == -signal.SIGTERM


def test_it_becomes_the_command(project: Path, variables: dict[str, str]) -> None:
    """The command has the very process that was started, with its pid, so signals reach it, and its streams."""
    program = [sys.executable, "-c", "import os, sys; print(os.getpid(), sys.stdin.read())"]
    with subprocess.Popen(
        [sys.executable, "-m", "tfenv", "run", "--", *program],
        cwd=project,
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        output, _ = child.communicate("hello", timeout=60)
    assert output == f"{child.pid} hello\n"


def test_signals_are_as_the_shell_left_them(tfgpu: Tfgpu) -> None:
    """Python ignores SIGPIPE, the command does not: `tfgpu run -- yes | head -1` ends."""
    assert tfgpu("run", "--", "sh", "-c", "yes | head -1; exit 0").stdout == "y\n"
    ignored = tfgpu("run", "--", "grep", "SigIgn", "/proc/self/status").stdout
    assert int(ignored.split()[1], 16) & (1 << (signal.SIGPIPE - 1)) == 0


def test_command_not_found(tfgpu: Tfgpu) -> None:
    """127, as a shell has it."""
    result = tfgpu("run", "--", "no-such-command-here")
    assert (result.returncode, result.stderr) == (127, 'tfgpu run: command not found: "no-such-command-here"\n')


def test_command_not_executable(project: Path, tfgpu: Tfgpu) -> None:
    """126 for a file that cannot be run: no permission, no format, a missing interpreter."""
    plain = project / "plain"
    plain.write_text("text")
    assert tfgpu("run", "--", "./plain").returncode == 126
    plain.chmod(0o755)
    assert tfgpu("run", "--", "./plain").returncode == 126
    plain.write_text("#!/no/such/interpreter\n")
    result = tfgpu("run", "--", "./plain")
    assert result.returncode == 126
    assert "interpreter" in result.stderr


def test_the_hook_is_live_in_an_interpreter_without_tfenv(tfgpu: Tfgpu, tmp_path: Path) -> None:
    """A virtual environment has no tfenv. Under `tfgpu run` its Python is armed, once, and so are its children."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    alone = subprocess.run([python, "-c", HOOK], capture_output=True, text=True, check=True, cwd=tmp_path, env=bare)
    assert alone.stdout == "0\n"
    assert tfgpu("run", "--", python, "-c", HOOK).stdout == "1\n"
    spawned = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOOK!r}])"
    assert tfgpu("run", "--", python, "-c", spawned).stdout == "1\n"


def test_the_first_framework_import_is_governed(project: Path, tfgpu: Tfgpu) -> None:
    """A package named tensorflow, imported under `tfgpu run --gpus 1`, starts with CUDA_VISIBLE_DEVICES=1."""
    package = project / "tensorflow"
    package.mkdir()
    (package / "__init__.py").write_text("import os\nseen = os.environ.get('CUDA_VISIBLE_DEVICES')\n")
    program = "import tensorflow; print(tensorflow.seen)"
    assert tfgpu("run", "--gpus", "1", "--", sys.executable, "-c", program).stdout == "1\n"
