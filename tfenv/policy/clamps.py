"""What happens while a Plan is made: each clamp with who asked and what held. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from tfenv.errors import PROGRAM, Finding, Severity
from tfenv.policy.model import LAYER_ORDER, Ceiling, Origin, format_key, format_origins

__all__ = ["Notes", "layer_sort_key", "report_program_clamp"]


class Notes:
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
        """Note something about a key."""
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

    def clamped(
        self,
        message: str,
        origin: Origin | None,
        *,
        asked_by: Origin | str | None = None,
        held_by: Iterable[Origin] | str = (),
    ) -> None:
        """Note that a wish was cut to what holds."""
        self.add("clamped", message, origin, "note", asked_by=asked_by, held_by=held_by)


def report_program_clamp(message: str, held_by: Iterable[Origin]) -> Finding:
    """The note that the program's own code asked for more than these keys allow; it stands at the first of them."""
    origins = tuple(held_by)
    notes = Notes()
    notes.clamped(message, origins[0] if origins else None, asked_by=PROGRAM, held_by=origins)
    return notes.findings[0]


def layer_sort_key(ceiling: Ceiling) -> tuple[int, str, str]:
    """A fixed order, so that the order in which ceilings were collected never matters."""
    return LAYER_ORDER.index(ceiling.origin.layer), ceiling.origin.path, format_key(ceiling.origin.key)
