"""How the hook gets into every process, and what it does there. Each test starts real interpreters."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import sysconfig
import zipapp
from pathlib import Path

import pytest
from jsonschema import Draft7Validator

from tests.environments import Environment, clean_environment, install, make_environment, told

TELL = "import json, sys; print(json.dumps(sys.story))"
IMPORT_AND_TELL = f"import tensorflow; {TELL}"
GOVERNED = ["before", "code", "after"]


POLICY = '[gpu]\nvisible_devices = "none"\n[audit]\nstderr = "none"\nfile = "audit.jsonl"\n'


@pytest.fixture
def real(wheel: Path, tmp_path: Path) -> Environment:
    """An environment that a test may change, with the wheel, its dependencies and a stand-in for TensorFlow."""
    environment = make_environment(sys.executable, tmp_path / "real")
    install(environment, wheel)
    (environment.site_packages / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (environment.site_packages / "tensorflow").mkdir()
    (environment.site_packages / "tensorflow" / "__init__.py").write_text("")
    return environment


def told_device(environment: Environment, folder: Path) -> tuple[str, str]:
    """What a program that imports TensorFlow finds in CUDA_VISIBLE_DEVICES, and what it complained about."""
    done = environment.run("-c", "import os, tensorflow; print(os.environ.get('CUDA_VISIBLE_DEVICES'))", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


DEFAULT_LOG = Path(pwd.getpwuid(os.geteuid()).pw_dir, ".local/state/tfgpu/audit.jsonl")


def read_records() -> list[dict[str, object]]:
    """The records of the user's default log."""
    lines = DEFAULT_LOG.read_text().splitlines() if DEFAULT_LOG.exists() else []
    return [json.loads(line) for line in lines if line]


def count_records() -> int:
    return len(read_records())


def validator() -> Draft7Validator:
    schema = Path(__file__).parents[2] / "schemas" / "audit.schema.json"
    return Draft7Validator(json.loads(schema.read_text()))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ---- ways to start a program


def test_script(armed: Environment, tmp_path: Path) -> None:
    """A script's import of TensorFlow is governed: before its code runs, and after."""
    script = write(tmp_path / "train.py", IMPORT_AND_TELL)
    assert told(armed.run(str(script))) == GOVERNED


def test_module(armed: Environment, tmp_path: Path) -> None:
    """`python -m` is governed."""
    write(tmp_path / "train.py", IMPORT_AND_TELL)
    assert told(armed.run("-m", "train", cwd=tmp_path)) == GOVERNED


def test_package_with_main(armed: Environment, tmp_path: Path) -> None:
    """`python -m package` is governed."""
    (tmp_path / "train").mkdir()
    write(tmp_path / "train" / "__main__.py", IMPORT_AND_TELL)
    assert told(armed.run("-m", "train", cwd=tmp_path)) == GOVERNED


@pytest.mark.parametrize("options", [(), ("-I",), ("-E",), ("-s",), ("-B",), ("-O",), ("-X", "utf8")], ids=str)
def test_command_line_options(armed: Environment, options: tuple[str, ...]) -> None:
    """The hook is there under every option but -S."""
    assert armed.story(IMPORT_AND_TELL, *options) == GOVERNED


def test_without_site_is_not_covered(armed: Environment) -> None:
    """`python -S` reads no .pth: the hook is not there. It is documented as not covered."""
    program = f"import sys; sys.path.append({str(armed.site_packages)!r}); {IMPORT_AND_TELL}"
    assert armed.story(program, "-S") == ["code"]


