"""`tfgpu audit report`: where the page goes, and what is said if it cannot be made."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.audit.report.records import Run, write_log

pytest.importorskip("msgspec", reason="of the extra report")
pytest.importorskip("vl_convert", reason="of the extra report")


def run_report(*arguments: str | Path, missing: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command. A package named by `missing` is as if it were not installed."""
    code = f"import sys; sys.modules.update({{{missing!r}: None}} if {missing!r} else {{}})\n"
    code += "from tfenv.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "audit", "report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(name="log")
def fixture_log(tmp_path: Path) -> Path:
    """A log of two users."""
    return write_log(tmp_path / "audit.jsonl", [*Run().make_records(), *Run(user="bob", ticks=2).make_records()])


def test_the_page_replaces_the_old_one(log: Path, tmp_path: Path) -> None:
    """A file that exists is replaced in one step, and nothing is left beside it."""
    target = tmp_path / "report.html"
    target.write_text("old")
    before = target.stat().st_ino
    done = run_report("--html", target, "--file", log, "--user", "bob")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    text = target.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "bob" in text
    assert "alice" not in text.replace("/home/alice/train.py", "")
    assert target.stat().st_ino != before
    assert sorted(os.listdir(tmp_path)) == ["audit.jsonl", "report.html"]
    assert stat.S_IMODE(target.stat().st_mode) & 0o077 == 0o077 & ~current_umask() & 0o666


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_dash_is_standard_output(log: Path) -> None:
    """With - the page is printed, and nothing else."""
    done = run_report("--html", "-", "--file", log, "--since", "2025-01-01")
    assert done.returncode == 0
    assert done.stdout.startswith("<!DOCTYPE html>")
    assert done.stdout.endswith("</html>\n")
    assert "since 2025-01-0" in done.stdout or "since 2024-12-31" in done.stdout


def test_a_page_that_cannot_be_written(log: Path, tmp_path: Path) -> None:
    """One line says which file cannot be written, and why."""
    target = tmp_path / "missing" / "report.html"
    done = run_report("--html", target, "--file", log)
    assert done.returncode == 2
    assert done.stderr == f"tfgpu audit report: cannot write {target}: No such file or directory\n"


def test_lines_that_are_no_records(log: Path, tmp_path: Path) -> None:
    """The page is made, the exit code is 1, and the page says so."""
    log.write_text(f"{log.read_text()}nonsense\n")
    done = run_report("--html", tmp_path / "report.html", "--file", log)
    assert done.returncode == 1
    assert "1 line is not audit records" not in done.stderr
    assert "audit record" in done.stderr


@pytest.mark.parametrize("missing", ["vl_convert", "msgspec"])
def test_without_the_extra(log: Path, tmp_path: Path, missing: str) -> None:
    """Without the packages of the extra one line says what to install."""
    done = run_report("--html", tmp_path / "report.html", "--file", log, missing=missing)
    assert done.returncode == 2
    assert done.stderr == (
        'tfgpu audit report: the report needs packages that are not installed; run: pip install "tfenv[report]"\n'
    )
