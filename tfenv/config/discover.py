"""Which files speak for this process: machine, site, user, project, and the options of `tfgpu run`.

Finding is cheap, for it happens in every process that uses a framework: one `lstat` for each name in each
directory. Nothing is opened but a pyproject.toml on the way. Whether a file that was found counts is decided when it
is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from tfenv.config.document import LARGEST, DocumentError, peek
from tfenv.config.presence import (
    FILE_NAME,
    MACHINE_ROOT,
    MOST_LEVELS,
    PYPROJECT,
    find_identity,
    list_upward,
    may_exist,
)
from tfenv.dependencies import import_dependency
from tfenv.errors import Finding
from tfenv.identity import identify, is_plain_name
from tfenv.policy.model import LAYER_ORDER, Source, Start, Subject

if TYPE_CHECKING:
    from tfenv.config.presence import Identity

PYPROJECT_TABLE = ("tool", "tfgpu")
#: The variables that name a file, by the layer that the file belongs to.
VARIABLES: Mapping[str, str] = {"site": "TFGPU_SITE_CONFIG", "project": "TFGPU_CONFIG"}

_Scope = tuple[Literal["group", "user"], str]
_SearchResult = tuple[list[Source], tuple[Finding, ...]]


def discover(
    start: Start,
    subject: Subject,
    machine_root: str = MACHINE_ROOT,
    passed_over: frozenset[str] = frozenset(),
    owners: frozenset[int] = frozenset(),
) -> tuple[tuple[Source, ...], tuple[Finding, ...]]:
    """Find all files that speak for this process.

    Args:
        start: What the process was when it started.
        subject: For whom. Only this user's and these groups' own machine files are looked for.
        machine_root: The administrator's directory. It is another one only for `tfgpu check DIR` and tests.
        passed_over: Paths of project files that do not count. The walk goes on above them.
        owners: Further trusted owners, `trusted_owners` of the machine layer.

    Returns:
        The files, the machine's first and the nearest last. Beside them what is wrong with TFGPU_SITE_CONFIG and
        TFGPU_CONFIG, if they name no file at all. Everything else that may be wrong with a file is said by `read`.
    """
    sources = list(_find_machine_files(os.path.abspath(machine_root), subject))
    findings: tuple[Finding, ...] = ()
    if not start.elevated:
        owner = _find_start_owner(start.cwd)
        sources += _find_user_file(start, owner)
        if not start.isolated:
            # No start owner: a stranger's directory may hold what a relative path names.
            site, missing = _follow_variable("site", start, None, _find_identities(sources))
            sources += site
            known = frozenset({start.uid, 0, owner, *owners})
            project, findings = _find_project_file(start, owner, known, _find_identities(sources), passed_over)
            findings = (*missing, *findings)
            sources += project
            sources += _take_run_options(start)
    return tuple(sorted(sources, key=lambda source: LAYER_ORDER.index(source.layer))), findings


def find_hidden_file(start: Start, path: str) -> Source | None:
    """Return the project file that would count if the one that does were not there.

    Args:
        start: The process that starts.
        path: The project file that counts.

    Returns:
        None: there is none, or it is another file that counts.
    """
    if start.config or start.isolated or start.elevated:
        return None
    nearest = _find_project_source(start, frozenset())
    if nearest is None or nearest.path != path:
        return None
    return _find_project_source(start, frozenset({path}))


def find_search_end(start: Start) -> tuple[str, str] | None:
    """Return the topmost directory in which a project's file was looked for, and why the search ended there.

    Returns:
        None: the process has no working directory, or it cannot be looked into.
    """
    directories = [] if start.cwd is None else list(list_upward(start.cwd, start.home))
    if start.cwd is None or not directories:
        return None
    top = directories[-1]
    levels = start.cwd.rstrip("/").count("/") - top.rstrip("/").count("/") + 1
    if top == "/":
        why = "the root directory"
    elif start.home is not None and find_identity(top) == find_identity(start.home):
        why = "the home directory"
    elif levels >= MOST_LEVELS:
        why = f"the last of the {MOST_LEVELS} directories that are searched"
    else:
        why = "the top of its file system"
    return top, why


def _find_project_source(start: Start, passed_over: frozenset[str]) -> Source | None:
    sources, _ = discover(start, identify(start.uid), passed_over=passed_over)
    return next((source for source in sources if source.layer == "project"), None)


def list_candidate_paths(start: Start, subject: Subject, machine_root: str = MACHINE_ROOT) -> tuple[str, ...]:
    """List every path at which a file would speak for this process, whether there is one now or not.

    `tfgpu watch` looks at them.

    Args:
        start: What the process was when it started.
        subject: For whom.
        machine_root: The administrator's directory.

    Returns:
        Absolute paths, the machine's first.
    """
    found = [os.path.join(os.path.abspath(machine_root), name) for name, _ in _list_machine_names(subject)]
    if not start.elevated:
        if start.config_home is not None:
            found.append(os.path.join(start.config_home, "tfgpu", FILE_NAME))
        if not start.isolated:
            found += filter(None, (locate_named_file(start, "site"),))
            found += _list_project_paths(start)
    return tuple(dict.fromkeys(path for path in found if os.path.isabs(path)))


def _list_project_paths(start: Start) -> Iterator[str]:
    if start.config:
        path = locate_named_file(start, "project")
        yield from () if path is None else (path,)
        return
    for bottom in (start.cwd, *start.program_folders):
        for directory in () if bottom is None else list_upward(bottom, start.home):
            yield from (os.path.join(directory, name) for name in (FILE_NAME, PYPROJECT))


def locate_named_file(start: Start, layer: Literal["site", "project"]) -> str | None:
    """Return the absolute path that the layer's variable names. None: it names none."""
    config = start.site if layer == "site" else start.config
    return _make_absolute(config, start) if config else None


