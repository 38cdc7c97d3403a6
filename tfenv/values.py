"""Frozen value classes that cost almost nothing to define.

`dataclasses` compiles six methods for each class it makes, 0.3 to 0.5 ms in all. Every program under a policy would
pay that for some sixty classes before its first line runs. The methods made here are closures: 0.02 ms a class.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from typing_extensions import dataclass_transform

    _T = TypeVar("_T")


class _Missing:
    """Marks a field without a default."""


class _Factory:
    """Marks a default that is made anew for each instance."""

    def __init__(self, make: "Callable[[], object]") -> None:
        self.make = make


def field(*, default_factory: "Callable[[], object]") -> "Any":
    """Return a default that is made anew for each instance, as `dataclasses.field` does."""
    return _Factory(default_factory)


def _frozen(cls: "Any") -> "Any":
    """Give a class with annotated fields what `dataclasses.dataclass(frozen=True)` gives it.

    A subclass adds its fields to those of its base. `__post_init__` is called where there is one.
    """
    names = (*getattr(cls, "__match_args__", ()), *cls.__annotations__)
    _add_construction(cls, names)
    _add_comparison(cls, names)
    cls.__setattr__ = cls.__delattr__ = _refuse_change
    cls.__match_args__ = names  # type: ignore[misc]
    return cls


def _add_construction(cls: "Any", names: "tuple[str, ...]") -> None:
    defaults = {name: getattr(cls, name, _Missing) for name in names}
    required = [name for name, default in defaults.items() if default is _Missing]
    factories = [(name, default.make) for name, default in defaults.items() if isinstance(default, _Factory)]
    finish = getattr(cls, "__post_init__", None)

    def initialize(self: "Any", *args: object, **given: object) -> None:
        values = defaults.copy()
        values.update(zip(names, args))  # noqa: B905 - the lengths are compared below
        values.update(given)
        if len(args) > len(names) or len(values) > len(names) or not given.keys().isdisjoint(names[: len(args)]):
            raise TypeError(f"{cls.__name__} has the fields {', '.join(names)}; given were {args} and {given}")
        for name in required:
            if values[name] is _Missing:
                raise TypeError(f"{cls.__name__} needs a value for {name}")
        for name, make in factories:
            if isinstance(values[name], _Factory):
                values[name] = make()
        self.__dict__.update(values)
        if finish is not None:
            finish(self)

    cls.__init__ = initialize


def _add_comparison(cls: "Any", names: "tuple[str, ...]") -> None:
    def is_equal(self: "Any", other: object) -> bool:
        if other.__class__ is not self.__class__:
            return NotImplemented  # type: ignore[no-any-return]
        mine, theirs = self.__dict__, other.__dict__
        return not any(mine[name] != theirs[name] for name in names)

    def get_hash(self: "Any") -> int:
        return hash(tuple([self.__dict__[name] for name in names]))

    def get_text(self: "Any") -> str:
        return f"{cls.__qualname__}({', '.join(f'{name}={self.__dict__[name]!r}' for name in names)})"

    cls.__eq__, cls.__hash__, cls.__repr__ = is_equal, get_hash, get_text


def _refuse_change(self: "Any", name: str, *_: object) -> None:
    raise AttributeError(f"{type(self).__name__}.{name} cannot be changed: the value is frozen")


def _replace(value: "Any", /, **changes: object) -> "Any":
    """Return a copy of a frozen value with some fields changed."""
    values = {name: value.__dict__[name] for name in value.__match_args__}
    return value.__class__(**{**values, **changes})


def as_dict(value: "Any") -> "Any":
    """Return a frozen value as JSON has it: values and mappings as dictionaries, sequences and sets as lists."""
    if isinstance(value, dict):
        return {name: as_dict(inner) for name, inner in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [as_dict(inner) for inner in value]
    if type(value).__setattr__ is _refuse_change:
        return {name: as_dict(value.__dict__[name]) for name in value.__match_args__}
    return value


if TYPE_CHECKING:

    @dataclass_transform(frozen_default=True, field_specifiers=(field,))
    def frozen(cls: type[_T]) -> type[_T]: ...

    def replace(value: _T, /, **changes: Any) -> _T: ...
else:
    frozen, replace = _frozen, _replace
