"""Remarks on whom a layer for everybody reaches, the machine's or the site's.

They are about names that nobody has, tables that never count, and keys that are replaced.

What the databases of users and groups do not list (a directory service may be set up so) is taken to be there.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal

from tfenv.config.values import quote_value
from tfenv.errors import Severity
from tfenv.identity import find_group, find_subject, find_user, list_members, suggest_name
from tfenv.policy.merge import merge_groups, select_tables
from tfenv.policy.model import KeyPath, Layer, Origin, Setting, Subject, Table, Tables, format_key
from tfenv.values import frozen, replace

if TYPE_CHECKING:
    from tfenv.config.document import Document

_SubjectKind = Literal["user", "group"]
#: Tables of users in the file that everybody reads: more than these are worth a word.
_MANY_TABLES = 100
#: A subject whom no table but those for everybody speaks of.
_ANYBODY = Subject("", -1, (), "/")


@frozen
class LintRemark:
    """What is to be said of a key, or of a whole file if the key is ()."""

    origin: Origin
    code: str
    message: str
    severity: Severity = "warning"


class KeyPositions:
    """Finds lines and columns of keys in several documents."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self._documents = {document.source.path: document for document in documents}
        self._order = {path: number for number, path in enumerate(self._documents)}

    def find_position(self, origin: Origin) -> tuple[int | None, int | None]:
        """Return line and column, both 1-based. None if they are not known, or the whole file is meant."""
        document = self._documents.get(origin.path)
        return (document.find_position(origin.key) if document else None) or (None, None)

    def describe(self, origin: Origin, beside: Origin) -> str:
        """Say where a key is, for a message about another one: "line 3" in the same file, otherwise `file:line`."""
        line, _ = self.find_position(origin)
        if line is None:
            return str(origin)
        return f"line {line}" if origin.path == beside.path else f"{origin.path}:{line}"

    def find_sort_key(self, origin: Origin) -> tuple[int, int, int]:
        """Return what to sort by: the order of the documents, then that of the lines."""
        line, column = self.find_position(origin)
        return self._order.get(origin.path, len(self._order)), line or 0, column or 0


def advise_on_reach(
    parts: Sequence[Layer], whole: Layer, documents: Sequence[Document], positions: KeyPositions
) -> Iterator[LintRemark]:
    """Say what never counts in a layer that is for everybody, the machine's or the site's.

    Args:
        parts: Its files, validated.
        whole: All of them as one layer.
        documents: What they were read from.
        positions: For the lines of what replaces a key.
    """
    for document in documents:
        for named in _list_named(document):
            yield from _check_name(named)
            yield from _check_file(named, document.source.scope)
        yield from _check_projects(document)
        yield from _check_table_count(document)
        yield from _check_replaced_in_file(document, positions)
    for part in parts:
        yield from _check_owners(part)
    yield from _check_replaced_by_file(parts, whole, positions)
    yield from _check_replaced_for_all(whole, positions)


# ---- names


@frozen
class _NamedSubject:
    """A user or group that a table or a file is for."""

    kind: _SubjectKind
    name: str
    origin: Origin

    @property
    def is_file(self) -> bool:
        return self.origin.key == ()

    @property
    def text(self) -> str:
        if self.is_file:
            return f"the file of {self.kind} {quote_value(self.name)}"
        return f"[{format_key(self.origin.key)}]"

    @cached_property
    def number(self) -> int | None:
        """Uid or gid. None if there is no such user or group."""
        return find_user(self.name) if self.kind == "user" else find_group(self.name)


def _list_named(document: Document) -> Iterator[_NamedSubject]:
    source = document.source
    if source.scope is not None:
        yield _NamedSubject(*source.scope, Origin(source.layer, source.path, ()))
    for path in ((), ("observe",)):
        for kind in ("user", "group"):
            for name in _find_table(document.data, *path, kind):
                yield _NamedSubject(kind, name, Origin(source.layer, source.path, (*path, kind, name)))


def _find_table(data: object, *path: str) -> Mapping[str, object]:
    """Return the table at a path. An empty one if there is none, or something else."""
    for name in path:
        data = data.get(name) if isinstance(data, Mapping) else None
    return data if isinstance(data, Mapping) else {}


