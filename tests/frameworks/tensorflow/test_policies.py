"""Each kind of policy, by what the driver was asked for; small ones change nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frameworks.harness import MIB, Case, Ended, Report, World, run_program
from tests.frameworks.tensorflow.test_ways_in import RAW, Reports

MIXED = "2x24GiB:NVIDIA A100,1x80GiB:NVIDIA H200"


def asked_of_driver(report: Report) -> list[tuple[str, int, int, str]]:
    """The requests themselves, without who made them."""
    return [(request.op, request.gpu, request.bytes, request.call) for request in report.requests]


# ---- a policy that sets one thing changes nothing else

VISIBLE = World("[gpu]\nvisible_devices = [1, 2]\n")
GROWTH = World("[gpu]\nmemory_growth = true\n")
LIMIT = World('[gpu]\nmemory_limit = "1000MiB"\n')
ABOVE = World('[gpu]\nmemory_limit = "80GiB"\n')
NOTHING = World("version = 1\n")
#: The first step without a policy.
_ONLY_1_AND_2 = "set_environment:CUDA_VISIBLE_DEVICES=1,2"

SAME = {
    "visible-eager": (
        Case(VISIBLE, ("eager",)),
        Case(
            RAW,
            (
                _ONLY_1_AND_2,
                "eager",
            ),
        ),
    ),
    "visible-mirrored": (
        Case(VISIBLE, ("mirrored",)),
        Case(
            RAW,
            (
                _ONLY_1_AND_2,
                "mirrored",
            ),
        ),
    ),
    "visible-session": (
        Case(VISIBLE, ("small_session:per_process_gpu_memory_fraction=1.5", "eager")),
        Case(RAW, (_ONLY_1_AND_2, "small_session:per_process_gpu_memory_fraction=1.5", "eager")),
    ),
    "visible-async": (
        Case(VISIBLE, ("small_session:use_cuda_malloc_async=1", "eager")),
        Case(RAW, (_ONLY_1_AND_2, "small_session:use_cuda_malloc_async=1", "eager")),
    ),
    "growth-eager": (Case(GROWTH, ("eager",)), Case(RAW, ("set_memory_growth", "eager"))),
    "growth-session": (
        Case(GROWTH, ("small_session:per_process_gpu_memory_fraction=0.4", "eager")),
        Case(RAW, ("small_session:per_process_gpu_memory_fraction=0.4+allow_growth=1", "eager")),
    ),
    "growth-mirrored": (Case(GROWTH, ("mirrored",)), Case(RAW, ("set_memory_growth", "mirrored"))),
    "limit-eager": (
        Case(LIMIT, ("eager",)),
        Case(RAW, ("set_logical_devices:1000;1000;1000;1000", "eager")),
    ),
    "limit-mirrored": (
        Case(LIMIT, ("mirrored",)),
        Case(RAW, ("set_logical_devices:1000;1000;1000;1000", "mirrored")),
    ),
    "limit-session": (
        Case(LIMIT, ("small_session:allow_growth=1", "eager")),
        Case(RAW, ("small_session:virtual_devices=1000|1000|1000|1000+allow_growth=1", "eager")),
    ),
    "above-the-card": (Case(ABOVE, ("eager",)), Case(RAW, ("eager",))),
    "nothing-said": (Case(NOTHING, ("eager",)), Case(RAW, ("eager",))),
}


@pytest.mark.parametrize("cases", [pytest.param(pair, id=name) for name, pair in SAME.items()])
def test_a_small_policy_changes_nothing_else(cases: tuple[Case, Case], reports: Reports) -> None:
    """The driver is asked exactly what raw TensorFlow asks where the program does by hand what the policy says."""
    ours, raw = (reports(case) for case in cases)
    assert ours.error is None, ours.stderr
    assert raw.error is None, raw.stderr
    assert raw.gpus
    assert asked_of_driver(ours) == asked_of_driver(raw)


UNCHANGED = (
    "small_session",
    "small_session:per_process_gpu_memory_fraction=1.5",
    "small_session:use_unified_memory=1",
    "small_session:virtual_devices=300|200",
    "small_session:visible_device_list=1,0",
    "small_session:num_virtual_devices_per_gpu=2",
)


@pytest.mark.parametrize("case", [pytest.param(Case(VISIBLE, (name,)), id=name) for name in UNCHANGED])
def test_a_policy_of_visibility_gives_what_was_asked(case: Case, reports: Reports) -> None:
    """Where only visibility is declared, a session's own ConfigProto goes on as it was written."""
    record = reports(case).passed("TF_NewSessionOptions")
    assert record["given"] == record["asked"]
    assert record["event"] == "policy_applied"


