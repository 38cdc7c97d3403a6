"""`tfgpu watch` as a process of its own: what it prints, writes down and runs, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.machine import ME, Machine
from tfenv import machine_date
from tfenv.cli.commands import watch
from tfenv.config.document import Trust
from tfenv.watch.change import compare_states, read_state

Watching = Callable[..., Any]
PREFIX = ["unshare", "--user", "--map-root-user"]
pytestmark = pytest.mark.timeout(60)  # a line that never comes is waited for
ONCE = "Running processes keep their limits. A change applies to those that start later."


def limit(size: object) -> str:
    return f'[gpu]\nmemory_limit = "{size}"\n'


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Name the user's log, in the test's own folder."""
    path = tmp_path / "log.jsonl"
    user = tmp_path / "config" / "tfgpu" / "tfgpu.toml"
    user.parent.mkdir(parents=True)
    user.write_text(f'[audit]\nfile = "{path}"\n')
    return path


@pytest.fixture
def start_watch(project: Path, variables: dict[str, str], log: Path) -> Watching:
    """Return what starts `tfgpu watch`, and waits until it watches. Its first lines are in `child.first`."""

    @contextmanager
    def start(*arguments: str, before: str | None = None) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "tfenv", "watch", *arguments]
        if before is not None:
            command = [*PREFIX, "sh", "-c", f'{before} && exec "$@"', "sh", *command]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=project, env=variables, stdout=pipe, stderr=pipe, text=True) as child:
            try:
                stream = child.stderr if "json" in arguments else child.stdout
                child.first = list(read_until(stream, ONCE))  # type: ignore[attr-defined]
                yield child
            finally:
                child.kill()

    return start


def read_until(stream: Any, text: str) -> Iterator[str]:
    """Yield the lines up to the one with the text."""
    for line in stream:
        yield line.rstrip("\n")
        if text in line:
            return
    pytest.fail(f'no "{text}" came')


