"""Project files that another one keeps from counting: a nearer one, or the one that TFGPU_CONFIG names."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tfenv.config.discover import discover, find_hidden_file, locate_named_file
from tfenv.config.document import DocumentError, Trust, read
from tfenv.config.presence import FILE_NAME, MACHINE_ROOT, find_identity
from tfenv.errors import Finding
from tfenv.policy.merge import merge_groups
from tfenv.policy.model import Layer, Source, Start, Subject
from tfenv.values import replace


def advise_on_hidden(start: Start, layers: tuple[Layer, ...]) -> Iterator[Finding]:
    """Find a project file that hides another one without saying anything about GPUs, and a second one beside it.

    Args:
        start: The process that starts.
        layers: What its files say.
    """
    for layer in (layer for layer in layers if layer.name == "project"):
        path = layer.paths[0]
        hidden = find_hidden_file(start, path)
        if hidden is None:
            continue
        if os.path.dirname(hidden.path) == os.path.dirname(path):
            message = f"is ignored because {os.path.basename(path)} in the same directory comes first; keep one of them"
            yield Finding("hidden", message, "warning", hidden.path)
        elif not _speaks_of_gpus(layer):
            part = "delete this file" if os.path.basename(path) == FILE_NAME else "remove this table"
            message = f"sets nothing about GPUs but hides {hidden.path}; {part}, or write those keys here"
            yield Finding("hides-policy", message, "warning", path)


def find_replaced_file(start: Start, subject: Subject, trust: Trust, machine_root: str = MACHINE_ROOT) -> str | None:
    """Return the path of the project's file that would count if TFGPU_CONFIG were not set.

    Args:
        start: The process that starts.
        subject: For whom.
        trust: Whose files count. The walk goes on above those of others.
        machine_root: The administrator's directory.

    Returns:
        None: there is none, TFGPU_CONFIG names that very file, or the variable does not count.
    """
    if not start.config or start.elevated or start.isolated:
        return None
    named = locate_named_file(start, "project")
    free, passed_over = replace(start, config=None), frozenset[str]()
    while True:
        sources, _ = discover(free, subject, machine_root, passed_over, trust.owners)
        found = next((source for source in sources if source.layer == "project"), None)
        if found is None or (named is not None and find_identity(named) == find_identity(found.path)):
            return None
        if not _is_strangers(found, trust):
            return found.path
        passed_over |= {found.path}


def _is_strangers(source: Source, trust: Trust) -> bool:
    try:
        read(source, trust)
    except DocumentError as error:
        return error.finding.severity == "warning"
    return False


def _speaks_of_gpus(layer: Layer) -> bool:
    tables = [layer.base, *merge_groups(layer).values(), *layer.users.values()]
    return bool(layer.top) or any(each.gpu or each.ceiling for each in tables)
