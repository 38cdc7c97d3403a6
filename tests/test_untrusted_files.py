"""Whose files count: every type, owner and mode of file and folder, for two real users and in all three layers."""

from __future__ import annotations

import itertools
import json
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.shared_machine import ALICE, BOB, NOBODY_KNOWS, ROOT, SharedMachine, User, shared_machine

__all__ = ["shared_machine"]

pytestmark = pytest.mark.timeout(300)

POLICY = "[gpu]\nmemory_growth = true\n"

#: Reads [[start directory, machine root or null, configuration home or null], …] and says of each what was found.
PROBE = """
import json, sys
from tfenv import pipeline
from tfenv.config.presence import MACHINE_ROOT
from tfenv.values import replace
answers = []
for cwd, root, home in json.load(sys.stdin):
    start = replace(pipeline.current_start(cwd), config_home=home)
    loaded = pipeline.load(start, machine_root=root or MACHINE_ROOT)
    answers.append([sorted(finding.code for finding in loaded.findings), "memory_growth" in loaded.policy.settings])
json.dump(answers, sys.stdout)
"""

Question = tuple[str, "str | None", "str | None"]
#: The codes of the findings, and whether the file counted.
Answer = tuple[list[str], bool]

COUNTS: Answer = ([], True)


def ask(machine: SharedMachine, user: User, questions: list[Question]) -> list[Answer]:
    """Return what this user's process finds, in one process."""
    done = machine.python(user, PROBE, text=json.dumps(questions))
    assert done.returncode == 0, done.stderr
    return [(codes, counted) for codes, counted in json.loads(done.stdout)]


# ---- types of files


def make_socket(path: str) -> None:
    # The path is longer than a socket's may be.
    folder = os.open(os.path.dirname(path), os.O_PATH)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    os.close(folder)


#: How it is made, and what is found.
TYPES: dict[str, tuple[Callable[[str], object], list[str], bool]] = {
    "regular": (os.path.exists, [], True),
    "FIFO": (os.mkfifo, ["not-a-file"], False),
    "directory": (os.mkdir, ["not-a-file"], False),
    "socket": (make_socket, ["not-a-file"], False),
    "device": (lambda path: os.mknod(path, stat.S_IFCHR | 0o644, os.makedev(1, 5)), ["not-a-file"], False),
    "link": (lambda path: os.symlink("real", path), [], True),
    "dangling link": (lambda path: os.symlink("nowhere", path), ["not-found"], False),
    "loop": (lambda path: os.symlink("tfgpu.toml", path), ["unreadable"], False),
}


@pytest.mark.parametrize("layer", ["machine", "user", "project"])
def test_only_a_regular_file_counts_and_nothing_hangs(shared_machine: SharedMachine, layer: str) -> None:
    """FIFO, folder, socket, device and links that lead nowhere are left out with a finding, for two users alike."""
    shared_machine.policy({})
    questions: list[Question] = []
    for kind, (make, _, _) in TYPES.items():
        above = f"/srv/types/{layer}-{kind.replace(' ', '-')}"
        folder = shared_machine.folder(f"{above}/tfgpu")
        shared_machine.write(f"{folder}/{'tfgpu.toml' if kind == 'regular' else 'real'}", POLICY)
        make(str(shared_machine.path(f"{folder}/tfgpu.toml")))
        questions.append(
            {"machine": ("/", folder, None), "user": ("/", None, above), "project": (folder, None, None)}[layer]
        )
    expected = [(codes, counts) for _, codes, counts in TYPES.values()]
    for user in (ALICE, BOB):
        assert dict(zip(TYPES, ask(shared_machine, user, questions), strict=True)) == dict(
            zip(TYPES, expected, strict=True)
        )


# ---- owners and modes

PEOPLE = {"root": ROOT, "alice": ALICE, "bob": BOB}
FILE_MODES = (0o644, 0o664, 0o666)
FOLDER_MODES = (0o755, 0o775, 0o777, 0o1777)


@dataclass(frozen=True)
class FilePlace:
    """A file in a folder."""

    owner: str
    mode: int
    folder_owner: str
    folder_mode: int

    @property
    def name(self) -> str:
        return f"{self.owner}-{self.mode:o}-in-{self.folder_owner}-{self.folder_mode:o}"

    @property
    def public(self) -> bool:
        """Everybody may write the file, or put another one in its place."""
        return bool((self.mode | self.folder_mode) & stat.S_IWOTH)


PLACES = tuple(itertools.starmap(FilePlace, itertools.product(PEOPLE, FILE_MODES, PEOPLE, FOLDER_MODES)))