def test_empty_environment(armed: Environment) -> None:
    """A process without any variable, HOME and PATH included, is governed."""
    done = subprocess.run(
        [armed.python, "-c", IMPORT_AND_TELL],
        env={},
        cwd=armed.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert told(done) == GOVERNED


def test_zipapp(armed: Environment, tmp_path: Path) -> None:
    """A program in a zip archive is governed."""
    (tmp_path / "program").mkdir()
    write(tmp_path / "program" / "__main__.py", IMPORT_AND_TELL)
    zipapp.create_archive(tmp_path / "program", tmp_path / "program.pyz")
    assert told(armed.run(str(tmp_path / "program.pyz"))) == GOVERNED


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_multiprocessing(armed: Environment, tmp_path: Path, method: str) -> None:
    """A child of multiprocessing is governed, whatever way it is started."""
    script = write(
        tmp_path / "parent.py",
        f"""
import json, multiprocessing, sys

def work(queue):
    import tensorflow
    queue.put(sys.story)

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    queue = context.SimpleQueue()
    child = context.Process(target=work, args=(queue,))
    child.start()
    print(json.dumps(queue.get()))
    child.join()
""",
    )
    assert told(armed.run(str(script))) == GOVERNED


def test_fork_after_import(armed: Environment) -> None:
    """A child forked after the import has the parent's governed module, and nothing is done twice."""
    program = f"import os, tensorflow\nif os.fork():\n    os.wait()\nelse:\n    {IMPORT_AND_TELL}"
    assert armed.story(program) == GOVERNED


def test_sub_interpreter(armed: Environment) -> None:
    """A sub-interpreter has its own hook."""
    program = f"""
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
interpreters.run_string(interpreters.create(), {IMPORT_AND_TELL!r})
"""
    assert armed.story(program) == GOVERNED


# ---- what the hook does not do


def test_armed_hook_has_imported_nothing_but_itself(armed: Environment, bare: Environment) -> None:
    """In a process that imports no framework the hook is one more module and one more finder, nothing else."""
    program = "import sys; loaded = sorted(sys.modules); import json; print(json.dumps(loaded))"
    with_hook, without = armed.story(program), bare.story(program)
    assert isinstance(with_hook, list)
    assert isinstance(without, list)
    assert set(with_hook) - set(without) == {"_tfenv_boot"}


def test_is_armed_once(armed: Environment) -> None:
    """A virtual environment runs each .pth twice, and sitecustomize may import the module again: one finder."""
    program = "import json, sys, _tfenv_boot; _tfenv_boot.arm(); print(json.dumps([str(f) for f in sys.meta_path]))"
    finders = armed.story(program)
    assert isinstance(finders, list)
    assert sum("TfenvFinder" in finder for finder in finders) == 1


def test_checkout_module_arms_nothing(bare: Environment) -> None:
    """Under its name in the package, tfenv.runtime.finder, the module is inert."""
    program = "import sys; n = len(sys.meta_path); import tfenv.runtime.finder; print(len(sys.meta_path) - n)"
    root = Path(__file__).resolve().parents[2]
    assert bare.story(program, env={"PYTHONPATH": str(root)}) == 0


def test_probing_has_no_effect(armed: Environment) -> None:
    """Asking whether TensorFlow is installed, as many libraries do, runs nothing of the policy."""
    program = """
import importlib.util, json, pkgutil, sys
first, second = importlib.util.find_spec("tensorflow"), importlib.util.find_spec("tensorflow")
print(json.dumps([first.name, type(first.loader).__name__, "tensorflow" in sys.modules, hasattr(sys, "story")]))
"""
    assert armed.story(program) == ["tensorflow", "SourceFileLoader", False, False]


def test_threading_is_left_to_the_program(armed: Environment) -> None:
    """The hook does not import threading, at an import of TensorFlow neither: gevent wants to be first."""
    program = "import sys, tensorflow; print(str('threading' in sys.modules).lower())"
    assert armed.story(program) is False


def test_missing_tensorflow(own: Environment) -> None:
    """Where TensorFlow is not installed, importing it fails in Python's own words and the policy is not asked."""
    (own.site_packages / "tensorflow" / "__init__.py").unlink()
    (own.site_packages / "tensorflow").rmdir()
    done = own.run("-c", "import tensorflow")
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'tensorflow'"


def test_namespace_is_left_alone(own: Environment, tmp_path: Path) -> None:
    """A folder named tensorflow without code, as a broken uninstall leaves it, imports as it always did."""
    (own.site_packages / "tensorflow" / "__init__.py").unlink()
    program = "import json, sys, tensorflow; print(json.dumps([tensorflow.__file__, hasattr(sys, 'story')]))"
    assert own.story(program) == [None, False]


# ---- what it remembers


def test_remembers_the_start(armed: Environment, tmp_path: Path) -> None:
    """What the program changes before its import does not change what the process was when it started."""
    program = """
import json, os, sys
os.chdir("/")
os.environ["CUDA_VISIBLE_DEVICES"] = "3"
os.environ["TFGPU_CONFIG"] = "/other.toml"
sys.argv[0] = "other"
import tensorflow
from tfenv.runtime import enforce
print(json.dumps(enforce.starts))
"""
    env = {"CUDA_VISIBLE_DEVICES": "1,2", "TFGPU_CONFIG": "mine.toml", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert armed.story(program, env=env, cwd=tmp_path) == [
        {
            "cwd": str(tmp_path),
            "script": "-c",
            "CUDA_VISIBLE_DEVICES": "1,2",
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "TFGPU_CONFIG": "mine.toml",
            "TFGPU_SITE_CONFIG": None,
            "TFGPU_RUN": None,
            "TFGPU_GRANT": None,
            "TFGPU_DISABLE": None,
            "XDG_CONFIG_HOME": clean_environment().get("XDG_CONFIG_HOME"),
            "XDG_STATE_HOME": clean_environment().get("XDG_STATE_HOME"),
            "SUDO_UID": clean_environment().get("SUDO_UID"),
        }
    ]


def test_deleted_working_directory(armed: Environment, tmp_path: Path) -> None:
    """A process that starts in a directory that is gone starts in silence and is governed."""
    gone = tmp_path / "gone"
    gone.mkdir()
    program = f"{IMPORT_AND_TELL}; assert sys.modules['tfenv.runtime.enforce'].starts[0]['cwd'] is None"
    command = f'cd "{gone}" && rmdir "{gone}" && exec "{armed.python}" -c "$0"'
    done = subprocess.run(
        ["sh", "-c", command, program], env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert told(done) == GOVERNED


# ---- half installed


@pytest.mark.parametrize("missing", ["runtime", "__init__.py", "."])
def test_half_uninstalled_is_silent(own: Environment, missing: str) -> None:
    """Where the package, its code or what marks it is gone, the program runs as if tfenv were not there."""
    (own.site_packages / "tfenv" / missing).resolve().rename(own.folder / "gone")
    story = own.story(IMPORT_AND_TELL)
    assert story == ["code"] if missing != "__init__.py" else story in (["code"], GOVERNED)


@pytest.mark.parametrize(
    "damage",
    ["runtime/enforce.py", "runtime/import_hook.py", "runtime/own_imports.py", "config/presence.py", "pipeline.py"],
)
@pytest.mark.parametrize("how", ["missing", "a syntax error", "truncated bytecode"])
def test_what_is_there_and_broken_is_said(real: Environment, tmp_path: Path, damage: str, how: str) -> None:
    """One line says that no policy is applied, and a record that the schema knows. Or the policy is applied."""
    write(tmp_path / "tfgpu.toml", POLICY)
    file = real.site_packages / "tfenv" / damage
    assert told_device(real, tmp_path) == ("-1", "")  # and the bytecode is written
    before = count_records()
    if how == "truncated bytecode":
        (bytecode,) = (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc")
        bytecode.write_bytes(bytecode.read_bytes()[:40])
    elif how == "missing":
        file.unlink()
    else:
        file.write_text("this is no Python")
    device, line = told_device(real, tmp_path)
    assert (device, line.count("\n")) == ("None", 1), line
    assert "no policy is applied" in line
    assert line.endswith(" [internal-error]\n")
    (record,) = [record for record in read_records()[before:] if record["ppid"] == os.getpid()]
    assert not list(validator().iter_errors(record))
    assert record["event"] == "policy_failed"


def test_nothing_of_ours_can_be_loaded(real: Environment, tmp_path: Path) -> None:
    """Where even the module for emergencies is gone, the finder itself says the line."""
    for name in ("emergency", "import_hook"):
        write(real.site_packages / "tfenv" / "runtime" / f"{name}.py", "this is no Python")
    device, line = told_device(real, tmp_path)
    assert device == "None"
    assert line.startswith("tfgpu: tfenv cannot be loaded, no policy is applied")
    assert line.endswith(" [internal-error]\n")


# ---- installed too late


def test_too_late(armed: Environment) -> None:
    """A hook that is armed when TensorFlow is there already, as in a notebook, says so once."""
    program = f"import tensorflow, _tfenv_boot; _tfenv_boot.arm(); {TELL}"
    prologue = "import sys; sys.meta_path.pop(0); del sys.modules['_tfenv_boot']; "
    assert armed.story(prologue + program) == ["code", "too late"]


@pytest.mark.parametrize(
    "mock", ["unittest.mock.MagicMock()", "types.ModuleType('tensorflow')", "types.SimpleNamespace()", "None"]
)
def test_mocked_tensorflow_is_left_alone(armed: Environment, mock: str) -> None:
    """What a test puts into sys.modules in TensorFlow's place is no TensorFlow, early or late."""
    program = f"""
import json, sys, types, unittest.mock
sys.modules["tensorflow"] = mock = {mock}
try:
    import tensorflow
except ImportError:
    assert mock is None
else:
    assert tensorflow is mock
sys.meta_path.pop(0)
sys.modules.pop("_tfenv_boot")
import _tfenv_boot
print(json.dumps([hasattr(sys, "story"), "TfenvFinder" in str(sys.meta_path[0])]))
"""
    assert armed.story(program) == [False, True]


# ---- beside others


def test_own_sitecustomize(armed: Environment, tmp_path: Path) -> None:
    """A sitecustomize of the user's runs as before, and may itself import TensorFlow."""
    write(tmp_path / "sitecustomize.py", "import tensorflow, sys; sys.story.append('sitecustomize')")
    assert armed.story(TELL, env={"PYTHONPATH": str(tmp_path)}) == [*GOVERNED, "sitecustomize"]


def test_debian_sitecustomize_does_not_shadow(armed: Environment) -> None:
    """Where the system's Python brings a sitecustomize, that one loads, and the hook is there nevertheless."""
    program = f"import sys; customised = 'sitecustomize' in sys.modules; {IMPORT_AND_TELL}; assert customised"
    where = "import sys; print(getattr(sys.modules.get('sitecustomize'), '__file__', ''))"
    if "/usr/lib" not in armed.run("-c", where).stdout:
        pytest.skip("this Python has no sitecustomize of its own")
    assert armed.story(program) == GOVERNED


def test_exit_status_and_output_are_the_programs(armed: Environment, bare: Environment) -> None:
    """stdout, stderr and exit status are those of a Python without the hook."""
    for program in ("print('x'); raise SystemExit(3)", "import nothing_of_this_name", "1/0"):
        with_hook, without = armed.run("-c", program), bare.run("-c", program)
        assert (with_hook.returncode, with_hook.stdout) == (without.returncode, without.stdout)
        assert with_hook.stderr == without.stderr.replace(str(bare.folder), str(armed.folder))


def test_file_system_calls(armed: Environment, bare: Environment, tmp_path: Path) -> None:
    """The armed hook asks the file system for nothing but its own module."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")

    def paths(environment: Environment) -> set[str]:
        environment.run("-c", "pass")  # writes bytecode
        log = tmp_path / "strace"
        command = [strace, "-e", "trace=file", "-o", str(log), environment.python, "-c", "pass"]
        if subprocess.run(command, env=clean_environment(), cwd="/", check=False).returncode != 0:
            pytest.skip("strace may not trace here")
        asked = re.sub(r"^(execve|getcwd).*$", "", log.read_text(), flags=re.MULTILINE)
        return {path.replace(str(environment.folder), "VENV") for path in re.findall('"(/[^"]*)"', asked)}

    site_packages = str(armed.site_packages).replace(str(armed.folder), "VENV")
    module = sorted(path for path in paths(armed) - paths(bare) if "nothing.pth" not in path)
    assert len(module) == 3, module
    assert module[0].startswith(f"{site_packages}/__pycache__/_tfenv_boot.")
    assert module[1:] == [f"{site_packages}/_tfenv_boot.py", f"{site_packages}/tfenv.pth"]


def test_this_python_is_among_them(armed: Environment) -> None:
    """The environments under test are the Pythons they claim to be, so that no version is tested twice unseen."""
    done = armed.run("-c", "import sys; print(sys.prefix)")
    assert done.stdout.strip() == str(armed.folder)
    assert sys.version_info >= (3, 10)
