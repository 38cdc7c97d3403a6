"""Makes what is generated: the validator, the reference page and the files for SchemaStore from the schemas, and the
page of messages from its table.

    python tools/generate.py            writes them
    python tools/generate.py --check    exits with status 1 if one of them is out of date

Needs fastjsonschema, of the development group. The package itself does not.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli

from tfenv.config.schema_copy import flatten_schema

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "schemas" / "tfgpu.schema.json"
VALIDATOR = ROOT / "tfenv" / "config" / "_validator.py"
REFERENCE = ROOT / "docs" / "reference.md"
MESSAGES = ROOT / "tools" / "messages.toml"
MESSAGES_PAGE = ROOT / "docs" / "messages.md"
TEST_SCHEMA = ROOT / "schemas" / "tfgpu-test.schema.json"
STORE = ROOT / "schemas" / "schemastore" / "src" / "schemas" / "json" / "tfgpu.json"
TEST_STORE = STORE.with_name("tfgpu-test.json")

Schema = Mapping[str, Any]
WORDS = {"boolean": "`true` or `false`", "object": "table", "integer": "whole number"}
BOUNDS = {"minimum": "at least", "maximum": "at most"}

SEVERAL = "(JsonSchemaValueException, JsonSchemaValuesException)"

# The exception is local, so that fastjsonschema is not needed (12 ms) where policies are applied; the
# patterns are compiled when first used, because a policy needs one or two of them.
VALIDATOR_HEAD = '''\
"""Generated from schemas/tfgpu.schema.json by tools/generate.py. Do not edit."""
# ruff: noqa
# mypy: ignore-errors
# pyright: basic
# fmt: off

import re


class JsonSchemaValueException(ValueError):
    """The first thing that is wrong."""


class _Patterns(dict):
    """Regular expressions by their text in the schema, compiled when first used."""

    def __missing__(self, text):
        # "$" also matches before a last newline, which JSON Schema does not mean.
        self[text] = compiled = re.compile(text[:-1] + r"\\Z" if text.endswith("$") else text)
        return compiled


REGEX_PATTERNS = _Patterns()


def is_valid(table: object) -> bool:
    """Whether the schema has nothing against the policy table."""
    try:
        {validate}(table)
    except JsonSchemaValueException:
        return False
    return True


'''


def make_validator(schema: Schema) -> str:
    """Return the text of the module that validates a policy table."""
    import fastjsonschema

    code = fastjsonschema.compile_to_code(dict(schema), use_default=False, use_formats=False, detailed_exceptions=False)
    first = code.index("def validate")
    name = re.match(r"def (\w+)", code[first:])
    assert name is not None
    body = code[first:].rstrip() + "\n"
    # TOML has no decimals, and the library's second exception carries many first ones.
    for theirs, ours in (("(int, float, Decimal)", "(int, float)"), (SEVERAL, "JsonSchemaValueException")):
        body = body.replace(theirs, ours)
    return VALIDATOR_HEAD.replace("{validate}", str(name[1])) + str(body)


# ---- the file for SchemaStore


def make_store_schema(schema: Schema, name: str) -> str:
    """Return a schema as SchemaStore has it: with its address, and without the note to people who read ours."""
    flat = {key: value for key, value in flatten_schema(schema).items() if key != "$comment"}
    return json.dumps({**flat, "$id": f"https://json.schemastore.org/{name}"}, indent=2, ensure_ascii=False) + "\n"


# ---- the reference page

REFERENCE_HEAD = """\
# Reference of tfgpu.toml

<!-- Generated from schemas/tfgpu.schema.json by tools/generate.py. Do not edit. -->

Look up every key of the file here, table by table. "Not set" means that the program or TensorFlow decides. In a
`pyproject.toml` write the same tables under `[tool.tfgpu]`. An unknown key is reported and ignored. A wrong value loses
its own key, never the others.

Write memory as a string: `"8GiB"` (1024-based), `"8GB"` (1000-based), `"512MiB"`, or `"40%"` of the card's total. Name
a device by its position (`0`), by a UUID or the beginning of one (`"GPU-8932f937"`), as a MIG device (`"MIG-…"`), or by
a pattern for the product name (`"name:*A100*"`).

