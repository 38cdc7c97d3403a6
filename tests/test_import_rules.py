"""Who may import whom: the line errors ← policy ← … ← cli, held by walking every module's syntax tree."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Handed as text to the interpreter that they ask about, and never imported: there is nothing of ours around them.
TEXTS = {*(ROOT / "tfenv" / "cli" / "probes").glob("[a-z]*.py")}
#: PyInstaller runs them, while it freezes a program and when that starts. No module of ours imports them.
FOR_PYINSTALLER = {*(ROOT / "tfenv" / "deploy" / "pyinstaller").rglob("*tfenv.py")}
MODULES = sorted({*(ROOT / "tfenv").rglob("*.py")} - TEXTS - FOR_PYINSTALLER)

#: The rooms of the package from the ground up. A room may use those on lower floors; on one floor they are strangers.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("values", "dependencies", "files", "jobs", "machine_date"),
    ("errors",),
    ("policy",),
    ("identity",),
    ("config", "devices", "launchers", "sharing", "frameworks", "audit", "simulate"),
    ("pipeline",),
    ("runtime", "explanation", "lint", "watch", "deploy", "wall"),
    ("api", "jupyterhub", "policy_tests", "replay"),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
#: The package's own face, and `python -m tfenv`.
OUTSIDE = ("__init__", "__main__")

#: Who alone may import these.
OWNERS = {
    "tensorflow": ("frameworks",),
    "keras": ("frameworks",),
    "jax": ("frameworks",),
    "torch": ("frameworks",),
    "google": ("frameworks",),
    "pynvml": ("devices",),
    "watchdog": ("watch",),
    "msgspec": ("audit",),
    "vl_convert": ("audit",),
    "duckdb": ("audit",),
    "backports": ("audit",),
    "shtab": ("cli",),
}
#: Loaded only where they are needed, inside a function. (Commands may load what they print with.)
LATE = {"tomli", "structlog", "jsonschema", "pynvml", "rich", "watchdog", *OWNERS}
DECLARED = {"tomli", "structlog", "jsonschema", "pynvml", "rich", "watchdog", *OWNERS}
#: Type checkers know it without its being installed.
FOR_TYPE_CHECKERS = {"typing_extensions"}
#: The laws are pure: they ask neither the machine nor the clock.
IMPURE = {"os", "sys", "io", "pathlib", "subprocess", "socket", "shutil", "tempfile", "time", "datetime", "random"}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "tfenv").parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt | ast.expr]]:
    """Every module that is imported anywhere, also inside functions and for type checkers, in full."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "import_dependency":
            yield str(ast.literal_eval(node.args[0])), node
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full, as in `from tfenv.policy import model`"
            module = node.module or ""
            # `from tfenv import pipeline` imports tfenv.pipeline
            names = [f"tfenv.{alias.name}" for alias in node.names] if module == "tfenv" else [module]
            yield from ((name, node) for name in names)


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: functions do not, nor does what is for type checkers."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)


def violations(room: str, source: str) -> list[str]:
    """What a module in that room may not do, one line each."""
    tree = ast.parse(source)
    early = {id(node) for node in at_import(tree)}
    return [
        f"line {node.lineno}: {problem}"
        for name, node in imports(tree)
        for problem in _problems(room, name, early=id(node) in early)
    ]


def _problems(room: str, name: str, *, early: bool) -> Iterator[str]:
    top, *rest = name.split(".")
    if top == "tfenv" and rest:
        yield from _neighbours(room, rest[0])
    elif top in OWNERS and room not in OWNERS[top]:
        yield f"{top} is imported by {' and '.join(OWNERS[top])} alone"
    elif top not in {*sys.stdlib_module_names, *DECLARED, *FOR_TYPE_CHECKERS, "tfenv", "_tfenv_boot", "sitecustomize"}:
        yield f"{top} is not a dependency"
    if top in {*LATE, *FOR_TYPE_CHECKERS} and early and room != "cli":
        yield f"{top} is imported inside the function that needs it"
    if room == "policy" and top in IMPURE:
        yield f"policy is pure and imports no {top}"


