"""Real files, real inotify: each change is seen once, however it is made, and soon."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue

import pytest

from tests.machine import ME, Machine
from tfenv import machine_date
from tfenv.config.document import Trust
from tfenv.policy.model import Start
from tfenv.values import replace
from tfenv.watch import follow
from tfenv.watch.change import PolicyChange
from tfenv.watch.follow import PolicyWatcher, survey_paths

GROWTH = "[gpu]\nmemory_growth = true\n"
#: On a machine that does many other things at the time; alone it takes a quarter of a second.
LONGEST_WAIT = 20.0


def format_limit(size: int) -> str:
    return f'[gpu]\nmemory_limit = "{size}GiB"\n'


class BackgroundWatcher:
    """A Watch in a thread, and what it yields."""

    def __init__(self, machine: Machine, start: Start | None = None) -> None:
        self.notices: list[str] = []
        trust = Trust(ME, administrator=ME, checked_from=str(machine.root))
        self.watch = PolicyWatcher(
            start or machine.start, self.notices.append, machine.subject, str(machine.etc), trust
        )
        self._changes: SimpleQueue[PolicyChange] = SimpleQueue()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> BackgroundWatcher:  # noqa: PYI034
        self._thread.start()
        assert self._ready.wait(LONGEST_WAIT)
        return self

    def __exit__(self, *_: object) -> None:
        self.watch.stop()
        self._thread.join(LONGEST_WAIT)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with self.watch as watch:
            self._ready.set()
            for change in watch.follow_changes():
                self._changes.put(change)

    def get_next_values(self) -> dict[str, object]:
        """Wait for the next change, and return the new values by key."""
        change = self._changes.get(timeout=LONGEST_WAIT)
        return {difference.key: difference.new and difference.new.value for difference in change.differences}

    def sees_nothing(self, seconds: float = 0.0) -> bool:
        """Tell whether nothing (more) was seen."""
        try:
            self._changes.get(timeout=seconds)
        except Empty:
            return True
        return False


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def inotify_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """inotify alone: the regular look at all places would find everything, too, and hide what it misses."""
    monkeypatch.setattr(follow, "_LOOK_EVERY", 60.0)


@pytest.fixture
def following(machine: Machine, inotify_alone: None) -> Iterator[BackgroundWatcher]:
    """Follow a project whose file says 8 GiB."""
    machine.write("home/project/tfgpu.toml", format_limit(8))
    with BackgroundWatcher(machine) as following:
        yield following


def replace_by_rename(path: Path, text: str) -> None:
    temporary = path.with_name(".tfgpu.toml.tmp")
    temporary.write_text(text)
    temporary.chmod(0o644)
    temporary.rename(path)


def save_as_vim(path: Path, text: str) -> None:
    """`:set backup writebackup backupcopy=no`: probe, move the old one aside, write the new one, remove the old one."""
    probe = path.with_name("4913")
    probe.touch()
    probe.unlink()
    backup = path.with_name(path.name + "~")
    path.rename(backup)
    path.write_text(text)
    path.chmod(0o644)
    backup.unlink()


def save_in_pieces(path: Path, text: str) -> None:
    """As an editor that truncates and writes: for a moment the file is empty, and half of it is no TOML."""
    with path.open("w") as file:
        file.write(text[: len(text) // 2])
        file.flush()
        time.sleep(0.02)
        file.write(text[len(text) // 2 :])


def move_from_elsewhere(path: Path, text: str) -> None:
    other = path.parent.parent / "elsewhere.toml"
    other.write_text(text)
    other.chmod(0o644)
    other.rename(path)


@pytest.mark.parametrize(
    "save",
    [Path.write_text, save_in_pieces, replace_by_rename, save_as_vim, move_from_elsewhere],
    ids=lambda save: save.__name__,
)
def test_every_way_to_save_is_one_change(
    following: BackgroundWatcher, machine: Machine, save: Callable[[Path, str], object]
) -> None:
    """However a file is written, that is one change from the old text to the new one, and nothing in between."""
    path = machine.project / "tfgpu.toml"
    save(path, format_limit(16))
    assert following.get_next_values() == {"gpu.memory_limit": "16GiB"}
    save(path, format_limit(4))
    assert following.get_next_values() == {"gpu.memory_limit": "4GiB"}
    assert following.sees_nothing()


def test_deleted_and_made_again(following: BackgroundWatcher, machine: Machine) -> None:
    """A file that goes, and one that comes, are one change each."""
    path = machine.project / "tfgpu.toml"
    path.unlink()
    assert following.get_next_values() == {"gpu.memory_limit": None}
    machine.write("home/project/tfgpu.toml", GROWTH)
    assert following.get_next_values() == {"gpu.memory_growth": True}


def test_touch_and_reading_say_nothing(following: BackgroundWatcher, machine: Machine) -> None:
    """What is no change is not told, be it a new time stamp, somebody who reads, or another file of the project."""
    path = machine.project / "tfgpu.toml"
    path.touch()
    path.read_text()
    (machine.project / "notes.txt").write_text("x")
    assert following.sees_nothing(1.0)
    path.write_text(format_limit(2))
    assert following.get_next_values() == {"gpu.memory_limit": "2GiB"}


def test_many_quick_changes_end_in_the_last(following: BackgroundWatcher, machine: Machine) -> None:
    """Of 50 changes in a row fewer may be told. The last one told is the state of the files."""
    path = machine.project / "tfgpu.toml"
    for size in range(100, 150):
        replace_by_rename(path, format_limit(size))
        time.sleep(0.005)
    told = [following.get_next_values()]
    while told[-1] != {"gpu.memory_limit": "149GiB"}:
        told.append(following.get_next_values())
    assert following.sees_nothing(0.3)


def test_a_directory_that_was_not_there(machine: Machine, inotify_alone: None) -> None:
    """The user's file and my own machine file are found when their directories are made later than the watch."""
    shutil.rmtree(machine.etc)
    with BackgroundWatcher(machine) as following:
        machine.write("home/.config/tfgpu/tfgpu.toml", GROWTH)
        assert following.get_next_values() == {"gpu.memory_growth": True}
        machine.etc.mkdir(mode=0o755)
        machine.write("etc/users/alice.toml", format_limit(3))
        assert following.get_next_values() == {"gpu.memory_limit": "3GiB"}
        machine.write("etc/groups/students.toml", "[ceiling]\nmax_devices = 1\n")
        assert following.get_next_values() == {"ceiling.max_devices": 1}
        machine.write("etc/users/bob.toml", format_limit(1))
        assert following.sees_nothing(0.5)


