"""Reads files and asks NVML in tfenv's own interpreter, where the program's environment lacks what that takes.

An interpreter covered by `tfgpu install --system` runs programs whose environments have neither tomli nor
nvidia-ml-py, or other versions of them. Nothing is put beside their packages: a child process of tfenv's own
interpreter does this part, and only the standard library and the clamp run inside the program.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tfenv import pipeline
from tfenv.config.discover import discover
from tfenv.devices.inventory import read_inventory
from tfenv.errors import TfenvError
from tfenv.policy.model import Inventory, Start
from tfenv.runtime import arming

if TYPE_CHECKING:
    from tfenv.policy.model import MemoryUse

__all__ = ["RemoteError", "inventory", "load", "memory", "serve"]

#: The child reads a few small files; NVML takes a second on a machine that was idle.
_SECONDS = 60


class RemoteError(TfenvError):
    """tfenv's own interpreter did not answer."""


def load(start: Start) -> pipeline.LoadedPolicy:
    """As `pipeline.load`, here or in tfenv's own interpreter; nothing is found where that was removed.

    Raises:
        RemoteError: It did not answer.
    """
    interpreter = arming.resolver()
    if interpreter is None:
        return pipeline.load(start)
    if not os.path.exists(interpreter) or not _anything_there(start):
        return pipeline.LoadedPolicy(start, pipeline.identify(start.uid))
    loaded: pipeline.LoadedPolicy = _ask(interpreter, ("load", start))
    return loaded


def inventory() -> Inventory:
    """As `read_inventory`, here or in tfenv's own interpreter. Never raises."""
    interpreter = arming.resolver()
    if interpreter is None:
        return read_inventory()
    try:
        found: Inventory = _ask(interpreter, ("inventory", None))
    except RemoteError as error:
        return Inventory(problem=str(error))
    return found


def memory(uuids: tuple[str, ...]) -> Mapping[str, MemoryUse]:
    """As `read_memory`, here or in tfenv's own interpreter. Never raises."""
    interpreter = arming.resolver()
    if interpreter is None:
        return _read_memory(uuids)
    try:
        found: Mapping[str, MemoryUse] = _ask(interpreter, ("memory", uuids))
    except RemoteError:
        return {}
    return found


def _read_memory(uuids: tuple[str, ...]) -> Mapping[str, MemoryUse]:
    from tfenv.devices.memory import read_memory  # most processes choose nothing

    return read_memory(uuids)


def _anything_there(start: Start) -> bool:
    """Whether a child is worth its 0.1 s: most projects have no file. Needs no dependency."""
    try:
        sources, findings = discover(start, pipeline.identify(start.uid))
    except ImportError:  # a pyproject.toml speaks of us, and reading it takes tomli
        return True
    return bool(sources or findings)


def _ask(interpreter: str, question: tuple[str, object]) -> Any:
    # -I: the program's PYTHONPATH and working directory are none of the child's business.
    command = [interpreter, "-I", "-c", "from tfenv.runtime.resolver import serve; serve()"]
    try:
        done = subprocess.run(command, input=pickle.dumps(question), capture_output=True, timeout=_SECONDS, check=True)
        return pickle.loads(done.stdout)  # noqa: S301 - from an interpreter that root named
    except (OSError, subprocess.SubprocessError, pickle.PickleError, EOFError, AttributeError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().rpartition("\n")[2]
        raise RemoteError(f"{interpreter} did not answer: {said or error}") from error


def serve() -> None:
    """The child's part: one question on stdin, one answer on stdout."""
    what, value = pickle.loads(sys.stdin.buffer.read())  # noqa: S301 - from the process that started this one
    sys.stdout.buffer.write(pickle.dumps(_ANSWERS[what](value)))


_ANSWERS: Mapping[str, Callable[[Any], object]] = {
    "load": pipeline.load,
    "inventory": lambda _: read_inventory(),
    "memory": _read_memory,
}
