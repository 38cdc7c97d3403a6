"""Remarks on where a machine's logs are written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from tfenv.audit.sinks import find_open_folder
from tfenv.lint.reach import LintRemark
from tfenv.policy.model import Layer


def advise_on_logs(parts: Iterable[Layer]) -> Iterator[LintRemark]:
    """Say to root where somebody else can create the log of a user who has none yet.

    Args:
        parts: The machine layer's files, validated.
    """
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
