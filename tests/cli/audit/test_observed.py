"""`tfgpu audit summary --observed`, as it is typed."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.audit.test_observed_totals import encode
from tests.cli.conftest import Tfgpu, run_on_terminal


def test_a_sentence_and_a_table(tfgpu: Tfgpu, tmp_path: Path) -> None:
    """First how many programs of how many people, then each user, key and GPU."""
    log = tmp_path / "log"
    log.write_bytes(encode(1) + encode(2) + encode(3, "bob", has=12) + encode(4, "carol", would_have=8))
    run = tfgpu("audit", "summary", "--observed", "--file", log)
    assert (run.returncode, run.stderr) == (0, "")
    sentence, _, head, alice, bob = run.stdout.splitlines()
    assert sentence == "3 programs of 2 people would have got less."
    assert head.split() == ["user", "key", "GPU", "programs", "has", "would", "have", "held", "by", "last", "(UTC)"]
    held_by = "/etc/tfgpu/tfgpu.toml (observe.ceiling.memory_limit)"
    assert " ".join(alice.split()) == f"alice memory_limit GPU-a 2 8.0 GiB 4.0 GiB {held_by} 2026-11-05 09:00:02"
    assert bob.split()[:5] == ["bob", "memory_limit", "GPU-a", "1", "12.0"]


def test_one_program_is_said_so_and_none_as_well(tfgpu: Tfgpu, tmp_path: Path) -> None:
    """The sentence is right for one program. Without any there is a sentence too, and no table."""
    log = tmp_path / "log"
    log.write_bytes(encode(1) + encode(2, "carol", would_have=8))
    shown = tfgpu("audit", "summary", "--observed", "--file", log).stdout
    assert shown.startswith("1 program of 1 person would have got less.\n")
    run = tfgpu("audit", "summary", "--observed", "--user", "carol", "--file", log)
    assert (run.returncode, run.stdout.count("\n")) == (0, 1)
    assert run.stdout.startswith("No program would have got less")


def test_json_has_a_line_for_each_row(tfgpu: Tfgpu, tmp_path: Path) -> None:
    """Sizes are in bytes, and processes their number."""
    log = tmp_path / "log"
    log.write_bytes(encode(1) + encode(2))
    run = tfgpu("audit", "summary", "--observed", "--format", "json", "--file", log)
    (row,) = map(json.loads, run.stdout.splitlines())
    assert (row["processes"], row["has_bytes"], row["would_have_bytes"]) == (2, 8 << 30, 4 << 30)


def test_it_fits_on_eighty_characters(tmp_path: Path, variables: dict[str, str]) -> None:
    """In a narrow terminal each row is one line."""
    log = tmp_path / "log"
    log.write_bytes(encode(1, "a-user-with-a-long-name", "GPU-8932f937-d72c-4106-82a7-75cbd5edc5a3"))
    arguments = ["audit", "summary", "--observed", "--file", str(log)]
    shown, code = run_on_terminal(arguments, variables | {"COLUMNS": "80"}, tmp_path)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert (code, len(lines)) == (0, 4), shown
    assert all(len(line) <= 80 for line in lines)
