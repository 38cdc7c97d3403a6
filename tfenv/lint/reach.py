"""Whom the tables of a machine layer reach: names that nobody has, tables that never count, keys that are replaced.

Only for `tfgpu check`. What the databases of users and groups do not list (a directory service may be set up so)
is taken to be there.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from tfenv.config.values import quote_value
from tfenv.errors import Severity
from tfenv.identity import find_group, find_subject, find_user, list_members, suggest_name
from tfenv.policy.merge import merge_groups, select_tables
from tfenv.policy.model import KeyPath, Layer, Origin, Setting, Subject, Table, Tables, format_key
from tfenv.values import frozen, replace

if TYPE_CHECKING:
    from tfenv.config.document import Document

__all__ = ["Advice", "Places", "advise_on_reach"]

_Kind = Literal["user", "group"]
#: Tables of users in the file that everybody reads: more than these are worth a word.
_MANY_TABLES = 100
#: A subject whom no table but those for everybody speaks of.
_ANYBODY = Subject("", -1, (), "/")


class Advice(NamedTuple):
    """What is to be said of a key, or of a whole file where the key is ()."""

    origin: Origin
    code: str
    message: str
    severity: Severity = "warning"


class Places:
    """Lines and columns, looked up in the documents."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self._documents = {document.source.path: document for document in documents}
        self._order = {path: number for number, path in enumerate(self._documents)}

    def position(self, origin: Origin) -> tuple[int | None, int | None]:
        """Both 1-based; None where they are not known, or the whole file is meant."""
        document = self._documents.get(origin.path)
        return (document.find_position(origin.key) if document else None) or (None, None)

    def text(self, origin: Origin, beside: Origin) -> str:
        """Where a key is, for a message about another one: "line 3" in the same file, otherwise `file:line`."""
        line, _ = self.position(origin)
        if line is None:
            return str(origin)
        return f"line {line}" if origin.path == beside.path else f"{origin.path}:{line}"

    def order(self, origin: Origin) -> tuple[int, int, int]:
        """For sorting: the order of the documents, then that of the lines."""
        line, column = self.position(origin)
        return self._order.get(origin.path, len(self._order)), line or 0, column or 0


def advise_on_reach(
    parts: Sequence[Layer], whole: Layer, documents: Sequence[Document], places: Places
) -> Iterator[Advice]:
    """What never counts in a machine layer.

    Args:
        parts: Its files, validated.
        whole: All of them as one layer.
        documents: What they were read from.
        places: For the lines of what replaces a key.
    """
    for document in documents:
        for named in _named_in(document):
            yield from _advice_on_name(named)
            yield from _advice_on_place(named, document.source.scope)
        yield from _advice_on_projects(document)
        yield from _too_many_tables(document)
        yield from _replaced_in_its_file(document, places)
    for part in parts:
        yield from _unknown_owners(part)
    yield from _replaced_by_another_file(parts, whole, places)
    yield from _replaced_for_all(whole, places)


# ---- names


@frozen
class _Named:
    """A user or group that a table or a file is for."""

    kind: _Kind
    name: str
    origin: Origin

    @property
    def is_file(self) -> bool:
        return self.origin.key == ()

    @property
    def text(self) -> str:
        return (
            f"the file of {self.kind} {quote_value(self.name)}"
            if self.is_file
            else f"[{format_key((self.kind, self.name))}]"
        )

    @cached_property
    def number(self) -> int | None:
        """Uid or gid; None when there is no such user or group."""
        return find_user(self.name) if self.kind == "user" else find_group(self.name)


def _named_in(document: Document) -> Iterator[_Named]:
    source = document.source
    if source.scope is not None:
        yield _Named(*source.scope, Origin(source.layer, source.path, ()))
    for kind in ("user", "group"):
        for name in _table(document.data, kind):
            yield _Named(kind, name, Origin(source.layer, source.path, (kind, name)))


def _table(data: object, *path: str) -> Mapping[str, object]:
    """The table there; an empty one where there is none, or something else."""
    for name in path:
        data = data.get(name) if isinstance(data, Mapping) else None
    return data if isinstance(data, Mapping) else {}


