"""What is wrong with a policy table, by the schema.

Loaded only when the generated validator said that something is: jsonschema takes 17 ms to import, and a
millisecond for a value. So the generated validator judges each value, and jsonschema only explains.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from tfenv.config import _validator
from tfenv.config.values import quote_value
from tfenv.dependencies import import_dependency
from tfenv.policy.model import KeyPath
from tfenv.values import frozen

__all__ = ["SchemaExplainer", "Problem"]

#: Unknown keys that are compared with the known ones, in one file: comparing takes the time.
_MOST_COMPARED = 20

_TYPES = {
    "object": "a table",
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "string": "a string",
}


@frozen
class Problem:
    """One thing the schema has against a policy table.

    Attributes:
        path: Inside the policy table.
        message: What is wrong and what would be right.
        code: Of the finding it becomes.
    """

    path: KeyPath
    message: str
    code: str = "invalid-value"


class SchemaExplainer:
    """Says what the schema has against the values of one document.

    Raises:
        ImportError: jsonschema is not installed.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._explainer = import_dependency("jsonschema").Draft7Validator(schema)

    def sifted(self, policy: Mapping[str, object]) -> tuple[Mapping[str, object], Sequence[Problem]]:
        """The policy without unknown keys and without what is too much in its lists, and these as problems.

        A list is cut to its first entries: of a ceiling's devices, fewer are tighter.
        """
        sieve = _Pruner(self._schema)
        return cast("Mapping[str, object]", sieve.sifted(policy, self._schema, ())), sieve.problems

    def objection(self, path: KeyPath, value: object, *, explained: bool = True) -> Problem | None:
        """What is wrong with the value of one key or list entry, or None.

        Args:
            path: Where it stands.
            value: By itself; nothing beside it is looked at.
            explained: False: the message need not say more than that it is wrong.
        """
        if _validator.is_valid(_alone(path, value)):
            return None
        entry = _first_wrong_entry(path, value) if explained else None
        if entry is not None:
            return self.objection((*path, entry), cast("list[object]", value)[entry])
        problem = next(self._explanations(_alone(path, value)), None) if explained else None
        if problem is None:
            return Problem(path, f"{quote_value(value)} is not understood")
        return Problem((*path, *problem.path[len(path) :]), problem.message)

    def _explanations(self, table: object) -> Iterator[Problem]:
        try:
            leaves = [leaf for error in self._explainer.iter_errors(table) for leaf in _leaves(error)]
        except ValueError:
            # jsonschema quotes values, and Python refuses to write integers of thousands of digits.
            return
        for leaf in leaves:
            yield from (problem for problem in _problems_at(leaf, self._schema) if problem.code == "invalid-value")


def _first_wrong_entry(path: KeyPath, value: object) -> int | None:
    """Which entry of a list is wrong by itself: jsonschema would explain all of them, hundreds of times over."""
    if not isinstance(value, list) or not _validator.is_valid(_alone(path, [])):
        return None
    wrong = (number for number, entry in enumerate(value) if not _validator.is_valid(_alone((*path, number), entry)))
    return next(wrong, None)


def _alone(path: KeyPath, value: object) -> object:
    """A policy table that holds one value and nothing else."""
    for depth in reversed(range(len(path))):
        part = path[depth]
        if isinstance(part, int):
            value = [value]
        elif depth and isinstance(path[depth - 1], int) and part != "match":
            # An entry of [[gpu.device]] is none without its "match".
            value = {"match": 0, part: value}
        else:
            value = {part: value}
    return value


class _Pruner:
    """Goes through a policy once, along the schema."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self.problems: list[Problem] = []

    def sifted(self, value: object, entry: Mapping[str, Any], path: KeyPath) -> object:
        """A value without what the schema's entry for it does not know."""
        meant = _alternative(value, _resolved(entry, self._schema), self._schema)
        if isinstance(value, Mapping) and meant.get("type") == "object":
            return self._table(value, meant, path)
        if isinstance(value, list) and meant.get("type") == "array":
            items = enumerate(self._cut(value, meant, path))
            return [self.sifted(item, meant["items"], (*path, number)) for number, item in items]
        return value

    def _table(self, table: Mapping[str, object], entry: Mapping[str, Any], path: KeyPath) -> dict[str, object]:
        known = entry.get("properties", {})
        named = next(iter(entry.get("patternProperties", {}).values()), None)
        kept: dict[str, object] = {}
        for name, value in table.items():
            inner = known.get(name, named)
            if inner is not None:
                kept[name] = self.sifted(value, inner, (*path, name))
            else:
                self._unknown((*path, name), name, list(known))
        return kept

    def _unknown(self, path: KeyPath, name: str, known: list[str]) -> None:
        compared = len(self.problems) < _MOST_COMPARED
        message = _why_unknown(name, known, self._schema) if compared else f"unknown key {quote_value(name)}"
        self.problems.append(Problem(path, message, "unknown-key"))

    def _cut(self, items: list[object], entry: Mapping[str, Any], path: KeyPath) -> list[object]:
        most = entry.get("maxItems", len(items))
        if len(items) > most:
            message = f"{len(items)} entries are too many; the first {most} count, take the others out"
            self.problems.append(Problem(path, message, "too-many"))
        return items[:most]


