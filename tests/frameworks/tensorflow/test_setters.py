"""User code that calls `tf.config` first: no exception of ours, its tighter wishes kept, the bounds held."""

from __future__ import annotations

from itertools import product

import pytest

from tests.frameworks.harness import GROWING, Case, World
from tests.frameworks.tensorflow.test_ways_in import MAIN, Reports, check_bounds

#: What the same program finds without a policy: as many GPUs, and growth.
TWIN = World(None, gpus="2x24GiB", inherited=(GROWING,), armed=False)

SETTERS = {
    "growth": "set_memory_growth",
    "growth-on-one": "set_memory_growth:first",
    "growth-off": "set_growth_off",
    "bigger-limit": "set_logical_devices:9000",
    "smaller-limit": "set_logical_devices:300",
    "smaller-limits": "set_logical_devices:300;200",
    "split": "set_logical_devices:4000,4000",
    "small-split": "set_logical_devices:200,300",
    "virtual-alias": "set_virtual_devices:5000",
    "one-visible": "set_visible_devices:1",
    "reversed": "set_visible_devices:1,0",
    "soft-placement": "set_soft_placement",
}

#: After the setters; each takes what it can get.
WAYS = {
    "eager": ("eager", "take_all"),
    "keras_fit": ("keras_fit", "take_all"),
    "tf_function": ("tf_function", "take_all"),
    "list_logical_devices": ("list_logical_devices", "take_all"),
    "get_memory_info": ("get_memory_info", "take_all"),
    "mirrored": ("mirrored", "take_all"),
    "list_local_devices": ("list_local_devices", "take_all"),
    "is_gpu_available": ("is_gpu_available", "take_all"),
    "gpu_device_name": ("gpu_device_name", "take_all"),
    "measure_costs": ("measure_costs", "take_all"),
    "optimize_graph": ("optimize_graph", "take_all"),
    "session": ("small_session", "take_all"),
    "session-growth": ("session:allow_growth=1", "take_all"),
    "session-0.4": ("session:per_process_gpu_memory_fraction=0.4", "take_all"),
    "session-1.5": ("session:per_process_gpu_memory_fraction=1.5", "take_all"),
    "session-one-gpu": ("session:device_count=1",),
    "session-listed": ("session:visible_device_list=1",),
    "session-unified": ("session:use_unified_memory=1",),
    "session-async": ("session:use_cuda_malloc_async=1",),
    "session-split": ("session:num_virtual_devices_per_gpu=2",),
    "server": ("server",),
}
#: These fork, and every process calls the setter by itself.
_FORKING_WAYS = ("parameter_server", "multi_worker")
#: The ways that pass the same entry point first, one line for each entry point, and last those that fork.
_ALIKE = (
    ("eager", "keras_fit", "tf_function", "list_logical_devices", "get_memory_info", "mirrored"),
    ("list_local_devices", "is_gpu_available", "gpu_device_name"),
    ("measure_costs",),
    ("optimize_graph",),
    tuple(way for way in WAYS if way.startswith("session")),
    ("server",),
    _FORKING_WAYS,
)
_ON_EVERY_TENSORFLOW = ("growth", "bigger-limit", "smaller-limit", "split", "one-visible")


def _steps(setter: str, way: str) -> tuple[str, ...]:
    if way in _FORKING_WAYS:
        return ("impatient", f"{way}:{SETTERS[setter]}")
    return ("impatient", SETTERS[setter], *WAYS[way])


def _marks(setter: str, way: str, matrix: tuple[str, ...], *, twins: bool = False) -> list[pytest.MarkDecorator]:
    """Mark a pair that no quick run needs: that has each setter before each entry point, and each way in.

    Of the pairs that also run without a policy it has every other entry point.
    """
    number = list(SETTERS).index(setter)
    is_quick = any(way == ways[number % len(ways)] for ways in (_ALIKE[number % 2 :: 2] if twins else _ALIKE))
    marks = [] if is_quick else [pytest.mark.exhaustive]
    return [*marks, pytest.mark.matrix] if way == "eager" and setter in matrix else marks


PAIRS = tuple(product(SETTERS, (*WAYS, *_FORKING_WAYS)))


