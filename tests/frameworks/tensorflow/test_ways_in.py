"""Two of four GPUs, growth, 1000 MiB: at each way into TensorFlow, by what the driver was asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import pytest

from tests.frameworks.harness import Case, Report, World

Reports = Callable[[Case], Report]

LIMIT_MIB = 1000
MAIN = World('[gpu]\nvisible_devices = [1, 2]\nmemory_growth = true\nmemory_limit = "1000MiB"\n')
RAW = World(None, armed=False)

#: What creates devices through eager execution's context, then takes what it can get.
CONTEXT_WAYS = {
    name: (name, "take_all")
    for name in (
        "eager",
        "keras_fit",
        "tf_function",
        "variable",
        "dataset",
        "tf_device",
        "threads",
        "list_logical_devices",
        "get_memory_info",
        "mirrored",
        "one_device",
        "parameter_server",
        "enable_eager_execution:0.4",
        "enable_eager_execution:1.5",
    )
}
#: What creates devices elsewhere; eager execution gets the allocators that are there then.
LISTING_WAYS = {
    name: (name, "take_all")
    for name in (
        "list_local_devices",
        "is_gpu_available",
        "gpu_device_name",
        "measure_costs",
        "optimize_graph",
        "interactive_session",
        "monitored_session",
    )
}
#: Sessions are greedy by themselves. What comes after the colon is their own ConfigProto.
SESSION_WAYS = {
    name: (name,)
    for name in (
        "session",
        "server",
        "session:allow_growth=1",
        "session:per_process_gpu_memory_fraction=0.4",
        "session:per_process_gpu_memory_fraction=1.5",
        "session:device_count=1",
        "session:device_count=-1",
        "session:device_count=7",
        "session:visible_device_list=0",
        "session:visible_device_list=1",
        "session:visible_device_list=1,0",
        "session:visible_device_list=1+device_count=1",
        "session:use_unified_memory=1",
        "session:use_cuda_malloc_async=1",
        "session:num_virtual_devices_per_gpu=2",
        "session:virtual_devices=5000|5000",
        "session:virtual_devices=5000,5000|200",
        "session:virtual_devices=300|200",
        "session:virtual_devices=4000,4000|4000,4000+priority=0,-1",
        "session:virtual_devices=8000+visible_device_list=1",
        "session:virtual_devices=8000+device_count=1+visible_device_list=0",
    )
}
#: More than one process.
PROCESS_WAYS = {name: (name,) for name in ("forked", "forked_pool", "spawned", "multi_worker")}
#: One thing after another.
SEQUENCES = {
    "-".join(steps): steps
    for steps in (
        ("session", "session:per_process_gpu_memory_fraction=0.6"),
        ("session:per_process_gpu_memory_fraction=0.02", "session:per_process_gpu_memory_fraction=0.6"),
        ("session", "eager", "take_all"),
        ("eager", "take_all", "session"),
        ("list_physical_devices", "eager", "take_all"),
        ("list_physical_devices", "session", "server"),
        ("measure_costs", "session:virtual_devices=4000|4000"),
    )
}
GREEDY_WAYS = CONTEXT_WAYS | LISTING_WAYS | SESSION_WAYS | PROCESS_WAYS | SEQUENCES

#: The part that is run again on other releases of TensorFlow.
ON_EVERY_TENSORFLOW = {
    "eager",
    "keras_fit",
    "tf_function",
    "mirrored",
    "parameter_server",
    "multi_worker",
    "list_local_devices",
    "is_gpu_available",
    "gpu_device_name",
    "measure_costs",
    "optimize_graph",
    "server",
    "session",
    "session:allow_growth=1",
    "session:per_process_gpu_memory_fraction=0.4",
    "session:per_process_gpu_memory_fraction=1.5",
    "session:use_unified_memory=1",
    "session:use_cuda_malloc_async=1",
    "session:num_virtual_devices_per_gpu=2",
    "session:device_count=1",
    "session:virtual_devices=5000|5000",
    "forked",
    "spawned",
}


def named_cases(world: World, ways: Mapping[str, tuple[str, ...]], matrix: Collection[str] = ()) -> list[object]:
    """One parameter a way, marked where it is also run on other releases."""
    return [
        pytest.param(Case(world, steps), id=name, marks=[pytest.mark.matrix] if name in matrix else [])
        for name, steps in ways.items()
    ]


def check_bounds(report: Report, gpus: set[int], limit_mib: float = LIMIT_MIB, first_mib: float = 16) -> None:
    """What holds whatever the program does: these GPUs, small first requests, never more than the limit."""
    assert report.visible == {len(gpus)}
    assert set(report.gpus) <= gpus
    for gpu in report.gpus:
        assert 0 < report.first_mib(gpu) <= first_mib
        assert report.peak_mib(gpu) <= limit_mib


@pytest.mark.parametrize("case", named_cases(MAIN, GREEDY_WAYS, ON_EVERY_TENSORFLOW))
def test_a_greedy_program_gets_two_gpus_and_the_limit(case: Case, reports: Reports) -> None:
    """Whatever comes first, only GPUs 1 and 2 are touched, from 2 MiB on, and never beyond 1000 MiB each."""
    report = reports(case)
    assert report.error is None, report.stderr
    check_bounds(report, {1, 2}, first_mib=2)
    assert report.gpus, "the program was to take memory"
    assert any(request.op == "alloc" for request in report.requests)
    normal = {"policy_loaded", "policy_applied", "policy_clamped", "policy_ended"}
    assert {record["event"] for record in report.records} <= normal
    assert report.records


@pytest.mark.parametrize("case", named_cases(MAIN, CONTEXT_WAYS | LISTING_WAYS))
def test_a_greedy_program_gets_what_the_policy_leaves_it(case: Case, reports: Reports) -> None:
    """The limit is no less than declared: of 1000 MiB a program can use most, on both GPUs."""
    report = reports(case)
    assert all(700 <= taken <= LIMIT_MIB for taken in report.results[-1])
    assert [report.peak_mib(gpu) for gpu in (1, 2)] == [LIMIT_MIB, LIMIT_MIB]


@pytest.mark.parametrize("way", ["eager", "session", "list_local_devices"])
@pytest.mark.matrix
def test_the_greedy_programs_take_everything_without_a_policy(way: str, reports: Reports) -> None:
    """The tests above can fail: raw TensorFlow shows four GPUs and takes 23040 MiB of 24576."""
    report = reports(Case(RAW, (way, "eager")))
    assert report.visible == {4}
    assert max(report.first_mib(gpu) for gpu in report.gpus) == 23040


@pytest.mark.parametrize("case", [pytest.param(Case(MAIN, ("eager", "too_big")), marks=pytest.mark.matrix, id="eager")])
def test_one_tensor_beyond_the_limit_is_refused(case: Case, reports: Reports) -> None:
    """A tensor of 1200 MiB under a limit of 1000 is a ResourceExhaustedError, on a card of 24 GiB."""
    report = reports(case)
    assert report.results[-1] == "ResourceExhaustedError"
    check_bounds(report, {1, 2})


SESSION_GPUS = {
    "session": 2,
    "session:device_count=1": 1,
    "session:device_count=-1": 2,
    "session:device_count=7": 2,
    "session:visible_device_list=1": 1,
    "session:visible_device_list=1,0": 2,
    "session:num_virtual_devices_per_gpu=2": 4,
    "session:virtual_devices=5000,5000|200": 3,
    "session:virtual_devices=8000+device_count=1+visible_device_list=0": 1,
}


@pytest.mark.parametrize(
    ("case", "gpus"),
    [pytest.param(Case(MAIN, (name,)), gpus, id=name) for name, gpus in SESSION_GPUS.items()],
)
def test_a_session_has_the_devices_its_configproto_asks_for(case: Case, gpus: int, reports: Reports) -> None:
    """The clamp narrows sizes: how many devices a session has is as raw TensorFlow makes them."""
    assert reports(case).results[0]["gpus"] == gpus


TIGHTER = {
    "session:virtual_devices=300|200": {1: 300.0},
    "session:virtual_devices=5000,5000|200": {1: 500.0},
    "session:num_virtual_devices_per_gpu=2": {1: 500.0},
    "session:visible_device_list=1": {2: 1000.0},
    "session:visible_device_list=1,0": {2: 1000.0},
    "session:virtual_devices=8000+visible_device_list=1": {2: 1000.0},
}


@pytest.mark.parametrize(
    ("case", "peaks"), [pytest.param(Case(MAIN, (name,)), peaks, id=name) for name, peaks in TIGHTER.items()]
)
def test_a_session_keeps_its_own_tighter_wish(case: Case, peaks: dict[int, float], reports: Reports) -> None:
    """A session that asks for less memory, or another GPU of the two, gets that, and no less."""
    report = reports(case)
    assert set(report.gpus) == set(peaks)
    for gpu, peak in peaks.items():
        assert peak * 0.8 <= report.peak_mib(gpu) <= peak


@pytest.mark.parametrize("case", named_cases(MAIN, {"x": ("session:per_process_gpu_memory_fraction=0.02",)}))
def test_a_smaller_fraction_stays_smaller(case: Case, reports: Reports) -> None:
    """2 % of 24576 MiB are 491.52 MiB, less than the limit: the session gets no more than that."""
    report = reports(case)
    assert 400 < report.peak_mib(1) <= 491.6
    record = report.passed("TF_NewSessionOptions")
    assert record["given"]["virtual_devices"] == [[491.0], [491.0]]
    assert record["event"] == "policy_applied"


CLAMPED = {
    "session:per_process_gpu_memory_fraction=1.5": ("per_process_gpu_memory_fraction", 1.5),
    "session:use_unified_memory=1": ("use_unified_memory", True),
    "session:use_cuda_malloc_async=1": ("use_cuda_malloc_async", True),
    "session:virtual_devices=5000|5000": ("virtual_devices", [[5000.0], [5000.0]]),
}


@pytest.mark.parametrize(
    ("case", "key", "asked"),
    [pytest.param(Case(MAIN, (name,)), *pair, id=name) for name, pair in CLAMPED.items()],
)
def test_the_record_says_asked_and_given(case: Case, key: str, asked: object, reports: Reports) -> None:
    """What the program wanted is on record beside what it was given, as `policy_clamped`."""
    record = reports(case).passed("TF_NewSessionOptions")
    assert record["event"] == "policy_clamped"
    assert record["asked"][key] == asked
    assert record["given"]["virtual_devices"] == [[1000.0], [1000.0]]
    assert key == "virtual_devices" or key not in record["given"]
    assert [(device["token"], device["limit_bytes"]) for device in record["devices"]] == [
        ("1", 1000 << 20),
        ("2", 1000 << 20),
    ]


@pytest.mark.parametrize("case", named_cases(MAIN, {"x": SESSION_WAYS["session:allow_growth=1"]}))
def test_a_wish_within_the_policy_is_applied_not_clamped(case: Case, reports: Reports) -> None:
    """A program that asks for growth, as the policy does, is not told that it was clamped."""
    assert reports(case).passed("TF_NewSessionOptions")["event"] == "policy_applied"


REFUSED = (
    "small_session:visible_device_list=0,0",
    "small_session:visible_device_list=x",
    "small_session:visible_device_list=9",
    "small_session:virtual_devices=100|100|100|100|100|100",
)


@pytest.mark.parametrize(
    "cases", [pytest.param((Case(MAIN, (name,)), Case(RAW, (name,))), id=name) for name in REFUSED]
)
def test_what_tensorflow_refuses_it_refuses_in_its_own_words(cases: tuple[Case, Case], reports: Reports) -> None:
    """A malformed ConfigProto raises the same error with a policy as without one, and takes no memory."""
    ours, raw = (reports(case) for case in cases)
    assert raw.error is not None
    assert ours.error is not None
    assert ours.error["kinds"] == raw.error["kinds"]
    assert not ours.gpus


@pytest.mark.parametrize("case", [pytest.param(Case(MAIN, ("nothing",)), marks=pytest.mark.matrix, id="import")])
def test_import_alone_opens_no_cuda(case: Case, reports: Reports) -> None:
    """`import tensorflow` under a policy leaves the driver closed, so that a program can fork."""
    report = reports(case)
    assert report.requests == ()
    assert report.results == [None]


@pytest.mark.parametrize("case", [pytest.param(Case(MAIN, ("executed",)), marks=pytest.mark.matrix, id="executed")])
def test_a_program_that_the_program_starts_is_governed(case: Case, reports: Reports) -> None:
    """The grandchild reads the file against an already narrowed list, and [1, 2] are still the same GPUs."""
    report = reports(case)
    assert report.results == ["2"]
    check_bounds(report, {1, 2})
    assert set(report.gpus) == {1}


@pytest.mark.parametrize("case", named_cases(MAIN, {"multi_worker": PROCESS_WAYS["multi_worker"]}))
def test_each_process_of_a_multi_worker_strategy_is_bounded(case: Case, reports: Reports) -> None:
    """Both processes take their own 1000 MiB of both GPUs: a limit is per process."""
    report = reports(case)
    assert report.results == [4]
    assert {gpu: len(use.processes) for gpu, use in report.gpus.items()} == {1: 2, 2: 2}
    assert [report.peak_mib(gpu) for gpu in (1, 2)] == [1000, 1000]


@pytest.mark.parametrize("case", named_cases(MAIN, {"parameter_server": CONTEXT_WAYS["parameter_server"]}))
def test_each_server_of_a_parameter_server_strategy_is_bounded(case: Case, reports: Reports) -> None:
    """Workers and servers pass the entry point of tf.distribute.Server, the coordinator that of eager execution."""
    passed = [record.get("entry_point") for record in reports(case).records]
    assert passed.count("TF_NewServer") == 2
    assert "TFE_ContextOptionsSetConfig" in passed
