"""A machine of several people for tests: real uids, and an /etc, /home, /srv and /var/log of its own.

The machine layer stands at a literal path, /etc/tfgpu, and counts only if root owns it all the way up. So it is
written in a mount namespace that nobody else sees, where alice, bob, carol and a uid without an entry run programs.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tfenv.simulate.build import build_libraries

REPOSITORY = Path(__file__).parent.parent

_TOOLS = ("unshare", "nsenter", "setpriv", "mount")

#: /etc as it is, with users of our own; /home, /srv, /var/log and /var/lib are empty.
_SETUP = """
set -e
mkdir "$STAGE/etc"
mount -t tmpfs -o mode=755 tmpfs "$STAGE/etc"
cp -a /etc/. "$STAGE/etc/"
rm -rf "$STAGE/etc/tfgpu"
printf 'students:x:6001:alice\\nvision:x:6002:alice\\n' >> "$STAGE/etc/group"
for user in alice:5001 bob:5002 carol:5003; do
    name=${user%:*} uid=${user#*:}
    echo "$name:x:$uid:$uid::/home/$name:/bin/sh" >> "$STAGE/etc/passwd"
    echo "$name:x:$uid:" >> "$STAGE/etc/group"
done
mount --move "$STAGE/etc" /etc
for folder in /home /srv /var/log /var/lib; do mount -t tmpfs -o mode=755 tmpfs $folder; done
mkdir /home/alice /home/bob /home/carol /etc/tfgpu
for name in alice bob carol; do chown $name:$name /home/$name; done
mkdir -m 1733 /var/log/tfgpu
"""


@dataclass(frozen=True)
class User:
    """Somebody who runs programs.

    Attributes:
        uid: Their number, and that of their own group.
        groups: Supplementary groups.
    """

    uid: int
    groups: tuple[int, ...] = ()


ROOT = User(0)
ALICE = User(5001, (6001, 6002))
BOB = User(5002)
#: As in a container that is started with a uid of its own: no passwd entry, no home.
NOBODY_KNOWS = User(4711)


class SharedMachine:
    """The namespace, seen from outside."""

    def __init__(self, stage: Path) -> None:
        stage.chmod(0o755)
        script = _SETUP + "\n".join(_expose(_find_needed_folders(), stage)) + "\necho ready; exec cat\n"
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
            env={**os.environ, "STAGE": str(stage)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.problem = None if self.process.stdout.readline() == "ready\n" else self.process.communicate()[1].strip()

    def close(self) -> None:
        """End the last process. The namespace goes with it, and all it has mounted."""
        self.process.communicate()

    # -- files

    def path(self, path: str) -> Path:
        """Return where a file of the namespace is found from outside."""
        return Path(f"/proc/{self.process.pid}/root{path}")

    def write(self, path: str, text: str, owner: User = ROOT, mode: int = 0o644) -> str:
        """Write a file of this owner, make the folders above it, and return its path."""
        folder = self.folder(os.path.dirname(path), owner)
        there = self.path(f"{folder}/{os.path.basename(path)}")
        there.write_text(text, encoding="utf-8")
        os.chown(there, owner.uid, owner.uid)
        there.chmod(mode)
        return path

    def folder(self, path: str, owner: User = ROOT, mode: int = 0o755) -> str:
        """Make a folder of this owner, and return its path. One that is there stays as it is."""
        there = self.path(path)
        if not there.exists():
            self.folder(os.path.dirname(path), owner)
            there.mkdir()
            os.chown(there, owner.uid, owner.uid)
            there.chmod(mode)
        return path

    def clear(self) -> None:
        """Remove every policy, and what is in the homes and in /srv."""
        self.policy({})
        for left in (*self.path("/home").glob("*/*"), *self.path("/srv").iterdir()):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()

    def policy(self, files: Mapping[str, str]) -> None:
        """Write root's own files below /etc/tfgpu, and no others."""
        for folder in ("/etc/tfgpu", "/var/lib/tfgpu"):
            shutil.rmtree(self.path(folder), ignore_errors=True)
        self.folder("/etc/tfgpu")
        for name, text in files.items():
            self.write(f"/etc/tfgpu/{name}", text)

    # -- programs

    def run(
        self, user: User, *command: str, cwd: str = "/", env: Mapping[str, str] | None = None, text: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as this user, there."""
        groups = f"--groups={','.join(map(str, user.groups))}" if user.groups else "--clear-groups"
        enter = ("nsenter", f"--mount=/proc/{self.process.pid}/ns/mnt", "env", "-C", cwd)
        identity = ("setpriv", f"--reuid={user.uid}", f"--regid={user.uid}", groups, "--")
        return subprocess.run(
            [*enter, *identity, *command],
            env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
            input=text,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    def python(
        self, user: User, program: str, cwd: str = "/", text: str | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run Python code as this user, with tfenv at hand and its hook not armed."""
        env = {"PYTHONPATH": str(REPOSITORY), **variables}
        return self.run(user, sys.executable, "-c", program, cwd=cwd, env=env, text=text)

    def tfgpu(
        self, *arguments: str, user: User = ROOT, cwd: str = "/", env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `tfgpu` as this user, or as root."""
        env = {"PYTHONPATH": str(REPOSITORY), **(env or {})}
        return self.run(user, sys.executable, "-m", "tfenv", *arguments, cwd=cwd, env=env)


# ---- what the others must be able to read


def _find_needed_folders() -> list[Path]:
    """Return this interpreter, its packages, the checkout, and the libraries of the simulated GPUs."""
    packages = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    return [Path(sys.prefix), Path(sys.base_prefix), REPOSITORY, *packages, build_libraries()]


def _is_closed(path: Path) -> bool:
    return not path.stat().st_mode & stat.S_IXOTH


def _expose(paths: Iterable[Path], stage: Path) -> Iterator[str]:
    """Yield commands that mount an open folder with what is needed over each closed one, such as /root."""
    yield from ()
    tops: dict[Path, list[Path]] = {}
    for path in dict.fromkeys(path.resolve() for path in paths):
        closed = [folder for folder in (*reversed(path.parents), path) if _is_closed(folder)]
        if closed:
            tops.setdefault(closed[0], []).append(path)
    for number, (top, members) in enumerate(tops.items()):
        view = stage / f"view{number}"
        view.mkdir(mode=0o755)
        for path in members:
            yield from _bind(path, view / path.relative_to(top))
        yield f"mount --rbind '{view}' '{top}'"


def _bind(path: Path, place: Path) -> Iterator[str]:
    """Yield commands that mount a folder at its place in the view. Of a closed one they mount what is in it."""
    if not _is_closed(path):
        yield f"mkdir -p '{place}'; mount --bind '{path}' '{place}'"
        return
    for entry in path.iterdir():
        make = "mkdir -p" if entry.is_dir() else "touch"
        yield f"mkdir -p '{place}'; {make} '{place / entry.name}'; mount --bind '{entry}' '{place / entry.name}'"


@pytest.fixture(scope="module")
def shared_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedMachine]:
    """Yield a machine to the tests that import this. Skip them, with the reason, where no namespace can be made."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip("only root can mount and be two users" if not missing else f"there is no {', '.join(missing)}")
    machine = SharedMachine(tmp_path_factory.mktemp("machine"))
    if machine.problem is not None:
        pytest.skip(f"no mount namespace here: {machine.problem}")
    yield machine
    machine.close()
