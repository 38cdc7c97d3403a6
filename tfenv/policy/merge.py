"""The two laws: the nearest setting wins, ceilings hold together.

Pure functions from validated layers to one EffectivePolicy for one subject.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, cast

from tfenv.policy.model import (
    DEFAULT_OVERHEAD,
    LAYER_ORDER,
    ON_ERROR_ORDER,
    AuditSinks,
    Ceiling,
    CeilingKey,
    DatedTable,
    EffectivePolicy,
    Layer,
    ObservedPolicy,
    OnError,
    Setting,
    Subject,
    Table,
    Tables,
)
from tfenv.values import replace

#: `file = "none"`: no log of this layer, and from machine, site or user no default log either.
_NO_FILE = "none"


def combine(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Make one layer of all files of one author. Later files replace earlier ones, key by key.

    Returns:
        At most one Layer per name, from the least specific to the nearest.
    """
    by_name: dict[str, list[Layer]] = {}
    for layer in layers:
        by_name.setdefault(layer.name, []).append(layer)
    return tuple(_combine_parts(by_name[name]) for name in LAYER_ORDER if name in by_name)


def _combine_parts(parts: Sequence[Layer]) -> Layer:
    if len(parts) == 1:
        return parts[0]
    return Layer(
        name=parts[0].name,
        top=_replace(part.top for part in parts),
        base=_replace_tables(part.base for part in parts),
        groups=tuple(named for part in parts for named in part.groups),
        users=_replace_named(part.users for part in parts),
        projects=_replace_named(part.projects for part in parts),
        audit=tuple(table for part in parts for table in part.audit),
        machine=_replace(part.machine for part in parts),
        paths=tuple(path for part in parts for path in part.paths),
        dated=tuple(dated for part in parts for dated in part.dated),
    )


def _replace(tables: Iterable[Table]) -> Table:
    merged: dict[str, Setting] = {}
    for table in tables:
        merged.update(table)
    return merged


def _replace_tables(tables: Iterable[Tables]) -> Tables:
    kept = list(tables)
    return Tables(gpu=_replace(t.gpu for t in kept), ceiling=_replace(t.ceiling for t in kept))


def _replace_named(named: Iterable[Mapping[str, Tables]]) -> Mapping[str, Tables]:
    merged: dict[str, Tables] = {}
    for mapping in named:
        for name, tables in mapping.items():
            merged[name] = _replace_tables((merged[name], tables)) if name in merged else tables
    return merged


def merge_groups(layer: Layer) -> Mapping[str, Tables]:
    """Return the tables of each group by its name. Those of a layer's later files replace those of earlier ones."""
    return _replace_named({name: tables} for name, tables in layer.groups)


# ---- one layer, seen by one subject


def contains_project(root: str, path: str) -> bool:
    """Return whether `path` is `root` or is below it, by path components: /srv/ab is not below /srv/a."""
    base = root.rstrip("/")
    return path == base or path.startswith(base + "/")


def select_tables(layer: Layer, subject: Subject) -> Iterator[Tables]:
    """Yield the tables of a layer that apply to the subject, from the least to the most specific."""
    yield layer.base
    for name, tables in layer.groups:
        if name in subject.groups:
            yield tables
    # A user without a passwd entry is "uid:1234"; one with an entry may be named either way.
    for name in (f"uid:{subject.uid}", subject.user):
        if name in layer.users:
            yield layer.users[name]
    if subject.project is not None:
        roots = [root for root in layer.projects if contains_project(root, subject.project)]
        for root in sorted(roots, key=lambda root: len(root.rstrip("/"))):
            yield layer.projects[root]


def select_dated(layers: Iterable[Layer], subject: Subject) -> Iterator[DatedTable]:
    """Yield the tables with an end or a reason that are for the subject, the expired ones too."""
    users = (f"uid:{subject.uid}", subject.user)
    for layer in layers:
        for dated in layer.dated:
            if dated.kind == "project":
                matches = subject.project is not None and contains_project(dated.name, subject.project)
            else:
                matches = dated.name in (users if dated.kind == "user" else subject.groups)
            if matches:
                yield dated


# ---- all layers


def merge_observed(layers: Iterable[Layer], subject: Subject) -> ObservedPolicy | None:
    """Merge all layers as if `observe.` were removed from the names of their tables.

    Args:
        layers: As read, one a file.
        subject: The user and the project.

    Returns:
        None: no layer has such tables.
    """
    layers = tuple(layers)
    observed = [layer.observed for layer in layers if layer.observed is not None]
    if not observed:
        return None
    tell = any(layer.top["tell"].value is True for layer in observed if "tell" in layer.top)
    return ObservedPolicy(merge(map(apply_observed, layers), subject), tell)