def _advice_on_name(named: _Named) -> Iterator[Advice]:
    if named.number is None:
        yield Advice(named.origin, f"unknown-{named.kind}", _unknown(named))
        return
    entry = _entry_of(named)
    own_name = f"{named.kind[0]}id:{named.number}"
    if entry is None:
        if named.name != own_name:
            yield Advice(named.origin, "unreachable-table", f"{named.text} never counts; write it {own_name}")
    elif named.name != entry and (named.kind == "group" or named.is_file):
        # A table of a user may use the number all the same.
        right = f"{named.kind}s/{entry}.toml" if named.is_file else f"[{format_key((named.kind, entry))}]"
        message = f"{named.text} never counts, for the {named.kind} has a name; write {right}"
        yield Advice(named.origin, "unreachable-table", message)
    elif named.kind == "group" and next(list_members(entry), None) is None:
        message = f"nobody is in the group {quote_value(entry)}, as far as this machine lists its members"
        yield Advice(named.origin, "empty-group", message, "note")


def _too_many_tables(document: Document) -> Iterator[Advice]:
    count = len(_table(document.data, "user"))
    if document.source.scope is None and count > _MANY_TABLES:
        message = f"everybody's programs read all {count} tables; users/NAME.toml is read for its own user only"
        yield Advice(Origin(document.source.layer, document.source.path, ("user",)), "many-tables", message, "note")


def _unknown(named: _Named) -> str:
    known: Callable[[], Iterable[str]] = _user_names if named.kind == "user" else _group_names
    meant = suggest_name(named.name, known())
    hint = f'did you mean "{meant}"?' if meant else f"{'call the file' if named.is_file else 'write it'} as `id` shows"
    return f"there is no {named.kind} {quote_value(named.name)} here; {hint}"


def _user_names() -> Iterator[str]:
    return (entry.pw_name for entry in pwd.getpwall())


def _group_names() -> Iterator[str]:
    return (entry.gr_name for entry in grp.getgrall())


def _entry_of(named: _Named) -> str | None:
    """The name in the database; None where the number has none."""
    try:
        if named.kind == "user":
            return pwd.getpwuid(named.number or 0).pw_name
        return grp.getgrgid(named.number or 0).gr_name
    except KeyError:
        return None


def _unknown_owners(part: Layer) -> Iterator[Advice]:
    owners = part.machine.get("trusted_owners")
    if owners is None or not isinstance(owners.value, tuple):
        return
    for name in owners.value:
        if find_user(str(name)) is None:
            message = f"there is no user {quote_value(name)} here, nobody is trusted by it"
            yield Advice(owners.origin, "unknown-user", message)


# ---- tables where they never count


def _advice_on_place(named: _Named, scope: tuple[_Kind, str] | None) -> Iterator[Advice]:
    """A table for somebody in a file that is read for others only."""
    if scope is None or named.is_file or named.number is None or scope == (named.kind, named.name):
        return
    file, right = f"{scope[0]}s/{scope[1]}.toml", f"{named.kind}s/{named.name}.toml"
    if named.kind == scope[0] == "group":
        message = f"{file} is read for that group's members: {named.text} counts for those in both; else it is {right}"
        yield Advice(named.origin, "partly-reachable", message)
    elif not _reaches(named, *scope):
        message = f"{named.text} never counts here: {file} is read for others; put it into {right}"
        yield Advice(named.origin, "unreachable-table", message)


def _reaches(named: _Named, kind: _Kind, owner: str) -> bool:
    """Whether a file of `owner` is read for anybody of a table in it; not both are groups."""
    if named.kind == kind:
        return find_user(owner) in (None, named.number)
    user, group = (named.name, owner) if named.kind == "user" else (owner, named.name)
    subject = find_subject(user)
    return subject is None or group in subject.groups


def _advice_on_projects(document: Document) -> Iterator[Advice]:
    for path in _table(document.data, "project"):
        if path.startswith("/") and "\0" not in path and (message := _why_no_project(path)) is not None:
            origin = Origin(document.source.layer, document.source.path, ("project", path))
            yield Advice(origin, "unreachable-table", message)


