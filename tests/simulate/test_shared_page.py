"""The section "A shared machine" of the page of simulated GPUs: root, alice and bob type its commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.pages import ROOT as REPOSITORY
from tests.pages import blocks, file_name
from tests.shared_machine import ROOT, SharedMachine, shared_machine

__all__ = ["shared_machine"]

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(600)]

PAGE = REPOSITORY / "docs" / "simulate.md"
SECTION = [block for block in blocks(pages=[PAGE]) if block.section == "A shared machine"]
#: Where the reader is.
HERE = "/srv/anna"
#: Leaves alice and bob to the page, and has the environment of these tests at /opt/tfenv. Root needs no sudo.
PREPARE = f"""
set -e
userdel --remove alice
userdel --remove bob
mount -t tmpfs -o mode=755 tmpfs /opt
ln -s {sys.prefix} /opt/tfenv
mkdir /srv/bin
ln -s /usr/bin/env /srv/bin/sudo
ln -s {sys.prefix}/bin/tfgpu /srv/bin/tfgpu
"""


class Terminal:
    """A shell of root's on the machine, into which commands are typed."""

    def __init__(self, machine: SharedMachine, output: Path) -> None:
        self.output = output
        self.read_until = 0
        enter = ["nsenter", f"--mount=/proc/{machine.process.pid}/ns/mnt", "env", "-C", HERE, "bash"]
        env = {"PATH": f"/srv/bin:{os.environ['PATH']}", "HOME": "/root"}
        with output.open("wb") as file:
            self.shell = subprocess.Popen(
                enter, stdin=subprocess.PIPE, stdout=file, stderr=file, env=env, start_new_session=True
            )

    def type(self, line: str) -> None:
        assert self.shell.stdin is not None
        self.read_until = len(self.read())
        self.shell.stdin.write(f"{line}\n".encode())
        self.shell.stdin.flush()

    def read(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def wait_for(self, rows: Sequence[str]) -> None:
        """Wait until these rows were printed in this order since the last command was typed."""
        expected = [normalise(row) for row in rows]
        deadline = time.monotonic() + 120
        while True:
            printed = iter([normalise(row) for row in self.read()[self.read_until :].splitlines()])
            if all(row in printed for row in expected):
                return
            assert time.monotonic() < deadline, f"{rows}\n{self.read()}"
            time.sleep(0.1)

    def close(self) -> None:
        """End the shell. Programs are left in it only after a failure."""
        self.shell.communicate(timeout=60)
        with suppress(ProcessLookupError):
            os.killpg(self.shell.pid, signal.SIGKILL)


def normalise(row: str) -> str:
    """Return a row without what differs from run to run: process ids and widths of columns."""
    row = re.sub(r"\b\d+(?= +\d+\.\d MiB)|(?<=--target )\d+", "PID", row)
    return re.sub(" +", " ", row)


def get_texts(language: str) -> list[str]:
    return [block.text for block in SECTION if block.language == language]


def get_steps() -> list[tuple[str, list[str]]]:
    """Return the command lines at prompts, each with the rows that the page shows below it."""
    typed = re.split(r"^(?:root@laptop)?\$ ", "".join(get_texts("console")), flags=re.MULTILINE)[1:]
    steps = [(line, shown.splitlines()) for line, _, shown in (text.partition("\n") for text in typed)]
    return [(line, [row for row in rows if row != "…"]) for line, rows in steps]


def write_files(machine: SharedMachine) -> list[str]:
    """Write the draft, the program and the script of the page. Return the commands before them."""
    for block in SECTION:
        if block.language == "toml":
            machine.write(f"{HERE}/etc-tfgpu/{file_name(block).removeprefix('/etc/tfgpu/')}", block.text)
    (program,), (users, script) = get_texts("python"), get_texts("bash")
    machine.write("/srv/train.py", program)
    machine.write(f"{HERE}/lab.sh", script)
    return users.splitlines()


@pytest.fixture
def terminals(shared_machine: SharedMachine, tmp_path: Path) -> Iterator[tuple[Terminal, Terminal]]:
    """Yield two terminals of a laptop that has not seen tfenv's files nor alice and bob."""
    prepared = shared_machine.run(ROOT, "sh", "-c", PREPARE)
    assert prepared.returncode == 0, prepared.stderr
    shared_machine.folder(HERE)
    with ExitStack() as stack:
        opened = Terminal(shared_machine, tmp_path / "first"), Terminal(shared_machine, tmp_path / "second")
        for terminal in opened:
            stack.callback(terminal.close)
        yield opened


def test_two_users_share_a_simulated_machine(
    shared_machine: SharedMachine, terminals: tuple[Terminal, Terminal]
) -> None:
    """Who types the commands sees what the page shows: bob gets another card than alice, under root's draft."""
    current, second = terminals
    first = current
    for line in write_files(shared_machine):
        first.type(line)
    pid = ""
    for line, shown in get_steps():
        if line.startswith("sudo nsenter"):
            current = second
        elif line.startswith("jobs"):
            current = first
        current.type(re.sub(r"(?<=--target )\d+", pid, line))
        current.wait_for(shown)
        pid = pid or re.findall(r"--target (\d+)", first.read())[0]
    first.close()
    for user, gpu in (("alice", "GPU-a0fa4e00"), ("bob", "GPU-a1fa4e00")):
        assert re.search(rf"{user} +\d+ +applied +{gpu} ", first.read()), first.read()
    assert "asked for by everybody since the command started" in first.read()
    assert not shared_machine.path("/srv/lab").exists()
    for folder in ("/etc/tfgpu", "/var/log/tfgpu", "/var/lib/tfgpu"):
        assert os.listdir(shared_machine.path(folder)) == [], "the machine's own files stay as they were"
