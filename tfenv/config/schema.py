"""A parsed document -> a validated layer.

schemas/tfgpu.schema.json says what is allowed. One pass converts what is right and collects what is wrong. A file loses
only the key that is wrong, never its other keys and ceilings. What was collected is explained afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast

from tfenv.config import _validator
from tfenv.config.values import (
    DocumentFault,
    WrongValueError,
    check_split,
    quote_value,
    read_date,
    read_overhead,
    read_process_limit,
    read_selector,
    read_selectors,
    read_size,
    read_sizes,
    read_total,
    read_visible_devices,
)
from tfenv.errors import Finding
from tfenv.policy.model import (
    DatedTable,
    DeviceRule,
    KeyPath,
    Layer,
    MemoryLimit,
    Origin,
    Selector,
    Setting,
    Source,
    Table,
    Tables,
)
from tfenv.values import replace

if TYPE_CHECKING:
    from pathlib import Path

    from tfenv.config.document import Document
    from tfenv.config.schema_lookup import SchemaLookup

_RawTable = Mapping[str, object]
_MACHINE_ONLY = ("project", "machine")
#: Whose files may have `[observe]`.
_OBSERVERS = ("machine", "site", "user")
_SUBJECTS = ("user", "group", "project")
#: Keys beside the tables of a user, group or project.
_TERMS = ("expires", "reason")
_NEWEST_VERSION = 1
_NO_FILE = "none"
_SCHEMA_NAME = "tfgpu.schema.json"


# ---- the schema itself


def schema_path(name: str = _SCHEMA_NAME) -> Path:
    """Return where a file of schemas/ is: inside the installed package, or beside it in a checkout.

    Args:
        name: The file.

    Raises:
        FileNotFoundError: It is in neither place.
    """
    # Late, as json below: no program with a right policy needs either.
    from pathlib import Path

    package = Path(__file__).resolve().parent.parent
    for folder in (package, package.parent):
        path = folder / "schemas" / name
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name} is missing from {package / 'schemas'}; install tfenv again")


@cache
def load_schema(name: str = _SCHEMA_NAME) -> dict[str, Any]:
    """Return a JSON Schema (draft-07), by default that of tfgpu.toml. It is read once per process.

    Raises:
        FileNotFoundError: It is not installed.
    """
    import json

    return cast("dict[str, Any]", json.loads(schema_path(name).read_text(encoding="utf-8")))


# ---- validate


def validate(document: Document, today: str | None = None) -> tuple[Layer, tuple[Finding, ...]]:
    """Turn a document into a layer of typed values.

    Never raises for what a file contains.

    Args:
        document: Parsed. It may hold anything TOML can.
        today: The day that tables with an end are compared with, as "2027-01-31". None: the machine's.

    Returns:
        What is right in it, and a finding with file:line:column for each thing that is wrong, in the order of the
        file. If there are very many, the last finding says how many more there are. What is wrong under `[observe]`
        comes after all others, and is a warning: nothing of it is in force.
    """
    policy, foreign = _split_foreign_tables(document)
    observed = policy.pop("observe", None)
    reader = _DocumentReader(document.source, today)
    try:
        layer = reader.read(policy)
        findings = _explain(document, [*foreign, *reader.faults], reader.lookup)
    except (ImportError, FileNotFoundError) as missing:
        foreign.append(DocumentFault((), str(missing), "incomplete-install"))
        layer, findings = reader.read({}), _explain(document, foreign, None)
    if observed is None:
        return layer, findings
    tried, wrong = _validate_observed(document, observed, today)
    return replace(layer, observed=tried), (*findings, *wrong)


def _validate_observed(document: Document, table: object, today: str | None) -> tuple[Layer, tuple[Finding, ...]]:
    """Read the tables under `[observe]` apart from all others. Whatever is wrong with them changes nothing else."""
    reader = _DocumentReader(document.source, today)
    try:
        layer = reader.read_observed(table)
        findings = _explain(document, reader.faults, reader.lookup)
    except (ImportError, FileNotFoundError) as missing:
        layer = Layer(document.source.layer)
        findings = _explain(document, [DocumentFault(("observe",), str(missing), "incomplete-install")], None)
    return layer, tuple(replace(f, severity="warning") if f.severity == "error" else f for f in findings)


def _split_foreign_tables(document: Document) -> tuple[dict[str, object], list[DocumentFault]]:
    """Take out the tables that a file of this layer may not have."""
    policy, layer = dict(_spell_dates(document.data)), document.source.layer
    foreign: list[DocumentFault] = []
    if layer != "machine":
        found = [name for name in _MACHINE_ONLY if name in policy]
        foreign += [DocumentFault((name,), policy.pop(name), "machine-layer-only") for name in found]
    if layer not in _OBSERVERS and "observe" in policy:
        foreign.append(DocumentFault(("observe",), policy.pop("observe"), "observe-not-here"))
    return policy, foreign


def _spell_dates(policy: _RawTable) -> _RawTable:
    """Return the policy with TOML's dates as text, where the schema has a date. JSON has no dates."""
    changed: dict[str, object] = {}
    for name in (*_SUBJECTS, "observe"):
        table = policy.get(name)
        if isinstance(table, Mapping):
            spelled = {key: _spell_date(inner) for key, inner in table.items()}
            changed[name] = _spell_dates(table) if name == "observe" else spelled
    return {**policy, **changed} if changed else policy