@pytest.mark.parametrize("case", [Case(ABOVE, ("list_local_devices",))], ids=["above"])
def test_a_limit_above_the_card_leaves_no_entry(case: Case, reports: Reports) -> None:
    """80 GiB on cards of 24: TensorFlow reports the sizes it reports by itself."""
    report = reports(case)
    assert report.visible == {4}
    assert "virtual_devices" not in report.passed("list_devices")["given"]
    assert report.results == [[23040] * 4]


# ---- percentages

PERCENT = World('[gpu]\nmemory_limit = "40%"\n')
PERCENT_GROWTH = World('[gpu]\nmemory_limit = "4%"\nmemory_growth = true\n')


@pytest.mark.matrix
@pytest.mark.parametrize("case", [Case(PERCENT, (way,)) for way in ("eager", "mirrored")], ids=str)
def test_a_percentage_is_a_share_of_the_card(case: Case, reports: Reports) -> None:
    """40 % of 24576 MiB are 9830.4 MiB, taken at once where growth is not declared."""
    report = reports(case)
    assert report.visible == {4}
    assert report.first_mib(0) == pytest.approx(9830.4, abs=0.1)
    assert report.records[-1]["given"]["per_process_gpu_memory_fraction"] == pytest.approx(0.4)
    assert "virtual_devices" not in report.records[-1]["given"]


@pytest.mark.parametrize(
    "case",
    [
        Case(PERCENT_GROWTH, steps)
        for steps in (
            ("eager", "take_all"),
            ("session",),
            ("session:per_process_gpu_memory_fraction=0.9",),
            ("session:virtual_devices=5000,5000|5000|5000|5000",),
            ("session:num_virtual_devices_per_gpu=2",),
            ("list_local_devices", "take_all"),
            ("set_logical_devices:5000", "take_all"),
        )
    ],
    ids=str,
)
def test_growth_and_a_percentage_hold_together(case: Case, reports: Reports) -> None:
    """4 % of 24576 MiB are 983.04 MiB: small at first, never more."""
    report = reports(case)
    assert report.error is None, report.stderr
    assert report.visible == {4}
    assert report.gpus
    for gpu in report.gpus:
        assert report.first_mib(gpu) == 2
        assert report.peak_mib(gpu) <= 983.1


@pytest.mark.parametrize("case", [Case(PERCENT_GROWTH, ("session:per_process_gpu_memory_fraction=0.02",))], ids=["2%"])
def test_a_smaller_fraction_than_the_percentage_stays(case: Case, reports: Reports) -> None:
    """A program that asks for 2 % under 4 % gets 2 %."""
    report = reports(case)
    assert 400 < report.peak_mib(0) <= 491.6


# ---- what a card does not give

#: As an NVIDIA H100 80GB HBM3 was measured, see docs/hardware.md. CUDA gives 81079 MiB of it.
H100 = ("TFGPU_SIMULATE", "count=1,memory_mib=81559,reserved_mib=480,context_mib=520,name=NVIDIA H100")


def _limited(policy: str) -> World:
    return World(f"[gpu]\nmemory_growth = false\n{policy}", inherited=(H100,))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(_limited('memory_limit = "45%"\n'), ("eager",)), id="a fraction of TensorFlow's"),
        pytest.param(
            Case(_limited('memory_limit = "45%"\n[ceiling]\nmemory_limit = "70GiB"\n'), ("eager",)), id="counted here"
        ),
    ],
)
def test_a_percentage_is_of_what_cuda_can_give(case: Case, reports: Reports) -> None:
    """45 % of an H100 are 36485 MiB, as on the real card, whoever computes it. Of NVML's total they were 36701."""
    report = reports(case)
    assert report.error is None, report.stderr
    assert int(report.first_mib(0)) == 36485


