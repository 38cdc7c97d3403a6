"""A parsed document -> a validated layer.

schemas/tfgpu.schema.json says what is allowed. A file loses only the key that is wrong, never its
other keys and ceilings, and every loss is a Finding with its place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tfenv.config import _validator
from tfenv.config.values import (
    WrongValueError,
    check_split,
    quote_value,
    read_limit,
    read_selector,
    read_selectors,
    read_sizes,
    read_visible_devices,
)
from tfenv.errors import Finding, Severity
from tfenv.policy.model import (
    DeviceRule,
    KeyPath,
    Layer,
    MemoryLimit,
    Origin,
    Selector,
    Setting,
    Table,
    Tables,
    format_key,
)

if TYPE_CHECKING:
    from tfenv.config.document import Document
    from tfenv.config.schema_explainer import Problem, SchemaExplainer

__all__ = ["load_schema", "rules_of", "schema_path", "validate"]

_Raw = Mapping[str, object]
_MACHINE_ONLY = ("project", "machine")
_NEWEST_VERSION = 1
#: Findings that are listed for one file; the others are counted.
_MOST_FINDINGS = 100
_NO_FILE = "none"


# ---- the schema itself


def schema_path() -> Path:
    """Where schemas/tfgpu.schema.json is: inside the installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: It is in neither place.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package, package.parent):
        path = folder / "schemas" / "tfgpu.schema.json"
        if path.is_file():
            return path
    raise FileNotFoundError(f"tfgpu.schema.json is missing from {package / 'schemas'}; install tfenv again")


@cache
def load_schema() -> dict[str, Any]:
    """The JSON Schema (draft-07) of tfgpu.toml, read once per process.

    Raises:
        FileNotFoundError: It is not installed.
    """
    return cast("dict[str, Any]", json.loads(schema_path().read_text(encoding="utf-8")))


# ---- validate


def validate(document: Document) -> tuple[Layer, tuple[Finding, ...]]:
    """Turn a document into a layer of typed values.

    Args:
        document: Parsed; may hold anything TOML can.

    Returns:
        What is right in it, and a finding with file:line:column for each thing that is not, in the
        order of the file; of very many the last says how many more there are. Never raises for what a
        file contains.
    """
    reader = _Reader(document)
    layer = reader.read()
    findings = sorted(reader.findings, key=lambda found: (found.line or 0, found.column or 0))
    return layer, (*findings, *reader.unlisted())


class _LostError(Exception):
    """A value is left out, and the finding is there."""