def _spell_date(table: object) -> object:
    if isinstance(table, Mapping) and type(table.get("expires")).__name__ == "date":
        return {**table, "expires": str(table["expires"])}
    return table


def _explain(document: Document, faults: list[DocumentFault], lookup: SchemaLookup | None) -> tuple[Finding, ...]:
    if not faults:
        return ()
    from tfenv.config.schema_explainer import explain_faults

    return explain_faults(document, faults, lookup)


class _LostKeyError(Exception):
    """A key is left out, and there is a fault that says so."""


class _DocumentReader:
    """Goes once through a policy table, in its order.

    Attributes:
        faults: What was wrong on the way.
        lookup: Answers what the schema says of single keys. None if it accepts the whole table.
    """

    def __init__(self, source: Source, today: str | None = None) -> None:
        self._source = source
        self._today = today
        self._dated: list[DatedTable] = []
        self.faults: list[DocumentFault] = []
        self.lookup: SchemaLookup | None = None
        self._converters: Mapping[str, Callable[[Any], object]] = {**_CONVERTERS, "file": self._check_log_file}

    def read(self, policy: _RawTable) -> Layer:
        """Return the layer of all that is right.

        Raises:
            FileNotFoundError: Something is wrong, and the schema that would say what is not installed.
        """
        self._check_all(policy)
        return self._read_layer(policy, ())

    def read_observed(self, table: object) -> Layer:
        """Return the layer of all that is right under `[observe]`.

        Raises:
            FileNotFoundError: Something is wrong, and the schema that would say what is not installed.
        """
        self._check_all({"observe": table})
        return self._read_layer(table, ("observe",))

    def _check_all(self, policy: _RawTable) -> None:
        self.lookup = None
        if not _validator.is_valid(policy):
            from tfenv.config.schema_lookup import SchemaLookup

            self.lookup = SchemaLookup(load_schema())

    def _read_layer(self, policy: object, path: KeyPath) -> Layer:
        """Return the layer of the tables that stand at a path."""
        self._dated = []
        parts = {name: self._read_part(name, value, path) for name, value in self._open_table(policy, path)}
        base = self._make_tables(parts, path)
        groups, users = parts.get("group", {}), parts.get("user", {})
        if self._source.scope is not None:
            kind, name = self._source.scope
            named = groups if kind == "group" else users
            named[name] = _override(base, named.get(name, Tables()))
            base = Tables()
        return Layer(
            name=self._source.layer,
            top=parts.get("tell" if path else "on_error", {}),
            base=base,
            groups=tuple(groups.items()),
            users=users,
            projects=parts.get("project", {}),
            audit=(parts["audit"],) if parts.get("audit") else (),
            machine=parts.get("machine", {}),
            paths=(self._source.path,),
            dated=tuple(self._dated),
        )

    def _read_part(self, name: str, value: object, path: KeyPath) -> Any:
        """Return what stands under a name: a table, or for users, groups and projects one for each."""
        if name == "version":
            return self._check_version(value)
        if name in ("on_error", "tell"):
            return self._read_table({name: value}, path)
        if name in _SUBJECTS:
            return self._read_named(value, (*path, name))
        return self._read_table(value, (*path, name))

    def _check_version(self, version: object) -> None:
        if self._accepts(("version",), version):
            return
        if isinstance(version, int) and version > _NEWEST_VERSION:
            message = f"this tfenv knows version {_NEWEST_VERSION} of the file; upgrade tfenv, or write version = 1"
            self._note(("version",), version, "newer-version", message)
        else:
            self._note(("version",), version)

    # -- tables

    def _open_table(self, table: object, path: KeyPath) -> Iterator[tuple[str, object]]:
        """Give the keys of a table that the schema knows, and their values. Each other key is a fault."""
        if not isinstance(table, Mapping):
            self._note(path, table)
            return
        known = None if self.lookup is None else self.lookup.list_known_keys(path, table)
        for name, value in table.items():
            if known is None or name in known:
                yield name, value
            else:
                self._note((*path, name), table, "unknown-key")

    def _read_table(self, raw: object, path: KeyPath) -> dict[str, Setting]:
        """Return the keys of one table that are right."""
        table: dict[str, Setting] = {}
        for key, value in self._open_table(raw, path):
            here = (*path, key)
            try:
                table[key] = Setting(self._read_value(value, here), self._make_origin(here))
            except _LostKeyError:
                continue
        if "device" in table:
            # Last, wherever it stands: `tfgpu explain` lists the settings in this order.
            table["device"] = table.pop("device")
        return table

    def _read_named(self, raw: object, kind: KeyPath) -> dict[str, Tables]:
        """Return [user.NAME.*], [group.NAME.*] or [project."PATH".*], by name. Leave out what has expired."""
        named: dict[str, Tables] = {}
        # All names at once: there may be thousands, and hardly ever a wrong one.
        right = self.lookup is None or (isinstance(raw, Mapping) and self._accepts(kind, {name: {} for name in raw}))
        for name, value in self._open_table(raw, kind):
            path, before = (*kind, name), len(self.faults)
            content = dict(self._open_table(value, path))
            terms = self._read_table({key: content.pop(key) for key in _TERMS if key in content}, path)
            parts = {table: self._read_table(inner, (*path, table)) for table, inner in content.items()}
            tables = self._make_tables(parts, path)
            if right or self._accepts(path, {}):
                if not (terms and self._note_terms(terms, path)):
                    named[name] = tables
            else:
                # Nobody has this name, so that the values do not matter.
                pruned = [fault for fault in self.faults[before:] if fault.pruned]
                self.faults[before:] = [DocumentFault(path, {}), *pruned]
        return named

    def _note_terms(self, terms: Table, path: KeyPath) -> bool:
        """Note until when the table at a path counts, and why. Return whether it has expired."""
        expires = cast("str | None", terms["expires"].value) if "expires" in terms else None
        expired = expires is not None and (self._today or _find_today()) >= expires
        reason = str(terms["reason"].value) if "reason" in terms else ""
        kind, name = cast("tuple[Literal['user', 'group', 'project'], str]", path[-2:])
        self._dated.append(DatedTable(kind, name, self._make_origin(path), expires, reason, expired))
        return expired

    def _make_tables(self, parts: Mapping[str, Any], path: KeyPath) -> Tables:
        tables = Tables(gpu=parts.get("gpu", {}), ceiling=parts.get("ceiling", {}))
        allocator = tables.gpu.get("allocator")
        if allocator is not None and allocator.value != "bfc" and _has_limit(tables):
            self._note((*path, "gpu", "allocator"), allocator.value, "allocator-without-limit")
        return tables

    # -- values

    def _read_value(self, value: object, path: KeyPath) -> object:
        """Return the typed value of a key.

        Raises:
            _LostKeyError: The key is wrong.
        """
        key = cast("str", path[-1])
        if isinstance(value, list):
            value = self._cut(value, path)
            if key == "device":
                return self._read_rules(value, path)
            if key in _ENTRY_CONVERTERS:
                # What is left of the list is fewer devices, or owners. Without the list it would be all of them.
                value = list(self._list_right_entries(value, path, _ENTRY_CONVERTERS[key]))
        elif isinstance(value, Mapping):
            value = dict(self._open_table(value, path))
            if key == "frameworks":
                return self._read_shares(value, path)
        return self._convert(value, path, self._converters.get(key))

    def _cut(self, entries: list[object], path: KeyPath) -> list[object]:
        """Return the first entries of a list, as many as may be. Of a ceiling's devices, fewer are tighter."""
        most = len(entries) if self.lookup is None else self.lookup.find_most_entries(path, entries)
        if len(entries) > most:
            self._note(path, entries, "too-many")
        return entries[:most]

    def _list_right_entries(
        self, entries: list[object], path: KeyPath, converter: Callable[[Any], object]
    ) -> Iterator[object]:
        for number, entry in enumerate(entries):
            try:
                self._convert(entry, (*path, number), converter)
            except _LostKeyError:
                continue
            yield entry

    def _convert(self, value: object, path: KeyPath, converter: Callable[[Any], object] | None) -> object:
        """Return the typed value if both its converter and the schema take it.

        Raises:
            _LostKeyError: One of them does not.
        """
        try:
            converted = converter(value) if converter else value
        except ValueError as wrong:
            self._note(path, value, getattr(wrong, "code", "invalid-value"), str(wrong))
            raise _LostKeyError from None
        if not self._accepts(path, value):
            self._note(path, value)
            raise _LostKeyError
        return converted

    def _read_shares(self, table: Mapping[str, object], path: KeyPath) -> Mapping[str, object]:
        """Return the shares of `frameworks` that are right."""
        shares: dict[str, object] = {}
        for name, value in table.items():
            try:
                shares[name] = self._convert(value, (*path, name), read_size)
            except _LostKeyError:
                continue
        return shares

    def _read_rules(self, entries: list[object], path: KeyPath) -> tuple[DeviceRule, ...]:
        """Return the entries of [[gpu.device]] that say which GPUs they are about."""
        rules = [self._read_rule(entry, (*path, number)) for number, entry in enumerate(entries)]
        return tuple(rule for rule in rules if rule is not None)

    def _read_rule(self, entry: object, path: KeyPath) -> DeviceRule | None:
        keys = {name: setting.value for name, setting in self._read_table(entry, path).items()}
        if isinstance(entry, Mapping) and "match" not in entry:
            self._note(path, {})
        if "match" not in keys:
            return None
        limit = cast("MemoryLimit | None", keys.get("memory_limit"))
        split = cast("tuple[MemoryLimit, ...]", keys.get("logical_devices", ()))
        try:
            check_split(split, limit)
        except ValueError as wrong:
            self._note((*path, "logical_devices"), split, message=str(wrong))
            split = ()
        return DeviceRule(cast("Selector", keys["match"]), self._make_origin(path), limit, split)

    def _check_log_file(self, value: object) -> object:
        """Check `audit.file`: a project's file may name a log inside the project, and none of its other files."""
        if not isinstance(value, str) or value == _NO_FILE:
            return value
        if not value.isprintable():
            raise WrongValueError(f"{quote_value(value)} contains control characters; write a plain path")
        if self._source.layer != "project":
            if not value.startswith(("/", "~/")):
                raise WrongValueError(f'{quote_value(value)} is a relative path; start it with "/" or "~/"')
        elif value:
            _check_log_of_project(os.path.dirname(self._source.path), value)
        return value

    # -- small parts

    def _accepts(self, path: KeyPath, value: object) -> bool:
        return self.lookup is None or self.lookup.accepts(path, value)

    def _note(self, path: KeyPath, value: object, kind: str = "invalid-value", message: str | None = None) -> None:
        self.faults.append(DocumentFault(path, value, kind, message))

    def _make_origin(self, path: KeyPath) -> Origin:
        return Origin(self._source.layer, self._source.path, path)


