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
        wish: tuple[str, str] | None = None,
    ) -> Finding:
        """Add a finding about a key, with who asked for more than what holds.

        Args:
            code: As in `Finding`, and so are `message` and `severity`.
            message: For people.
            origin: The key. None: it is about no key.
            severity: Of the finding.
            asked_by: Who asked: `PROGRAM`, or a key.
            held_by: The keys that hold, or the grant.
            wish: What was asked for and what holds instead, as `asked` and `given` of the finding. It is kept only if
                somebody else took it away: see `_is_wish`.
        """
        held_by = held_by if isinstance(held_by, str) else tuple(held_by)
        asked, given = wish if wish is not None and _is_wish(asked_by, held_by) else (None, None)
        finding = Finding(
            code,
            message,
            severity,
            path=origin.path if origin else None,
            key=format_key(origin.key) if origin else None,
            asked_by=None if asked_by is None else str(asked_by),
            held_by=(held_by if isinstance(held_by, str) else format_origins(held_by)) or None,
            asked=asked,
            given=given,
        )
        self.findings.append(finding)
        return finding

    def add_clamp(
        self,
        message: str,
        origin: Origin | None,
        *,
        asked_by: Origin | str | None = None,
        held_by: Iterable[Origin] | str = (),
        wish: tuple[str, str] | None = None,
    ) -> Finding:
        """Add the note that a request was cut to what other keys allow. The arguments are those of `add`."""
        return self.add("clamped", message, origin, "note", asked_by=asked_by, held_by=held_by, wish=wish)


def _is_wish(asked_by: Origin | str | None, held_by: tuple[Origin, ...] | str) -> bool:
    """Return whether a program, a user or a project asked for something that others did not let it have.

    What the machine's or the site's file sets for everybody is no wish. Neither is what the ceiling of the same layer
    cuts: one author wrote both.
    """
    if asked_by is None or isinstance(asked_by, str):
        return asked_by is not None
    if asked_by.layer in ("machine", "site") or not held_by:
        return False
    return isinstance(held_by, str) or any(origin.layer != asked_by.layer for origin in held_by)


def report_program_clamp(message: str, held_by: Iterable[Origin], wish: tuple[str, str]) -> Finding:
    """Return the note that the program's own code asked for more than these keys allow. It names the first of them."""
    origins = tuple(held_by)
    origin = origins[0] if origins else None
    return FindingCollector().add_clamp(message, origin, asked_by=PROGRAM, held_by=origins, wish=wish)