def test_every_place_of_the_walk(machine: Machine, inotify_alone: None) -> None:
    """A file further up, one that is nearer, and a pyproject.toml with our table come one after the other."""
    nested = machine.project / "a" / "b"
    nested.mkdir(parents=True)
    with BackgroundWatcher(machine, replace(machine.start, cwd=str(nested))) as following:
        machine.write("home/project/tfgpu.toml", format_limit(1))
        assert following.get_next_values() == {"gpu.memory_limit": "1GiB"}
        machine.write("home/project/a/b/pyproject.toml", '[tool.tfgpu.gpu]\nmemory_limit = "2GiB"\n')
        assert following.get_next_values() == {"gpu.memory_limit": "2GiB"}
        machine.write("home/project/a/tfgpu.toml", format_limit(3))
        assert following.sees_nothing(0.5), "a nearer file speaks"


def test_a_configured_file(machine: Machine, inotify_alone: None) -> None:
    """TFGPU_CONFIG's file is followed from before it exists, through a relative path with `..`, and no walk is."""
    start = replace(machine.start, config="../policies/job.toml")
    with BackgroundWatcher(machine, start) as following:
        machine.write("home/policies/job.toml", GROWTH)
        assert following.get_next_values() == {"gpu.memory_growth": True}
        machine.write("home/project/tfgpu.toml", format_limit(1))
        assert following.sees_nothing(0.5)


def test_a_sites_file(machine: Machine, inotify_alone: None) -> None:
    """TFGPU_SITE_CONFIG's file is followed from before it exists, and so is the project's."""
    start = replace(machine.start, site=str(machine.root / "opt" / "site.toml"))
    with BackgroundWatcher(machine, start) as following:
        machine.write("opt/site.toml", format_limit(20))
        assert following.get_next_values() == {"gpu.memory_limit": "20GiB"}
        machine.write("home/project/tfgpu.toml", format_limit(2))
        assert following.get_next_values() == {"gpu.memory_limit": "2GiB"}


def swap_links(volume: Path, text: str, version: str) -> None:
    """As the kubelet does: a new directory with a time stamp, and `..data` renamed onto the old link."""
    folder = volume / f"..{version}"
    folder.mkdir()
    (folder / "tfgpu.toml").write_text(text)
    (folder / "tfgpu.toml").chmod(0o644)
    link = volume / "..data_tmp"
    link.symlink_to(folder.name)
    old = os.readlink(volume / "..data") if (volume / "..data").is_symlink() else None
    link.rename(volume / "..data")
    if old is not None:
        shutil.rmtree(volume / old)


