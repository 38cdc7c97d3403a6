"""schema.py: every example file, the typed values, the laws of what is lost, and that nothing ever raises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from tfenv.config.document import Document
from tfenv.config.schema import load_schema, schema_path, validate
from tfenv.config.values import read_process_limit, read_total
from tfenv.errors import Finding
from tfenv.lint.combinations import advise
from tfenv.pipeline import Decision, ReadLayers, decide, merge_files
from tfenv.policy.model import (
    LAYER_ORDER,
    AutoChoice,
    Device,
    Grant,
    Inventory,
    KeyPath,
    Layer,
    LayerName,
    MemoryLimit,
    RankChoice,
    Selector,
    Setting,
    Source,
    Start,
    Subject,
    Tables,
    format_key,
)
from tfenv.values import replace

EXAMPLES = Path(__file__).parent / "examples"
POSITIVE = sorted(EXAMPLES.glob("positive/*.toml"))
NEGATIVE = sorted(EXAMPLES.glob("negative/*.toml"))
GIB = 1 << 30


def make_document(text: str, layer: LayerName = "project", path: str = "/srv/vision/tfgpu.toml") -> Document:
    """Make a document as the reader of files does, without a file."""
    return Document(Source(layer, path), tomli.loads(text), "0" * 64, text, 0)


def read_example(path: Path) -> Document:
    text = path.read_text(encoding="utf-8")
    layer: Any = re.match(r"# layer: (\w+)", text)
    return make_document(text, layer[1], str(path))


def list_settings(layer: Layer) -> Iterator[Setting]:
    tables = (layer.base, *dict(layer.groups).values(), *layer.users.values(), *layer.projects.values())
    for table in (layer.top, layer.machine, *layer.audit, *(part for t in tables for part in (t.gpu, t.ceiling))):
        yield from table.values()


def list_kept(layer: Layer) -> list[str]:
    return sorted(format_key(setting.origin.key) for setting in list_settings(layer)) + sorted(list_terms(layer))


def list_terms(layer: Layer) -> Iterator[str]:
    """List the ends and reasons that were kept, and what stands under `[observe]`."""
    for dated in layer.dated:
        terms = {"expires": dated.expires, "reason": dated.reason}
        yield from (format_key((*dated.origin.key, name)) for name, value in terms.items() if value)
    if layer.observed is not None:
        yield from list_kept(layer.observed)


def list_keys(table: dict[str, object]) -> Iterator[KeyPath]:
    """List the keys of a document that hold a value: what a layer should have kept of a right one."""
    for name, value in table.items():
        if name == "observe" and isinstance(value, dict):
            yield from ((name, *rest) for rest in list_keys(value))
        elif name in ("gpu", "ceiling", "audit", "machine") and isinstance(value, dict):
            yield from ((name, key) for key in value)
        elif name in ("user", "group", "project") and isinstance(value, dict):
            for who, tables in value.items():
                inner = list_keys(tables) if isinstance(tables, dict) else [()]
                yield from ((name, who, *rest) for rest in inner)
        elif name != "version":
            yield (name,)


# ---- example files


@pytest.mark.parametrize("path", POSITIVE, ids=lambda path: path.stem)
def test_right_files_are_kept_whole(path: Path) -> None:
    """A right file gives no finding and loses no key."""
    layer, findings = validate(read_example(path))
    assert findings == ()
    assert sorted(list_kept(layer)) == sorted(format_key(key) for key in list_keys(read_example(path).data))


@pytest.mark.parametrize("path", NEGATIVE, ids=lambda path: path.stem)
def test_wrong_files_lose_only_what_is_wrong(path: Path) -> None:
    """A wrong file gives exactly the expected findings, with their places, and keeps all other keys."""
    text = path.read_text(encoding="utf-8")
    expected = re.findall(r"^# expect: (\w+) ([\w-]+) (\d+):(\d+) (.+) :: (.+)$", text, re.MULTILINE)
    keeps = re.search(r"^# keeps:(.*)$", text, re.MULTILINE)
    assert expected, "an example of what is wrong says what is to be found"
    assert keeps is not None
    layer, findings = validate(read_example(path))
    told = [(f.severity, f.code, str(f.line), str(f.column), f.key) for f in findings]
    assert told == [tuple(line[:5]) for line in expected]
    for finding, line in zip(findings, expected, strict=True):
        assert line[5] in finding.message
        assert finding.path == str(path)
    assert sorted(list_kept(layer)) == sorted(keeps[1].split())


def test_messages_are_one_sentence_on_one_line() -> None:
    """Findings are one line of plain text, also where names and values hold control characters and are long."""
    text = f'"a\\n\\u001b[31m\\u2028" = 1\n[gpu]\nallocator = "x\\n\\u001b[31m"\nmemory_limit = "{"9" * 5000}"\n'
    _, findings = validate(make_document(text))
    assert len(findings) == 3
    for finding in findings:
        assert finding.message.isprintable()
        assert len(finding.message) < 250


# ---- typed values


def read_gpu(text: str) -> dict[str, object]:
    layer, findings = validate(make_document(f"[gpu]\n{text}\n"))
    assert findings == ()
    return {key: setting.value for key, setting in layer.base.gpu.items()}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('"all"', "all"),
        ('"none"', ()),
        ("[]", ()),
        ("[1, 0]", (Selector("position", "1"), Selector("position", "0"))),
        ('["2", 2]', (Selector("position", "2"),)),
        ('["GPU-8932f937"]', (Selector("uuid", "GPU-8932f937"),)),
        ('["MIG-GPU-8932f937/1/0"]', (Selector("uuid", "MIG-GPU-8932f937/1/0"),)),
        ('["name:*A100*"]', (Selector("name", "*A100*"),)),
        ('{rank = "auto"}', RankChoice()),
        ("{rank = 3}", RankChoice(3)),
        ("{count = 1}", AutoChoice(1)),
        (
            '{count = 2, min_free = "6GiB", when_busy = "cpu", timeout = "10min"}',
            AutoChoice(2, "most_free", MemoryLimit(bytes=6 * GIB), "cpu", 600.0),
        ),
    ],
)
def test_visible_devices_in_all_its_forms(written: str, read: object) -> None:
    """Every form of visible_devices becomes its typed value."""
    assert read_gpu(f"visible_devices = {written}") == {"visible_devices": read}


def test_rules_for_single_devices() -> None:
    """A [[gpu.device]] entry becomes a rule that knows where it stands."""
    text = '[[gpu.device]]\nmatch = "name:*H200*"\nmemory_limit = "60GiB"\nlogical_devices = ["30GiB", "30GiB"]\n'
    layer, findings = validate(make_document(text))
    assert findings == ()
    rules: Any = layer.base.gpu["device"].value
    (rule,) = rules
    assert rule.match == Selector("name", "*H200*")
    assert rule.memory_limit == MemoryLimit(bytes=60 * GIB)
    assert rule.logical_devices == (MemoryLimit(bytes=30 * GIB),) * 2
    assert rule.origin.key == ("gpu", "device", 0)


def test_a_broken_list_of_allowed_devices_allows_fewer_never_more() -> None:
    """Of allowed_devices the entries that are right stay, even when none is."""
    some, _ = validate(make_document('ceiling.allowed_devices = [0, "banana"]'))
    assert some.base.ceiling["allowed_devices"].value == (Selector("position", "0"),)
    none, _ = validate(make_document('ceiling.allowed_devices = ["banana"]'))
    assert none.base.ceiling["allowed_devices"].value == ()


def test_origins_lead_back_to_the_file() -> None:
    """The origin of a setting gives its position in the document."""
    read = make_document("[gpu]\nmemory_growth = true\n")
    layer, _ = validate(read)
    origin = layer.base.gpu["memory_growth"].origin
    assert (origin.layer, origin.path) == ("project", "/srv/vision/tfgpu.toml")
    assert read.find_position(origin.key) == (2, 1)


def test_a_group_file_speaks_of_its_group() -> None:
    """The base tables of a scoped machine file stand under its group, and never hold for everybody."""
    read = make_document("gpu.memory_growth = true\n[group.students]\nceiling.max_devices = 1\n", "machine")
    layer, findings = validate(replace(read, source=replace(read.source, scope=("group", "students"))))
    assert findings == ()
    assert layer.base == Tables()
    assert dict(layer.groups)["students"].gpu["memory_growth"].value is True
    assert dict(layer.groups)["students"].ceiling["max_devices"].value == 1


def test_a_user_file_speaks_of_its_user() -> None:
    """The base tables of users/NAME.toml stand under that user."""
    read = make_document('gpu.memory_limit = "1GiB"', "machine")
    layer, _ = validate(replace(read, source=replace(read.source, scope=("user", "alice"))))
    assert layer.users["alice"].gpu["memory_limit"].value == MemoryLimit(bytes=GIB)
    assert layer.base == Tables()


def test_positions_in_a_pyproject_are_those_of_the_file() -> None:
    """In a pyproject.toml a finding names the line of the file, not of the table."""
    text = '[project]\nname = "x"\n\n[tool.tfgpu.gpu]\nmemory_limit = 8\n'
    source = Source("project", "/srv/vision/pyproject.toml", table=("tool", "tfgpu"))
    _, findings = validate(Document(source, tomli.loads(text)["tool"]["tfgpu"], "0" * 64, text, 0))
    assert [(f.where, f.key) for f in findings] == [("/srv/vision/pyproject.toml:5:1", "gpu.memory_limit")]


def test_a_log_behind_a_link_out_of_the_project_is_refused(tmp_path: Path) -> None:
    """A link inside a project cannot lead its log out of it."""
    project, outside = tmp_path / "project", tmp_path / "outside"
    project.mkdir()
    outside.mkdir()
    (project / "logs").symlink_to(outside)
    (project / "real").mkdir()
    for folder, codes in (("logs", ["outside-project"]), ("real", [])):
        _, findings = validate(make_document(f'audit.file = "{folder}/a.jsonl"', path=str(project / "tfgpu.toml")))
        assert [finding.code for finding in findings] == codes


@pytest.mark.parametrize(
    "key", ["ceiling.max_devices", "gpu.memory_limit", "gpu.visible_devices", "on_error", "version"]
)
def test_an_integer_too_long_to_write_is_quoted_all_the_same(key: str) -> None:
    """Python writes no integer of thousands of digits. A finding about one is made nevertheless, and is short."""
    _, (finding,) = validate(make_document(f"{key} = 0x{'f' * 5000}"))
    assert finding.key == key
    assert len(finding.message) < 250


# ---- the schema


def list_annotated(schema: Any, name: str = "") -> Iterator[tuple[str, Any, bool]]:
    """List every key the schema knows: its name, its entry, and whether it is required."""
    for key, entry in {**schema.get("properties", {}), **schema.get("patternProperties", {})}.items():
        yield f"{name}.{key}", entry, key in schema.get("required", ())
        yield from list_annotated(entry, f"{name}.{key}")
    for key, definition in schema.get("definitions", {}).items():
        yield from list_annotated(definition, key)


def find_tables(schema: Any) -> Iterator[Any]:
    if isinstance(schema, dict):
        if "properties" in schema and isinstance(schema["properties"], dict):
            yield schema
        for inner in schema.values():
            yield from find_tables(inner)


KEYS = list(list_annotated(load_schema()))


@pytest.mark.parametrize(("entry", "required"), [key[1:] for key in KEYS], ids=[key[0] for key in KEYS])
def test_every_key_is_described(entry: Any, required: bool) -> None:
    """Every key has a description, examples that are right, and a default that is right unless it is required."""
    from jsonschema import Draft7Validator  # type: ignore[import-untyped, unused-ignore]

    assert entry["description"].endswith(".")
    right = Draft7Validator({**entry, "definitions": load_schema()["definitions"]})
    for value in entry["examples"]:
        right.validate(value)
    if not required and entry["default"] is not None:
        right.validate(entry["default"])


def test_the_schema_is_closed_and_draft_07() -> None:
    """The schema is valid draft-07, has a stable name and lets no unknown key pass."""
    from jsonschema import Draft7Validator  # type: ignore[import-untyped, unused-ignore]

    schema = load_schema()
    Draft7Validator.check_schema(schema)
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert schema["$id"] == "urn:tfenv:schema:tfgpu:1"
    assert all(table["additionalProperties"] is False for table in find_tables(schema))
    assert schema_path().name == "tfgpu.schema.json"


LIMITS = [("limit", read_total), ("process_limit", read_process_limit)]


@pytest.mark.parametrize(("definition", "reader"), LIMITS)
@given(data=st.data())
def test_what_the_pattern_accepts_is_a_size(
    definition: str, reader: Callable[[object], MemoryLimit], data: st.DataObject
) -> None:
    """Whatever matches the schema's pattern is read as a limit, or is outside of its range."""
    pattern = load_schema()["definitions"][definition]["pattern"]
    text = data.draw(st.from_regex(pattern, fullmatch=True)).removesuffix("\n")
    try:
        reader(text)
    except ValueError as wrong:
        assert re.search("less than 1 MiB|between 0% and 100%", str(wrong))  # noqa: PT017