def _check_name(named: _NamedSubject) -> Iterator[LintRemark]:
    if named.number is None:
        yield LintRemark(named.origin, f"unknown-{named.kind}", _describe_unknown(named))
        return
    entry = _find_entry_name(named)
    own_name = f"{named.kind[0]}id:{named.number}"
    if entry is None:
        if named.name != own_name:
            yield LintRemark(named.origin, "unreachable-table", f"{named.text} never counts; write it {own_name}")
    elif named.name != entry and (named.kind == "group" or named.is_file):
        # A table of a user may use the number all the same.
        right = f"{named.kind}s/{entry}.toml" if named.is_file else f"[{format_key((named.kind, entry))}]"
        message = f"{named.text} never counts, because the {named.kind} has a name; write {right}"
        yield LintRemark(named.origin, "unreachable-table", message)
    elif named.kind == "group" and next(list_members(entry), None) is None:
        message = f"the group {quote_value(entry)} has no members that this machine lists"
        yield LintRemark(named.origin, "empty-group", message, "note")


def _check_table_count(document: Document) -> Iterator[LintRemark]:
    count = len(_find_table(document.data, "user"))
    if document.source.scope is None and count > _MANY_TABLES:
        message = f"everybody's programs read all {count} tables; users/NAME.toml is read for its own user only"
        yield LintRemark(Origin(document.source.layer, document.source.path, ("user",)), "many-tables", message, "note")


def _describe_unknown(named: _NamedSubject) -> str:
    users, groups = (entry.pw_name for entry in pwd.getpwall()), (entry.gr_name for entry in grp.getgrall())
    meant = suggest_name(named.name, users if named.kind == "user" else groups)
    database = "passwd" if named.kind == "user" else "group"
    hint = f'did you mean "{meant}"?' if meant else f"create it, or compare the spelling with `getent {database}`"
    return f"there is no {named.kind} {quote_value(named.name)} here; {hint}"


def _find_entry_name(named: _NamedSubject) -> str | None:
    """Return the name that the database has for the number. None if it has none."""
    try:
        if named.kind == "user":
            return pwd.getpwuid(named.number or 0).pw_name
        return grp.getgrgid(named.number or 0).gr_name
    except KeyError:
        return None


def _check_owners(part: Layer) -> Iterator[LintRemark]:
    owners = part.machine.get("trusted_owners")
    if owners is None or not isinstance(owners.value, tuple):
        return
    for name in owners.value:
        if find_user(str(name)) is None:
            message = f"there is no user {quote_value(name)} here, so this entry trusts nobody"
            yield LintRemark(owners.origin, "unknown-user", message)


# ---- tables where they never count


def _check_file(named: _NamedSubject, scope: tuple[_SubjectKind, str] | None) -> Iterator[LintRemark]:
    """Find a table for somebody in a file that is read for others only."""
    if scope is None or named.is_file or named.number is None or scope == (named.kind, named.name):
        return
    file, right = f"{scope[0]}s/{scope[1]}.toml", f"{named.kind}s/{named.name}.toml"
    if named.kind == scope[0] == "group":
        message = f"{named.text} counts only for members of both groups; use {right} for everybody in {named.name}"
        yield LintRemark(named.origin, "partly-reachable", message)
    elif not _may_reach(named, *scope):
        message = f"{named.text} never counts here: {file} is read for others; put it into {right}"
        yield LintRemark(named.origin, "unreachable-table", message)


def _may_reach(named: _NamedSubject, kind: _SubjectKind, owner: str) -> bool:
    """Return whether a file of `owner` is read for anybody of a table in it. Not both are groups."""
    if named.kind == kind:
        return find_user(owner) in (None, named.number)
    user, group = (named.name, owner) if named.kind == "user" else (owner, named.name)
    subject = find_subject(user)
    return subject is None or group in subject.groups


def _check_projects(document: Document) -> Iterator[LintRemark]:
    for key in (("project",), ("observe", "project")):
        for path in _find_table(document.data, *key):
            if path.startswith("/") and "\0" not in path and (message := _explain_no_project(path)) is not None:
                origin = Origin(document.source.layer, document.source.path, (*key, path))
                yield LintRemark(origin, "unreachable-table", message)


