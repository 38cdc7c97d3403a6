"""Files that are written in one step."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tfenv.files import replace_file


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Write a file, alone in its folder."""
    path = tmp_path / "a.toml"
    path.write_text("old")
    return path


def test_a_reader_sees_the_old_text_or_the_new_one(target: Path) -> None:
    """A file that is open keeps its text. The next reader gets the new one. Nothing else is in the folder."""
    with target.open() as file:
        replace_file(target, "größer\r\n")
        assert file.read() == "old"
    assert target.read_bytes() == "größer\r\n".encode()
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(("mode", "expected"), [(None, 0o640), (0o644, 0o644), (0o666, 0o666)])
def test_the_mode_is_the_umasks_or_the_given_one(target: Path, mode: int | None, expected: int) -> None:
    """Without a mode the umask decides, with one it has no influence."""
    before = os.umask(0o027)
    try:
        replace_file(str(target), "new", mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == expected


def test_a_link_is_replaced(target: Path) -> None:
    """A symbolic link is replaced by the file. What it led to stays."""
    link = target.with_name("link")
    link.symlink_to(target)
    replace_file(link, "new")
    assert (link.is_symlink(), link.read_text(), target.read_text()) == (False, "new", "old")


@pytest.mark.parametrize("dangling", [False, True])
def test_nothing_is_overwritten_unasked(target: Path, dangling: bool) -> None:
    """Without `overwrite` a file or link that exists stays as it is, a new one is written."""
    if dangling:
        target.unlink()
        target.symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        replace_file(target, "new", overwrite=False)
    assert list(target.parent.iterdir()) == [target]
    assert dangling or target.read_text() == "old"
    replace_file(target.with_name("b.toml"), "new", overwrite=False)
    assert sorted(path.name for path in target.parent.iterdir()) == ["a.toml", "b.toml"]


def test_a_full_disk_leaves_the_old_file(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the new text cannot be written, the old file stays, with nothing beside it."""

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        replace_file(target, "new")
    assert (target.read_text(), list(target.parent.iterdir())) == ("old", [target])