def _why_no_project(path: str) -> str | None:
    """Why no program starts below a path as it is written; None: it may."""
    real = os.path.realpath(path)
    if real != (path.rstrip("/") or "/"):
        return f"a program that starts there is in {quote_value(real)}, with all links followed; write that path"
    if os.path.isdir(real):
        return None
    what = "is no directory" if os.path.exists(real) else "is not there"
    return f"{quote_value(path)} {what}: no project can be in it; correct the path"


# ---- keys that others always replace


def _replaced_in_its_file(document: Document, places: Places) -> Iterator[Advice]:
    """`[gpu]` of users/alice.toml beside `[user.alice.gpu]` in the same file: the one in the table counts."""
    source = document.source
    if source.scope is None:
        return
    for table in ("gpu", "ceiling"):
        inner = _table(document.data, *source.scope, table)
        for key in _table(document.data, table):
            if key in inner:
                winner = Origin(source.layer, source.path, (*source.scope, table, key))
                yield _replaced(Origin(source.layer, source.path, (table, key)), winner, places)


def _replaced_by_another_file(parts: Sequence[Layer], whole: Layer, places: Places) -> Iterator[Advice]:
    """The same table in two files: the later one counts."""
    for part in parts:
        for mine, all_of_them in (
            ({"": part.base}, {"": whole.base}),
            (merge_groups(part), merge_groups(whole)),
            (part.users, whole.users),
            (part.projects, whole.projects),
        ):
            for name, tables in mine.items():
                for key, setting in _settings(tables):
                    winner = _get(all_of_them[name], key)
                    if winner is not None and winner.origin != setting.origin:
                        yield _replaced(setting.origin, winner.origin, places)


def _replaced_for_all(whole: Layer, places: Places) -> Iterator[Advice]:
    """A key that a more specific table replaces for everybody whom its own table reaches."""
    for tables, subjects in _reached(whole):
        for key, setting in _settings(tables):
            replaced_by: Setting | None = None
            for subject in subjects():
                replaced_by = _winner(whole, subject, key)
                if replaced_by is None or replaced_by.origin == setting.origin:
                    replaced_by = None
                    break
            if replaced_by is not None:
                yield _replaced(setting.origin, replaced_by.origin, places)


def _winner(whole: Layer, subject: Subject, key: KeyPath) -> Setting | None:
    found = [_get(tables, key) for tables in select_tables(whole, subject)]
    return next((setting for setting in reversed(found) if setting is not None), None)


def _reached(whole: Layer) -> Iterator[tuple[Tables, Callable[[], Iterable[Subject]]]]:
    """Each table with those whom it reaches, as far as they are known; all stand in "/", whose table is theirs, too."""
    yield whole.base, lambda: (_ANYBODY,)
    for name, tables in merge_groups(whole).items():
        yield tables, partial(_members, name)
    for name, tables in whole.users.items():
        yield tables, partial(_known, (name,))
    for path, tables in whole.projects.items():
        yield tables, partial(iter, (Subject("", -1, (), path.rstrip("/") or "/"),))


def _members(group: str) -> Iterator[Subject]:
    return _known(list_members(group))


def _known(users: Iterable[str]) -> Iterator[Subject]:
    for user in users:
        if (subject := find_subject(user)) is not None:
            yield replace(subject, project="/")


def _settings(tables: Tables) -> Iterator[tuple[KeyPath, Setting]]:
    for name, table in (("gpu", tables.gpu), ("ceiling", tables.ceiling)):
        yield from (((name, key), setting) for key, setting in table.items())


def _get(tables: Tables, key: KeyPath) -> Setting | None:
    table: Table = tables.gpu if key[0] == "gpu" else tables.ceiling
    return table.get(str(key[1]))


def _replaced(loser: Origin, winner: Origin, places: Places) -> Advice:
    return Advice(
        loser, "never-counts", f"never counts: {places.text(winner, loser)} replaces it; take one of them out"
    )
