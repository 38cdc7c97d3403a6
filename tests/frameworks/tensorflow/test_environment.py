"""Environment variables a program or its launcher sets, and the ways people say "CPU only"."""

from __future__ import annotations

import pytest

from tests.frameworks.harness import Case, World
from tests.frameworks.tensorflow.test_ways_in import MAIN, RAW, Reports, check_bounds

#: A few ways in, greedy ones.
WAYS = (("eager", "take_all"), ("session",), ("list_local_devices", "take_all"))
#: The other entry points, and what has more than one process.
OTHER_WAYS = (("measure_costs", "take_all"), ("server",), ("parameter_server", "take_all"))


#: A world that starts with variables of its own has to import TensorFlow for them alone: `make test` has few of these.
_EXHAUSTIVE = [pytest.mark.exhaustive]


def _main(**variables: str) -> World:
    """The main policy; the program sets the variables before it imports TensorFlow."""
    return World(MAIN.policy, before=tuple(variables.items()))


def _granted(**variables: str) -> World:
    """The main policy; the launcher sets the variables."""
    return World(MAIN.policy, inherited=tuple(variables.items()))


def _after(way: tuple[str, ...], **variables: str) -> Case:
    """The main policy; the program sets the variables after it imported TensorFlow."""
    return Case(MAIN, (*(f"set_environment:{name}={value}" for name, value in variables.items()), *way))


DEFEATING = (
    ("TF_FORCE_GPU_ALLOW_GROWTH", "false"),
    ("TF_GPU_ALLOCATOR", "cuda_malloc"),
    ("TF_GPU_ALLOCATOR", "cuda_malloc_async"),
    ("TF_FORCE_UNIFIED_MEMORY", "1"),
    ("TF_DEVICE_MIN_SYS_MEMORY_IN_MB", "1"),
)


def _moments(name: str, value: str, way: tuple[str, ...]) -> list[object]:
    variables = {name: value}
    marks = [pytest.mark.matrix] if way == WAYS[0] else []
    label = f"{name}={value}-{way[0]}"
    return [
        pytest.param(Case(_main(**variables), way), id=f"before-{label}", marks=_EXHAUSTIVE),
        pytest.param(_after(way, **variables), id=f"after-{label}", marks=marks),
    ]


#: Of the allocators the last.
ALL_AT_ONCE = dict(DEFEATING)
_BEFORE_TOGETHER = [pytest.param(Case(_main(**ALL_AT_ONCE), way), id=f"before-all-{way[0]}") for way in WAYS]
_BEFORE_AND_AFTER = [item for name, value in DEFEATING for way in WAYS for item in _moments(name, value, way)]
_AT_OTHER_ENTRY_POINTS = [
    pytest.param(_after(way, **{name: value}), id=f"after-{name}={value}-{way[0]}")
    for name, value in DEFEATING
    for way in OTHER_WAYS
]


@pytest.mark.parametrize("case", [*_BEFORE_TOGETHER, *_BEFORE_AND_AFTER, *_AT_OTHER_ENTRY_POINTS])
def test_variables_that_would_defeat_the_policy_do_not(case: Case, reports: Reports) -> None:
    """Growth and the limit hold, whenever the variable was set."""
    report = reports(case)
    assert report.error is None, report.stderr
    check_bounds(report, {1, 2}, first_mib=2)
    assert report.peak_mib(1) == 1000
    assert {request.call for request in report.requests if request.op == "alloc"} == {"cuMemAlloc"}


#: The variable, and the key of the main policy that it would defeat.
HELD = [(name, value, "memory_growth" if "GROWTH" in name else "memory_limit") for name, value in DEFEATING]


@pytest.mark.parametrize(
    ("case", "variable", "key"),
    [
        pytest.param(made, f"{name}={value}", key, id=f"{moment}-{name}={value}", marks=marks)
        for name, value, key in HELD
        for moment, made, marks in (
            ("before", Case(_main(**{name: value}), WAYS[0]), _EXHAUSTIVE),
            ("before-all", Case(_main(**ALL_AT_ONCE), WAYS[0]), []),
            ("after", _after(("eager",), **{name: value}), []),
        )
        if moment != "before-all" or ALL_AT_ONCE[name] == value
    ],
)
def test_a_cleared_variable_is_a_clamp_with_the_key_that_held(
    case: Case, variable: str, key: str, reports: Reports
) -> None:
    """The event is policy_clamped, whenever the variable was set, and the finding names the file's key."""
    record = reports(case).passed("TFE_ContextOptionsSetConfig")
    assert (record["event"], record["status"]) == ("policy_clamped", "clamped")
    (finding,) = (finding for finding in record["findings"] if variable in finding["message"])
    assert (finding["asked_by"], finding["key"]) == ("the program", f"gpu.{key}")
    assert finding["held_by"] == f"{finding['path']} (gpu.{key})"
    assert finding["path"].endswith("/tfgpu.toml")