def _neighbours(room: str, other: str) -> Iterator[str]:
    if other in {room, "__version__"} or room in OUTSIDE:
        return
    for unknown in {room, other} - FLOOR.keys():
        yield f"{unknown} has no floor"
        return
    if FLOOR[other] == FLOOR[room]:
        yield f"{room} and {other} are strangers"
    elif FLOOR[other] > FLOOR[room]:
        yield f"{room} is below {other}"


# ---- the package


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_keeps_the_rules(path: Path) -> None:
    """A module imports what is below it, what it owns, and late what is heavy."""
    assert violations(room_of(path), path.read_text()) == []


def test_every_room_has_a_floor() -> None:
    """A new room takes its place in the line before it is furnished."""
    assert {room_of(path) for path in MODULES} <= {*FLOOR, *OUTSIDE}


def test_nothing_imports_the_commands() -> None:
    """The commands are the top: apart from `python -m tfenv` nothing imports them."""
    users = {
        room_of(path)
        for path in MODULES
        for name, _ in imports(ast.parse(path.read_text()))
        if f"{name}.".startswith("tfenv.cli.")
    }
    assert users <= {"cli", "__main__"}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [("__init__.py", set()), ("runtime/finder.py", {"sys"}), ("deploy/pythonpath/sitecustomize.py", {"sys"})],
    ids=str,
)
def test_start_up_loads_nothing(module: str, allowed: set[str]) -> None:
    """What runs in every process imports sys at most, not even __future__, which is a file to be read."""
    tree = ast.parse((ROOT / "tfenv" / module).read_text())
    early = {id(node) for node in at_import(tree)}
    assert {name for name, node in imports(tree) if id(node) in early} <= allowed


def test_text_for_other_interpreters_stands_alone() -> None:
    """What is handed to an interpreter as text needs nothing but its standard library to start."""
    for text in TEXTS:
        tree = ast.parse(text.read_text())
        early = {id(node) for node in at_import(tree)}
        tops = {name.partition(".")[0] for name, node in imports(tree) if id(node) in early}
        assert tops <= set(sys.stdlib_module_names)
    assert TEXTS
    assert not [path for path in MODULES if "cli.probes" in path.read_text()]


# ---- the rules themselves


@pytest.mark.parametrize(
    ("room", "source", "problem"),
    [
        ("policy", "from tfenv.config import discover", "policy is below config"),
        ("policy", "def f():\n    import os", "policy is pure and imports no os"),
        ("errors", "import tfenv.policy.model", "errors is below policy"),
        ("audit", "def f(): import_dependency('pynvml')", "pynvml is imported by devices alone"),
        ("config", "from tfenv.launchers.grant import read_grant", "config and launchers are strangers"),
        ("config", "from tfenv import audit", "config and audit are strangers"),
        ("runtime", "from tfenv.watch import follow", "runtime and watch are strangers"),
        ("pipeline", "def f():\n    from tfenv.cli import main", "pipeline is below cli"),
        ("devices", "import pynvml", "pynvml is imported inside the function that needs it"),
        ("devices", "class A:\n    import pynvml", "pynvml is imported inside the function that needs it"),
        ("config", "def f():\n    import tensorflow.python", "tensorflow is imported by frameworks alone"),
        ("audit", "import requests", "requests is not a dependency"),
        ("audit", "from tfenv.storage import disk", "storage has no floor"),
    ],
)
def test_breaking_a_rule_is_seen(room: str, source: str, problem: str) -> None:
    """Each rule finds its own violation."""
    assert [found.partition(": ")[2] for found in violations(room, source)] == [problem]


def test_keeping_the_rules_is_not_complained_about() -> None:
    """Imports downwards, inside a room, and late ones of what is heavy are all right."""
    source = "import os\nfrom tfenv.errors import Finding\nfrom tfenv.config import document\n"
    source += "def f():\n    import tomli\nif TYPE_CHECKING:\n    import jsonschema\n"
    assert violations("config", source) == []
