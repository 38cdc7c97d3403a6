"""Reads files and asks NVML, here or in the interpreter that has tfenv's dependencies.

`tfgpu run` and `tfgpu install --system` reach programs whose environments have neither tomli nor nvidia-ml-py, or
other versions of them. Nothing is put beside their packages: a child process of tfenv's own interpreter does this
part. Only the standard library and the clamp run inside of the program.
"""

from __future__ import annotations

import sys

from tfenv import pipeline
from tfenv.devices.inventory import read_inventory
from tfenv.errors import TfenvError
from tfenv.policy.model import Inventory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from tfenv.policy.model import MemoryUse, Start

#: Seconds. The child reads a few small files, and NVML takes a second on a machine that was idle.
_TIMEOUT_S = 60


class ResolverError(TfenvError):
    """tfenv's own interpreter did not answer."""


def make_resolver(start: Mapping[str, str | None]) -> Resolver:
    """Return what reads files and asks NVML for this process.

    Args:
        start: What the process was when it started, as `finder.START`.
    """
    interpreter, folder = start.get("interpreter"), start.get("folder")
    return Resolver() if interpreter is None or folder is None else RemoteResolver(interpreter, folder)


class Resolver:
    """Reads files and asks NVML in this process."""

    def load(self, start: Start) -> pipeline.LoadedPolicy:
        """Find, read, check and merge all files, as `pipeline.load` does."""
        return pipeline.load(start)

    def read_inventory(self) -> Inventory:
        """List the GPUs that NVML shows. Never raises."""
        return read_inventory()

    def read_memory(self, uuids: tuple[str, ...]) -> Mapping[str, MemoryUse]:
        """Return how much of these GPUs is in use, by UUID. Never raises."""
        from tfenv.devices.memory import read_memory  # most processes choose nothing

        return read_memory(uuids)


class RemoteResolver(Resolver):
    """Has a child process of tfenv's own interpreter do it.

    Attributes:
        interpreter: The interpreter that has tfenv's dependencies.
        folder: The folder that holds the package tfenv.
    """

    def __init__(self, interpreter: str, folder: str) -> None:
        self.interpreter = interpreter
        self.folder = folder

    def load(self, start: Start) -> pipeline.LoadedPolicy:
        """Find, read, check and merge all files.

        Raises:
            ResolverError: The interpreter did not answer, or is gone.
        """
        loaded: pipeline.LoadedPolicy = self._ask("load", start)
        return loaded

    def read_inventory(self) -> Inventory:
        """List the GPUs that NVML shows. Never raises."""
        try:
            inventory: Inventory = self._ask("read_inventory")
        except ResolverError as error:
            return Inventory(problem=str(error))
        return inventory

    def read_memory(self, uuids: tuple[str, ...]) -> Mapping[str, MemoryUse]:
        """Return how much of these GPUs is in use, by UUID. Never raises."""
        try:
            memory: Mapping[str, MemoryUse] = self._ask("read_memory", uuids)
        except ResolverError:
            return {}
        return memory

    def _ask(self, method: str, *arguments: object) -> Any:
        import pickle
        import subprocess

        # -I: the program's PYTHONPATH and working directory are none of the child's business.
        code = f"import sys; sys.path.append({self.folder!r}); from tfenv.runtime.resolver import serve; serve()"
        try:
            done = subprocess.run(
                [self.interpreter, "-I", "-c", code],
                input=pickle.dumps((method, arguments)),
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=True,
            )
            return pickle.loads(done.stdout)  # noqa: S301 - from an interpreter that root or the user named
        except (OSError, subprocess.SubprocessError, pickle.PickleError, EOFError, AttributeError) as error:
            said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().rpartition("\n")[2]
            raise ResolverError(f"{self.interpreter} did not answer: {said or error}") from error


def serve() -> None:
    """Answer one question on stdin with one answer on stdout: the child's part."""
    import pickle

    method, arguments = pickle.loads(sys.stdin.buffer.read())  # noqa: S301 - from the process that started this one
    sys.stdout.buffer.write(pickle.dumps(getattr(Resolver(), method)(*arguments)))
