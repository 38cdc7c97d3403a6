"""A case gets what a process gets, and a failure says what was expected, what it got, and who decided it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policy import values
from tfenv.launchers.grant import read_grant
from tfenv.launchers.parent import split_tokens
from tfenv.pipeline import LoadedPolicy, decide
from tfenv.policy.merge import merge
from tfenv.policy.model import Inventory, MemoryLimit, Start
from tfenv.policy_tests.launch import build_environment
from tfenv.policy_tests.load import PolicyLoader
from tfenv.policy_tests.model import Case, CaseResult, Expectation, Suite
from tfenv.policy_tests.read import read_suite
from tfenv.policy_tests.run import compare_case, run_suites
from tfenv.simulate.environment import parse_gpus
from tfenv.simulate.inventory import list_devices
from tfenv.values import replace

MACHINE = """\
[gpu]
visible_devices = { count = 1 }
memory_limit = "20GiB"

[ceiling]
allowed_devices = ["GPU-a0fa4e00", "GPU-a1fa4e00", "GPU-a2fa4e00"]
max_devices = 2
memory_limit = "50%"

[user.alice]
expires = 2027-03-01
reason = "thesis"

[user.alice.ceiling]
max_devices = 3

[observe.ceiling]
memory_limit = "10GiB"
"""
FILES = {"tfgpu.toml": MACHINE, "groups/students.toml": '[ceiling]\nmemory_limit = "8GiB"\n'}
HEAD = '[defaults]\ngpus = "4x80GiB"\ntoday = 2027-02-01\n[[case]]\nname = "a"\n'


def run(folder: Path, case: str, files: dict[str, str] | None = None) -> CaseResult:
    """Run one case beside a machine's policy."""
    for name, text in (FILES if files is None else files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "a.test.toml").write_text(HEAD + case)
    result = run_suites([read_suite(str(folder / "a.test.toml"))])
    assert result.findings == ()
    (found,) = result.results
    return found


PASSING = {
    "count": "expect.devices = 1",
    "candidates": "user_file.gpu.visible_devices = [1, 2]\nexpect.devices = [1, 2]",
    "uuids": 'user_file.gpu.visible_devices = [1]\nexpect.devices = ["GPU-a1fa4e00"]',
    "percent": 'user_file.gpu.memory_limit = "none"\nexpect.memory_limit = "50%"',
    "bytes of a percentage": 'user_file.gpu.memory_limit = "none"\nexpect.memory_limit = "40GiB"',
    "a list of limits": 'user_file.gpu.visible_devices = [1, 2]\nexpect.memory_limit = ["20GiB", "20GiB"]',
    "a group": 'groups = ["other", "students"]\nexpect.memory_limit = "8GiB"',
    "an exception": 'user = "alice"\nuser_file.gpu.visible_devices = "all"\nexpect.devices = 3',
    "its end": 'user = "alice"\ntoday = 2027-03-01\nuser_file.gpu.visible_devices = "all"\nexpect.devices = 2',
    "observed": 'expect.memory_limit = "20GiB"\nexpect.observed = { memory_limit = "10GiB", devices = 1 }',
    "a grant": "grant = [2]\nexpect.devices = [2]",
    "a grant by UUID": 'grant = ["GPU-a2fa4e00"]\nexpect.devices = [2]',
    "no grant": "grant = []\nexpect.devices = []",
    "a job": 'launcher = "Slurm"\ngrant = [1]\nexpect.devices = [1]',
    "a wish": 'cuda_visible_devices = "1"\nexpect.devices = 1',
    "a wish for none": 'cuda_visible_devices = ""\nexpect.devices = []',
    "a project": "project_file.gpu.visible_devices = [0]\nexpect.devices = [0]",
    "no findings": "expect.findings = []",
    "findings": 'user_file.gpu.memory_limit = "70GiB"\nexpect.findings = ["clamped"]',
    "a mistake of a user": 'user_file.gpu.memory_limt = "1GiB"\nexpect.findings = ["unknown-key"]',
    "refused": 'user_file = {on_error = "fail", gpu = {visible_devices = [7]}}\nexpect = {refused = true, devices = 0}',
    "no driver": 'gpus = "none"\nexpect.devices = []',
    "growth": "expect.memory_growth = false",
    "an allocator": 'expect.allocator = "bfc"',
    "no total": 'expect.memory_total = "none"',
}  # fmt: skip


