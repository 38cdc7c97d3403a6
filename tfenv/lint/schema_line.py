"""The schema that the first lines of a policy name for editors: whether it is there, and of this tfenv."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from tfenv.config.document import Document
from tfenv.config.schema_copy import COPY_NAME, SCHEMA_LINE, compare_copy
from tfenv.errors import Finding

_DIRECTIVE = re.compile(r"^#:schema +(\S.*?) *$", re.MULTILINE)
#: Only the head of a file is searched: editors want the line before the first key.
_HEAD = 4096


def advise_on_schema_lines(documents: Sequence[Document]) -> Iterator[Finding]:
    """Find schema lines that lead editors to nothing, or to a copy that an older tfenv wrote."""
    for document in documents:
        source = document.source
        match = None if source.text is not None or source.table else _DIRECTIVE.search(document.text[:_HEAD])
        if match is None or "://" in match[1]:
            continue
        line = document.text.count("\n", 0, match.start()) + 1
        state = compare_copy(os.path.join(os.path.dirname(source.path), match[1]))
        if state == "missing":
            message = (
                f"the schema {match[1]} is not there, so editors cannot check this file; "
                f"run `tfgpu init --schema` and write `{SCHEMA_LINE}`"
            )
            yield Finding("schema-missing", message, "note", source.path, line=line, column=1)
        elif state == "older" and os.path.basename(match[1]) == COPY_NAME:
            message = f"the schema {match[1]} is older than this tfenv; run `tfgpu init --schema` to refresh it"
            yield Finding("schema-outdated", message, "note", source.path, line=line, column=1)