class _Reader:
    """Reads one document; its findings gather on the way."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.source = document.source
        self.findings: list[Finding] = []
        self._unlisted: list[Severity] = []
        #: None: the schema has nothing against the document.
        self._judge: SchemaExplainer | None = None
        self._sifted_out: Sequence[Problem] = ()

    # -- findings

    def report(self, code: str, path: KeyPath, message: str, severity: Severity = "error") -> None:
        """Add a finding about a key, given by its path inside the policy table."""
        if len(self.findings) >= _MOST_FINDINGS:
            self._unlisted.append(severity)
            return
        line, column = self.document.position(path) or (None, None)
        self.findings.append(Finding(code, message, severity, self.source.path, line, column, format_key(path) or None))

    def unlisted(self) -> Iterator[Finding]:
        """One finding for all that are not listed, as severe as the worst of them."""
        if self._unlisted:
            severity: Severity = "error" if "error" in self._unlisted else "warning"
            message = f"… and {len(self._unlisted)} more; correct those that are listed first"
            yield Finding("more-findings", message, severity, self.source.path)

    def _objection(self, path: KeyPath, value: object) -> Problem | None:
        """What the schema has against the value of a key, or something inside it."""
        if self._judge is None:
            return None
        return self._judge.objection(path, value, explained=len(self.findings) < _MOST_FINDINGS)

    def _refuse(self, path: KeyPath, value: object, otherwise: str) -> None:
        """Report what the schema has against a key; `otherwise` where it does not say."""
        problem = self._objection(path, value)
        self.report("invalid-value", path, problem.message if problem else otherwise)

    def _converted(self, value: object, path: KeyPath, convert: Callable[[Any], object] | None) -> object:
        """A value as its typed value, when its reader and the schema take it.

        Raises:
            _LostError: They do not; it is reported, at the place inside the value that is wrong.
        """
        problem = self._objection(path, value)
        place = problem.path if problem else path
        try:
            converted = convert(value) if convert else value
        except ValueError as wrong:
            self.report(getattr(wrong, "code", "invalid-value"), place, str(wrong))
            raise _LostError from None
        if problem is not None:
            self.report("invalid-value", place, problem.message)
            raise _LostError
        return converted

    def _setting(self, value: object, path: KeyPath) -> Setting:
        return Setting(value, self._origin(path))

    def _origin(self, path: KeyPath) -> Origin:
        return Origin(self.source.layer, self.source.path, path)

    # -- the document

    def read(self) -> Layer:
        """The layer. Steps: drop what may not be here, ask the schema, convert."""
        policy = self._checked(self._for_this_layer(self.document.data))
        layer = self._layer(policy)
        for problem in self._sifted_out:
            severity: Severity = "warning" if problem.code == "unknown-key" else "error"
            self.report(problem.code, problem.path, problem.message, severity)
        return layer

    def _for_this_layer(self, policy: _Raw) -> _Raw:
        """Without the tables that only an administrator's file may have."""
        if self.source.layer == "machine":
            return policy
        for name in _MACHINE_ONLY:
            if name in policy:
                message = f"[{name}] counts only in the machine's file, /etc/tfgpu/tfgpu.toml; take it out of this one"
                self.report("machine-layer-only", (name,), message)
        return {name: value for name, value in policy.items() if name not in _MACHINE_ONLY}

    def _checked(self, policy: _Raw) -> _Raw:
        """Ask the schema; go on without unknown keys and what is too much."""
        if _validator.is_valid(policy):
            return policy
        try:
            from tfenv.config.schema_explainer import SchemaExplainer

            self._judge = SchemaExplainer(load_schema())
        except (ImportError, FileNotFoundError) as missing:
            message = f"a mistake here cannot be named because tfenv is incomplete; install it again ({missing})"
            self.report("incomplete-install", (), message)
            return {}
        policy, self._sifted_out = self._judge.sifted(policy)
        return policy

    def _layer(self, policy: _Raw) -> Layer:
        base = self._tables(policy, ())
        groups, users, projects = (self._named(policy, name) for name in ("group", "user", "project"))
        scoped = {"group": groups, "user": users}
        if self.source.scope is not None:
            kind, name = self.source.scope
            scoped[kind][name] = _over(base, scoped[kind].get(name, Tables()))
        audit = self._table(policy, ("audit",), {"file": self._log_file})
        return Layer(
            name=self.source.layer,
            top=self._top(policy),
            base=Tables() if self.source.scope is not None else base,
            groups=tuple(groups.items()),
            users=users,
            projects=projects,
            audit=(audit,) if audit else (),
            machine=self._machine(policy),
            paths=(self.source.path,),
        )

    def _top(self, policy: _Raw) -> Table:
        self._version(policy.get("version", _NEWEST_VERSION))
        if "on_error" not in policy:
            return {}
        return self._keys({"on_error": policy["on_error"]}, (), {})

    def _version(self, version: object) -> None:
        problem = self._objection(("version",), version)
        if problem is None:
            return
        if isinstance(version, int) and version > _NEWEST_VERSION:
            message = f"this tfenv knows version {_NEWEST_VERSION} of the file; upgrade tfenv, or write version = 1"
            self.report("newer-version", ("version",), message, "warning")
        else:
            self.report("invalid-value", ("version",), problem.message)

    def _machine(self, policy: _Raw) -> Table:
        path: KeyPath = ("machine",)
        raw = dict(self._raw(policy, path))
        if isinstance(raw.get("trusted_owners"), list):
            raw["trusted_owners"] = self._good_entries(raw["trusted_owners"], (*path, "trusted_owners"), str)
        return self._keys(raw, path, {"trusted_owners": _tuple})

    # -- tables

    def _raw(self, parent: _Raw, path: KeyPath) -> _Raw:
        """The table under the last name of the path; {} when there is none, or something else."""
        value = parent.get(cast(str, path[-1]), {})
        if isinstance(value, Mapping):
            return cast(_Raw, value)
        self._refuse(path, value, f"{quote_value(value)} is not a table")
        return {}

    def _named(self, policy: _Raw, kind: str) -> dict[str, Tables]:
        """[user.NAME.*], [group.NAME.*] or [project."PATH".*]."""
        named: dict[str, Tables] = {}
        raw = self._raw(policy, (kind,))
        for name in raw:
            path: KeyPath = (kind, name)
            if (problem := self._objection(path, {})) is not None:
                self.report("invalid-value", path, problem.message)
            else:
                named[name] = self._tables(self._raw(raw, path), path)
        return named

    def _tables(self, parent: _Raw, path: KeyPath) -> Tables:
        gpu_path: KeyPath = (*path, "gpu")
        raw = dict(self._raw(parent, gpu_path))
        rules = self._rules(raw.pop("device", None), (*gpu_path, "device"))
        gpu = self._keys(raw, gpu_path, {"visible_devices": read_visible_devices, "memory_limit": read_limit})
        if rules is not None:
            gpu["device"] = self._setting(rules, (*gpu_path, "device"))
        tables = Tables(gpu=gpu, ceiling=self._ceiling(parent, (*path, "ceiling")))
        self._check_allocator(tables, gpu_path)
        return tables

    def _ceiling(self, parent: _Raw, path: KeyPath) -> Table:
        raw = dict(self._raw(parent, path))
        if isinstance(raw.get("allowed_devices"), list):
            # What is left of the list is fewer devices; without the list it would be all of them.
            raw["allowed_devices"] = self._good_entries(
                raw["allowed_devices"], (*path, "allowed_devices"), read_selector
            )
        limits = {"memory_limit": read_limit, "memory_total": read_limit}
        return self._keys(raw, path, {"allowed_devices": read_selectors, "max_devices": _whole, **limits})

    def _table(self, parent: _Raw, path: KeyPath, converters: Mapping[str, Callable[[Any], object]]) -> Table:
        return self._keys(self._raw(parent, path), path, converters)

    def _keys(self, raw: _Raw, path: KeyPath, converters: Mapping[str, Callable[[Any], object]]) -> dict[str, Setting]:
        """The keys of one table that are right; a key without a converter is as the schema has checked it."""
        table: dict[str, Setting] = {}
        for key, value in raw.items():
            here: KeyPath = (*path, key)
            with suppress(_LostError):
                table[key] = self._setting(self._converted(value, here, converters.get(key)), here)
        return table

    def _good_entries(self, entries: object, path: KeyPath, convert: Callable[[Any], object]) -> list[object]:
        """The entries of a list that are right, each of the others a finding."""
        good: list[object] = []
        for number, entry in enumerate(cast("list[object]", entries)):
            with suppress(_LostError):
                self._converted(entry, (*path, number), convert)
                good.append(entry)
        return good

    # -- [[gpu.device]]

    def _rules(self, entries: object, path: KeyPath) -> tuple[DeviceRule, ...] | None:
        """The entries that say which GPUs they are about; None when the key is not there or no list."""
        if entries is None:
            return None
        if not isinstance(entries, list):
            self._refuse(path, entries, f"{quote_value(entries)} is not a list; write [[gpu.device]]")
            return None
        read = (self._rule(entry, (*path, number)) for number, entry in enumerate(entries))
        return tuple(rule for rule in read if rule is not None)

    def _rule(self, entry: object, path: KeyPath) -> DeviceRule | None:
        if not isinstance(entry, Mapping):
            self._refuse(path, entry, f"{quote_value(entry)} is not a table; write [[gpu.device]]")
            return None
        converters = {"match": read_selector, "memory_limit": read_limit, "logical_devices": read_sizes}
        keys = {name: setting.value for name, setting in self._keys(cast(_Raw, entry), path, converters).items()}
        if "match" not in entry:
            self._refuse(path, {}, '"match" is missing')
        if "match" not in keys:
            return None
        limit = cast("MemoryLimit | None", keys.get("memory_limit"))
        split = cast("tuple[MemoryLimit, ...]", keys.get("logical_devices", ()))
        try:
            check_split(split, limit)
        except ValueError as wrong:
            self.report("invalid-value", (*path, "logical_devices"), str(wrong))
            split = ()
        return DeviceRule(cast(Selector, keys["match"]), self._origin(path), limit, split)

    # -- meaning

    def _check_allocator(self, tables: Tables, path: KeyPath) -> None:
        allocator = tables.gpu.get("allocator")
        if allocator is not None and allocator.value != "bfc" and _limits(tables):
            message = (
                f'"{allocator.value}" does not keep a memory limit; write allocator = "bfc", which is used instead'
            )
            self.report("allocator-without-limit", (*path, "allocator"), message, "warning")

    def _log_file(self, value: object) -> object:
        """`audit.file`: a project's file may name a log inside the project, and none of its other files."""
        if not isinstance(value, str) or value == _NO_FILE:
            return value
        if not value.isprintable():
            raise WrongValueError(f"{quote_value(value)} holds control characters; write a plain path")
        if self.source.layer != "project":
            if not value.startswith(("/", "~/")):
                raise WrongValueError(f'{quote_value(value)} is relative to nothing; begin it with "/" or "~/"')
        elif value:
            _check_log_of_project(os.path.dirname(self.source.path), value)
        return value


