"""Remarks on where the logs of a machine or a site are written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from tfenv.audit.sinks import find_open_folder, find_syslog_problem
from tfenv.config.presence import MACHINE_ROOT
from tfenv.lint.reach import LintRemark
from tfenv.policy.model import Layer


def advise_on_logs(parts: Sequence[Layer]) -> Iterator[LintRemark]:
    """Say where records would be lost on this machine, or could be kept from a user.

    Args:
        parts: The files of the machine's or the site's layer, validated.
    """
    yield from _advise_on_syslog(parts)
    yield from _advise_on_folders(parts)


def _advise_on_syslog(parts: Iterable[Layer]) -> Iterator[LintRemark]:
    """Say where syslog is required and nothing listens: `on_error` then decides whether programs get a GPU.

    A draft may be for another machine.
    """
    settings = [table["syslog"] for part in parts for table in part.audit if "syslog" in table]
    wanted = [setting for setting in settings if setting.value and setting.origin.path.startswith(f"{MACHINE_ROOT}/")]
    problem = find_syslog_problem() if wanted else None
    if problem is None:
        return
    for setting in wanted:
        text = f"no syslog listens on this machine ({problem}); start journald or rsyslog, or remove this key"
        yield LintRemark(setting.origin, "no-syslog", text)


def _advise_on_folders(parts: Iterable[Layer]) -> Iterator[LintRemark]:
    """Say to root where somebody else can create the log of a user who has none yet."""
    if os.geteuid() != 0:  # nobody else can mend it
        return
    for setting in (table["file"] for part in parts for table in part.audit if "file" in table):
        folder = find_open_folder(str(setting.value))
        if folder is not None:
            text = (
                f"everybody can write in {folder}, and so create the log of a user who has none yet; "
                "let only root write there, and create the users' logs (docs/administrators.md, The log)"
            )
            yield LintRemark(setting.origin, "open-log-directory", text)
