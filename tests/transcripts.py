"""Runs a page's commands in one shell, in order, and compares what they print with what the page shows.

`python -m tests.transcripts` writes what they print into the page, where more than times has changed.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.pages import ROOT, Block, blocks, file_name
from tfenv.deploy.launch import build_environment

QUICKSTART = ROOT / "docs" / "quickstart.md"
#: Nothing below this heading is run: it is about the reader's own GPUs.
LAST = "On your own GPUs"
#: What a reader does once to install tfenv.
INSTALL = ("cd tfenv", "python3 -m venv ", "source ", "pip install ")

#: Who the reader is on the page. The page was written by root, whose name is as long.
READER = "anna"

#: The width of the reader's terminal: what a code block of the site holds.
COLUMNS = 90

_MARK = "\x1e"
_PROMPT = "$ "


@dataclass(frozen=True)
class Step:
    """A command line of the page, or a file that the reader writes.

    Attributes:
        line: What is typed; "" for a file.
        shown: What the page shows below the command, or the text of the file.
        file: The name of the file; "" for a command.
    """

    line: str
    shown: str
    file: str = ""


def read_steps(page: Path = QUICKSTART, last: str = LAST) -> list[Step]:
    """Return the page's commands and the files that it shows, in order, up to the heading `last`."""
    shown = blocks("console", "toml", pages=[page])
    end = next((number for number, block in enumerate(shown) if block.section == last), len(shown))
    return [step for block in shown[:end] for step in _read_block(block)]


def _read_block(block: Block) -> list[Step]:
    if block.language == "toml":
        return [Step("", block.text, file_name(block))]
    _, *typed = re.split(rf"^{re.escape(_PROMPT)}", block.text, flags=re.MULTILINE)
    return [Step(line, shown) for line, _, shown in (text.partition("\n") for text in typed)]


def run_steps(steps: Sequence[Step], home: Path, env: Mapping[str, str], cwd: Path) -> list[str]:
    """Run the steps in one shell on a terminal, and return what each prints. The home directory is `home`.

    Raises:
        AssertionError: A command failed.
    """
    script = home / "steps.sh"
    script.write_text("".join(map(_write_shell, steps)), encoding="utf-8")
    places = {"HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config"), "XDG_STATE_HOME": str(home / ".state")}
    printed = _run_on_terminal(script, {**env, **places, "NO_COLOR": "1", "TERM": "xterm"}, cwd)
    ends = re.findall(rf"(.*?){_MARK}(\d+)\n", printed, re.DOTALL)
    failed = [(step, output) for step, (output, code) in zip(steps, ends, strict=False) if code != "0"]
    assert failed == [], printed
    assert len(ends) == len(steps), printed
    return [name_reader(output.replace(str(home), f"/home/{READER}")) for output, _ in ends]


def _run_on_terminal(script: Path, env: Mapping[str, str], cwd: Path) -> str:
    """Return all that a shell script prints on a terminal: tables are made to fit it, and lines are in order."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    command = ["bash", "--noprofile", "--norc", str(script)]
    with subprocess.Popen(
        command, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ):
        os.close(theirs)
        printed = b"".join(iter(lambda: _read(ours), b""))
    os.close(ours)
    return printed.decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # EIO: nobody has the other end any more
        return b""


def name_reader(text: str) -> str:
    """Return the text with the reader of the page in the place of who runs this."""
    text = re.sub(rf"\b{re.escape(getpass.getuser())}\b", READER, text)
    return re.sub(r"^(Groups:).*", rf"\1 {READER}", text, flags=re.MULTILINE)


def _write_shell(step: Step) -> str:
    command = f"cat > {step.file} <<'END'\n{step.shown}END" if step.file else step.line
    return f"{command}\nprintf '{_MARK}%d\\n' $?\n"


def normalise(text: str) -> str:
    """Return the text without what differs from run to run: times, the reader's name, widths of columns."""
    text = name_reader(text)
    text = re.sub(r"\b(?:(?:\d{4}-)?\d\d-\d\d +)?\d\d:\d\d:\d\d\b", "12:00", text)
    return re.sub(r" +$", "", re.sub(r" {2,}", "  ", text), flags=re.MULTILINE)


def make_environment() -> dict[str, str]:
    """Return the environment of a reader in whose environment tfenv is installed: the one that runs this."""
    disturbing = ("TFGPU_", "CUDA_", "TF_", "PYTHON", "COLUMNS")
    base = {name: value for name, value in os.environ.items() if not name.startswith(disturbing)}
    path = os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", os.defpath)])
    return build_environment({**base, "PATH": path, "PYTHONPATH": str(ROOT)})


def write_page(page: Path, steps: Sequence[Step], outputs: Sequence[str]) -> None:
    """Put what the commands print below them, where it differs from what the page shows."""
    text = page.read_text(encoding="utf-8")
    place = 0
    for step, output in zip(steps, outputs, strict=True):
        place = text.index(_PROMPT + step.line + "\n", place) + len(_PROMPT + step.line) + 1
        if normalise(step.shown) != normalise(output):
            text = text[:place] + output + text[place + len(step.shown) :]
            place += len(output)
    page.write_text(text, encoding="utf-8")


def main() -> None:
    import tempfile

    steps = [step for step in read_steps() if not step.line.startswith(INSTALL)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = run_steps(steps, Path(folder), make_environment(), ROOT)
    typed = [(step, output) for step, output in zip(steps, outputs, strict=True) if step.line]
    write_page(QUICKSTART, [step for step, _ in typed], [output for _, output in typed])


if __name__ == "__main__":
    main()