# ---- CUDA_VISIBLE_DEVICES

#: What the program writes into CUDA_VISIBLE_DEVICES -> the GPUs it gets, by number in the machine.
WISHES = {
    "0,1,2,3": {1, 2},
    "2": {2},
    "2,1": {1, 2},
    "0,2": {2},
    "0": {1, 2},  # no overlap: never silent days on the CPU
    "GPU-a2fa4e00": {2},
}


def _wishes() -> list[object]:
    cases: list[object] = []
    for wish, gpus in WISHES.items():
        variables = {"CUDA_VISIBLE_DEVICES": wish}
        marks = [] if wish == "0,2" else _EXHAUSTIVE
        for way in WAYS:
            cases.append(pytest.param(Case(_main(**variables), way), gpus, id=f"{wish}-before-{way[0]}", marks=marks))
            cases.append(pytest.param(_after(way, **variables), gpus, id=f"{wish}-after-{way[0]}"))
    return cases


@pytest.mark.parametrize(("case", "gpus"), _wishes())
def test_the_programs_own_list_narrows_and_never_widens(case: Case, gpus: set[int], reports: Reports) -> None:
    """A list the program sets, before or after the import, is cut to the policy's GPUs; no overlap keeps those."""
    report = reports(case)
    assert report.error is None, report.stderr
    check_bounds(report, gpus)
    assert report.gpus


@pytest.mark.parametrize("case", [_after(("eager",), CUDA_VISIBLE_DEVICES="0")], ids=["no-overlap"])
def test_a_list_without_overlap_is_a_finding(case: Case, reports: Reports) -> None:
    """GPU 0 is not the program's: it keeps GPUs 1 and 2, and stderr says so."""
    report = reports(case)
    assert "tfgpu:" in report.stderr
    assert 'CUDA_VISIBLE_DEVICES="0"' in report.stderr


@pytest.mark.parametrize(
    "case", [Case(MAIN, ("eager", "set_environment:CUDA_VISIBLE_DEVICES=0", "session"))], ids=["later"]
)
def test_a_list_set_after_the_first_listing_has_no_effect(case: Case, reports: Reports) -> None:
    """CUDA reads the variable once: the GPUs stay what they are, and the record says that it was too late."""
    report = reports(case)
    check_bounds(report, {1, 2})
    assert "too-late" in report.codes


#: The grant -> what positions [1, 2] mean within it, by number in the machine.
GRANTS = {
    "0,1,2,3": {1, 2},
    "3,2,1": {2, 1},
    "2,3": {3},
    "3": {3},  # neither position is there: the grant stays, with a finding
    "GPU-a3fa4e00,GPU-a0fa4e00,GPU-a1fa4e00": {0, 1},
}


@pytest.mark.parametrize(
    ("case", "gpus"),
    [
        pytest.param(
            Case(_granted(CUDA_VISIBLE_DEVICES=grant), way),
            gpus,
            id=f"{grant}-{way[0]}",
            marks=[] if grant == "3,2,1" else _EXHAUSTIVE,
        )
        for grant, gpus in GRANTS.items()
        for way in WAYS[:2]
    ],
)
def test_positions_count_within_the_grant(case: Case, gpus: set[int], reports: Reports) -> None:
    """A project's numbers are positions in the list the scheduler gave; nothing beyond the list is touched."""
    report = reports(case)
    assert report.error is None, report.stderr
    check_bounds(report, gpus)
    assert report.gpus


#: The grant -> its second GPU, by number in the machine.
SECOND = {"3,2,1": 2, "GPU-a3fa4e00,GPU-a0fa4e00,GPU-a1fa4e00": 0}


@pytest.mark.parametrize(
    ("case", "gpu"),
    [
        pytest.param(
            Case(_granted(CUDA_VISIBLE_DEVICES=grant), ("executed",)),
            gpu,
            id=grant,
            marks=[] if grant == "3,2,1" else _EXHAUSTIVE,
        )
        for grant, gpu in SECOND.items()
    ],
)
def test_positions_mean_the_same_in_a_grandchild(case: Case, gpu: int, reports: Reports) -> None:
    """The grant is carried on: the grandchild does not count again within the list its parent narrowed."""
    report = reports(case)
    assert report.results == ["2"]
    assert set(report.gpus) == {gpu}