"""


def make_reference(schema: Schema) -> str:
    """Return the text of docs/reference.md."""
    pages = [*_describe_tables(schema, schema, "", {}), *_describe_choices(schema)]
    return REFERENCE_HEAD + "\n".join(pages)


def _describe_tables(schema: Schema, root: Schema, path: str, told: dict[str, str]) -> Iterator[str]:
    """Give one section a table, the top of the file first. Keys that were described are not described again.

    Args:
        schema: Of the table.
        root: The whole schema.
        path: The table's name in the file.
        told: By definition, the table whose section has the keys. It is added to.
    """
    first = told.setdefault(_find_definition(schema) or path, path)
    if path.startswith("observe."):
        first = path.removeprefix("observe.")  # with all that is below it
    if first != path:
        described = schema["description"].replace(f"[{first}]", _format_link(first))
        yield f"## `[{path}]`\n\n{_wrap(described)}\n"
        return
    yield _describe_table(schema, root, path)
    for name, entry in _list_keys(schema, root).items():
        resolved = _resolve(entry, root)
        items = _resolve(resolved.get("items", {}), root)
        below = f"{path}.{name}" if path else name
        if "properties" in resolved or "patternProperties" in resolved:
            yield from _describe_tables({**resolved, **entry}, root, below, told)
        elif "properties" in items:
            yield from _describe_tables({**items, "description": entry["description"]}, root, f"[{below}]", told)


def _find_definition(schema: Schema) -> str | None:
    """Return the definition, with keys of its own, that a table stands for. None if it is described where it stands."""
    named = [str(part["$ref"]) for part in (schema, *schema.get("allOf", ())) if "$ref" in part]
    return next((name for name in named if not name.endswith("/subject")), None)


def _describe_choices(schema: Schema) -> Iterator[str]:
    """Give a section for each inline table that `visible_devices` may be."""
    for name in ("choice", "rank"):
        definition = schema["definitions"][name]
        yield _describe_table(definition, schema, f"gpu.visible_devices = {definition['title']}", heading="## `{}`")


def _describe_table(schema: Schema, root: Schema, path: str, heading: str = "## `[{}]`") -> str:
    lines = [heading.format(path) if path else "## Top of the file", "", _wrap(schema["description"]), ""]
    required = schema.get("required", ())
    tables: list[str] = []
    for name, entry in _list_keys(schema, root).items():
        resolved = {**_resolve(entry, root), **entry}
        if "properties" in resolved or "patternProperties" in resolved:
            tables += [_format_link(f"{path}.{name}" if path else name)]
            continue
        lines += [f"### `{name}`", "", _wrap(entry["description"]), ""]
        lines += [f"- Type: {format_type(entry, root)}"]
        lines += ["- Required" if name in required else f"- Default: {format_default(entry)}"]
        examples = [f"`{name} = {format_toml(example)}`" for example in entry["examples"]]
        lines += ["- Example: " + ",\n  ".join(examples), ""]
    if tables:
        lines += [_wrap("Tables below it: " + ", ".join(tables)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _format_link(table: str) -> str:
    """Return a link to a table's section."""
    return f"[`[{table}]`](#{re.sub(r'[^a-z]', '', table.lower())})"


def _list_keys(schema: Schema, root: Schema) -> dict[str, Any]:
    """Return the keys of a table. A name that people choose (a user, a path) stands under its title."""
    resolved = _resolve(schema, root)
    named = {entry["title"]: entry for entry in resolved.get("patternProperties", {}).values()}
    return {**resolved.get("properties", {}), **named}


def _resolve(schema: Schema, root: Schema) -> Schema:
    """Return what a `$ref`, alone or in an `allOf` of one, stands for."""
    for part in (schema, *schema.get("allOf", ())):
        if "$ref" in part:
            return _resolve(root["definitions"][part["$ref"].rpartition("/")[2]], root)
    return schema


def format_type(schema: Schema, root: Schema) -> str:
    """Return the type in words, as in: `"warn"`, `"cpu"` or `"fail"`."""
    return _join_alternatives(_list_types(schema, root))


def _list_types(schema: Schema, root: Schema) -> list[str]:
    schema = _resolve(schema, root)
    if "enum" in schema:
        return [f"`{format_toml(value)}`" for value in schema["enum"]]
    if "title" in schema and schema["title"] != "devices":
        return [f"`{schema['title']}`" if schema.get("type") == "object" else schema["title"]]
    if "anyOf" in schema:
        return [text for option in schema["anyOf"] for text in _list_types(option, root)]
    if schema["type"] == "array":
        most = f", at most {schema['maxItems']}" if "maxItems" in schema else ""
        return [f"list of {format_type(schema['items'], root)}s{most}"]
    bounds = [f"{words} {schema[bound]}" for bound, words in BOUNDS.items() if bound in schema]
    return [", ".join([WORDS.get(schema["type"], str(schema["type"])), *bounds])]


