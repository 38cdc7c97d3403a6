"""Explains what is wrong with a document, by the schema.

Loaded only when something is: jsonschema takes 20 ms or more to import, and a millisecond for a value. So the generated
validator decides what is wrong, and jsonschema only explains.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from tfenv.config.document import Document
from tfenv.config.odd_characters import describe_odd_text
from tfenv.config.schema_lookup import SchemaLookup, isolate
from tfenv.config.values import DocumentFault, quote_value
from tfenv.dependencies import import_jsonschema
from tfenv.errors import Finding, Severity
from tfenv.policy.model import KeyPath, format_key

#: Findings that are listed for one file. The others are counted.
_MOST_FINDINGS = 100
#: Unknown keys that are compared with the known ones, in one file: comparing takes the time.
_MOST_COMPARED = 20
_WARNINGS = ("unknown-key", "newer-version", "allocator-without-limit", "observe-not-here")
#: What is said of faults that neither the schema nor the reader of a value explains.
_MESSAGES = {
    "machine-layer-only": "[{key}] counts only in the machine's file, /etc/tfgpu/tfgpu.toml; remove it from this file",
    "observe-not-here": "[observe] counts only in the machine's, the site's and your own file; remove it here",
    "incomplete-install": "wrong, but tfenv is incomplete and cannot explain why; install tfenv again ({value})",
    "allocator-without-limit": '"{value}" does not keep a memory limit; write allocator = "bfc", which is used instead',
}
#: Tables of which an unknown key may be meant to be.
_HOMES = ("gpu", "ceiling", "audit", "machine")
_TYPES = {
    "object": "a table",
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "string": "a string",
}


def explain_faults(document: Document, faults: list[DocumentFault], lookup: SchemaLookup | None) -> tuple[Finding, ...]:
    """Return a finding with its place for each fault, in the order of the file.

    Args:
        document: Where the faults are.
        faults: What is wrong, as it was found.
        lookup: The schema. None if it has nothing against the document.

    Raises:
        ImportError: The schema has something against it, and jsonschema is not installed.
    """
    explainer = None if lookup is None else SchemaExplainer(lookup)
    ordered = sorted(faults, key=lambda fault: fault.pruned)
    most_compared = sum(not fault.pruned for fault in faults) + _MOST_COMPARED
    findings = [
        _make_finding(document, fault, explainer, compare=number < most_compared)
        for number, fault in enumerate(ordered[:_MOST_FINDINGS])
    ]
    findings.sort(key=lambda finding: (finding.line or 0, finding.column or 0))
    if unlisted := ordered[_MOST_FINDINGS:]:
        message = f"… and {len(unlisted)} more; correct the listed ones first"
        severity: Severity = "warning" if all(fault.kind in _WARNINGS for fault in unlisted) else "error"
        findings.append(Finding("more-findings", message, severity, document.source.path))
    return tuple(findings)


def _make_finding(
    document: Document, fault: DocumentFault, explainer: SchemaExplainer | None, *, compare: bool
) -> Finding:
    path, message = fault.path, fault.message or ""
    if fault.kind in _MESSAGES:
        message = _MESSAGES[fault.kind].format(key=format_key(path), value=fault.value)
    elif path in (("expires",), ("reason",)):
        message = _explain_misplaced_term(document, str(path[0]))
    elif explainer is not None and fault.pruned:
        message = explainer.explain_pruned(fault, compare=compare)
    elif explainer is not None and (found := explainer.explain(path, fault.value)) is not None:
        # The reader of a value says it better, but not where in a list or table.
        path, message = found[0], fault.message or found[1]
    message = _add_odd_character(fault, message)
    severity: Severity = "warning" if fault.kind in _WARNINGS else "error"
    line, column = document.find_position(path) or (None, None)
    return Finding(fault.kind, message, severity, document.source.path, line, column, format_key(path) or None)


def _explain_misplaced_term(document: Document, name: str) -> str:
    """Return where the end or the reason of a table belongs that somebody wrote at the top of a file."""
    scope = document.source.scope
    table = "user.NAME" if scope is None else format_key(scope)
    tables = f"[{table}], and the keys that are to end under [{table}.gpu] and [{table}.ceiling]"
    return f"a file has no {'end' if name == 'expires' else 'reason'}; write {name} under {tables}"


def _add_odd_character(fault: DocumentFault, message: str) -> str:
    """Add the character that nobody can see, or that looks like another one, if the text has one."""
    text = fault.path[-1] if fault.kind == "unknown-key" and fault.path else fault.value
    texts = text if isinstance(text, list) else text.values() if isinstance(text, Mapping) else (text,)
    odd = (describe_odd_text(entry) for entry in texts if isinstance(entry, str))
    found = next((described for described in odd if described is not None), None)
    return message if found is None else f"{message}; {found}"


class SchemaExplainer:
    """Says what the schema has against a value.

    Raises:
        ImportError: jsonschema is not installed.
    """

    def __init__(self, lookup: SchemaLookup) -> None:
        self._lookup = lookup
        self._jsonschema = import_jsonschema().Draft7Validator(lookup.schema)

    def explain(self, path: KeyPath, value: object) -> tuple[KeyPath, str] | None:
        """Return what is wrong with the value of one key or list entry, and where inside it.

        Args:
            path: Where it stands.
            value: The value by itself. Nothing beside it is looked at.

        Returns:
            The path of what is wrong, and what would be right. None: nothing is wrong.
        """
        if self._lookup.accepts(path, value):
            return None
        entry = self._find_wrong_entry(path, value)
        if entry is not None:
            return self.explain((*path, entry), cast("list[object]", value)[entry])
        found = next(self._explain_alone(isolate(path, value)), None)
        if found is None:
            return path, f"{quote_value(value)} is not understood"
        return (*path, *found[0][len(path) :]), found[1]

    def explain_pruned(self, fault: DocumentFault, *, compare: bool) -> str:
        """Return what is wrong with an unknown key, or with a list of too many entries.

        Args:
            fault: One of the two.
            compare: Look for a known key that was probably meant.
        """
        if fault.kind == "too-many":
            entries = cast("list[object]", fault.value)
            most = self._lookup.find_most_entries(fault.path, entries)
            return f"{len(entries)} entries are too many; only the first {most} count, remove the others"
        if compare:
            return self._explain_unknown(fault.path, cast("Mapping[str, object]", fault.value))
        return f"unknown key {quote_value(fault.path[-1])}"

    def _find_wrong_entry(self, path: KeyPath, value: object) -> int | None:
        """Find the first wrong entry of a list. jsonschema would explain each of them, hundreds of times over."""
        if not isinstance(value, list) or not self._lookup.accepts(path, []):
            return None
        wrong = (number for number, entry in enumerate(value) if not self._lookup.accepts((*path, number), entry))
        return next(wrong, None)

    def _explain_alone(self, table: object) -> Iterator[tuple[KeyPath, str]]:
        try:
            errors = [error for found in self._jsonschema.iter_errors(table) for error in _list_meant_errors(found)]
        except ValueError:
            # jsonschema quotes values, and Python refuses to write integers of thousands of digits.
            return
        for error in errors:
            yield from self._explain_error(error)

    def _explain_error(self, error: Any) -> Iterator[tuple[KeyPath, str]]:
        path: KeyPath = tuple(error.absolute_path)
        if error.validator != "additionalProperties":
            yield path, _describe_error(error, self._lookup.find_entry(path))
            return
        patterns = list(error.schema.get("patternProperties", {}))
        for name in error.instance if patterns else ():
            if not any(re.search(pattern, name) for pattern in patterns):
                yield (*path, name), _describe_wrong_name(cast("str", path[-1]), name)

    def _explain_unknown(self, path: KeyPath, table: Mapping[str, object]) -> str:
        import difflib

        name = str(path[-1])
        known = list(self._lookup.list_known_keys(path[:-1], table) or ())
        close = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.6)
        if close:
            return f'unknown key {quote_value(name)}; did you mean "{close[0]}"?'
        homes = [f"[{home}]" for home in _HOMES if name in (self._lookup.list_known_keys((home,), {}) or ())]
        if homes:
            return f"unknown key {quote_value(name)} here; it belongs in {' or '.join(homes)}"
        return f"unknown key {quote_value(name)}; known here: {', '.join(known)}"


def _list_meant_errors(error: Any) -> Iterator[Any]:
    """Give the error itself, or where all alternatives fail the errors of the one that was meant."""
    meant = _find_meant_form(error) if error.validator == "anyOf" else []
    if not meant:
        yield error
    for inner in meant:
        yield from _list_meant_errors(inner)


def _find_meant_form(error: Any) -> list[Any]:
    """Return the errors of the alternative that has this kind of value: it fails only further inside, or by a key."""
    alternatives: dict[int, list[Any]] = {}
    for inner in error.context:
        alternatives.setdefault(inner.schema_path[0], []).append(inner)
    fitting = [
        errors
        for errors in alternatives.values()
        if all(inner.path or inner.validator == "additionalProperties" for inner in errors)
    ]
    return fitting[0] if len(fitting) == 1 else []


def _describe_wrong_name(table: str, name: str) -> str:
    if table == "project":
        return f'{quote_value(name)} is not an absolute path; write one that starts with "/", as in "/srv/vision"'
    return f"{quote_value(name)} is not the name of a {table}; write it as `id` shows it"


def _describe_error(error: Any, annotation: Mapping[str, Any]) -> str:
    """Describe an error that no reader of values explains better."""
    value, wanted = error.instance, error.validator_value
    example = f"; write {quote_value(annotation['examples'][0])}" if annotation.get("examples") else ""
    if "enum" in annotation and error.validator in ("type", "enum"):
        return _describe_wrong_word(value, annotation["enum"])
    if error.validator == "type" and wanted == "boolean":
        return f"{quote_value(value)} is not true or false; write true or false without quotes"
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
        return f"an empty string is not allowed here{example}"
    return f"{quote_value(value)} is not understood{example}"


def _describe_wrong_word(value: object, words: list[object]) -> str:
    import difflib

    texts = [quote_value(word) for word in words]
    close = difflib.get_close_matches(quote_value(value).lower(), texts, n=1)
    wrong = f"is none of {', '.join(texts)}" if len(texts) > 1 else "is not known"
    return f"{quote_value(value)} {wrong}; " + (f"did you mean {close[0]}?" if close else f"write {texts[0]}")
