"""The findings of a Plan: each clamp names who asked and which keys hold. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from tfenv.errors import PROGRAM, Finding, Severity
from tfenv.policy.model import Origin, format_key, format_origins


class FindingCollector:
    """Collects findings while a Plan is made."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def add(
        self,
        code: str,
        message: str,
        origin: Origin | None,
        severity: Severity = "error",
        *,
        asked_by: Origin | str | None = None,
        held_by: Iterable[Origin] | str = (),
    ) -> None:
        """Add a finding about a key, with who asked for more than what holds. Without `origin` it is about no key."""
        held = held_by if isinstance(held_by, str) else format_origins(held_by)
        self.findings.append(
            Finding(
                code,
                message,
                severity,
                path=origin.path if origin else None,
                key=format_key(origin.key) if origin else None,
                asked_by=None if asked_by is None else str(asked_by),
                held_by=held or None,
            )
        )

    def add_clamp(
        self,
        message: str,
        origin: Origin | None,
        *,
        asked_by: Origin | str | None = None,
        held_by: Iterable[Origin] | str = (),
    ) -> None:
        """Add the note that a request was cut to what other keys allow."""
        self.add("clamped", message, origin, "note", asked_by=asked_by, held_by=held_by)


def report_program_clamp(message: str, held_by: Iterable[Origin]) -> Finding:
    """Return the note that the program's own code asked for more than these keys allow. It names the first of them."""
    origins = tuple(held_by)
    collector = FindingCollector()
    collector.add_clamp(message, origins[0] if origins else None, asked_by=PROGRAM, held_by=origins)
    return collector.findings[0]
