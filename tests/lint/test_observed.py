"""observed.py, and what else `check` says of tables under `[observe]`."""

from __future__ import annotations

import pytest

from tests.lint.test_combinations import CARDS, FIRST, list_codes
from tests.lint.test_reach import list_remarks

LIMIT = 'memory_limit = "8GiB"\n'


@pytest.mark.parametrize("table", ["ceiling", "gpu", "group.root.ceiling", "user.root.gpu", 'project."/".ceiling'])
def test_what_is_in_force_already_is_told(table: str) -> None:
    """The same value in the same table of the same file would change nothing. Another one would."""
    assert list_codes(f"[{table}]\n{LIMIT}[observe.{table}]\n{LIMIT}") == [("nothing-to-observe", 4)]
    assert list_codes(f'[{table}]\n{LIMIT}[observe.{table}]\nmemory_limit = "4GiB"\n') == []


def test_the_same_value_for_fewer_people_is_left_alone() -> None:
    """Whether it changes something depends on all other tables."""
    assert list_codes(f"[ceiling]\n{LIMIT}[observe.user.root.ceiling]\n{LIMIT}") == []


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[observe.ceiling]\nmax_devices = 1\n", "first-card-for-all"),
        ('[ceiling]\nmemory_limit = "4GiB"\n[observe.gpu]\nmemory_limit = "8GiB"\n', "above-ceiling"),
        ('[observe.gpu]\nvisible_devices = ["name:*H200*"]\n', "no-such-device"),
        ("[observe.ceiling]\nallowed_devices = [0]\n", "numbers-in-machine-layer"),
        (f"[ceiling]\nallowed_devices = [{FIRST}]\n[observe.gpu]\nvisible_devices = {{count = 2}}\n", "above-ceiling"),
    ],
)
def test_observed_tables_have_the_advice_of_all_others(text: str, code: str) -> None:
    """What would be hardly meant in force is hardly meant to be tried. Keys in force are told for themselves alone."""
    assert code in [found for found, _ in list_codes(text, inventory=CARDS)]
    assert len(list_codes(text, inventory=CARDS)) == 1


def test_a_ceiling_that_is_tried_says_nothing_of_keys_in_force() -> None:
    """It is the purpose of a trial that a limit in force would be above it."""
    assert list_codes('[gpu]\nmemory_limit = "8GiB"\n[observe.ceiling]\nmemory_limit = "4GiB"\n') == []


def test_names_that_nobody_has_are_told() -> None:
    """A table for nobody would be observed for nobody."""
    text = (
        "[observe.user.nobody-has-this.gpu]\n[observe.group.nobody-has-this.gpu]\n[observe.project.'/not-there'.gpu]\n"
    )
    assert list_remarks(tfgpu=text) == [
        ("unknown-user", "tfgpu", 1),
        ("unknown-group", "tfgpu", 2),
        ("unreachable-table", "tfgpu", 3),
    ]
