"""The environment that arms the hook in a command's Python processes, wherever their interpreters come from."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

#: Holds nothing but our sitecustomize.
PYTHONPATH_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pythonpath")

#: Tells an interpreter without tfenv where the package lies, and which interpreter has its dependencies.
RESOLVER = "TFGPU_RESOLVER"


def build_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Build the environment for `tfgpu run -- CMD`: `base` with our folder in front of PYTHONPATH, once.

    What PYTHONPATH had stays, in its order. An empty entry is the current directory and stays, too.
    """
    # Unset and empty mean the same. Splitting "" would give an entry, the current directory.
    before = base["PYTHONPATH"].split(os.pathsep) if base.get("PYTHONPATH") else []
    others = [entry for entry in before if entry != PYTHONPATH_FOLDER]
    package_parent = os.path.dirname(os.path.dirname(os.path.dirname(PYTHONPATH_FOLDER)))
    return {
        **base,
        "PYTHONPATH": os.pathsep.join([PYTHONPATH_FOLDER, *others]),
        RESOLVER: os.pathsep.join([package_parent, sys.executable]),
    }
