"""Loads the policy of a case as `pipeline.load` does for a process. Each file is read once in a run.

Whose a file is and who may write it does not matter here: a checkout is nobody's policy yet. `tfgpu check` looks at
that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import cast

from tfenv.config.discover import discover
from tfenv.config.document import Document, DocumentError, Trust, peek_text
from tfenv.config.schema import validate
from tfenv.errors import Finding
from tfenv.pipeline import LoadedPolicy, ReadLayers, allows_project_files, merge_files, read_layers
from tfenv.policy.model import Source, Start
from tfenv.policy_tests.model import Case, CaseFile, Suite
from tfenv.policy_tests.read import get_policy_table
from tfenv.values import replace

_Key = tuple[object, ...]


class PolicyLoader:
    """Loads policies, and keeps what it read."""

    def __init__(self) -> None:
        self._uid = os.geteuid()
        self._texts: dict[str, str | DocumentError] = {}
        self._read: dict[_Key, ReadLayers] = {}
        self._sources: dict[_Key, tuple[Source, ...]] = {}
        self._loaded: dict[_Key, LoadedPolicy] = {}

    def load(self, suite: Suite, case: Case) -> LoadedPolicy:
        """Return the policy of the process that a case describes."""
        tables = suite.path, *(file.key for file in case.files)
        key: _Key = (suite.policy, case.subject, case.today, tables, *(file.path for file in case.files))
        if key not in self._loaded:
            self._loaded[key] = self._load(suite, case)
        return self._loaded[key]

    def _load(self, suite: Suite, case: Case) -> LoadedPolicy:
        tested = [self._read_source(source, case.today) for source in self._list_sources(suite, case)]
        machine = [each for each in tested if any(layer.name == "machine" for layer in each.layers)]
        allowed = allows_project_files(layer for each in machine for layer in each.layers)
        others = [self._read_file(suite, file, case.today) for file in case.files if allowed or file.layer != "project"]
        start = Start(cwd=case.subject.project, uid=self._uid)
        return merge_files(start, case.subject, _join([*tested, *others]))

    def _list_sources(self, suite: Suite, case: Case) -> tuple[Source, ...]:
        """List the files of the policy that is tested. Of a machine layer: those for the user and the groups."""
        policy, subject = suite.policy, case.subject
        if policy is None:
            return ()
        if policy.layer != "machine":
            return (Source(policy.layer, policy.path, table=get_policy_table(policy.path), required=True),)
        key: _Key = (policy.path, subject.user, subject.groups)
        if key not in self._sources:
            # Under sudo only the machine layer counts, so that nothing else is looked for.
            start = Start(cwd=None, uid=self._uid, elevated=True)
            self._sources[key] = discover(start, subject, policy.path)[0]
        return self._sources[key]

    def _read_file(self, suite: Suite, file: CaseFile, today: str | None) -> ReadLayers:
        if file.data is None:
            source = Source(file.layer, file.path, table=get_policy_table(file.path), required=True)
            return self._read_source(source, today)
        key: _Key = (suite.path, file.key, today)
        if key not in self._read:
            self._read[key] = _read_tables(suite, file, today)
        return self._read[key]

    def _read_source(self, source: Source, today: str | None) -> ReadLayers:
        key: _Key = (source.layer, source.path, source.scope, today)
        if key not in self._read:
            text = self._read_text(source.path)
            if isinstance(text, DocumentError):
                self._read[key] = ReadLayers(findings=(text.finding,))
            else:
                self._read[key] = read_layers([replace(source, text=text)], Trust(self._uid), today=today)
        return self._read[key]

    def _read_text(self, path: str) -> str | DocumentError:
        if path not in self._texts:
            try:
                self._texts[path] = peek_text(path)
            except DocumentError as error:
                self._texts[path] = error
        return self._texts[path]


def _read_tables(suite: Suite, file: CaseFile, today: str | None) -> ReadLayers:
    """Read a policy whose tables stand in a case. A position in it is one in the file of tests."""
    text = "" if suite.document is None else suite.document.text
    # The path of a table in an array of tables has numbers, which only `find_position` sees.
    source = Source(file.layer, file.path, table=cast("tuple[str, ...]", file.key))
    document = Document(source, dict(file.data or {}), "", text, None)
    layer, findings = validate(document, today)
    return ReadLayers((document,), (layer,), findings)


def _join(parts: Iterable[ReadLayers]) -> ReadLayers:
    parts = list(parts)
    return ReadLayers(
        tuple(document for part in parts for document in part.documents),
        tuple(layer for part in parts for layer in part.layers),
        tuple(finding for part in parts for finding in part.findings),
    )


def find_faults(suite: Suite, case: Case, loaded: LoadedPolicy) -> Iterator[Finding]:
    """Yield what is wrong with files that a case does not say anything of.

    That are the errors in the files of the policy that is tested, and all mistakes in the files that the case brings,
    unless it names the findings that it expects.
    """
    policy, brought = suite.policy, {file.path for file in case.files}
    for finding in loaded.findings:
        path = finding.path or ""
        if path in brought:
            if case.expect.findings is None and finding.severity != "note":
                yield finding
        elif policy is not None and finding.severity == "error" and f"{path}/".startswith(f"{policy.path}/"):
            yield finding
