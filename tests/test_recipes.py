"""The recipes are right in detail: their scripts are run, their layouts made on disk, their policies applied."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli

from tests.conftest import SimulatedGpus
from tests.machine import ME, Machine
from tests.pages import ROOT, Block, blocks, commands
from tfenv.config.document import Document
from tfenv.config.schema import validate
from tfenv.deploy import launch
from tfenv.policy.model import Source

yaml: Any = pytest.importorskip("yaml", reason="of the development group")

RECIPES = ROOT / "docs" / "recipes"


def recipe(name: str, language: str) -> list[Block]:
    return blocks(language, pages=[RECIPES / f"{name}.md"])


# ---- Kubernetes

CONFIG_MAP = '[ceiling]\nmemory_limit = "25%"\n'


def config_map(volume: Path, text: str = CONFIG_MAP) -> Path:
    """A ConfigMap as Kubernetes mounts it: an open directory, and the file behind two links.

    Returns:
        The file.
    """
    data = volume / "..2026_11_25_12_00_00.1"
    data.mkdir(parents=True)
    data.chmod(0o755)
    (data / "tfgpu.toml").write_text(text)
    (data / "tfgpu.toml").chmod(0o644)
    (volume / "..data").symlink_to(data.name)
    (volume / "tfgpu.toml").symlink_to("..data/tfgpu.toml")
    volume.chmod(0o777)
    return volume / "tfgpu.toml"


KUBERNETES_BASE = ROOT / "sample_configs" / "kubernetes"


def list_manifests() -> list[Any]:
    """Every object on the page, and every one of the base for Kustomize."""
    texts = [block.text for block in recipe("kubernetes", "yaml")]
    kustomization = yaml.safe_load((KUBERNETES_BASE / "kustomization.yaml").read_text())
    texts += [(KUBERNETES_BASE / name).read_text() for name in kustomization["resources"]]
    return [document for text in texts for document in yaml.safe_load_all(text)]


def test_kubernetes_accepts_the_manifests() -> None:
    """Each object on the page and in the base is one that the API of Kubernetes knows, and has no other fields."""
    validator = pytest.importorskip("kubernetes_validate", reason="of the development group")
    version = validator.latest_version()
    for manifest in list_manifests():
        validator.validate(manifest, version, strict=True)
    with pytest.raises(validator.ValidationError):
        validator.validate({**list_manifests()[0], "datta": {}}, version, strict=True)


def test_the_base_for_kustomize_fits_together() -> None:
    """Its files exist, its job mounts its policy as a file and the directory of leases, and has a writable /tmp."""
    kustomization = yaml.safe_load((KUBERNETES_BASE / "kustomization.yaml").read_text())
    (generated,) = kustomization["configMapGenerator"]
    for_people = {"kustomization.yaml", "tfgpu.test.toml"}
    assert {*kustomization["resources"], *generated["files"], *for_people} == {
        path.name for path in KUBERNETES_BASE.iterdir()
    }
    by_kind = {manifest["kind"]: manifest for manifest in list_manifests()}
    pod = by_kind["Job"]["spec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts["/etc/tfgpu/tfgpu.toml"]["subPath"] == generated["files"][0]
    assert volumes[mounts["/etc/tfgpu/tfgpu.toml"]["name"]]["configMap"]["name"] == generated["name"]
    assert "emptyDir" in volumes[mounts["/tmp"]["name"]]
    host = volumes[mounts["/run/lock/tfgpu"]["name"]]["hostPath"]["path"]
    maker = by_kind["DaemonSet"]["spec"]["template"]["spec"]
    assert {host} == {volume["hostPath"]["path"] for volume in maker["volumes"]}
    assert maker["initContainers"][0]["command"][:2] == ["chmod", "1777"]


READ_ONLY = """
for folder in {folders} .; do mount --bind $folder $folder && mount -o remount,ro,bind $folder; done
cd "$PWD"
"""
LIST = """
import tensorflow as tf
print(len(tf.config.list_logical_devices("GPU")))
"""


@pytest.mark.exhaustive
@pytest.mark.tensorflow
@pytest.mark.skipif(ME != 0, reason="needs root, to mount")
@pytest.mark.parametrize(
    ("folders", "said"), [("/tmp /var/tmp /run", "No usable temporary directory"), ("/var/tmp /run", "2")]
)
def test_a_pod_needs_a_writable_tmp(folders: str, said: str, simulated_gpus: SimulatedGpus) -> None:
    """TensorFlow cannot be imported without one. With it a policy holds where nothing else can be written."""
    with tempfile.TemporaryDirectory(dir=Path.home()) as name:
        folder = Path(name)
        (folder / "tfgpu.toml").write_text('[gpu]\nmemory_limit = "1GiB"\n')
        (folder / "program.py").write_text(LIST)
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-ec", f"{READ_ONLY.format(folders=folders)}exec {sys.executable} program.py"],
            cwd=folder,
            env=launch.build_environment(simulated_gpus("2x24GiB")) | {"HOME": "/nonexistent"},
            capture_output=True,
            text=True,
            check=False,
        )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert said in (done.stdout or done.stderr), done.stderr


def test_the_manifests_policy_is_right() -> None:
    """The file in the ConfigMap gives no finding as a machine's file."""
    documents = [document for block in recipe("kubernetes", "yaml") for document in yaml.safe_load_all(block.text)]
    (text,) = [document["data"]["tfgpu.toml"] for document in documents if document["kind"] == "ConfigMap"]
    base = (KUBERNETES_BASE / "tfgpu.toml").read_text()
    assert tomli.loads(base) == tomli.loads(text)
    path = "/etc/tfgpu/tfgpu.toml"
    _, findings = validate(Document(Source("machine", path), tomli.loads(text), "0" * 64, text, 0))
    assert findings == ()


