"""What people read when they mistype, or name something that is not there: what is wrong, and what to write."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cli.conftest import Tfgpu
from tests.conftest import SimulatedGpus
from tests.shared_machine import ALICE, SharedMachine
from tfenv.audit.stderr_line import format_policy_line
from tfenv.cli.main import COMMANDS, make_parser
from tfenv.errors import Finding
from tfenv.policy.model import (
    AutoChoice,
    EffectivePolicy,
    MemoryLimit,
    Origin,
    Outcome,
    Plan,
    PlannedDevice,
    Setting,
    Subject,
)
from tfenv.simulate.environment import build_environment, parse_gpus

LIMIT = MemoryLimit(bytes=2 << 30)

MISTAKES = [
    (("checkk",), 2, 'there is no command "checkk"; did you mean "check"?'),
    (("frobnicate",), 2, 'there is no command "frobnicate"; the commands are init, check, explain'),
    (("explain", "--project", "/nope"), 2, "/nope is not a directory"),
    (("watch", "--project", "/nope"), 2, "/nope is not a directory"),
    (
        ("simulate", "--gpus", "foo", "--", "true"),
        2,
        '"foo" does not describe GPUs; write "4x24GiB" or "2x24GiB:NVIDIA A100,1x80GiB"',
    ),
    (("doctor", "--python", "/bin/sh"), 2, "cannot run /bin/sh as a Python interpreter"),
    (("doctor", "--python", "/nope"), 2, "cannot run /nope as a Python interpreter"),
    (("install", "--system", "--python", "/nope"), 2, "cannot run /nope as a Python interpreter: No such file"),
    (("uninstall", "--system", "--python", "/nope"), 2, "cannot run /nope as a Python interpreter: No such file"),
    (("init", "--path", "/nope"), 2, "/nope is not a directory; create it first"),
    (("init", "--schema", "--path", "/nope"), 2, "/nope is not a directory; create it first"),
    (("init", "--machine", "--path", "/nope/etc"), 2, "/nope is not a directory; create it first"),
    (("run", "--config", "/nope", "true"), 2, "/nope does not exist; name a tfgpu.toml or a pyproject.toml"),
    (("audit", "--file", "/nope"), 2, "/nope: No such file or directory"),
    (("audit", "summary", "--file", "/nope"), 2, "/nope: No such file or directory"),
    (("audit", "export", "--file", "/dev/null", "--prometheus", "/nope/x.prom"), 2, "/nope"),
    (("simulate", "--log", "/nope/x", "--", "true"), 2, "cannot write /nope/x: No such file or directory"),
    (("simulate", "--processes", "/nope", "--", "true"), 2, "cannot read /nope: No such file or directory"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), MISTAKES, ids=lambda value: str(value)[:30])
def test_a_mistake_is_answered_with_what_would_be_right(
    arguments: tuple[str, ...], code: int, text: str, tfgpu: Tfgpu
) -> None:
    """One line says it, in words that people use."""
    done = tfgpu(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert text in done.stderr


def test_an_empty_log_says_so(tfgpu: Tfgpu, tmp_path: Path) -> None:
    """No records, and no records that were asked for, are told apart, in the table as in the summary."""
    none = "tfgpu audit: no records; tfenv writes one when a program imports a framework under a policy\n"
    for arguments, text in (((), none), (("--user", "alice"), "tfgpu audit: no records match these options\n")):
        for action in ((), ("summary",)):
            done = tfgpu("audit", *action, *arguments, env={"XDG_STATE_HOME": str(tmp_path)})
            assert (done.returncode, done.stdout, done.stderr) == (0, "", text)


def test_a_wrong_path_is_wrong_usage(tfgpu: Tfgpu, project: Path) -> None:
    """As in all other commands. A mistake in a file that is there is a finding."""
    assert tfgpu("check", "/nope").returncode == 2
    (project / "tfgpu.toml").write_text("[gpu]\nmemory_limit = 5\n")
    assert tfgpu("check", str(project)).returncode == 1


def test_explain_tells_a_broken_file_from_none(tfgpu: Tfgpu, project: Path) -> None:
    """A file is there, and nothing of it is in force. `tfgpu init` would be no help."""
    (project / "tfgpu.toml").write_text("[gpu\n")
    for text in ("[gpu\n", "[gpu]\nmemory_limit = 5\n", "", "version = 1\n"):
        (project / "tfgpu.toml").write_text(text)
        shown = tfgpu("explain").stdout
        assert ("Nothing is in force: see the findings below" in shown) is ("gpu" in text)
        assert "tfgpu init" not in shown
        assert "tfgpu init" not in tfgpu("doctor", "--no-tensorflow").stdout
    (project / "tfgpu.toml").unlink()
    assert "Run `tfgpu init`" in tfgpu("explain").stdout


def test_candidates_have_no_names_of_tensorflow(tfgpu: Tfgpu, project: Path) -> None:
    """Which of them will be GPU:0 is decided when devices are listed."""
    (project / "tfgpu.toml").write_text("[gpu]\nvisible_devices = {count = 1}\n")
    shown = tfgpu("explain", env=build_environment(parse_gpus("2x24GiB"), base={})).stdout
    assert "candidate" in shown
    assert "GPU:0" not in shown


# ---- help

PACKAGE = Path(__file__).parents[2] / "tfenv"

#: With these begins what an option does, and what a command is for.
VERBS = re.compile(
    r"(Accept|Allocate|Apply|Charge|Check|Count|Do|End|Examine|Explain|Find|Follow|Keep|Limit"
    r"|List|Print|Prove|Read|Refresh|Remove|Replace|Run|Set|Share|Show|Use|Verify|Wait|Watch|Write)\b"
)


def list_parsers(name: str) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser of a command, and those of its own commands."""
    waiting = [make_parser([name])]
    while waiting:
        for action in waiting.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                chosen = [parser for word, parser in action.choices.items() if word not in COMMANDS or word == name]
                yield from chosen
                waiting += chosen


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_made_of_sentences_that_begin_with_a_verb(name: str) -> None:
    """The description begins with the command's purpose and states the exit codes. Each option says what it does."""
    for parser in list_parsers(name):
        description = " ".join(filter(None, (parser.description, parser.epilog)))
        assert name == "completion" or "Exit codes: " in description
        helps = [action.help or "" for action in parser._actions if action.dest != "action"]
        for text in (parser.description or "", *helps):
            assert VERBS.match(text), text
            assert text.endswith("."), text
            assert not re.search(r"[.!?] [a-z]|;", text), text
    assert (next(list_parsers(name)).description or "").startswith(COMMANDS[name])


