"""What `tfgpu doctor` finds, row by row, and how it asks an interpreter."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tfenv.values import frozen

__all__ = ["NoAnswerError", "Row", "Verdict", "ask"]

Verdict = Literal["ok", "note", "problem"]
_PROBE = Path(__file__).with_name("probe.py")


@frozen
class Row:
    """One thing that was looked at.

    Attributes:
        topic: What: "hook", "GPUs".
        verdict: "problem" is what keeps a policy or a GPU from working.
        found: What is the case.
        advice: What to do; "" where there is nothing to do.
    """

    topic: str
    verdict: Verdict
    found: str
    advice: str = ""


class NoAnswerError(Exception):
    """The child said nothing that can be read; the text is the last thing it said to people."""


def ask(python: str, question: str, seconds: float, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run the probe in a child, in this directory and environment: as a program started here would find things.

    Args:
        python: The interpreter.
        question: "hook" or "tensorflow".
        seconds: How long to wait for the answer.
        variables: What its environment has besides.

    Raises:
        OSError: There is no such interpreter.
        NoAnswerError: It did not answer.
    """
    command = [python, "-c", _PROBE.read_text(encoding="utf-8"), question]
    environment = {**os.environ, **(variables or {})}
    try:
        child = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"no answer within {seconds:g} s") from None
    answer = child.stdout.strip().rpartition("\n")[2]
    try:
        parsed = json.loads(answer)
    except ValueError:
        said = child.stderr.strip().rpartition("\n")[2] or f"it ended with status {child.returncode}"
        raise NoAnswerError(said) from None
    if not isinstance(parsed, dict):
        raise NoAnswerError("it printed something else")
    return parsed