def test_a_quick_run_has_each_setter_before_each_entry_point() -> None:
    """What `make test` leaves out of the pairs costs it no setter at an entry point, and no way in."""
    quick = {pair for pair in PAIRS if not _marks(*pair, matrix=())}
    assert {(setter, ways) for setter in SETTERS for ways in _ALIKE if quick & set(product([setter], ways))} == set(
        product(SETTERS, _ALIKE)
    )
    assert {way for _, way in quick} == {way for _, way in PAIRS}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(MAIN, _steps(*pair)), id="-".join(pair), marks=_marks(*pair, _ON_EVERY_TENSORFLOW))
        for pair in PAIRS
    ],
)
def test_after_a_setter_the_bounds_hold(case: Case, reports: Reports) -> None:
    """Whatever the program told tf.config, only GPUs 1 and 2 are touched, and never beyond 1000 MiB each."""
    report = reports(case)
    check_bounds(report, {1, 2}, first_mib=2)
    assert report.gpus or report.error is not None, "the program was to take memory"


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(
            (Case(MAIN, _steps(*pair)), Case(TWIN, _steps(*pair))),
            id="-".join(pair),
            marks=_marks(*pair, tuple(SETTERS), twins=True),
        )
        for pair in PAIRS
    ],
)
def test_a_program_sees_no_exception_but_tensorflows_own(cases: tuple[Case, Case], reports: Reports) -> None:
    """What raises without a policy raises the same with one, at the same step and in the same words. Nothing else does.

    The twins grow, as the policy says: TensorFlow refuses nothing for that, and takes a hundredth of the memory.
    """
    governed, raw = (reports(case) for case in cases)
    assert governed.error == raw.error, governed.stderr


#: Setter -> the most MiB of GPU 1 and GPU 2.
TIGHTER = {
    "smaller-limit": (300, 1000),
    "smaller-limits": (300, 200),
    "small-split": (500, 1000),
    "one-visible": (0, 1000),
}


@pytest.mark.parametrize(
    ("case", "peaks"),
    [
        pytest.param(Case(MAIN, _steps(setter, way)), peaks, id=f"{setter}-{way}", marks=_marks(setter, way, ()))
        for setter, peaks in TIGHTER.items()
        for way in _ALIKE[0]
    ],
)
def test_a_tighter_wish_is_kept(case: Case, peaks: tuple[int, int], reports: Reports) -> None:
    """A smaller limit stays smaller, a hidden GPU hidden; what the program left open is at the policy's limit."""
    report = reports(case)
    assert report.error is None, report.stderr
    for gpu, peak in zip((1, 2), peaks, strict=True):
        assert peak * 0.5 <= report.peak_mib(gpu) <= peak


#: Setter -> what the context's entry point was asked for and what it gave, as virtual_devices, and the event.
ASKED_AND_GIVEN: dict[str, tuple[list[list[float]] | None, list[list[float]], str]] = {
    "growth": (None, [[1000], [1000]], "policy_applied"),
    "growth-off": (None, [[1000], [1000]], "policy_applied"),
    "bigger-limit": ([[9000], []], [[1000], [1000]], "policy_clamped"),
    "smaller-limits": ([[300], [200]], [[300], [200]], "policy_applied"),
    "split": ([[4000, 4000], []], [[500, 500], [1000]], "policy_clamped"),
    "small-split": ([[200, 300], []], [[200, 300], [1000]], "policy_applied"),
    "virtual-alias": ([[5000], []], [[1000], [1000]], "policy_clamped"),
    "one-visible": (None, [[1000]], "policy_applied"),
}


@pytest.mark.parametrize(
    ("case", "asked", "given", "event"),
    [pytest.param(Case(MAIN, _steps(setter, "eager")), *row, id=setter) for setter, row in ASKED_AND_GIVEN.items()],
)
def test_the_record_says_what_was_asked_and_given(
    case: Case, asked: object, given: object, event: str, reports: Reports
) -> None:
    """The wishes of tf.config are on record beside what TensorFlow was handed; growth is on."""
    record = reports(case).passed("TFE_ContextOptionsSetConfig")
    assert record["asked"].get("virtual_devices") == asked
    assert record["given"]["virtual_devices"] == given
    assert record["given"]["allow_growth"] is True
    assert record["growth"] is True
    assert record["event"] == event
