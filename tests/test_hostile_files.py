"""Hostile and odd project files, from the file to the Plan: none raises, none widens, none takes long."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import tomli

from tests.machine import HOSTILE, INVENTORY, STRICT, Machine, assert_new_log, assert_within
from tfenv import pipeline
from tfenv.config.document import LARGEST
from tfenv.policy.model import Grant

#: One file may take so many times as long as tomli takes for a long one, on any machine. 12 is the most that was seen.
#: What grows with the square of a file's length takes hundreds.
LONGEST = 30

VALID = """
version = 1
on_error = "warn"
[gpu]
visible_devices = [0, "GPU-00000002"]
memory_growth = true
memory_limit = "8GiB"
allocator = "bfc"
[[gpu.device]]
match = "name:*A100*"
memory_limit = "6GiB"
logical_devices = ["3GiB", "3GiB"]
[ceiling]
allowed_devices = [0, 1, "name:*"]
max_devices = 2
memory_limit = "50%"
require_grant = false
[user.alice.gpu]
memory_limit = "30GiB"
[group.students.ceiling]
max_devices = 1
[audit]
stderr = "none"
file = "logs/tfgpu.jsonl"
"""

# ---- the corpus

KEYS = (
    "version", "on_error", "gpu", "ceiling", "user", "group", "project", "audit", "machine",
    "gpu.visible_devices", "gpu.memory_growth", "gpu.memory_limit", "gpu.allocator", "gpu.device",
    "gpu.visible_devices.count", "gpu.visible_devices.rank",
    "ceiling.allowed_devices", "ceiling.max_devices", "ceiling.memory_limit", "ceiling.require_memory_growth",
    "user.alice", "user.alice.gpu.memory_limit", "group.students.ceiling.max_devices",
    "audit.file", "audit.stderr", "audit.syslog", "machine.trusted_owners", "machine.allow_disable",
)  # fmt: skip
VALUES = (
    "0", "-1", "1000000000", "18446744073709551616", f"0x{'f' * 5000}", "1e400", "nan", "-inf", "0.5", "true", "false",
    '""', '"none"', '"all"', '"\\u0000\\n\\u001b[31m\\u202e"', "'9'", "1979-05-27T07:32:00Z", "07:32:00",
    "[]", "[[]]", "[0, 0]", "[{}]", "{}", "{a = {b = {c = 1}}}", '{count = 1, rank = "auto"}', "[-1, true, 1e3, '']",
)  # fmt: skip
LOGS = (
    "/etc/passwd", "../outside.jsonl", "a/../../outside.jsonl", "~/x.jsonl", "~root/x.jsonl", ".git/config", ".jsonl",
    ".git/hooks/x.jsonl", "train.py", "tfgpu.toml", "logs/", "logs", ".", "./", "./.x.jsonl", "//etc/x.jsonl",
    "x.JSONL", "link/x.jsonl", "hidden/x.jsonl", "log.jsonl", "file:///etc/x.jsonl", "a/.b/c.jsonl",
    "a" * 5000 + ".jsonl",
    "/dev/stderr", "x.jsonl/", "x.jsonl/..", "<uid>/../../x.jsonl", "CON.jsonl", "x\\\\..\\\\y.jsonl", "x.jsonl\\u0000",
)  # fmt: skip
TEXTS = {
    "empty": "",
    "only a comment": "# nothing",
    "the administrator's tables": HOSTILE,
    "duplicate keys": "[gpu]\nmemory_limit = '1GiB'\nmemory_limit = 'none'\n",
    "duplicate tables": "[gpu]\n[gpu]\n",
    "a table over a dotted key": "gpu.memory_growth = true\n[gpu]\nmemory_limit = 'none'\n",
    "a list over a table": "[gpu]\n[[gpu]]\n",
    "quoted dots": '"gpu.memory_limit" = "none"\n"ceiling.max_devices" = 99\n',
    "keys with blanks": '" gpu".memory_limit = "none"\n"gpu " = {}\n"" = 1\n',
    "keys that look alike": '["\\u0262pu"]\nmemory_limit = \'none\'\n["gp\\u1d64"]\n',
    "keys of objects": "__class__ = 1\n[gpu]\n__init__ = {}\n[user.__proto__.gpu]\nmemory_limit = 'none'\n",
    "users of all kinds": '[user."".gpu]\n[user."a/b".gpu]\n[user."*".gpu]\nmemory_limit = "none"\n',
    "root's own tables": '[user.root.ceiling]\nmax_devices = 9\n[user."uid:0".gpu]\nmemory_limit = "none"\n',
    "inline tables of several lines": "gpu = {\n  memory_limit = 'none',\n}\n",
    "new escapes": 'gpu.memory_limit = "\\e[31m"\n',
    "hexadecimal escapes": 'gpu.memory_limit = "\\x41"\n',
    "lone surrogates": 'gpu.memory_limit = "\\ud800"\n',
    "characters beyond Unicode": 'gpu.memory_limit = "\\U00110000"\n',
    "bare keys of other alphabets": "gpü = 1\n",
    "a time without seconds": "gpu.memory_limit = 07:32\n",
    "a year that is none": "gpu.memory_limit = 0000-13-99\n",
    "underscores": "ceiling.max_devices = 1_0_0\ngpu.visible_devices = [0_0]\n",
    "an integer of thousands of digits": f"ceiling.max_devices = {'9' * 5000}\n",
    "all devices by name": 'gpu.visible_devices = ["name:*"]\nceiling.allowed_devices = ["name:*", "GPU-0"]\n',
    "a pattern that is slow to match": f'gpu.visible_devices = ["name:{"*a" * 60}b"]\n',
    "an expression": f'gpu.visible_devices = ["name:{"[" * 500}"]\n',
    "every rule": '[[gpu.device]]\nmatch = "name:*"\nmemory_limit = "none"\nlogical_devices = ["39GiB", "39GiB"]\n',
    "a split of many": '[[gpu.device]]\nmatch = "name:*"\nlogical_devices = [' + '"1GiB", ' * 64 + "]\n",
    "a newer version": "version = 2\n[gpu]\nmemory_limit = 'none'\n",
    "only carriage returns": "[gpu]\rmemory_limit = 'none'\r",
    "Windows line ends": "[gpu]\r\nmemory_limit = 'none'\r\n",
    "escape sequences": "[gpu]\n\x1b[2Jmemory_limit = 1\n",
    "separators of lines": "[gpu]\u2028memory_limit = 'none'\n",
    "nested lists": "gpu.visible_devices = " + "[" * 100 + "]" * 100,
    "nesting without end": "gpu.visible_devices = " + "[" * 100_000,
    "nested tables": "gpu.visible_devices = " + "{a = " * 100 + "1" + "}" * 100,
    "a key of many dots": "a." * 100_000 + "a = 1\n",
    "a header of many dots": "[" + "a." * 100_000 + "a]\n",
}
BYTES = {
    "a byte order mark": b"\xef\xbb\xbf" + HOSTILE.encode(),
    "two byte order marks": b"\xef\xbb\xbf" * 2 + HOSTILE.encode(),
    "UTF-16": HOSTILE.encode("utf-16"),
    "UTF-16 without a mark": HOSTILE.encode("utf-16-le"),
    "UTF-32": HOSTILE.encode("utf-32"),
    "Latin-1": "[gpu]\n# für\n".encode("latin-1"),
    "overlong UTF-8": b"[gpu]\nmemory_limit = '\xc0\xae'\n",
    "NUL characters": b"[gpu]\nmemory_limit = 'none'\0\n",
    "zeros alone": bytes(4096),
    "an archive": b"PK\x03\x04" + bytes(range(256)) * 8,
    "too large": b"#" * (LARGEST + 1),
    "the largest": b"#" * LARGEST,
}
PYPROJECTS = {
    "the administrator's tables": "[tool.tfgpu]\non_error = 'warn'\n[tool.tfgpu.ceiling]\nmax_devices = 99\n",
    "machine and projects": "[tool.tfgpu.machine]\nallow_disable = true\n[tool.tfgpu.project.'/'.gpu]\n",
    "a number": "[tool]\ntfgpu = 1\n",
    "a list": "[[tool.tfgpu]]\nmemory_limit = 'none'\n",
    "tool is a list": "[[tool]]\ntfgpu = {}\n",
    "tool is a string": "tool = 'tfgpu'\n",
    "beside the table": "[gpu]\nmemory_limit = 'none'\n[tool.tfgpu]\n",
    "broken below": "[tool.tfgpu.gpu]\nmemory_limit = 'none'\n[tool.other\n",
    "a log outside": "[tool.tfgpu.audit]\nfile = '../../x.jsonl'\n",
    "a log over the sources": "[tool.tfgpu.audit]\nfile = 'setup.py'\n",
}


def fill_file(head: str, item: Callable[[int], str], tail: str = "") -> bytes:
    """Return a file as large as any that is read, of one item again and again."""
    parts, size = [head], len(head) + len(tail)
    while size + len(part := item(len(parts))) <= LARGEST:
        parts.append(part)
        size += len(part)
    return "".join([*parts, tail]).encode()


def make_large() -> Iterator[tuple[str, bytes]]:
    """Give a file for each kind of thing, with as many of it as a file can hold."""
    yield "unknown keys at the top", fill_file("", lambda i: f"k{i}=1\n")
    yield "unknown keys of gpu", fill_file("[gpu]\n", lambda i: f"k{i}=1\n")
    yield "unknown keys of a choice", fill_file("gpu.visible_devices={count=1,", lambda i: f"k{i}=1,", "z=1}")
    yield (
        "unknown keys of both choices",
        fill_file("gpu.visible_devices={count=1,rank=1,", lambda i: f"k{i}=1,", "z=1}"),
    )
    yield "unknown keys of users", fill_file("", lambda i: f"user.u{i}.z=8\n")
    yield "bad selectors", fill_file("ceiling.allowed_devices=[", lambda _: "'b',", "]")
    yield "good and bad selectors", fill_file("ceiling.allowed_devices=[", lambda i: f"{i % 8 - 4},", "]")
    yield "UUIDs", fill_file("ceiling.allowed_devices=[", lambda i: f"'GPU-{i:x}',", "]")
    yield "chosen UUIDs", fill_file("gpu.visible_devices=[", lambda i: f"'GPU-{i:x}',", "]")
    yield "lists in a list", fill_file("gpu.visible_devices=[", lambda _: "[1],", "]")
    yield "many long lists", fill_file("", lambda i: f"user.u{i}.gpu.visible_devices=[{'[],' * 250}]\n")
    yield "rules", fill_file("", lambda _: "[[gpu.device]]\nmatch=0\n")
    yield "rules without a match", fill_file("", lambda _: "[[gpu.device]]\n")
    yield "rules that are numbers", fill_file("gpu.device=[", lambda _: "1,", "]")
    yield "a split of very many", fill_file("gpu.device=[{match=0,logical_devices=[", lambda _: "'1%',", "]}]")
    yield "users with a mistake", fill_file("", lambda i: f"user.u{i}.gpu.memory_limit=8\n")
    yield "users without one", fill_file("", lambda i: f"user.u{i}.gpu.memory_growth=true\n")
    yield "users that are numbers", fill_file("", lambda i: f"user.u{i}=8\n")
    yield "users that are no names", fill_file("", lambda i: f"user.'/{i}'.gpu={{}}\n")
    yield "groups with a mistake", fill_file("", lambda i: f"[group.g{i}.ceiling]\nmax_devices=-1\n")
    yield "owners", fill_file("machine.trusted_owners=[", lambda _: "1,", "]")
    yield "long keys", ("gpu." + "a" * 250_000 + "=1\n").encode()
    yield "a long word", ("gpu.visible_devices='" + "9," * 125_000 + "9'").encode()
    yield "a long limit", ("gpu.memory_limit='" + "9" * 250_000 + "'").encode()
    yield "a long number", ("ceiling.max_devices=0x" + "f" * 250_000).encode()
    yield "keys of many dots", fill_file("", lambda i: f"x{i}{'.a' * 30}=1\n")


def make_corpus() -> Iterator[tuple[str, str, bytes]]:
    """Give what each hostile file is about, its name, its content."""
    for key, value in product(KEYS, VALUES):
        yield f"{key} = {value[:40]}", "tfgpu.toml", f"{key} = {value}\n".encode()
    for log in LOGS:
        yield f"log {log[:40]}", "tfgpu.toml", f'[audit]\nfile = "{log}"\n'.encode()
    for about, text in TEXTS.items():
        yield about, "tfgpu.toml", text.encode("utf-8", "surrogatepass")
    for about, raw in BYTES.items():
        yield about, "tfgpu.toml", raw
    for about, text in PYPROJECTS.items():
        yield f"pyproject: {about}", "pyproject.toml", text.encode()
    for about, raw in make_large():
        yield f"very many: {about}", "tfgpu.toml", raw


def make_strict_machine(root: Path) -> Machine:
    """Make a strict machine layer, and a project with links that lead where no log may be."""
    machine = Machine(root)
    machine.write("etc/tfgpu.toml", STRICT)
    machine.write("home/project/.git/config", "")
    (machine.project / "link").symlink_to(root)
    (machine.project / "hidden").symlink_to(".git")
    return machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return make_strict_machine(tmp_path)


# ---- the tests


def test_the_corpus_is_large() -> None:
    """Hundreds of files, no two alike."""
    files = [(name, raw) for _, name, raw in make_corpus()]
    assert len(set(files)) == len(files) > 700
    assert max(len(raw) for _, raw in files) == LARGEST + 1


def test_hostile_files_neither_raise_nor_widen_nor_take_long(machine: Machine) -> None:
    """Every file of the corpus gives a policy within the machine's, findings of one line, and all that soon."""
    failed = []
    began = time.process_time()
    tomli.loads("\n".join(f"k{number}=1" for number in range(30_000)))
    unit = time.process_time() - began
    for about, name, raw in make_corpus():
        path = machine.project / name
        path.write_bytes(raw)
        path.chmod(0o644)
        began = time.process_time()
        try:
            loaded = machine.load()
            taken = time.process_time() - began
            assert_within(machine, loaded)
            assert all(str(finding).isprintable() for finding in loaded.findings)
            assert taken < LONGEST * unit, f"{taken:.1f} s, where tomli takes {unit:.2f} s"
        except Exception as error:  # noqa: BLE001 - the test goes on to name all of them
            failed.append(f"{about}: {type(error).__name__}: {str(error)[:200]}")
        path.unlink()
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("log", LOGS)
def test_a_log_is_refused_unless_it_is_a_new_one_inside_the_project(machine: Machine, log: str) -> None:
    """What a project names as its log is either a .jsonl inside it or an error finding that says so."""
    machine.write("home/project/tfgpu.toml", f'[audit]\nfile = "{log}"\n')
    loaded = machine.load()
    files = loaded.policy.audit.files
    for path in files:
        assert_new_log(path, machine.project)
    refused = [finding for finding in loaded.findings if finding.severity == "error"]
    assert bool(files) != bool(refused)
    assert "log.jsonl" not in log or files


