"""Frozen value classes: they behave as those that `dataclasses.dataclass(frozen=True)` makes."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from tfenv.policy.model import Origin, Setting
from tfenv.values import as_dict, field, frozen, replace


@frozen
class Point:
    """A value.

    Attributes:
        x: Required.
        y: With a default.
        tags: Made anew for each value.
    """

    x: int
    y: int = 0
    tags: dict[str, int] = field(default_factory=dict)


@frozen
class Named(Point):
    name: str = ""


@frozen
class Checked:
    size: int

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("negative")


def test_fields_are_given_by_position_by_name_or_by_default() -> None:
    """Fields keep the order in which the class names them, however they are given."""
    assert vars(Point(tags={"a": 1}, x=1)) == {"x": 1, "y": 0, "tags": {"a": 1}}
    assert list(vars(Point(tags={}, x=1))) == ["x", "y", "tags"]
    assert Point(1, 2) == Point(y=2, x=1)


@pytest.mark.parametrize(
    ("args", "given"), [((), {}), ((1, 2, {}, 4), {}), ((1,), {"x": 2}), ((1,), {"z": 2}), ((), {"y": 1})]
)
def test_wrong_fields_are_refused(args: tuple[object, ...], given: dict[str, object]) -> None:
    """A field too many, one that is missing, and one given twice are a TypeError that names the class."""
    with pytest.raises(TypeError, match="Point"):
        Point(*args, **given)  # type: ignore[arg-type]


def test_a_factory_makes_a_new_default_each_time() -> None:
    """Two values do not share a mutable default."""
    assert Point(1).tags is not Point(1).tags


def test_a_value_cannot_be_changed() -> None:
    """Setting and deleting a field raise AttributeError."""
    value = Point(1)
    with pytest.raises(AttributeError, match=r"Point\.x cannot be changed"):
        value.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError, match=r"Point\.x cannot be changed"):
        del value.x
    assert value == Point(1)


def test_values_are_equal_by_class_and_fields() -> None:
    """Another class with the same fields is another value; equal values have equal hashes."""
    assert Point(1) != Named(1)
    assert Point(1) != Point(2)
    assert hash(Checked(1)) == hash(Checked(1))


def test_a_subclass_adds_its_fields() -> None:
    """The fields of the base come first."""
    assert Named(1, 2, {}, "n") == Named(x=1, y=2, tags={}, name="n")
    assert repr(Named(1, name="n")) == "Named(x=1, y=0, tags={}, name='n')"


def test_replace_changes_some_fields_and_checks_again() -> None:
    """The original stays; `__post_init__` runs for the copy, too."""
    value = Checked(1)
    assert replace(value, size=2) == Checked(2)
    assert value == Checked(1)
    with pytest.raises(ValueError, match="negative"):
        replace(value, size=-1)
    with pytest.raises(TypeError, match="Checked"):
        replace(value, colour="red")


def test_a_field_may_be_called_value() -> None:
    """`replace` also changes a field that is called as its own argument is."""
    setting = Setting(1, Origin("user", "tfgpu.toml", ("gpu", "memory_growth")))
    assert replace(setting, value=2).value == 2


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_values_are_copied_and_pickled(again: object) -> None:
    """Other processes get equal values."""
    value = Named(1, 2, {"a": 1}, "n")
    assert again(value) == value  # type: ignore[operator]


def test_as_dict_gives_what_json_knows() -> None:
    """Values inside of values, tuples, sets and mappings are converted, too."""
    value = (Named(1, tags={"a": 1}), {"k": frozenset({Checked(3)})})
    expected = [{"x": 1, "y": 0, "tags": {"a": 1}, "name": ""}, {"k": [{"size": 3}]}]
    assert as_dict(value) == expected
    assert json.loads(json.dumps(as_dict(value))) == expected
