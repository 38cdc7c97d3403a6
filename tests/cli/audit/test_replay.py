"""`tfgpu audit replay`, as it is typed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.audit.test_observed_totals import encode
from tests.cli.conftest import Tfgpu, run_on_terminal

STUDENTS = '[group.students.ceiling]\nmemory_limit = "4GiB"\n'
EXCEPTION = '[user.alice]\nexpires = 2027-01-31\n[user.alice.ceiling]\nmemory_limit = "8GiB"\n'


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Write records of alice, a student, and of bob, who is none."""
    path = tmp_path / "log"
    path.write_bytes(encode(1, groups=["students"]) + encode(2, groups=["students"]) + encode(3, "bob", groups=[]))
    return path


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """Write a policy of a limit for students."""
    path = tmp_path / "tfgpu.toml"
    path.write_text(STUDENTS)
    return path


def test_who_would_have_got_less_is_shown_with_an_example(tfgpu: Tfgpu, log: Path, policy: Path) -> None:
    """Counts, a row for each user and GPU, and the newest program with the place of the key that decides."""
    run = tfgpu("audit", "replay", "--policy", policy, "--file", log)
    assert (run.returncode, run.stderr) == (1, "")
    place = f"{policy}:2:1"
    assert [" ".join(line.split()) for line in run.stdout.splitlines()] == [
        f"3 programs of 2 people through {policy}:",
        "2 would have got less, 0 more, 0 no GPU. 0 unknown.",
        "",
        "user GPU programs outcome had would have held by",
        f"alice GPU-a 2 less 8.0 GiB 4.0 GiB {place}",
        "",
        "The newest of them:",
        f"alice, train.py (pid 2 on node1), 2026-11-05 09:00 UTC: 4.0 GiB instead of 8.0 GiB ({place})",
    ]


def test_an_exception_holds_until_its_day(tfgpu: Tfgpu, log: Path, policy: Path) -> None:
    """Exit code 0 if nobody would have got less. `--today` chooses the day."""
    policy.write_text(STUDENTS + EXCEPTION)
    arguments: list[str | Path] = ["audit", "replay", "--policy", policy, "--file", log, "--today"]
    before, later = (tfgpu(*arguments, day) for day in ("2027-01-30", "2027-01-31"))
    assert (before.returncode, "alice" in before.stdout) == (0, False)
    assert (later.returncode, "alice" in later.stdout, "bob" in later.stdout) == (1, True, False)


def test_observed_tables_are_tried_if_asked(tfgpu: Tfgpu, log: Path, policy: Path) -> None:
    """With `--observed` they count as if they were in force."""
    policy.write_text(f"[observe.{STUDENTS[1:]}")
    arguments: list[str | Path] = ["audit", "replay", "--policy", policy, "--file", log]
    assert tfgpu(*arguments).returncode == 0
    assert tfgpu(*arguments, "--observed").returncode == 1


def test_filters_choose_the_records(tfgpu: Tfgpu, log: Path, policy: Path) -> None:
    """`--user`, `--since` and the others of `tfgpu audit`, before the name of the report and behind it."""
    arguments: list[str | Path] = ["replay", "--policy", policy, "--file", log]
    assert tfgpu("audit", *arguments, "--user", "bob").returncode == 0
    assert tfgpu("audit", "--since", "2026-11-06", *arguments).stdout == ""
    assert tfgpu("audit", *arguments, "--gpu", "GPU-a", "--user", "alice").returncode == 1


def test_json_has_counts_and_rows(tfgpu: Tfgpu, log: Path, policy: Path) -> None:
    """One value with all of it. Sizes are in bytes."""
    result = json.loads(tfgpu("audit", "replay", "--policy", policy, "--format", "json", "--file", log).stdout)
    (row,) = result.pop("rows")
    assert result == {"programs": 3, "users": 2, "less": 2, "more": 0, "nothing": 0, "unknown": 0, "gaps": {}}
    assert (row["user"], row["outcome"], row["had_bytes"], row["would_have_bytes"]) == (
        "alice",
        "less",
        8 << 30,
        4 << 30,
    )
    assert (row["held_by"], row["example"]["pid"]) == ([f"{policy}:2:1"], 2)


def test_what_the_log_does_not_hold_is_counted(tfgpu: Tfgpu, log: Path, policy: Path) -> None:
    """It is said beside the answer, and changes no exit code."""
    policy.write_text('[ceiling]\nmemory_limit = "90%"\n')
    run = tfgpu("audit", "replay", "--policy", policy, "--file", log)
    assert (run.returncode, "3 unknown." in run.stdout) == (0, True)
    assert "  3 programs: the memory of their GPUs is not in the log" in run.stdout


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('[ceiling]\nmemory_limit = "8"\n', "tfgpu.toml:2:1"),
        ("[ceiling\n", "tfgpu.toml:1"),
    ],
)
def test_a_policy_with_errors_is_not_tried(tfgpu: Tfgpu, log: Path, policy: Path, text: str, shown: str) -> None:
    """They are shown as `tfgpu check` does, with their places. Exit code 2."""
    policy.write_text(text)
    run = tfgpu("audit", "replay", "--policy", policy, "--file", log)
    assert run.returncode == 2
    assert shown in run.stdout + run.stderr


def test_a_key_that_is_none_is_shown(tfgpu: Tfgpu, log: Path, policy: Path) -> None:
    """A warning is shown as `tfgpu check` does, and the rest is tried."""
    policy.write_text(f"{STUDENTS}memory = 1\n")
    run = tfgpu("audit", "replay", "--policy", policy, "--file", log)
    assert (run.returncode, "unknown-key" in run.stdout.splitlines()[0]) == (1, True)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--policy", "nowhere"],
        ["--policy", "tfgpu.toml", "--today", "soon"],
        ["--policy", "/proc/self/fd"],
        ["--policy", "/dev/null/x"],
    ],
    ids=str,
)
def test_wrong_usage(tfgpu: Tfgpu, log: Path, options: list[str]) -> None:
    """Without a policy, or with one that does not exist, or a day that is none: exit code 2, and a sentence."""
    run = tfgpu("audit", "replay", "--file", log, *options)
    assert (run.returncode, run.stdout) == (2, "")
    assert "Traceback" not in run.stderr


def test_unreadable_lines_make_the_exit_code_one(tfgpu: Tfgpu, log: Path, policy: Path) -> None:
    """What cannot be read might be somebody who would have got less."""
    log.write_bytes(encode(3, "bob", groups=[]) + b"junk\n")
    run = tfgpu("audit", "replay", "--policy", policy, "--file", log)
    assert (run.returncode, "1 line is not an audit record" in run.stderr) == (1, True)


def test_it_fits_on_eighty_characters(tmp_path: Path, log: Path, policy: Path, variables: dict[str, str]) -> None:
    """In a narrow terminal each row is one line."""
    name = "a-user-with-a-very-long-name"
    log.write_bytes(encode(1, name, "GPU-8932f937-d72c-4106-82a7-75cbd5edc5a3", groups=["students"]))
    arguments = ["audit", "replay", "--policy", str(policy), "--file", str(log)]
    shown, code = run_on_terminal(arguments, variables | {"COLUMNS": "80"}, tmp_path)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert code == 1
    assert [line.split()[1] for line in lines if line.startswith("a-user") and "less" in line] == ["GPU-8932f937"]
    assert all(len(line) <= 80 for line in lines if "programs" in line and "outcome" in line)
