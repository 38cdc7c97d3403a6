"""What `tfgpu doctor` finds of an interpreter: is the hook live, what keeps it from being so, what costs time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from tfenv.cli.diagnosis.row import DoctorRow
from tfenv.cli.output import shorten_path
from tfenv.deploy.install import find_closed_path
from tfenv.deploy.launch import PYTHONPATH_FOLDER


def diagnose_hook(hook: Mapping[str, Any]) -> Iterator[DoctorRow]:
    """Yield rows on the hook, from the probe's answer to "hook"."""
    where = f"{shorten_path(hook['executable'])} (Python {hook['version']})"
    if not hook["armed"]:
        found, advice = _explain_unarmed(hook)
        yield DoctorRow("hook", "problem", f"not active in {where}: {found}", advice)
    elif hook["activation_error"] is not None:
        found = f"active in {where}, but tfenv is incomplete: {hook['activation_error']}"
        yield DoctorRow("hook", "problem", found, "install tfenv again in that environment")
    else:
        yield DoctorRow("hook", "ok", f"active in {where}{_format_origin(hook)}")
        yield from _diagnose_copies(hook)
        yield from _diagnose_access(hook)
        # What covers a whole interpreter reads files in tfenv's own.
        if hook["missing"] and hook["lent_from"] is None:
            found = f"not installed: {', '.join(hook['missing'])}"
            yield DoctorRow("dependencies", "problem", found, "install tfenv again in that environment")


def _format_origin(hook: Mapping[str, Any]) -> str:
    if hook["lent_from"] is None:
        return ""
    if hook["blocks"]:
        return f", by `tfgpu install --system` from {shorten_path(hook['lent_from'])}"
    return ", provided by `tfgpu run`"


def _diagnose_access(hook: Mapping[str, Any]) -> Iterator[DoctorRow]:
    """Yield a row if what covers the interpreter is closed to others than root, who may be the one that asks."""
    if not hook["blocks"] or hook["lent_from"] is None:
        return
    needed = (os.path.join(hook["lent_from"], "tfenv", "__init__.py"), hook["lent_interpreter"])
    closed = find_closed_path([path for path in needed if os.path.exists(path)])
    if closed is not None:
        found = f"other users cannot read {shorten_path(closed)}, so `tfgpu install --system` works only for root"
        yield DoctorRow("hook", "problem", found, f"run `chmod -R go+rX {closed}`")


def _diagnose_copies(hook: Mapping[str, Any]) -> Iterator[DoctorRow]:
    """Yield a row if there are several: the first tfenv on the path is used, whatever the environment has."""
    copies: list[str] = hook["copies"]
    if len(copies) > 1:
        used, hidden = copies[0], ", ".join(shorten_path(path) for path in copies[1:])
        advice = "remove the first folder from PYTHONPATH, or leave the directory it is in"
        yield DoctorRow("hook", "note", f"the tfenv in {shorten_path(used)} shadows the one in {hidden}", advice)


def _explain_unarmed(hook: Mapping[str, Any]) -> tuple[str, str]:
    """Return what keeps the hook from being live, and what to do. The most certain reason counts."""
    if hook["site_disabled"]:
        return "it runs without the site module (-S)", "start it without -S, which skips .pth files and sitecustomize"
    if _is_shadowed(hook):
        advice = f"remove its folder from PYTHONPATH, or put {PYTHONPATH_FOLDER} in front of it"
        return f"{shorten_path(hook['sitecustomize'])} shadows the sitecustomize of `tfgpu run`", advice
    if hook["blocks"] and hook["sitecustomize"] not in hook["blocks"]:
        winner = shorten_path(hook["sitecustomize"] or "another sitecustomize")
        found = f"{winner} shadows {shorten_path(hook['blocks'][0])}, which `tfgpu install --system` wrote to"
        return found, "remove its folder from PYTHONPATH, or install again"
    if hook["blocks"]:
        block = f"{shorten_path(hook['blocks'][0])} (`tfgpu install --system`)"
        found = f"the tfenv that {block} loads is gone, or you cannot read it"
        return found, "run `tfgpu install --system` again as root"
    if hook["pth"]:
        return (
            f"{shorten_path(hook['pth'][0])} is there, but _tfenv_boot.py beside it is missing",
            "install tfenv again there",
        )
    if hook["pth_unread"]:
        found = f"{shorten_path(hook['pth_unread'][0])} is not read because its folder is only on PYTHONPATH"
        return found, "install tfenv into that environment, or start programs with `tfgpu run -- CMD`"
    if hook["boot"] is not None:
        return "tfenv.pth is missing from its site-packages", "install tfenv again there"
    return "tfenv is not installed there", "run `pip install tfenv` there, or start programs with `tfgpu run -- CMD`"


def _is_shadowed(hook: Mapping[str, Any]) -> bool:
    is_on_path = PYTHONPATH_FOLDER in os.environ.get("PYTHONPATH", "").split(os.pathsep)
    loaded = hook["sitecustomize"]
    return is_on_path and loaded is not None and os.path.dirname(loaded) != PYTHONPATH_FOLDER


# ---- what costs time


def diagnose_bytecode(hook: Mapping[str, Any]) -> Iterator[DoctorRow]:
    """Yield a row on packages whose modules are compiled anew in every process."""
    if not hook["uncompiled"]:
        return
    folders = [shorten_path(folder) for folder in hook["uncompiled"].values()]
    why = "" if hook["writes_bytecode"] else " (PYTHONDONTWRITEBYTECODE prevents it)"
    found = f"not compiled: {', '.join(hook['uncompiled'])}{why}; importing takes three times as long"
    advice = f"{shorten_path(hook['executable'])} -m compileall -q {' '.join(folders)}"
    if not all(os.access(folder, os.W_OK) for folder in hook["uncompiled"].values()):
        advice += ", as a user who can write there"
    yield DoctorRow("bytecode", "note", found, advice)
