"""`tfgpu wall install`: the limits of a user are set when they log in, by systemd or by PAM."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shared_machine import ALICE, BOB, REPOSITORY, ROOT, SharedMachine, User, shared_machine
from tests.wall.conftest import WallMachine, open_wall_machine

__all__ = ["shared_machine"]

UNIT = "/usr/lib/systemd/system/user-runtime-dir@.service"
DROP_IN = "/etc/systemd/system/user-runtime-dir@.service.d/tfgpu-wall.conf"
SESSION = "/etc/pam.d/common-session"
POLICY = '[ceiling]\nmemory_total = "8GiB"\n'
ALICES = f"user-{ALICE.uid}.slice"
LOGGED_IN = "users who are logged in now keep what they have; run `tfgpu wall apply --all` to limit them, too"
needs_systemd = pytest.mark.skipif(not Path(UNIT).exists(), reason="there is no systemd here")
needs_pam = pytest.mark.skipif(
    not list(Path("/usr/lib").glob("*/security/pam_exec.so")), reason="there is no pam_exec here"
)

#: A session as sshd opens it, and what PAM answers: 0 is success.
OPEN_SESSION = """
import ctypes, sys
class Conversation(ctypes.Structure):
    _fields_ = [("ask", ctypes.c_void_p), ("data", ctypes.c_void_p)]
