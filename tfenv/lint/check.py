"""What `tfgpu check` does: looks for mistakes in policy files, those that count here or those that are named."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from tfenv.config.discover import PYPROJECT_TABLE, locate_named_file
from tfenv.config.document import Document, Trust
from tfenv.config.hidden import advise_on_hidden
from tfenv.config.last_good import find_last_good, find_stale_copy, forget_copies, format_copy_time, keep_copies
from tfenv.config.presence import FILE_NAME, MACHINE_ROOT, PYPROJECT, find_identity
from tfenv.devices.inventory import read_inventory
from tfenv.errors import Finding
from tfenv.identity import find_account, find_group, find_user, suggest_name
from tfenv.lint.combinations import advise
from tfenv.lint.schema_line import advise_on_schema_lines
from tfenv.pipeline import current_start, load, read_layers
from tfenv.policy.merge import merge_groups
from tfenv.policy.model import Layer, Source, Tables
from tfenv.values import frozen, replace

#: How the name of a file with tests of a policy ends. `policy_tests` reads it.
TEST_SUFFIX = ".test.toml"
_SCOPES: dict[str, Literal["group", "user"]] = {"groups": "group", "users": "user"}


@frozen
class CheckResult:
    """What was looked at, and what is wrong with it.

    Attributes:
        files: Absolute paths, also of files that were left out.
        findings: In the order of the files. Remarks on what is right but hardly meant come last.
    """

    files: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    def __add__(self, other: CheckResult) -> CheckResult:
        return CheckResult(
            tuple(dict.fromkeys(self.files + other.files)), tuple(dict.fromkeys(self.findings + other.findings))
        )


def check_here() -> CheckResult:
    """Check every file that counts for a process that starts here and now."""
    loaded = load(current_start())
    read_files = [document.source.path for document in loaded.documents]
    dropped = [finding.path for finding in loaded.findings if finding.path is not None]
    hidden = advise_on_hidden(loaded.start, loaded.layers)
    found = (finding for finding in loaded.findings if finding.code != "expired")  # said below, with its place
    keep_valid(loaded.documents, loaded.findings)
    stale = _note_stale_copies(loaded.documents)
    findings = (*found, *_advise_with_cards(loaded.layers, loaded.documents), *hidden, *stale)
    return CheckResult(tuple(dict.fromkeys((*read_files, *dropped))), findings)


def check_path(path: str, *, table_optional: bool = False) -> CheckResult:
    """Check one file, or all files of a directory: a project's, or a machine layer's tree.

    A machine layer that is not /etc/tfgpu is a draft: whoever owns the directory counts as its administrator.

    Args:
        path: Of a tfgpu.toml, a pyproject.toml, or a directory. One that does not exist is a finding.
        table_optional: A pyproject.toml without a table of ours is no mistake.

    Returns:
        What was looked at, and what is wrong. Never raises for what is written in files.
    """
    full = os.path.abspath(path)
    if not os.path.lexists(full):
        right = "run `sudo tfgpu init --machine` to write one" if full == MACHINE_ROOT else "correct the path"
        return _report_nothing(full, f"there is no such file or directory; {right}")
    sources = list(_list_sources(full) if os.path.isdir(full) else [_make_source(full, table_optional=table_optional)])
    if not sources:
        message = f"there is no {FILE_NAME} or {PYPROJECT} here; run `tfgpu init` to write a policy"
        return _report_nothing(full, message)
    checked = _check_sources(sources)
    if sources[0].layer == "project":
        folder = os.path.dirname(sources[0].path)
        start = replace(current_start(folder), config=None)
        layers = read_layers(sources[:1], _choose_trust(sources[0])).layers
        checked += CheckResult((), tuple(advise_on_hidden(start, layers)))
    if is_machine_root(full):
        if full == MACHINE_ROOT and os.geteuid() == 0:
            forget_copies(checked.files)
        return checked + CheckResult((), (*_check_listable(full), *_check_never_read(full)))
    return checked


def keep_valid(documents: Iterable[Document], findings: Iterable[Finding]) -> None:
    """Keep copies of the machine's files that have no mistake, if this is root. They stay in force when one breaks.

    Args:
        documents: The files that were read.
        findings: What is wrong with them.
    """
    wrong = {finding.path for finding in findings if finding.severity == "error"}
    keep_copies(document for document in documents if document.source.path not in wrong)


def _note_stale_copies(documents: Iterable[Document]) -> Iterator[Finding]:
    """Note which machine files differ from their last good copies. Root's check keeps a valid file before."""
    for document in documents:
        copy = find_stale_copy(document)
        if copy is not None:
            message = (
                f"differs from its last good copy {copy}, of {format_copy_time(copy)}, which counts if it breaks; "
                "once the file has no errors, run `sudo tfgpu check /etc/tfgpu` to keep a new copy"
            )
            yield Finding("copy-differs", message, "note", document.source.path)