@pytest.mark.parametrize("case", PASSING.values(), ids=PASSING)
def test_what_is_as_expected_passes(case: str, tmp_path: Path) -> None:
    """Each key can say what a process gets."""
    assert run(tmp_path, case).differences == ()


FAILING = {
    "count": ("expect.devices = 2", "devices", "2 GPUs", "1 of 0, 1, 2",
              ["ceiling.allowed_devices", "gpu.visible_devices"]),
    "which": (
        "user_file.gpu.visible_devices = [1]\nexpect.devices = [0]", "devices", "0", "1",
        ["ceiling.allowed_devices", "gpu.visible_devices"],
    ),
    "order": ("user_file.gpu.visible_devices = [2, 1]\nexpect.devices = [1, 2]", "devices", "1, 2", "2, 1",
              ["ceiling.allowed_devices", "gpu.visible_devices"]),
    "limit": ('expect.memory_limit = "8GiB"', "memory_limit", "8.0 GiB", "20.0 GiB", ["gpu.memory_limit"]),
    "percent": ('user_file.gpu.memory_limit = "none"\nexpect.memory_limit = "25%"', "memory_limit", "25%",
                "40.0 GiB (50%)", ["ceiling.memory_limit"]),
    "unlimited": ('expect.memory_limit = "none"', "memory_limit", "no limit", "20.0 GiB", ["gpu.memory_limit"]),
    "nearly": ('expect.memory_limit = "20481MiB"', "memory_limit", "21475885056 bytes", "21474836480 bytes",
               ["gpu.memory_limit"]),
    "group": ('groups = ["students"]\nexpect.memory_limit = "20GiB"', "memory_limit", "20.0 GiB", "8.0 GiB",
              ["ceiling.memory_limit"]),
    "growth": ("expect.memory_growth = true", "memory_growth", "true", "false (the program decides)", []),
    "allocator": ('expect.allocator = "none"', "allocator", "none", "bfc", ["gpu.memory_limit"]),
    "findings": ('user_file.gpu.memory_limit = "70GiB"\nexpect.findings = []', "findings", "none", "clamped", []),
    "refused": ("expect.refused = true", "refused", "refused", "not refused", []),
    "observed": ('expect.observed.memory_limit = "20GiB"', "observed.memory_limit", "20.0 GiB", "10.0 GiB",
                 ["observe.ceiling.memory_limit"]),
    "no GPU": ('grant = []\nexpect.memory_limit = "20GiB"', "memory_limit", "20.0 GiB", "no GPU", []),
}  # fmt: skip


@pytest.mark.parametrize(("case", "key", "expected", "got", "keys"), FAILING.values(), ids=FAILING)
def test_a_failure_says_why(case: str, key: str, expected: str, got: str, keys: list[str], tmp_path: Path) -> None:
    """It has both values, and the keys that decided."""
    result = run(tmp_path, case)
    (difference,) = result.differences
    assert (difference.key, difference.expected, difference.got) == (key, expected, got)
    assert [decided.key for decided in difference.decided_by] == keys
    assert result.line == HEAD[: HEAD.index("[[case]]")].count("\n") + 1


def test_the_deciding_lines_are_those_of_the_files(tmp_path: Path) -> None:
    """Each key has its file and line: the machine's, the group's, and of tables in the case the file of tests."""
    result = run(tmp_path, 'groups = ["students"]\nexpect.memory_limit = "1GiB"')
    (decided,) = result.differences[0].decided_by
    assert (decided.path, decided.line, decided.value) == (str(tmp_path / "groups/students.toml"), 2, "8GiB")
    result = run(tmp_path, '[case.user_file.gpu]\nmemory_limit = "2GiB"\n[case.expect]\nmemory_limit = "1GiB"')
    (decided,) = result.differences[0].decided_by
    assert (decided.path, decided.line, decided.value) == (str(tmp_path / "a.test.toml"), 7, "2GiB")