def test_ten_thousand_corruptions_neither_raise_nor_widen(machine: Machine, *, exhaustive: bool) -> None:
    """Any bytes in the place of some of a right file's give a policy within the machine's. A quick run tries 500."""
    path = machine.write("home/project/tfgpu.toml", VALID)
    assert machine.load().findings == ()
    chance = random.Random(20)
    for _ in range(10_000 if exhaustive else 500):
        # To write over it would wait for the disk each time.
        path.unlink()
        path.write_bytes(corrupt(VALID.encode(), chance))
        path.chmod(0o644)
        assert_within(machine, machine.load())


def corrupt(raw: bytes, chance: random.Random) -> bytes:
    """Replace bytes by others, some by bytes of the file itself, so that much of it still is TOML."""
    damaged = bytearray(raw)
    for _ in range(chance.randint(1, 2)):
        at, source = chance.randrange(len(damaged)), chance.randrange(len(raw))
        length = chance.randint(0, 3)
        others = (chance.randbytes(length), raw[source : source + length], b"9" * length)
        damaged[at : at + chance.randint(0, 3)] = chance.choice(others)
    return bytes(damaged)


def test_a_ceiling_that_is_too_long_keeps_its_first_devices(machine: Machine) -> None:
    """Thousands of entries in a list of allowed devices leave a ceiling of its first ones, and an error."""
    (machine.root / "etc" / "tfgpu.toml").unlink()
    many = ", ".join(["2", *["900"] * 300, "0"])
    machine.write("home/project/tfgpu.toml", f"[ceiling]\nallowed_devices = [{many}]\nmax_devices = 5000\n")
    loaded = machine.load()
    assert [(finding.code, finding.line) for finding in loaded.findings] == [("too-many", 2), ("invalid-value", 3)]
    assert "1024" in loaded.findings[1].message
    assert pipeline.make_plan(loaded, Grant(), INVENTORY).visible == "2"