def write_places(machine: SharedMachine, above: str) -> dict[FilePlace, str]:
    """Write a `tfgpu/tfgpu.toml` for each combination. Return the folders above."""
    found = {}
    for place in PLACES:
        found[place] = f"{above}/{place.name}"
        folder = f"{found[place]}/tfgpu"
        if not machine.path(folder).exists():
            machine.folder(found[place])
            machine.folder(folder, PEOPLE[place.folder_owner])
            machine.write(f"{folder}/tfgpu.toml", POLICY, PEOPLE[place.owner], place.mode)
            machine.path(folder).chmod(place.folder_mode)
    return found


def expect_project_answer(place: FilePlace, me: str, trusted: str = "") -> Answer:
    """Return the right answer: the owner is me, root, trusted or the start directory's, and not everybody may write."""
    if place.owner not in (me, "root", place.folder_owner, trusted):
        return ["untrusted-owner"], False
    return (["insecure-permissions"], False) if place.public else COUNTS


@pytest.mark.parametrize("me", ["alice", "bob", "root"])
def test_a_project_file_counts_by_its_owner_and_who_may_write_it(shared_machine: SharedMachine, me: str) -> None:
    """All owners of file and folder with all modes, looked at by two users and by root."""
    shared_machine.policy({})
    folders = write_places(shared_machine, "/srv/owners")
    answers = ask(shared_machine, PEOPLE[me], [(f"{folder}/tfgpu", None, None) for folder in folders.values()])
    for place, answer in zip(folders, answers, strict=True):
        assert answer == expect_project_answer(place, me), place.name


@pytest.mark.parametrize("me", ["alice", "bob"])
def test_a_user_file_counts_by_its_owner_and_who_may_write_it(shared_machine: SharedMachine, me: str) -> None:
    """The same for `~/.config/tfgpu/tfgpu.toml`, started in a folder of root's."""
    shared_machine.policy({})
    folders = write_places(shared_machine, "/srv/owners")
    answers = ask(shared_machine, PEOPLE[me], [("/", None, folder) for folder in folders.values()])
    for place, answer in zip(folders, answers, strict=True):
        own = FilePlace(place.owner, place.mode, "root", place.folder_mode)
        assert answer == expect_project_answer(own, me), place.name


@pytest.mark.parametrize("me", ["alice", "bob", "root"])
def test_a_machine_file_counts_if_root_alone_may_write_it(shared_machine: SharedMachine, me: str) -> None:
    """Neither its group nor others, neither the file nor the folder. Whose directory I started in is no matter."""
    shared_machine.policy({})
    folders = write_places(shared_machine, "/srv/owners")
    answers = ask(shared_machine, PEOPLE[me], [("/", f"{folder}/tfgpu", None) for folder in folders.values()])
    for place, answer in zip(folders, answers, strict=True):
        roots = (place.owner, place.folder_owner) == ("root", "root")
        safe = roots and not (place.mode | place.folder_mode) & (stat.S_IWGRP | stat.S_IWOTH)
        assert answer == (COUNTS if safe else (["insecure-permissions"], False)), place.name


def test_the_administrator_trusts_further_owners_and_nobody_else_does(shared_machine: SharedMachine) -> None:
    """`trusted_owners = ["bob"]` lets bob's files count for alice. Written by alice or in a project it does nothing."""
    folder = shared_machine.folder("/srv/of-bob")
    shared_machine.write(f"{folder}/tfgpu.toml", POLICY, BOB)
    trusting = '[machine]\ntrusted_owners = ["bob"]\n'
    shared_machine.write("/home/alice/trusting/tfgpu/tfgpu.toml", trusting, ALICE)
    question: list[Question] = [(folder, None, "/home/alice/trusting")]
    shared_machine.policy({})
    assert ask(shared_machine, ALICE, question) == [(["machine-layer-only", "untrusted-owner"], False)]
    shared_machine.policy({"tfgpu.toml": trusting})
    assert ask(shared_machine, ALICE, question) == [(["machine-layer-only"], True)]
    assert ask(shared_machine, NOBODY_KNOWS, [(folder, None, None)]) == [COUNTS]


def test_a_machine_folder_that_cannot_be_read_is_a_finding(shared_machine: SharedMachine) -> None:
    """An /etc/tfgpu that is locked for users hides no policy silently."""
    shared_machine.policy({"tfgpu.toml": POLICY})
    shared_machine.path("/etc/tfgpu").chmod(0o700)
    # tfgpu.toml, alice's own file, and those of her three groups.
    assert ask(shared_machine, ALICE, [("/", None, None)]) == [(["unreadable"] * 5, False)]
    assert ask(shared_machine, ROOT, [("/", None, None)]) == [COUNTS]
