"""Everything that is wrong with a policy table, by the schema.

Loaded only when the generated validator said that something is: jsonschema takes 17 ms to import.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from tfenv.config.values import shown
from tfenv.policy.model import KeyPath

__all__ = ["Problem", "problems_of"]

_TYPES = {
    "object": "a table",
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "string": "a string",
}


@dataclass(frozen=True)
class Problem:
    """One thing the schema has against a policy table.

    Attributes:
        path: Inside the policy table.
        message: What is wrong and what would be right.
        unknown: The key is not known; without it the rest may well be right.
    """

    path: KeyPath
    message: str
    unknown: bool = False


def problems_of(table: Any, schema: Mapping[str, Any]) -> Iterator[Problem]:
    """List all problems, in the order in which the schema is read.

    Raises:
        ImportError: jsonschema is not installed.
    """
    from jsonschema import Draft7Validator  # type: ignore[import-untyped, unused-ignore]

    for error in Draft7Validator(schema).iter_errors(table):
        for leaf in _leaves(error):
            yield from _problems_at(leaf, schema)


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
            yield Problem((*path, name), _why_unknown(name, names, schema), unknown=True)


def _why_no_name(table: str, name: str) -> str:
    if table == "project":
        return f'{shown(name)} is no absolute path; write one that begins with "/", as in "/srv/vision"'
    return f"{shown(name)} is no name of a {table}; write it as `id` shows it"


def _why_unknown(name: str, names: list[str], schema: Mapping[str, Any]) -> str:
    import difflib

    close = difflib.get_close_matches(name.lower().replace("-", "_"), names, n=1, cutoff=0.6)
    if close:
        return f'unknown key {shown(name)}; did you mean "{close[0]}"?'
    home = [
        table for table in ("gpu", "ceiling", "audit", "machine") if name in _keys(schema["properties"][table], schema)
    ]
    if home:
        return f"unknown key {shown(name)} here; it belongs in " + " or ".join(f"[{table}]" for table in home)
    return f"unknown key {shown(name)}; known here: {', '.join(names)}"


def _message(error: Any, annotation: Mapping[str, Any]) -> str:
    """What a fault that no reader of values explains better is called."""
    value, wanted = error.instance, error.validator_value
    example = f"; write {shown(annotation['examples'][0])}" if annotation.get("examples") else ""
    if "enum" in annotation and error.validator in ("type", "enum"):
        return _why_no_word(value, annotation["enum"])
    if error.validator == "type" and wanted == "boolean":
        return f"{shown(value)} is neither true nor false; write true or false, without quotes"
    if error.validator == "type":
        return f"{shown(value)} is not {_TYPES[wanted]}{example if wanted != 'object' else ''}"
    if error.validator == "minimum":
        return f"{shown(value)} is too small; the smallest is {wanted}"
    if error.validator == "required":
        missing = [name for name in wanted if name not in value]
        return f'"{missing[0]}" is missing; write which GPUs this entry is about, as in match = "name:*A100*"'
    if error.validator == "minLength":
        return f"an empty string is of no use here{example}"
    return f"{shown(value)} is not understood{example}"


def _why_no_word(value: object, words: list[object]) -> str:
    import difflib

    texts = [shown(word) for word in words]
    close = difflib.get_close_matches(shown(value).lower(), texts, n=1)
    wrong = f"is none of {', '.join(texts)}" if len(texts) > 1 else "is not known"
    return f"{shown(value)} {wrong}; " + (f"did you mean {close[0]}?" if close else f"write {texts[0]}")


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
