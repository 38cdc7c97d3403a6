"""Cases on simulated GPUs: `reports(case)` says what became of one. Those of a file run together."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.frameworks.harness import Case, Report, Runner, cases_in

#: The cases of each file.
_announced: defaultdict[Path, list[Case]] = defaultdict(list)


#: The module that a framework's tests need beside its package.
_MODULES = {"tensorflow": "tensorflow", "jax": "jax_plugins", "torch": "torch"}


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All that starts programs needs the framework of its folder, or TensorFlow."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        needed = {name for name in _MODULES if f"needs_{name}" in fixtures}
        if "reports" in fixtures:
            needed.add(_find_framework(item.path))
        for name in needed:
            item.add_marker(name)
            item.add_marker(pytest.mark.timeout(900))  # the first of a batch waits for all of it


def _find_framework(path: Path) -> str:
    return path.parent.name if path.parent.name in _MODULES else "tensorflow"


def _need(framework: str) -> None:
    if importlib.util.find_spec(framework) is None or importlib.util.find_spec(_MODULES[framework]) is None:
        pytest.skip(f"{framework} is not installed, or cannot use GPUs")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note the cases of the tests that were selected, so that those of one file can share processes."""
    for item in session.items:
        spec = getattr(item, "callspec", None)
        for value in spec.params.values() if spec is not None else ():
            _announced[item.path].extend(cases_in(value))


@pytest.fixture(scope="module")
def reports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Case], Report]]:
    """What became of a case."""
    _need(_find_framework(request.path))
    runner = Runner(tmp_path_factory.mktemp("cases"), _announced[request.path])
    yield runner.report
    runner.close()


@pytest.fixture(scope="session")
def needs_tensorflow() -> None:
    """For tests that start whole programs."""
    _need("tensorflow")


@pytest.fixture(scope="session")
def needs_jax() -> None:
    """For tests that start whole programs with JAX on GPUs."""
    _need("jax")


@pytest.fixture(scope="session")
def needs_torch() -> None:
    """For tests that start whole programs with PyTorch."""
    _need("torch")
