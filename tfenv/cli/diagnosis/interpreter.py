"""How `tfgpu doctor` and `tfgpu verify` ask an interpreter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tfenv.frameworks.registry import list_frameworks

_PROBES = Path(__file__).parents[1] / "probes"
_HOOK_TIMEOUT_S = 60
#: `python -c` puts the current directory first. Its `json.py` may be a stranger's, and root may ask.
_LEAVE_CURRENT_DIRECTORY = "import sys\nif sys.path[:1] == ['']:\n    del sys.path[0]\n"


class NoAnswerError(Exception):
    """The interpreter printed nothing that can be read. The text is the last line it printed for people."""


def find_default_python() -> str:
    """Return the interpreter that `python` most probably means here.

    It is the one that runs `python -m tfenv`, or else that of the active environment. Without one it is that of the
    folder in which this command was found, and if there is none, as in /usr/local/bin, the first on PATH.
    """
    if os.path.basename(sys.argv[0]) == "__main__.py":
        return sys.executable
    folders = [os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX")]
    beside = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "python")
    candidates = [*(os.path.join(folder, "bin", "python") for folder in folders if folder), beside]
    found = next((path for path in candidates if os.access(path, os.X_OK)), None)
    return found or shutil.which("python3") or sys.executable


def ask_about_hook(python: str) -> dict[str, Any]:
    """Return what an interpreter says of the hook and of the frameworks in it, without importing any.

    Raises:
        OSError: There is no such interpreter.
        NoAnswerError: It did not answer.
    """
    return _ask(build_command(python, ("hook",), list_frameworks()), _HOOK_TIMEOUT_S)


def ask_framework(
    python: str, framework: str, options: Sequence[str], timeout_s: float, variables: Mapping[str, str]
) -> dict[str, Any]:
    """Return what a framework sees, asked in a child of an interpreter.

    Args:
        python: The interpreter.
        framework: The framework's package. It is installed there.
        options: "keras", to ask Keras as well.
        timeout_s: How many seconds to wait for the answer.
        variables: What the child's environment has besides.

    Raises:
        OSError: There is no such interpreter.
        NoAnswerError: It did not answer.
    """
    return _ask(build_framework_command(python, framework, "describe", options), timeout_s, variables)


def build_framework_command(python: str, framework: str, action: str, options: Sequence[str] = ()) -> list[str]:
    """Return the command that runs a framework's probe: "describe" or "fill", with its options."""
    return build_command(python, ("framework", framework), (action, *options))


def build_command(python: str, probes: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Return a command that runs files of `cli/probes`. Nothing is imported from the current directory."""
    texts = [(_PROBES / f"{name}.py").read_text(encoding="utf-8") for name in probes]
    return [python, "-c", "".join([_LEAVE_CURRENT_DIRECTORY, *texts]), *arguments]


def _ask(command: Sequence[str], timeout_s: float, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    environment = {**os.environ, **(variables or {})}
    try:
        child = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"no answer within {timeout_s:g} s") from None
    try:
        answer = json.loads(child.stdout.strip().rpartition("\n")[2])
    except ValueError:
        last_line = child.stderr.strip().rpartition("\n")[2]
        raise NoAnswerError(last_line or f"it ended with status {child.returncode}") from None
    if not isinstance(answer, dict):
        raise NoAnswerError("it printed something unexpected")
    return answer
