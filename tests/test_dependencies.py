"""What a program has beside itself is not taken for a dependency of ours, and stays the program's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
NAMES = ["tomli", "structlog", "pynvml", "jsonschema"]


def run(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(text)
    return subprocess.run(
        [sys.executable, str(folder / "program.py")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_beside_the_program_is_neither_run_nor_replaced(tmp_path: Path, name: str, *, first: bool) -> None:
    """Ours is imported apart. The program's own import gives its own file, whichever came first."""
    (tmp_path / f"{name}.py").write_text("print('the program\\'s own')\nMINE = True\n")
    own = f"import {name}\nassert {name}.MINE\n"
    ours = (
        "from tfenv.dependencies import import_dependency\n"
        f"found = import_dependency('{name}')\n"
        "assert not hasattr(found, 'MINE') and found is import_dependency(found.__name__)\nprint('ours')\n"
    )
    done = run(tmp_path, own + ours if first else ours + own)
    lines = ["the program's own", "ours"]
    assert (done.returncode, done.stdout.splitlines()) == (0, lines if first else lines[::-1]), done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_an_installed_package_is_the_one_everybody_gets(tmp_path: Path, name: str) -> None:
    """Without a file of that name there is one module, the program's and ours."""
    ours = "from tfenv.dependencies import import_dependency\n"
    text = f"{ours}import {name}\nassert import_dependency('{name}') is {name}\n"
    done = run(tmp_path, text)
    assert done.returncode == 0, done.stderr


def test_what_is_not_installed_is_an_import_error(tmp_path: Path) -> None:
    """Only something else of that name: the caller hears what Python says."""
    (tmp_path / "no_such_package.py").write_text("raise SystemExit(7)\n")
    text = "from tfenv.dependencies import import_dependency\nimport_dependency('no_such_package')\n"
    done = run(tmp_path, text)
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


# ---- jsonschema

IRI = "jsonschema.FormatChecker(['iri']).conforms({!r}, 'iri')"


@pytest.mark.parametrize(
    "use", [IRI.format("http://a/\N{SNOWMAN}"), "__import__('rfc3987_syntax').is_valid_syntax('iri', 'http://a/')"]
)
def test_grammars_that_jsonschema_would_compile_wait_for_somebody_who_uses_them(tmp_path: Path, use: str) -> None:
    """The import of jsonschema is ours and the program's. Formats are checked as ever, by the real module."""
    pytest.importorskip("rfc3987_syntax")
    text = (
        "import sys\nfrom tfenv.dependencies import import_jsonschema\njsonschema = import_jsonschema()\n"
        "assert sys.modules['jsonschema'] is jsonschema\nassert not {'lark', 'rfc3987_syntax'} & set(sys.modules)\n"
        f"assert {use}\nassert not {IRI.format('no iri')}\nassert 'lark' in sys.modules\n"
    )
    done = run(tmp_path, text)
    assert done.returncode == 0, done.stderr


def test_without_those_grammars_jsonschema_knows_no_such_format(tmp_path: Path) -> None:
    """Nothing stands in for what is not installed."""
    hide = (
        "import sys, importlib.machinery as machinery\nsys.modules['rfc3987_syntax'] = None\nimport jsonschema\n"
        "known = set(jsonschema.FormatChecker().checkers)\n"
        "for name in list(sys.modules):\n    if name.startswith(('jsonschema', 'rfc3987')): del sys.modules[name]\n"
        "find = machinery.PathFinder.find_spec\n"
        "machinery.PathFinder.find_spec = lambda name, *_: None if name == 'rfc3987_syntax' else find(name, *_)\n"
    )
    ours = "from tfenv.dependencies import import_jsonschema\n"
    done = run(tmp_path, f"{hide}{ours}assert set(import_jsonschema().FormatChecker().checkers) == known\n")
    assert done.returncode == 0, done.stderr
