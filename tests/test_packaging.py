"""What people get: the contents of the wheel and of the sdist, and what they ask for."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import tomli

import tfenv

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this checkout and the wheel that was built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(distributions.glob("*.whl")))


@pytest.fixture(scope="module")
def sdist(distributions: Path) -> set[str]:
    """The names in the sdist, without its top folder."""
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def checkout(folder: str, *patterns: str) -> set[str]:
    """The files of the checkout that match, as a wheel or sdist names them."""
    paths = [path for pattern in patterns for path in (ROOT / folder).rglob(pattern) if path.is_file()]
    return {str(path.relative_to(ROOT)) for path in paths if not {"__pycache__", ".hypothesis"} & set(path.parts)}


def metadata(wheel: zipfile.ZipFile) -> Message:
    return message_from_bytes(wheel.read(f"tfenv-{tfenv.__version__}.dist-info/METADATA"))


# ---- the wheel


def test_hook_is_at_the_root(wheel: zipfile.ZipFile) -> None:
    """At the wheel's root are the .pth, the boot module, the package, and nothing that could hit another project."""
    roots = {name.partition("/")[0] for name in wheel.namelist()}
    assert roots == {"_tfenv_boot.py", "tfenv", "tfenv.pth", f"tfenv-{tfenv.__version__}.dist-info"}


def test_pth_is_one_plain_import(wheel: zipfile.ZipFile) -> None:
    """The .pth is one import that everybody can read."""
    assert wheel.read("tfenv.pth") == b"import _tfenv_boot\n"


def test_boot_module_is_the_checkouts(wheel: zipfile.ZipFile) -> None:
    """The boot module is tfenv/runtime/finder.py, byte for byte."""
    assert wheel.read("_tfenv_boot.py") == (ROOT / "tfenv/runtime/finder.py").read_bytes()


def test_package_is_complete(wheel: zipfile.ZipFile) -> None:
    """Every module, C source and header of the package, its py.typed and its schemas are in the wheel."""
    expected = checkout("tfenv", "*.py", "*.c", "*.h", "*.dat", "py.typed") - {
        "tfenv/runtime/finder.py"
    }  # that one is the boot module
    # schemas/schemastore/ is for maintainers.
    expected |= {f"tfenv/{name}" for name in checkout("schemas", "*.json") if "schemastore" not in name}
    schemas = {f"tfenv/schemas/{name}.schema.json" for name in ("tfgpu", "tfgpu-test", "audit")}
    assert {*schemas, "tfenv/py.typed"} <= expected
    assert any(name.endswith(".c") for name in expected)
    assert expected - set(wheel.namelist()) == set()


def test_nothing_else_in_the_package(wheel: zipfile.ZipFile) -> None:
    """No bytecode, no shared library, no test, no editor's leavings."""
    inside = [name for name in wheel.namelist() if name.startswith("tfenv/")]
    assert {Path(name).suffix for name in inside} <= {".py", ".c", ".h", ".json", ".typed", ".dat", ".css"}, inside


def test_no_sitecustomize_where_python_looks(wheel: zipfile.ZipFile) -> None:
    """The sitecustomize is alone in its folder: at the root, two wheels that bring one destroy each other."""
    found = [name for name in wheel.namelist() if "customize" in name]
    assert found == ["tfenv/deploy/pythonpath/sitecustomize.py"]
    assert [n for n in wheel.namelist() if n.startswith("tfenv/deploy/pythonpath/")] == found


def test_entry_points(wheel: zipfile.ZipFile) -> None:
    """There is one command, tfgpu: one named tfenv would hide another project's. And PyInstaller's hook."""
    text = wheel.read(f"tfenv-{tfenv.__version__}.dist-info/entry_points.txt").decode()
    hook = "[pyinstaller40]\nhook-dirs = tfenv.deploy.pyinstaller:get_hook_dirs\n"
    assert text == f"[console_scripts]\ntfgpu = tfenv.cli.main:main\n\n{hook}"


def test_wheel_fits_every_platform(distributions: Path) -> None:
    """One wheel for all: nothing is compiled before it is needed."""
    assert next(distributions.glob("*.whl")).name == f"tfenv-{tfenv.__version__}-py3-none-any.whl"


