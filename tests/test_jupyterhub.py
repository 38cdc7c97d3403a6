"""The hook for JupyterHub, without a hub. tests/engines/test_jupyterhub.py has a real one."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tfenv import jupyterhub


def make_spawner(name: str = "bob", groups: tuple[str, ...] = (), **environment: str) -> Any:
    user = SimpleNamespace(name=name, groups=[SimpleNamespace(name=group) for group in groups])
    return SimpleNamespace(user=user, environment=environment, log=logging.getLogger("hub"))


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("[gpu]\nmemory_growth = true\n")


FILES = ("users/alice.toml", "groups/staff.toml", "groups/students.toml", "default.toml")


@pytest.mark.parametrize(
    ("name", "groups", "chosen"),
    [
        ("alice", ("students",), "users/alice.toml"),
        ("bob", ("students",), "groups/students.toml"),
        ("bob", ("students", "staff"), "groups/staff.toml"),
        ("bob", ("vision", "students"), "groups/students.toml"),
        ("bob", (), "default.toml"),
        ("bob", ("vision",), "default.toml"),
        ("../users/alice", ("../groups/staff", "", ".", "a/b", "a\0b"), "default.toml"),
    ],
)
def test_a_user_has_their_own_file_or_else_their_groups(
    name: str, groups: tuple[str, ...], chosen: str, tmp_path: Path
) -> None:
    """Of several groups it is the first by name that has a file. No name leads out of the folder."""
    write(tmp_path, *FILES)
    for hook in (jupyterhub.policy_from(str(tmp_path)), jupyterhub.policy_from(str(tmp_path), FILES)):
        spawner = make_spawner(name, groups, LANG="C", TFGPU_CONFIG="/home/bob/mine.toml")
        hook(spawner)
        assert spawner.environment == {
            "LANG": "C",
            "TFGPU_CONFIG": "/home/bob/mine.toml",
            "TFGPU_SITE_CONFIG": str(tmp_path / chosen),
        }


def test_a_user_without_a_file_is_named_in_the_hubs_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server that starts again after its file was removed does not keep it."""
    write(tmp_path, "groups/staff.toml")
    hook, spawner = jupyterhub.policy_from(str(tmp_path)), make_spawner("bob", ("staff",))
    hook(spawner)
    (tmp_path / "groups" / "staff.toml").unlink()
    hook(spawner)
    assert spawner.environment == {}
    assert caplog.messages == [f"tfenv: bob has no policy: there is no default.toml in {tmp_path}"]


def test_what_an_administrator_set_for_the_spawner_stays(tmp_path: Path) -> None:
    """Another TFGPU_SITE_CONFIG is not the hook's to remove, and the dictionary of the configuration is not changed."""
    common = {"TFGPU_SITE_CONFIG": "/srv/site.toml"}
    spawner = make_spawner()
    spawner.environment = common
    jupyterhub.policy_from(str(tmp_path))(spawner)
    assert spawner.environment == {"TFGPU_SITE_CONFIG": "/srv/site.toml"}
    write(tmp_path, "default.toml")
    jupyterhub.policy_from(str(tmp_path))(spawner)
    assert spawner.environment == {"TFGPU_SITE_CONFIG": str(tmp_path / "default.toml")}
    assert common == {"TFGPU_SITE_CONFIG": "/srv/site.toml"}


def test_a_broken_link_counts_so_that_it_is_reported(tmp_path: Path) -> None:
    """Whoever made it meant something. The user's processes then say that the file is missing."""
    (tmp_path / "default.toml").symlink_to("nowhere")
    spawner = make_spawner()
    jupyterhub.policy_from(str(tmp_path))(spawner)
    assert spawner.environment["TFGPU_SITE_CONFIG"] == str(tmp_path / "default.toml")


def test_a_relative_folder_is_refused() -> None:
    """It would mean another folder in each server."""
    with pytest.raises(ValueError, match=r'policy_from\("etc"\): write an absolute path'):
        jupyterhub.policy_from("etc")