@pytest.mark.parametrize(("definition", "reader"), LIMITS)
@given(st.text(alphabet="0123456789. %kKmMgGtTiIbBnNoOeE", max_size=8) | st.sampled_from(["granted", "Granted "]))
def test_what_is_a_size_matches_the_pattern(
    definition: str, reader: Callable[[object], MemoryLimit], text: str
) -> None:
    """Whatever is read as a limit matches the schema's pattern, but for spaces around and zeros in front."""
    try:
        reader(text)
    except ValueError:
        return
    bare = re.sub(r"^0+(?=[0-9])", "", text.strip())
    assert re.fullmatch(load_schema()["definitions"][definition]["pattern"], bare)


@pytest.mark.parametrize("text", ["granted", "Granted", " granted", "GRANTED "])
def test_only_the_limit_of_a_process_is_granted(text: str) -> None:
    """`memory_limit` takes "granted" as it is written here. `memory_total` never does, and says why."""
    if text == "granted":
        assert read_process_limit(text) == MemoryLimit(granted=True)
    else:
        with pytest.raises(ValueError, match='is not understood; write "granted"'):
            read_process_limit(text)
    with pytest.raises(ValueError, match="is the share of one process, and this is for all processes of a user"):
        read_total(text)


# ---- nothing raises


def make_strategy(schema: Any, root: Any) -> st.SearchStrategy[Any]:
    """Make values by a part of the schema: mostly right ones, some wrong ones."""
    reference = next((part["$ref"] for part in (schema, *schema.get("allOf", ())) if "$ref" in part), None)
    if reference is not None:
        return make_strategy(root["definitions"][reference.rpartition("/")[2]], root)
    if "enum" in schema:
        right: st.SearchStrategy[Any] = st.sampled_from(schema["enum"])
    elif "anyOf" in schema:
        right = st.one_of([make_strategy(option, root) for option in schema["anyOf"]])
    elif schema["type"] == "object":
        return make_table(schema, root)
    else:
        right = make_scalar(schema, root)
    return st.one_of(right, right, right, ANYTHING)


