"""Beside the tools that use the same way in, the real ones, and what pip leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environments import (
    ROOT,
    Environment,
    clean_environment,
    install,
    launched,
    make_environment,
    pip,
    told,
)

TELL = "import json, sys; print(json.dumps(sys.story))"
GOVERNED = ["before", "code", "after"]


def add(environment: Environment, *packages: str) -> None:
    done = pip(environment, "install", *packages)
    if done.returncode != 0:
        pytest.skip(f"{packages[0]} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")


def tool(environment: Environment, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a console script of the environment, as in an activated one."""
    path = f"{environment.folder}/bin:{clean_environment()['PATH']}"
    return subprocess.run(
        command,
        env=clean_environment() | {"PATH": path} | variables,
        cwd=environment.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.exhaustive
def test_ddtrace(own: Environment, tmp_path: Path) -> None:
    """Under ddtrace-run, whose sitecustomize wraps imports, both have their effect; `tfgpu run` around it, too."""
    add(own, "ddtrace")
    script = tmp_path / "train.py"
    script.write_text(f"import tensorflow, sys; assert 'ddtrace' in sys.modules; {TELL}")
    quiet = {"DD_TRACE_ENABLED": "false", "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false"}
    assert told(tool(own, "ddtrace-run", "python", str(script), **quiet)) == GOVERNED
    assert told(tool(own, "ddtrace-run", "python", str(script), **quiet, **launched(own))) == GOVERNED


@pytest.mark.exhaustive
def test_ddtrace_inside_of_run(own: Environment, wheel: Path, tmp_path: Path) -> None:
    """Where only PYTHONPATH brings both, each sitecustomize chains the other, in either order."""
    traced = make_environment(own.python, tmp_path / "traced")
    add(traced, "ddtrace")
    (traced.site_packages / "tensorflow.py").write_text((own.site_packages / "tensorflow" / "__init__.py").read_text())
    bootstrap = str(traced.site_packages / "ddtrace" / "bootstrap")
    variables = launched(own)
    ours = variables.pop("PYTHONPATH")
    quiet = {"DD_TRACE_ENABLED": "false", "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false", **variables}
    program = f"import tensorflow, sys; assert 'ddtrace' in sys.modules; {TELL}"
    for pythonpath in (f"{ours}:{bootstrap}", f"{bootstrap}:{ours}"):
        assert traced.story(program, env={"PYTHONPATH": pythonpath, **quiet}) == GOVERNED


@pytest.mark.exhaustive
def test_opentelemetry(own: Environment, tmp_path: Path) -> None:
    """Under opentelemetry-instrument, which comes in by a sitecustomize, both have their effect; `tfgpu run`, too."""
    add(own, "opentelemetry-distro")
    script = tmp_path / "train.py"
    # Its agent is initialised by its sitecustomize alone: the module's being loaded proves that it ran.
    started = "opentelemetry.instrumentation.auto_instrumentation"
    script.write_text(f"import tensorflow, sys; assert {started!r} in sys.modules; {TELL}")
    quiet = {f"OTEL_{signal}_EXPORTER": "none" for signal in ("TRACES", "METRICS", "LOGS")}
    command = ("opentelemetry-instrument", "python", str(script))
    assert told(tool(own, *command, **quiet)) == GOVERNED
    assert told(tool(own, *command, **quiet, **launched(own))) == GOVERNED


@pytest.mark.exhaustive
def test_coverage(own: Environment, tmp_path: Path) -> None:
    """Under `coverage run`, and with coverage's own .pth measuring child processes, imports are governed."""
    add(own, "coverage")
    script = tmp_path / "train.py"
    script.write_text(f"import tensorflow\n{TELL}\n")
    data = {"COVERAGE_FILE": str(tmp_path / "data")}
    assert told(tool(own, "coverage", "run", str(script), **data)) == GOVERNED
    (tmp_path / "coveragerc").write_text(f"[run]\nparallel = true\ndata_file = {tmp_path}/child\n")
    child = {"COVERAGE_PROCESS_START": str(tmp_path / "coveragerc")}
    assert told(tool(own, "python", str(script), **child)) == GOVERNED
    assert list(tmp_path.glob("child*")), "coverage has measured nothing"


@pytest.mark.exhaustive
def test_gevent(own: Environment, tmp_path: Path) -> None:
    """gevent patches the standard library after our start without a warning, and greenlets import governed."""
    add(own, "gevent")
    program = f"""
import warnings; warnings.simplefilter("error")
from gevent import monkey; monkey.patch_all()
import gevent
def work():
    import tensorflow
gevent.joinall([gevent.spawn(work) for _ in range(8)], raise_error=True)
{TELL}
"""
    assert own.story(program) == GOVERNED


@pytest.mark.exhaustive
def test_notebook_kernel(own: Environment, tmp_path: Path) -> None:
    """A cell of a notebook is governed: a kernel is a Python process like any other."""
    add(own, "ipykernel", "jupyter_client")
    script = tmp_path / "client.py"
    script.write_text("""
from jupyter_client.manager import start_new_kernel

manager, client = start_new_kernel(kernel_name="python3")
said = []
def hear(message):
    if message["msg_type"] == "stream":
        said.append(message["content"]["text"])
client.execute_interactive("import json, sys, tensorflow; print(json.dumps(sys.story))", output_hook=hear, timeout=50)
client.stop_channels()
manager.shutdown_kernel(now=True)
print("".join(said))
""")
    done = tool(own, "python", str(script), JUPYTER_PLATFORM_DIRS="1", HOME=str(tmp_path))
    assert (done.returncode, json.loads(done.stdout)) == (0, GOVERNED), done.stderr


# ---- pip


def files(environment: Environment) -> set[str]:
    """All files and folders, apart from bytecode, which every interpreter writes."""
    paths = (path for path in environment.folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(environment.folder)) for path in paths}


def editable_wheel(folder: Path) -> Path:
    """What `pip install --editable` builds and installs, without its isolated environment."""
    program = f"from hatchling.build import build_editable; print(build_editable({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return folder / done.stdout.strip()


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_uninstall_leaves_nothing(wheel: Path, tmp_path: Path, *, editable: bool) -> None:
    """`pip uninstall` after use removes every file, bytecode of the hook included, and programs start in silence."""
    environment = make_environment(sys.executable, tmp_path / "venv")
    (environment.site_packages / "neighbour.py").write_text("")  # pip removes empty folders, ours or not
    before = files(environment)
    install(environment, editable_wheel(tmp_path) if editable else wheel)
    armed = environment.run("-c", "import sys, tfenv; print(sys.meta_path[0].__name__)")
    assert (armed.stdout, armed.stderr) == ("TfenvFinder\n", "")
    assert files(environment) > before
    done = pip(environment, "uninstall", "--yes", "tfenv")
    assert done.returncode == 0, done.stderr
    assert files(environment) == before
    assert not [path for path in environment.folder.rglob("*") if "tfenv" in path.name]
    after = environment.run("-c", "import sys; print(sys.meta_path[0].__name__)")
    assert (after.stdout, after.stderr) == ("BuiltinImporter\n", "")
