"""Cases on simulated GPUs: `reports(case)` says what became of one; those of all selected tests run together."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest

from tests.frameworks.harness import Case, Report, Runner, cases_in

_announced: list[Case] = []


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All that starts programs needs TensorFlow."""
    for item in items:
        if {"reports", "needs_tensorflow"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.tensorflow)
            item.add_marker(pytest.mark.timeout(900))  # the first of a batch waits for all of it


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note the cases of the tests that were selected, so that they can share processes."""
    for item in session.items:
        spec = getattr(item, "callspec", None)
        for value in spec.params.values() if spec is not None else ():
            _announced.extend(cases_in(value))


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Case], Report]]:
    """What became of a case."""
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("TensorFlow is not installed")
    runner = Runner(tmp_path_factory.mktemp("cases"), _announced)
    yield runner.report
    runner.close()


@pytest.fixture(scope="session")
def needs_tensorflow() -> None:
    """For tests that start whole programs."""
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("TensorFlow is not installed")
