"""Which tests a run of pytest runs: those of `make test`, or with `--exhaustive` those of `make test-all`, too.

`@pytest.mark.exhaustive` is for a test, or for one of its parameters, that only `make test-all` runs. With
`--exhaustive` it is also on the tests that do more then: properties try 2,000 examples in the place of 100, and a test
that asks for the fixture `exhaustive` decides by itself. So `--exhaustive -m exhaustive` is what `make test` left out.

`--within SECONDS` starts no test later than that. The files are then in another order in every run, so each has its
turn. The tests that are left over are skipped, and say so.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Collection, Generator, Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.environments import find_quick_pythons

#: How long an example takes says more about the machine's load than about the example.
_COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("quick", _COMMON, max_examples=100)
settings.register_profile("exhaustive", _COMMON, max_examples=2_000)

#: When the last test may start, by `time.monotonic`.
_LAST_START = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run also what only `make test-all` runs")
    parser.addoption("--within", type=float, metavar="SECONDS", help="start no test after so many seconds")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the number of examples before the first module with properties is imported."""
    settings.load_profile("exhaustive" if config.getoption("--exhaustive") else "quick")
    seconds = config.getoption("--within")
    if seconds is not None:
        config.stash[_LAST_START] = time.monotonic() + seconds


def mark_rest(names: Iterable[str], quick: Collection[str]) -> list[object]:
    """Return a parameter for each name. Those that are not in `quick` are only for `make test-all`."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.exhaustive]) for name in names]


@pytest.fixture(scope="session")
def exhaustive(pytestconfig: pytest.Config) -> bool:
    """Whether everything is wanted. A test that asks for this runs in `make test`, and once more in `make test-all`."""
    return bool(pytestconfig.getoption("--exhaustive"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None, None, None]:
    """Mark before `-m` selects. Afterwards leave out what is not for this run, and sort."""
    everything = config.getoption("--exhaustive")
    for item in items:
        if _is_for_other_pythons(item):
            item.add_marker(pytest.mark.exhaustive)
        elif everything and _does_more(item):
            item.add_marker(pytest.mark.exhaustive)
            item.add_marker(pytest.mark.timeout(900))
    yield
    if not everything:
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
    if _LAST_START in config.stash:
        _shuffle_files(items, seed=getattr(config, "workerinput", {}).get("testrunuid", str(time.time())))
    else:
        _put_costly_files_first(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what comes too late for `--within`, before its fixtures are made."""
    if time.monotonic() > item.config.stash.get(_LAST_START, float("inf")):
        pytest.skip("no time was left")


def _is_for_other_pythons(item: pytest.Item) -> bool:
    """Whether the test is about an interpreter that is neither the oldest nor the newest one here."""
    python = _parameters(item).get("python")
    return python is not None and python not in find_quick_pythons()


def _does_more(item: pytest.Item) -> bool:
    function = getattr(item, "function", None)
    return getattr(function, "is_hypothesis_test", False) or "exhaustive" in getattr(item, "fixturenames", ())


def _parameters(item: pytest.Item) -> dict[str, object]:
    spec = getattr(item, "callspec", None)
    return {} if spec is None else dict(spec.params)


def _put_costly_files_first(items: list[pytest.Item]) -> None:
    """Sort the files, so that no worker is alone with a long one in the end: those with most of TensorFlow first."""
    costly: Counter[Path] = Counter(item.path for item in items if item.get_closest_marker("tensorflow"))
    items.sort(key=lambda item: -costly[item.path])


def _shuffle_files(items: list[pytest.Item], seed: str) -> None:
    """Put the files into an order that is the same for all workers of a run, and another in the next run."""
    files = sorted({item.path for item in items})
    random.Random(seed).shuffle(files)
    place = {path: number for number, path in enumerate(files)}
    items.sort(key=lambda item: place[item.path])
