"""reach.py: names that nobody has, tables that never count, keys that are always replaced."""

from __future__ import annotations

import pwd
from pathlib import Path
from typing import Any

import pytest
import tomli

from tfenv.config.document import Document
from tfenv.config.schema import validate
from tfenv.lint.combinations import advise
from tfenv.policy.model import LayerName, Source

ROOT = "/etc/tfgpu"
GROWTH = "gpu.memory_growth = true\n"
LIMIT = "ceiling.memory_limit = '8GiB'\n"


def make_document(name: str, text: str, layer: LayerName = "machine") -> Document:
    folder, _, file = name.rpartition("/")
    scope: Any = (folder[:-1], file.removesuffix(".toml")) if folder else None
    return Document(Source(layer, f"{ROOT}/{name}", scope=scope), tomli.loads(text), "0" * 64, text, 0)


def list_remarks(layer: LayerName = "machine", **files: str) -> list[tuple[str, str, int | None]]:
    """List code, file and line. The argument `users__alice` is the file users/alice.toml."""
    documents = [make_document(f"{name.replace('__', '/')}.toml", text, layer) for name, text in files.items()]
    read = [validate(read) for read in documents]
    assert [findings for _, findings in read if findings] == []
    found = advise([validated for validated, _ in read], documents)
    return [(one.code, (one.path or "").removeprefix(f"{ROOT}/").removesuffix(".toml"), one.line) for one in found]


def test_names_that_nobody_has() -> None:
    """A user or group that this machine does not know is a warning in the machine layer, a number is not."""
    text = """machine.trusted_owners = ["root", "uid:4000000", "no-such-user"]
[user.root.gpu]
memory_growth = true
[user.nobody-has-this.gpu]
memory_growth = true
[group.nobody-has-this.ceiling]
require_grant = true
[user."uid:4000000".gpu]
memory_growth = true
[group."gid:4000000".gpu]
memory_growth = true
[user."\\ud7ff".gpu]
memory_growth = true
"""
    assert list_remarks(tfgpu=text) == [
        ("unknown-user", "tfgpu", 1),
        ("unknown-user", "tfgpu", 4),
        ("unknown-group", "tfgpu", 6),
        ("unknown-user", "tfgpu", 12),
    ]
    assert list_remarks("user", tfgpu="[user.nobody-has-this.gpu]\nmemory_growth = true\n") == []


def test_files_that_nobody_has() -> None:
    """A file is for the one whose name it has. An empty one is looked at, too."""
    assert list_remarks(users__nobody_has_this="") == [("unknown-user", "users/nobody_has_this", None)]
    assert list_remarks(groups__nobody_has_this=GROWTH) == [("unknown-group", "groups/nobody_has_this", None)]
    assert list_remarks(users__root=GROWTH, groups__root=LIMIT) == []


def test_a_similar_name_is_offered() -> None:
    """A spelling mistake is told with the name that was meant."""
    read = make_document("tfgpu.toml", "[user.rooot.gpu]\nmemory_growth = true\n")
    (found,) = advise([validate(read)[0]], [read])
    assert 'did you mean "root"?' in found.message


@pytest.mark.parametrize(
    ("name", "counts"),
    [('user."uid:0"', True), ('user."uid:04000000"', False), ('group."gid:0"', False), ('group."gid:04000000"', False)],
)
def test_numbers_of_those_who_have_a_name(name: str, counts: bool) -> None:
    """A user may be named by number, a group that has a name may not. A number has one spelling."""
    found = [code for code, _, _ in list_remarks(tfgpu=f"[{name}.gpu]\nmemory_growth = true\n")]
    assert found == ([] if counts else ["unreachable-table"])


def test_a_users_file_is_called_by_the_name() -> None:
    """users/uid:0.toml is never looked for: root has a name."""
    read = make_document("users/uid:0.toml", GROWTH)
    (found,) = advise([validate(read)[0]], [read])
    assert (found.code, found.key) == ("unreachable-table", None)
    assert "users/root.toml" in found.message