def test_a_swap_of_links_as_kubernetes_does(machine: Machine, inotify_alone: None) -> None:
    """A mounted ConfigMap changes by one rename of `..data`. The file's own link never changes."""
    swap_links(machine.etc, format_limit(1), "2026_01_01")
    (machine.etc / "tfgpu.toml").symlink_to("..data/tfgpu.toml")
    with BackgroundWatcher(machine) as following:
        for version in range(2, 5):
            swap_links(machine.etc, format_limit(version), f"2026_01_0{version}")
            assert following.get_next_values() == {"gpu.memory_limit": f"{version}GiB"}
        assert following.sees_nothing()


def test_a_link_that_is_turned(machine: Machine, inotify_alone: None) -> None:
    """A directory on the way that is a link is followed when it leads elsewhere, and where it leads to."""
    for name, size in (("blue", 1), ("green", 2)):
        machine.write(f"releases/{name}/tfgpu.toml", format_limit(size))
    current = machine.root / "current"
    current.symlink_to("releases/blue")
    with BackgroundWatcher(machine, replace(machine.start, config=str(current / "tfgpu.toml"))) as following:
        (machine.root / "next").symlink_to("releases/green")
        (machine.root / "next").rename(current)
        assert following.get_next_values() == {"gpu.memory_limit": "2GiB"}
        machine.write("releases/green/tfgpu.toml", format_limit(3))
        assert following.get_next_values() == {"gpu.memory_limit": "3GiB"}
        machine.write("releases/blue/tfgpu.toml", format_limit(4))
        assert following.sees_nothing(0.5)


def test_what_inotify_is_not_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that no event tells of, as on a network file system, is seen by the regular look."""
    machine.write("home/project/tfgpu.toml", format_limit(8))
    monkeypatch.setattr(follow._InotifyListener, "dispatch", lambda *_: None)
    with BackgroundWatcher(machine) as following:
        machine.write("home/project/tfgpu.toml", format_limit(9))
        assert following.get_next_values() == {"gpu.memory_limit": "9GiB"}


def test_what_is_being_written_is_waited_for(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is found half written is read when it is quiet, and told once."""
    for name, seconds in (("_LOOK_EVERY", 0.02), ("_QUIET", 0.5), ("_LONGEST", 20.0)):
        monkeypatch.setattr(follow, name, seconds)
    path = machine.write("home/project/tfgpu.toml", format_limit(8))
    with BackgroundWatcher(machine) as following:
        with path.open("w") as file:
            for piece in ("[gpu]\n", 'memory_limit = "9G', 'iB"\n'):
                file.write(piece)
                file.flush()
                time.sleep(0.1)
        assert following.get_next_values() == {"gpu.memory_limit": "9GiB"}
        assert following.sees_nothing(0.6)


def test_a_survey_names_every_link_and_ends_at_what_is_missing(tmp_path: Path) -> None:
    """Each name on the way is there once. A loop of links ends. What is below a missing name is not asked for."""
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "loop").symlink_to("loop")
    seen = survey_paths([f"{tmp_path}/link/none/tfgpu.toml", f"{tmp_path}/loop/tfgpu.toml", f"{tmp_path}/a/../b"])
    names = [name.removeprefix(f"{tmp_path}/") for name in seen if name.startswith(f"{tmp_path}/")]
    assert names == ["link", "a", "a/none", "loop", "b"]
    assert [name for name in seen if seen[name] is None] == [f"{tmp_path}/a/none", f"{tmp_path}/b"]


def test_the_day_on_which_a_table_ends_is_a_change(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file changes. A clock that jumps back does not bring the table back, and the next day tells nothing."""
    monkeypatch.setattr(follow, "_LOOK_EVERY", 0.02)
    monkeypatch.setattr(machine_date, "_latest", "")
    today = ["2027-01-30"]
    monkeypatch.setattr(machine_date, "_read_date", lambda: today[0])
    exception = '[user.alice]\nexpires = 2027-01-31\n[user.alice.ceiling]\nmemory_limit = "16GiB"\n'
    machine.write("etc/tfgpu.toml", f'[ceiling]\nmemory_limit = "8GiB"\n{exception}')
    with BackgroundWatcher(machine) as following:
        assert following.sees_nothing(0.2)
        today[0] = "2027-01-31"
        assert following.get_next_values() == {"ceiling.memory_limit": "8GiB"}
        for day in ("2027-01-30", "2027-02-01"):
            today[0] = day
            assert following.sees_nothing(0.2)
