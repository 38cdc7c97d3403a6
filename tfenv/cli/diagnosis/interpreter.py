"""How `tfgpu doctor` asks an interpreter."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PROBE = Path(__file__).with_name("probe.py")
#: `python -c` puts the current directory first. Its `json.py` may be a stranger's, and root may ask.
_LEAVE_CURRENT_DIRECTORY = "import sys\nif sys.path[:1] == ['']:\n    del sys.path[0]\n"


class NoAnswerError(Exception):
    """The interpreter printed nothing that can be read. The text is the last line it printed for people."""


def ask_interpreter(
    python: str, question: str, timeout_s: float, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run the probe in a child, in this environment. Nothing is imported from the current directory.

    Args:
        python: The interpreter.
        question: "hook" or "tensorflow".
        timeout_s: How many seconds to wait for the answer.
        variables: What its environment has besides.

    Returns:
        What the function of that name in `probe.py` returns.

    Raises:
        OSError: There is no such interpreter.
        NoAnswerError: It did not answer.
    """
    command = [python, "-c", _LEAVE_CURRENT_DIRECTORY + _PROBE.read_text(encoding="utf-8"), question]
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