def _note_copy_in_force(source: Source) -> Iterator[Finding]:
    """Note that a machine file that cannot be used has a copy, which programs have instead."""
    copy = find_last_good(source)
    if copy is not None:
        message = (
            f"programs use its last good copy {copy.path}, of {format_copy_time(copy.path)}; "
            "correct the file, then run `sudo tfgpu check /etc/tfgpu`"
        )
        yield Finding("copy-differs", message, "note", source.path)


def _report_nothing(path: str, message: str) -> CheckResult:
    return CheckResult((), (Finding("not-found", message, path=path),))


def _check_sources(sources: Sequence[Source]) -> CheckResult:
    documents: list[Document] = []
    layers: list[Layer] = []
    findings: list[Finding] = []
    for source in sources:
        found = read_layers([source], _choose_trust(source))
        documents += found.documents
        layers += found.layers
        keep_valid(found.documents, found.findings)
        stale = _note_stale_copies(found.documents) if found.documents else _note_copy_in_force(source)
        findings += [*_check_readable(source), *found.findings, *stale]
    return CheckResult(tuple(source.path for source in sources), (*findings, *_advise_with_cards(layers, documents)))


def _advise_with_cards(layers: Sequence[Layer], documents: Sequence[Document]) -> tuple[Finding, ...]:
    # NVML may take a second to answer: it is asked only if there is something to compare with.
    speaks = any(tables.gpu or tables.ceiling for layer in layers for tables in _list_tables(layer))
    return (*advise(layers, documents, read_inventory() if speaks else None), *advise_on_schema_lines(documents))


def _list_tables(layer: Layer) -> Iterator[Tables]:
    yield layer.base
    for named in (merge_groups(layer), layer.users, layer.projects):
        yield from named.values()
    if layer.observed is not None:
        yield from _list_tables(layer.observed)


# ---- who can read it


def _check_readable(source: Source) -> Iterator[Finding]:
    """Find what keeps those a machine file is for from reading it, as an umask of 077 does. Their programs drop it."""
    if source.layer != "machine":
        return
    folder = os.path.dirname(source.path)
    folders = [folder] if source.scope is None else [os.path.dirname(folder), folder]
    gids = _find_gids(source)
    for place, bits, right in (*((folder, 0o1, "chmod go+x") for folder in folders), (source.path, 0o4, "chmod go+r")):
        try:
            status = os.stat(place)
            has_list = "system.posix_acl_access" in os.listxattr(place)
        except OSError:
            continue
        if not (status.st_mode & bits or has_list or (status.st_mode & bits << 3 and status.st_gid in gids)):
            what = "it" if place == source.path else f"its directory {place}"
            message = (
                f"{what} cannot be read by the users it applies to, and their programs report an error; run {right}"
            )
            yield Finding("closed", message, "warning", source.path)


def _find_gids(source: Source) -> frozenset[int]:
    """Return the ids of the groups of all whom a file is for."""
    if source.scope is None:
        return frozenset()
    kind, name = source.scope
    if kind == "group":
        gid = find_group(name)
        return frozenset() if gid is None else frozenset({gid})
    uid = find_user(name)
    return frozenset() if uid is None else frozenset(find_account(uid).groups)


# ---- which files, and whose