def test_two_halves_of_a_card_do_not_fit(tmp_path: Path) -> None:
    """A context lies beside each half. The second program is refused its own, and takes less, as on the real card."""
    held = tmp_path / "held"
    held.write_text("0 4711 41060\n")
    text = "import tensorflow as tf\ntf.zeros([8])\n"
    ended = run_program(_limited('memory_limit = "50%"\n'), text, tmp_path, TFGPU_SIMULATE_PROCESSES=str(held))
    assert ended.status == 0, ended.stderr
    asked = [(request.op, request.bytes // MIB) for request in ended.requests if request.gpu == 0]
    assert asked[:3] == [("context", 520), ("oom", 40539), ("alloc", 36485)]


# ---- GPUs that differ

RULES = World(
    '[gpu]\nmemory_growth = true\nmemory_limit = "1000MiB"\n'
    '[[gpu.device]]\nmatch = "name:*H200*"\nmemory_limit = "1500MiB"\n'
    '[[gpu.device]]\nmatch = 0\nmemory_limit = "500MiB"\n'
    '[[gpu.device]]\nmatch = "GPU-a1fa4e00"\nmemory_limit = "5%"\n',
    gpus=f"{MIXED},1x80GiB:NVIDIA B200",
)
PEAKS = {0: 500, 1: 1228, 2: 1500, 3: 1000}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(RULES, ("eager", "take_all")), marks=pytest.mark.matrix),
        Case(RULES, ("list_local_devices", "take_all")),
        Case(RULES, ("set_memory_growth", "eager", "take_all")),
        Case(RULES, ("set_logical_devices:9000;9000;9000;9000", "take_all")),
    ],
    ids=str,
)
def test_each_gpu_has_its_own_limit(case: Case, reports: Reports) -> None:
    """By position, UUID and name, on cards of different sizes; the first entry that matches counts, then the table."""
    report = reports(case)
    assert report.error is None, report.stderr
    assert report.visible == {4}
    assert {gpu: int(report.peak_mib(gpu)) for gpu in report.gpus} == PEAKS
    assert all(report.first_mib(gpu) == 2 for gpu in PEAKS)


#: CUDA's first is the second card, unless it is told to count as nvidia-smi does.
UNLIKE = "1x24GiB:NVIDIA T4,1x80GiB:NVIDIA H200"
BY_POSITION = World(
    "[gpu]\nmemory_growth = true\n"
    '[[gpu.device]]\nmatch = 0\nmemory_limit = "1000MiB"\n'
    '[[gpu.device]]\nmatch = "name:*H200*"\nmemory_limit = "2000MiB"\n',
    gpus=UNLIKE,
)
BY_NAME = World(
    "[gpu]\nmemory_growth = true\n"
    '[[gpu.device]]\nmatch = "name:*T4*"\nmemory_limit = "1000MiB"\n'
    '[[gpu.device]]\nmatch = "name:*H200*"\nmemory_limit = "2000MiB"\n',
    gpus=UNLIKE,
    inherited=(("CUDA_VISIBLE_DEVICES", "0,1"),),
)
BY_NAME_ALLOWED = World(
    '[gpu]\nvisible_devices = [0, 1]\nmemory_growth = true\nmemory_limit = "1000MiB"\n'
    '[[gpu.device]]\nmatch = "name:*H200*"\nmemory_limit = "2000MiB"\n',
    gpus=UNLIKE,
    inherited=BY_NAME.inherited,
)


@pytest.mark.parametrize(
    ("case", "first"),
    [
        pytest.param(Case(BY_POSITION, ("eager", "take_all")), 0, id="no list"),
        pytest.param(
            Case(BY_POSITION, ("set_environment:CUDA_VISIBLE_DEVICES=1,0", "eager", "take_all")), 0, id="the program's"
        ),
        pytest.param(Case(BY_NAME, ("eager", "take_all")), 1, id="inherited"),
        pytest.param(Case(BY_NAME_ALLOWED, ("eager", "take_all")), 1, id="inherited-governed"),
    ],
)
def test_unlike_cards_keep_their_own_limits(case: Case, first: int, reports: Reports) -> None:
    """A position is the same card to the policy and to TensorFlow. Where CUDA's order stays, its UUIDs tell."""
    report = reports(case)
    assert report.error is None, report.stderr
    assert report.visible == {2}
    assert {gpu: report.peak_mib(gpu) for gpu in report.gpus} == {0: 1000, 1: 2000}
    small, large = (report.results[-1][place] for place in (first, 1 - first))
    assert small < 1000 < large
    assert "unlimited" not in report.ours[0]


SPLIT = World(
    "[gpu]\nvisible_devices = [1]\nmemory_growth = true\n"
    '[[gpu.device]]\nmatch = 1\nmemory_limit = "1000MiB"\nlogical_devices = ["600MiB", "300MiB"]\n'
)


@pytest.mark.parametrize("case", [Case(SPLIT, ("list_logical_devices", "take_all"))], ids=["split"])
def test_logical_devices_split_a_gpu(case: Case, reports: Reports) -> None:
    """One GPU shows as two, of 600 and 300 MiB."""
    report = reports(case)
    assert report.visible == {1}
    assert report.results[0] == ["/device:GPU:0", "/device:GPU:1"]
    assert [400 <= report.results[1][0] <= 600, 200 <= report.results[1][1] <= 300] == [True, True]
    assert report.peak_mib(1) <= 900


