"""Names, groups and homes come from the databases. Being somebody else is real, and over when it is over."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from tfenv.identity import UserAccount, call_as, find_account, find_home, find_user, identify, suggest_name


def test_identity_comes_from_the_databases(monkeypatch: pytest.MonkeyPatch) -> None:
    """$USER and $LOGNAME are not believed. A uid and a gid without an entry have names of their own."""
    monkeypatch.setenv("USER", "mallory")
    monkeypatch.setenv("LOGNAME", "mallory")
    assert identify(0).user == "root"
    nobody_knows = identify(4_000_000, [4_000_001])
    assert (nobody_knows.user, nobody_knows.groups) == ("uid:4000000", ("gid:4000001",))
    assert find_home(4_000_000) is None
    assert find_account(4_000_000) == UserAccount(4_000_000)


@pytest.mark.parametrize(
    ("name", "uid"),
    [
        ("root", 0),
        ("uid:0", 0),
        ("uid:4000000", 4_000_000),
        ("4000000", None),
        ("uid:4294967295", None),
        ("uid:" + "9" * 5000, None),
        ("uid:\u0661", None),
        ("no-such-user", None),
        ("a\0b", None),
        ("\udcff", None),
        ("", None),
    ],
)
def test_users_are_found_by_name_or_number(name: str, uid: int | None) -> None:
    """A login name and "uid:1234" are users. Whatever else somebody writes is none, and raises nothing."""
    assert find_user(name) == uid


def test_an_account_is_what_a_login_has() -> None:
    """The primary group comes first, and each group once."""
    account = find_account(0)
    assert account.groups[0] == account.gid == pwd.getpwuid(0).pw_gid
    assert len(set(account.groups)) == len(account.groups)


def test_what_was_probably_meant() -> None:
    """A name is offered if it is close enough."""
    assert suggest_name("alcie", ["alice", "bob"]) == "alice"
    assert suggest_name("xyzzy", ["alice", "bob"]) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_users_permissions_hold_in_the_call_and_only_there(tmp_path: Path) -> None:
    """What the user may not read cannot be read there. Afterwards this process is what it was."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o600)
    before = (os.geteuid(), os.getegid(), os.getgroups())
    nobody = find_account(65534)
    assert call_as(nobody, lambda: (os.geteuid(), os.getegid(), os.getgroups())) == (65534, 65534, [65534])
    with pytest.raises(PermissionError, match="secret"):
        call_as(nobody, secret.read_text)
    assert (os.geteuid(), os.getegid(), os.getgroups()) == before
    assert secret.read_text() == "x"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_child_that_dies_is_an_error() -> None:
    """Without an answer there is an error and not a wrong one."""
    with pytest.raises(OSError, match="died"):
        call_as(find_account(65534), lambda: os._exit(1))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can become somebody else")
def test_who_is_not_root_stays_who_he_is() -> None:
    """Without the right to it there is an error."""
    with pytest.raises(PermissionError):
        call_as(find_account(0), os.geteuid)