def _join_alternatives(options: list[str]) -> str:
    return " or ".join(part for part in (", ".join(options[:-1]), options[-1]) if part)


def format_default(schema: Schema) -> str:
    """Return the default as it would be written. The schema's null says that there is none."""
    return "not set" if schema["default"] is None else f"`{format_toml(schema['default'])}`"


def format_toml(value: Any) -> str:
    """Return a value as TOML writes it, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_format_key(key)} = {format_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(format_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _format_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


# ---- the page of messages

MESSAGES_HEAD = """\
# Messages

<!-- Generated from tools/messages.toml by tools/generate.py. Do not edit. -->

Each problem that tfenv reports has a code in brackets. Look it up here to see what happened and what to do.

{example}

You see codes in four places: in the line that your program shows on stderr, in the output of `tfgpu check` and
`tfgpu explain`, in `tfenv.status()`, and in the `findings` of [audit records](audit.md). The line on stderr is short.
Run `tfgpu explain` in the directory of your program to see every finding with its file and line.

`tfgpu check` and `tfgpu explain` also show the severity. It tells you what happens to your program:

| severity | what it means |
|---|---|
| error | Something that the policy says is not in force. [`on_error`](laws.md#on_error) decides: with `"warn"` your \
program goes on, with `"cpu"` it gets no GPU, with `"fail"` the import of a framework raises `PolicyError`. |
| warning | Probably a mistake. Your program goes on under the policy, whatever `on_error` says. |
| note | For your information. Notes are never on stderr. |

An error or a warning makes `tfgpu check` exit with status 1. A note does not.

## All codes

"""
SEVERITIES = {"error": "Error", "warning": "Warning", "note": "Note", "line": "Information"}


def make_messages(table: Mapping[str, Any]) -> str:
    """Return the text of docs/messages.md.

    Args:
        table: What is in tools/messages.toml.
    """
    groups = table["group"]
    index = ["| about | codes |", "|---|---|"]
    for group in groups:
        links = ", ".join(f"[`{message['code']}`](#{message['code']})" for message in group["message"])
        index += [f"| {group['title']} | {links} |"]
    sections = [section for group in groups for section in _describe_group(group)]
    examples = {message["code"]: message["example"] for group in groups for message in group["message"]}
    head = MESSAGES_HEAD.replace("{example}", _quote(examples["unknown-key"]))
    return head + "\n".join(index) + "\n\n" + "\n".join(sections)


def _describe_group(group: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {group['title']}\n\n{_wrap(group['intro'])}\n"
    for message in group["message"]:
        severity = " or ".join(SEVERITIES[name] for name in message["severity"]).capitalize()
        only = f", shown only {message['only']}" if "only" in message else ""
        parts = (
            f"### `{message['code']}`",
            _quote(message["example"]),
            _wrap(f"*{severity}{only}.* {message['cause']}"),
            _wrap(f"**What to do:** {message['fix']}"),
        )
        yield "\n\n".join(parts) + "\n"


def _quote(message: str) -> str:
    """Show a message. Not as a block of code: browsers would not break its lines."""
    fence = "`` " if "`" in message else "`"
    text = f"{fence}{message}{fence[::-1]}"
    return textwrap.fill(
        text, 118, initial_indent="> ", subsequent_indent="> ", break_long_words=False, break_on_hyphens=False
    )


def _wrap(text: str) -> str:
    """Break a paragraph into lines, but neither code nor links."""
    kept = re.sub(r"`[^`]*`|\[[^\]]*\]\([^)]*\)", lambda match: match[0].replace(" ", "\0"), " ".join(text.split()))
    return textwrap.fill(kept, 118, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


# ---- command


def generate() -> dict[Path, str]:
    """Return every generated file with what it should contain."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    messages = tomli.loads(MESSAGES.read_text(encoding="utf-8"))
    return {
        VALIDATOR: make_validator(schema),
        REFERENCE: make_reference(schema),
        STORE: make_store_schema(schema, STORE.name),
        TEST_STORE: make_store_schema(json.loads(TEST_SCHEMA.read_text(encoding="utf-8")), TEST_STORE.name),
        MESSAGES_PAGE: make_messages(messages),
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or with --check say which are out of date. Return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when a file is out of date")
    check = parser.parse_args(arguments).check
    stale = 0
    for path, text in generate().items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        print(f"{path.relative_to(ROOT)} is {'out of date: run python tools/generate.py' if check else 'written'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