# ---- small parts


def _over(base: Tables, specific: Tables) -> Tables:
    """The keys of both; the more specific table replaces."""
    return Tables(gpu={**base.gpu, **specific.gpu}, ceiling={**base.ceiling, **specific.ceiling})


def _whole(value: object) -> object:
    """TOML's 1.0 is the whole number 1 to JSON Schema."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _check_log_of_project(folder: str, path: str) -> None:
    """What a stranger's repository names is appended to: a new log, and not ".git/config" or "train.py"."""
    inside = _inside(folder, path)
    if inside is None:
        message = f'{quote_value(path)} is outside of the project; write a path inside it, as in "logs/tfgpu.jsonl"'
        raise WrongValueError(message, "outside-project")
    for place in (path, inside):
        hidden = any(part.startswith(".") and part != "." for part in place.split("/"))
        if hidden or not place.endswith(".jsonl"):
            what = "passes through a hidden folder or file" if hidden else 'does not end in ".jsonl"'
            raise WrongValueError(f'{quote_value(path)} {what}; a log of a project is called as in "logs/tfgpu.jsonl"')


def _inside(folder: str, path: str) -> str | None:
    """Where a relative path leads to below a folder, links followed; None where it leads out of it."""
    if path.startswith(("/", "~")) or ".." in path.split("/"):
        return None
    root = os.path.realpath(folder).rstrip("/") + "/"
    real = os.path.realpath(os.path.join(root, path))
    return real[len(root) :] if real.startswith(root) else None


def _limits(tables: Tables) -> bool:
    """Whether the tables limit memory anywhere."""
    limits = [table["memory_limit"].value for table in (tables.gpu, tables.ceiling) if "memory_limit" in table]
    limits += [size for rule in rules_of(tables.gpu) for size in (rule.memory_limit, *rule.logical_devices)]
    return any(isinstance(limit, MemoryLimit) and not limit.unlimited for limit in limits)


def rules_of(gpu: Table) -> tuple[DeviceRule, ...]:
    """The `[[gpu.device]]` entries of a table."""
    return cast("tuple[DeviceRule, ...]", gpu["device"].value) if "device" in gpu else ()