def test_the_page_and_the_program_name_the_same_purposes() -> None:
    """docs/commands.md tells what each command is for in the words of `tfgpu --help`."""
    page = (PACKAGE.parent / "docs" / "commands.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[?`tfgpu (\w+)`[^|]*\| (.*) \|$", page, re.MULTILINE)
    assert [(name, purpose.replace("`", "")) for name, purpose in rows] == [
        (name, purpose.replace("`", "")) for name, purpose in COMMANDS.items()
    ]


# ---- what is said everywhere

ROOMS = [
    *(PACKAGE / "cli").rglob("*.py"),
    *(PACKAGE / "deploy").rglob("*.py"),
    *(PACKAGE / "watch").rglob("*.py"),
    PACKAGE / "explanation.py",
    PACKAGE / "api.py",
]
#: What nobody says who speaks English, or nobody understands who has not read the source. "granted" in quotes is a
#: value of memory_limit.
TRANSLATED = re.compile(
    r"(?<!there )\bis no\b|\bnone that\b|\bis told\b|\bhas its say\b|\bha(s|ve) (a|no) say\b|\bstands\b"
    r"|\bhardly meant\b|\bfor it is\b|(?<!\")\bgranted\b|\barmed\b|\bdoors?\b|\bone's own\b|\bwhat follows\b"
    r"|\bkeeps it so\b"
    r"|\blent by\b|\bis there already\b|\bmeanwhile\b|\bas always\b|\bwho may\b|\bnot live\b|\blet be\b|\bsee what\b"
    r"|\blook at it first\b|\bthere is no .* in$|\bhave root\b|\bnothing in it but\b|\bof unknown\b|\bshows none\b",
    re.IGNORECASE,
)