@pytest.mark.parametrize(
    "case",
    [Case(MAIN, ("unset_environment:CUDA_VISIBLE_DEVICES", *way)) for way in WAYS],
    ids=[way[0] for way in WAYS],
)
def test_removing_the_variable_widens_nothing(case: Case, reports: Reports) -> None:
    """A program that deletes CUDA_VISIBLE_DEVICES after the import still gets GPUs 1 and 2 alone."""
    report = reports(case)
    assert report.error is None, report.stderr
    check_bounds(report, {1, 2})
    assert report.gpus


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            Case(
                World("[gpu]\nvisible_devices = [0]\n", gpus="2x24GiB:A,1x80GiB:B"),
                ("set_environment:CUDA_DEVICE_ORDER=FASTEST_FIRST", "eager"),
            ),
            id="eager",
        )
    ],
)
def test_the_programs_own_order_names_no_other_card(case: Case, reports: Reports) -> None:
    """Numbers are nvidia-smi's: CUDA_DEVICE_ORDER, set by the program, does not turn GPU 0 into another card."""
    report = reports(case)
    assert report.visible == {1}
    assert set(report.gpus) == {0}


# ---- "CPU only"

#: Steps that say "no GPU" and then compute.
CPU_IDIOMS = {
    "set_visible_devices": ("hide_gpus", "eager"),
    "set_visible_devices-keras": ("hide_gpus", "keras_fit"),
    "device_count": ("session:device_count=0",),
    "variable-empty-after": ("set_environment:CUDA_VISIBLE_DEVICES=", "eager"),
    "variable-minus-one-after": ("set_environment:CUDA_VISIBLE_DEVICES=-1", "eager"),
    "variable-minus-one-after-session": ("set_environment:CUDA_VISIBLE_DEVICES=-1", "session"),
    "variable-minus-one-after-listing": ("set_environment:CUDA_VISIBLE_DEVICES=-1", "list_local_devices"),
}


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param((Case(MAIN, steps), Case(RAW, steps)), id=name, marks=pytest.mark.matrix)
        for name, steps in CPU_IDIOMS.items()
    ],
)
def test_cpu_only_means_cpu_only(cases: tuple[Case, Case], reports: Reports) -> None:
    """No GPU's memory is touched, and CUDA is opened only where raw TensorFlow opens it, too."""
    ours, raw = (reports(case) for case in cases)
    assert ours.error is None, ours.stderr
    assert raw.error is None, raw.stderr
    assert not ours.gpus
    assert not raw.gpus
    assert ours.results == raw.results
    assert raw.cuda_opened or not ours.cuda_opened


@pytest.mark.parametrize("case", [Case(MAIN, CPU_IDIOMS["device_count"])], ids=["device_count"])
def test_device_count_0_keeps_cuda_closed(case: Case, reports: Reports) -> None:
    """A session without GPUs does not call cuInit."""
    report = reports(case)
    assert not report.cuda_opened
    assert report.results[0]["gpus"] == 0


def _empty_lists() -> list[object]:
    cases: list[object] = []
    for value in ("", "-1"):
        for moment, make in (("inherited", _granted), ("before", _main)):
            marks = [] if (value, moment) in {("", "inherited"), ("-1", "before")} else _EXHAUSTIVE
            for way in ("eager", "session"):
                # CUDA reads the variable when it is opened: without a policy it is all the same when it was set.
                raw = Case(RAW, (f"set_environment:CUDA_VISIBLE_DEVICES={value}", way))
                pair = (Case(make(CUDA_VISIBLE_DEVICES=value), (way,)), raw)
                cases.append(pytest.param(pair, id=f'{moment}-"{value}"-{way}', marks=marks))
    return cases


@pytest.mark.parametrize("cases", _empty_lists())
def test_an_empty_list_means_no_gpu(cases: tuple[Case, Case], reports: Reports) -> None:
    """CUDA_VISIBLE_DEVICES="" and "-1" are an explicit none: no GPU, no finding, CUDA closed where raw keeps it so."""
    ours, raw = (reports(case) for case in cases)
    assert ours.error is None, ours.stderr
    assert not ours.gpus
    assert ours.visible <= {0}
    assert raw.cuda_opened or not ours.cuda_opened
    assert ours.results == raw.results[1:]
    assert "no-overlap" not in ours.codes
