"""What the lower rooms say is plain English, and names what to write."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tfenv
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


ROOMS = ("policy", "config", "sharing", "lint", "devices", "launchers", "frameworks", "runtime", "audit")
BANNED = (
    *("is no directory", "is no file", "relative to nothing", "those it is for", "of yours do not count"),
    *("hardly meant", "cannot be told without", "granted no", "was granted one", "that were granted"),
    *("those stay", "so never visible", "for the user has", "root's alone", "know no limit", "knows no limit"),
    *("is no name", "that are no records", "later ones say", "not in this machine", "none of the 1 "),
    *("beyond what others leave", "all the time", "has its say", "stands in", "came to be just now"),
)


@pytest.mark.parametrize("room", ROOMS)
def test_no_message_reads_as_translated(room: str) -> None:
    """No text of a message contains one of the phrases that readers stumbled over."""
    found: list[str] = []
    for path in sorted((Path(tfenv.__file__).parent / room).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                found += [f"{path.name}:{node.lineno}: {phrase}" for phrase in BANNED if phrase in node.value]
    assert found == []