def apply_observed(layer: Layer) -> Layer:
    """Return a layer with its observed tables in force. They replace its own, key by key."""
    observed = layer.observed
    if observed is None:
        return layer
    names = [name for name, _ in layer.groups]
    replacing = dict(observed.groups)
    return replace(
        layer,
        base=_replace_tables((layer.base, observed.base)),
        groups=(
            *((name, _replace_tables((tables, replacing.get(name, Tables())))) for name, tables in layer.groups),
            *((name, tables) for name, tables in observed.groups if name not in names),
        ),
        users=_replace_named((layer.users, observed.users)),
        projects=_replace_named((layer.projects, observed.projects)),
        observed=None,
    )


def merge(layers: Iterable[Layer], subject: Subject) -> EffectivePolicy:
    """Merge all layers for one subject.

    Args:
        layers: The layers in any order. Of the files of one layer a later one replaces an earlier one.
        subject: The user and the project.

    Returns:
        The policy. Merging never raises and never loses a ceiling.
    """
    ordered = combine(layers)
    seen = [_replace_tables(select_tables(layer, subject)) for layer in ordered]
    settings, overridden = _select_nearest(tables.gpu for tables in seen)
    return EffectivePolicy(
        settings=settings,
        overridden=overridden,
        ceilings=tuple(
            Ceiling(key=cast(CeilingKey, key), value=setting.value, origin=setting.origin)
            for tables in seen
            for key, setting in tables.ceiling.items()
        ),
        on_error=_find_strictest(ordered),
        audit=_add_sinks(ordered),
        allow_disable=all(
            bool(layer.machine["allow_disable"].value)
            for layer in ordered
            if layer.name == "machine" and "allow_disable" in layer.machine
        ),
        process_overhead=cast(int, _find_machine_value(ordered, "process_overhead", DEFAULT_OVERHEAD)),
        shards_per_gpu=cast("int | None", _find_machine_value(ordered, "shards_per_gpu", None)),
        revision=cast("str | None", _find_machine_value(ordered, "revision", None)),
        wall=cast(Literal["auto", "off"], _find_machine_value(ordered, "wall", "auto")),
        paths=tuple(dict.fromkeys(path for layer in ordered for path in layer.paths)),
    )


def _find_machine_value(layers: Iterable[Layer], key: str, default: object) -> object:
    """Return the value of a key in `[machine]` of the machine layer. No other layer has a say."""
    values = (layer.machine[key].value for layer in layers if layer.name == "machine" and key in layer.machine)
    return next(values, default)


def _select_nearest(tables: Iterable[Table]) -> tuple[Table, Mapping[str, tuple[Setting, ...]]]:
    """Return the settings of the nearest layer that sets each key, and the others, nearest first, for `explain`."""
    settings: dict[str, Setting] = {}
    overridden: dict[str, tuple[Setting, ...]] = {}
    for table in tables:
        for key, setting in table.items():
            if key in settings:
                overridden[key] = (settings[key], *overridden.get(key, ()))
            settings[key] = setting
    return settings, overridden


def _find_strictest(layers: Iterable[Layer]) -> OnError:
    asked = [layer.top["on_error"].value for layer in layers if "on_error" in layer.top]
    return cast(OnError, next((strict for strict in reversed(ON_ERROR_ORDER) if strict in asked), "warn"))


def _get_log_path(setting: Setting) -> str:
    """Return the path of a log. A project's is relative to its file. Whoever writes there expands `~` and "<uid>"."""
    path = str(setting.value)
    if setting.origin.layer == "project" and not path.startswith(("/", "~")):
        return f"{setting.origin.path.rpartition('/')[0]}/{path}"
    return path


def _add_sinks(layers: Sequence[Layer]) -> AuditSinks:
    """Add up the sinks, so that a project cannot replace the log of the administrator or of the user."""
    tables = [table for layer in layers for table in layer.audit]
    named = [table["file"] for table in tables if "file" in table]
    paths = [(setting.origin.layer, _get_log_path(setting)) for setting in named if setting.value != _NO_FILE]
    syslog = {table["syslog"].origin.layer for table in tables if "syslog" in table and table["syslog"].value}
    return AuditSinks(
        stderr=_select_stderr(layers),
        files=tuple(dict.fromkeys(path for _, path in paths)),
        required_files=tuple(dict.fromkeys(path for layer, path in paths if layer == "machine")),
        syslog=bool(syslog),
        required_syslog="machine" in syslog,
        default_file=all(setting.origin.layer not in ("machine", "site", "user") for setting in named),
    )


def _select_stderr(layers: Iterable[Layer]) -> Literal["summary", "none", "json"]:
    """Return the value of the farthest layer that has one, so that a project cannot silence the administrator."""
    for layer in layers:
        values = [table["stderr"].value for table in layer.audit if "stderr" in table]
        if values:
            return cast(Literal["summary", "none", "json"], values[-1])
    return "summary"