pam = ctypes.CDLL("libpam.so.0")
handle, conversation = ctypes.c_void_p(), Conversation()
service, user = sys.argv[1].encode(), sys.argv[2].encode()
assert pam.pam_start(service, user, ctypes.byref(conversation), ctypes.byref(handle)) == 0
print(pam.pam_open_session(handle, 0))
"""


#: Where only root can write, also if the clone is elsewhere: root's login runs the code in there.
OWN = "/var/lib/tfenv-of-root"
PYTHON = f"{OWN}/bin/python"


def install_tfenv(machine: SharedMachine) -> None:
    """Install tfenv into an environment of root's own, unless it is there."""
    own = machine.path(OWN)
    if own.exists():
        return
    site = own / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    site.mkdir(parents=True)
    (own / "bin").mkdir()
    (own / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    (own / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.copytree(REPOSITORY / "tfenv", site / "tfenv", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "schemas", site / "tfenv" / "schemas")


def tfgpu(where: SharedMachine | WallMachine, *arguments: str, user: User = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the `tfgpu` of root's own environment."""
    environment = where.environment if isinstance(where, WallMachine) else {}
    own = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    return where.run(user, PYTHON, "-m", "tfenv", *arguments, env=own)


@pytest.fixture
def machine(shared_machine: SharedMachine) -> Iterator[SharedMachine]:
    """Yield a machine without anything for the login. What a test wrote is removed."""
    install_tfenv(shared_machine)
    session = shared_machine.path(SESSION)
    before = session.read_bytes() if session.exists() else None
    yield shared_machine
    shutil.rmtree(shared_machine.path("/etc/systemd/system/user-runtime-dir@.service.d"), ignore_errors=True)
    shared_machine.path("/etc/systemd/system/user-runtime-dir@.service").unlink(missing_ok=True)
    session.unlink(missing_ok=True)
    if before is not None:
        session.write_bytes(before)


def mask_user_unit(machine: SharedMachine) -> None:
    """Have systemd start no unit for users, as `systemctl mask` does."""
    machine.folder("/etc/systemd/system")
    machine.path("/etc/systemd/system/user-runtime-dir@.service").symlink_to("/dev/null")


# ---- systemd


@needs_systemd
def test_a_dry_run_prints_what_is_written(machine: SharedMachine) -> None:
    """The difference is that of the file, which is not there before install is run without --dry-run."""
    dry = tfgpu(machine, "wall", "install", "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "")
    assert not machine.path(DROP_IN).exists()
    assert tfgpu(machine, "wall", "install").returncode == 0
    lines = machine.path(DROP_IN).read_text().splitlines()
    assert dry.stdout.splitlines()[3:] == [f"+{line}" for line in lines]
    assert lines[1] == "[Service]"


@needs_systemd
def test_install_says_what_to_do_next_and_once_is_enough(machine: SharedMachine) -> None:
    """systemd has to read the file, and those who are logged in need another run. A second install writes nothing."""
    first = tfgpu(machine, "wall", "install")
    assert first.stderr.splitlines() == [
        f"tfgpu wall install: wrote tfenv's block into {DROP_IN}",
        "tfgpu wall install: run `systemctl daemon-reload`, so that systemd reads it",
        f"tfgpu wall install: {LOGGED_IN}",
    ]
    before = machine.path(DROP_IN).stat()
    second = tfgpu(machine, "wall", "install")
    assert (second.returncode, second.stderr) == (0, f"tfgpu wall install: tfenv's block is already in {DROP_IN}\n")
    after = machine.path(DROP_IN).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@needs_systemd
def test_systemd_understands_the_drop_in(machine: SharedMachine) -> None:
    """systemd-analyze reads the unit of a user with it, and has nothing to say of our file."""
    tfgpu(machine, "wall", "install")
    done = machine.run(ROOT, "systemd-analyze", "verify", "--man=no", f"user-runtime-dir@{ALICE.uid}.service")
    assert "tfgpu-wall" not in done.stderr, done.stderr
    broken = machine.path(DROP_IN).read_text().replace("ExecStartPre=", "ExecStartBefore=")
    machine.path(DROP_IN).write_text(broken)
    done = machine.run(ROOT, "systemd-analyze", "verify", "--man=no", f"user-runtime-dir@{ALICE.uid}.service")
    assert "tfgpu-wall" in done.stderr, "it reads this file"


@needs_systemd
def test_what_systemd_runs_limits_the_user(shared_machine: SharedMachine, machine: SharedMachine) -> None:
    """The command of the drop-in, with a number in the place of %i, sets the limit of that user alone."""
    with open_wall_machine(shared_machine, "dmem") as wall:
        shared_machine.policy({"tfgpu.toml": POLICY})
        assert tfgpu(wall, "wall", "install").returncode == 0
        line = next(line for line in read_lines(machine, DROP_IN) if line.startswith("ExecStartPre="))
        command = line.removeprefix("ExecStartPre=")
        assert command.startswith("-+"), "a failure does not matter, and root runs it"
        words = shlex.split(command[2:].replace("%i", str(ALICE.uid)))
        done = wall.run(ROOT, *words, cgroup=f"user.slice/{ALICES}")
        assert done.returncode == 0, done.stderr
        assert limits_that_are_set(wall) == {ALICES: 8 << 30}


@needs_systemd
def test_uninstall_removes_exactly_that(machine: SharedMachine) -> None:
    """The folder goes with its last file, and drop-ins of others stay. A second time there is nothing to remove."""
    folder = machine.path(DROP_IN).parent
    tfgpu(machine, "wall", "install")
    dry = tfgpu(machine, "wall", "uninstall", "--dry-run")
    assert dry.stdout.startswith(f"--- {DROP_IN}\n+++ /dev/null\n")
    assert machine.path(DROP_IN).exists()
    assert tfgpu(machine, "wall", "uninstall").returncode == 0
    assert not folder.exists()
    again = tfgpu(machine, "wall", "uninstall")
    assert (again.returncode, again.stderr) == (0, "tfgpu wall uninstall: found no tfenv block for the login\n")
    other = machine.path(machine.write(f"{Path(DROP_IN).parent}/10-timeout.conf", "[Service]\nTimeoutStartSec=30\n"))
    machine.path(DROP_IN).write_text("[Service]\nNice=5\n")
    tfgpu(machine, "wall", "install")
    tfgpu(machine, "wall", "uninstall")
    assert other.exists()
    assert machine.path(DROP_IN).read_text() == "[Service]\nNice=5\n"


@needs_systemd
def test_a_block_without_an_end_is_left_as_it_is(machine: SharedMachine) -> None:
    """Neither install nor uninstall guesses where it would end. Both name the line."""
    tfgpu(machine, "wall", "install")
    path = machine.path(DROP_IN)
    path.write_text("# mine\n" + path.read_text().replace("# <<< tfenv wall <<<\n", ""))
    before = path.read_text()
    for action in ("install", "uninstall"):
        done = tfgpu(machine, "wall", action)
        assert (done.returncode, f"{DROP_IN}:2: tfenv's block has no end" in done.stderr) == (1, True), done.stderr
    assert path.read_text() == before


@needs_systemd
def test_only_root_can_install(machine: SharedMachine) -> None:
    """Anybody else is told so."""
    done = tfgpu(machine, "wall", "install", user=BOB)
    assert (done.returncode, "run this as root" in done.stderr) == (1, True), done.stderr


# ---- PAM


@needs_pam
@pytest.mark.parametrize("text", ["session required pam_unix.so\n", "session required pam_unix.so", ""])
def test_pam_gets_a_line_where_systemd_starts_no_unit(text: str, machine: SharedMachine) -> None:
    """The block comes last, after what makes the slice. Uninstall leaves the lines of others as they were."""
    mask_user_unit(machine)
    machine.path(SESSION).write_text(text)
    assert tfgpu(machine, "wall", "install").returncode == 0
    lines = read_lines(machine, SESSION)
    assert lines[:-3] == text.splitlines()
    assert lines[-2].startswith("session optional pam_exec.so quiet type=open_session /bin/sh -c [")
    assert not machine.path(DROP_IN).exists()
    tfgpu(machine, "wall", "uninstall")
    assert machine.path(SESSION).read_text() == (f"{text.rstrip()}\n" if text else ""), "others include the file"


@needs_pam
def test_a_session_of_pam_limits_the_user(shared_machine: SharedMachine, machine: SharedMachine) -> None:
    """The real libpam opens a session of alice and runs the line as root. The limit is there when it returns."""
    mask_user_unit(machine)
    with open_wall_machine(shared_machine, "dmem") as wall:
        shared_machine.policy({"tfgpu.toml": POLICY})
        machine.path(SESSION).write_text("")
        assert tfgpu(wall, "wall", "install").returncode == 0
        # PAM hands on no environment, and in it are the simulated GPUs.
        exports = "".join(
            f"export {name}={shlex.quote(text)}\n" for name, text in wall.environment.items() if name != "PYTHONPATH"
        )
        python = shared_machine.write("/srv/python", f'#!/bin/sh\n{exports}exec {PYTHON} "$@"\n', mode=0o755)
        line = machine.path(SESSION).read_text().replace(PYTHON, python)
        machine.path(SESSION).write_text(line)
        done = wall.run(ROOT, sys.executable, "-c", OPEN_SESSION, "common-session", "alice")
        assert done.stdout == "0\n", done.stderr
        assert limits_that_are_set(wall) == {ALICES: 8 << 30}


@needs_pam
def test_a_failure_keeps_nobody_out(machine: SharedMachine) -> None:
    """Without a driver nothing is set, and the session is opened all the same."""
    mask_user_unit(machine)
    machine.path(SESSION).write_text("")
    tfgpu(machine, "wall", "install")
    done = machine.run(ROOT, sys.executable, "-c", OPEN_SESSION, "common-session", "alice")
    assert done.stdout == "0\n", done.stderr


@needs_pam
def test_a_link_is_not_replaced(machine: SharedMachine) -> None:
    """Where another program writes PAM's files, as authselect does, that program has to add the line."""
    mask_user_unit(machine)
    machine.path(SESSION).unlink(missing_ok=True)
    machine.path(SESSION).symlink_to("/etc/authselect/session")
    done = tfgpu(machine, "wall", "install")
    assert (done.returncode, f"{SESSION} is a link" in done.stderr) == (1, True), done.stderr
    assert machine.path(SESSION).is_symlink()


def read_lines(machine: SharedMachine, path: str) -> list[str]:
    """Return the lines of a file of the machine."""
    return machine.path(path).read_text().splitlines()


def limits_that_are_set(wall: WallMachine) -> dict[str, int]:
    """Return the limits in bytes, by the name of the cgroup."""
    rows = wall.read_json("wall", "show")["limits"]
    return {row["cgroup"].rpartition("/")[2]: row["limit_bytes"] for row in rows if row["limit_bytes"] is not None}