def test_a_refusal_tells_its_reasons(tmp_path: Path) -> None:
    """Where a process gets no GPU, what was found is told beside it, with its place."""
    case = (
        '[case.user_file]\non_error = "fail"\n[case.user_file.gpu]\nvisible_devices = [7]\n[case.expect]\ndevices = [0]'
    )
    (difference,) = run(tmp_path, case).differences
    assert difference.got == "refused"
    (finding,) = difference.findings
    assert (finding.code, finding.path, finding.line) == ("no-overlap", str(tmp_path / "a.test.toml"), 9)


def test_a_mistake_in_the_policy_is_told_once(tmp_path: Path) -> None:
    """An error in a file of the policy fails the run, however many cases there are, and whatever they expect."""
    (tmp_path / "tfgpu.toml").write_text('[gpu]\nmemory_limit = "8 gigs"\nmemory_growth = true\n')
    cases = "".join(f'[[case]]\nname = "{n}"\ngpus = "24GiB"\nexpect.memory_growth = true\n' for n in range(3))
    (tmp_path / "a.test.toml").write_text(cases)
    result = run_suites([read_suite(str(tmp_path / "a.test.toml"))])
    assert [found.differences for found in result.results] == [(), (), ()]
    assert [(finding.code, finding.line) for finding in result.findings] == [("invalid-value", 2)]


def test_project_files_may_be_forbidden(tmp_path: Path) -> None:
    """Under `allow_project_files = false` a project's file says nothing, in a test as in a process."""
    files = {"tfgpu.toml": "[machine]\nallow_project_files = false\n", "users/a.toml": ""}
    case = "project_file.gpu.visible_devices = [0]\nuser_file.gpu.memory_growth = true\nexpect.devices = 4\n"
    assert run(tmp_path, f"{case}expect.memory_growth = true", files).differences == ()


def test_a_policy_that_others_can_write_is_tested_all_the_same(tmp_path: Path) -> None:
    """A checkout has whatever permissions git and the umask give it. `tfgpu check` looks at those."""
    run(tmp_path, "expect.devices = 1")
    (tmp_path / "tfgpu.toml").chmod(0o666)
    assert run(tmp_path, "expect.devices = 1").differences == ()


def test_a_file_of_the_case_may_be_a_path(tmp_path: Path) -> None:
    """A path is relative to the file of tests. A project's is the project's directory, too."""
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision/tfgpu.toml").write_text("[gpu]\nvisible_devices = [2]\n")
    assert run(tmp_path, 'project_file = "vision/tfgpu.toml"\nexpect.devices = [2]').differences == ()
    suite = read_suite(str(tmp_path / "a.test.toml"))
    assert suite.cases[0].subject.project == str(tmp_path / "vision")
    (tmp_path / "vision/tfgpu.toml").unlink()
    (finding,) = read_suite(str(tmp_path / "a.test.toml")).findings
    assert str(finding).endswith(':6:1: case[0].project_file: there is no "vision/tfgpu.toml"; correct the path')


def test_a_mistake_in_a_file_of_the_case_fails_it(tmp_path: Path) -> None:
    """A mistyped key would make a case pass for nothing. It is no mistake where the case expects the finding."""
    case = "[case.user_file.gpu]\nmemory_limt = '8GiB'\n[case.expect]\ndevices = 1"
    run(tmp_path, "expect.devices = 1")
    for text, codes in ((case, ["unknown-key"]), (f'{case}\nfindings = ["unknown-key"]', [])):
        (tmp_path / "a.test.toml").write_text(HEAD + text)
        result = run_suites([read_suite(str(tmp_path / "a.test.toml"))])
        assert [finding.code for finding in result.findings] == codes
        assert [(finding.path, finding.line) for finding in result.findings] in (
            [],
            [(str(tmp_path / "a.test.toml"), 7)],
        )


