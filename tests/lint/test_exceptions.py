"""exceptions.py: tables that end soon, and those that have ended."""

from __future__ import annotations

import pytest

from tests.lint.test_combinations import read_layer
from tfenv.lint.combinations import advise

TEXT = """[user.root]
expires = {0}
reason = "thesis"
[user.root.ceiling]
max_devices = 2
"""


def find_remarks(day: str, today: str, prefix: str = "") -> list[tuple[str, str, str | None, int | None, str]]:
    layer, document = read_layer(TEXT.format(day).replace("[", f"[{prefix}"))
    found = advise([layer], [document], today=today)
    return [(one.code, one.severity, one.key, one.line, one.message) for one in found if "expire" in one.code]


@pytest.mark.parametrize(
    ("today", "code", "text"),
    [
        ("9998-12-17", None, ""),
        ("9998-12-18", "expires-soon", "expires on 9999-01-01 (thesis), in 14 days; write a later day"),
        ("9998-12-31", "expires-soon", "expires on 9999-01-01 (thesis), tomorrow; write a later day"),
        ("9999-01-01", "expired", "expired on 9999-01-01 (thesis), so this table does not count; remove it"),
        ("9999-06-01", "expired", "expired on 9999-01-01 (thesis), so this table does not count; remove it"),
    ],
)
def test_an_end_is_told_two_weeks_before(today: str, code: str | None, text: str) -> None:
    """On the day itself the table does not count any more."""
    found = find_remarks("9999-01-01", today)
    if code is None:
        assert found == []
        return
    ((told, severity, key, line, message),) = found
    assert (told, severity, key, line) == (code, "warning", "user.root.expires", 2)
    assert message.startswith(text)


def test_an_observed_table_ends_too() -> None:
    """Under [observe] it is the same, and the key is named as it stands there."""
    ((code, _, key, line, _),) = find_remarks("9999-01-01", "9998-12-31", "observe.")
    assert (code, key, line) == ("expires-soon", "observe.user.root.expires", 2)


def test_a_table_with_a_reason_and_no_end_is_left_alone() -> None:
    """A reason by itself is no promise."""
    layer, document = read_layer('[user.root]\nreason = "the administrator"\n')
    assert advise([layer], [document], today="9999-01-01") == ()