def test_very_many_findings_are_counted_and_lose_no_ceiling(machine: Machine) -> None:
    """A hundred findings are listed, the rest is one more as severe as its worst. Good ceilings beside them hold."""
    (machine.root / "etc" / "tfgpu.toml").unlink()
    wrong = "".join(f"[user.u{number}.gpu]\nmemory_growth = 'yes'\n" for number in range(300))
    machine.write("home/project/tfgpu.toml", f"[ceiling]\nmax_devices = 1\nunknown = 1\n{wrong}")
    loaded = machine.load()
    assert len(loaded.findings) == 101
    assert loaded.findings[-1].severity == "error"
    assert "and 201 more" in loaded.findings[-1].message
    assert pipeline.make_plan(loaded, Grant(), INVENTORY).visible == "0"
    assert not any("memory_growth" in tables.gpu for layer in loaded.layers for tables in layer.users.values())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to somebody else")
def test_a_strangers_pyproject_gives_nothing_but_a_finding(machine: Machine) -> None:
    """It is found by its table, and then left out for its owner."""
    path = machine.write("home/project/pyproject.toml", "[tool.tfgpu.gpu]\nmemory_growth = true\n")
    os.chown(path, 65534, -1)
    loaded = machine.load()
    assert [finding.code for finding in loaded.findings] == ["untrusted-owner"]
    assert [source.layer for source in loaded.sources] == ["machine"]
