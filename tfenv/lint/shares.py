"""Remarks on `memory_limit = "granted"`: what it needs to know of this machine's Slurm."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from tfenv.config.presence import MACHINE_ROOT
from tfenv.config.schema import list_device_rules
from tfenv.lint.reach import LintRemark
from tfenv.policy.model import Layer, MemoryLimit, Origin, Tables

_SLURM_FILE = "/etc/slurm/slurm.conf"
_SHARDS = re.compile(r"^\s*GresTypes\s*=[^#\n]*\bshard\b", re.IGNORECASE | re.MULTILINE)
#: Characters of the file that are read.
_MOST_READ = 1 << 20


def advise_on_shares(whole: Layer) -> Iterator[LintRemark]:
    """Say where Slurm gives shards and the machine's file does not tell how many a GPU has.

    A draft may be for another machine.

    Args:
        whole: The machine's layer.
    """
    if "shards_per_gpu" in whole.machine:
        return
    named = (*(tables for _, tables in whole.groups), *whole.users.values(), *whole.projects.values())
    granted = [origin for tables in (whole.base, *named) for origin in _list_granted(tables)]
    granted = [origin for origin in granted if origin.path.startswith(f"{MACHINE_ROOT}/")]
    path = os.environ.get("SLURM_CONF") or _SLURM_FILE
    if granted and _gives_shards(path):
        text = f"Slurm gives shards here ({path}: GresTypes) and does not tell a job of how many"
        yield LintRemark(granted[0], "no-shards-per-gpu", f"{text}; write shards_per_gpu in the table [machine], too")


def _list_granted(tables: Tables) -> Iterator[Origin]:
    for setting in (tables.gpu.get("memory_limit"), tables.ceiling.get("memory_limit")):
        if setting is not None and isinstance(setting.value, MemoryLimit) and setting.value.granted:
            yield setting.origin
    for rule in list_device_rules(tables.gpu):
        if rule.memory_limit is not None and rule.memory_limit.granted:
            yield rule.origin


def _gives_shards(path: str) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return _SHARDS.search(file.read(_MOST_READ)) is not None
    except (OSError, ValueError):
        return False
