"""Commands that somebody runs in a directory whose files are a stranger's: none of them is executed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.environments import clean_environment

NAMES = ("json", "grp", "hashlib", "tomli", "structlog", "tensorflow", "tfenv", "sitecustomize", "subprocess", "rich")
COMMANDS = (["doctor", "--no-tensorflow"], ["check"], ["explain"], ["gpus"], ["ps"], ["audit", "summary"], ["doctor"])
WAYS = {
    "tfgpu": [str(Path(sys.executable).with_name("tfgpu"))],
    "python -m": [sys.executable, "-m", "tfenv"],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_file_of_the_current_directory_is_executed(tmp_path: Path, way: str, command: list[str]) -> None:
    """Neither the command nor a child that it starts imports what lies there."""
    names = NAMES if way == "tfgpu" else [name for name in NAMES if name != "tfenv"]  # `-m tfenv` asks for that one
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\n")
    done = subprocess.run(
        [*WAYS[way], *command], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=False
    )
    ran = tmp_path / "ran"
    assert not ran.exists(), (ran.read_text(), done.stderr)
    assert "Traceback" not in done.stderr
