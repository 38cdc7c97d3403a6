"""The copy of the schema for editors: it accepts what the schema accepts, and refers to nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import tomli

from tfenv.config.schema import load_schema
from tfenv.config.schema_copy import COPY_NAME, compare_copy, flatten_schema, format_copy, write_copy

ROOT = Path(__file__).parents[2]


def list_documents() -> Iterator[object]:
    """List the policies of this repository, right and wrong ones."""
    for folder in ("sample_configs", "schemas", "tests/config/examples"):
        for path in sorted((ROOT / folder).rglob("*.toml")):
            try:
                yield tomli.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                continue


def test_it_accepts_the_same_policies() -> None:
    """On every policy of this repository the copy and the schema agree."""
    schema, copied = (jsonschema.Draft7Validator(each) for each in (load_schema(), json.loads(format_copy())))
    verdicts = [(schema.is_valid(document), copied.is_valid(document)) for document in list_documents()]
    assert {ours for ours, _ in verdicts} == {True, False}
    assert [pair for pair in verdicts if pair[0] != pair[1]] == []


def test_it_refers_to_whole_tables_alone() -> None:
    """No reference to a value is left, none is in an `allOf`, and a key keeps its own description."""
    flat = flatten_schema(load_schema())
    text = json.dumps(flat)
    assert "allOf" not in text
    tables = ("gpu", "ceiling", "subject")
    assert set(re.findall(r'"\$ref": "([^"]*)"', text)) == {f"#/definitions/{name}" for name in tables}
    assert set(flat["definitions"]) == set(tables)
    assert flatten_schema(flat) == flat
    own = load_schema()["definitions"]["gpu"]["properties"]["memory_limit"]["description"]
    assert flat["properties"]["gpu"]["properties"]["memory_limit"]["description"] == own


def test_it_is_written_once(tmp_path: Path) -> None:
    """A current copy is not written again, whatever a formatter made of its layout."""
    assert write_copy(str(tmp_path), 0o644)
    path = tmp_path / COPY_NAME
    path.write_text(json.dumps(json.loads(path.read_text()), indent=8))
    assert not write_copy(str(tmp_path))
    assert compare_copy(str(path)) == "current"
    assert os.listdir(tmp_path) == [COPY_NAME]


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", "\0", '{"$id": "x"}', " " * (1 << 20) + "{}"])
def test_what_is_not_ours_stays(text: str, tmp_path: Path) -> None:
    """A file that is broken, too long or something else is an error, and is left as it is."""
    path = tmp_path / COPY_NAME
    path.write_text(text)
    assert compare_copy(str(path)) == "foreign"
    with pytest.raises(FileExistsError):
        write_copy(str(tmp_path))
    assert path.read_text() == text


def test_nothing_waits_for_a_pipe(tmp_path: Path) -> None:
    """A FIFO, a folder and a link have nothing to say, and are not replaced."""
    path = tmp_path / COPY_NAME
    for make in (os.mkfifo, os.mkdir, lambda place: os.symlink("/nowhere", place)):
        make(path)
        with pytest.raises(FileExistsError):
            write_copy(str(tmp_path))
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_broken_copy_of_ours_is_written_again(tmp_path: Path) -> None:
    """One that has our $id and makes no sense is replaced."""
    path = tmp_path / COPY_NAME
    path.write_text(json.dumps({"$id": load_schema()["$id"], "properties": {"gpu": {"$ref": "#/nothing"}}}))
    assert compare_copy(str(path)) == "older"
    assert write_copy(str(tmp_path))
    assert compare_copy(str(path)) == "current"
