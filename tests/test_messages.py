"""Every code of tfenv is on the page of messages, and the examples there are what tfenv says.

When the words of a message change, `TFENV_WRITE_EXAMPLES=1 pytest tests/test_messages.py` writes the new ones into
tools/messages.toml. `python tools/generate.py` makes the page of it.
"""

from __future__ import annotations

import ast
import contextlib
import grp
import importlib.util
import io
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tomli

from tests.conftest import SimulatedGpus
from tests.runtime.test_shadowed import run
from tests.sharing.test_allocate import GIB, INVENTORY, fill, make_plan, make_requester
from tfenv.audit.record import ProcessFacts, RecordContext, make_disabled_record
from tfenv.audit.sinks import AuditLog
from tfenv.config.document import Document, Trust, read
from tfenv.config.schema import validate
from tfenv.devices.inventory import read_inventory
from tfenv.errors import Finding
from tfenv.identity import list_members
from tfenv.lint.combinations import advise
from tfenv.policy.budget import BudgetBook, Claimant
from tfenv.policy.model import (
    AuditSinks,
    Device,
    EffectivePolicy,
    Grant,
    MemoryLimit,
    Origin,
    Plan,
    PlannedDevice,
    Source,
    Subject,
)
from tfenv.policy.placement import Placement, place, report_unknown_memory
from tfenv.sharing.allocate import allocate_gpus, renew_lease
from tfenv.simulate.environment import build_environment, parse_gpus

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tools" / "messages.toml"
WRITES_EXAMPLES = bool(os.environ.get("TFENV_WRITE_EXAMPLES"))


@cache
def read_messages() -> dict[str, dict[str, Any]]:
    """Return what the table says of each code."""
    table = tomli.loads(TABLE.read_text(encoding="utf-8"))
    messages = [message for group in table["group"] for message in group["message"]]
    codes = [message["code"] for message in messages]
    assert len(codes) == len(set(codes)), "a code is described twice"
    return {message["code"]: message for message in messages}


# ---- the codes in the package

#: Which argument of a call is the code.
POSITIONS = {
    "Finding": 0,
    "DocumentError": 0,
    "LintRemark": 1,
    "WrongValueError": 1,
    "DocumentFault": 2,
    "_note": 2,
    "add": 0,
}
KEYWORDS = ("code", "kind")
CODE = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
#: How a line on stderr that is no finding names its code.
BRACKETS = re.compile(r" \[([a-z][a-z0-9]*(?:-[a-z0-9]+)*)\](?:\\n|\n)*$")
SEVERITIES = {"error", "warning", "note"}
#: What `[…]` at the end of a text may also be.
NO_CODES = {"gpu", "audit", "defaults", "observe", "options"}


@dataclass(frozen=True)
class Use:
    """A code in the package's source.

    Attributes:
        place: File and line.
        pattern: A regular expression. Of a code that is written out, the code itself.
        severities: Those in the same call.
    """

    place: str
    pattern: str
    severities: frozenset[str] = frozenset()


