"""Which machine runs which version of the policy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tfenv.audit.query import LoggedRecord


@dataclass
class HostRevision:
    """One version of the policy on one machine.

    Attributes:
        host: The machine.
        revision: `policy_revision` of its records. "": it has no machine-wide file.
        first: Timestamp of the oldest record.
        last: Timestamp of the newest record.
        users: Whose programs wrote them.
        is_current: It is the newest on that machine.
    """

    host: str
    revision: str
    first: str = ""
    last: str = ""
    users: set[str] = field(default_factory=set)
    is_current: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON has it: the users as their number."""
        return {**vars(self), "users": len(self.users)}


def list_revisions(records: Iterable[LoggedRecord]) -> list[HostRevision]:
    """Return all versions on all machines, by machine, the newest first.

    Records of versions of tfenv that do not write `policy_revision` yet are left out.
    """
    found: dict[tuple[str, str], HostRevision] = {}
    for record in records:
        revision = record.get("policy_revision")
        if revision is None and "groups" not in record:
            continue
        host, text, timestamp = str(record.get("host")), str(revision or ""), record["timestamp"]
        row = found.setdefault((host, text), HostRevision(host, text, timestamp, timestamp))
        row.first, row.last = min(row.first, timestamp), max(row.last, timestamp)
        row.users.add(str(record.get("user")))
    rows = sorted(found.values(), key=lambda row: row.last, reverse=True)
    seen: set[str] = set()
    for row in rows:
        row.is_current = row.host not in seen
        seen.add(row.host)
    return sorted(rows, key=lambda row: row.host)


def find_prevalent(rows: Iterable[HostRevision]) -> str | None:
    """Return the version that most machines run now. Of several the one that was seen last. None: there are no rows."""
    current = [row for row in rows if row.is_current]
    counts = {row.revision: sum(other.revision == row.revision for other in current) for row in current}
    newest = max(current, key=lambda row: (counts[row.revision], row.last), default=None)
    return None if newest is None else newest.revision