def _alternative(value: object, entry: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one of several forms that a list or a table is meant to have; {} where that cannot be told."""
    if "anyOf" not in entry:
        return entry
    kind = "array" if isinstance(value, list) else "object"
    forms = [form for option in entry["anyOf"] if (form := _resolved(option, schema)).get("type") == kind]
    if isinstance(value, Mapping):
        forms = [form for form in forms if all(name in value for name in form.get("required", ()))]
    return forms[0] if len(forms) == 1 else {}


def _leaves(error: Any) -> Iterator[Any]:
    """Of alternatives that all fail, the faults of the one that was meant."""
    meant = _meant(error) if error.validator == "anyOf" else []
    if not meant:
        yield error
    for inner in meant:
        yield from _leaves(inner)


def _meant(error: Any) -> list[Any]:
    """The alternative whose kind of value this is: it fails only further inside, or by an unknown key."""
    alternatives: dict[int, list[Any]] = {}
    for inner in error.context:
        alternatives.setdefault(inner.schema_path[0], []).append(inner)
    fitting = [
        faults
        for faults in alternatives.values()
        if all(fault.path or fault.validator == "additionalProperties" for fault in faults)
    ]
    return fitting[0] if len(fitting) == 1 else []


def _problems_at(error: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
    path: KeyPath = tuple(error.absolute_path)
    if error.validator != "additionalProperties":
        yield Problem(path, _message(error, _annotation(schema, path)))
        return
    names = list(error.schema.get("properties", {}))
    patterns = list(error.schema.get("patternProperties", {}))
    for name in error.instance:
        if patterns and not any(re.search(pattern, name) for pattern in patterns):
            yield Problem((*path, name), _why_no_name(cast(str, path[-1]), name))
        elif not patterns and name not in names:
            yield Problem((*path, name), _why_unknown(name, names, schema), "unknown-key")


def _why_no_name(table: str, name: str) -> str:
    if table == "project":
        return f'{quote_value(name)} is no absolute path; write one that begins with "/", as in "/srv/vision"'
    return f"{quote_value(name)} is no name of a {table}; write it as `id` shows it"


def _why_unknown(name: str, names: list[str], schema: Mapping[str, Any]) -> str:
    import difflib

    close = difflib.get_close_matches(name.lower().replace("-", "_"), names, n=1, cutoff=0.6)
    if close:
        return f'unknown key {quote_value(name)}; did you mean "{close[0]}"?'
    home = [
        table for table in ("gpu", "ceiling", "audit", "machine") if name in _keys(schema["properties"][table], schema)
    ]
    if home:
        return f"unknown key {quote_value(name)} here; it belongs in " + " or ".join(f"[{table}]" for table in home)
    return f"unknown key {quote_value(name)}; known here: {', '.join(names)}"


def _message(error: Any, annotation: Mapping[str, Any]) -> str:
    """What a fault that no reader of values explains better is called."""
    value, wanted = error.instance, error.validator_value
    example = f"; write {quote_value(annotation['examples'][0])}" if annotation.get("examples") else ""
    if "enum" in annotation and error.validator in ("type", "enum"):
        return _why_no_word(value, annotation["enum"])
    if error.validator == "type" and wanted == "boolean":
        return f"{quote_value(value)} is neither true nor false; write true or false, without quotes"
    if error.validator == "type":
        return f"{quote_value(value)} is not {_TYPES[wanted]}{example if wanted != 'object' else ''}"
    if error.validator == "minimum":
        return f"{quote_value(value)} is too small; the smallest is {wanted}"
    if error.validator == "maximum":
        return f"{quote_value(value)} is too large; the largest is {wanted}"
    if error.validator == "required":
        missing = [name for name in wanted if name not in value]
        return f'"{missing[0]}" is missing; write which GPUs this entry is about, as in match = "name:*A100*"'
    if error.validator == "minLength":
        return f"an empty string is of no use here{example}"
    return f"{quote_value(value)} is not understood{example}"


def _why_no_word(value: object, words: list[object]) -> str:
    import difflib

    texts = [quote_value(word) for word in words]
    close = difflib.get_close_matches(quote_value(value).lower(), texts, n=1)
    wrong = f"is none of {', '.join(texts)}" if len(texts) > 1 else "is not known"
    return f"{quote_value(value)} {wrong}; " + (f"did you mean {close[0]}?" if close else f"write {texts[0]}")


# ---- what the schema says of a key


def _resolved(entry: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    for part in (entry, *entry.get("allOf", ())):
        if "$ref" in part:
            return _resolved(schema["definitions"][part["$ref"].rpartition("/")[2]], schema)
    return entry


def _keys(entry: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", _resolved(entry, schema).get("properties", {}))


def _annotation(schema: Mapping[str, Any], path: KeyPath) -> Mapping[str, Any]:
    """The entry of the schema that describes a key; {} for what has none of its own."""
    entry = schema
    for part in path:
        resolved = _resolved(entry, schema)
        if isinstance(part, int):
            entry = resolved.get("items", {})
        else:
            named = list(resolved.get("patternProperties", {}).values())
            entry = _keys(resolved, schema).get(part, named[0] if named else {})
    return entry
