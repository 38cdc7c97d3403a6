"""What is sent to SchemaStore: an entry for its catalog, a schema by its rules, and files to test that with."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tomli

from tests.pages import ROOT
from tfenv.config.presence import FILE_NAME

STORE = ROOT / "schemas" / "schemastore"
SCHEMA: dict[str, Any] = json.loads((STORE / "src" / "schemas" / "json" / "tfgpu.json").read_text())
POSITIVE = sorted((STORE / "src" / "test" / "tfgpu").iterdir())
NEGATIVE = sorted((STORE / "src" / "negative_test" / "tfgpu").iterdir())
NODE_MODULES = Path(sys.prefix) / "lib" / "node_modules"

#: SchemaStore's own check: Ajv in strict mode. An invalid file is printed.
AJV = """
const { Ajv } = require("ajv");
const { schema, documents } = JSON.parse(require("fs").readFileSync(0));
// Its ajv-formats knows the format "date".
const validate = new Ajv({ strict: true, formats: { date: true } }).compile(schema);
console.log(JSON.stringify(documents.map((document) => validate(document))));
"""


def is_valid(document: object) -> bool:
    return jsonschema.Draft7Validator(SCHEMA).is_valid(document)


def test_the_entry_matches_the_file_and_nothing_else() -> None:
    """Editors take the schema for every tfgpu.toml, and not for other files."""
    entry = json.loads((STORE / "catalog-entry.json").read_text())
    assert set(entry) == {"name", "description", "fileMatch", "url"}
    assert entry["url"] == "https://www.schemastore.org/tfgpu.json"
    names = (FILE_NAME, "pyproject.toml", "alice.toml", "tfgpu.schema.json", "x.tfgpu.toml")
    assert [name for name in names if any(fnmatch.fnmatch(name, glob) for glob in entry["fileMatch"])] == [FILE_NAME]


def test_the_entry_keeps_the_rules_of_the_catalog() -> None:
    """Name and description do not say "schema", and end in no punctuation. No glob names a folder."""
    entry = json.loads((STORE / "catalog-entry.json").read_text())
    for text in (entry["name"], entry["description"]):
        assert "schema" not in text.lower()
        assert text[-1] not in ",. \t-"
        assert "\n" not in text
    assert not any("/" in glob for glob in entry["fileMatch"])


def test_the_schema_keeps_the_rules() -> None:
    """It is draft-07, has SchemaStore's address, a description for each key, and refers to nothing elsewhere."""
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert list(SCHEMA)[:2] == ["$schema", "$id"]
    assert SCHEMA["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert SCHEMA["$id"] == "https://json.schemastore.org/tfgpu.json"
    references = set(re.findall(r'"\$ref": "([^"]*)"', json.dumps(SCHEMA)))
    assert references == {f"#/definitions/{name}" for name in SCHEMA["definitions"]}

    def check(node: dict[str, Any]) -> None:
        for name, entry in node.get("properties", {}).items():
            assert entry.get("description"), name
            check(entry)
        assert "properties" not in node or node["additionalProperties"] is False

    for table in (SCHEMA, *SCHEMA["definitions"].values()):
        check(table)


@pytest.mark.parametrize("path", POSITIVE, ids=lambda path: str(path.name))
def test_it_accepts_what_is_right(path: Path) -> None:
    """Each file in test/ is valid."""
    assert is_valid(tomli.loads(path.read_text()))


@pytest.mark.parametrize("path", NEGATIVE, ids=lambda path: str(path.name))
def test_it_rejects_what_is_wrong(path: Path) -> None:
    """Each file in negative_test/ has one mistake. Without its last line it is valid."""
    text = path.read_text()
    assert not is_valid(tomli.loads(text))
    assert is_valid(tomli.loads(text.rstrip().rpartition("\n")[0])) == (path.name != "relative-project.toml")


def test_the_files_use_every_key() -> None:
    """The files in test/ have every key of the tables of a policy."""
    texts = "\n".join(path.read_text() for path in POSITIVE)
    for table in ("gpu", "ceiling", "audit", "machine", "observe"):
        keys = [
            key for key, entry in SCHEMA["properties"][table]["properties"].items() if entry.get("type") != "object"
        ]
        unused = [key for key in keys if f"{key} =" not in texts and f"[observe.{key}" not in texts]
        assert unused in ([], ["device"])
    assert all(f"{key} =" in texts for key in ("expires", "reason"))


def test_ajv_accepts_it_in_strict_mode() -> None:
    """SchemaStore's validator compiles the schema in strict mode, and agrees on all files."""
    node = shutil.which("node")
    if node is None or not (NODE_MODULES / "ajv").is_dir():
        pytest.skip(f"Ajv is not installed; `npm install --global --prefix {sys.prefix} ajv@8`")
    documents = [tomli.loads(path.read_text()) for path in (*POSITIVE, *NEGATIVE)]
    done = subprocess.run(
        [node, "-e", AJV],
        env={"NODE_PATH": str(NODE_MODULES)},
        input=json.dumps({"schema": SCHEMA, "documents": documents}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert json.loads(done.stdout) == [True] * len(POSITIVE) + [False] * len(NEGATIVE)


def test_pyproject_refers_to_it() -> None:
    """The entry for pyproject.toml leads to the same address, so that [tool.tfgpu] is checked, too."""
    assert json.loads((STORE / "pyproject-entry.json").read_text())["tfgpu"]["$ref"] == SCHEMA["$id"]