def test_a_config_map_is_no_machine_layer(tmp_path: Path) -> None:
    """Mounted as /etc/tfgpu, it is left out: everybody can write its directory."""
    machine = Machine(tmp_path / "root")
    config_map(machine.etc)
    assert [finding.code for finding in machine.load().findings] == ["insecure-permissions"]


def test_a_file_mounted_with_sub_path_is(tmp_path: Path) -> None:
    """Mounted alone, with `subPath`, the file stands in a directory of root's, and holds."""
    machine = Machine(tmp_path / "root")
    machine.write("etc/tfgpu.toml", CONFIG_MAP)
    loaded = machine.load()
    assert loaded.findings == ()
    assert [ceiling.key for ceiling in loaded.policy.ceilings] == ["memory_limit"]


EXPLAIN = "import tfenv; e = tfenv.explain(); print([f.code for f in e.findings], [c.value for c in e.ceilings])"


@pytest.mark.skipif(ME != 0, reason="needs root, to mount")
def test_a_config_map_is_a_policy_for_tfgpu_config(tmp_path: Path) -> None:
    """Mounted read-only, as it is, it is accepted where TFGPU_CONFIG names it; were it writable, it would not be."""
    file = config_map(tmp_path / "volume")
    mount = f"mount --bind {file.parent} {file.parent} && mount -o remount,ro,bind {file.parent} && "
    ask = f"exec {sys.executable} -c '{EXPLAIN}'"
    answers = []
    for command in (ask, mount + ask):
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", command],
            env={**os.environ, "TFGPU_CONFIG": str(file), "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        if "unshare" in done.stderr or "mount:" in done.stderr:
            pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
        answers.append(done.stdout.strip())
    assert answers == ["['insecure-permissions'] []", "[] ['25%']"]


# ---- JupyterHub


@pytest.mark.parametrize(
    ("groups", "file"),
    [(["staff", "students"], "groups/staff"), (["students"], "groups/students"), (["guests"], "default")],
)
def test_a_hub_user_gets_the_file_of_a_group(groups: list[str], file: str) -> None:
    """The hook for containers, as the page has it: the hub cannot see the files, so the page lists them."""
    config: Any = pytest.importorskip("traitlets.config", reason="of the development group").Config()
    (text,) = [block.text for block in recipe("jupyterhub", "python") if "policy_from" in block.text]
    exec(compile(text, "jupyterhub_config.py", "exec"), {"c": config})
    user = SimpleNamespace(name="bob", groups=[SimpleNamespace(name=name) for name in groups])
    spawner = SimpleNamespace(user=user, environment={})
    config.Spawner.pre_spawn_hook(spawner)
    assert spawner.environment == {"TFGPU_SITE_CONFIG": f"/etc/tfgpu-hub/{file}.toml"}


# ---- direnv


def test_the_envrc_names_an_absolute_path(tmp_path: Path) -> None:
    """Whatever the directory a process starts in, it reads the project's file."""
    (script,) = [block.text for block in recipe("direnv", "bash") if "PROFILE" in block.text]
    done = subprocess.run(
        ["bash"], input=f'{script}\necho "$TFGPU_CONFIG"', cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{tmp_path}/policies/default.toml\n"


# ---- CI


@pytest.mark.tensorflow
def test_the_test_of_the_recipe_passes(tmp_path: Path) -> None:
    """The test that the recipe for CI shows passes beside the policy that it shows."""
    (policy,) = recipe("ci", "toml")
    (program,) = recipe("ci", "python")
    (tmp_path / "tfgpu.toml").write_text(policy.text)
    (tmp_path / "test_policy.py").write_text(program.text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_policy.py"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("TFGPU_", "CUDA_", "PYTEST_"))}
    environ["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


# ---- Papermill

CODE = "import tensorflow as tf, tfenv\ntf.config.list_logical_devices()\nprint(tfenv.status())"
CELL: dict[str, object] = {
    "cell_type": "code",
    "id": "one",
    "metadata": {},
    "source": CODE,
    "outputs": [],
    "execution_count": None,
}
NOTEBOOK = {"cells": [CELL], "metadata": {"language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}


def papermill(words: tuple[str, ...], folder: Path, environ: dict[str, str]) -> str:
    """What a notebook beside a policy says of it when papermill runs it from another directory."""
    (folder / "vision" / "train.ipynb").write_text(json.dumps(NOTEBOOK))
    arguments = [word.replace("~", str(folder)) for word in words[1:]]
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "--kernel", "tested", *arguments],
        cwd=folder / "elsewhere", env=environ, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (cell,) = json.loads((folder / "elsewhere" / "result.ipynb").read_text())["cells"]
    return "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")


@pytest.mark.tensorflow
def test_a_policy_beside_a_notebook_counts_only_where_papermill_is_told(
    tmp_path: Path, simulated_gpus: SimulatedGpus
) -> None:
    """Papermill starts the kernel where it runs itself. With the recipe's `--cwd` the policy is in force."""
    pytest.importorskip("papermill", reason="of the development group")
    (command,) = [
        c for block in recipe("jupyterhub", "console") for c in commands(block.text) if "papermill" in c.words
    ]
    for name in ("vision", "elsewhere", "kernels/tested"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "vision" / "tfgpu.toml").write_text('[gpu]\nvisible_devices = [0]\nmemory_limit = "2GiB"\n')
    kernel = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": kernel, "display_name": "tested", "language": "python"}
    (tmp_path / "kernels" / "tested" / "kernel.json").write_text(json.dumps(spec))
    home = {"HOME": str(tmp_path), "JUPYTER_PATH": str(tmp_path), "JUPYTER_PLATFORM_DIRS": "1"}
    environ = simulated_gpus("2x24GiB") | home
    place = command.words.index("--cwd")
    without = command.words[:place] + command.words[place + 2 :]
    assert "no policy applies here" in papermill(without, tmp_path, environ)
    assert "GPU 0 of 2 (GPU-a0fa4e00), at most 2.0 GiB" in papermill(command.words, tmp_path, environ)