def make_scalar(schema: Any, root: Any) -> st.SearchStrategy[Any]:
    if schema["type"] == "array":
        return st.lists(make_strategy(schema["items"], root), max_size=3)
    if schema["type"] == "boolean":
        return st.booleans()
    if schema["type"] == "integer":
        return st.integers(schema.get("minimum", 0), 10)
    return st.from_regex(schema["pattern"], fullmatch=True) if "pattern" in schema else st.text(max_size=6)


def make_table(schema: Any, root: Any) -> st.SearchStrategy[Any]:
    named = {name: make_strategy(entry, root) for name, entry in schema.get("properties", {}).items()}
    known = st.fixed_dictionaries({}, optional=named)
    inner = next(iter(schema.get("patternProperties", {}).values()), None)
    if inner is not None:
        known = st.dictionaries(st.sampled_from(["alice", "/srv/a", "{x}", "a/b", "", "ü"]), make_strategy(inner, root))
    extra = st.dictionaries(st.sampled_from(["memroy_limit", "{count}", "%s", "\n", "gpu"]), ANYTHING, max_size=1)
    return st.one_of(known, known, st.builds(lambda a, b: {**b, **a}, known, extra))


ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=5), st.datetimes(), st.dates(), st.times()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
DOCUMENTS = make_strategy(load_schema(), load_schema())
LAYERS: st.SearchStrategy[LayerName] = st.sampled_from(LAYER_ORDER)