def read_changes(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_a_change_is_told_for_people(start_watch: Watching, project: Path, log: Path) -> None:
    """A change shows files, values with their origins, and what holds now. A hint on running processes comes once."""
    (project / "tfgpu.toml").write_text(limit("8GiB"))
    with start_watch() as child:
        assert (
            [line for line in child.first if "tfgpu.toml" in line][-1].strip().startswith("now: all GPUs, at most 8.0")
        )
        (project / "tfgpu.toml").write_text(limit("16GiB"))
        lines = list(read_until(child.stdout, "  now: "))
        assert lines[-3].endswith("tfgpu.toml changed")
        assert lines[-2] == '  gpu.memory_limit: "8GiB" (tfgpu.toml:2) -> "16GiB" (tfgpu.toml:2)'
        assert lines[-1].startswith("  now: all GPUs, at most 16.0 GiB each (")
        (project / "tfgpu.toml").write_text(limit("16GiB") + "# a word\n")
        lines = list(read_until(child.stdout, "did not change"))
        assert len(lines) == 3
        assert ONCE not in "".join(lines)
    assert [record["changes"][0]["new"] for record in read_changes(log)] == ["16GiB"]


def test_a_mistake_is_told_with_what_stays_in_force(start_watch: Watching, project: Path, log: Path) -> None:
    """A bad key costs itself, a file that does not parse all of it. Both are told as a new process gets them."""
    (project / "tfgpu.toml").write_text("[gpu]\nmemory_growth = true\n")
    with start_watch() as child:
        (project / "tfgpu.toml").write_text("[gpu]\nmemory_growth = true\nmemory_limit = 8\n")
        lines = list(read_until(child.stdout, "now, without"))
        assert "tfgpu.toml:3:1: gpu.memory_limit: " in lines[-2]
        assert lines[-1].startswith("  now, without the wrong values: all GPUs, growth on (")
        (project / "tfgpu.toml").write_text("[gpu]\nmemory_growth = tru\n")
        lines = list(read_until(child.stdout, "now, without"))
        assert "[error syntax]" in lines[-3]
        assert lines[-2] == "  gpu.memory_growth: true (tfgpu.toml:2) -> not set"
        assert lines[-1].startswith("  now, without tfgpu.toml: no GPU settings apply")
    assert [(record["level"], record["findings"][0]["code"]) for record in read_changes(log)] == [
        ("error", "invalid-value"),
        ("error", "syntax"),
    ]


def test_json_is_one_line_a_change(start_watch: Watching, project: Path) -> None:
    """--format json prints a line a change and nothing else on stdout. What a program would get is in it."""
    with start_watch("--format", "json") as child:
        (project / "tfgpu.toml").write_text(limit("8 gigs"))
        bad = json.loads(child.stdout.readline())
        (project / "tfgpu.toml").write_text(limit("8GiB"))
        good = json.loads(child.stdout.readline())
        child.send_signal(signal.SIGTERM)
        rest, errors = child.communicate(timeout=60)
    assert (bad["valid"], bad["changes"], bad["findings"][0]["line"]) == (False, [], 2)
    assert good["files"] == [{"path": str(project / "tfgpu.toml"), "what": "changed"}]
    assert good["changes"][0]["new_origin"] == f"{project / 'tfgpu.toml'}:2"
    assert (good["valid"], good["plan"]["limit_bytes"]) == (True, 8 << 30)
    assert (child.returncode, rest, errors) == (0, "", "")


def test_exec_runs_on_valid_changes_alone(start_watch: Watching, project: Path, tmp_path: Path) -> None:
    """--exec gets the change on stdin and its files in a variable, not for a mistake. Its failure is only reported."""
    script = tmp_path / "reload"
    script.write_text(
        f'#!/bin/sh\necho "to stdout"\nread -r line\necho "$TFGPU_CHANGED_FILES" "$line" >>{tmp_path}/ran\nexit 4\n'
    )
    script.chmod(0o755)
    with start_watch("--format", "json", "--exec", str(script)) as child:
        for text in (limit("1GiB"), limit("1 gig"), limit("1 gig") + "# the same\n", limit("2GiB")):
            (project / "tfgpu.toml").write_text(text)
            json.loads(child.stdout.readline())
            if "GiB" in text:
                assert list(read_until(child.stderr, "exited with"))[-1] == f"tfgpu watch: {script} exited with 4"
        child.send_signal(signal.SIGTERM)
        rest, _ = child.communicate(timeout=60)
    assert (child.returncode, rest) == (0, "")
    ran = [line.partition(" ") for line in (tmp_path / "ran").read_text().splitlines()]
    assert [path for path, _, _ in ran] == [str(project / "tfgpu.toml")] * 2
    assert [json.loads(line)["changes"][0]["new"] for _, _, line in ran] == ["1GiB", "2GiB"]


def test_a_command_that_is_not_there(start_watch: Watching, project: Path) -> None:
    """--exec of what cannot be run is said at each change, and watching goes on."""
    with start_watch("--exec", "/nowhere/reload now") as child:
        for size in (1, 2):
            (project / "tfgpu.toml").write_text(limit(f"{size}GiB"))
            line = child.stderr.readline()
            assert line == 'tfgpu watch: cannot run "/nowhere/reload": No such file or directory\n'


def test_sigterm_ends_the_command_too(start_watch: Watching, project: Path, tmp_path: Path) -> None:
    """A service manager that ends the watch ends what --exec runs, and gets a clean exit."""
    script = tmp_path / "long"
    script.write_text("#!/bin/sh\necho started\nexec sleep 100\n")
    script.chmod(0o755)
    with start_watch("--exec", str(script)) as child:
        (project / "tfgpu.toml").write_text(limit("1GiB"))
        list(read_until(child.stdout, "started"))
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, f"tfgpu watch: {script} was stopped by signal 15\n")