def test_tables_in_files_that_are_read_for_others() -> None:
    """users/root.toml is read for root only, groups/root.toml for the group's members."""
    daemon = "[user.daemon.gpu]\nmemory_growth = true\n[group.daemon.gpu]\nmemory_growth = true\n"
    assert list_remarks(users__root=daemon) == [
        ("unreachable-table", "users/root", 1),
        ("unreachable-table", "users/root", 3),
    ]
    assert list_remarks(groups__root=daemon) == [
        ("unreachable-table", "groups/root", 1),
        ("partly-reachable", "groups/root", 3),
    ]
    own = "[user.root.gpu]\nmemory_growth = true\n[group.root.ceiling]\nrequire_grant = true\n"
    assert list_remarks(users__root=own) == list_remarks(groups__root=own) == []


def test_projects_that_are_not_there(tmp_path: Path) -> None:
    """A path that leads nowhere, to a file or through a link holds no project as it is written."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    paths = [tmp_path, tmp_path / "none", tmp_path / "file", tmp_path / "link", f"{tmp_path}/../{tmp_path.name}"]
    text = "".join(f'[project."{path}".ceiling]\nrequire_grant = true\n' for path in paths)
    found = [line for code, _, line in list_remarks(tfgpu=text) if code == "unreachable-table"]
    assert found == [3, 5, 7, 9]


def test_a_table_for_everybody_in_one_file() -> None:
    """Hundreds of users in the file that everybody reads are better off with files of their own: a note."""
    tables = [f'[user."uid:{number}".gpu]\nmemory_growth = true\n' for number in range(4_000_000, 4_000_101)]
    assert list_remarks(tfgpu="".join(tables)) == [("many-tables", "tfgpu", 1)]
    assert list_remarks(tfgpu="".join(tables[:100])) == []


# ---- replaced keys


def test_the_same_table_in_two_files() -> None:
    """users/root.toml replaces [user.root] of tfgpu.toml, key by key. What only one of them has counts."""
    whole = "[user.root]\n" + GROWTH + LIMIT + "[group.root]\n" + GROWTH
    assert list_remarks(tfgpu=whole, users__root=LIMIT) == [("never-counts", "tfgpu", 3), ("never-counts", "tfgpu", 5)]
    assert list_remarks(tfgpu=whole.replace("[group.root]\n" + GROWTH, ""), users__root=LIMIT) == [
        ("never-counts", "tfgpu", 3)
    ]


def test_the_same_table_in_one_file() -> None:
    """In users/root.toml [user.root.gpu] replaces [gpu]."""
    text = GROWTH + LIMIT + "[user.root]\n" + GROWTH
    assert list_remarks(users__root=text) == [("never-counts", "users/root", 1)]


def test_a_name_replaces_a_number() -> None:
    """[user.root] and [user."uid:0"] are the same person, and the name counts."""
    assert list_remarks(tfgpu='[user."uid:0"]\n' + LIMIT + "[user.root]\n" + LIMIT) == [("never-counts", "tfgpu", 2)]


def test_a_group_whose_members_all_have_their_own() -> None:
    """A group's key is replaced if every member has one. One who has none keeps it alive."""
    if list_daemon_members() != ["daemon"]:
        pytest.skip("the group daemon has other members here")
    text = "[group.daemon]\n" + LIMIT + "[user.daemon]\n"
    assert list_remarks(tfgpu=text + LIMIT) == [("never-counts", "tfgpu", 2)]
    assert list_remarks(tfgpu=text + GROWTH) == []


def list_daemon_members() -> list[str]:
    return [entry.pw_name for entry in pwd.getpwall() if entry.pw_gid == pwd.getpwnam("daemon").pw_gid]


def test_a_project_that_holds_everything() -> None:
    """[project."/"] replaces the keys of everybody, of groups and of users."""
    text = LIMIT + "[user.root]\n" + LIMIT + '[project."/"]\n' + LIMIT
    assert list_remarks(tfgpu=text) == [("never-counts", "tfgpu", 1), ("never-counts", "tfgpu", 3)]
    assert list_remarks(tfgpu=text.replace('project."/"', 'project."/usr"')) == []


def test_two_spellings_of_a_project() -> None:
    """[project."/usr"] and [project."/usr/"] are the same directory, and the later counts."""
    assert list_remarks(tfgpu='[project."/usr"]\n' + LIMIT + '[project."/usr/"]\n' + LIMIT) == [
        ("never-counts", "tfgpu", 2)
    ]


def test_what_a_users_file_says_of_projects_is_his_own() -> None:
    """Two users may each have a table for the same project: neither replaces the other's, nor everybody's."""
    text = '[project."/usr"]\n' + LIMIT
    assert list_remarks(tfgpu=text, users__root=text, users__daemon=text) == []
