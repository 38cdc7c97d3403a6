"""`--within` bounds how long a run takes, and says what it left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.selection import _shuffle_files

REPOSITORY = Path(__file__).parents[1]


def test_no_test_starts_when_the_time_is_over() -> None:
    """Each that is left over is skipped, with the reason, and the run succeeds."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-rs",
            "--within=-1",
            "tests/policy/test_units.py",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "no time was left" in done.stdout
    assert "passed" not in done.stdout


def test_all_workers_of_a_run_have_one_order_and_the_next_run_has_another() -> None:
    """A worker that had another order would run other tests than it is told. The tests of a file stay together."""
    names = [(f"test_{letter}.py", number) for letter in "abcdefghij" for number in range(3)]

    def shuffle(seed: str) -> list[tuple[str, int]]:
        items: list[Any] = [SimpleNamespace(path=Path(file), number=number) for file, number in names]
        _shuffle_files(items, seed)
        return [(item.path.name, item.number) for item in items]

    orders = [shuffle(seed) for seed in ("run 1", "run 1", "run 2")]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order) == names
        assert [number for _, number in order] == [0, 1, 2] * 10
