"""The environment that arms the hook in a command's Python processes, wherever their interpreters come from."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

__all__ = ["LIBRARIES", "PYTHONPATH_FOLDER", "environment"]

#: Holds nothing but our sitecustomize.
PYTHONPATH_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pythonpath")

#: The variable that tells an interpreter without tfenv where this one keeps tfenv and its dependencies.
LIBRARIES = "TFGPU_LIBRARIES"


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """The environment for `tfgpu run -- CMD`: `base` with our folder in front of PYTHONPATH, once.

    What PYTHONPATH had stays, in its order; an empty entry is the current directory and stays, too.
    """
    # Unset and empty mean the same; splitting "" would give an entry, the current directory.
    before = base["PYTHONPATH"].split(os.pathsep) if base.get("PYTHONPATH") else []
    others = [entry for entry in before if entry != PYTHONPATH_FOLDER]
    return {
        **base,
        "PYTHONPATH": os.pathsep.join([PYTHONPATH_FOLDER, *others]),
        LIBRARIES: os.pathsep.join(_libraries()),
    }


def _libraries() -> list[str]:
    """The folders from which this interpreter gets tfenv and its dependencies."""
    from importlib.machinery import PathFinder

    folders = []
    for name in ("tfenv", "structlog", "tomli", "pynvml"):
        spec = PathFinder.find_spec(name, sys.path)
        if spec is not None and spec.origin is not None:
            folder = os.path.dirname(os.path.abspath(spec.origin))
            folders.append(os.path.dirname(folder) if spec.submodule_search_locations else folder)
    return list(dict.fromkeys(folders))
