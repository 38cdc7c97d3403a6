"""What the schema says of one place in a policy table. Loaded only for a document that the schema does not accept."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

from tfenv.config import _validator
from tfenv.policy.model import KeyPath


class SchemaLookup:
    """Answers questions about single places by the JSON Schema.

    Attributes:
        schema: The whole schema.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.schema = schema
        #: What `find_entry` has found. Thousands of keys have few parents.
        self._entries: dict[KeyPath, Mapping[str, Any]] = {(): schema}

    def accepts(self, path: KeyPath, value: object) -> bool:
        """Return whether a value is right at a place, whatever stands beside it."""
        return _validator.is_valid(isolate(path, value))

    def list_known_keys(self, path: KeyPath, table: Mapping[str, object]) -> Collection[str] | None:
        """Return the keys that a table may have. None if its keys are names that people choose, or cannot be told."""
        form = self._find_form(path, table)
        return None if form.get("type") != "object" else cast("Collection[str] | None", form.get("properties"))

    def find_most_entries(self, path: KeyPath, entries: list[object]) -> int:
        """Return how many entries a list may have. Where the schema sets no bound, as many as it has."""
        return cast("int", self._find_form(path, entries).get("maxItems", len(entries)))

    def find_entry(self, path: KeyPath) -> Mapping[str, Any]:
        """Return the part of the schema that describes a key. {} if the schema does not describe it by itself."""
        if path not in self._entries:
            self._entries[path] = self._find_child(self.find_entry(path[:-1]), path[-1])
        return self._entries[path]

    def _find_child(self, entry: Mapping[str, Any], part: str | int) -> Mapping[str, Any]:
        resolved = self._resolve(entry)
        if isinstance(part, int):
            return cast("Mapping[str, Any]", resolved.get("items", {}))
        named: list[Mapping[str, Any]] = list(resolved.get("patternProperties", {}).values())
        return cast("Mapping[str, Any]", resolved.get("properties", {}).get(part, named[0] if named else {}))

    def _find_form(self, path: KeyPath, value: Mapping[str, object] | list[object]) -> Mapping[str, Any]:
        """Return the one of several forms that a list or a table is meant to have. {} if that cannot be told."""
        entry = self._resolve(self.find_entry(path))
        if "anyOf" not in entry:
            return entry
        kind = "array" if isinstance(value, list) else "object"
        forms = [form for option in entry["anyOf"] if (form := self._resolve(option)).get("type") == kind]
        forms = [form for form in forms if all(name in value for name in form.get("required", ()))]
        return forms[0] if len(forms) == 1 else {}

    def _resolve(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        for part in (entry, *entry.get("allOf", ())):
            if "$ref" in part:
                return self._resolve(self.schema["definitions"][part["$ref"].rpartition("/")[2]])
        return entry


def isolate(path: KeyPath, value: object) -> object:
    """Return a policy table that holds one value at its place, and nothing else."""
    for depth in reversed(range(len(path))):
        part = path[depth]
        if isinstance(part, int):
            value = [value]
        elif depth and isinstance(path[depth - 1], int) and part != "match":
            # An entry of [[gpu.device]] is wrong without its "match".
            value = {"match": 0, part: value}
        else:
            value = {part: value}
    return value
