"""`tfgpu completion`: the real shells complete commands, options, values and files."""

from __future__ import annotations

import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Tfgpu
from tfenv.cli.main import COMMANDS

#: What is typed before Tab, and what stands there then.
TYPED = {
    "tfgpu expl": "tfgpu explain ",
    "tfgpu check --form": "tfgpu check --format ",
    "tfgpu check --format js": "tfgpu check --format json ",
    "tfgpu check tfgp": "tfgpu check tfgpu.toml ",
    "tfgpu explain --project pla": "tfgpu explain --project plans/",
    "tfgpu run --memory": "tfgpu run --memory-limit ",
    "tfgpu run -- python tra": "tfgpu run -- python train.py ",
    "tfgpu audit summ": "tfgpu audit summary ",
    "tfgpu audit summary --outc": "tfgpu audit summary --outcome ",
    "tfgpu completion fi": "tfgpu completion fish ",
}
#: Ctrl-X Ctrl-B writes the line that is being edited into a file, and empties it.
BASH = """
PS1= PS2=
show() { printf '%s' "$READLINE_LINE" >shown.new; mv shown.new shown; READLINE_LINE=; }
bind -x '"\\C-x\\C-b": show'
source ./script
"""
ZSH = """
PS1= PS2=
autoload -Uz compinit && compinit -u -D
show() { printf '%s' "$BUFFER" >shown.new; mv shown.new shown; BUFFER= }
zle -N show && bindkey '^X^B' show
eval "$(cat script)"
"""
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], BASH),
    "zsh": (["zsh", "-f", "-i"], ZSH),
}


@pytest.fixture
def script(tfgpu: Tfgpu, project: Path) -> Callable[[str], None]:
    """Return what writes a shell's script into the project, and write some files to complete."""
    for name in ("tfgpu.toml", "train.py", "platform.txt"):
        (project / name).touch()
    (project / "plans").mkdir()

    def write(shell: str) -> None:
        if shutil.which(shell) is None:
            pytest.skip(f"{shell} is not installed")
        result = tfgpu("completion", shell)
        assert (result.returncode, result.stderr) == (0, "")
        (project / "script").write_text(result.stdout)

    return write


class InteractiveShell:
    """An interactive shell on a terminal of its own."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.folder = folder
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe(command[0], command, {"PATH": os.environ["PATH"], "TERM": "vt100", "HOME": str(folder)})
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        try:
            while os.read(self.terminal, 4096):
                pass
        except OSError:  # the shell is gone
            return

    def type_text(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def read_line(self, text: str) -> str:
        """Type a text, and return what the line is then."""
        self.type_text(f"{text}\x18\x02")
        file = self.folder / "shown"
        end = time.monotonic() + 30
        while not file.exists():
            assert time.monotonic() < end, f"the shell shows nothing after {text!r}"
            time.sleep(0.01)
        line = file.read_text()
        file.unlink()
        return line

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.terminal)


@pytest.mark.parametrize("shell", SHELLS)
def test_tab_completes(shell: str, script: Callable[[str], None], project: Path) -> None:
    """In an interactive bash and zsh, Tab completes commands, options, their values, files and directories."""
    script(shell)
    command, start = SHELLS[shell]
    (project / "start").write_text(start)
    session = InteractiveShell(command, project)
    try:
        session.type_text("source ./start\n")
        assert session.read_line("ready") == "ready"
        assert {text: session.read_line(f"{text}\t") for text in TYPED} == TYPED
    finally:
        session.close()


def test_fish_completes(script: Callable[[str], None], project: Path) -> None:
    """fish, asked for its completions of a line, names commands, options, their values, files and directories."""
    script("fish")
    asked = "; ".join(f"echo (complete -C {shlex.quote(text)} | string split -f1 \\t)" for text in TYPED)
    command = ["fish", "--no-config", "-c", f"source script; {asked}"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(project)}
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [line.strip().rpartition(" ")[2] for line in TYPED.values()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_is_in_the_script(tfgpu: Tfgpu, shell: str) -> None:
    """The script of each shell knows every command there is."""
    assert set(COMMANDS) <= set(re.findall(r"[a-z]+", tfgpu("completion", shell).stdout))


def test_another_shell_is_wrong_usage(tfgpu: Tfgpu) -> None:
    """A shell that is not supported is refused with the names of those that are."""
    result = tfgpu("completion", "csh")
    assert (result.returncode, result.stdout) == (2, "")
    assert "bash" in result.stderr
    assert "fish" in result.stderr