def test_an_expired_table_is_known_to_have_been(tmp_path: Path) -> None:
    """The policy of a case is all that a process's is, its exceptions too."""
    run(tmp_path, 'user = "alice"\nexpect.devices = 1')
    suite = read_suite(str(tmp_path / "a.test.toml"))
    loaded = PolicyLoader().load(suite, suite.cases[0])
    assert [(dated.name, dated.expires, dated.reason) for dated in loaded.exceptions] == [
        ("alice", "2027-03-01", "thesis")
    ]
    assert loaded.revision


# ---- the same as `decide`

INVENTORIES = [list_devices(parse_gpus(text)) for text in ("4x24GiB", "2x24GiB:A,80GiB:B", "80GiB/mig=2x20GiB:A")]
LAUNCHERS = st.sampled_from([None, "Slurm", "PBS", "LSF", "Flux", "Grid Engine", "Kubernetes", "Ray"])
GRANTS = st.none() | st.lists(st.integers(0, 4), max_size=3, unique=True)


def expect_all_of(loaded: LoadedPolicy, case: Case) -> Expectation:
    """Return the expectation that a process's own plan gives."""
    environment = case.environment
    grant, _ = read_grant(environment, environment, "")
    decision = decide(loaded, grant, case.inventory, split_tokens(case.request))
    plan, every = decision.plan, case.inventory.devices or ()
    planned = (
        plan.devices if plan.devices is not None else [replace(plan.find_device(9), device=each) for each in every]
    )
    devices = () if decision.refused else tuple(planned)
    names = tuple(each.device.uuid if each.device is not None else each.token for each in devices)
    codes = frozenset(finding.code for finding in (*loaded.findings, *plan.findings))
    limits = tuple(each.limit or MemoryLimit() for each in devices)
    return Expectation(
        devices=names if plan.choosing is None else min(plan.choosing.count, len(names)),
        memory_limit=limits or None,
        memory_growth=plan.growth is True,
        allocator=plan.allocator or "none",
        findings=codes,
        refused=decision.refused,
    )


@given(
    values.cases, st.sampled_from(INVENTORIES), LAUNCHERS, GRANTS, st.sampled_from([None, "", "0", "1,0", "7", "-1"])
)
def test_a_case_gets_what_a_process_gets(
    random: values.RandomCase, inventory: Inventory, launcher: str | None, grant: list[int] | None, request: str | None
) -> None:
    """Whatever the policy: what `decide` gives to a process passes, and a change of any value fails by that value."""
    policy = merge(random.layers, values.SUBJECT)
    loaded = LoadedPolicy(Start(cwd=None, uid=0), values.SUBJECT, layers=random.layers, policy=policy)
    environment = build_environment(launcher, grant, 1, inventory)
    case = Case("a", 0, values.SUBJECT, inventory, Expectation(), environment=environment, request=request)
    right = expect_all_of(loaded, case)
    wrong = {
        "devices": 99,
        "memory_limit": (MemoryLimit(bytes=7),),
        "memory_growth": not right.memory_growth,
        "allocator": "other",
        "findings": frozenset({"other"}),
        "refused": not right.refused,
    }
    suite = Suite("/a.test.toml")
    assert compare_case(suite, replace(case, expect=right), loaded) == ()
    for key, value in wrong.items():
        differences = compare_case(suite, replace(case, expect=replace(right, **{key: value})), loaded)
        assert [difference.key for difference in differences] == [key]


@given(LAUNCHERS, GRANTS, st.none() | st.integers(0, 9))
def test_a_launcher_is_recognised(launcher: str | None, grant: list[int] | None, rank: int | None) -> None:
    """What a case says of a launcher is read as a process reads it of a real one."""
    environment = build_environment(launcher, grant, rank, INVENTORIES[0])
    granted, _ = read_grant(environment, environment, "")
    assert granted.launcher == (launcher or "")
    assert granted.scheduler is (launcher is not None)
    assert granted.rank == rank
    if launcher != "Kubernetes" and grant:
        assert granted.tokens == tuple(map(str, grant))
