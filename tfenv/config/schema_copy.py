"""The copies of schemas that stand beside a tfgpu.toml and its tests, for editors.

The line `#:schema ./tfgpu.schema.json` leads to it. It is the same for everybody who checks the project out. It needs
no network, and an upgrade of tfenv does not change it. Python processes never read it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from typing import Any, Literal

from tfenv.files import replace_file

COPY_NAME = "tfgpu.schema.json"
#: The copy for files of tests, *.test.toml.
TEST_COPY_NAME = "tfgpu-test.schema.json"
SCHEMA_LINE = f"#:schema ./{COPY_NAME}"
TEST_SCHEMA_LINE = f"#:schema ./{TEST_COPY_NAME}"
#: Bytes of a copy that are read, at most. One of ours has about 60,000.
_MOST_BYTES = 1 << 20
#: Definitions of whole tables.
_TABLES = ("gpu", "ceiling", "subject")
_VERSION = re.compile(r"tfenv (\d{1,6}(?:\.\d{1,6}){0,4})", re.ASCII)

#: "missing": there is none. "foreign": the file is something else. "older" and "newer": it is another tfenv's.
CopyState = Literal["missing", "foreign", "older", "current", "newer"]


def flatten_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema with each reference replaced by what it refers to.

    Editors then show the description of a key, not that of its type. taplo's language server recurses without end
    where a reference stands in an `allOf`. Whole tables that occur many times stay references, but none in an `allOf`.
    At the top of the file they are written out: taplo describes no table that is a reference.
    """
    definitions: Mapping[str, Any] = schema.get("definitions", {})
    kept = tuple(name for name in _TABLES if name in definitions)
    flat = {
        key: _flatten(value, definitions) for key, value in schema.items() if key not in ("definitions", "properties")
    }
    flat["properties"] = {
        name: _flatten(entry, definitions, () if name in kept else kept)
        for name, entry in schema.get("properties", {}).items()
    }
    if kept:
        flat["definitions"] = {name: _flatten(definitions[name], definitions, kept) for name in kept}
    return flat


def _flatten(node: Any, definitions: Mapping[str, Any], kept: tuple[str, ...] = ()) -> Any:
    if isinstance(node, list):
        return [_flatten(entry, definitions, kept) for entry in node]
    if not isinstance(node, dict):
        return node
    for part in (node, *node.get("allOf", ())):
        if "$ref" in part:
            own = {key: value for key, value in node.items() if key not in ("allOf", "$ref")}
            name = part["$ref"].rpartition("/")[2]
            if name in kept:
                return {**own, "$ref": part["$ref"]}
            return _flatten({**definitions[name], **own}, definitions, kept)
    return {key: _flatten(value, definitions, kept) for key, value in node.items()}


def format_copy(name: str = COPY_NAME) -> str:
    """Return the text of a copy. Its comment names the version of tfenv that it is from."""
    from tfenv import __version__
    from tfenv.config.schema import load_schema

    comment = f"Copied from tfenv {__version__} for editors. Do not edit it: `tfgpu init --schema` writes it again."
    return json.dumps({**flatten_schema(load_schema(name)), "$comment": comment}, indent=1, ensure_ascii=False) + "\n"


def write_copy(folder: str, mode: int | None = None, name: str = COPY_NAME) -> bool:
    """Write the copy into a directory. One that is current or newer stays as it is.

    Args:
        folder: The directory of the tfgpu.toml.
        mode: Permission bits. None: those that the umask leaves.
        name: The schema.

    Returns:
        Whether it was written.

    Raises:
        FileExistsError: The file that has its name is something else.
        OSError: It cannot be written.
    """
    path = os.path.join(folder, name)
    state = "foreign" if os.path.islink(path) else compare_copy(path, name)
    if state == "foreign":
        raise FileExistsError(f"{path} is not a schema that tfenv wrote")
    if state in ("current", "newer"):
        return False
    replace_file(path, format_copy(name), mode, overwrite=state == "older")
    return True


def compare_copy(path: str, name: str = COPY_NAME) -> CopyState:
    """Compare a file with the schema of this tfenv. Never raises."""
    # Late: tools/generate.py imports this module, and writes the validator that `schema` imports.
    from tfenv.config.schema import load_schema

    try:
        found = _read_schema(path)
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError, RecursionError):
        return "foreign"
    ours = load_schema(name)
    if not isinstance(found, dict) or found.get("$id") != ours["$id"]:
        return "foreign"
    try:
        flat = flatten_schema(found)
    except (AttributeError, KeyError, TypeError, RecursionError):
        return "older"  # ours once, and broken since
    if {**flat, "$comment": ""} == {**flatten_schema(ours), "$comment": ""}:
        return "current"
    return "newer" if _is_newer(str(found.get("$comment"))) else "older"


def _read_schema(path: str) -> object:
    """Return what a JSON file holds.

    Raises:
        OSError: It cannot be read, or is not a file.
        ValueError: It is too long, or not JSON.
    """
    # A pipe would keep us waiting for whoever writes into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        raw = file.read(_MOST_BYTES + 1)
    if len(raw) > _MOST_BYTES:
        raise ValueError("too long for a schema of ours")
    return json.loads(raw)


def _is_newer(comment: str) -> bool:
    """Return whether a copy's comment names a later version of tfenv than this one."""
    from tfenv import __version__

    theirs, ours = (_VERSION.search(text) for text in (comment, f"tfenv {__version__}"))
    return theirs is not None and ours is not None and _parse_version(theirs[1]) > _parse_version(ours[1])


def _parse_version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))