ALLOCATORS = {"cuda_malloc_async": "cuMemAllocFromPoolAsync", "cuda_malloc": "cuMemAlloc"}


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(
            (
                Case(World(f'[gpu]\nallocator = "{name}"\n'), ("eager",)),
                Case(RAW, (f"set_environment:TF_GPU_ALLOCATOR={name}", "eager")),
            ),
            id=name,
            marks=[] if name == "cuda_malloc_async" else [pytest.mark.exhaustive],
        )
        for name in ALLOCATORS
    ],
)
def test_the_allocator_is_what_the_policy_says(cases: tuple[Case, Case], reports: Reports) -> None:
    """`allocator` has the effect of TF_GPU_ALLOCATOR, and no other."""
    ours, raw = (reports(case) for case in cases)
    assert raw.gpus
    assert raw.first_mib(0) != 23040
    assert asked_of_driver(ours) == asked_of_driver(raw)


@pytest.mark.parametrize(
    "case",
    [Case(World('[gpu]\nallocator = "cuda_malloc_async"\nmemory_limit = "1000MiB"\n'), ("eager", "take_all"))],
    ids=["limited"],
)
def test_a_limit_implies_bfc(case: Case, reports: Reports) -> None:
    """The cuda_malloc allocators keep no limit, so that a limit turns them off."""
    report = reports(case)
    assert report.visible == {4}
    assert {request.call for request in report.requests if request.op == "alloc"} == {"cuMemAlloc"}
    assert report.peak_mib(0) == 1000


# ---- on_error

IMPORT_TWICE = """
for attempt in range(2):
    try:
        try:
            import tensorflow
        except ImportError:
            print("swallowed")
        else:
            print("imported")
    except RuntimeError as error:
        print(type(error).__name__, type(error).__mro__[1].__name__, error)
"""

EAGER = """
import tensorflow as tf
print(len(tf.config.list_physical_devices("GPU")), tf.zeros([8]).device[-5:])
"""

#: Wrong at the import already, and wrong once the GPUs are counted: there are two, the policy wants the tenth.
BAD_KEY = '[gpu]\nmemory_limit = "lots"\n'
NO_SUCH_GPU = "[gpu]\nvisible_devices = [9]\n"


def run(policy: str, text: str, folder: Path, gpus: str = "2x24GiB", **variables: str) -> Ended:
    return run_program(World(policy, gpus=gpus), text, folder, **variables)


@pytest.mark.matrix
def test_fail_raises_policy_error_at_every_import(tmp_path: Path, needs_tensorflow: None) -> None:
    """`on_error = "fail"`: PolicyError, which `except ImportError` does not swallow, also on the second try."""
    ended = run(f'on_error = "fail"\n{BAD_KEY}', IMPORT_TWICE, tmp_path)
    lines = ended.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("PolicyError TfenvError")
        assert "tfgpu.toml:3:" in line
    assert ended.requests == ()
    assert {record["event"] for record in ended.records} == {"policy_failed"}


def test_fail_raises_at_the_first_listing_what_only_shows_there(tmp_path: Path, needs_tensorflow: None) -> None:
    """A GPU that is not there shows once NVML is asked: PolicyError then, again and again, and no device is created."""
    text = """
import tensorflow as tf
for call in (tf.config.list_physical_devices, lambda: tf.zeros([8]), tf.compat.v1.Session):
    try:
        print(call())
    except RuntimeError as error:
        print(type(error).__name__)
"""
    ended = run(f'on_error = "fail"\n{NO_SUCH_GPU}', text, tmp_path)
    assert ended.stdout.splitlines() == ["PolicyError"] * 3
    assert [request for request in ended.requests if request.op == "alloc"] == []


def test_fail_with_a_file_that_is_fine_raises_nothing(tmp_path: Path, needs_tensorflow: None) -> None:
    """`on_error = "fail"` is about errors: without one the program runs."""
    ended = run('on_error = "fail"\n[gpu]\nvisible_devices = [1]\n', EAGER, tmp_path)
    assert ended.stdout == "1 GPU:0\n"
    assert {request.gpu for request in ended.requests if request.op == "alloc"} == {1}


def test_cpu_leaves_no_gpu_visible(tmp_path: Path, needs_tensorflow: None) -> None:
    """`on_error = "cpu"`: no GPU is visible, the program runs, and stderr says NO GPU."""
    ended = run(f'on_error = "cpu"\n{NO_SUCH_GPU}', EAGER, tmp_path)
    assert (ended.status, ended.stdout) == (0, "0 CPU:0\n")
    assert [request for request in ended.requests if request.op != "cuInit"] == []
    assert any("NO GPU" in line for line in ended.ours)