def list_uses() -> Iterator[Use]:
    for path in sorted((ROOT / "tfenv").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                yield from _list_uses_in_call(node, place)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = BRACKETS.search(node.value)
                if found is not None and found[1] not in NO_CODES:
                    yield Use(place, found[1])


def _list_uses_in_call(call: ast.Call, place: str) -> Iterator[Use]:
    name = getattr(call.func, "id", getattr(call.func, "attr", ""))
    if name not in POSITIONS or (name == "add" and "policy" not in place):  # elsewhere it is a set's
        return
    arguments = [*call.args[POSITIONS[name] : POSITIONS[name] + 1]]
    arguments += [keyword.value for keyword in call.keywords if keyword.arg in KEYWORDS]
    others = [
        node for part in (*call.args, *(keyword.value for keyword in call.keywords)) for node in _list_words(part)
    ]
    severities = frozenset(word for word in others if word in SEVERITIES)
    for argument in arguments:
        if isinstance(argument, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else r"[a-z]+" for part in argument.values]
            yield Use(place, "".join(map(str, parts)), severities)
        for word in _list_words(argument):
            if CODE.fullmatch(word):
                yield Use(place, word, severities)


def _list_words(node: ast.expr) -> Sequence[str]:
    """List the strings that an expression can be, as far as they are written out."""
    if isinstance(node, ast.IfExp):
        return [*_list_words(node.body), *_list_words(node.orelse)]
    if isinstance(node, ast.Call):
        return [word for argument in node.args[2:] for word in _list_words(argument)]  # getattr
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def test_every_code_is_described() -> None:
    """A new code fails here until tools/messages.toml has its cause and what to do."""
    known = set(read_messages())
    missing = [use for use in list_uses() if not any(re.fullmatch(use.pattern, code) for code in known)]
    assert missing == []


def test_every_description_is_of_a_code() -> None:
    """A code that is gone from the package goes from the page, too."""
    patterns = {use.pattern for use in list_uses()} | {"invalid-value"}  # the default of a fault
    unused = [code for code in read_messages() if not any(re.fullmatch(pattern, code) for pattern in patterns)]
    assert unused == []


def test_the_severities_are_those_of_the_package() -> None:
    """Each severity that the package gives a code is on the page."""
    messages = read_messages()
    wrong = [
        use
        for use in list_uses()
        if use.pattern in messages and not use.severities <= set(messages[use.pattern]["severity"])
    ]
    assert wrong == []


@pytest.mark.parametrize("code", read_messages())
def test_a_description_is_complete(code: str) -> None:
    """Each code has an example that ends with it, a cause and what to do, in full sentences."""
    message = read_messages()[code]
    brackets = rf"\[(?:(?:{'|'.join(message['severity'])}) )?{code}\]"
    assert re.search(brackets, message["example"]) or message["example"].startswith(f"{code}: ")
    for text in (message["cause"].strip(), message["fix"].strip()):
        assert text[0].isupper() or text.startswith(("`", "tfenv "))
        assert text.endswith(".")
        assert ";" not in re.sub(r"`[^`]*`", "", text)


# ---- the examples


@dataclass(frozen=True)
class Run:
    """A run of `tfgpu check` or `tfgpu explain` in a project of its own.

    Attributes:
        files: Their texts, by their paths below the project's folder. They are readable by all.
        arguments: Of `tfgpu`.
        gpus: That are simulated. "" for none.
        env: Further variables.
        prepare: A shell command that is run first.
        names: Names of this machine, and what the page has in their place.
    """

    files: Mapping[str, str | bytes]
    arguments: tuple[str, ...] = ("check",)
    gpus: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    prepare: str = "true"
    names: Mapping[str, str] = field(default_factory=dict)


def check(text: str | bytes, name: str = "tfgpu.toml", **facts: Any) -> Run:
    """Check one file of a project."""
    return Run({name: text}, **facts)


def check_machine(text: str, name: str = "tfgpu.toml", **facts: Any) -> Run:
    """Check the draft of a machine's policy, in `etc/`."""
    files = {"etc/tfgpu.toml": "", "etc/groups/.keep": "", "etc/users/.keep": "", f"etc/{name}": text}
    return Run(files, ("check", "etc"), **facts)


def explain(text: str, *, gpus: str = "4x24GiB", **facts: Any) -> Run:
    """Explain what applies in a project, on simulated GPUs."""
    return Run({"tfgpu.toml": text}, ("explain",), gpus=gpus, **facts)


EMPTY_GROUP = next((group.gr_name for group in grp.getgrall() if not list(list_members(group.gr_name))), "")
JOB = {"SLURM_JOB_ID": "7", "SLURM_LOCALID": "1", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
SHARDS = {"SLURM_JOB_ID": "7", "SLURM_SHARDS_ON_NODE": "3", "SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "0"}
RUNS = {
    "syntax": check("[gpu]\nmemory_limit = 8GiB\n"),
    "not-utf8": check('[gpu]\nmemory_limit = "8GiB"\n'.encode("utf-16")),
    "too-large": check("#" * (1 << 21)),
    "too-deep": check("a = " + "[" * 400 + "]" * 400),
    "not-found": check("", env={"TFGPU_CONFIG": "team.toml"}),
    "not-a-file": Run({"policies/tfgpu.toml": ""}, env={"TFGPU_CONFIG": "policies"}),
    "unreadable": Run({}, ("check", "tfgpu.toml"), prepare="ln -s tfgpu.toml tfgpu.toml"),
    "wrong-type": check("[tool]\ntfgpu = 1\n", "pyproject.toml", arguments=("check", "pyproject.toml")),
    "insecure-permissions": check("", prepare="chmod a+w tfgpu.toml"),
    "untrusted-owner": check("", prepare="chown nobody tfgpu.toml", names={"nobody": "bob", "root)": "alice)"}),
    "invalid-test": Run(
        {"tfgpu.toml": "", "tfgpu.test.toml": '[[case]]\nname = "a"\ngpus = "2x24GiB"\n[case.expect]\ndevice = 1\n'},
        ("test",),
    ),
    "newer-version": check("version = 2\n"),
    "hidden": Run({"tfgpu.toml": "", "pyproject.toml": "[tool.tfgpu.gpu]\n"}),
    "project-replaced": Run(
        {"tfgpu.toml": "[gpu]\nmemory_growth = true\n", "policies/batch.toml": "[gpu]\nmemory_growth = true\n"},
        env={"TFGPU_CONFIG": "policies/batch.toml"},
    ),
    "hides-policy": Run(
        {"tfgpu.toml": "[gpu]\nmemory_growth = true\n", "app/tfgpu.toml": '[audit]\nfile = "none"\n'}, ("check", "app")
    ),
    "schema-missing": check("#:schema ./tfgpu.schema.json\n[gpu]\nmemory_growth = true\n"),
    "schema-outdated": check(
        "#:schema ./tfgpu.schema.json\n[gpu]\nmemory_growth = true\n",
        prepare=f"sed 's/\"examples\"/\"$comment\"/' {ROOT}/schemas/tfgpu.schema.json > tfgpu.schema.json",
    ),
    "never-read": check_machine("", "policy.toml"),
    "closed": check_machine("", prepare="chmod go-r etc/tfgpu.toml"),
    "unknown-key": check('[gpu]\nmemory_limt = "8GiB"\n'),
    "invalid-value": check("[gpu]\nmemory_limit = 8\n"),
    "observe-not-here": check('[observe.ceiling]\nmemory_limit = "8GiB"\n'),
    "nothing-to-observe": check_machine(
        '[ceiling]\nmemory_limit = "8GiB"\n[observe.ceiling]\nmemory_limit = "8GiB"\n'
    ),
    "expired": check_machine('[user.root]\nexpires = 2026-01-31\nreason = "thesis"\n', names={"root": "alice"}),
    "too-many": check(f"[ceiling]\nallowed_devices = {list(range(2000))}\n"),
    "more-findings": check("".join(f"key{number} = 1\n" for number in range(150))),
    "machine-layer-only": check("[machine]\nallow_disable = true\n"),
    "outside-project": check('[audit]\nfile = "/var/log/tfgpu.jsonl"\n'),
    "allocator-without-limit": check('[gpu]\nmemory_limit = "8GiB"\nallocator = "cuda_malloc_async"\n'),
    "no-overlap": explain("[gpu]\nvisible_devices = [4]\n"),
    "no-such-device": explain("[gpu]\nvisible_devices = [0, 9]\n"),
    "no-inventory": explain('[gpu]\nvisible_devices = ["name:*A100*"]\n', gpus=""),
    "no-grant": explain("[ceiling]\nrequire_grant = true\n", env={"SLURM_JOB_ID": "7"}),
    "more-ranks-than-gpus": explain('[gpu]\nvisible_devices = {rank = "auto"}\n', gpus="1x24GiB", env=JOB),
    "no-rank": explain('[gpu]\nvisible_devices = {rank = "auto"}\n'),
    "ranks-share-a-gpu": explain("[gpu]\nvisible_devices = [0]\n", env=JOB),
    "one-instance": explain(
        '[gpu]\nvisible_devices = ["MIG-a0104e00", "MIG-a0114e00"]\n', gpus="80GiB/mig=2x40GiB"
    ),
    "first-card-for-all": check("[ceiling]\nmax_devices = 1\n"),
    "numbers-in-machine-layer": check_machine("[ceiling]\nallowed_devices = [0]\n", gpus="4x24GiB"),
    "no-devices-left": check("[gpu]\nvisible_devices = [0]\n[ceiling]\nallowed_devices = []\n"),
    "outside-ceiling": check("[gpu]\nvisible_devices = [3]\n[ceiling]\nallowed_devices = [0, 1]\n"),
    "clamped": explain('[gpu]\nmemory_limit = "16GiB"\n[ceiling]\nmemory_limit = "8GiB"\n'),
    "no-share": explain('[gpu]\nmemory_limit = "granted"\n', env=SHARDS),
    "above-ceiling": check('[gpu]\nmemory_limit = "16GiB"\n[ceiling]\nmemory_limit = "8GiB"\n'),
    "above-card": check('[gpu]\nmemory_limit = "80GiB"\n', gpus="4x24GiB"),
    "unsupported": Run(
        {"tfgpu.toml": '[gpu]\nmemory_limit = "8GiB"\n'},
        ("run", "./train"),
        # What a program made by PyInstaller ends with.
        prepare=r"cp /bin/true train && printf 'MEI\014\013\012\013\016' >> train",
    ),
    "disable-refused": explain("[gpu]\nmemory_growth = true\n", env={"TFGPU_DISABLE": "true"}),
    "open-log-directory": check_machine('[audit]\nfile = "/tmp/tfgpu-<uid>.jsonl"\n'),
    "unknown-user": check_machine("[user.allice.gpu]\n"),
    "unknown-group": check_machine("[group.studnets.gpu]\n"),
    "empty-group": check_machine(f"[group.{EMPTY_GROUP}.gpu]\n", names={EMPTY_GROUP: "students"}),
    "unreachable-table": check_machine('[project."/srv/vison".gpu]\n'),
    "partly-reachable": check_machine(
        "[group.bin.gpu]\n", "groups/daemon.toml", names={"bin": "students", "daemon": "staff"}
    ),
    "never-counts": check_machine(
        '[[gpu.device]]\nmatch = "name:*"\nmemory_limit = "8GiB"\n'
        '[[gpu.device]]\nmatch = "name:*H200*"\nmemory_limit = "60GiB"\n'
    ),
    "many-tables": check_machine("".join(f"[user.u{number}.gpu]\n" for number in range(101))),
}  # fmt: skip
NEEDS_ROOT = ("untrusted-owner", "open-log-directory")


def perform(run: Run, folder: Path) -> list[str]:
    """Return the lines that the command prints, with names as on the page."""
    folder.mkdir()
    for name, text in run.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    subprocess.run(f"chmod -R u=rwX,go=rX . && {run.prepare}", shell=True, cwd=folder, check=True)
    ours = ("TFGPU_", "TF_", "CUDA_", "SLURM_", "XDG_", "NO_COLOR")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    env |= {"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": f"{folder}/config", "XDG_STATE_HOME": f"{folder}/state"}
    if run.gpus:
        env = build_environment(parse_gpus(run.gpus), base=env)
    done = subprocess.run(
        [sys.executable, "-m", "tfenv", *run.arguments],
        cwd=folder, env=env | dict(run.env), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    text = (done.stdout + done.stderr).replace(str(folder), "/home/alice/project")
    text = re.sub(r"(?<!/)\betc/", "/etc/tfgpu/", text)
    for name, other in run.names.items():
        text = text.replace(name, other)
    return [line.strip() for line in text.splitlines()]


def make_toml_error() -> Exception:
    with pytest.raises(tomli.TOMLDecodeError) as caught:
        tomli.loads("=")
    return caught.value


def compare(code: str, lines: Sequence[str]) -> None:
    """Compare a message with the example, or write it there."""
    found = next((line for line in lines if f"{code}]" in line or line.startswith(f"{code}:")), None)
    assert found is not None, "\n".join(lines)
    if WRITES_EXAMPLES:
        text = TABLE.read_text(encoding="utf-8")
        pattern = rf'(code = "{code}"\n(?:.*\n){{1,2}}example = \'\'\').*\'\'\'\n'
        text, count = re.subn(pattern, lambda match: f"{match[1]}{found}'''\n", text)
        assert count == 1
        TABLE.write_text(text, encoding="utf-8")
    else:
        assert found == read_messages()[code]["example"]


@pytest.mark.parametrize("code", RUNS)
def test_an_example_is_what_people_see(code: str, tmp_path: Path) -> None:
    """The command prints the message, word for word as on the page."""
    if code in NEEDS_ROOT and os.geteuid() != 0:
        pytest.skip("only root gives files away, and sees this")
    if code == "empty-group" and not EMPTY_GROUP:
        pytest.skip("no group here is empty")
    if code == "no-inventory" and "libnvidia-ml" not in str(read_inventory().problem):
        pytest.skip("NVML is here")
    if code == "syntax" and not hasattr(make_toml_error(), "colno"):
        pytest.skip("this tomli has no column")
    compare(code, perform(RUNS[code], tmp_path / "project"))


# ---- what no command shows


def format_example(findings: Sequence[Finding]) -> list[str]:
    return [f"{finding} [{finding.severity} {finding.code}]" for finding in findings]


def lose_lease(tmp_path: Path, *, to_another: bool) -> list[str]:
    """A process whose lease is removed, with or without somebody who takes the GPU meanwhile."""
    plan, requester = make_plan(limit=16 * GIB), make_requester()
    made = allocate_gpus(plan, INVENTORY, requester)
    assert made.choice is not None
    assert made.choice.lease is not None
    (tmp_path / "log.leases" / made.choice.lease).unlink()
    if to_another:
        fill(16 * GIB)
    again = renew_lease(made.choice, plan, requester)
    assert again is not None
    return format_example(again.findings)


def go_without_lease(tmp_path: Path) -> list[str]:
    """A file where the directory of leases should be."""
    (tmp_path / "log.leases").write_text("in the way")
    made = allocate_gpus(make_plan(), INVENTORY, make_requester())
    return [line.replace(f"{tmp_path}/log.leases", "/run/lock/tfgpu") for line in format_example(made.findings)]


def find_busy_gpus(when_busy: str) -> list[str]:
    fill(20 * GIB, 22 * GIB)
    made = allocate_gpus(make_plan(when_busy, 8 * GIB), INVENTORY, make_requester())
    return name_alice(format_example(made.findings))


def name_alice(lines: Sequence[str]) -> list[str]:
    """Put a program of alice's in the place of this one."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    return [re.sub(rf"{user} \(pid \d+[^)]*\)", "alice (pid 4101 train.py)", line) for line in lines]


def write_log(path: str, shown: str) -> list[str]:
    """Write a record to a log that cannot be written."""
    sinks = AuditSinks(stderr="none", files=(path,), default_file=False)
    log = AuditLog(sinks, home=None, uid=os.geteuid())
    log.open_now()
    log.emit(make_disabled_record(RecordContext(ProcessFacts.collect(), Subject("alice", 1000), Grant(), (), {})))
    return [line.replace(path, shown) for line in format_example(log.findings)]


def list_fewer_gpus() -> list[str]:
    uuids = [f"a{number}fa4e00000040008000000000000000" for number in range(2)]
    devices = [Device(number, f"GPU-{uuid}", "Card", GIB) for number, uuid in enumerate(uuids)]
    plan = Plan(devices=tuple(PlannedDevice(str(device.index), device) for device in devices))
    remark = place(plan, [0], uuids, lambda _: plan, "TensorFlow").remark
    return format_example([remark] if remark else [])


def spend_budget() -> list[str]:
    origin = Origin("project", "tfgpu.toml", ("gpu", "memory_limit"))
    limit = MemoryLimit(bytes=8 * GIB)
    plan = Plan(limit=limit, limited_by=(origin,))
    book = BudgetBook().record(Claimant("torch", "PyTorch"), {"": limit})
    return format_example(book.fit(plan, None, EffectivePolicy(), Claimant("tensorflow", "TensorFlow")).findings)


def report_unknown_size() -> list[str]:
    plan = Plan(limit=MemoryLimit(bytes=8 * GIB, fraction=0.5))
    finding = report_unknown_memory(plan, Placement(None))
    return format_example([finding] if finding else [])


def fail_in_emergency(tmp_path: Path) -> list[str]:
    """What a process says that cannot load tfenv's dependencies."""
    error = "ModuleNotFoundError(\"No module named 'tomli'\")"
    program = f"from tfenv.runtime.emergency import handle; handle({error}, 'tensorflow', 'warn')"
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


def find_mistake_without_jsonschema() -> list[str]:
    source = Source("project", "tfgpu.toml")
    document = Document(source, {"gpu": {"memory_limit": 8}}, "", "[gpu]\nmemory_limit = 8\n", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "jsonschema", None)
        lines = format_example(validate(document)[1])
    return [re.sub(r"import of .* in sys.modules", "No module named 'jsonschema'", line) for line in lines]


def give_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine's file without the number of shards, beside a Slurm that gives some."""
    slurm = folder / "slurm.conf"
    slurm.write_text("GresTypes=gpu,shard\n")
    monkeypatch.setenv("SLURM_CONF", str(slurm))
    text = '[ceiling]\nmemory_limit = "granted"\n'
    document = read(Source("machine", "/etc/tfgpu/tfgpu.toml", text=text), Trust(0))
    findings = advise([validate(document)[0]], [document])
    return [line.replace(str(slurm), "/etc/slurm/slurm.conf") for line in format_example(findings)]


def require_syslog() -> list[str]:
    if os.path.exists("/dev/log"):
        pytest.skip("syslog is here")
    document = read(Source("machine", "/etc/tfgpu/tfgpu.toml", text="[audit]\nsyslog = true\n"), Trust(0))
    return format_example(advise([validate(document)[0]], [document]))


def wait_for_gpu() -> list[str]:
    fill(20 * GIB, 22 * GIB)
    plan = make_plan("wait", 8 * GIB, timeout_s=0.7)
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        allocate_gpus(plan, INVENTORY, make_requester(on_error="fail"))
    return name_alice(shown.getvalue().splitlines())


def import_another_tensorflow(tmp_path: Path) -> list[str]:
    """A package that has none of the functions that tfenv wraps."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("")
    (tmp_path / "tfgpu.toml").write_text('[gpu]\nmemory_limit = "8GiB"\n[audit]\nfile = "log.jsonl"\n')
    program = "import tfenv; tfenv.apply(); import tensorflow"
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    ).stderr.splitlines()


def run_beside_our_name(tmp_path: Path) -> list[str]:
    """A program with a file called tfenv.py beside it."""
    (tmp_path / "tfenv.py").write_text("")
    return run(tmp_path).stderr.replace(str(tmp_path), "/home/alice/project").splitlines()


def come_near_to_an_end() -> list[str]:
    """Check a table ten days before its end."""
    source = Source("machine", "/etc/tfgpu/tfgpu.toml", text='[user.alice]\nexpires = 2027-01-31\nreason = "thesis"\n')
    document = read(source, Trust(0))
    layer, _ = validate(document, "2027-01-21")
    return format_example(advise([layer], [document], today="2027-01-21"))


LIVE: dict[str, Callable[[Path], list[str]]] = {
    "incomplete-install": lambda _: find_mistake_without_jsonschema(),
    "no-syslog": lambda _: require_syslog(),
    "waiting": lambda _: wait_for_gpu(),
    "name-taken": run_beside_our_name,
    "degraded": import_another_tensorflow,
    "expires-soon": lambda _: come_near_to_an_end(),
    "no-free-gpu": lambda _: find_busy_gpus("cpu"),
    "shared-gpu": lambda _: find_busy_gpus("share"),
    "no-lease": go_without_lease,
    "lease-lost": lambda folder: lose_lease(folder, to_another=True),
    "lease-renewed": lambda folder: lose_lease(folder, to_another=False),
    "fewer-gpus": lambda _: list_fewer_gpus(),
    "budget-spent": lambda _: spend_budget(),
    "unknown-memory": lambda _: report_unknown_size(),
    "internal-error": fail_in_emergency,
    "log-not-written": lambda _: write_log("/proc/tfgpu/audit.jsonl", "/srv/logs/audit.jsonl"),
    "refused-log": lambda folder: write_log(str(folder), "/srv/logs"),
    "no-default-log": lambda _: format_example(AuditLog(AuditSinks(stderr="none"), home=None, uid=12345).findings),
}


def test_the_example_of_shards_is_what_check_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finding has the words of the page, on a machine whose Slurm gives shards."""
    compare("no-shards-per-gpu", give_shards(tmp_path, monkeypatch))


@pytest.mark.parametrize("code", LIVE)
def test_an_example_is_what_programs_say(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finding has the words of the page."""
    monkeypatch.setenv("TFGPU_SIMULATE", "count=2")
    monkeypatch.setenv("TFGPU_SIMULATE_LOG", str(tmp_path / "log"))
    compare(code, LIVE[code](tmp_path))


# ---- what TensorFlow has to do with

OPEN = 'import tensorflow as tf; tf.config.list_logical_devices("GPU")\n'
LATE = f"import sys; sys.path += {sys.path!r}\n{OPEN}import tfenv; tfenv.apply()\n"
STALE = f"from tests.launchers.small_ray import assign\nassign('0')\n{OPEN}assign('1')\n"


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("code", "gpus", "program"),
    [
        pytest.param("no-gpu", "", OPEN, marks=pytest.mark.exhaustive),
        ("too-late", "4x24GiB", LATE),
        pytest.param("stale-devices", "4x24GiB", STALE, marks=pytest.mark.exhaustive),
    ],
)
def test_an_example_is_what_people_see_of_tensorflow(
    code: str, gpus: str, program: str, tmp_path: Path, simulated_gpus: SimulatedGpus
) -> None:
    """The line on stderr has the words of the page."""
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("TensorFlow is not installed")
    if not gpus and "libnvidia-ml" not in str(read_inventory().problem):
        pytest.skip("NVML is here")
    (tmp_path / "tfgpu.toml").write_text('[gpu]\nmemory_limit = "8GiB"\n[audit]\nfile = "audit.jsonl"\n')
    env = simulated_gpus(gpus) if gpus else {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, *(["-S"] if code == "too-late" else []), "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=True)
    compare(code, done.stderr.splitlines())
