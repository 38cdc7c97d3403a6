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
TEST_SCHEMA: dict[str, Any] = json.loads((STORE / "src" / "schemas" / "json" / "tfgpu-test.json").read_text())
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


@pytest.mark.parametrize("folder", ["test", "negative_test"])
def test_the_schema_of_tests_has_files(folder: str) -> None:
    """It accepts each file in test/ and none in negative_test/, each of which has one mistake in its last line."""
    validator = jsonschema.Draft7Validator(TEST_SCHEMA)
    for path in sorted((STORE / "src" / folder / "tfgpu-test").iterdir()):
        text = path.read_text()
        assert validator.is_valid(tomli.loads(text)) is (folder == "test"), path
        assert folder == "test" or validator.is_valid(tomli.loads(text.rstrip().rpartition("\n")[0])), path


def test_the_entry_for_tests_keeps_the_rules() -> None:
    """It matches our own name alone. Its schema has SchemaStore's address and refers to nothing."""
    entry = json.loads((STORE / "catalog-entry-tests.json").read_text())
    assert entry["fileMatch"] == ["tfgpu.test.toml"]
    assert "schema" not in (entry["name"] + entry["description"]).lower()
    assert entry["url"] == "https://www.schemastore.org/tfgpu-test.json"
    assert TEST_SCHEMA["$id"] == "https://json.schemastore.org/tfgpu-test.json"
    assert "$ref" not in json.dumps(TEST_SCHEMA)
    text = (STORE / "src" / "test" / "tfgpu-test" / "all.toml").read_text()
    case = TEST_SCHEMA["properties"]["case"]["items"]["properties"]
    keys = {*case, *case["expect"]["properties"]} - {"expect", "observed", "user_file", "project_file"}
    assert [key for key in keys if f"{key} =" not in text] == []


def run_ajv(schema: object, documents: list[dict[str, object]]) -> object:
    """Return which documents SchemaStore's validator accepts, by a schema that it compiles in strict mode."""
    node = shutil.which("node")
    if node is None or not (NODE_MODULES / "ajv").is_dir():
        pytest.skip(f"Ajv is not installed; `npm install --global --prefix {sys.prefix} ajv@8`")
    done = subprocess.run(
        [node, "-e", AJV],
        env={"NODE_PATH": str(NODE_MODULES)},
        input=json.dumps({"schema": schema, "documents": documents}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_ajv_accepts_the_schema_of_tests() -> None:
    """SchemaStore's validator compiles it in strict mode."""
    files = sorted((STORE / "src").glob("*/tfgpu-test/*.toml"), key=lambda path: path.parts[-3] != "test")
    documents = [tomli.loads(path.read_text()) for path in files]
    assert run_ajv(TEST_SCHEMA, documents) == [True] * 2 + [False] * 3


def test_ajv_accepts_it_in_strict_mode() -> None:
    """SchemaStore's validator compiles the schema in strict mode, and agrees on all files."""
    documents = [tomli.loads(path.read_text()) for path in (*POSITIVE, *NEGATIVE)]
    assert run_ajv(SCHEMA, documents) == [True] * len(POSITIVE) + [False] * len(NEGATIVE)


def test_pyproject_refers_to_it() -> None:
    """The entry for pyproject.toml leads to the same address, so that [tool.tfgpu] is checked, too."""
    assert json.loads((STORE / "pyproject-entry.json").read_text())["tfgpu"]["$ref"] == SCHEMA["$id"]
