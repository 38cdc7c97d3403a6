"""Project files that a nearer one keeps from counting: in a monorepo, or two in one directory."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tfenv.config.discover import find_hidden_file
from tfenv.config.presence import FILE_NAME
from tfenv.errors import Finding
from tfenv.policy.merge import merge_groups
from tfenv.policy.model import Layer, Start


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


def _speaks_of_gpus(layer: Layer) -> bool:
    tables = [layer.base, *merge_groups(layer).values(), *layer.users.values()]
    return bool(layer.top) or any(each.gpu or each.ceiling for each in tables)