def test_ctrl_c_ends_quietly(start_watch: Watching) -> None:
    """SIGINT ends the watch with 130 and without a word."""
    with start_watch() as child:
        child.send_signal(signal.SIGINT)
        rest, errors = child.communicate(timeout=60)
    assert (child.returncode, rest, errors) == (130, "", "")


@pytest.mark.parametrize("limited", ["instances", "watches"])
def test_inotify_exhausted(start_watch: Watching, project: Path, limited: str) -> None:
    """Without inotify the files are looked at regularly: one line says so, and changes are told as ever."""
    file = f"/proc/sys/user/max_inotify_{limited}"
    lower = f"echo {0 if limited == 'instances' else 2} >{file}"
    if subprocess.run([*PREFIX, "sh", "-c", lower], capture_output=True, check=False).returncode:
        pytest.skip("no user namespace can be made here, or inotify cannot be limited in it")
    with start_watch("--format", "json", before=lower) as child:
        notices = [line for line in child.first if "inotify" in line]
        for size in (1, 2):
            (project / "tfgpu.toml").write_text(limit(f"{size}GiB"))
            assert json.loads(child.stdout.readline())["plan"]["limit_bytes"] == size << 30
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=60)
    assert len(notices) == 1
    assert "fs.inotify.max_user_" in notices[0]
    assert errors == ""


def test_another_directory(start_watch: Watching, tmp_path: Path) -> None:
    """--project DIR follows what a program that starts there would get."""
    other = tmp_path / "other"
    other.mkdir()
    with start_watch("--project", str(other), "--format", "json") as child:
        (other / "tfgpu.toml").write_text(limit("3GiB"))
        assert json.loads(child.stdout.readline())["files"][0]["path"] == str(other / "tfgpu.toml")


@pytest.mark.parametrize("arguments", [("--exec", "'"), ("--exec", ""), ("--project", "/nowhere")], ids=" ".join)
def test_wrong_usage(arguments: tuple[str, str], tfgpu: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """A command that is none and a directory that is none are said at once, and end with 2."""
    result = tfgpu("watch", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert arguments[0] in result.stderr or arguments[1] in result.stderr


def test_hostile_text_does_not_steer_the_terminal(start_watch: Watching, project: Path) -> None:
    """Escape sequences in a value are shown escaped."""
    with start_watch() as child:
        (project / "tfgpu.toml").write_text('[gpu]\nvisible_devices = ["name:\\u001b[31m*"]\n', encoding="utf-8")
        lines = list(read_until(child.stdout, "now: "))
    assert "\x1b" not in os.linesep.join(lines)
    assert "name:" in lines[-2]


def test_an_end_is_shown_with_its_day_and_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the place of files, for none has changed. JSON has the table, its file, the day and the reason."""
    machine = Machine(tmp_path)
    exception = '[user.alice]\nexpires = 2027-01-31\nreason = "thesis"\nceiling.memory_limit = "16GiB"\n'
    path = machine.write("etc/tfgpu.toml", f'[ceiling]\nmemory_limit = "8GiB"\n{exception}')
    trust = Trust(ME, administrator=ME, checked_from=str(machine.root))
    states = []
    for day in ("2027-01-30", "2027-01-31"):
        monkeypatch.setattr(machine_date, "_latest", day)
        monkeypatch.setattr(machine_date, "_read_date", lambda: "1970-01-01")
        states.append(read_state(machine.start, machine.subject, str(machine.etc), trust))
    change = compare_states(states[0], states[1])
    assert change is not None
    watch._print_change(change)
    title, difference, effect = capsys.readouterr().out.strip().splitlines()
    assert title.endswith("  [user.alice] expired on 2027-01-31 (thesis)")
    assert difference.split("(")[0].strip() == 'ceiling.memory_limit: "16GiB"'
    assert "at most 8.0 GiB each" in effect
    assert watch._describe_change(change)["expired"] == [
        {"table": "user.alice", "path": str(path), "expires": "2027-01-31", "reason": "thesis"}
    ]
