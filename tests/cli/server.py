"""A machine of its own for a test: real users and groups, a real /etc/tfgpu, in a private mount namespace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

#: name -> uid; each has a group of the same name and number.
USERS = {"alice": 47001, "bob": 47002, "carol": 47003}
#: name -> (gid, members)
GROUPS = {"students": (47100, ("alice", "bob")), "vision": (47101, ("alice",))}
_IN_PRIVATE = 'mount --bind "$1" /etc && shift && exec "$@"'


class Server:
    """A copy of /etc with three people, and their homes; programs see it in the place of the real one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.etc = root / "etc"
        self.home = root / "home"
        root.chmod(0o755)
        subprocess.run(["cp", "-a", "/etc", str(self.etc)], check=True)
        for name, uid in USERS.items():
            (self.home / name).mkdir(parents=True)
            os.chown(self.home / name, uid, uid)
            self._append("passwd", f"{name}:x:{uid}:{uid}::{self.home / name}:/bin/sh")
            self._append("group", f"{name}:x:{uid}:")
        for name, (gid, members) in GROUPS.items():
            self._append("group", f"{name}:x:{gid}:{','.join(members)}")
        self.clear()

    def _append(self, database: str, line: str) -> None:
        with (self.etc / database).open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def clear(self) -> None:
        """An empty /etc/tfgpu."""
        shutil.rmtree(self.etc / "tfgpu", ignore_errors=True)
        (self.etc / "tfgpu").mkdir(mode=0o755)

    def machine(self, name: str, text: str) -> None:
        """A file of the machine layer: "tfgpu.toml", "users/alice.toml"."""
        self.write(self.etc / "tfgpu" / name, text, "root")

    def write(self, path: Path, text: str, owner: str, mode: int = 0o644) -> Path:
        """A file of somebody; directories on the way are his, too."""
        uid = USERS.get(owner, 0)
        for folder in [folder for folder in reversed(path.parents) if not folder.exists()]:
            folder.mkdir(mode=0o755)
            os.chown(folder, uid, uid)
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        os.chown(path, uid, uid)
        return path

    def run(
        self, command: Sequence[str], env: Mapping[str, str], cwd: Path | None = None, user: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there, as root or as one of the users."""
        become = []
        if user is not None:
            become = ["setpriv", f"--reuid={USERS[user]}", f"--regid={USERS[user]}", "--init-groups"]
        private = ["unshare", "--mount", "sh", "-c", _IN_PRIVATE, "sh", str(self.etc)]
        whole = [*private, *become, *command]
        folder = cwd or self.root
        return subprocess.run(whole, cwd=folder, env=env, capture_output=True, text=True, timeout=200, check=False)

    def tfgpu(
        self, *arguments: str, env: Mapping[str, str], cwd: Path | None = None, user: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`tfgpu ...` there."""
        return self.run([sys.executable, "-m", "tfenv", *arguments], env, cwd, user)
