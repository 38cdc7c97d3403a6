"""What the lower rooms say is plain English, and names what to write."""

from __future__ import annotations

import pytest

from tfenv.config.document import DocumentError, Trust, read
from tfenv.policy.model import Source

BARE_VALUES = [
    ("memory_limit = 8GiB", 'text needs quotes, write memory_limit = "8GiB"'),
    ("memory_limit = 8 GiB  # each", 'text needs quotes, write memory_limit = "8 GiB"'),
    ("memory_limit = 50%", 'text needs quotes, write memory_limit = "50%"'),
    ("visible_devices = GPU-8932f937", 'text needs quotes, write visible_devices = ["GPU-8932f937"]'),
    ("visible_devices = none", 'text needs quotes, write visible_devices = "none"'),
    ("memory_growth = True", "write memory_growth = true"),
    ("memory_growth = yes", "write memory_growth = true"),
    ("memory_growth = Off", "write memory_growth = false"),
    ("visible_devices = 0, 1", "write one key = value on each line, with text in quotes and a list in [ ]"),
]


@pytest.mark.parametrize(("line", "hint"), BARE_VALUES)
def test_a_value_without_quotes_is_answered_with_the_line_to_write(line: str, hint: str) -> None:
    """A syntax error ends with what to write instead, in the words of the line that is wrong."""
    source = Source("run", "TFGPU_CONFIG", text=f"version = 1\n{line}\n")
    with pytest.raises(DocumentError) as raised:
        read(source, Trust(uid=0))
    assert raised.value.finding.line == 2
    assert raised.value.finding.message.endswith(f"; {hint}")