def list_messages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each text of several words with its line. Docstrings are for other readers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    scopes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = {id(scope.body[0].value) for scope in scopes if scope.body and isinstance(scope.body[0], ast.Expr)}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings]
    for node in texts:
        if isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_message_reads_as_translated(path: Path) -> None:
    """Texts of the commands use the words of other programs."""
    translated = [(line, text) for line, text in list_messages(path) if TRANSLATED.search(text)]
    assert not translated


# ---- the line on stderr, and the command that it points to

needs_tensorflow = pytest.mark.skipif(find_spec("tensorflow") is None, reason="no TensorFlow here")
LIST = "import tfenv; tfenv.apply(); import tensorflow as tf; tf.config.list_logical_devices()"
Program = Callable[..., str]


@pytest.fixture
def run_program(project: Path, variables: dict[str, str], simulated_gpus: SimulatedGpus) -> Program:
    """Return what runs a program with TensorFlow in the project, on four GPUs, and gives our lines on its stderr."""

    def run(env: Mapping[str, str] | None = None, program: str = LIST) -> str:
        environment = variables | simulated_gpus() | dict(env or {})
        environment["XDG_CONFIG_HOME"] = variables["XDG_CONFIG_HOME"]
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=project, env=environment, capture_output=True, text=True,
            timeout=200, check=True,
        )  # fmt: skip
        return "\n".join(line for line in done.stderr.splitlines() if line.startswith("tfgpu: "))

    return run


@needs_tensorflow
@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("policy", "env", "finding", "code"),
    [
        ("[gpu]\nvisible_devices = [0, 9]\n", {}, "gpu.visible_devices: 9 is not among", "no-such-device"),
        ("[gpu]\nmemory_limit = '2GiB'\n", {"TFGPU_DISABLE": "true"}, "only the value 1", "disable-refused"),
        ("[gpu]\nmemory_limit = '2 gigs'\n", {}, '"gigs" is not a unit', "invalid-value"),
    ],
    ids=["a GPU that is not there", "TFGPU_DISABLE=true", "a wrong value"],
)
def test_the_line_points_to_the_command_that_shows_the_finding(
    policy: str,
    env: dict[str, str],
    finding: str,
    code: str,
    project: Path,
    tfgpu: Tfgpu,
    run_program: Program,
) -> None:
    """The line names the finding once and ends with a command. That command shows the same finding."""
    (project / "tfgpu.toml").write_text(policy)
    line = run_program(env)
    assert line.count(f"[{code}]") == 1
    assert finding in line
    assert line.endswith("; see `tfgpu explain`")
    four_gpus = build_environment(parse_gpus("4x24GiB"), base={})
    shown = tfgpu("explain", env=four_gpus | env).stdout
    assert finding in shown
    assert f"{code}]" in shown
    assert finding in tfgpu("doctor", "--no-tensorflow", env=four_gpus | env).stdout


@needs_tensorflow
@pytest.mark.tensorflow
def test_a_program_that_switches_the_policy_off_too_late_is_told(project: Path, run_program: Program) -> None:
    """`os.environ["TFGPU_DISABLE"] = "1"` has no effect: the line, the status and the record say so."""
    (project / "tfgpu.toml").write_text("[gpu]\nvisible_devices = [1]\n[audit]\nfile = 'log.jsonl'\n")
    program = (
        "import os, sys, tfenv\n"
        "tfenv.apply()\n"
        "os.environ['TFGPU_DISABLE'] = '1'\n"
        "print(tfenv.status(), file=sys.stderr)\n"
        "import tensorflow as tf\n"
        "assert len(tf.config.list_logical_devices('GPU')) == 1\n"
    )
    expected = "TFGPU_DISABLE=1 was set after Python started, so it has no effect; set it before [disable-refused]"
    before, line = run_program(program=program).splitlines()
    assert before.startswith("tfgpu: when a framework is imported: GPU 1 of 4")
    assert line.startswith("tfgpu: TensorFlow on GPU 1 of 4")
    assert before.endswith(f"; warning: {expected}")
    assert line.endswith(f"; warning: {expected}")
    records = [json.loads(text) for text in (project / "log.jsonl").read_text().splitlines()]
    found = [(record["event"], [finding["code"] for finding in record["findings"]]) for record in records]
    assert ("policy_applied", ["disable-refused"]) in found


