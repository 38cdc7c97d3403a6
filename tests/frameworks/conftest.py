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


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All that starts programs needs TensorFlow."""
    for item in items:
        if {"reports", "needs_tensorflow"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.tensorflow)
            item.add_marker(pytest.mark.timeout(900))  # the first of a batch waits for all of it


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note the cases of the tests that were selected, so that those of one file can share processes."""
    for item in session.items:
        spec = getattr(item, "callspec", None)
        for value in spec.params.values() if spec is not None else ():
            _announced[item.path].extend(cases_in(value))


@pytest.fixture(scope="module")
def reports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, needs_tensorflow: None
) -> Iterator[Callable[[Case], Report]]:
    """What became of a case."""
    runner = Runner(tmp_path_factory.mktemp("cases"), _announced[request.path])
    yield runner.report
    runner.close()


@pytest.fixture(scope="session")
def needs_tensorflow() -> None:
    """For tests that start whole programs."""
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("TensorFlow is not installed")