def _list_sources(folder: str) -> Iterator[Source]:
    """List all files of a directory, also those of users and groups that the caller does not belong to."""
    names = [FILE_NAME]
    for scope in _SCOPES:
        names += [f"{scope}/{name}" for name in _list_toml_files(os.path.join(folder, scope))]
    for name in names:
        if os.path.lexists(os.path.join(folder, name)):
            yield _make_source(os.path.join(folder, name))
    pyproject = os.path.join(folder, PYPROJECT)
    if os.path.lexists(pyproject) and not is_machine_root(folder):
        yield Source("project", pyproject, table=PYPROJECT_TABLE, start_owner=_find_folder_owner(folder))


def _list_toml_files(folder: str) -> list[str]:
    return [name for name in _list_names(folder) if name.endswith(".toml")]


def _check_listable(root: str) -> Iterator[Finding]:
    """Find folders whose files could not be checked."""
    for scope in _SCOPES:
        folder = os.path.join(root, scope)
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
            yield Finding(
                "unreadable", "cannot be listed, so its files were not checked; ask root to check them", path=folder
            )


def _check_never_read(root: str) -> Iterator[Finding]:
    """Find files in a machine layer's directory that look like policies and stand where nobody looks."""
    message = f"is never read; tfenv reads only {FILE_NAME}, groups/NAME.toml and users/NAME.toml"
    for folder in (root, *_list_misnamed_folders(root)):
        for name in _list_toml_files(folder):
            beside = name in (FILE_NAME, PYPROJECT) or name.endswith(TEST_SUFFIX)
            if folder != root or not beside:
                yield Finding("never-read", message, "warning", os.path.join(folder, name))
    for folder, scope in _SCOPES.items():
        for name in _list_names(os.path.join(root, folder)):
            if _is_account_name(scope, name):
                message = f"is never read; rename it to {name}.toml"
                yield Finding("never-read", message, "warning", os.path.join(root, folder, name))


def _list_misnamed_folders(root: str) -> Iterator[str]:
    """List folders that people make by mistake: "user" for "users", "users/team"."""
    for name in _list_names(root):
        path = os.path.join(root, name)
        if name in _SCOPES:
            yield from filter(os.path.isdir, (os.path.join(path, inner) for inner in _list_names(path)))
        elif suggest_name(name.lower(), _SCOPES) is not None and os.path.isdir(path):
            yield path


def _list_names(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []


def _is_account_name(scope: Literal["group", "user"], name: str) -> bool:
    return (find_user(name) if scope == "user" else find_group(name)) is not None


def _make_source(path: str, *, table_optional: bool = False) -> Source:
    """Return a file as a source of the layer that it belongs to where it stands."""
    folder, name = os.path.split(path)
    root, scope = os.path.split(folder)
    if scope in _SCOPES and is_machine_root(root):
        return Source("machine", path, scope=(_SCOPES[scope], name.removesuffix(".toml")))
    if is_machine_root(folder):
        return Source("machine", path)
    start = current_start()
    if path == os.path.join(start.config_home or "", "tfgpu", FILE_NAME):
        return Source("user", path, start_owner=_find_folder_owner(folder))
    # A pyproject.toml that is named on purpose and has no table of ours is a mistake.
    table = PYPROJECT_TABLE if name == PYPROJECT else ()
    site = locate_named_file(start, "site")
    if site is not None and find_identity(site) == find_identity(path):
        return Source("site", path, table=table, required=True)
    return Source("project", path, table=table, start_owner=_find_folder_owner(folder), required=not table_optional)


def is_machine_root(folder: str) -> bool:
    """Return whether a folder is a machine layer. A draft is known by files for groups or users, or by both folders."""
    scopes = [os.path.join(folder, scope) for scope in _SCOPES]
    return folder == MACHINE_ROOT or any(map(_list_toml_files, scopes)) or all(map(os.path.isdir, scopes))


def _choose_trust(source: Source) -> Trust:
    """Return whose files count. A draft's owner is its administrator, and what stands above it does not matter yet."""
    uid = os.geteuid()
    root = os.path.dirname(source.path)
    root = os.path.dirname(root) if source.scope is not None else root
    owner = _find_folder_owner(root)
    if source.layer != "machine" or root == MACHINE_ROOT or owner is None:
        return Trust(uid)
    return Trust(uid, administrator=owner, checked_from=root)


def _find_folder_owner(folder: str) -> int | None:
    try:
        return os.stat(folder).st_uid
    except OSError:
        return None