def test_a_forbidden_switch_is_shown_by_the_command(server: SharedMachine) -> None:
    """Where the administrator forbids TFGPU_DISABLE=1, the status says so and `tfgpu explain` shows it."""
    server.policy({"tfgpu.toml": "[gpu]\nmemory_limit = '2GiB'\n[machine]\nallow_disable = false\n"})
    line = server.python(ALICE, "import tfenv; print(tfenv.status())", TFGPU_DISABLE="1").stdout
    assert "TFGPU_DISABLE has no effect" in line
    assert "see `tfgpu explain`" in line
    assert "allow_disable = false" in server.tfgpu("explain", env={"TFGPU_DISABLE": "1"}).stdout


def test_a_finding_of_a_running_program_points_to_no_command() -> None:
    """No command that is run later can show that a GPU is shared now."""
    plan = Plan("0", devices=(PlannedDevice("0"),))
    shared = Finding("shared-gpu", "GPU 0 is shared", "warning")
    line = format_policy_line(Subject("alice", 1000), EffectivePolicy(), plan, Outcome("applied", findings=(shared,)))
    assert line == "tfgpu: GPU 0; warning: GPU 0 is shared [shared-gpu]"


def test_doctor_hides_no_finding(project: Path, tfgpu: Tfgpu) -> None:
    """Each finding has a row of its own, the errors first."""
    (project / "tfgpu.toml").write_text("[gpu]\nmemory_limt = '2GiB'\nmemory_limit = 5\nallocator = 'x'\n")
    shown = tfgpu("doctor", "--no-tensorflow").stdout
    codes = [code for code in ("invalid-value", "unknown-key") for _ in range(shown.count(f"[{code}]"))]
    assert codes == ["invalid-value", "invalid-value", "unknown-key"]
    assert "findings, first" not in shown
    assert shown.index("unknown-key") > shown.rindex("invalid-value")


@needs_tensorflow
@pytest.mark.tensorflow
def test_a_broken_file_is_the_first_thing_said(project: Path, run_program: Program) -> None:
    """The line says at once that nothing is in force, where the mistake is, and what TensorFlow has instead."""
    (project / "tfgpu.toml").write_text("[gpu]\nmemory_limit = ")
    line = run_program()
    assert line.startswith("tfgpu: NOT IN FORCE: tfgpu.toml:2:14: this file is not valid TOML")
    assert "; TensorFlow has all 4 GPUs without a limit; see `tfgpu explain`" in line


def test_a_long_message_is_cut_between_words() -> None:
    """What is left of it reads as a sentence that goes on."""
    words = Finding("syntax", "alpha beta gamma " * 20)
    line = format_policy_line(Subject("alice", 1000), EffectivePolicy(), Plan(), findings=(words,))
    message = line.removeprefix("tfgpu: NOT IN FORCE: ").partition(" [syntax]")[0]
    assert message.endswith((" alpha …", " beta …", " gamma …"))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (Plan("GPU-a0fa4e00-1", devices=(PlannedDevice("GPU-a0fa4e00-1"),)), "tfgpu: GPU-a0fa4e00"),
        (Plan("0", devices=None), "tfgpu: GPU 0"),
        (Plan(limit=LIMIT, machine_count=1), "tfgpu: the GPU, at most 2.0 GiB"),
        (Plan(limit=LIMIT, machine_count=2), "tfgpu: all 2 GPUs, at most 2.0 GiB each"),
        (Plan(limit=LIMIT, choosing=AutoChoice(1)), "tfgpu: 1 free GPU, at most 2.0 GiB"),
        (Plan(limit=LIMIT, choosing=AutoChoice(2)), "tfgpu: 2 free GPUs, at most 2.0 GiB each"),
    ],
    ids=["a UUID", "a number", "the only one", "two", "one of them", "two of them"],
)
def test_gpus_are_named_once_and_counted_right(plan: Plan, said: str) -> None:
    """No "GPU GPU-a0fa4e00", no "each" for one GPU."""
    policy = EffectivePolicy({"memory_limit": Setting(LIMIT, Origin("project", "/p/tfgpu.toml", ("gpu",)))})
    assert format_policy_line(Subject("alice", 1000), policy, plan) == said


