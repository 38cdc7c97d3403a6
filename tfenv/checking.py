"""Looks for mistakes in policy files: those that have a say here, or those that are named."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from tfenv.config.discover import FILE_NAME, PYPROJECT_TABLE
from tfenv.config.document import Document, DocumentError, Trust, read
from tfenv.config.schema import advise, validate
from tfenv.errors import Finding
from tfenv.pipeline import MACHINE_ROOT, current_start, load
from tfenv.policy.merge import combine
from tfenv.policy.model import Layer, Source

__all__ = ["Checked", "check_here", "check_path"]

_PYPROJECT = "pyproject.toml"
_SCOPES: dict[str, Literal["group", "user"]] = {"groups": "group", "users": "user"}


@dataclass(frozen=True)
class Checked:
    """What was looked at, and what is wrong with it.

    Attributes:
        files: Absolute paths; those that were left out, too.
        findings: In the order of the files; advice on what is right but hardly meant comes last.
    """

    files: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    def __add__(self, other: Checked) -> Checked:
        return Checked(
            tuple(dict.fromkeys(self.files + other.files)), tuple(dict.fromkeys(self.findings + other.findings))
        )


def check_here() -> Checked:
    """Check every file that has a say for a process that starts here and now."""
    loaded = load(current_start())
    read_files = [document.source.path for document in loaded.documents]
    dropped = [finding.path for finding in loaded.findings if finding.path is not None]
    findings = (*loaded.findings, *_advice(loaded.layers, loaded.documents))
    return Checked(tuple(dict.fromkeys((*read_files, *dropped))), findings)


def check_path(path: str, *, table_optional: bool = False) -> Checked:
    """Check one file, or all files of a directory: a project's, or a machine layer's tree.

    A machine layer that is not /etc/tfgpu is a draft: whoever owns the directory counts as its administrator.

    Args:
        path: Of a tfgpu.toml, a pyproject.toml, or a directory. One that does not exist is a finding.
        table_optional: A pyproject.toml without a table of ours is no mistake.
    """
    full = os.path.abspath(path)
    if not os.path.lexists(full):
        return _nothing(full, "there is no such file or directory; correct the path")
    sources = list(_sources_in(full) if os.path.isdir(full) else [_source_of(full, table_optional=table_optional)])
    if not sources:
        message = f"neither {FILE_NAME} nor {_PYPROJECT} is here; `tfgpu init` writes a first policy"
        return _nothing(full, message)
    return _check(sources)


def _nothing(path: str, message: str) -> Checked:
    return Checked((), (Finding("not-found", message, path=path),))


def _check(sources: Iterable[Source]) -> Checked:
    documents: list[Document] = []
    layers: list[Layer] = []
    findings: list[Finding] = []
    files: list[str] = []
    for source in sources:
        files.append(source.path)
        try:
            document = read(source, _trust(source))
        except DocumentError as error:
            findings.append(error.finding)
            continue
        layer, wrong = validate(document)
        documents.append(document)
        layers.append(layer)
        findings.extend(wrong)
    return Checked(tuple(files), (*findings, *_advice(layers, documents)))


def _advice(layers: Iterable[Layer], documents: Iterable[Document]) -> Iterator[Finding]:
    known = tuple(documents)
    for layer in combine(layers):
        yield from advise(layer, known)


# ---- which files, and whose


def _sources_in(folder: str) -> Iterator[Source]:
    """All files of a directory, also those of groups and users that the caller is none of."""
    names = [FILE_NAME]
    for scope in _SCOPES:
        names += [f"{scope}/{name}" for name in _toml_files(os.path.join(folder, scope))]
    for name in names:
        if os.path.lexists(os.path.join(folder, name)):
            yield _source_of(os.path.join(folder, name))
    pyproject = os.path.join(folder, _PYPROJECT)
    if os.path.lexists(pyproject) and not _is_machine_root(folder):
        yield Source("project", pyproject, table=PYPROJECT_TABLE, start_owner=_owner(folder))


def _toml_files(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith(".toml") and not name.startswith("."))
    except OSError:
        return []


def _source_of(path: str, *, table_optional: bool = False) -> Source:
    """A file with the layer that it belongs to where it stands."""
    folder, name = os.path.split(path)
    root, scope = os.path.split(folder)
    if scope in _SCOPES and _is_machine_root(root):
        return Source("machine", path, scope=(_SCOPES[scope], name.removesuffix(".toml")))
    if _is_machine_root(folder):
        return Source("machine", path)
    if path == os.path.join(current_start().config_home or "", "tfgpu", FILE_NAME):
        return Source("user", path, start_owner=_owner(folder))
    # A pyproject.toml that is named on purpose and has no table of ours is a mistake.
    table = PYPROJECT_TABLE if name == _PYPROJECT else ()
    return Source("project", path, table=table, start_owner=_owner(folder), required=not table_optional)


def _is_machine_root(folder: str) -> bool:
    return folder == MACHINE_ROOT or any(_toml_files(os.path.join(folder, scope)) for scope in _SCOPES)


def _trust(source: Source) -> Trust:
    """Of a draft the owner is the administrator, and what stands above its directory does not matter yet."""
    uid = os.geteuid()
    root = os.path.dirname(source.path)
    root = os.path.dirname(root) if source.scope is not None else root
    owner = _owner(root)
    if source.layer != "machine" or root == MACHINE_ROOT or owner is None:
        return Trust(uid)
    return Trust(uid, administrator=owner, checked_from=root)


def _owner(folder: str) -> int | None:
    try:
        return os.stat(folder).st_uid
    except OSError:
        return None
