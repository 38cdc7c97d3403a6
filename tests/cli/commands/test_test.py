"""`tfgpu test` runs cases, says what failed and why, and needs no GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.cli.conftest import Tfgpu
from tests.shared_machine import SharedMachine

POLICY = '[gpu]\nvisible_devices = [0]\nmemory_limit = "8GiB"\n'
CASE = '[[case]]\nname = "{}"\ngpus = "4x24GiB"\n[case.expect]\n{}\n'
PASSING = CASE.format("the first GPU", "devices = [0]")
FAILING = CASE.format("the second GPU & <more>", "devices = [1]\nmemory_limit = '4GiB'")


@pytest.fixture
def tests(project: Path) -> Path:
    """Return a file of tests, in which one case passes and one fails."""
    (project / "tfgpu.toml").write_text(POLICY)
    path = project / "tfgpu.test.toml"
    path.write_text(PASSING + FAILING)
    return path


def test_a_failure_shows_both_values_and_who_decided(tests: Path, tfgpu: Tfgpu) -> None:
    """Each value is on one line, with what was expected and what is. Below it is the line that decided."""
    done = tfgpu("test")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == (
        "failed  the second GPU & <more>  tfgpu.test.toml:6\n"
        "  devices       expected 1        got 0\n"
        "                tfgpu.toml:2  gpu.visible_devices = [0]\n"
        "  memory_limit  expected 4.0 GiB  got 8.0 GiB\n"
        '                tfgpu.toml:3  gpu.memory_limit = "8GiB"\n'
        "1 failed, 1 passed\n"
    )


def test_all_passed(tests: Path, tfgpu: Tfgpu) -> None:
    """If all is as expected one line says so, and with -v each case has its own."""
    tests.write_text(PASSING)
    done = tfgpu("test")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 passed\n", "")
    assert tfgpu("test", "-v").stdout == "passed  the first GPU\n1 passed\n"


def test_cases_are_chosen_by_name(tests: Path, tfgpu: Tfgpu) -> None:
    """-k takes a part of a name or a glob. If no case has it, that is wrong usage."""
    assert tfgpu("test", "-k", "FIRST").stdout == "1 passed\n"
    assert tfgpu("test", "-k", "second*more").stdout.endswith("1 failed, 0 passed\n")
    none = tfgpu("test", "-k", "third")
    assert (none.returncode, none.stderr) == (2, 'tfgpu test: no case has "third" in its name; -v lists the names\n')


def test_a_mistake_in_a_file_fails(tests: Path, tfgpu: Tfgpu) -> None:
    """The mistake is told with its place, and the other cases are run."""
    tests.write_text(PASSING + PASSING.replace("first", "other").replace("devices", "device"))
    done = tfgpu("test")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == (
        'tfgpu.test.toml:10:1: case[1].expect.device: unknown key "device"; did you mean "devices"? '
        "[error invalid-test]\n1 passed, 1 mistake\n"
    )


def test_where_it_looks(tests: Path, tfgpu: Tfgpu, project: Path, tmp_path: Path) -> None:
    """It looks here and beside the project's policy. A directory means all below it. What is not there is told."""
    below = project / "src" / "deep"
    below.mkdir(parents=True)
    assert tfgpu("test", cwd=below).stdout.endswith("1 failed, 1 passed\n")
    assert tfgpu("test", tmp_path, cwd=below).stdout.endswith("1 failed, 1 passed\n")
    none = tfgpu("test", "src")
    assert none.returncode == 2
    assert none.stderr.startswith("tfgpu test: there is no *.test.toml in src; name a file, or write one")
    assert tfgpu("test", "gone.test.toml").stderr == "tfgpu test: there is no gone.test.toml; correct the path\n"
    tests.unlink()
    nothing = tfgpu("test", cwd=below)
    assert nothing.returncode == 2
    assert "there is no *.test.toml in ~/" in nothing.stderr or "there is no *.test.toml in " in nothing.stderr
    assert str(project) in nothing.stderr.replace("~", os.path.expanduser("~"))


def test_json_has_everything(tests: Path, tfgpu: Tfgpu) -> None:
    """Programs get every case with its place, both values and the keys that decided."""
    told = json.loads(tfgpu("test", "--format", "json").stdout)
    assert told["files"] == [str(tests)]
    assert told["findings"] == []
    first, second = told["cases"]
    assert first == {"name": "the first GPU", "file": str(tests), "line": 1, "status": "passed", "differences": []}
    assert (second["status"], second["line"]) == ("failed", 6)
    devices, limit = second["differences"]
    assert (devices["key"], devices["expected"], devices["got"]) == ("devices", "1", "0")
    assert limit["decided_by"] == [
        {"path": str(tests.parent / "tfgpu.toml"), "key": "gpu.memory_limit", "value": "8GiB", "line": 3, "column": 1}
    ]