# ---- files that cannot be read


@pytest.mark.parametrize("variable", ["TFGPU_CONFIG", "TFGPU_SITE_CONFIG"])
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/missing", "names this file, but there is no such file; create it or correct the path"),
        ("/dev/stdin", "names this file, but it is a FIFO; a policy must be a regular file"),
        ("/dev/null", "names this file, but it is a device; a policy must be a regular file"),
        ("/etc", "names a directory; write the path of a file, as in /etc/tfgpu.toml"),
    ],
)
def test_a_wrong_path_in_a_variable_is_one_sentence(path: str, said: str, variable: str, tfgpu: Tfgpu) -> None:
    """It names the variable, the path, what is wrong and what to do, in every command."""
    checked = tfgpu("check", env={variable: path}, stdin="")
    assert checked.returncode == 1
    assert checked.stdout.splitlines()[0].startswith(f"{path}: {variable} {said}")
    assert f"{path}: {variable} {said}" in tfgpu("explain", env={variable: path}, stdin="").stdout


@pytest.mark.parametrize("text", ["[gpu\n", "[gpu]\nmemory_limit = ", "a = [1,\n2\n\n\n", 'a = """x\n\n', "a = 'x"])
def test_a_mistake_is_inside_the_file(text: str, project: Path, tfgpu: Tfgpu) -> None:
    """A parser notices an unclosed bracket at the end of the file. The place it names can be gone to in an editor."""
    (project / "tfgpu.toml").write_text(text)
    _, line, column, _ = tfgpu("check").stdout.splitlines()[0].split(":", 3)
    lines = text.split("\n")
    assert lines[int(line) - 1][int(column) - 1].strip()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory_growth\u00a0= true", 'tfgpu.toml:2:14: {}U+00A0 "no-break space": write a normal space'),
        ("memory_limit = '2\u00a0GiB'", 'tfgpu.toml:2:1: {}U+00A0 "no-break space": write a normal space'),
        ("memory_growth\u202f= true", 'tfgpu.toml:2:14: {}U+202F "narrow no-break space": write a normal space'),
        ("memory_growth\u200b = true", 'tfgpu.toml:2:14: {}U+200B "zero width space": remove it'),
        ("'memory_limit\u200d' = '2GiB'", 'tfgpu.toml:2:1: {}U+200D "zero width joiner": remove it'),
        ("\ufeffmemory_growth = true", 'tfgpu.toml:2:1: {}U+FEFF "byte order mark": remove it'),
        ("memory_limit = \u201c2GiB\u201d", 'tfgpu.toml:2:16: {}U+201C "left double quotation mark": write "'),
        ("memory_limit = \u20182GiB\u2019", 'tfgpu.toml:2:16: {}U+2018 "left single quotation mark": write \''),
        ("visible_devices = ['GPU\u2013a0fa']", 'tfgpu.toml:2:20: {}U+2013 "en dash": write -'),
        ("memory_growth \uff1d true", 'tfgpu.toml:2:15: {}U+FF1D "fullwidth equals sign": write ='),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_a_character_that_nobody_can_see_is_named(text: str, said: str, project: Path, tfgpu: Tfgpu) -> None:
    """The message names it, its place, and what to write. It is printed as an escape where a terminal has no glyph."""
    (project / "tfgpu.toml").write_text(f"[gpu]\n{text}\n", encoding="utf-8")
    shown = tfgpu("check").stdout.splitlines()[0]
    place, message = said.split("{}")
    assert shown.startswith(place)
    assert message in shown