def test_warn_keeps_the_gpus_and_says_so(tmp_path: Path, needs_tensorflow: None) -> None:
    """`on_error = "warn"`: the GPUs stay, and the one line on stderr has the finding with its place."""
    ended = run(NO_SUCH_GPU, EAGER, tmp_path)
    assert (ended.status, ended.stdout) == (0, "2 GPU:0\n")
    assert len(ended.ours) == 1
    assert "tfgpu.toml:2:" in ended.ours[0]


# ---- a TensorFlow whose entry points are elsewhere

MOVED = """
import os
from tfenv.frameworks.tensorflow import entry_points
moved = os.environ["MOVED"]
entry_points.ENTRY_POINTS = tuple((m, "TFE_Moved" if name == moved else name) for m, name in entry_points.ENTRY_POINTS)
"""

GREEDY = """
import tensorflow as tf
print(len(tf.config.list_physical_devices("GPU")))
tf.zeros([8])
try:
    tf.zeros([1200, 262144])
except tf.errors.ResourceExhaustedError:
    print("refused")
"""


@pytest.mark.parametrize(
    "entry_point",
    ["TFE_ContextOptionsSetConfig", pytest.param("TF_ListPhysicalDevices", marks=pytest.mark.exhaustive)],
)
def test_a_missing_entry_point_is_degraded_and_the_public_calls_apply(
    entry_point: str, tmp_path: Path, needs_tensorflow: None
) -> None:
    """Without an entry point tf.config sets the limit, the environment visibility, and the record says degraded."""
    policy = '[gpu]\nvisible_devices = [1]\nmemory_limit = "1000MiB"\n'
    ended = run(policy, MOVED + GREEDY, tmp_path, MOVED=entry_point)
    assert (ended.status, ended.stdout) == (0, "1\nrefused\n"), ended.stderr
    allocations = [request for request in ended.requests if request.op == "alloc"]
    assert [(request.gpu, request.bytes // MIB) for request in allocations] == [(1, 1000)]
    assert "degraded" in {record.get("status") for record in ended.records}


def test_a_missing_entry_point_fails_where_the_policy_asks_for_that(tmp_path: Path, needs_tensorflow: None) -> None:
    """`on_error = "fail"`: a TensorFlow that cannot be governed is not imported."""
    policy = 'on_error = "fail"\n[gpu]\nmemory_limit = "1000MiB"\n'
    ended = run(policy, MOVED + GREEDY, tmp_path, MOVED="TFE_ContextOptionsSetConfig")
    assert ended.status == 1
    assert "PolicyError" in ended.stderr
    assert ended.requests == ()


def test_a_missing_entry_point_leaves_no_gpu_where_the_policy_asks_for_that(
    tmp_path: Path, needs_tensorflow: None
) -> None:
    """`on_error = "cpu"`: the program runs without a GPU, and the first word on stderr is what is missing."""
    policy = 'on_error = "cpu"\n[gpu]\nvisible_devices = [1]\nmemory_limit = "1000MiB"\n'
    ended = run(policy, MOVED + EAGER, tmp_path, MOVED="TFE_ContextOptionsSetConfig")
    assert (ended.status, ended.stdout) == (0, "0 CPU:0\n"), ended.stderr
    assert [request for request in ended.requests if request.op != "cuInit"] == []
    assert ended.ours[0].startswith("tfgpu: this TensorFlow has no ")


#: The modules of a TensorFlow to come may be read-only.
BROKEN = """
from tfenv.frameworks.tensorflow import entry_points
def refuse(*_): raise AttributeError("read-only module")
entry_points._replace = refuse
"""


@pytest.mark.parametrize(
    ("on_error", "printed"),
    [("warn", "2 GPU:0"), pytest.param("cpu", "0 CPU:0", marks=pytest.mark.exhaustive), ("fail", None)],
)
def test_an_error_while_entry_points_are_wrapped_is_on_errors_to_decide(
    on_error: str, printed: str | None, tmp_path: Path, needs_tensorflow: None
) -> None:
    """It never vanishes: there is a line and a record, and with "cpu" or "fail" no GPU is used."""
    ended = run(f'on_error = "{on_error}"\n[gpu]\nmemory_growth = true\n', BROKEN + EAGER, tmp_path)
    assert "read-only module" in ended.stderr + "".join(ended.ours)
    assert "internal-error" in {finding["code"] for record in ended.records for finding in record["findings"]}
    if printed is None:
        assert ended.status == 1
        assert "PolicyError" in ended.stderr
    else:
        assert ended.stdout == f"{printed}\n"
    if on_error != "warn":
        assert [request for request in ended.requests if request.op == "alloc"] == []
