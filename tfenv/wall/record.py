"""Writes `wall_changed` into the logs of the machine."""

from __future__ import annotations

import os

from tfenv.audit import record
from tfenv.audit.sinks import AuditLog
from tfenv.identity import find_home, identify
from tfenv.values import replace
from tfenv.wall.changes import CgroupChange
from tfenv.wall.targets import load_machine_policy


class WallRecorder:
    """Writes one record for each cgroup that changed. No method raises."""

    def __init__(self, backend: str) -> None:
        """
        Args:
            backend: Who counts.
        """
        self._backend = backend
        self._loaded = load_machine_policy(identify(os.geteuid()))
        # The command tells on stderr in its own way.
        sinks, subject = replace(self._loaded.policy.audit, stderr="none"), self._loaded.subject
        self._log = AuditLog(sinks, find_home(subject.uid), subject.uid, None)

    def write(self, change: CgroupChange) -> None:
        """Write what changed for a cgroup, and whose policy says so."""
        target = change.target
        loaded = target.loaded or self._loaded
        context = record.RecordContext(
            record.ProcessFacts.collect(),
            self._loaded.subject,
            sources=loaded.sources,
            sha256=dict(loaded.hashes),
            revision=loaded.revision,
            exceptions=loaded.exceptions,
        )
        limits = [(limit.gpu.uuid, limit.before.hard, limit.after) for limit in change.limits]
        self._log.emit(record.make_wall_record(context, target.cgroup, target.user, self._backend, limits))
