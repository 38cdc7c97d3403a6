"""Follows the places where policy files stand or may stand, and yields each change once, when it is over.

inotify tells of changes, through watchdog, in the directories on the way to each place. Once a second all places are
looked at besides: a network file system tells nothing of what other hosts write, nobody is told of a rename further
up, and new permissions are not asked for.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from queue import Empty, SimpleQueue
from time import monotonic
from types import TracebackType
from typing import Any

from tfenv.config.discover import list_candidate_paths
from tfenv.config.document import MOST_LINKS, Trust
from tfenv.config.presence import MACHINE_ROOT
from tfenv.identity import identify
from tfenv.machine_date import find_today
from tfenv.policy.model import Start, Subject
from tfenv.watch.change import (
    PolicyChange,
    PolicyState,
    compare_files,
    compare_states,
    find_ends,
    make_empty_change,
    read_state,
)

#: Seconds between two looks at all places, beside what inotify tells, and without it.
_LOOK_EVERY, _POLL_EVERY = 1.0, 0.5
#: A change is over when nothing was written for so long. One that never ends is told after so long, in seconds.
_QUIET, _LONGEST = 0.1, 0.6
#: What the kernel is asked to tell. Not that a file was opened, for we do that, too. Nor each write: a training's log
#: may stand beside the policy, and a writer that is done closes the file.
_EVENTS = (
    "FileCreatedEvent", "FileClosedEvent", "FileMovedEvent", "FileDeletedEvent",
    "DirCreatedEvent", "DirMovedEvent", "DirDeletedEvent",
)  # fmt: skip

#: What tells whether a name means something else by now. None instead: there is nothing of that name.
_Signature = tuple[int, ...]


def survey_paths(paths: Iterable[str]) -> dict[str, _Signature | None]:
    """Return every name on the way to these paths, symbolic links followed, with what tells whether it changed.

    Of a directory that is which one it is and who may write there, not what happens in it. The way ends at
    the first name that is missing.
    """
    seen: dict[str, _Signature | None] = {}
    for path in paths:
        _walk(path, seen)
    return seen


def _walk(path: str, seen: dict[str, _Signature | None]) -> None:
    here, waiting, links = "/", _split_reversed(path), 0
    while waiting:
        name = waiting.pop()
        if name == "..":
            here = os.path.dirname(here)
            continue
        place = os.path.join(here, name)
        if place not in seen:
            seen[place] = _read_signature(place)
        target = None if seen[place] is None else _read_link(place)
        if seen[place] is None or links > MOST_LINKS:
            return
        if target is None:
            here = place
        else:
            links, here = links + 1, "/" if target.startswith("/") else here
            waiting += _split_reversed(target)


def _split_reversed(path: str) -> list[str]:
    """Return the names of a path, the first one last."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _read_signature(path: str) -> _Signature | None:
    try:
        found = os.lstat(path)
    except (OSError, ValueError):
        return None
    which = (found.st_dev, found.st_ino, found.st_mode, found.st_uid, found.st_gid)
    return which if stat.S_ISDIR(found.st_mode) else (*which, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _read_link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


# ---- being told


class _InotifyListener:
    """Wakes the watcher when a surveyed name changes. Where inotify is exhausted it says so once, and wakes nobody."""

    def __init__(self, wake: Callable[[], None], warn: Callable[[str], None]) -> None:
        self._wake, self._warn = wake, warn
        self._names: frozenset[str] = frozenset()
        self._watches: dict[str, tuple[_Signature | None, Any]] = {}
        self._observer: Any = None
        try:
            import logging

            from watchdog import events
            from watchdog.observers import Observer

            # What it logs of its threads, as when they end, is nothing for a user's terminal.
            logger = logging.getLogger("watchdog")
            logger.addHandler(logging.NullHandler())
            logger.propagate = False
            self._filter = [getattr(events, name) for name in _EVENTS]
            self._observer = Observer()
            self._observer.start()
        except (ImportError, OSError) as error:
            self._give_up(error)

    @property
    def gave_up(self) -> bool:
        return self._observer is None

    def dispatch(self, event: Any) -> None:
        """Wake the watcher if an event is of a surveyed name. watchdog calls this in a thread of its own."""
        names = {os.fsdecode(event.src_path), os.fsdecode(getattr(event, "dest_path", "") or "")}
        if names & self._names:
            self._wake()

    def follow(self, surveyed: Mapping[str, _Signature | None]) -> None:
        """Listen in the directory of each name that may change, and stop listening in others."""
        self._names = frozenset(surveyed)
        wanted = {
            os.path.dirname(name)
            for name, signature in surveyed.items()
            if signature is None or not stat.S_ISDIR(signature[2])
        }
        for folder in [*self._watches]:
            if folder not in wanted or self._watches[folder][0] != _read_signature(folder):
                self._remove_watch(folder)
        for folder in sorted(wanted - self._watches.keys()):
            if self._observer is not None:
                self._add_watch(folder)

    def close(self) -> None:
        """Stop listening. May be called twice."""
        observer, self._observer = self._observer, None
        self._watches.clear()
        if observer is not None:
            observer.stop()

    def _add_watch(self, folder: str) -> None:
        try:
            signature = _read_signature(folder)
            watch = self._observer.schedule(self, folder, recursive=False, event_filter=self._filter)
            self._watches[folder] = signature, watch
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                self._give_up(error)

    def _remove_watch(self, folder: str) -> None:
        _, watch = self._watches.pop(folder)
        try:
            self._observer.unschedule(watch)
        except (KeyError, OSError):  # the directory went away, and its watch with it
            return

    def _give_up(self, error: Exception) -> None:
        self.close()
        reason = getattr(error, "strerror", None) or str(error)
        advice = "" if isinstance(error, ImportError) else "; raise fs.inotify.max_user_instances or max_user_watches"
        self._warn(f"no inotify ({reason}): checking the files twice a second instead{advice}")


# ---- all of it


class PolicyWatcher:
    """Follows the files of one process's policy. A context manager: its state is known once it is entered.

    Attributes:
        places: Where a file would count, whether there is one now or not.
        state: What a process that starts now would get.
    """

    def __init__(
        self,
        start: Start,
        warn: Callable[[str], None],
        subject: Subject | None = None,
        machine_root: str = MACHINE_ROOT,
        machine_trust: Trust | None = None,
        *,
        all_users: bool = False,
    ) -> None:
        """
        Args:
            start: The process to follow it for.
            warn: Told, once, that inotify is exhausted.
            subject: For whom. None: for this process's own user.
            machine_root: Where the machine layer stands. Another one only to try it.
            machine_trust: Whose machine layer counts. None: root's.
            all_users: Follow all files of the machine layer, also those for other users and groups, and each new day,
                on which tables of theirs may end.
        """
        subject = subject or identify(start.uid)
        self.places = list_candidate_paths(start, subject, machine_root)
        self._read_state: Callable[[], PolicyState] = lambda: read_state(start, subject, machine_root, machine_trust)
        self._warn = warn
        self._root = machine_root if all_users else None
        self._woken: SimpleQueue[bool] = SimpleQueue()  # the one queue a signal handler may put into
        self._stopped = False

    def __enter__(self) -> PolicyWatcher:  # noqa: PYI034 - typing has Self from Python 3.11 on
        self._inotify = _InotifyListener(lambda: self._woken.put(True), self._warn)
        self._today = find_today()
        self._others = self._survey_others()
        self._seen = self._survey()
        self._inotify.follow(self._seen)
        self.state = self._read_state()
        self._ends = find_ends(self.state)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inotify.close()

    def stop(self) -> None:
        """Let `follow_changes` end. May be called from a signal handler or another thread."""
        self._stopped = True
        self._woken.put(True)

    def follow_changes(self) -> Iterator[PolicyChange]:
        """Yield each change once, when it is over, until `stop` is called."""
        while self._wait():
            before, self.state = self.state, self._read_state()
            others, self._others = self._others, self._survey_others()
            day, self._today = self._today, find_today()
            self._ends = find_ends(self.state)
            change = compare_states(before, self.state, compare_files(others, self._others))
            if change is not None:
                yield change
            elif self._root is not None and day != self._today:
                yield make_empty_change(before, self.state)

    def _wait(self) -> bool:
        """Wait until something changed and is quiet again. False: stopped."""
        while not self._stopped:
            every = _POLL_EVERY if self._inotify.gave_up else _LOOK_EVERY
            if self._is_woken(every) or self._survey() != self._seen:
                self._settle()
                return not self._stopped
            # A look at the date each time, and no timer: the laptop may sleep over midnight, the clock may be set.
            today = find_today()
            if (self._ends and today >= self._ends[0]) or (self._root is not None and today != self._today):
                return True
        return False

    def _survey(self) -> dict[str, _Signature | None]:
        return survey_paths((*self.places, *self._others, *self._survey_others()))

    def _survey_others(self) -> dict[str, _Signature]:
        """Return the files of the machine layer that are for others, with what tells whether they changed."""
        if self._root is None:
            return {}
        paths = (os.path.join(folder, name) for folder, _, names in os.walk(self._root) for name in names)
        found = {path: _read_signature(path) for path in paths if path not in self.places}
        return {path: signature for path, signature in found.items() if signature is not None}

    def _settle(self) -> None:
        """Wait for the end of it: an editor writes a file in several steps, Kubernetes swaps links."""
        end = monotonic() + _LONGEST
        while not self._stopped:
            before, self._seen = self._seen, self._survey()
            self._inotify.follow(self._seen)  # before the files are read: what comes later wakes the watcher again
            woken = self._is_woken(_QUIET)
            if monotonic() > end or not (woken or self._seen != before):
                return

    def _is_woken(self, within: float) -> bool:
        try:
            self._woken.get(timeout=within)
        except Empty:
            return False
        while not self._woken.empty():
            self._woken.get_nowait()
        return True