def test_metadata(wheel: zipfile.ZipFile) -> None:
    """The metadata say which Pythons, which version and which license; the license itself is there."""
    found = metadata(wheel)
    assert (found["Name"], found["Version"]) == ("tfenv", tfenv.__version__)
    assert found["Requires-Python"] == ">=3.10"
    assert found["License-Expression"] == "Apache-2.0"
    assert f"tfenv-{tfenv.__version__}.dist-info/licenses/LICENSE" in wheel.namelist()


def test_dependencies(wheel: zipfile.ZipFile) -> None:
    """TensorFlow is an extra, never a dependency: people bring their own build."""
    required = metadata(wheel).get_all("Requires-Dist") or []
    hard = {re.split("[<>=]", line)[0] for line in required if "extra ==" not in line}
    assert hard == {"tomli", "structlog", "jsonschema", "watchdog", "nvidia-ml-py", "rich", "shtab"}
    extras = sorted(line for line in required if "extra ==" in line)
    assert extras == [
        "backports-zstd>=1.0; (python_version < '3.14') and extra == 'audit'",
        "duckdb>=1.1; extra == 'fleet'",
        "msgspec>=0.19; extra == 'audit'",
        "msgspec>=0.19; extra == 'report'",
        "tensorflow>=2.16; extra == 'tensorflow'",
        "tensorflow[and-cuda]>=2.16; extra == 'cuda'",
        "vl-convert-python>=1.7; extra == 'report'",
    ]


def test_lowest_versions_are_those_that_are_tested() -> None:
    """`make test-lowest` installs exactly the lower bounds that pyproject.toml promises."""
    lines = (ROOT / ".ci/lowest.txt").read_text().splitlines()
    lowest = [line.replace("==", ">=") for line in lines if not line.startswith("#")]
    assert lowest == PROJECT["dependencies"]


# ---- the sdist


@pytest.mark.parametrize(
    "folder", ["tfenv", "tests", "schemas", "sample_configs", "docs", "benchmarks", "tools", ".ci"]
)
def test_sdist_is_complete(sdist: set[str], folder: str) -> None:
    """Whoever has the sdist can build, test and read everything."""
    expected = {name for name in checkout(folder, "*") if not name.endswith((".pyc", ".so"))}
    assert expected, f"{folder}/ is empty"
    assert expected - sdist == set()


def test_sdist_has_the_top_level(sdist: set[str]) -> None:
    """The files at the top that tools and readers need are in the sdist."""
    top = {"Makefile", "README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "PKG-INFO"}
    top |= {"CONTRIBUTING.md", "SECURITY.md", "mkdocs.yml", ".pre-commit-config.yaml", ".pre-commit-hooks.yaml"}
    assert top <= sdist


def test_sdist_has_nothing_built(sdist: set[str]) -> None:
    """No environment, no cache and nothing built gets into the sdist."""
    assert not [name for name in sdist if re.search(r"\.venv|__pycache__|\.pyc$|\.so$|^dist/|_cache/", name)]


# ---- the package itself


def test_import_loads_nothing() -> None:
    """`import tfenv` loads no other module of ours and none of the standard library."""
    program = "import sys; before = set(sys.modules); import tfenv; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "['tfenv']\n"


def test_public_names() -> None:
    """Every public name can be had, and a wrong one is an AttributeError that names it."""
    assert {"apply", "check", "explain", "status", "PolicyError", "__version__"} == set(tfenv.__all__)
    for name in tfenv.__all__:
        assert getattr(tfenv, name) is not None
        assert name in dir(tfenv)
    with pytest.raises(AttributeError, match="module 'tfenv' has no attribute 'aply'"):
        _ = tfenv.aply


def test_version_has_one_source() -> None:
    """The version stands in tfenv/__init__.py alone, and the changelog has a place for what comes."""
    assert PROJECT["dynamic"] == ["version"]
    assert re.search(r"^## .*unreleased", (ROOT / "CHANGELOG.md").read_text(), re.IGNORECASE | re.MULTILINE)