def _explain_no_project(path: str) -> str | None:
    """Say why no program starts below a path as it is written. None: one may."""
    real = os.path.realpath(path)
    if real != (path.rstrip("/") or "/"):
        return f"this path leads through links to {quote_value(real)}; write that path"
    if os.path.isdir(real):
        return None
    what = "is not a directory" if os.path.exists(real) else "is not there"
    return f"{quote_value(path)} {what}, so no project can be in it; correct the path"


# ---- keys that others always replace


def _check_replaced_in_file(document: Document, positions: KeyPositions) -> Iterator[LintRemark]:
    """Find `[gpu]` of users/alice.toml beside `[user.alice.gpu]` in the same file: the one in the table counts."""
    source = document.source
    if source.scope is None:
        return
    for table in ("gpu", "ceiling"):
        inner = _find_table(document.data, *source.scope, table)
        for key in _find_table(document.data, table):
            if key in inner:
                winner = Origin(source.layer, source.path, (*source.scope, table, key))
                yield _make_replaced_remark(Origin(source.layer, source.path, (table, key)), winner, positions)


def _check_replaced_by_file(parts: Sequence[Layer], whole: Layer, positions: KeyPositions) -> Iterator[LintRemark]:
    """Find the same table in two files: the later one counts."""
    for part in parts:
        for mine, all_of_them in (
            ({"": part.base}, {"": whole.base}),
            (merge_groups(part), merge_groups(whole)),
            (part.users, whole.users),
            (part.projects, whole.projects),
        ):
            for name, tables in mine.items():
                for key, setting in _list_settings(tables):
                    winner = _get_setting(all_of_them[name], key)
                    if winner is not None and winner.origin != setting.origin:
                        yield _make_replaced_remark(setting.origin, winner.origin, positions)


def _check_replaced_for_all(whole: Layer, positions: KeyPositions) -> Iterator[LintRemark]:
    """Find a key that a more specific table replaces for everybody whom its own table reaches."""
    for tables, subjects in _list_reached(whole):
        for key, setting in _list_settings(tables):
            replaced_by: Setting | None = None
            for subject in subjects():
                replaced_by = _find_winner(whole, subject, key)
                if replaced_by is None or replaced_by.origin == setting.origin:
                    replaced_by = None
                    break
            if replaced_by is not None:
                yield _make_replaced_remark(setting.origin, replaced_by.origin, positions)


def _find_winner(whole: Layer, subject: Subject, key: KeyPath) -> Setting | None:
    found = [_get_setting(tables, key) for tables in select_tables(whole, subject)]
    return next((setting for setting in reversed(found) if setting is not None), None)


def _list_reached(whole: Layer) -> Iterator[tuple[Tables, Callable[[], Iterable[Subject]]]]:
    """List each table with those whom it reaches, as far as they are known. All stand in the project "/"."""
    yield whole.base, lambda: (_ANYBODY,)
    for name, tables in merge_groups(whole).items():
        yield tables, partial(_list_member_subjects, name)
    for name, tables in whole.users.items():
        yield tables, partial(_list_known_subjects, (name,))
    for path, tables in whole.projects.items():
        yield tables, partial(iter, (Subject("", -1, (), path.rstrip("/") or "/"),))


def _list_member_subjects(group: str) -> Iterator[Subject]:
    return _list_known_subjects(list_members(group))


def _list_known_subjects(users: Iterable[str]) -> Iterator[Subject]:
    for user in users:
        if (subject := find_subject(user)) is not None:
            yield replace(subject, project="/")


def _list_settings(tables: Tables) -> Iterator[tuple[KeyPath, Setting]]:
    for name, table in (("gpu", tables.gpu), ("ceiling", tables.ceiling)):
        yield from (((name, key), setting) for key, setting in table.items())


def _get_setting(tables: Tables, key: KeyPath) -> Setting | None:
    table: Table = tables.gpu if key[0] == "gpu" else tables.ceiling
    return table.get(str(key[1]))


def _make_replaced_remark(loser: Origin, winner: Origin, positions: KeyPositions) -> LintRemark:
    message = f"is ignored: {positions.describe(winner, loser)} replaces it; remove one of them"
    return LintRemark(loser, "never-counts", message)