@given(DOCUMENTS, LAYERS)
def test_any_document_gives_a_layer(data: dict[str, Any], layer: LayerName) -> None:
    """Whatever a document holds, the result is a layer and findings. What was not kept is in a finding."""
    read = Document(Source(layer, "/srv/vision/tfgpu.toml"), data, "0" * 64, "", 0)
    validated, findings = validate(read, today="0000-00-00")
    assert isinstance(validated, Layer)
    assert all(isinstance(finding, Finding) for finding in findings)
    found = [finding.key or "" for finding in findings]
    for key in list_keys(data):
        assert format_key(key) in list_kept(validated) or any(is_same_place(name, format_key(key)) for name in found)
    advise([validated], [read])


OBSERVED: st.SearchStrategy[Any] = st.one_of(
    make_strategy(load_schema()["properties"]["observe"], load_schema()),
    ANYTHING,
    st.integers(2, 3000).map(lambda count: {f"memory_limit{number}": number for number in range(count)}),
    st.integers(2, 3000).map(lambda count: {"gpu": {"device": [{"match": "name:*", "x": 1}] * count}}),
)
CARDS = Inventory(tuple(Device(i, f"GPU-{i:08x}-0000-4000-8000-000000000000", "A100", 40 * GIB) for i in range(2)))
GRANTS = st.sampled_from([Grant(), Grant(tokens=()), Grant(tokens=("1",)), Grant(rank=1, launcher="torchrun")])


