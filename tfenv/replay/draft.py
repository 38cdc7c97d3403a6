"""Reads the policy that a log is run through, as the machine's layer, wherever it stands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Literal

from tfenv.config.document import Document, DocumentError, Trust, peek_text
from tfenv.config.presence import FILE_NAME
from tfenv.errors import Finding
from tfenv.pipeline import read_layers
from tfenv.policy.merge import merge, merge_observed
from tfenv.policy.model import EffectivePolicy, Layer, Origin, Source, Subject
from tfenv.values import frozen, replace

_SCOPES: dict[str, Literal["group", "user"]] = {"groups": "group", "users": "user"}


@frozen
class DraftPolicy:
    """A machine layer that was read for everybody.

    Attributes:
        documents: Its files, those of all groups and users.
        layers: What of each is valid, in the same order.
        findings: What is wrong with them.
    """

    documents: tuple[Document, ...] = ()
    layers: tuple[Layer, ...] = ()
    findings: tuple[Finding, ...] = ()

    def merge_for(self, subject: Subject, *, observed: bool = False) -> EffectivePolicy:
        """Return what holds for one subject.

        Args:
            subject: For whom.
            observed: As if the tables under `[observe]` were in force.
        """
        layers = [
            layer
            for document, layer in zip(self.documents, self.layers, strict=True)
            if is_for(document.source, subject)
        ]
        tried = merge_observed(layers, subject) if observed else None
        return merge(layers, subject) if tried is None else tried.policy

    def find_place(self, origin: Origin) -> str:
        """Return `file:line:column` of a key."""
        document = next((document for document in self.documents if document.source.path == origin.path), None)
        place = None if document is None else document.find_position(origin.key)
        return origin.path if place is None else f"{origin.path}:{place[0]}:{place[1]}"


def is_for(source: Source, subject: Subject) -> bool:
    """Return whether a file of the machine's counts for a subject."""
    if source.scope is None:
        return True
    kind, name = source.scope
    return name in (subject.groups if kind == "group" else (subject.user, f"uid:{subject.uid}"))


def read_draft(path: str, today: str | None = None) -> DraftPolicy:
    """Read a directory that is, or is to be, /etc/tfgpu, or a single file.

    Whose the files are and who may write them does not matter: they are in force for nobody yet.

    Args:
        path: The directory, or a tfgpu.toml.
        today: The day that tables with an end are compared with, as "2027-01-31". None: the machine's.
    """
    full = os.path.abspath(path)
    sources: list[Source] = []
    findings: list[Finding] = []
    for source in _list_sources(full) if os.path.isdir(full) else [Source("machine", full)]:
        try:
            sources.append(replace(source, text=peek_text(source.path)))
        except DocumentError as error:
            findings.append(error.finding)
    found = read_layers(sources, Trust(os.geteuid()), today=today)
    return DraftPolicy(found.documents, found.layers, (*findings, *found.findings))


def _list_sources(root: str) -> Iterator[Source]:
    """List the files of everybody in the order in which later ones replace earlier ones."""
    if os.path.lexists(os.path.join(root, FILE_NAME)):
        yield Source("machine", os.path.join(root, FILE_NAME))
    for folder, scope in _SCOPES.items():
        try:
            names = sorted(os.listdir(os.path.join(root, folder)))
        except OSError:
            continue
        for name in names:
            if name.endswith(".toml") and not name.startswith("."):
                yield Source("machine", os.path.join(root, folder, name), scope=(scope, name.removesuffix(".toml")))