def _find_today() -> str:
    # Late: few policies have tables that end.
    from tfenv.machine_date import find_today

    return find_today()


def _make_whole(value: object) -> object:
    """Return TOML's 1.0 as 1, which it is to JSON Schema."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


#: What turns the value of a key into its typed value. A key that is not here is as the schema has checked it.
_CONVERTERS: Mapping[str, Callable[[Any], object]] = {
    "visible_devices": read_visible_devices,
    "memory_limit": read_process_limit,
    "memory_total": read_total,
    "allowed_devices": read_selectors,
    "max_devices": _make_whole,
    "process_overhead": read_overhead,
    "shards_per_gpu": _make_whole,
    "match": read_selector,
    "logical_devices": read_sizes,
    "expires": read_date,
    "trusted_owners": lambda owners: tuple(owners) if isinstance(owners, list) else owners,
}
#: Lists that lose their wrong entries and keep the others.
_ENTRY_CONVERTERS: Mapping[str, Callable[[Any], object]] = {"allowed_devices": read_selector, "trusted_owners": str}


def _override(base: Tables, specific: Tables) -> Tables:
    """Return the keys of both. The more specific table replaces."""
    return Tables(gpu={**base.gpu, **specific.gpu}, ceiling={**base.ceiling, **specific.ceiling})


def _check_log_of_project(folder: str, path: str) -> None:
    """Check that what a stranger's repository names is a new log: not ".git/config", not "train.py"."""
    inside = _find_inside(folder, path)
    if inside is None:
        message = f'{quote_value(path)} is outside the project; write a path inside it, as in "logs/tfgpu.jsonl"'
        raise WrongValueError(message, "outside-project")
    for place in (path, inside):
        hidden = any(part.startswith(".") and part != "." for part in place.split("/"))
        if hidden or not place.endswith(".jsonl"):
            what = "passes through a hidden folder or file" if hidden else 'does not end in ".jsonl"'
            raise WrongValueError(f'{quote_value(path)} {what}; write a name such as "logs/tfgpu.jsonl"')


def _find_inside(folder: str, path: str) -> str | None:
    """Return where a relative path leads to below a folder, links followed. None if it leads out of it."""
    if path.startswith(("/", "~")) or ".." in path.split("/"):
        return None
    root = os.path.realpath(folder).rstrip("/") + "/"
    real = os.path.realpath(os.path.join(root, path))
    return real[len(root) :] if real.startswith(root) else None


def _has_limit(tables: Tables) -> bool:
    limits = [table["memory_limit"].value for table in (tables.gpu, tables.ceiling) if "memory_limit" in table]
    limits += [size for rule in list_device_rules(tables.gpu) for size in (rule.memory_limit, *rule.logical_devices)]
    return any(isinstance(limit, MemoryLimit) and not limit.unlimited for limit in limits)


def list_device_rules(gpu: Table) -> tuple[DeviceRule, ...]:
    """Return the `[[gpu.device]]` entries of a table."""
    return cast("tuple[DeviceRule, ...]", gpu["device"].value) if "device" in gpu else ()