# ---- where a search ended


def find_search(shown: str) -> str:
    """Return what `tfgpu explain` says of the project's file, on one line."""
    return " ".join(next(line for line in shown.splitlines() if line.startswith("  project")).split())


def test_explain_says_where_the_search_ended(tmp_path: Path, tfgpu: Tfgpu) -> None:
    """It ends at the root, at the home directory, after 32 directories, or where another file system begins."""
    deep = tmp_path.joinpath(*("d" for _ in range(40)))
    deep.mkdir(parents=True)
    top = tmp_path.joinpath(*("d" for _ in range(9)))
    assert f"here or above, up to {top}, the last of the 32 directories that are searched" in find_search(
        tfgpu("explain", cwd=deep).stdout
    )
    assert find_search(tfgpu("explain", cwd=Path("/")).stdout).endswith(
        "here, and the search ends at the root directory"
    )
    if os.stat("/dev/shm").st_dev != os.stat("/dev").st_dev:
        shown = find_search(tfgpu("explain", cwd=Path("/dev/shm")).stdout)
        assert shown.endswith("here, and the search ends at the top of its file system")


def test_explain_says_that_the_search_ended_at_home(server: SharedMachine) -> None:
    """A policy above the home directory does not count."""
    server.folder("/home/alice/vision", ALICE)
    shown = server.tfgpu("explain", user=ALICE, cwd="/home/alice/vision").stdout
    assert find_search(shown).endswith("here or above, up to /home/alice, the home directory")


# ---- tfenv.explain() beside tfenv.status()

COMPARE = """
import tfenv; tfenv.apply()
def compare():
    status, told = tfenv.status(), tfenv.explain()
    assert told.plan.visible == status.plan.visible, (told.plan.visible, status.plan.visible)
    assert [d.token for d in told.plan.devices] == [d.token for d in status.plan.devices]
    assert {str(f) for f in told.findings} == {str(f) for f in status.findings}, (told.findings, status.findings)
    return told
before = compare()
import tensorflow as tf
compare()
tf.config.list_logical_devices()
after = compare()
"""


@needs_tensorflow
@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("devices", "given"),
    [
        ("[1, 2]", "3,2"),
        ("{count = 1}", None),
        pytest.param("[1, 2]", None, marks=pytest.mark.exhaustive),
        pytest.param("[0, 9]", None, marks=pytest.mark.exhaustive),
        pytest.param("[0, 9]", "3,2", marks=pytest.mark.exhaustive),
        pytest.param("{count = 1}", "3,2", marks=pytest.mark.exhaustive),
    ],
)
def test_explain_agrees_with_status(devices: str, given: str | None, project: Path, run_program: Program) -> None:
    """Inside a process both tell the same, before the import, after it, and when GPUs were chosen."""
    (project / "tfgpu.toml").write_text(f"[gpu]\nvisible_devices = {devices}\n")
    chosen = "assert before.choosing and not after.choosing and len(after.plan.devices) == 1\n"
    program = COMPARE + (chosen if "count" in devices else "")
    run_program({} if given is None else {"CUDA_VISIBLE_DEVICES": given}, program)


@needs_tensorflow
@pytest.mark.tensorflow
def test_explain_knows_the_policy_beside_the_program(
    project: Path, variables: dict[str, str], simulated_gpus: SimulatedGpus, tmp_path: Path
) -> None:
    """A script that is started from elsewhere is under the file beside it, and `tfenv.explain()` says so."""
    (project / "tfgpu.toml").write_text("[gpu]\nvisible_devices = [2]\n")
    (project / "train.py").write_text(f"{COMPARE}assert after.project == {str(project)!r}, after.project\n")
    environment = variables | simulated_gpus() | {"XDG_CONFIG_HOME": variables["XDG_CONFIG_HOME"]}
    done = subprocess.run(
        [sys.executable, str(project / "train.py")], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
