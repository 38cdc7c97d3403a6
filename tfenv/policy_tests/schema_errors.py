"""Says what schemas/tfgpu-test.schema.json has against a file of tests, and what would be right."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from tfenv.config.schema import load_schema
from tfenv.config.schema_copy import TEST_COPY_NAME, flatten_schema
from tfenv.config.values import quote_value
from tfenv.dependencies import import_jsonschema
from tfenv.identity import suggest_name
from tfenv.policy.model import KeyPath

#: What is said of a key that is missing.
_MISSING = {
    "case": "has no cases; write [[case]], a name, and what is expected in [case.expect]",
    "name": 'has no name; write what it shows, as in name = "a student gets one GPU"',
    "expect": "expects nothing; write [case.expect] and below it what the process gets, as in devices = 1",
}
_EMPTY = "expects nothing; write what the process gets, as in devices = 1"


@cache
def _list_entries() -> Mapping[str, Mapping[str, Any]]:
    """Return what the schema says of each key, by its name. A name means the same wherever it stands."""
    entries: dict[str, Mapping[str, Any]] = {}
    waiting: list[Any] = [load_schema(TEST_COPY_NAME)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Mapping):
            for table in ("definitions", "properties"):
                named = node.get(table, {})
                entries |= {name: entry for name, entry in named.items() if "$ref" not in entry}
                waiting += named.values()
            waiting.append(node.get("items"))
    return entries


@cache
def _make_validator() -> Any:
    # Following references would take a fifth of the time.
    return import_jsonschema().Draft7Validator(flatten_schema(load_schema(TEST_COPY_NAME)))


def find_errors(table: object) -> Iterator[tuple[KeyPath, str]]:
    """Yield what is wrong with a file of tests: where, and what would be right.

    Args:
        table: As parsed, with dates as text.
    """
    try:
        errors = list(_make_validator().iter_errors(table))
    except ValueError:  # jsonschema quotes values, and Python refuses to write integers of thousands of digits
        yield (), "holds a number that is too long; write a smaller one"
        return
    for error in errors:
        yield from _explain(error)


def _explain(error: Any) -> Iterator[tuple[KeyPath, str]]:
    path: KeyPath = tuple(error.absolute_path)
    if error.validator == "additionalProperties":
        known = list(error.schema["properties"])
        unknown = [name for name in error.instance if name not in known]
        yield from (((*path, name), _describe_unknown_key(path, name, known)) for name in unknown)
    elif error.validator == "required":
        missing = [name for name in error.validator_value if name not in error.instance]
        yield path, _MISSING[missing[0]]
    elif error.validator in ("minProperties", "minItems") and path[-1:] != ("memory_limit",):
        yield path, _MISSING["case"] if path == ("case",) else _EMPTY
    else:
        yield path, _describe_wrong_value(path, error)


def _describe_unknown_key(path: KeyPath, name: str, known: list[str]) -> str:
    text = f"unknown key {quote_value(name)}"
    case = _list_entries()["case"]["items"]["properties"]
    if name in case and not path:
        return f"{text} here; write it into [defaults]"
    if name in case["expect"]["properties"]:
        return f"{text} here; write it into [case.expect]"
    meant = suggest_name(name.lower().replace("-", "_"), known)
    return f'{text}; did you mean "{meant}"?' if meant else f"{text}; known here: {', '.join(known)}"


def _describe_wrong_value(path: KeyPath, error: Any) -> str:
    key = next((part for part in reversed(path) if part in _list_entries()), "")
    entry, value = _list_entries().get(str(key), {}), quote_value(error.instance)
    if error.validator == "enum":
        words = [quote_value(word) for word in error.validator_value]
        meant = suggest_name(value, words)
        return f"{value} is none of {', '.join(words)}; " + (f"did you mean {meant}?" if meant else f"write {words[0]}")
    if error.validator == "type" and error.validator_value == "boolean":
        return f"{value} is not true or false; write {key} = true"
    examples = [f"{key} = {_format_example(example)}" for example in entry.get("examples", ())]
    return f"{value} is not understood; write " + (" or ".join(examples) if examples else "a table")


def _format_example(example: object) -> str:
    if isinstance(example, Mapping):
        return "{ " + ", ".join(f"{key} = {_format_example(value)}" for key, value in example.items()) + " }"
    return json.dumps(example, ensure_ascii=False)
