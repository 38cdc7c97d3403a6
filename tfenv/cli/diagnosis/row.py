"""The rows of `tfgpu doctor`."""

from __future__ import annotations

from typing import Literal

from tfenv.values import frozen

Verdict = Literal["ok", "note", "problem"]


@frozen
class DoctorRow:
    """One thing that was looked at.

    Attributes:
        topic: What was looked at: "hook", "GPUs".
        verdict: "problem" if it keeps a policy or a GPU from working.
        found: What is the case.
        advice: What to do. "" if there is nothing to do.
    """

    topic: str
    verdict: Verdict
    found: str
    advice: str = ""
