"""A notebook on simulated GPUs, with a real kernel: what its cells say, and what the driver was asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SimulatedGpus
from tfenv.simulate.driver_requests import read_requests, summarise_requests

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

#: Runs the cells on its stdin with the kernel that is named, and prints what each of them put out.
CLIENT = """
import json, sys
import nbformat.v4
from nbclient import NotebookClient
cells = [nbformat.v4.new_code_cell(source) for source in json.load(sys.stdin)]
notebook = nbformat.v4.new_notebook(cells=cells)
NotebookClient(notebook, timeout=120, kernel_name=sys.argv[1]).execute()
print(json.dumps([cell.outputs for cell in notebook.cells]))
"""
#: A kernel of an interpreter without the hook: -S reads no .pth file.
LATE = "import sys; sys.path += {path!r}; from ipykernel.kernelapp import launch_new_instance; launch_new_instance()"
POLICY = '[gpu]\nvisible_devices = [0]\nmemory_growth = true\nmemory_limit = "2GiB"\n'
OPEN = 'import tensorflow as tf\nprint(len(tf.config.list_logical_devices("GPU")))'


class Notebook:
    """Outputs of the cells of one notebook."""

    def __init__(self, cells: list[list[dict[str, Any]]]) -> None:
        self.cells = cells

    def text(self, cell: int, stream: str) -> str:
        """What a cell wrote to a stream."""
        return "".join(output["text"] for output in self.cells[cell] if output.get("name") == stream)

    def shown(self, cell: int, kind: str) -> str:
        """The value of a cell as one of its representations."""
        (result,) = [output for output in self.cells[cell] if output["output_type"] == "execute_result"]
        return str(result["data"][kind])


def execute(folder: Path, simulated_gpus: SimulatedGpus, kernel: list[str], cells: list[str]) -> Notebook:
    """Run the cells in a project with a policy; requests to the driver go to `folder/requests`."""
    project = folder / "project"
    project.mkdir()
    (project / "tfgpu.toml").write_text(POLICY)
    user = folder / "config" / "tfgpu" / "tfgpu.toml"
    user.parent.mkdir(parents=True)
    user.write_text(f'[audit]\nfile = "{folder}/log.jsonl"\n')
    spec = folder / "kernels" / "tested" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": kernel, "display_name": "tested", "language": "python"}))
    home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder / "config"), "JUPYTER_PATH": str(folder)}
    environment = simulated_gpus("2x24GiB", log=folder / "requests", JUPYTER_PLATFORM_DIRS="1") | home
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, "tested"],
        cwd=project, env=environment, input=json.dumps(cells), capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Notebook(json.loads(done.stdout))


def test_a_notebook_is_governed(tmp_path: Path, simulated_gpus: SimulatedGpus, needs_tensorflow: None) -> None:
    """One line in the cell that creates the devices and none in others, a table of the status, and the limit kept."""
    kernel = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    cells = [
        "import tensorflow as tf",
        OPEN,
        f"kept = tf.zeros([100, 1 << 18])\n{OPEN}",
        "import tfenv; tfenv.status()",
    ]
    notebook = execute(tmp_path, simulated_gpus, kernel, cells)
    assert [notebook.text(cell, "stdout") for cell in range(3)] == ["", "1\n", "1\n"]
    (line,) = notebook.text(1, "stderr").splitlines()
    assert line.startswith("tfgpu: TensorFlow on GPU 0 of 2 (GPU-a0fa4e00), growth on, at most 2.0 GiB (")
    assert [notebook.text(cell, "stderr") for cell in (0, 2, 3)] == ["", "", ""]
    table = notebook.shown(3, "text/html")
    assert table.startswith("<table>")
    assert "GPU:0 Simulated GPU (0): at most 2.0 GiB" in table
    assert "applied at TFE_ContextOptionsSetConfig" in table
    requests = summarise_requests(read_requests(tmp_path / "requests"))
    assert [number for number, gpu in requests.items() if gpu.allocations] == [0]
    assert requests[0].peak_process < 1 << 30


OTHERS = [
    pytest.param(
        "jax", "JAX", "kept = jax.numpy.zeros((100, 1 << 18))\nprint(jax.device_count())", marks=pytest.mark.jax
    ),
    pytest.param(
        "torch",
        "PyTorch",
        "kept = torch.empty(100 << 20, dtype=torch.uint8, device='cuda')\nprint(torch.cuda.device_count())",
        marks=[pytest.mark.torch, pytest.mark.exhaustive],
    ),
]


@pytest.mark.parametrize(("framework", "title", "use"), OTHERS)
def test_a_notebook_with_another_framework_is_governed(
    framework: str, title: str, use: str, tmp_path: Path, simulated_gpus: SimulatedGpus, request: pytest.FixtureRequest
) -> None:
    """One line in the cell that first uses the GPU names the framework, and the limit and the GPU are kept."""
    request.getfixturevalue(f"needs_{framework}")
    kernel = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    notebook = execute(tmp_path, simulated_gpus, kernel, [f"import {framework}", use, "import tfenv; tfenv.status()"])
    assert [notebook.text(cell, "stdout") for cell in range(2)] == ["", "1\n"]
    assert f"tfgpu: {title} on GPU 0 of 2 (GPU-a0fa4e00), growth on, at most 2.0 GiB (" in notebook.text(1, "stderr")
    assert "at most 2.0 GiB" in notebook.shown(2, "text/html")
    requests = summarise_requests(read_requests(tmp_path / "requests"))
    assert [number for number, gpu in requests.items() if gpu.allocations] == [0]
    assert requests[0].peak_process < 1 << 30


def test_a_notebook_that_comes_too_late(tmp_path: Path, simulated_gpus: SimulatedGpus, needs_tensorflow: None) -> None:
    """A kernel without the hook that applies the policy after its devices are there is told, once, what to do."""
    kernel = [sys.executable, "-S", "-c", LATE.format(path=sys.path), "-f", "{connection_file}"]
    cells = [OPEN, "import tfenv; tfenv.apply()", "tfenv.apply()"]
    notebook = execute(tmp_path, simulated_gpus, kernel, cells)
    assert (notebook.text(0, "stdout"), notebook.text(0, "stderr")) == ("2\n", "")
    (line,) = notebook.text(1, "stderr").splitlines()
    assert line.startswith("tfgpu: NOT IN FORCE: TensorFlow created its devices before tfenv was loaded")
    assert "restart the process (in a notebook, the kernel)" in line
    assert "at most" not in line
    assert notebook.text(2, "stderr") == ""
    table = notebook.shown(2, "text/html")
    assert '<td style="text-align:left">too_late</td>' in table
    assert "GPUs that it would allow" in table
