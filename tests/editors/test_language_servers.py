"""What editors make of a tfgpu.toml: the language servers that they run, on files that `tfgpu init` writes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.editors.language_server import LanguageServer
from tests.pages import DOCS, blocks

#: Even Better TOML in VS Code and many others run taplo's server. tombi's has an extension for the same editors.
SERVERS = ("taplo", "tombi")
EDITORS = next(page for page in DOCS if page.name == "editors.md")
POLICY = """\
#:schema ./tfgpu.schema.json

[gpu]
memory_growth = "yes"

"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a project in which `tfgpu init` wrote a policy."""
    subprocess.run([sys.executable, "-m", "tfenv", "init"], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[LanguageServer]:
    """Return a language server that has the project open."""
    running = LanguageServer(request.param, folder)
    yield running
    running.close()


def test_a_wrong_value_is_marked(server: LanguageServer, folder: Path) -> None:
    """The editor marks a value of the wrong type, in its line, and says which type is right."""
    path = folder / "tfgpu.toml"
    path.write_text(POLICY)
    server.open(path)
    (problem,) = server.wait_for_diagnostics(path)
    assert problem["range"]["start"]["line"] == 3
    assert "boolean" in problem["message"].lower()


def test_keys_are_completed(server: LanguageServer, folder: Path) -> None:
    """On an empty line of [gpu] the editor offers its keys that are not there yet."""
    path = folder / "tfgpu.toml"
    path.write_text(POLICY)
    server.open(path)
    server.wait_for_diagnostics(path)
    offered = {item["label"] for item in server.complete(path, 4, 0)}
    assert {"memory_limit", "visible_devices", "allocator"} <= offered
    assert "memory_growth" not in offered


def test_a_key_is_described(server: LanguageServer, folder: Path) -> None:
    """The editor shows the description of the key itself, not the one of its type."""
    path = folder / "tfgpu.toml"
    path.write_text(POLICY + 'memory_limit = "8GiB"\n')
    server.open(path)
    server.wait_for_diagnostics(path)
    assert "may take together" in server.hover(path, 5, 3)


def test_what_init_writes_has_no_mark(server: LanguageServer, folder: Path) -> None:
    """The editor has nothing against the file of `tfgpu init`, and finds the one mistake that is put into it."""
    path = folder / "tfgpu.toml"
    text = path.read_text()
    path.write_text(f"{text}\n[machin]\nallow_disable = false\n")
    server.open(path)
    # taplo marks the whole document and each of its keys.
    (message,) = {problem["message"] for problem in server.wait_for_diagnostics(path)}
    assert '"machin"' in message.replace("'", '"')


def test_a_day_is_a_date_of_toml(server: LanguageServer, folder: Path) -> None:
    """The editor takes `expires` without quotes, checks the tables under [observe], and completes their keys."""
    path = folder / "tfgpu.toml"
    observed = '[observe.user.carol.ceiling]\nmax_devices = "two"\n\n'
    path.write_text(f'#:schema ./tfgpu.schema.json\n[user.carol]\nexpires = 2027-01-31\nreason = "thesis"\n{observed}')
    server.open(path)
    (problem,) = server.wait_for_diagnostics(path)
    assert problem["range"]["start"]["line"] == 5
    assert "integer" in problem["message"].lower()
    assert {"memory_limit", "memory_total"} <= {item["label"] for item in server.complete(path, 6, 0)}
    assert "may have on any GPU" in server.hover(path, 5, 3) or "GPUs" in server.hover(path, 5, 3)


def test_a_policy_in_pyproject_is_checked_by_tombi(folder: Path) -> None:
    """With the tombi.toml that the page shows, tombi checks and completes [tool.tfgpu] of a pyproject.toml."""
    (settings,) = (block for block in blocks("text", pages=[EDITORS]) if block.text.startswith("# tombi.toml"))
    (folder / "tombi.toml").write_text(settings.text)
    path = folder / "pyproject.toml"
    path.write_text('[project]\nname = "x"\nversion = "1"\n\n[tool.tfgpu.gpu]\nmemory_growth = "yes"\n\n')
    running = LanguageServer("tombi", folder)
    running.open(path)
    (problem,) = running.wait_for_diagnostics(path)
    assert problem["range"]["start"]["line"] == 5
    assert "memory_limit" in {item["label"] for item in running.complete(path, 6, 0)}
    running.close()