@given(DOCUMENTS, OBSERVED, LAYERS, GRANTS)
def test_whatever_is_observed_changes_nothing(
    data: dict[str, Any], observed: object, name: LayerName, grant: Grant
) -> None:
    """Right or junk, small or huge: the layer, the errors and the decision are those without `[observe]`."""
    data.pop("observe", None)
    source = Source(name, "/srv/vision/tfgpu.toml")
    subject = Subject("alice", 1000, ("alice", "students"), "/srv/a")

    def follow(table: dict[str, Any]) -> tuple[Layer, tuple[Finding, ...], Decision]:
        read = Document(source, table, "0" * 64, "", 0)
        layer, findings = validate(read)
        files = ReadLayers((read,), (layer,), findings)
        loaded = merge_files(Start("/srv/a", 1000), subject, files)
        return layer, findings, decide(loaded, grant, CARDS)

    layer, findings, decision = follow(data)
    tried, others, same = follow({**data, "observe": observed})
    assert replace(tried, observed=None) == layer
    assert (same.plan, same.errors, same.refused, same.no_gpu) == (
        decision.plan,
        decision.errors,
        decision.refused,
        decision.no_gpu,
    )
    more = list(others)
    for finding in findings:
        more.remove(finding)
    assert all(finding.severity != "error" and (finding.key or "observe").startswith("observe") for finding in more)


def is_same_place(one: str, other: str) -> bool:
    """Return whether one key is the other, or inside it."""
    return one.startswith(other) or other.startswith(one)


@given(st.sampled_from(POSITIVE + NEGATIVE), st.data())
def test_a_corrupted_file_gives_a_layer(path: Path, data: st.DataObject) -> None:
    """A file with flipped bytes that still parses never raises."""
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = make_document(raw.decode(), data.draw(LAYERS))
    except (UnicodeDecodeError, tomli.TOMLDecodeError):
        return
    validated, findings = validate(read)
    advise([validated], [read])
    assert all(str(finding) for finding in findings)


def test_the_deepest_nesting_gives_findings() -> None:
    """Values as deep as the reader of files lets pass are findings, not recursion errors."""
    deep = "[" * 30 + "]" * 30
    _, findings = validate(make_document(f"[gpu]\nvisible_devices = {deep}\nmemory_limit = {deep}\nother = {deep}\n"))
    assert [finding.line for finding in findings] == [2, 3, 4]


def test_without_jsonschema_a_wrong_file_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tfenv is half installed, a wrong file is one finding, and a right one is read as ever."""
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    layer, findings = validate(make_document("[gpu]\nmemory_growth = true\nmemory_limit = 8\n"))
    assert [finding.code for finding in findings] == ["incomplete-install"]
    assert list_kept(layer) == []
    layer, findings = validate(make_document("gpu.memory_growth = true"))
    assert (list_kept(layer), findings) == (["gpu.memory_growth"], ())


# ---- what it costs


def test_a_right_file_loads_neither_jsonschema_nor_fastjsonschema() -> None:
    """The libraries that cost most are not imported for a file that is right. A wrong one needs jsonschema."""
    program = f"""
import sys, json
sys.path[:0] = {[str(Path(__file__).parents[2])]}
from tfenv.lint.combinations import advise
from tfenv.config.document import Document
from tfenv.config.schema import validate
from tfenv.policy.model import Source
heavy = lambda: [name for name in ("jsonschema", "fastjsonschema", "difflib", "tomli") if name in sys.modules]
for limit in ("8GiB", 8):
    validate(Document(Source("user", "/x"), {{"gpu": {{"memory_limit": limit}}}}, "", "", 0))
    print(json.dumps(heavy()))
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    right, wrong = (json.loads(line) for line in told.splitlines())
    assert right == []
    assert "jsonschema" in wrong
    assert "fastjsonschema" not in wrong