# ---- machine, user, run


def _find_machine_files(root: str, subject: Subject) -> Iterator[Source]:
    for name, scope in _list_machine_names(subject):
        path = os.path.join(root, name)
        if may_exist(path):
            yield Source("machine", path, scope=scope)


def _list_machine_names(subject: Subject) -> Iterator[tuple[str, _Scope | None]]:
    yield FILE_NAME, None
    for group in sorted(set(subject.groups)):
        if is_plain_name(group):
            yield f"groups/{group}.toml", ("group", group)
    if is_plain_name(subject.user):
        yield f"users/{subject.user}.toml", ("user", subject.user)


def _find_user_file(start: Start, owner: int | None) -> Iterator[Source]:
    if start.config_home is not None:
        path = os.path.join(start.config_home, "tfgpu", FILE_NAME)
        if os.path.isabs(path) and _exists(path):
            yield Source("user", path, start_owner=owner)


def _take_run_options(start: Start) -> Iterator[Source]:
    if start.run is not None:
        yield Source("run", "<tfgpu run>", text=start.run)


# ---- project


def _find_project_file(
    start: Start,
    owner: int | None,
    known: frozenset[int | None],
    taken: frozenset[Identity],
    passed_over: frozenset[str],
) -> _SearchResult:
    if start.config:
        return _follow_variable("project", start, owner, taken)
    for directory in dict.fromkeys((start.cwd, *start.program_folders)):
        for source in () if directory is None else _walk_upward(directory, start, owner, known, taken):
            if source.path not in passed_over:
                return [source], ()
    return [], ()


def _follow_variable(
    layer: Literal["site", "project"], start: Start, owner: int | None, taken: frozenset[Identity]
) -> _SearchResult:
    """Take the file that TFGPU_SITE_CONFIG or TFGPU_CONFIG names."""
    config = start.site if layer == "site" else start.config
    if not config:
        return [], ()
    variable, path = VARIABLES[layer], _make_absolute(config, start)
    if path is None:
        missing = "home directory" if _is_in_home(config) else "working directory"
        message = f"{variable} is relative to the {missing}, which does not exist; write an absolute path"
        return [], (Finding("not-found", message, path=config),)
    if os.path.isdir(path):
        message = f"{variable} names a directory; write the path of a file, as in {os.path.join(path, FILE_NAME)}"
        return [], (Finding("not-a-file", message, path=path),)
    if find_identity(path) in taken:
        return [], ()
    table = PYPROJECT_TABLE if os.path.basename(path) == PYPROJECT else ()
    return [Source(layer, path, table=table, start_owner=owner, required=True)], ()


def _make_absolute(config: str, start: Start) -> str | None:
    if _is_in_home(config):
        return None if start.home is None else start.home.rstrip("/") + config[1:]
    if os.path.isabs(config):
        return config
    return None if start.cwd is None else os.path.join(start.cwd, config)


def _is_in_home(config: str) -> bool:
    return config == "~" or config.startswith("~/")


def _walk_upward(
    bottom: str, start: Start, owner: int | None, known: frozenset[int | None], taken: frozenset[Identity]
) -> Iterator[Source]:
    """Find the project files from a directory upward, the nearest first."""
    for directory in list_upward(bottom, start.home):
        for name, table in ((FILE_NAME, ()), (PYPROJECT, PYPROJECT_TABLE)):
            path = os.path.join(directory, name)
            if _exists(path) and find_identity(path) not in taken and (not table or _has_policy(path, known)):
                yield Source("project", path, table=table, start_owner=owner)


def _has_policy(path: str, known: frozenset[int | None]) -> bool:
    """Return whether a pyproject.toml is about us. One that mentions us but does not parse is: `read` then says why.

    Nobody parses a file of an owner who is not known here. If it mentions us, `read` decides whether it counts.
    """
    try:
        raw, owner = peek(path)
    except DocumentError:
        return False
    if b"tfgpu" not in raw or len(raw) > LARGEST:
        return b"tfgpu" in raw
    if owner not in known:
        return True
    tomli = import_dependency("tomli")

    try:
        tool = tomli.loads(raw.decode("utf-8-sig")).get("tool", {})
    except (ValueError, RecursionError):
        return True
    return isinstance(tool, dict) and "tfgpu" in tool


# ---- looking


def _exists(path: str) -> bool:
    """Return whether something has this name. A link that leads nowhere counts: whoever made it meant something."""
    try:
        os.lstat(path)
    except (OSError, ValueError):
        return False
    return True


def _find_identities(sources: list[Source]) -> frozenset[Identity]:
    """Return which files speak already. Each counts once: the user's own file in ~/.config/tfgpu is no project's."""
    return frozenset(identity for source in sources if (identity := find_identity(source.path)) is not None)


def _find_start_owner(directory: str | None) -> int | None:
    if directory is None:
        return None
    try:
        return os.stat(directory).st_uid
    except OSError:
        return None
