"""What can be wrong, as values and as exceptions. Everything imports it, and it imports nothing but `values`."""

from __future__ import annotations

from typing import Literal

from tfenv.values import frozen

#: "error": something the policy says is not in force, and `on_error` decides what happens.
#: "warning": the policy is in force, but an administrator should look at it (an unknown key).
#: "note": for the record only (a clamp).
Severity = Literal["error", "warning", "note"]

#: Who asked, if it was the program's own code or its environment.
PROGRAM = "the program"


def escape_for_terminal(text: str) -> str:
    r"""Return a text that is safe to show on a terminal or in one line of a log.

    Escape what the name of a file or a key may contain: line breaks, escape sequences, characters that turn the
    writing direction, and lone surrogates. They become `\n`, `\x1b`, `\u2028`.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


@frozen
class Finding:
    """One thing that is wrong, where it is, and what would be right.

    Attributes:
        code: Short, stable, for machines to match: "unknown-key", "insecure-permissions".
        message: One sentence for people. It says what is wrong and what would be right.
        severity: "error", "warning" or "note". Only an error keeps something from being in force.
        path: The file it was found in. None if it is not about a file.
        line: 1-based. None if unknown.
        column: 1-based, counted in characters. None if unknown.
        key: Dotted key inside the file, as in "gpu.memory_limit".
        asked_by: Of a clamp: who asked for more, `PROGRAM` or "file (key)".
        held_by: Of a clamp: the ceilings or settings that held, "file (key)", or the grant.
        asked: What a program or a file of a user or project asked for and did not get: "memory_limit = 70.0 GiB".
        given: What it got instead: "12.0 GiB".
    """

    code: str
    message: str
    severity: Severity = "error"
    path: str | None = None
    line: int | None = None
    column: int | None = None
    key: str | None = None
    asked_by: str | None = None
    held_by: str | None = None
    asked: str | None = None
    given: str | None = None

    @property
    def is_lost_wish(self) -> bool:
        """Whether a program or a file of a user or project got less than it asked for."""
        return self.asked_by == PROGRAM or self.asked is not None

    @property
    def where(self) -> str:
        """`file:line:column`, as far as it is known. "" if it is not about a file. Safe to print."""
        parts = [part for part in (self.path, self.line, self.column) if part is not None]
        return escape_for_terminal(":".join(str(part) for part in parts))

    def __str__(self) -> str:
        # Paths, keys and quoted values are other people's text: they must not steer a terminal.
        return escape_for_terminal(": ".join(part for part in (self.where, self.key, self.message) if part))


class TfenvError(Exception):
    """Any error that tfenv raises on purpose. Its text is made for people."""


class PolicyError(TfenvError, RuntimeError):
    """The policy could not be applied and `on_error = "fail"` asks to stop.

    A RuntimeError, not an ImportError: `try: import tensorflow` must not swallow it.

    Attributes:
        findings: What was wrong, most important first.
    """

    def __init__(self, findings: tuple[Finding, ...]) -> None:
        self.findings = findings
        super().__init__("; ".join(f"{finding} [{finding.code}]" for finding in findings) or "policy not applied")