def test_junit_is_what_pytest_writes(tests: Path, tfgpu: Tfgpu, project: Path, tmp_path: Path) -> None:
    """The XML has the elements and attributes that pytest's has, so that what reads the one reads the other."""
    tests.write_text(PASSING + FAILING + CASE.format("b", "device = 1"))
    done = tfgpu("test", "--junit", "out.xml")
    assert done.stdout.endswith("1 failed, 1 passed, 1 mistake\n")
    text = (project / "out.xml").read_text()
    assert tfgpu("test", "--format", "junit").stdout == text
    ours = ET.fromstring(text)
    counts = {name: ours[0].get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "3", "failures": "1", "errors": "1", "skipped": "0"}
    failure = ours.find(".//testcase[@name='the second GPU & <more>']/failure")
    assert failure is not None
    assert failure.get("message") == "devices: expected 1, got 0"
    assert "memory_limit: expected 4.0 GiB, got 8.0 GiB" in (failure.text or "")
    program = (
        "def test_a(): pass\ndef test_b(): assert 0\nimport pytest\n@pytest.fixture\ndef c(): 1/0\ndef test_c(c): 0\n"
    )
    (tmp_path / "test_it.py").write_text(program)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junit-xml=theirs.xml", "test_it.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    theirs = describe_shape(ET.parse(tmp_path / "theirs.xml").getroot())
    for place, attributes in describe_shape(ours).items():
        assert attributes <= theirs[place] | {"type"}, place


def describe_shape(root: ET.Element) -> dict[str, set[str]]:
    """Return the attributes of each kind of element, by its place."""
    shape: dict[str, set[str]] = {}
    waiting = [(root, root.tag)]
    while waiting:
        node, place = waiting.pop()
        shape.setdefault(place, set()).update(node.keys())
        waiting += [(child, f"{place}/{child.tag}") for child in node]
    return shape


def test_what_others_wrote_does_not_steer_the_terminal(project: Path, tfgpu: Tfgpu) -> None:
    """Escape sequences in names and values are shown, in text and in XML, and are not sent."""
    (project / "tfgpu.toml").write_text(POLICY)
    (project / "a.test.toml").write_text(CASE.format("\\u001b[31m", 'findings = ["\\u001b[2J"]'))
    for form in ("text", "json", "junit"):
        done = tfgpu("test", "--format", form)
        assert done.returncode == 1
        assert "\x1b" not in done.stdout
        if form == "junit":
            ET.fromstring(done.stdout)


def test_check_reads_tests_too(tests: Path, project: Path, tfgpu: Tfgpu) -> None:
    """`tfgpu check` finds a mistake in a file of tests, by its name or beside a policy, and calls none "never-read"."""
    (project / "tfgpu.toml").write_text("[gpu]\nmemory_growth = true\n")
    for folder in ("groups", "users"):
        (project / folder).mkdir()
    assert tfgpu("check", ".").stdout == "ok: tfgpu.toml, tfgpu.test.toml\n"
    tests.write_text(CASE.format("a", "device = 1"))
    for path in (".", "tfgpu.test.toml"):
        done = tfgpu("check", path)
        assert done.returncode == 1
        assert "tfgpu.test.toml:5:1: case[0].expect.device: unknown key" in done.stdout
    assert tfgpu("check", "gone.test.toml").returncode == 2


def test_root_tests_the_machines_policy(server: SharedMachine) -> None:
    """Without arguments root's tests in /etc/tfgpu are run, with the files of the groups that a case names."""
    files = {
        "tfgpu.toml": '[ceiling]\nmemory_limit = "50%"\n',
        "groups/students.toml": '[ceiling]\nmemory_limit = "25%"\n',
        "tfgpu.test.toml": CASE.format("a", 'memory_limit = "12GiB"')
        + CASE.format("b", 'memory_limit = "6GiB"').replace("gpus", 'groups = ["students"]\ngpus'),
    }
    server.policy(files)
    done = server.tfgpu("test", "-v")
    assert (done.returncode, done.stdout) == (0, "passed  a\npassed  b\n2 passed\n"), done.stderr
    assert server.tfgpu("check", "/etc/tfgpu").stdout.startswith("ok: ")


def test_completion_knows_it(tfgpu: Tfgpu) -> None:
    """The script for the shell completes the command, its files and its formats."""
    script = tfgpu("completion", "bash").stdout
    assert re.search(r"^_shtab_tfgpu_test_option_strings=.* --junit\b", script, re.MULTILINE)
    assert re.search(r"^_shtab_tfgpu_test_pos_0_COMPGEN=_shtab_compgen_files", script, re.MULTILINE)
    assert re.search(r"^_shtab_tfgpu_test___format_choices=.* junit\b", script, re.MULTILINE)
